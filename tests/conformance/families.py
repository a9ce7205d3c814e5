"""Tiny random models of many families with inputs for them, the same ones at every call: fp32, 100-odd tokens, a second to build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 96
N_TOKENS = 112              # seven blocks of 16
FIRST_WORD = 10             # smaller ids are special: padding, image placeholders, …

# Sizes that every text configuration takes. Weights are drawn wide, so that attention is far from uniform and no two tokens tie.
TEXT_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    build: makes model and inputs. is_sparse: whether a prompt of `N_TOKENS` reaches the sparse path in some layer; where it must not,
    `dense_reason` is a part of the reason that is counted.
    """

    name: str
    build: Callable[[], tuple[PreTrainedModel, dict[str, Tensor]]]
    is_sparse: bool = True
    dense_reason: str | None = None
    has_images: bool = False


FAMILIES: dict[str, Family] = {}


def add(family: Family) -> None:
    FAMILIES[family.name] = family


def words(batch: int = 1, length: int = N_TOKENS, *, seed: int = 7) -> Tensor:
    """Random token ids that are nothing special, (batch, length)."""
    return torch.randint(FIRST_WORD, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def text_config(name: str, *, without: tuple[str, ...] = (), **changes: Any) -> Any:
    """A configuration of `TEXT_SIZES` with `changes`; sizes named in `without` are left to the class, which may not have them."""
    sizes = {**TEXT_SIZES, **changes}
    return getattr(transformers, name)(**{key: value for key, value in sizes.items() if key not in without})


def instance(cls: str, config: Any, *, attention: str = "sdpa") -> PreTrainedModel:
    """A model with fixed random weights in evaluation mode."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = getattr(transformers, cls)(config).eval()
    for parameter in model.parameters():
        # Gemma 3 begins with a projection of zeros, through which no picture would show
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(std=0.2)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def _text(
    name: str, config: str, cls: str, *, attention: str = "sdpa", is_sparse: bool = True, dense_reason: str | None = None, **changes: Any
) -> None:
    def build() -> tuple[PreTrainedModel, dict[str, Tensor]]:
        ids = words()
        return instance(cls, text_config(config, **changes), attention=attention), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    add(Family(name, build, is_sparse, dense_reason))


_NO_HEAD_DIM = ("head_dim",)
_MIXED_LAYERS = ["sliding_attention", "full_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_text("llama", "LlamaConfig", "LlamaForCausalLM")
_text("llama eager", "LlamaConfig", "LlamaForCausalLM", attention="eager")
_text("llama MHA", "LlamaConfig", "LlamaForCausalLM", num_key_value_heads=4)
_text("qwen2", "Qwen2Config", "Qwen2ForCausalLM", without=_NO_HEAD_DIM)
_text("qwen3", "Qwen3Config", "Qwen3ForCausalLM")
_text("mistral", "MistralConfig", "MistralForCausalLM", sliding_window=None)
_text(
    "mistral sliding", "MistralConfig", "MistralForCausalLM",
    sliding_window=24, is_sparse=False, dense_reason="sliding window",
)  # fmt: skip
_text(
    "gemma2", "Gemma2Config", "Gemma2ForCausalLM", attention="eager",
    sliding_window=24, layer_types=_MIXED_LAYERS, query_pre_attn_scalar=16, attn_logit_softcapping=5.0,
)  # fmt: skip
_text("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", sliding_window=24, layer_types=_MIXED_LAYERS, query_pre_attn_scalar=16)
_text("phi3", "Phi3Config", "Phi3ForCausalLM", without=_NO_HEAD_DIM)
_text("glm4", "Glm4Config", "Glm4ForCausalLM")
_text("olmo2", "Olmo2Config", "Olmo2ForCausalLM", without=_NO_HEAD_DIM)
_text("granite", "GraniteConfig", "GraniteForCausalLM", without=_NO_HEAD_DIM, attention_multiplier=0.25)
_text("cohere", "CohereConfig", "CohereForCausalLM", without=_NO_HEAD_DIM, logit_scale=1.0)
_text("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", without=_NO_HEAD_DIM)
_text("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", without=_NO_HEAD_DIM, no_rope_layers=[1, 0, 1])
_text("qwen3 moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", **_EXPERTS)
_text("mixtral", "MixtralConfig", "MixtralForCausalLM", num_local_experts=4, sliding_window=None)
_text("gpt neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", without=("num_key_value_heads", "head_dim"))
_text("gpt2", "GPT2Config", "GPT2LMHeadModel", without=("num_key_value_heads", "head_dim", "intermediate_size"))
_text("opt", "OPTConfig", "OPTForCausalLM", without=("num_key_value_heads", "head_dim", "intermediate_size"), ffn_dim=64, word_embed_proj_dim=64)
_text(
    "gpt oss", "GptOssConfig", "GptOssForCausalLM", attention="eager",
    is_sparse=False, dense_reason="s_aux", layer_types=_MIXED_LAYERS, sliding_window=24, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
_text(
    "qwen3 next", "Qwen3NextConfig", "Qwen3NextForCausalLM",
    layer_types=["linear_attention", "full_attention", "full_attention"], shared_expert_intermediate_size=32, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, **_EXPERTS,
)  # fmt: skip
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4, "without": _NO_HEAD_DIM,
}  # fmt: skip
_text("deepseek v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", v_head_dim=16, **_LATENT)
_text(
    "deepseek v3, narrow values", "DeepseekV3Config", "DeepseekV3ForCausalLM",
    is_sparse=False, dense_reason="value head size", v_head_dim=8, **_LATENT,
)  # fmt: skip
_text(
    "llama4", "Llama4TextConfig", "Llama4ForCausalLM",
    layer_types=["chunked_attention", "full_attention", "full_attention"], no_rope_layers=[1, 0, 1], attention_chunk_size=32,
    intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1,
)  # fmt: skip
_text("lfm2", "Lfm2Config", "Lfm2ForCausalLM", without=_NO_HEAD_DIM, layer_types=["conv", "full_attention", "full_attention"], block_multiple_of=16)
