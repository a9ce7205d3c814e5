"""LLaVA-NeXT: the base tile, then the rows of a mosaic of tiles without its border, each closed by a newline. A tile is a unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches.hosts.transformers.pruning.families._anyres import AnyRes, check_grid, mosaic, tile_side
from accel.patches.hosts.transformers.pruning.vision import (
    CLIP_MEAN,
    CLIP_STD,
    Modality,
    Picture,
    Tower,
    grid_picture,
    joined,
    with_structural,
)
from accel.protocols import Unit


class LlavaNext(AnyRes):
    model_types = ("llava_next",)
    pixel_mean, pixel_std = CLIP_MEAN, CLIP_STD

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        return {"image": self.tower(base)}

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        config: Any = base.config
        check_grid(config, call)
        side = tile_side(config)
        found = []
        for size, n_tiles in zip(call["image_sizes"], self.tile_counts(base, call), strict=True):
            numbers = mosaic(config, size)
            rows, columns = numbers.shape
            newlines = {side * side + (row + 1) * columns: (1, row, columns) for row in range(rows)}
            found.append(with_structural(joined([grid_picture(side, side), tiled(numbers, side * side, n_tiles - 1)]), newlines))
        return found


def tiled(numbers: Tensor, n_patches: int, n_tiles: int) -> Picture:
    """A mosaic of which every tile that shows is a unit. numbers: (rows, columns), its patches numbered through tiles of `n_patches`."""
    tile = numbers // n_patches
    shown, unit = torch.unique(tile, return_inverse=True)
    sizes = [((tile == t).any(1).sum().item(), (tile == t).any(0).sum().item()) for t in shown]
    row, column = torch.meshgrid(*(torch.arange(n, device="cpu") for n in numbers.shape), indexing="ij")
    return Picture(
        units=tuple(Unit(0, int(height * width), int(height), int(width)) for height, width in sizes),
        unit=unit.flatten(),
        place=torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1),
        is_structural=torch.zeros(numbers.numel(), dtype=torch.bool, device="cpu"),
        segments=(n_patches,) * n_tiles,
        source=numbers.reshape(-1, 1),
        weight=torch.ones(numbers.numel(), 1, dtype=torch.float32, device="cpu"),
    )
