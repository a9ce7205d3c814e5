"""LLaVA 1.5 in vLLM: a CLIP or SigLIP tower, one token per patch."""

from __future__ import annotations

from typing import Any

from accel.patches.hosts.transformers.pruning.families._clip import prefix_of
from accel.patches.hosts.transformers.pruning.vision import resolved_layer
from accel.patches.hosts.vllm.compat import LlavaForConditionalGeneration
from accel.patches.hosts.vllm.models.exit import ExitMixin
from accel.patches.hosts.vllm.models.placeholders import register_processor
from accel.patches.hosts.vllm.models.pruned import PrunedMixin, all_heads
from accel.patches.hosts.vllm.models.scores import VisionTower, clip_projection


def clip_tower(config: Any, tower: Any) -> VisionTower | None:
    """vLLM's CLIP or SigLIP; None where it was not built because no picture may come."""
    if not hasattr(tower, "vision_model"):
        return None
    layers = tower.vision_model.encoder.layers
    scoring = resolved_layer(config.vision_config.num_hidden_layers, config.vision_feature_layer)
    return VisionTower([layer.self_attn for layer in layers], scoring, clip_projection(all_heads), prefix_of(config))


@register_processor(LlavaForConditionalGeneration)
class AccelLlavaForConditionalGeneration(ExitMixin, PrunedMixin, LlavaForConditionalGeneration):
    """vLLM's LLaVA with the visual tokens that a recipe leaves."""

    def vision_tower_of(self) -> VisionTower | None:
        return clip_tower(self.config, self.vision_tower)
