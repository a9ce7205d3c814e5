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
# where the border between the two kinds of heads is looked for, as shares of all heads; decoders show it lower (SmolLM2: 38 % in front of it)
WINDOW, DECODER_WINDOW = (0.5, 0.85), (0.25, 0.85)
# how rarely the widest gap of heads that are all of one kind is taken for a border: the widest of m like gaps, which are about exponential, is
# ln m times as wide as their mean, and four times the mean wider in one case of fifty; gaps grow towards the end, which makes it one of twenty
RARE = 4.0
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
    largest of a KV head's query heads, −1 in layers whose cache no method may shorten; mass: (L, H) fp32, how much attention those keys get.
    """

    sigma: Tensor
    entropy: Tensor
    scale_use: Tensor
    header: ProfileHeader
    sigma_unconditional: Tensor | None = None
    mass: Tensor | None = None

    @property
    def window(self) -> tuple[float, float]:
        """Where the border between the two kinds of heads is looked for, as shares of all heads."""
        return WINDOW if self.header.scale_shapes else DECODER_WINDOW

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

    path = Path(path)
    if not path.is_file():
        raise _no_profile(path, "it is a folder" if path.is_dir() else "there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except OSError as error:
        raise _no_profile(path, f"it cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise _no_profile(path, _other_kind(path)) from error
    if (made := found.get("format")) != FORMAT:
        raise _no_profile(path, f"it holds {made!r}, and this version reads {FORMAT!r}" if made else "it holds tensors of something else")
    try:
        return ProfileHeader.from_metadata(found)
    except (KeyError, ValueError) as error:
        raise _no_profile(path, f"its header is incomplete or damaged ({error})") from error


def _no_profile(path: Path, why: str) -> OptionError:
    return OptionError(f"hack: {path} is no head profile: {why}. `accel tune hack` writes such files, named profile.safetensors")


def _other_kind(path: Path) -> str:
    """What a file that is not safetensors looks like."""
    with path.open("rb") as file:
        start = file.read(256)
    if b'"fingerprint"' in start:
        return "it is a plan, which is given as plan=…"
    return "it is no safetensors file, or a damaged one"


def schedule_mismatch(calibrated: Shapes, asked: Shapes) -> str | None:
    """Why heads measured under one list of scales cannot be trusted under another; None where one list begins with the other."""
    shared = min(len(calibrated), len(asked))
    if calibrated[:shared] == asked[:shared]:
        return None
    return f"the profile was made with the scales {named(calibrated)}, this picture has {named(asked)}; one list must begin with the other"


def classify(profile: HeadProfile, *, alpha: float | Literal["auto"], fallback: float, has_diffuse_guard: bool = False) -> list[list[bool]]:
    """(L, H): the heads that are contextual: those with the lowest σ of all layers together. Layers that were not measured have no heads here.

    alpha: their share, of which the number is rounded up. "auto": the widest gap of log σ between a half (in decoders a quarter) and 85 % of the
    heads, where one stands out; else `fallback`. has_diffuse_guard: heads that attend to nearly everything alike, whose σ is low too, stay
    structural.
    """
    is_measured = (profile.sigma >= 0).all(1)
    flat = profile.sigma[is_measured].double().flatten()
    n = len(flat)
    count = automatic_count(flat, fallback, profile.window) if alpha == "auto" else math.ceil(alpha * n - 1e-9)
    types = torch.zeros(n, dtype=torch.bool, device="cpu")
    types[flat.argsort(stable=True)[:count]] = True
    if has_diffuse_guard:
        types &= profile.entropy[is_measured].flatten() <= DIFFUSE
    rows = iter(types.view(-1, profile.sigma.shape[1]).tolist())
    return [next(rows) if one else [] for one in is_measured.tolist()]


def automatic_count(sigma: Tensor, fallback: float, window: tuple[float, float] = WINDOW) -> int:
    """How many of the lowest σ (n,) lie below the gap that stands out; `fallback` as a share where none does."""
    found = standing_gap(sigma, window)
    return math.ceil(fallback * len(sigma) - 1e-9) if found is None else found


def standing_gap(sigma: Tensor, window: tuple[float, float] = WINDOW) -> int | None:
    """How many of the lowest σ (n,) lie below the widest gap of log σ between these shares of the heads; None where it is none to speak of.

    Wide is what the widest of so many gaps would be in one case of twenty if all heads were of one kind, measured by their median. Three times the
    median, as in kv-compression.md §2.3, is less than what one kind shows nearly always where heads are many.
    """
    n = len(sigma)
    gaps = sigma.clamp_min(SMALLEST).log().sort().values.diff()
    # the gap behind the first r heads makes a share of r / n
    ranks = [r for r in range(1, n) if window[0] * n <= r <= window[1] * n]
    if not ranks:
        return None
    inside = gaps[ranks[0] - 1 : ranks[-1]]
    widest = int(inside.argmax())
    # the median of exponential gaps is ln 2 of their mean
    usual = float(inside.median()) / math.log(2)
    return ranks[widest] if float(inside[widest]) > (math.log(len(inside)) + RARE) * usual else None


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
