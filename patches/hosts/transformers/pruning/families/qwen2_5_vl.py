"""Qwen2.5-VL: like Qwen2-VL, but most layers attend in windows, and the encoder's rows lie window by window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.families._qwen import QwenVL
from accel.patches.hosts.transformers.pruning.vision import CLIP_MEAN, CLIP_STD


class Qwen25VL(QwenVL):
    model_types = ("qwen2_5_vl",)
    pixel_mean, pixel_std = CLIP_MEAN, CLIP_STD

    def scoring_layer(self, vision: Any, n_layers: int) -> int:
        whole = [layer for layer in vision.fullatt_block_indexes if 0 <= layer < n_layers]
        if not whole:
            raise UnsupportedError(
                f"no layer of the vision encoder sees the whole picture: fullatt_block_indexes is {list(vision.fullatt_block_indexes)}"
            )
        return int(max(whole))

    def order(self, vision: Any, height: int, width: int) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        merge = vision.spatial_merge_size
        grid = torch.tensor([[1, height * merge, width * merge]], device="cpu")
        index: Tensor
        # it makes tensors on the default device, and mixes them with the grid
        with torch.device("cpu"):
            index, _ = get_vision_window_index(grid, spatial_merge_size=merge, window_size=vision.window_size, patch_size=vision.patch_size)
        return index
