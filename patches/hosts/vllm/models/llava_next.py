"""LLaVA-NeXT in vLLM: tiles through a CLIP or SigLIP tower, rows of a mosaic closed by newlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from accel.patches.hosts.transformers.pruning.vision import Picture
from accel.patches.hosts.vllm.compat import LlavaNextForConditionalGeneration
from accel.patches.hosts.vllm.models.exit import ExitMixin
from accel.patches.hosts.vllm.models.llava import clip_tower
from accel.patches.hosts.vllm.models.placeholders import register_processor
from accel.patches.hosts.vllm.models.pruned import PrunedMixin
from accel.patches.hosts.vllm.models.scores import VisionTower


@register_processor(LlavaNextForConditionalGeneration)
class AccelLlavaNextForConditionalGeneration(ExitMixin, PrunedMixin, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT with the visual tokens that a recipe leaves."""

    def vision_tower_of(self) -> VisionTower | None:
        return clip_tower(self.config, self.vision_tower)

    def tower_segments(self, pictures: Sequence[Picture], call: Mapping[str, Any]) -> list[list[int]]:
        # pictures that were processed together are padded to the same number of tiles, and the tower reads those too
        return [[picture.segments[0]] * len(tiles) for picture, tiles in zip(pictures, call["pixel_values"], strict=True)]

    def normalised_pixels(self, pictures: Sequence[Picture], call: Mapping[str, Any]) -> dict[str, Any]:
        tiles = [own[: len(picture.segments)] for picture, own in zip(pictures, call["pixel_values"], strict=True)]
        return {**call, "pixel_values": torch.cat(tiles)}
