"""LLaVA-OneVision: the base tile, then a mosaic of tiles as one unit, resized where it is large. Frames of a video are pooled to half their side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches.hosts.transformers.pruning.families._anyres import AnyRes, check_grid, mosaic, tile_side
from accel.patches.hosts.transformers.pruning.families._clip import pixels_of
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, Tower, grid_picture, joined, with_structural


class LlavaOnevision(AnyRes):
    model_types = ("llava_onevision",)

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        tower = self.tower(base)
        return {"image": tower, "video": tower}

    def is_cut(self, call: Mapping[str, Any]) -> list[bool]:
        counts = call.get("batch_num_images")
        if counts is None:
            return super().is_cut(call)
        # prompts with several images show each of them as one tile
        return [int(n) == 1 for n in counts for _ in range(int(n))]

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        config: Any = base.config
        check_grid(config, call)
        if modality == "video":
            n_videos, n_frames = pixels_of(call).shape[:2]
            return [video(tile_side(config), n_frames)] * n_videos
        most = int((call.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
        return [
            image(config, size, n_tiles, most) for size, n_tiles in zip(call["image_sizes"], self.tile_counts(base, call), strict=True)
        ]


def image(config: Any, size: Tensor, n_tiles: int, most: int) -> Picture:
    """One image of `n_tiles`, the base tile among them. most: mosaics above that many tiles are shrunk."""
    side = tile_side(config)
    overview = grid_picture(side, side)
    if n_tiles == 1:
        return with_structural(overview, {side * side: (0, side - 1, -1)})
    numbers = mosaic(config, size)
    rows, columns = numbers.shape
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    local = replace(resized(numbers, rows, columns, "image"), segments=(side * side,) * (n_tiles - 1))
    newlines = {side * side + (row + 1) * columns: (1, row, columns) for row in range(rows)}
    return with_structural(joined([overview, local]), newlines)


def video(side: int, n_frames: int) -> Picture:
    """One video of frames of side × side patches; a newline ends it."""
    pooled = math.ceil(side / 2)
    frames = joined([resized(torch.arange(side * side, device="cpu").view(side, side), pooled, pooled, "video")] * n_frames)
    return with_structural(frames, {len(frames): (n_frames - 1, pooled - 1, -1)})


def resized(numbers: Tensor, rows: int, columns: int, modality: Modality) -> Picture:
    """One unit of rows × columns tokens, each the bilinear mean of four patches. numbers: (height, width) int64, the patches by their place."""
    (up, up_weight), (left, left_weight) = linear_taps(numbers.shape[0], rows), linear_taps(numbers.shape[1], columns)
    # (rows, columns, taps down, taps across)
    source = numbers[up[:, None, :, None], left[None, :, None, :]]
    weight = up_weight[:, None, :, None] * left_weight[None, :, None, :]
    return replace(
        grid_picture(rows, columns, modality=modality),
        segments=(numbers.numel(),),
        source=source.flatten(2).flatten(0, 1),
        weight=weight.flatten(2).flatten(0, 1),
    )


def linear_taps(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Where a linear resize of n values to `size` takes each value from, and by which weight: both (size, ≤ 2)."""
    # what the interpolation makes of unit vectors, (n, size), are its weights
    table = nn.functional.interpolate(torch.eye(n, device="cpu")[None], size=size, mode="linear")[0]
    weight, index = table.topk(min(2, n), dim=0)
    return index.T, weight.T
