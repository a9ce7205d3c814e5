"""Drawn digits: one stroke-drawn digit on a plain dark ground, the same picture for the same split, seed and number.

Colour, stroke, size, place, slant and turn differ from picture to picture. Every number has its own random stream, so that there are as many
pictures as one asks for and none depends on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from accel.errors import OptionError

SIZE = 32                       # pixels per side
CLASSES = tuple("0123456789")
SPLITS = {"train": 0, "validation": 1, "test": 2}
N_CHOICES = 13                  # uniform random numbers behind one picture
Points = list[tuple[float, float]]


class Drawn(NamedTuple):
    """pixels (n, 3, SIZE, SIZE) fp32 in [0, 1]; labels (n,) int64."""

    pixels: Tensor
    labels: Tensor


def drawings(split: str, numbers: Iterable[int], *, seed: int = 0) -> Drawn:
    """The pictures of these numbers. Number i shows the digit i mod 10; splits share no random numbers."""
    if split not in SPLITS:
        raise OptionError(f"a split of the drawn digits is one of {', '.join(SPLITS)}, got {split!r}")
    wanted = list(numbers)
    choices = np.stack([np.random.default_rng([SPLITS[split], seed, number]).random(N_CHOICES, np.float32) for number in wanted])
    labels = torch.tensor([number % len(CLASSES) for number in wanted])
    return Drawn(render(labels, torch.from_numpy(choices)), labels)


def render(labels: Tensor, choices: Tensor) -> Tensor:
    """Pictures (n, 3, SIZE, SIZE) of the digits `labels` (n,), varied by `choices` (n, N_CHOICES) in [0, 1)."""
    turn, slant, tall, wide, right, down, thick, hue, *_ = choices.unbind(1)
    ends = strokes()[labels] - 0.5                                          # (n, S, 2, 2): segments, ends, (x, y)
    turn, slant = (turn - 0.5) * 0.5, (slant - 0.5) * 0.5                   # radians
    x = ends[..., 0] * _column(10 + 4 * wide) - ends[..., 1] * _column(16 * slant)
    y = ends[..., 1] * _column(18 + 5 * tall)
    cos, sin = _column(turn.cos()), _column(turn.sin())
    x, y = cos * x - sin * y + _column(SIZE / 2 + 5 * (right - 0.5)), sin * x + cos * y + _column(SIZE / 2 + 4 * (down - 0.5))
    radius = (1.1 + 0.8 * thick)[:, None]
    ink = (radius + 0.5 - _distance(torch.stack([x, y], -1))).clamp(0, 1).view(-1, 1, SIZE, SIZE)
    phase = hue[:, None] * 2 * math.pi - torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    color = (0.72 + 0.28 * phase.cos())[..., None, None]
    ground = 0.25 * choices[:, 8:11, None, None]
    return ground + ink * (color - ground)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _distance(ends: Tensor) -> Tensor:
    """(n, S, 2, 2) in pixels -> (n, SIZE²): how far the middle of each pixel is from the nearest segment."""
    at = torch.arange(SIZE) + 0.5
    # (1, 1, SIZE²)
    px, py = at.repeat(SIZE)[None, None], at.repeat_interleave(SIZE)[None, None]
    ax, ay = ends[:, :, 0, 0, None], ends[:, :, 0, 1, None]
    dx, dy = ends[:, :, 1, 0, None] - ax, ends[:, :, 1, 1, None] - ay
    along = (((px - ax) * dx + (py - ay) * dy) / (dx * dx + dy * dy).clamp_min(1e-6)).clamp(0, 1)
    return torch.hypot(px - ax - along * dx, py - ay - along * dy).amin(1)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, pieces: int) -> Points:
    """Points of an arc, angles in turns, 0 at the right and growing downwards."""
    angles = [2 * math.pi * (start + (stop - start) * i / pieces) for i in range(pieces + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _lines(digit: int) -> list[Points]:
    """The strokes of a digit in the unit square, y downwards."""
    return {
        0: [_arc(0.5, 0.5, 0.5, 0.5, 0, 1, 14)],
        1: [[(0.2, 0.22), (0.55, 0.0), (0.55, 1.0)], [(0.2, 1.0), (0.9, 1.0)]],
        2: [[*_arc(0.5, 0.28, 0.48, 0.28, -0.5, 0.08, 8), (0.0, 1.0), (1.0, 1.0)]],
        3: [_arc(0.45, 0.26, 0.45, 0.26, -0.42, 0.25, 7), _arc(0.45, 0.75, 0.52, 0.25, -0.25, 0.42, 7)],
        4: [[(0.75, 1.0), (0.75, 0.0), (0.0, 0.68), (1.0, 0.68)]],
        5: [[(0.92, 0.0), (0.14, 0.0), (0.08, 0.45)], _arc(0.45, 0.67, 0.52, 0.33, -0.36, 0.4, 9)],
        6: [[(0.8, 0.0), (0.3, 0.25), (0.02, 0.62)], _arc(0.5, 0.7, 0.48, 0.3, 0, 1, 12)],
        7: [[(0.0, 0.0), (1.0, 0.0), (0.35, 1.0)]],
        8: [_arc(0.5, 0.24, 0.4, 0.24, 0, 1, 10), _arc(0.5, 0.74, 0.5, 0.26, 0, 1, 10)],
        9: [_arc(0.5, 0.3, 0.48, 0.3, 0, 1, 12), [(0.98, 0.35), (0.7, 0.75), (0.25, 1.0)]],
    }[digit]


@cache
def strokes() -> Tensor:
    """(10, S, 2, 2): the segments of every digit; those with fewer repeat their last one."""
    found = [[pair for line in _lines(digit) for pair in pairwise(line)] for digit in range(len(CLASSES))]
    most = max(map(len, found))
    return torch.tensor([segments + [segments[-1]] * (most - len(segments)) for segments in found])
