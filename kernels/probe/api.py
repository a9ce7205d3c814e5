"""The probe's functions: argument checks, the rows that count, and dispatch to an executor (design.md §4)."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, KeyView, PagedKeys, Ragged
from accel.kernels.block_sparse.executors import TRITON_MAX_HEAD_DIM, triton_obstacles
from accel.kernels.block_sparse.keys import token_major
from accel.kernels.probe import cpu, naive
from accel.kernels.probe.request import AttentionMoments, Columns, Request, RowSet

Impl = Literal["auto", "triton", "cpu", "naive"]
Heads = Literal["each", "mean", "max"]

# Calls of this process by executor: "triton", "cpu", "naive"; where "auto" could not use the kernels on CUDA tensors also under "auto->cpu".
dispatches: Counter[str] = Counter()

_log = logging.getLogger(__name__)


@torch.no_grad()
def mean_attention(
    q: Tensor,
    k: Tensor | KeyView,
    *,
    scale: float,
    is_causal: bool,
    rows: Tensor | None = None,
    key_mask: Tensor | None = None,
    lens: Ragged | None = None,
    softcap: float | None = None,
    heads: Heads = "each",
    impl: Impl = "auto",
) -> Tensor:
    """The attention that each key receives, averaged over query rows: (B, Hq, N) fp32, or (B, N) where `heads` joins them.

    q: (B, Hq, L, D) and k: (B, Hkv, N, D), any strides but last stride 1; or token-major q (tokens, Hq, D), a KeyView and `lens`, as for
    `block_sparse_attention`, and then N is `lens.max_kv`. Query head h reads KV head h // (Hq / Hkv). Queries are the last L of N tokens.
    scale, softcap: the layer's. The attention is that of the whole row: keys are left out of a softmax by `key_mask` and causality only.
    rows: over which rows; all by default, else (B, L) bool, or (n,) or (B, n) int64 of which −1 is padding and doubles count twice. One row
    gives that row's attention. A row that sees no key is 0 everywhere and counts; where no row counts the result is 0. Unlike a mean over the
    rows that see a key, it sums to 1 over the keys also with causality.
    key_mask: (B, N) bool, False for padding: such keys get 0 and rows that stand on them never count. (Without causality and with L ≠ N no row
    stands on a key.) Everything past a sequence's end is 0.
    heads: "each", or the mean or the largest value over the heads.
    A NaN in a row that counts, or in a key that it sees, spoils all keys that this row sees; padding may hold NaN.
    impl: "auto" takes the kernels for CUDA tensors and torch elsewhere; where kernels cannot run torch does, logged once and counted in
    `dispatches`. "triton" runs or raises UnsupportedError with the reasons. Kernels trust lengths and leave out rows that do not exist, without
    waiting for the device; on a CPU both raise ValueError. No gradients. Nothing of size L · N is ever held.
    """
    if heads not in get_args(Heads):
        raise OptionError(f"heads must be one of {', '.join(get_args(Heads))}, got {heads!r}")
    mean = _probe(q, k, rows, key_mask, lens, impl, scale=scale, softcap=softcap, is_causal=is_causal, wants_spread=False).mean
    if heads == "each":
        return mean
    return mean.mean(1) if heads == "mean" else mean.amax(1)


def attention_row(
    q: Tensor,
    k: Tensor | KeyView,
    row: int | Tensor = 0,
    *,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None = None,
    lens: Ragged | None = None,
    softcap: float | None = None,
    heads: Heads = "each",
    impl: Impl = "auto",
) -> Tensor:
    """The attention of one query row of each sequence: (B, Hq, N) fp32, or (B, N) where `heads` joins them. Row 0 is [CLS], −1 the newest.

    row: a number or (B,) int64, from the sequence's end where negative. Everything else as in `mean_attention`; a row of padding is 0, and
    so is that of a sequence without rows.
    """
    return mean_attention(
        q, k, rows=_row_number(q, row, lens), scale=scale, is_causal=is_causal, key_mask=key_mask, lens=lens, softcap=softcap, heads=heads, impl=impl
    )


@torch.no_grad()
def attention_moments(
    q: Tensor,
    k: Tensor | KeyView,
    *,
    scale: float,
    is_causal: bool,
    rows: Tensor | None = None,
    key_mask: Tensor | None = None,
    lens: Ragged | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> AttentionMoments:
    """Mean and population variance of each key's attention over the rows, by head, and the mean entropy of the rows (kv-compression.md §2.7).

    Arguments as in `mean_attention`. The variance is summed from deviations, so that equal rows give 0 and not the rounding of two squares.
    With causality a row counts as 0 for the keys that it does not see; §10.2 says which rows and keys to take so that this adds no variance.
    """
    found = _probe(q, k, rows, key_mask, lens, impl, scale=scale, softcap=softcap, is_causal=is_causal, wants_spread=True)
    assert found.variance is not None
    assert found.row_entropy is not None
    return AttentionMoments(found.mean, found.variance, found.row_entropy)


def _probe(
    q: Tensor, k: Tensor | KeyView, rows: Tensor | None, key_mask: Tensor | None, lens: Ragged | None, impl: Impl, *,
    scale: float, softcap: float | None, is_causal: bool, wants_spread: bool,
) -> Columns:
    if impl not in get_args(Impl):
        raise OptionError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    q, keys, lens = _token_major(q, k, lens)
    _check(q, keys, lens, key_mask, is_causal=is_causal)
    request = Request(
        q, keys, lens, _row_set(rows, key_mask, lens, is_causal=is_causal), key_mask,
        scale=scale, softcap=softcap, is_causal=is_causal, wants_spread=wants_spread,
    )
    chosen = _choose(impl, request)
    dispatches[chosen] += 1
    if chosen == "naive":
        found = naive.probe(request)
        return Columns(found.mean.float(), *(None if t is None else t.float() for t in (found.variance, found.row_entropy)))
    if chosen == "cpu":
        return cpu.probe(request)
    # imported where it runs: the package must load where triton is not installed
    from accel.kernels.probe import triton_launch

    return triton_launch.probe(request)


def _token_major(q: Tensor, k: Tensor | KeyView, lens: Ragged | None) -> tuple[Tensor, KeyView, Ragged]:
    """The three in the form of the other kernels; never a copy."""
    if isinstance(k, KeyView):
        if lens is None or q.dim() != 3:
            raise ValueError(f"a {type(k).__name__} goes with `lens` and q (tokens, heads, head_dim), got q {tuple(q.shape)}, lens {lens}")
        return q, k, lens
    if lens is not None or q.dim() != 4 or k.dim() != 4 or len(q) != len(k):
        found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, lens {'absent' if lens is None else 'given'}"
        raise ValueError(f"q and k must be (B, heads, tokens, head_dim) of one B, without `lens`, or k a KeyView; got {found}")
    batch, n_rows, n = q.shape[0], q.shape[2], k.shape[2]
    if not batch:
        empty = torch.empty(0, dtype=torch.int64, device=q.device)
        flat = ContiguousKeys(k.new_empty(0, k.shape[1], k.shape[3]), k.new_empty(0, k.shape[1], k.shape[3]), empty, empty)
        return q.new_empty(0, q.shape[1], q.shape[3]), flat, Ragged(empty, empty, empty, n_rows, n)
    flat_q, pitch = token_major(q.transpose(1, 2))
    keys = ContiguousKeys.from_cache(k, k)
    start = torch.arange(batch, device=q.device) * pitch
    return flat_q, keys, Ragged(start, torch.full_like(start, n_rows), keys.kv_len, max_q=n_rows, max_kv=n)


def _row_set(rows: Tensor | None, key_mask: Tensor | None, lens: Ragged, *, is_causal: bool) -> RowSet:
    """The rows that count. Reads values on a CPU only, to check them."""
    if rows is None and key_mask is None:
        return RowSet.all_of(lens)
    every = torch.arange(lens.max_q, device=lens.q_len.device).expand(lens.batch, -1)
    if rows is None:
        index, is_meant = every, every < lens.q_len[:, None]
    elif rows.dtype == torch.bool:
        if rows.shape != every.shape:
            raise ValueError(f"rows must be {tuple(every.shape)} bool, got {tuple(rows.shape)}")
        index, is_meant = every, rows & (every < lens.q_len[:, None])
    else:
        if rows.dtype != torch.int64 or rows.dim() not in (1, 2) or (rows.dim() == 2 and len(rows) != lens.batch):
            raise ValueError(f"rows must be bool, or int64 of shape (n,) or ({lens.batch}, n), got {tuple(rows.shape)} {rows.dtype}")
        index = rows.expand(lens.batch, -1)
        is_meant = (index >= 0) & (index < lens.q_len[:, None])
        if index.device.type == "cpu" and not (is_meant | (index == -1)).all():
            raise ValueError(f"rows name a row that does not exist: {index.tolist()} in sequences of {lens.q_len.tolist()} rows (−1 is padding)")
    if key_mask is not None and lens.max_kv:
        column = (lens.kv_len - lens.q_len)[:, None] + index
        is_own = key_mask.gather(1, column.clamp(0, lens.max_kv - 1))
        is_meant = is_meant & (is_own if is_causal else is_own | (lens.kv_len != lens.q_len)[:, None])
    return RowSet.listed(index, is_meant)


def _row_number(q: Tensor, row: int | Tensor, lens: Ragged | None) -> Tensor:
    """Rows counted from the first one, (B, 1) int64: those that do not exist lie behind the last, sequences without rows get padding."""
    most = q.shape[-2] if lens is None else lens.max_q
    lengths = torch.full((q.shape[0],), most, device=q.device) if lens is None else lens.q_len
    if isinstance(row, int):
        if not -most <= row < most:
            raise ValueError(f"row {row} does not exist among {most} query rows")
        row = torch.full_like(lengths, row)
    index = torch.where(row < 0, row + lengths, row)
    return torch.where(index < 0, most, index).masked_fill(lengths == 0, -1)[:, None]


def _choose(impl: Impl, request: Request) -> str:
    """Name of the executor that runs; raises where the asked one cannot."""
    if impl in ("cpu", "naive"):
        return impl
    if impl == "auto" and request.q.device.type != "cuda":
        return "cpu"
    obstacles = _obstacles(request)
    if not obstacles:
        return "triton"
    if impl == "triton":
        raise UnsupportedError("the probe cannot run impl='triton'", obstacles)
    dispatches["auto->cpu"] += 1
    _log_fallback("; ".join(obstacles))
    return "cpu"


def _obstacles(request: Request) -> list[str]:
    """Every reason why the kernels cannot run; empty where they can."""
    found = list(triton_obstacles(request.q.device, request.q.dtype))
    if request.q.device.type == "cpu" and request.q.dtype == torch.bfloat16:
        found.append("Triton's interpreter computes bf16 wrongly")
    if request.keys.dtype != request.q.dtype:
        found.append(f"q is {request.q.dtype}, the keys are {request.keys.dtype}")
    if request.q.shape[2] > TRITON_MAX_HEAD_DIM:
        found.append(f"head_dim is {request.q.shape[2]}, the kernels take at most {TRITON_MAX_HEAD_DIM}")
    if not isinstance(request.keys, (ContiguousKeys, PagedKeys)):
        found.append(f"no kernel reads {type(request.keys).__name__}")
    return found


@cache
def _log_fallback(reasons: str) -> None:
    # cached: a reason is logged once
    _log.warning("the attention probe runs in torch, sequence by sequence: %s", reasons)


def _check(q: Tensor, keys: KeyView, lens: Ragged, key_mask: Tensor | None, *, is_causal: bool) -> None:
    n_tokens, n_heads, head_dim = q.shape
    if n_heads % keys.n_kv_heads or head_dim != keys.head_dim:
        raise ValueError(f"q has {n_heads} heads of {head_dim}, which does not fit {keys.n_kv_heads} key heads of {keys.head_dim}")
    if q.device != keys.device:
        raise ValueError(f"q is on {q.device}, the keys are on {keys.device}")
    for name, dtype in (("q", q.dtype), ("the keys", keys.dtype)):
        if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise UnsupportedError("the probe needs floating tensors of at least 16 bits", [f"{name}: {dtype}; dequantise first"])
    if lens.batch != keys.kv_len.shape[0]:
        raise ValueError(f"lens describes {lens.batch} sequences, the keys hold {keys.kv_len.shape[0]}")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (lens.batch, lens.max_kv)):
        raise ValueError(f"key_mask must be {(lens.batch, lens.max_kv)} bool, got {tuple(key_mask.shape)} {key_mask.dtype}")
    if q.device.type != "cpu":
        return
    for rows, held in zip(lens.rows(), keys.kv_len.tolist(), strict=True):
        if rows.kv_len != held or not 0 <= rows.kv_len <= lens.max_kv or not 0 <= rows.q_len <= lens.max_q:
            raise ValueError(f"sequence {rows.index}: {rows} does not fit {held} keys held, at most {lens.max_q} rows and {lens.max_kv} keys")
        if is_causal and rows.q_len > rows.kv_len:
            raise ValueError(f"sequence {rows.index}: {rows.q_len} query rows, but {rows.kv_len} keys: queries are the last of its keys")
        if rows.q_len and not 0 <= rows.q_start <= n_tokens - rows.q_len:
            raise ValueError(f"sequence {rows.index}: rows {rows.q_start}..{rows.q_start + rows.q_len - 1} lie outside the {n_tokens} of q")
