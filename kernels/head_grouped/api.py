"""Attention over head groups: argument checks and dispatch to an executor (design.md §4)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse.executors import CPU_DTYPES, TRITON_MAX_HEAD_DIM, triton_obstacles
from accel.kernels.head_grouped.cpu import cpu_grouped
from accel.kernels.head_grouped.groups import KVGroup
from accel.kernels.head_grouped.naive import naive_grouped

Impl = Literal["auto", "triton", "cpu", "naive"]

# Calls of this process by executor: "triton", "cpu", "naive"; where "auto" could not use a fast one also under "auto->naive"
dispatches: Counter[str] = Counter()

_log = logging.getLogger(__name__)


@overload
def grouped_attention(
    q: Tensor, groups: Sequence[KVGroup], *, scale: float, softcap: float | None = None, n_causal: int = 0,
    return_lse: Literal[False] = False, impl: Impl = "auto",
) -> Tensor: ...


@overload
def grouped_attention(
    q: Tensor, groups: Sequence[KVGroup], *, scale: float, softcap: float | None = None, n_causal: int = 0,
    return_lse: Literal[True], impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


def grouped_attention(
    q: Tensor,
    groups: Sequence[KVGroup],
    *,
    scale: float,
    softcap: float | None = None,
    n_causal: int = 0,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to all entries of its head: (B, Hq, L, D), in q's dtype and order of dimensions in memory.

    q: (B, Hq, L, D), any strides but last stride 1. Query head h reads KV head h // (Hq / Hkv).
    groups: hold each of the layer's Hkv heads once, in any order and any number of groups; each pair of them is one launch on CUDA.
    n_causal: of each head's entries, the last ones that belong to the last n_causal query rows, one each in order: such an entry is hidden from
    the rows before its own. 0 for next-scale models; a decoder's second turn passes its number of new tokens. All others are visible to all.
    A row that sees nothing is 0. return_lse: also the natural-log LSE, (B, Hq, L) fp32, −inf for such rows.
    impl: "auto" takes the kernels for CUDA tensors and torch on a CPU, and falls back to the definition where neither can run (logged once,
    counted in `dispatches`); any other name runs or raises `UnsupportedError` with the reasons. On CUDA nothing waits for the device, so that
    lengths are clamped there, not checked.
    No gradients: raises `UnsupportedError` where they are asked for.
    """
    groups = [group for group in groups if group.heads]
    _check(q, groups, scale=scale, softcap=softcap, n_causal=n_causal)
    chosen = _choose(impl, q)
    dispatches[chosen] += 1
    if chosen == "naive":
        out, lse = naive_grouped(q, groups, scale=scale, softcap=softcap, n_causal=n_causal)
        return (out, lse.float()) if return_lse else out
    out = torch.empty_like(q)
    found = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    if chosen == "cpu":
        cpu_grouped(q, groups, scale=scale, softcap=softcap, n_causal=n_causal, out=out, lse=found)
    else:
        # imported where it runs: the package must load where triton is not installed
        from accel.kernels.head_grouped.triton_launch import triton_grouped

        # triton launches on the current device, whichever device the tensors are on
        with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
            triton_grouped(q, groups, scale=scale, softcap=softcap, n_causal=n_causal, out=out, lse=found)
    return out if found is None else (out, found)


def _choose(impl: Impl, q: Tensor) -> str:
    """Name of the executor that runs; raises where the asked one cannot."""
    if impl not in get_args(Impl):
        raise OptionError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "naive":
        return "naive"
    fast = "triton" if impl == "triton" or (impl == "auto" and q.device.type == "cuda") else "cpu"
    obstacles = _triton_reasons(q) if fast == "triton" else _cpu_reasons(q)
    if not obstacles:
        return fast
    if impl != "auto":
        raise UnsupportedError(f"grouped_attention cannot run impl={impl!r}", obstacles)
    dispatches["auto->naive"] += 1
    _log_fallback("; ".join(obstacles))
    return "naive"


def _triton_reasons(q: Tensor) -> list[str]:
    reasons = list(triton_obstacles(q.device, q.dtype))
    if q.shape[3] > TRITON_MAX_HEAD_DIM:
        reasons.append(f"head_dim is {q.shape[3]}, the kernels take at most {TRITON_MAX_HEAD_DIM}")
    return reasons


def _cpu_reasons(q: Tensor) -> list[str]:
    if q.device.type != "cpu":
        return [f"the tensors are on {q.device.type}"]
    return [] if q.dtype in (*CPU_DTYPES, torch.float64) else [f"{q.dtype} is no floating type of at least 16 bits"]


@cache
def _log_fallback(reason: str) -> None:
    # cached: a reason is logged once
    _log.warning("grouped_attention runs its slow definition: %s", reason)


def _check(q: Tensor, groups: Sequence[KVGroup], *, scale: float, softcap: float | None, n_causal: int) -> None:
    if q.dim() != 4 or q.stride(-1) != 1:
        raise ValueError(f"q must be (batch, heads, rows, head_dim) with last stride 1, got shape {tuple(q.shape)}, strides {q.stride()}")
    n_heads, n_rows = q.shape[1:3]
    heads = sorted(head for group in groups for head in group.heads)
    if not heads or heads != list(range(len(heads))):
        raise ValueError(f"the groups must hold every KV head of the layer once, got {[group.heads for group in groups]}")
    if n_heads % len(heads):
        raise ValueError(f"{n_heads} query heads cannot share {len(heads)} KV heads: the number must divide")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not 0 <= n_causal <= n_rows:
        raise ValueError(f"n_causal must lie between 0 and the {n_rows} query rows, got {n_causal}")
    for group in groups:
        _check_group(q, group)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *(t for group in groups for t in (group.k, group.v)))):
        raise UnsupportedError("this attention has no backward pass", ["q, k or v requires gradients; call it under torch.no_grad()"])


def _check_group(q: Tensor, group: KVGroup) -> None:
    shape = (q.shape[0], len(group.heads), group.n_entries, q.shape[3])
    for name, t in (("k", group.k), ("v", group.v)):
        # of a tensor without elements strides mean nothing
        if tuple(t.shape) != shape or (t.stride(-1) != 1 and t.numel() > 0):
            found = f"{tuple(t.shape)}, strides {t.stride()}"
            raise ValueError(f"{name} of the heads {group.heads} must be (batch, heads, entries, head_dim) {shape} with last stride 1, got {found}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name} of the heads {group.heads} is {t.dtype} on {t.device}, q is {q.dtype} on {q.device}")
    length = group.length
    if length is None:
        return
    if tuple(length.shape) != shape[:2] or length.dtype != torch.int32 or length.device != q.device:
        found = f"{tuple(length.shape)} {length.dtype} on {length.device}"
        raise ValueError(f"length of the heads {group.heads} must be {shape[:2]} int32 on {q.device}, got {found}")
    if q.device.type == "cpu" and length.numel() and not bool(((length >= 0) & (length <= group.n_entries)).all()):
        raise ValueError(f"length of the heads {group.heads} must lie between 0 and {group.n_entries}, got {length.tolist()}")
