"""Qwen2-VL: four patches that follow each other are merged into a token."""

from __future__ import annotations

from accel.patches.hosts.transformers.pruning.families._qwen import QwenVL
from accel.patches.hosts.transformers.pruning.vision import CLIP_MEAN, CLIP_STD


class Qwen2VL(QwenVL):
    model_types = ("qwen2_vl",)
    pixel_mean, pixel_std = CLIP_MEAN, CLIP_STD
