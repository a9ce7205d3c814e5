"""Idefics3 and SmolVLM: a pixel shuffle makes a token of r × r patches. Tiles are pictures of their own: no call says to which image they belong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from accel.patches.hosts.transformers.pruning.families._clip import pixels_of
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, Tower, VisionFamily, attentions_of, grid_picture, image_patches


class Idefics3(VisionFamily):
    model_types = ("idefics3", "smolvlm")

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        attentions = attentions_of(base.vision_model)   # type: ignore[arg-type]
        return {"image": Tower(attentions, len(attentions) - 1)}

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        config: Any = base.config
        size, merge = config.vision_config.patch_size, config.scale_factor
        is_real = real_tiles(config, call)
        *_, height, width = pixels_of(call).shape
        # the model takes the square root of what the encoder returns for height and width
        side = math.isqrt((height // size) * (width // size))
        picture = grid_picture(side // merge, side // merge, merge=merge)
        mask = call.get("pixel_attention_mask")
        if mask is None:
            return [picture] * int(is_real.sum())
        # a patch counts if it holds a pixel of the picture
        patches = mask.flatten(0, 1)[is_real].bool().unfold(1, size, size).unfold(2, size, size).flatten(3).any(-1)
        return [without_padding(picture, valid.flatten().cpu()) for valid in patches]

    def pixel_patches(self, base: nn.Module, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        config: Any = base.config
        return image_patches(pixels_of(call).flatten(0, 1)[real_tiles(config, call)], config.vision_config.patch_size)


def real_tiles(config: Any, call: Mapping[str, Any]) -> Tensor:
    """(batch · tiles,) bool: tiles that are zero everywhere only pad, and the model drops them."""
    is_real = pixels_of(call).flatten(0, 1).flatten(1).ne(0).any(1)
    if config.model_type == "smolvlm" and not is_real.any():
        # it encodes at least one
        is_real[0] = True
    return is_real


def without_padding(picture: Picture, is_valid: Tensor) -> Picture:
    """The picture whose tokens are means of the valid patches alone; a token of padding counts for nothing."""
    weight = picture.weight * is_valid[picture.source]
    return replace(picture, weight=weight / weight.sum(-1, keepdim=True).clamp_min(1e-12))
