"""How good generated pictures are, and how near two sets of pictures are to each other.

Pictures are (n, 3, height, width) in [0, 1]. `judge` is any network with `maps(pixels)`, its feature maps, `features(pixels)` (n, features) and
`classes(pixels)` (n,): the numbers compare only under one judge. What is averaged or multiplied is computed in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import OptionError

CHUNK = 256                     # pictures that a judge is given at once


@dataclass(frozen=True)
class Accuracy:
    """Share of pictures that show what was asked for, its standard error (None for a single picture), and the share by class."""

    value: float
    stderr: float | None
    by_class: dict[int, float]


def class_accuracy(pixels: Tensor, labels: Tensor, judge: Any) -> Accuracy:
    """How often the judge sees the class `labels` (n,) that each picture was asked to show."""
    _require_pictures(pixels)
    if labels.shape != pixels.shape[:1]:
        raise OptionError(f"{len(pixels)} pictures need as many labels, got {tuple(labels.shape)}")
    is_right = (_in_chunks(judge.classes, pixels).cpu() == labels.cpu()).double()
    n, value = len(is_right), float(is_right.mean())
    stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
    return Accuracy(value, stderr, {c: float(is_right[labels.cpu() == c].mean()) for c in sorted(set(labels.tolist()))})


def frechet_distance(pixels: Tensor, real: Tensor, judge: Any) -> float:
    """`frechet_distance_of_features` of what the judge makes of generated and real pictures."""
    _require_pictures(pixels)
    _require_pictures(real)
    return frechet_distance_of_features(_in_chunks(judge.features, pixels), _in_chunks(judge.features, real))


def frechet_distance_of_features(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of two normal distributions with the means and covariances of a (n, d) and b (m, d).

    ‖μa − μb‖² + tr(Σa + Σb − 2 (Σa Σb)^½), in fp64. Few pictures make it too large: compare only equal n, well above d.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise OptionError(f"features must be (n, d) with equal d and n of at least 2, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    root = _root(cov_a)
    # Σa Σb and Σa^½ Σb Σa^½ have the same eigenvalues, and the second is symmetric: no complex numbers
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    found = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    # below 0 by rounding only
    return max(float(found), 0.0)


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """(n,) fp64, in dB: the peak signal-to-noise ratio of each picture and its counterpart, infinite where they are the same."""
    _require_pairs(pixels, others)
    error = (pixels.double() - others.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def perceptual_distance(pixels: Tensor, others: Tensor, judge: Any) -> Tensor:
    """(n,) fp64: how far apart the judge sees each picture and its counterpart; 0 for the same, at most 4.

    As LPIPS without learned weights: maps normalised over channels, squared differences summed over channels, their mean over places, then layers.
    """
    _require_pairs(pixels, others)

    def distance(both: Tensor) -> Tensor:
        found = []
        for maps in judge.maps(both):
            x, y = torch.nn.functional.normalize(maps.double(), dim=1, eps=1e-8).chunk(2)
            found.append((x - y).square().sum(1).flatten(1).mean(1))
        return torch.stack(found).mean(0)

    return torch.cat([
        _looked_at(distance, torch.cat([pixels[i : i + CHUNK], others[i : i + CHUNK]])) for i in range(0, len(pixels), CHUNK)
    ])  # fmt: skip


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T  # type: ignore[no-any-return]


def _in_chunks(look: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    return torch.cat([_looked_at(look, pixels[i : i + CHUNK]) for i in range(0, len(pixels), CHUNK)])


@torch.no_grad()
def _looked_at(look: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    return look(pixels)


def _require_pictures(pixels: Tensor) -> None:
    if pixels.dim() != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise OptionError(f"pictures must be (n, 3, height, width), got {tuple(pixels.shape)}")


def _require_pairs(pixels: Tensor, others: Tensor) -> None:
    _require_pictures(pixels)
    if pixels.shape != others.shape:
        raise OptionError(f"pictures are compared one by one and need equal shapes, got {tuple(pixels.shape)} and {tuple(others.shape)}")
