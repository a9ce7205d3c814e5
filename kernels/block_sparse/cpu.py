"""The CPU executor: one sequence after the other, by the compiled kernel, by tiles or by the decode path, on the route that the probe found."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accel.kernels.block_sparse import cpu_native
from accel.kernels.block_sparse.cpu_common import Problem, without_autocast, workspace
from accel.kernels.block_sparse.cpu_decode import attend_decode, is_decode
from accel.kernels.block_sparse.cpu_native import native_attention
from accel.kernels.block_sparse.cpu_probe import Precision, Route, fp32_products_routed, route_for
from accel.kernels.block_sparse.cpu_tiles import attend_prefill
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.plan import BlockPlan
from accel.kernels.block_sparse.ragged import Ragged

# of dense attention, whose tiles need no plan
DENSE_BLOCK = 128


@torch.no_grad()
def cpu_attention(
    q: Tensor,
    keys: KeyView,
    plan: BlockPlan | None,
    lens: Ragged,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
    precision: Precision = "accurate",
    route: Route | None = None,
) -> None:
    """Writes the attention of every query row into `out` (T, Hq, Dv) and, where given, `lse` (Hq, T) fp32.

    plan None: every key. Memory beyond the output: the packed keys and values of a few heads and the scores of one step, under 64 MB at 16K
    (kernels.md §2.2). route: by default the one that the probe found fastest.
    """
    chosen = route_for(q.dtype, precision, is_dense=plan is None) if route is None else route
    if chosen.kernel == "sdpa" and (softcap is not None or lse is not None or scale <= 0):
        # torch's attention offers neither, and scales what it has masked: −inf · 0 is NaN
        chosen = chosen.by_products
    if chosen.kernel == "native" and not cpu_native.takes(q.dtype, q.shape[2]):
        chosen = chosen.by_products
    clear_gaps(lens, out, lse)
    with without_autocast(), fp32_products_routed(chosen.is_routed):
        for rows in lens.rows():
            if not rows.q_len:
                continue
            mask = plan.checked_mask(rows, q.shape[1]) if plan is not None else None
            block_size = plan.block_size if plan is not None else DENSE_BLOCK
            attend(Problem(q, keys, rows, mask, block_size, scale, softcap, out, lse, chosen))
    workspace.trim()


def attend(problem: Problem) -> None:
    """Writes the rows of one sequence by the path that suits their number."""
    rows, kernel = problem.rows, problem.route.kernel
    if is_decode(rows):
        # few rows are read in place by matrix products whatever the prefill's kernel: torch's own is slowest there
        attend_decode(replace(problem, route=problem.route.by_products))
    elif kernel == "native":
        attend_compiled(problem)
    elif problem.mask is not None or kernel == "gemm":
        attend_prefill(problem)
    elif rows.offset:
        # torch's causal mask cannot start behind a cached prefix
        attend_prefill(replace(problem, route=problem.route.by_products))
    else:
        attend_whole(problem)


def attend_compiled(problem: Problem) -> None:
    """Writes the rows of one sequence by the compiled kernel."""
    here = slice(problem.rows.q_start, problem.rows.q_start + problem.rows.q_len)
    k, v = problem.keys.tokens(problem.rows.index)
    native_attention(
        problem.q[here], k, v, problem.mask, block_size=problem.block_size, scale=problem.scale, softcap=problem.softcap,
        out=problem.out[here], lse=None if problem.lse is None else problem.lse[:, here],
    )  # fmt: skip


def attend_whole(problem: Problem) -> None:
    """Writes a whole causal prefill by torch's own attention."""
    here = slice(problem.rows.q_start, problem.rows.q_start + problem.rows.q_len)
    k, v = problem.keys.tokens(problem.rows.index)
    result = torch.nn.functional.scaled_dot_product_attention(
        problem.q[here].transpose(0, 1)[None], k[None], v[None], is_causal=True, scale=problem.scale, enable_gqa=problem.group > 1
    )
    problem.out[here] = result[0].transpose(0, 1)


def clear_gaps(lens: Ragged, out: Tensor, lse: Tensor | None) -> None:
    """Sets the rows that belong to no sequence to 0, their LSE to −inf."""
    if int(lens.q_len.sum()) == out.shape[0]:
        return
    is_gap = torch.ones(out.shape[0], dtype=torch.bool, device="cpu")
    for rows in lens.rows():
        is_gap[rows.q_start : rows.q_start + rows.q_len] = False
    out[is_gap] = 0
    if lse is not None:
        lse[:, is_gap] = -torch.inf
