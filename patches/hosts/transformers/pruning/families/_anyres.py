"""What LLaVA-NeXT and LLaVA-OneVision share: an image as one tile for the overview and a mosaic of tiles, cut down to what is no border."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.families._clip import clip_tower, keeps_cls, pixels_of
from accel.patches.hosts.transformers.pruning.vision import Modality, Tower, VisionFamily, image_patches


class AnyRes(VisionFamily):
    """Families whose images are a base tile, then the tiles of a mosaic in rows."""

    def tower(self, base: nn.Module) -> Tower:
        model: Any = base
        check_grid(model.config, {})
        return clip_tower(model.config, model.vision_tower)

    def is_cut(self, call: Mapping[str, Any]) -> list[bool]:
        """Of each image, whether it is cut into tiles; the others are their base tile alone."""
        return [True] * len(call["image_sizes"])

    def tile_counts(self, base: nn.Module, call: Mapping[str, Any]) -> list[int]:
        """Tiles of each image that the encoder sees, the base tile among them; the tiles behind them in `pixel_values` only pad."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config: Any = base.config
        pinpoints, pixels = config.image_grid_pinpoints, config.vision_config.image_size
        return [
            image_size_to_num_patches(size, pinpoints, pixels) if is_cut else 1
            for size, is_cut in zip(call["image_sizes"], self.is_cut(call), strict=True)
        ]

    def pixel_patches(self, base: nn.Module, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        pixels = pixels_of(call)
        if modality == "image" and pixels.dim() == 5:
            pixels = torch.cat([image[:n] for image, n in zip(pixels, self.tile_counts(base, call), strict=True)])
        return image_patches(pixels, int(base.config.vision_config.patch_size))     # type: ignore[union-attr, arg-type]


def check_grid(config: Any, call: Mapping[str, Any]) -> None:
    """Raises UnsupportedError where [CLS] would be handed on as a token: the model cannot lay it out in a mosaic."""
    if keeps_cls(config, call):
        raise UnsupportedError(
            f"{config.model_type} lays its tokens out in a grid, where [CLS] has no place: vision_feature_select_strategy is 'full', not 'default'"
        )


def tile_side(config: Any) -> int:
    """Patches along a side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def mosaic(config: Any, image_size: Tensor) -> Tensor:
    """(rows, columns) int64, the patches of the mosaic without its border, numbered through the tiles behind the base tile."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = tile_side(config)
    down, across = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    # (tile row, tile column, row, column) -> the whole picture in rows
    tiles = torch.arange(down * across * side * side, device="cpu").view(down, across, side, side)
    numbers = tiles.transpose(1, 2).reshape(1, down * side, across * side)
    shown: Tensor = unpad_image(numbers, image_size)
    return shown[0]
