"""Helpers that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM


def assert_error_bounded(out: Tensor, exact: Tensor, naive: Tensor, *, block: int, floor: float = 1e-3) -> None:
    """Relative RMS error of `out` against `exact` at most twice that of `naive` plus `floor`, block of rows by block of rows.

    out, naive: (rows, heads, D) in the tested precision; exact: the same from fp64. One tolerance over all rows would miss a lost block.
    """
    for lo in range(0, out.shape[0], block):
        got, want, low = (t[lo : lo + block].double() for t in (out, exact, naive))
        scale = want.pow(2).mean().sqrt().clamp_min(1e-12)
        err, allowed = ((t - want).pow(2).mean().sqrt() / scale for t in (got, low))
        limit = 2 * allowed + floor
        # written as `<=`, never as `not >`: a NaN must fail
        assert err <= limit, f"rows {lo}..{lo + got.shape[0] - 1}: relative error {err:.1e}, limit {limit:.1e}"


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of three layers in fp32, the same one at every call; head_dim 16, two KV heads of two query heads each."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


class NoHostReads(TorchDispatchMode):
    """Raises where an operation would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"), f"{name} reads a value on the host"
        return func(*args, **(kwargs or {}))
