"""What a prompt with visual tokens costs by arithmetic: FLOPs of encoder and prefill, bytes of the KV cache and of a decoding step.

The cost model of visual-token-pruning.md §9.1. A multiply-add counts as two FLOPs; papers that count it once state half of these numbers.
Left out, because they are small beside the rest: norms, activations, rotary tables, look-ups, and the head's logits of one token in prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from accel.errors import OptionError, UnsupportedError

# model_type → rows of the tower in front of its patches, for encoders whose tokens all run through every layer
_TOWER_PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}
# families that have two linear layers between tower and language model, and one token per patch
_TWO_LINEAR = ("llava", "llava_next", "llava_onevision")


@dataclass(frozen=True)
class DecoderShape:
    """A text decoder with a gated MLP in every layer. Heads: queries `n_heads`, keys and values `n_kv_heads`, both of `head_dim`."""

    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The shape of a transformers model. UnsupportedError for mixtures of experts, which this arithmetic does not describe."""
        text = config.get_text_config(decoder=True)
        if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise UnsupportedError(f"the cost model knows decoders with one MLP per layer, and {text.model_type} is a mixture of experts")
        n_heads = int(text.num_attention_heads)
        return cls(
            n_layers=int(text.num_hidden_layers),
            hidden_size=int(text.hidden_size),
            n_heads=n_heads,
            n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // n_heads),
            mlp_size=int(text.intermediate_size),
            vocab_size=int(text.vocab_size),
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        projections = 2 * self.hidden_size * (self.n_heads + self.n_kv_heads) * self.head_dim
        return projections + 3 * self.hidden_size * self.mlp_size

    def with_layers(self, n_layers: int) -> Self:
        return replace(self, n_layers=n_layers)


def layer_flops(shape: DecoderShape, n_tokens: int) -> int:
    """FLOPs of one decoder layer over `n_tokens`. Attention counts the whole square: kernels that skip what is not causal do half of that part."""
    return 2 * (n_tokens * shape.layer_weights + 2 * n_tokens**2 * shape.n_heads * shape.head_dim)


def prefill_flops(shape: DecoderShape, layer_tokens: Sequence[int]) -> int:
    """FLOPs of one sequence's prefill. layer_tokens: visual and text tokens that reach each layer."""
    _require_all_layers(shape, layer_tokens)
    return sum(layer_flops(shape, n) for n in layer_tokens)


def token_kv_bytes(shape: DecoderShape, number_bytes: int) -> int:
    """Bytes that one token takes in the cache of one layer. number_bytes: 2 for fp16 and bf16, 4 for fp32."""
    return 2 * shape.n_kv_heads * shape.head_dim * number_bytes


def kv_bytes(shape: DecoderShape, layer_tokens: Sequence[int], number_bytes: int) -> int:
    """Bytes of one sequence's KV cache. layer_tokens: tokens that each layer holds."""
    _require_all_layers(shape, layer_tokens)
    return sum(layer_tokens) * token_kv_bytes(shape, number_bytes)


def decode_bytes(shape: DecoderShape, kv_cache_bytes: int, number_bytes: int) -> int:
    """Bytes that one decoding step reads: every matrix of the decoder, the head, and the cache of all sequences.

    Small batches wait for memory while they decode, so the time goes with these bytes and not with FLOPs. It is a lower bound of what the cache
    costs: transformers' growing cache is copied whole at every step, so measured gains of decoding are larger than those of these bytes.
    """
    weights = shape.n_layers * shape.layer_weights + shape.hidden_size * shape.vocab_size
    return weights * number_bytes + kv_cache_bytes


@dataclass(frozen=True)
class EncoderShape:
    """A vision tower in the manner of CLIP with the two linear layers behind it. n_prefix: rows in front of the patches, such as [CLS].

    patch_size: pixels of a side. projected_size: width of the language model.
    """

    n_layers: int
    hidden_size: int
    mlp_size: int
    n_patches: int
    n_prefix: int
    patch_size: int
    projected_size: int

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The shape of a transformers model's encoder, or None where it is built otherwise."""
        vision = getattr(config, "vision_config", None)
        if config.model_type not in _TWO_LINEAR or vision is None or vision.model_type not in _TOWER_PREFIX:
            return None
        return cls(
            n_layers=int(vision.num_hidden_layers),
            hidden_size=int(vision.hidden_size),
            mlp_size=int(vision.intermediate_size),
            n_patches=int(vision.image_size // vision.patch_size) ** 2,
            n_prefix=_TOWER_PREFIX[vision.model_type],
            patch_size=int(vision.patch_size),
            projected_size=int(config.get_text_config(decoder=True).hidden_size),
        )

    def with_layers(self, n_layers: int) -> Self:
        return replace(self, n_layers=n_layers)


def encoder_flops(shape: EncoderShape, n_tiles: int = 1) -> int:
    """FLOPs of the tower and the projector over `n_tiles` pictures of the tower's own size. Pruning behind the encoder takes nothing off them."""
    rows, width = shape.n_patches + shape.n_prefix, shape.hidden_size
    patching = shape.n_patches * 3 * shape.patch_size**2 * width
    layer = rows * (4 * width**2 + 2 * width * shape.mlp_size) + 2 * rows**2 * width
    projector = shape.n_patches * shape.projected_size * (width + shape.projected_size)
    return 2 * n_tiles * (patching + shape.n_layers * layer + projector)


def _require_all_layers(shape: DecoderShape, layer_tokens: Sequence[int]) -> None:
    if len(layer_tokens) != shape.n_layers:
        raise OptionError(f"the decoder has {shape.n_layers} layers, got the token counts of {len(layer_tokens)}")
