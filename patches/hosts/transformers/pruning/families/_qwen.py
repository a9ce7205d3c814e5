"""What the Qwen-VL families share: rows of patches packed behind each other, merge² of them in a row for one token, attention per time step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches.hosts.transformers.pruning.families._clip import pixels_of
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, Tower, VisionFamily, attentions_of, grid_picture, joined


class QwenVL(VisionFamily):
    """Images and videos go through one encoder. A picture has a unit and a segment per step in time; images have one step."""

    def towers(self, base: nn.Module) -> dict[Modality, Tower]:
        model: Any = base
        attentions = attentions_of(model.visual)
        tower = Tower(attentions, self.scoring_layer(model.config.vision_config, len(attentions)))
        return {"image": tower, "video": tower}

    def scoring_layer(self, vision: Any, n_layers: int) -> int:
        return n_layers - 1

    def order(self, vision: Any, height: int, width: int) -> Tensor:
        """(height · width,) int64, the token whose patches lie in the encoder at each place; height × width tokens, in rows."""
        return torch.arange(height * width, device="cpu")

    def pictures(self, base: nn.Module, modality: Modality, call: Mapping[str, Any], features: Any) -> list[Picture]:
        vision: Any = base.config.vision_config     # type: ignore[union-attr]
        merge = vision.spatial_merge_size
        found = []
        for steps, height, width in call[f"{modality}_grid_thw"].tolist():
            step = grid_picture(height // merge, width // merge, modality=modality, merge=merge)
            position = self.order(vision, height // merge, width // merge).argsort()
            step = replace(step, source=position[:, None] * merge**2 + torch.arange(merge**2, device="cpu"))
            found.append(joined([step] * steps))
        return found

    def pixel_patches(self, base: nn.Module, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        vision: Any = base.config.vision_config     # type: ignore[union-attr]
        merge = vision.spatial_merge_size
        rows = pixels_of(call).float()
        # (patches, colours, frames, pixels), of which the first frame counts
        rows = rows.view(len(rows), -1, vision.temporal_patch_size, vision.patch_size**2)[:, :, 0]
        found, start = [], 0
        for steps, height, width in call[f"{modality}_grid_thw"].tolist():
            order = self.order(vision, height // merge, width // merge).to(rows.device)
            for _ in range(steps):
                tokens = rows[start : start + height * width].reshape(len(order), merge**2, *rows.shape[1:])
                found.append(tokens[order].flatten(0, 1))
                start += height * width
        return found
