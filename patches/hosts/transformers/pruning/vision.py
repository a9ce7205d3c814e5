"""What the host must know of a vision-language family: where its encoder scores, and how patches become tokens. One file each in `families/`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.protocols import Unit

Modality = Literal["image", "video"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Picture:
    """One image or video: the n tokens that stand for it in the prompt, in their order there, and the patches behind them.

    units: its tiles or frames. unit: (n,) int64, the entry of `units` that each token belongs to; a structural token belongs to one whose row it
    ends. place: (n, 3) int64, (map, row, column), maps numbered from 0 in this picture; column −1 where a structural token ends no row.
    is_structural: (n,) bool.
    segments: patches (without [CLS]) of each stretch of the encoder's rows that attends to itself only, in the encoder's order; a picture
    takes the next `len(segments)` of them.
    source: (n, taps) int64, the patches behind each token, numbered through the segments of the picture in the encoder's order. weight: (n, taps)
    fp32, what each counts for in the token's mean; 0 pads, and structural tokens have zeros only.
    """

    units: tuple[Unit, ...]
    unit: Tensor
    place: Tensor
    is_structural: Tensor
    segments: tuple[int, ...]
    source: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.unit)

    def pooled(self, values: Tensor) -> Tensor:
        """(n,) fp32: a map of the patches of all its segments, (patches,) on the CPU, brought to its tokens."""
        return (values[self.source] * self.weight).sum(-1)


def grid_picture(height: int, width: int, *, modality: Modality = "image", merge: int = 1) -> Picture:
    """One tile that is one segment: height × width tokens in rows, each the mean of merge × merge patches that lie in rows too."""
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij"))
    n = height * width
    step = torch.arange(merge, device="cpu")
    # (n, merge, merge): patch rows of `width · merge`
    patches = (row[:, None, None] * merge + step[:, None]) * (width * merge) + column[:, None, None] * merge + step
    return Picture(
        units=(Unit(0, n, height, width, modality=modality),),
        unit=torch.zeros(n, dtype=torch.int64, device="cpu"),
        place=torch.stack([torch.zeros_like(row), row, column], 1),
        is_structural=torch.zeros(n, dtype=torch.bool, device="cpu"),
        segments=(n * merge * merge,),
        source=patches.flatten(1),
        weight=torch.full((n, merge * merge), 1 / (merge * merge), dtype=torch.float32, device="cpu"),
    )


def joined(pictures: Sequence[Picture]) -> Picture:
    """One picture of several that follow each other: tiles of an image, frames of a video. Their maps stay apart."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("unit", "place", "is_structural", "source", "weight")}
    n_units = n_maps = n_patches = 0
    taps = max(p.source.shape[1] for p in pictures)
    for p in pictures:
        pad = (0, taps - p.source.shape[1])
        parts["unit"].append(p.unit + n_units)
        parts["place"].append(p.place + torch.tensor([n_maps, 0, 0], device="cpu"))
        parts["is_structural"].append(p.is_structural)
        parts["source"].append(nn.functional.pad(p.source + n_patches, pad))
        parts["weight"].append(nn.functional.pad(p.weight, pad))
        n_units, n_patches = n_units + len(p.units), n_patches + sum(p.segments)
        n_maps += int(p.place[:, 0].max()) + 1
    units, segments = tuple(u for p in pictures for u in p.units), tuple(s for p in pictures for s in p.segments)
    unit, place, is_structural, source, weight = (torch.cat(parts[name]) for name in parts)
    return Picture(units, unit, place, is_structural, segments, source, weight)


def with_structural(picture: Picture, before: Mapping[int, tuple[int, int, int]] | Mapping[int, Sequence[int]]) -> Picture:
    """The picture with structural tokens put in front of token `position` (n: behind the last) at the given (map, row, column)."""
    order, n = [], len(picture)
    extra = {position: torch.tensor(tuple(where), device="cpu") for position, where in before.items()}
    for i in range(n + 1):
        if i in extra:
            order.append(-1 - i)
        if i < n:
            order.append(i)
    index = torch.tensor(order, device="cpu")
    is_new = index < 0
    old = torch.where(is_new, (-2 - index).clamp(0, n - 1), index)      # the token in front of a new one
    place = picture.place[old]
    if extra:
        place[is_new] = torch.stack([extra[-1 - i] for i in order if i < 0])
    unit = picture.unit[old]
    counts = torch.bincount(unit[is_new], minlength=len(picture.units)).tolist()
    return replace(
        picture,
        units=tuple(replace(u, n_structural=u.n_structural + more) for u, more in zip(picture.units, counts, strict=True)),
        unit=unit,
        place=place,
        is_structural=picture.is_structural[old] | is_new,
        source=picture.source[old],
        weight=picture.weight[old].masked_fill(is_new[:, None], 0),
    )


@dataclass(frozen=True)
class Tower:
    """A vision encoder. attentions: its attention modules, whose code asks transformers' attention interface, in order of layers.

    scoring_layer: the entry whose layer's output is the feature, or the last one below it that sees the whole picture. prefix: rows in front of the
    patches, 1 for [CLS].
    """

    attentions: tuple[nn.Module, ...]
    scoring_layer: int
    prefix: int = 0


class VisionFamily(ABC):
    """One family of vision-language models. The only place that knows its attribute names. Instances keep nothing."""

    model_types: ClassVar[tuple[str, ...]]      # config.model_type
    pixel_mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    pixel_std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    deepstack_levels: ClassVar[str | None] = None   # attribute of the vision config; visual features are added behind the first decoder layers

    @abstractmethod
    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        """The encoders by what they read. base: the model that has `get_image_features`."""

    @abstractmethod
    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        """The pictures of one call of `get_image_features` or `get_video_features`, in the order in which the prompt takes them up.

        call: its arguments by name, defaults filled in. features: what it returned.
        """

    def why_unfit(self, base: nn.Module, call: Mapping[str, Any]) -> str | None:
        """Why the scores would not belong to the features of this call, or None."""
        own = getattr(base.config, "vision_feature_layer", None)
        asked = call.get("vision_feature_layer")
        return None if asked in (None, own) else f"their features come from layer {asked}, and layer {own} of the config is the one that is watched"

    def token_id(self, config: Any, modality: Modality) -> int | None:
        """The placeholder that stands for one token of this kind."""
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        return None

    def flat_features(self, features: Any) -> Tensor:
        """(all tokens, D) in the order of `pictures`, out of what `get_image_features` returned."""
        found = getattr(features, "pooler_output", features)
        if isinstance(found, Tensor):
            return found.flatten(0, -2)
        return torch.cat([t.flatten(0, -2) for t in found])

    def pixel_patches(self, base: nn.Module, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        """The normalised pixels of each segment, (patches, colours, pixels) fp32, patches in the encoder's order."""
        pixels = next(v for name, v in call.items() if name.startswith("pixel_values") and v is not None)
        return image_patches(pixels, int(base.config.vision_config.patch_size))     # type: ignore[union-attr, arg-type]


def image_patches(pixels: Tensor, size: int) -> list[Tensor]:
    """(…, 3, H, W) cut into size × size patches in rows: one (patches, 3, size²) fp32 per image."""
    found = []
    for image in pixels.flatten(0, -4).float():
        cut = image.unfold(1, size, size).unfold(2, size, size)     # (3, rows, columns, size, size)
        found.append(cut.flatten(3).flatten(1, 2).transpose(0, 1))
    return found


def resolved_layer(n_layers: int, feature_layer: int | Sequence[int]) -> int:
    """The layer whose output is hidden state `feature_layer` of an encoder that has `n_layers` (visual-token-pruning.md §2.2).

    Hidden state 0 is the embedding: no layer gives it. Of several, the deepest.
    """
    numbers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    layer = max(j if j >= 0 else n_layers + 1 + j for j in numbers) - 1
    if not 0 <= layer < n_layers:
        raise UnsupportedError(f"vision_feature_layer {feature_layer} names no layer of an encoder with {n_layers}: no attention to score by")
    return layer


def attentions_of(encoder: nn.Module) -> tuple[nn.Module, ...]:
    """The self-attention modules of an encoder that go through transformers' attention interface, in their order."""
    from accel.patches.hosts.transformers.layers import uses_interface

    return tuple(m for m in encoder.modules() if "Attention" in type(m).__name__ and hasattr(m, "config") and uses_interface(m))


@cache
def families() -> dict[str, VisionFamily]:
    """Adapters by config.model_type: the classes with `model_types` of every file in `families/`."""
    found = {}
    for path in sorted((Path(__file__).parent / "families").glob("[a-z]*.py")):
        module = importlib.import_module(f"{__package__}.families.{path.stem}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, VisionFamily) and cls.__module__ == module.__name__:
                found.update(dict.fromkeys(cls.model_types, cls()))
    return found


def family_of(config: Any) -> VisionFamily:
    """The adapter of a model; raises UnsupportedError for families without one."""
    found = families().get(config.model_type)
    if found is None and not hasattr(config, "vision_config"):
        raise UnsupportedError(f"a model of type {config.model_type!r} sees no pictures: it has no visual tokens to prune", [])
    if found is None:
        raise UnsupportedError(
            f"no adapter for vision-language models of type {config.model_type!r}: token pruning must know how its patches become tokens",
            [f"known: {', '.join(sorted(families()))}"],
        )
    return found
