"""Video-LLaVA: one CLIP tower for images, one for videos. Frames keep their [CLS] row, images drop it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from accel.patches.hosts.transformers.pruning.families._clip import clip_tower, keeps_cls, pixels_of
from accel.patches.hosts.transformers.pruning.vision import (
    CLIP_MEAN,
    CLIP_STD,
    Modality,
    Picture,
    Tower,
    VisionFamily,
    grid_picture,
    joined,
    with_structural,
)


class VideoLlava(VisionFamily):
    model_types = ("video_llava",)
    pixel_mean, pixel_std = CLIP_MEAN, CLIP_STD

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        model: Any = base
        return {"image": clip_tower(model.config, model.image_tower), "video": clip_tower(model.config, model.video_tower)}

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        config: Any = base.config
        pixels = pixels_of(call)
        height, width = (n // config.vision_config.patch_size for n in pixels.shape[-2:])
        picture = grid_picture(height, width, modality=modality)
        # `get_video_features` knows no strategy: it hands on every row of the encoder
        if modality == "video" or keeps_cls(config, call):
            picture = with_structural(picture, {0: (0, 0, -1)})
        if modality == "video":
            picture = joined([picture] * pixels.shape[1])
        return [picture] * len(pixels)
