"""Block-sparse and dense attention over ragged batches: argument checks and dispatch to an executor (design.md §4)."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.kernels.block_sparse.cpu import DENSE_BLOCK, cpu_attention
from accel.kernels.block_sparse.cpu_probe import Precision
from accel.kernels.block_sparse.executors import TRITON_MAX_HEAD_DIM, triton_obstacles, why_no_executor
from accel.kernels.block_sparse.executors import dispatches as dispatches
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.naive import naive_attention
from accel.kernels.block_sparse.plan import BlockPlan, ImplicitPlan
from accel.kernels.block_sparse.ragged import Ragged

Impl = Literal["auto", "triton", "cpu", "naive", "flex", "cute"]
IMPLS: tuple[str, ...] = get_args(Impl)

_log = logging.getLogger(__name__)


@overload
def block_sparse_attention(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None = None,
    return_lse: Literal[False] = False, out: Tensor | None = None, impl: Impl = "auto", precision: Precision = "accurate",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None = None, return_lse: Literal[True],
    out: Tensor | None = None, impl: Impl = "auto", precision: Precision = "accurate",
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None = None, return_lse: bool,
    out: Tensor | None = None, impl: Impl = "auto", precision: Precision = "accurate",
) -> Tensor | tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    keys: KeyView,
    plan: BlockPlan,
    lens: Ragged,
    *,
    scale: float,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    impl: Impl = "auto",
    precision: Precision = "accurate",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of every query row over the keys of the blocks that `plan` lists for it (sparse-attention.md §1.2, §1.4).

    q: (T, Hq, D) view, last stride 1, any other strides; `lens` says which rows belong to which sequence. scale: the layer's own.
    Returns out (T, Hq, Dv) in q's dtype, written into `out` where given; with `return_lse` also lse (Hq, T) fp32, natural log.
    Rows without keys and rows of q that belong to no sequence become 0 with LSE −inf. A NaN in q or k reaches exactly the rows that see it.
    A NaN in v reaches those too, and may reach rows computed in one product with them: their query block, or a whole call of at most 16 rows.
    impl: "auto" runs the best executor for these tensors and may fall back (logged once, counted in `dispatches`); any other name runs or
    raises `UnsupportedError` with the reasons. On CUDA nothing waits for the device, so lengths are trusted there, not checked.
    precision: "fast" computes the scores of bf16 inputs in bf16 where a CPU is faster so.
    No gradients: raises `UnsupportedError` where they are asked for.
    """
    out = _checked(q, keys, lens, out=out, softcap=softcap)
    if plan.block_size <= 0:
        raise ValueError(f"the plan's block_size must be positive, got {plan.block_size}")
    chosen = _choose(impl, q, keys)
    dispatches[chosen] += 1
    return _run(chosen, q, keys, plan, lens, scale=scale, softcap=softcap, return_lse=return_lse, out=out, precision=precision)


@overload
def dense_attention(
    q: Tensor, keys: KeyView, lens: Ragged, *, scale: float, softcap: float | None = None, return_lse: Literal[False] = False,
    out: Tensor | None = None, precision: Precision = "accurate",
) -> Tensor: ...


@overload
def dense_attention(
    q: Tensor, keys: KeyView, lens: Ragged, *, scale: float, softcap: float | None = None, return_lse: Literal[True],
    out: Tensor | None = None, precision: Precision = "accurate",
) -> tuple[Tensor, Tensor]: ...


@overload
def dense_attention(
    q: Tensor, keys: KeyView, lens: Ragged, *, scale: float, softcap: float | None = None, return_lse: bool,
    out: Tensor | None = None, precision: Precision = "accurate",
) -> Tensor | tuple[Tensor, Tensor]: ...


def dense_attention(
    q: Tensor,
    keys: KeyView,
    lens: Ragged,
    *,
    scale: float,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    precision: Precision = "accurate",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over all keys, the best dense baseline of a CPU (kernels.md §0.2, §2.6); on CUDA the sparse kernel with every block.

    On a CPU by batched matrix products in decoding, and in prefill unless the probe found torch's own attention as fast. Arguments and results
    as in `block_sparse_attention`, without a plan.
    """
    out = _checked(q, keys, lens, out=out, softcap=softcap)
    chosen = _choose("auto", q, keys)
    dispatches[f"dense-{chosen}"] += 1
    return _run(chosen, q, keys, None, lens, scale=scale, softcap=softcap, return_lse=return_lse, out=out, precision=precision)


def _run(
    executor: str, q: Tensor, keys: KeyView, plan: BlockPlan | None, lens: Ragged, *,
    scale: float, softcap: float | None, return_lse: bool, out: Tensor, precision: Precision,
) -> Tensor | tuple[Tensor, Tensor]:
    if executor == "naive":
        result, full_lse = naive_attention(q, keys, plan or ImplicitPlan.dense(DENSE_BLOCK), lens, scale=scale, softcap=softcap)
        out.copy_(result)
        return (out, full_lse.float()) if return_lse else out
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device) if return_lse else None
    if executor in ("flex", "cute"):
        _run_optional(executor, q, keys, plan or ImplicitPlan.dense(DENSE_BLOCK), lens, scale=scale, softcap=softcap, out=out, lse=lse)
    elif executor == "triton":
        _run_triton(q, keys, plan or ImplicitPlan.dense(DENSE_BLOCK), lens, scale=scale, softcap=softcap, out=out, lse=lse)
    else:
        cpu_attention(q, keys, plan, lens, scale=scale, softcap=softcap, out=out, lse=lse, precision=precision)
    return out if lse is None else (out, lse)


def _run_optional(
    executor: str, q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *,
    scale: float, softcap: float | None, out: Tensor, lse: Tensor | None,
) -> None:
    from accel.kernels.block_sparse.cute_executor import cute_attention
    from accel.kernels.block_sparse.flex_executor import flex_executor

    attend = flex_executor if executor == "flex" else cute_attention
    attend(q, keys, plan, lens, scale=scale, softcap=softcap, out=out, lse=lse)


def _run_triton(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None, out: Tensor, lse: Tensor | None
) -> None:
    # imported where they run: the package must load where triton is not installed
    from accel.kernels.block_sparse.triton_decode import takes_decode, triton_decode
    from accel.kernels.block_sparse.triton_launch import triton_attention

    attend = triton_decode if takes_decode(plan, lens) else triton_attention
    # triton launches on the current device, whichever device the tensors are on
    is_elsewhere = q.device.type == "cuda" and q.device.index != torch.cuda.current_device()
    with torch.cuda.device(q.device) if is_elsewhere else nullcontext():
        attend(q, keys, plan, lens, scale=scale, softcap=softcap, out=out, lse=lse)


def _choose(impl: Impl, q: Tensor, keys: KeyView) -> str:
    """Name of the executor that runs; raises where the asked one cannot."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "naive":
        return "naive"
    if impl in ("flex", "cute"):
        if reasons := _optional_reasons(impl, q):
            raise UnsupportedError(f"impl={impl!r} cannot run here", reasons)
        return impl
    fast = "triton" if impl == "triton" or (impl == "auto" and q.device.type == "cuda") else "cpu"
    obstacles = _triton_reasons(q, keys) if fast == "triton" else _cpu_reasons(q)
    if not obstacles:
        return fast
    if impl != "auto":
        raise UnsupportedError(f"impl={impl!r} cannot run here", obstacles)
    dispatches["auto->naive"] += 1
    _log_fallback("; ".join(obstacles))
    return "naive"


def _optional_reasons(impl: str, q: Tensor) -> list[str]:
    """Why FlexAttention or flash_attn.cute cannot run; "auto" never chooses them, for nobody has measured yet where they are faster."""
    # imported where they are asked for: both are heavy
    from accel.kernels.block_sparse import cute_executor, flex_executor

    reason = (flex_executor if impl == "flex" else cute_executor).available()
    if reason is None and q.device.type != "cuda":
        reason = f"the tensors are on {q.device.type}"
    return [] if reason is None else [reason]


def _triton_reasons(q: Tensor, keys: KeyView) -> list[str]:
    reasons = list(triton_obstacles(q.device, q.dtype))
    largest = max(keys.head_dim, keys.value_dim)
    if largest > TRITON_MAX_HEAD_DIM:
        reasons.append(f"head_dim is {largest}, the kernels take at most {TRITON_MAX_HEAD_DIM}")
    return reasons


def _cpu_reasons(q: Tensor) -> list[str]:
    if q.device.type != "cpu":
        return [f"the tensors are on {q.device.type}"]
    reason = why_no_executor(q.device, q.dtype)
    return [] if reason is None else [reason]


@cache
def _log_fallback(reason: str) -> None:
    # cached: a reason is logged once
    _log.warning("block_sparse_attention runs its slow reference executor: %s", reason)


def _checked(q: Tensor, keys: KeyView, lens: Ragged, *, out: Tensor | None, softcap: float | None) -> Tensor:
    """The output tensor, after every argument has been checked."""
    if q.dim() != 3 or q.stride(-1) != 1:
        raise ValueError(f"q must be (tokens, heads, head_dim) with last stride 1, got shape {tuple(q.shape)}, strides {q.stride()}")
    n_tokens, n_heads, head_dim = q.shape
    k, v, device = keys.storage, keys.value_storage, q.device
    (*places, n_kv_heads, k_dim), (*v_places, n_v_heads, v_dim) = k.shape, v.shape
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads: the number must divide")
    if head_dim != k_dim:
        raise ValueError(f"q has head_dim {head_dim}, the keys have {k_dim}")
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype}, the keys are {k.dtype}")
    if n_v_heads != n_kv_heads or v_places != places or v.dtype != k.dtype or v.device != k.device:
        found = " and ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (k, v))
        raise ValueError(f"k and v must agree in all but the head size, got {found}")
    if k.device != device:
        raise ValueError(f"q is on {device}, the keys are on {k.device}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise UnsupportedError("this attention has no backward pass", ["q, k or v requires gradients; call it under torch.no_grad()"])
    if lens.batch != keys.kv_len.shape[0]:
        raise ValueError(f"lens describes {lens.batch} sequences, the keys hold {keys.kv_len.shape[0]}")
    if device.type == "cpu":
        _check_lengths(n_tokens, keys, lens)
    shape = (n_tokens, n_heads, v_dim)
    if out is None:
        return q.new_empty(shape)
    if tuple(out.shape) != shape or out.dtype != q.dtype or out.device != device or out.stride(-1) != 1:
        found = f"{tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        raise ValueError(f"out must be {shape} {q.dtype} on {device} with last stride 1, got {found}")
    return out


def _check_lengths(n_tokens: int, keys: KeyView, lens: Ragged) -> None:
    if not torch.equal(lens.kv_len, keys.kv_len):
        raise ValueError(f"lens.kv_len {lens.kv_len.tolist()} differs from keys.kv_len {keys.kv_len.tolist()}")
    if outside := keys.why_outside():
        raise ValueError(outside)
    for rows in lens.rows():
        if not 0 <= rows.q_len <= rows.kv_len:
            raise ValueError(f"sequence {rows.index} has {rows.q_len} query rows, but {rows.kv_len} keys: queries are the last of its keys")
        if rows.q_len and not 0 <= rows.q_start <= n_tokens - rows.q_len:
            last = rows.q_start + rows.q_len - 1
            raise ValueError(f"sequence {rows.index}: rows {rows.q_start}..{last} lie outside the {n_tokens} rows of q")
