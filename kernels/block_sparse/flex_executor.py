"""Block-sparse attention through torch's FlexAttention: an independent second executor for CUDA, chosen by name only (design.md §4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from accel.errors import UnsupportedError
from accel.kernels.block_sparse.differentiable import flex_block_mask
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.plan import BlockPlan
from accel.kernels.block_sparse.ragged import Ragged, Rows


def available() -> str | None:
    """Why the compiled FlexAttention cannot run here, or None. Uncompiled it runs anywhere, for tests: pass `attention=flex_attention`."""
    return None if torch.cuda.is_available() else "FlexAttention is compiled for CUDA only, and no CUDA device was found"


def flex_executor(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None, out: Tensor, lse: Tensor | None,
    attention: Callable[..., Any] | None = None,
) -> None:
    """Writes every row of `out` (T, Hq, Dv) and, where given, `lse` (Hq, T) fp32; what they hold is said at `naive_attention`.

    Sequences run one after the other and their lengths are read on the host, so CUDA graphs cannot record it. The compiled kernel is made
    once for all lengths, in some ten seconds. Raises UnsupportedError for paged keys, which it could only read as a copy.
    attention: `flex_attention` itself, where it shall not be compiled.
    """
    if keys.layout != "contiguous":
        raise UnsupportedError("impl='flex' cannot run", ["it reads contiguous keys, got pages"])
    run = attention or compiled_flex_attention()
    out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)
    for rows in lens.rows():
        if not rows.q_len:
            continue
        own = slice(rows.q_start, rows.q_start + rows.q_len)
        k, v = keys.tokens(rows.index)
        result, natural_lse = flex_rows(q[own].transpose(0, 1), k, v, plan, rows, scale=scale, softcap=softcap, attention=run)
        out[own] = result.transpose(0, 1)
        if lse is not None:
            lse[:, own] = natural_lse


def flex_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rows: Rows, *, scale: float, softcap: float | None, attention: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """One sequence: q (Hq, L, D), k and v (Hkv, N, D) -> out (Hq, L, Dv), lse (Hq, L)."""
    # FlexAttention's rows start on a block boundary, the chunk behind a cached prefix may not: rows in front, dropped again below
    n_front = rows.offset % plan.block_size
    q = F.pad(q, (0, 0, n_front, 0))
    mask = flex_block_mask(plan, rows, device=q.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out, aux = attention(
        q[None], k[None], v[None], score_mod=None if softcap is None else capped, block_mask=mask, scale=scale, enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return out[0, :, n_front:], aux.lse[0, :, n_front:]


@cache
def compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)
