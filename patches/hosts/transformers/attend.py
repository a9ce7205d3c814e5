"""One sparse attention call on transformers' tensors: lengths, plan, kernel, counters. Runs eagerly, inside the opaque operator."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, Ragged
from accel.kernels.block_sparse.api import block_sparse_attention, dense_attention
from accel.kernels.block_sparse.differentiable import differentiable_attention
from accel.kernels.block_sparse.executors import why_no_executor
from accel.kernels.block_sparse.keys import token_major
from accel.patches.hosts.transformers.layers import LayerState, call_original
from accel.patches.hosts.transformers.masks import causal_mask_for
from accel.protocols import AttentionContext, AttentionStep, RunDense


def step_of(state: LayerState, q: Tensor, kv_len: int) -> AttentionStep:
    """The shapes of a call. q (B, Hq, L, D)."""
    batch, n_heads, q_len, head_dim = q.shape
    info = state.info
    dtype = str(q.dtype).removeprefix("torch.")
    return AttentionStep(
        layer=state.layer, n_layers=info.n_layers, batch=batch, q_len=q_len, kv_len=kv_len, n_heads=n_heads,
        n_kv_heads=info.n_kv_heads, head_dim=head_dim, device=q.device.type, dtype=dtype,
    )  # fmt: skip


def why_method_dense(state: LayerState, q: Tensor, kv_len: int) -> str | None:
    """Why the method, or the machine, wants this call dense. Shapes and options only."""
    if state.skip_reason is not None:
        return state.skip_reason
    if state.info.max_positions is not None and kv_len > state.info.max_positions:
        return f"longer than the model's {state.info.max_positions} positions"
    return state.method.dense_reason(step_of(state, q, kv_len)) or why_no_executor(q.device, q.dtype)


class Call(NamedTuple):
    """One attention call as transformers makes it.

    q (B, Hq, L, D); k, v (B, Hkv, n, D) in the same dtype. valid: (B, n) bool, keys that are no padding, or None.
    offset: position of the first query among the keys; keys from offset + L on do not exist yet (static cache). A tensor on a GPU, where
    reading a static cache's counter would make the host wait.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    offset: int | Tensor
    scale: float
    softcap: float | None

    @property
    def most_keys(self) -> int:
        """Keys up to the last query, or a bound of them where their number is on a GPU."""
        return self.offset + self.q.shape[2] if isinstance(self.offset, int) else self.k.shape[2]

    @property
    def known_keys(self) -> int:
        """What decides between dense and sparse: see `known_length`."""
        return self.most_keys if isinstance(self.offset, int) else known_length(self.q, self.k)


def known_length(q: Tensor, k: Tensor) -> int:
    """Keys that shapes alone promise on a static cache whose counter is on a GPU: the prompt's own, or in decoding the whole cache."""
    return q.shape[2] if q.shape[2] > 1 else k.shape[2]


def attend(state: LayerState, call: Call, *, is_differentiable: bool = False) -> Tensor:
    """Attention of one layer by its method, (B, L, Hq, D). Falls back to the model's own attention where the plan says so.

    is_differentiable: the slower path with gradients.
    """
    call = call._replace(k=call.k[:, :, : call.most_keys], v=call.v[:, :, : call.most_keys])
    reason = why_method_dense(state, call.q, call.known_keys)
    runs_original = state.method.dense_kernel == "original" or is_differentiable or why_no_executor(call.q.device, call.q.dtype) is not None
    if reason is not None and runs_original:
        return _own_attention(state, call, reason)
    if call.valid is not None and call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return _own_attention(state, call, "padding inside a CUDA graph")
    laid_out = as_tokens(call)
    if laid_out is None:
        return _own_attention(state, call, "padding between tokens")
    tokens, keys, lens = laid_out
    started = time.perf_counter()
    plan = RunDense(reason) if reason is not None else _plan(state, call, tokens, keys, lens)
    planned = time.perf_counter()
    if isinstance(plan, RunDense):
        state.stats.selection_s += planned - started
        if runs_original:
            return _own_attention(state, call, plan.reason)
        state.stats.dense_calls[plan.reason] += 1
        out = dense_attention(tokens, keys, lens, scale=call.scale, softcap=call.softcap, precision=state.method.precision)
    elif is_differentiable:
        out = differentiable_attention(tokens, keys, plan, lens, scale=call.scale, softcap=call.softcap)
    else:
        out = block_sparse_attention(tokens, keys, plan, lens, scale=call.scale, softcap=call.softcap, precision=state.method.precision)
        _count(state, call, plan, lens, selection_s=planned - started, attention_s=time.perf_counter() - planned)
    batch, heads, length, _ = call.q.shape
    return out.view(batch, length, heads, -1)


def as_tokens(call: Call) -> tuple[Tensor, ContiguousKeys, Ragged] | None:
    """(B·L, Hq, D) queries, key view and lengths of a padded batch; None where a sequence's tokens are no contiguous run."""
    batch, _, length, _ = call.q.shape
    device = call.q.device
    if call.valid is None:
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        end = start + (call.offset + length)
    else:
        runs = _runs_once(call.valid, call.most_keys)
        if runs is None:
            return None
        start, end = runs
        # one decoding step whose mask ends before the last key: only the mask says what the query sees
        if length == 1 and bool((end != call.offset + length).any()):
            return None
    # rows of this call before the first or behind the last token of their sequence are padding
    first, last = ((t - call.offset).clamp(0, length) for t in (start, end))
    rows = torch.arange(batch, device=device) * length + first
    n_gapless = batch * length if call.valid is None else 0
    lens = Ragged(q_start=rows, q_len=last - first, kv_len=end - start, max_q=length, max_kv=call.most_keys, n_gapless=n_gapless)
    return _token_rows(call.q.transpose(1, 2)), _key_view(call.k, call.v, start, end - start), lens


def _token_rows(q: Tensor) -> Tensor:
    """(B, L, Hq, D) → (B·L, Hq, D), a view wherever the memory allows one."""
    if q.stride(-1) == 1:
        tokens, pitch = token_major(q)
        if q.shape[0] == 1 or pitch == q.shape[1]:
            return tokens
    return q.contiguous().flatten(0, 1)


def _key_view(k: Tensor, v: Tensor, start: Tensor, length: Tensor) -> ContiguousKeys:
    try:
        return ContiguousKeys.from_cache(k, v, start=start, kv_len=length)
    except ValueError:
        # some caches return K and V in different or overlapping layouts
        return ContiguousKeys.from_cache(k.contiguous(), v.contiguous(), start=start, kv_len=length)


def _runs_once(valid: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
    """`runs_of` the first n keys. The layers of a forward share the tensor, and only the first of them waits for the device."""
    known: dict[int, tuple[Tensor, Tensor] | None] = valid.__dict__.setdefault(_RUNS, {})
    if n not in known:
        known[n] = runs_of(valid[:, :n])
    return known[n]


_RUNS = "_accel_runs"


def runs_of(valid: Tensor) -> tuple[Tensor, Tensor] | None:
    """First valid key and the end of the valid keys of each sequence, both (B,) int64; None where a sequence has a hole.

    valid: (B, n) bool.
    """
    n = valid.shape[1]
    count = valid.sum(1)
    start = valid.to(torch.int8).argmax(1)
    end = torch.where(count > 0, n - valid.flip(1).to(torch.int8).argmax(1), start)
    return (start, end) if bool((end - start == count).all()) else None


def _plan(state: LayerState, call: Call, tokens: Tensor, keys: ContiguousKeys, lens: Ragged) -> BlockPlan | RunDense:
    step = step_of(state, call.q, call.known_keys)
    static = state.method.static_pattern(step)
    if static is not None:
        return static
    plan = state.method.plan(tokens, keys, AttentionContext(step=step, lens=lens, scale=call.scale, softcap=call.softcap))
    # some methods draw their plan on the host
    return plan if isinstance(plan, RunDense) else plan.to(tokens.device)


def _own_attention(state: LayerState, call: Call, reason: str) -> Tensor:
    """The model's own attention with the mask of plain causal attention, counted under `reason`."""
    state.stats.dense_calls[reason] += 1
    module = state.module()
    assert module is not None  # it is the caller
    mask = causal_mask_for(state.original, call.q, kv_length=call.k.shape[2], q_offset=call.offset, valid=call.valid, config=module.config)
    kwargs: dict[str, Any] = {"dropout": 0.0} if call.softcap is None else {"dropout": 0.0, "softcap": call.softcap}
    return call_original(state.original_function, module, call.q, call.k, call.v, mask, scaling=call.scale, kwargs=kwargs)[0]


def _count(state: LayerState, call: Call, plan: BlockPlan, lens: Ragged, *, selection_s: float, attention_s: float) -> None:
    stats = state.stats
    # reading a number from a GPU would wait for all that runs there
    stats.count_sparse(plan.tile_counts(lens, call.q.shape[1]), is_deferred=call.q.device.type != "cpu")
    stats.selection_s += selection_s
    stats.attention_s += attention_s
    state.handle.notify(step=step_of(state, call.q, call.known_keys), plan=plan, lens=lens)
