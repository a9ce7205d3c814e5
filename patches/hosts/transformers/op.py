"""`accel::attention`, the one opaque operator behind the dispatcher: compilers see a single node, counters survive (design.md §4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.attend import Call, attend
from accel.patches.hosts.transformers.layers import LAYERS

# transformers compiles decoding on a static cache with CUDA graphs: a replay would neither plan nor count, and would read what others overwrite
OUTSIDE_GRAPHS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("accel::attention", mutates_args=(), tags=OUTSIDE_GRAPHS)
def attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, live_offset: Tensor | None, offset: int,
    key: int, scale: float, softcap: float | None,
) -> Tensor:
    """Attention of the patched layer `key`, (B, L, Hq, D). q (B, Hq, L, D), k and v (B, Hkv, n, D), valid (B, n) bool.

    The first query stands at `live_offset`, a static cache's counter, or else at `offset`.
    """
    start: int | Tensor = offset
    if live_offset is not None:
        start = int(live_offset) if q.device.type == "cpu" else live_offset
    # the inputs have their final types; autocast would undo the executors' choice of precision
    with torch.autocast(q.device.type, enabled=False):
        return attend(LAYERS[key], Call(q, k, v, valid, start, scale, softcap)).contiguous()


@attention.register_fake
def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, live_offset: Tensor | None, offset: int,
    key: int, scale: float, softcap: float | None,
) -> Tensor:
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[-1])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, valid, live_offset, ctx.offset, ctx.key, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, valid, None if live_offset is None else live_offset.clone())


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for q, k and v, by running the differentiable path again: the forward stays as fast as without gradients."""
    state = LAYERS[ctx.key]
    name = state.method.method_name()
    if not state.method.trainable:
        raise UnsupportedError(
            f"{name} has no gradients: its choice of blocks is not differentiable. "
            "Run the training step inside `with handle.paused():`, or use a method that trains: its class says `trainable`"
        )
    if torch.compiler.is_compiling():
        raise UnsupportedError(f"{name} cannot train inside a compiled step; leave torch.compile out of training")
    q, k, v, valid, live_offset = ctx.saved_tensors
    start = ctx.offset if live_offset is None else int(live_offset)
    counted = state.stats.dense_calls.copy()
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = attend(state, Call(q, k, v, valid, start, ctx.scale, ctx.softcap), is_differentiable=True)
    # this call was counted when its forward ran
    state.stats.dense_calls = counted
    return (*torch.autograd.grad(out, (q, k, v), grad), None, None, None, None, None, None)


attention.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("accel::count_dense", mutates_args=("ticks",), tags=OUTSIDE_GRAPHS)
def count_dense(ticks: Tensor, key: int, reason: str) -> None:
    """Counts one dense call of layer `key`. `ticks` is named as changed so that no compiler removes the call."""
    if key in LAYERS:
        LAYERS[key].stats.dense_calls[reason] += 1


@count_dense.register_fake
def _count_dense_shape(ticks: Tensor, key: int, reason: str) -> None:
    return None
