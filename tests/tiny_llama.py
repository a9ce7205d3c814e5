"""A Llama with random weights and a tokenizer of single bytes, for tests that need a whole model: made in a moment, saved like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_model(*, positions: int = 8192) -> Any:
    """Three layers, 4 query and 2 key heads of 16, fp32, the same weights every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=positions, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> Any:
    """One token per byte, no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(bytes_)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny(folder: Path, *, positions: int = 8192) -> Path:
    """The model and its tokenizer in `folder`, as `--model` takes it."""
    tiny_model(positions=positions).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
