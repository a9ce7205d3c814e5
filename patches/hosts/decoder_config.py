"""What a text decoder's configuration says of its sizes, for hosts that describe models to methods."""

from __future__ import annotations

from typing import Any


def decoder_sizes(config: Any) -> dict[str, Any]:
    """Fields of `ModelInfo` that a transformers configuration fixes: all but device, dtype, has_cls and fingerprint."""
    text = config.get_text_config(decoder=True)
    n_layers, n_heads = int(getattr(text, "num_hidden_layers", 0)), int(getattr(text, "num_attention_heads", 0))
    return {
        "family": config.model_type,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": int(getattr(text, "num_key_value_heads", None) or n_heads or 1),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // max(n_heads, 1)),
        "layer_types": tuple(layer_type(text, i) for i in range(n_layers)),
        "max_positions": max_positions(text),
        "has_vision": hasattr(config, "vision_config"),
        "has_multimodal_rope": "mrope_section" in (getattr(text, "rope_parameters", None) or {}),
        "hidden_size": getattr(text, "hidden_size", None),
    }


def max_positions(text_config: Any) -> int | None:
    """Positions the model was made for; some kinds of RoPE scaling leave `max_position_embeddings` at the unscaled number."""
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if positions is None or not isinstance(rope.get("factor"), int | float):
        return positions
    return max(positions, int(rope.get("original_max_position_embeddings", positions) * rope["factor"]))


def layer_type(text_config: Any, layer: int) -> str:
    """ "full_attention", "sliding_attention", … of one layer."""
    types = getattr(text_config, "layer_types", None)
    if types:
        return str(types[layer])
    # Mistral, Phi-3, Mixtral and their kin have one window for all layers, or none
    return "full_attention" if getattr(text_config, "sliding_window", None) is None else "sliding_attention"
