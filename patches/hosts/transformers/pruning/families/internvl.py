"""InternVL: tiles of a tower with [CLS], whose pixel shuffle makes a token of each 2 × 2 patches. Tiles are pictures of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.families._clip import pixels_of
from accel.patches.hosts.transformers.pruning.vision import (
    Modality,
    Picture,
    Tower,
    VisionFamily,
    attentions_of,
    grid_picture,
    image_patches,
    resolved_layer,
)


class InternVL(VisionFamily):
    model_types = ("internvl",)
    # of ImageNet
    pixel_mean, pixel_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        model: Any = base
        check_strategy(model.config, {})
        attentions = attentions_of(model.vision_tower)
        return {"image": Tower(attentions, resolved_layer(len(attentions), model.config.vision_feature_layer), prefix=1)}

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        config: Any = base.config
        check_strategy(config, call)
        down, across = config.vision_config.patch_size
        *_, height, width = pixels_of(call).shape
        # the model takes the square root of what the encoder returns for height and width
        side = math.isqrt((height // down) * (width // across))
        merge = int(1 / config.downsample_ratio)
        return [grid_picture(side // merge, side // merge, merge=merge)] * len(pixels_of(call))

    def pixel_patches(self, base: nn.Module, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return image_patches(pixels_of(call), int(base.config.vision_config.patch_size[0]))     # type: ignore[union-attr, index]


def check_strategy(config: Any, call: Mapping[str, Any]) -> None:
    strategy = call.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    if strategy != "default":
        raise UnsupportedError(f"internvl merges squares of patches, where [CLS] has no place: vision_feature_select_strategy is {strategy!r}")
