"""What was measured of a model's heads: how much their attention moves with the query, and the file that holds it (kv-compression.md §2.2, §2.7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.protocols import ModelInfo

FORMAT = "accel.hack.profile.1"
# where the border between the two kinds of heads is looked for, as shares of all heads
WINDOW = (0.5, 0.85)
# a gap of log σ this many times as wide as usual is a border
WIDE = 3.0
DIFFUSE = 0.9
# log σ of a head that does not move at all
SMALLEST = 1e-12

Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ProfileHeader:
    """What a file says of its profile. model, fingerprint: of which weights. dtype: in which it was measured. n_samples: pictures.

    rank_correlation: of σ between conditional and unconditional rows; None without guidance. data: which pictures, for people.
    """

    model: str
    fingerprint: str
    n_layers: int
    n_heads: int
    scale_shapes: Shapes
    dtype: str
    n_samples: int
    rank_correlation: float | None
    data: str

    def mismatches(self, model: ModelInfo) -> list[str]:
        """Why heads measured here cannot be heads of this model, whatever its weights."""
        found = []
        for what, own, asked in (("layers", self.n_layers, model.n_layers), ("heads", self.n_heads, model.n_kv_heads)):
            if own != asked:
                found.append(f"the profile is of {self.model} with {own} {what}, this {model.family} model has {asked}")
        if bool(self.scale_shapes) != (model.scale_shapes is not None):
            measured, asking = ("an image model", "a decoder") if self.scale_shapes else ("a decoder", "an image model")
            found.append(f"the profile is of {measured}, {self.model}, this {model.family} model is {asking}")
        return found

    def is_of_other_weights(self, model: ModelInfo) -> bool:
        """Whether it was measured on other weights than these. Hosts that cannot tell weights apart are believed."""
        return model.fingerprint is not None and model.fingerprint() != self.fingerprint

    def as_metadata(self) -> dict[str, str]:
        plain = {name: "" if value is None else str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **plain, "scale_shapes": " ".join(f"{height}x{width}" for height, width in self.scale_shapes)}

    @classmethod
    def from_metadata(cls, found: Mapping[str, str]) -> Self:
        read: dict[str, Any] = {
            "n_layers": int, "n_heads": int, "n_samples": int, "rank_correlation": lambda text: float(text) if text else None,
            "scale_shapes": _shapes,
        }  # fmt: skip
        return cls(**{f.name: read.get(f.name, str)(found[f.name]) for f in fields(cls)})


@dataclass(frozen=True)
class HeadProfile:
    """L layers, H KV heads, K scales.

    sigma: (L, H) fp32, Σ over keys of the variance over queries of their attention at the last scale, of conditional rows; 0 for a head that attends
    to the same keys whatever the query. sigma_unconditional: the same of the other rows of guided pictures, or None.
    entropy: (L, H) fp32, mean entropy of a row as a share of the largest possible. scale_use: (L, H, K, K) fp32, how much of its attention a query of
    one scale (third axis) gives to each (last axis). Of a decoder K is 0 and σ is that of the last quarter of prompts, over the keys before it, the
    largest of a KV head's query heads, −1 in layers that have no cache of the whole sequence; mass: (L, H) fp32, how much attention those keys get.
    """

    sigma: Tensor
    entropy: Tensor
    scale_use: Tensor
    header: ProfileHeader
    sigma_unconditional: Tensor | None = None
    mass: Tensor | None = None

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        save_file({name: t.float().contiguous() for name, t in tensors.items()}, path, metadata=self.header.as_metadata())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The profile of a file. OptionError for anything else than such a file."""
        from safetensors import safe_open

        header = read_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118, the file is no mapping
        size, scales = (header.n_layers, header.n_heads), len(header.scale_shapes)
        shapes = {name: tuple(t.shape) for name, t in sorted(tensors.items())}
        expected: dict[str, tuple[int, ...]] = {"entropy": size, "scale_use": (*size, scales, scales), "sigma": size}
        expected |= {name: size for name in ("sigma_unconditional", "mass") if name in shapes}
        if shapes != dict(sorted(expected.items())):
            raise OptionError(f"hack: {path} holds tensors of the shapes {shapes}, expected {expected}")
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise OptionError(f"hack: {path} holds statistics that are not finite; make the profile anew")
        return cls(header=header, **tensors)


def read_header(path: str | Path) -> ProfileHeader:
    """What a file says of its profile. OptionError for anything else than such a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        if found.get("format") != FORMAT:
            raise OptionError(f"hack: {path} holds no head profile of this version ({FORMAT}), but {found.get('format', 'something else')!r}")
        return ProfileHeader.from_metadata(found)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OptionError(f"hack: cannot read a head profile from {path}: {error}. `accel tune hack` writes such files") from error


def schedule_mismatch(calibrated: Shapes, asked: Shapes) -> str | None:
    """Why heads measured under one list of scales cannot be trusted under another; None where one list begins with the other."""
    shared = min(len(calibrated), len(asked))
    if calibrated[:shared] == asked[:shared]:
        return None
    return f"the profile was made with the scales {named(calibrated)}, this picture has {named(asked)}; one list must begin with the other"


def classify(profile: HeadProfile, *, alpha: float | Literal["auto"], fallback: float, has_diffuse_guard: bool = False) -> list[list[bool]]:
    """(L, H): the heads that are contextual: those with the lowest σ of all layers together. Layers that were not measured have no heads here.

    alpha: their share, of which the number is rounded up. "auto": the widest gap of log σ between a half and 85 % of the heads, where one stands
    out; else `fallback`. has_diffuse_guard: heads that attend to nearly everything alike, whose σ is low too, stay structural.
    """
    is_measured = (profile.sigma >= 0).all(1)
    flat = profile.sigma[is_measured].double().flatten()
    n = len(flat)
    count = automatic_count(flat, fallback) if alpha == "auto" else math.ceil(alpha * n - 1e-9)
    types = torch.zeros(n, dtype=torch.bool)
    types[flat.argsort(stable=True)[:count]] = True
    if has_diffuse_guard:
        types &= profile.entropy[is_measured].flatten() <= DIFFUSE
    rows = iter(types.view(-1, profile.sigma.shape[1]).tolist())
    return [next(rows) if one else [] for one in is_measured.tolist()]


def automatic_count(sigma: Tensor, fallback: float) -> int:
    """How many of the lowest σ (n,) lie below the gap that stands out; `fallback` as a share where none does."""
    n = len(sigma)
    logs = sigma.clamp_min(SMALLEST).log().sort().values
    gaps = logs.diff()
    # the gap behind the first r heads makes a share of r / n
    ranks = [r for r in range(1, n) if WINDOW[0] * n <= r <= WINDOW[1] * n]
    if ranks:
        inside = gaps[ranks[0] - 1 : ranks[-1]]
        widest = int(inside.argmax())
        if float(inside[widest]) > WIDE * float(inside.median()):
            return ranks[widest]
    return math.ceil(fallback * n - 1e-9)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two tensors of one shape; ties in the order of the elements."""
    ranks = [t.flatten().argsort(stable=True).argsort().double() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _shapes(text: str) -> Shapes:
    sizes = [size.split("x") for size in text.split()]
    return tuple((int(height), int(width)) for height, width in sizes)


def named(shapes: Shapes) -> str:
    """Scales in words, a side where a map is square."""
    return " ".join(str(height) if height == width else f"{height}×{width}" for height, width in shapes)
