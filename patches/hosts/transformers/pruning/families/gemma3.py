"""Gemma 3: a SigLIP tower whose patches are averaged in squares down to a fixed number of tokens. Crops of pan and scan are pictures of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from accel.patches.hosts.transformers.pruning.families._clip import pixels_of
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, Tower, VisionFamily, attentions_of, grid_picture


class Gemma3(VisionFamily):
    model_types = ("gemma3",)

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        attentions = attentions_of(base.vision_tower)   # type: ignore[arg-type]
        return {"image": Tower(attentions, len(attentions) - 1)}

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        config: Any = base.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        kernel = side // int(config.mm_tokens_per_image**0.5)
        pooled = side // kernel
        picture = grid_picture(pooled, pooled, merge=kernel)
        # patches behind the last whole square are in no token
        row, column = picture.source // (pooled * kernel), picture.source % (pooled * kernel)
        picture = replace(picture, source=row * side + column, segments=(side * side,))
        return [picture] * len(pixels_of(call))
