"""PaliGemma: a SigLIP tower, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from accel.patches.hosts.transformers.pruning.families._clip import pixels_of
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, Tower, VisionFamily, attentions_of, grid_picture


class PaliGemma(VisionFamily):
    model_types = ("paligemma",)

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        attentions = attentions_of(base.vision_tower)   # type: ignore[arg-type]
        return {"image": Tower(attentions, len(attentions) - 1)}

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        size: Any = base.config.vision_config.patch_size     # type: ignore[union-attr]
        pixels = pixels_of(call)
        return [grid_picture(*(n // size for n in pixels.shape[-2:]))] * len(pixels)
