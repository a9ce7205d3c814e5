"""Qwen3-VL: like Qwen2-VL, and the states of some encoder layers are added behind the first decoder layers."""

from __future__ import annotations

from accel.patches.hosts.transformers.pruning.families._qwen import QwenVL


class Qwen3VL(QwenVL):
    model_types = ("qwen3_vl",)
    deepstack_levels = "deepstack_visual_indexes"
