"""What LLaVA and its relatives share: a CLIP or SigLIP tower, and a strategy that drops its first row or does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.vision import Tower, attentions_of, resolved_layer

# rows in front of the patches
_PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}


def pixels_of(call: Mapping[str, Any]) -> Tensor:
    """The pixels among the arguments of a call; their name depends on model and version."""
    found: Tensor = next(v for name, v in call.items() if name.startswith("pixel_values") and v is not None)
    return found


def prefix_of(config: Any) -> int:
    """Rows in front of the patches in the encoder: 1 for [CLS]. Raises UnsupportedError for towers of other kinds."""
    kind = config.vision_config.model_type
    if kind not in _PREFIX:
        raise UnsupportedError(
            f"no token pruning for {config.model_type!r} with a vision tower of type {kind!r}: its patches become tokens in another way",
            [f"known: {', '.join(_PREFIX)}"],
        )
    return _PREFIX[kind]


def keeps_cls(config: Any, call: Mapping[str, Any]) -> bool:
    """Whether [CLS] is handed on as a token: the strategy "full" of a tower that has one."""
    strategy = call.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    if strategy == "default" and not prefix_of(config):
        raise UnsupportedError(
            "vision_feature_select_strategy 'default' drops the first row, which is a patch where the tower has no [CLS]; 'full' keeps the grid whole"
        )
    return strategy != "default" and prefix_of(config) == 1


def clip_tower(config: Any, encoder: nn.Module) -> Tower:
    """The tower whose hidden state `vision_feature_layer` is the feature."""
    keeps_cls(config, {})   # refuses what `pictures` would, but before a picture comes
    attentions = attentions_of(encoder)
    return Tower(attentions, resolved_layer(len(attentions), config.vision_feature_layer), prefix_of(config))
