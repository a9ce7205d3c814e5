"""Block-sparse attention through `flash_attn.cute` (PyPI: flash-attn-4), where it is installed: Hopper only, chosen by name only.

Written against 4.0.0b36: `flash_attn_func(q, k, v, softmax_scale=, causal=, softcap=, block_sparse_tensors=, return_lse=)` returns (out, lse);
its lists are `BlockSparseTensorsTorch(mask_block_cnt, mask_block_idx, full_block_cnt, full_block_idx, block_size=)`, int32, of shapes (B, H, nq)
and (B, H, nq, capacity) with B and H possibly 1. `available` tests for exactly these names. Not run on a GPU yet.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import UnsupportedError
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.plan import BlockPlan, causal_blocks
from accel.kernels.block_sparse.ragged import Ragged, Rows

# keys per step of its Hopper kernel; a listed block must be one step, so larger blocks are listed in pieces
STEP = 128
LIST_FIELDS = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size")


class CuteLists(NamedTuple):
    """The fields of `BlockSparseTensorsTorch` that the forward reads."""

    mask_block_cnt: Tensor      # (1, H, nq) int32
    mask_block_idx: Tensor      # (1, H, nq, capacity) int32
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def available() -> str | None:
    """Why `flash_attn.cute` cannot run here, or None."""
    try:
        interface, lists = _modules()
    # a broken CUDA installation shows as OSError or RuntimeError while it is imported
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"flash_attn.cute (PyPI: flash-attn-4) cannot be imported: {error}"
    parameters = inspect.signature(interface.flash_attn_func).parameters
    missing = [name for name in ("softmax_scale", "causal", "softcap", "block_sparse_tensors", "return_lse") if name not in parameters]
    missing += [name for name in LIST_FIELDS if name not in getattr(lists.BlockSparseTensorsTorch, "_fields", ())]
    if missing:
        return f"this release of flash_attn.cute lacks {', '.join(missing)}"
    if not torch.cuda.is_available():
        return "flash_attn.cute needs a CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"the lists have the block size of its Hopper kernel (sm_90), this is sm_{major}{minor}"


def obstacles(q: Tensor, keys: KeyView, plan: BlockPlan) -> list[str]:
    """Every reason why these tensors cannot go to `flash_attn.cute`; empty where they can."""
    found = []
    if keys.layout != "contiguous":
        found.append("it gets contiguous keys here, got pages")
    if q.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"it takes bfloat16 and float16, got {q.dtype}")
    widest = max(q.shape[2], keys.value_dim)
    if widest > STEP or q.shape[2] % 8 or keys.value_dim % 8:
        found.append(f"head sizes must be multiples of 8 up to {STEP}, got {q.shape[2]} and {keys.value_dim}")
    if plan.block_size % STEP and plan.block_size != STEP // 2:
        found.append(f"block_size must be {STEP // 2} or a multiple of {STEP}, got {plan.block_size}")
    return found


def cute_attention(
    q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, softcap: float | None, out: Tensor, lse: Tensor | None
) -> None:
    """Writes every row of `out` (T, Hq, Dv) and, where given, `lse` (Hq, T) fp32; what they hold is said at `naive_attention`.

    Sequences run one after the other and their lengths are read on the host, so CUDA graphs cannot record it.
    Raises UnsupportedError with every reason where `obstacles` finds one.
    """
    found = obstacles(q, keys, plan)
    if found:
        raise UnsupportedError("impl='cute' cannot run", found)
    out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)
    for rows in lens.rows():
        if not rows.q_len:
            continue
        own = slice(rows.q_start, rows.q_start + rows.q_len)
        k, v = (t.transpose(0, 1) for t in keys.tokens(rows.index))
        lists = cute_lists(plan, rows, q.device)
        result, natural_lse = cute_rows(q[own], k, v, lists, rows, scale=scale, softcap=softcap, wants_lse=lse is not None)
        out[own] = result
        if lse is not None and natural_lse is not None:
            lse[:, own] = natural_lse


def cute_rows(
    q: Tensor, k: Tensor, v: Tensor, lists: CuteLists, rows: Rows, *, scale: float, softcap: float | None, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One sequence: q (L, Hq, D), k and v (N, Hkv, D) -> out (L, Hq, Dv), lse (Hq, L) or None."""
    interface, tensors = _modules()
    # its row 0 begins the first listed row of blocks; behind a cached prefix rows are put in front, dropped again below
    n_front = rows.offset % lists.block_size[0]
    padded = F.pad(q, (0, 0, 0, 0, n_front, 0)) if n_front else q
    # causal means the same there: queries are the last of the keys
    out, natural_lse = interface.flash_attn_func(
        padded[None], k[None], v[None], softmax_scale=scale, causal=True, softcap=softcap or 0.0,
        block_sparse_tensors=tensors.BlockSparseTensorsTorch(**lists._asdict()), return_lse=wants_lse,
    )
    return out[0, n_front:], natural_lse[0, :, n_front:] if wants_lse else None


def cute_lists(plan: BlockPlan, rows: Rows, device: torch.device) -> CuteLists:
    """One sequence's tiles as lists of key blocks of at most `STEP` tokens; query blocks keep the plan's size."""
    size = plan.block_size
    pieces = max(1, size // STEP)
    tiles = plan.block_mask(rows).to(device)
    distance = causal_blocks(rows, size, device)
    n_columns = -(-rows.kv_len * pieces // size)
    # each key block becomes its pieces, those behind the last key left out
    masked, full = ((tiles & wanted).repeat_interleave(pieces, -1)[..., :n_columns] for wanted in (distance == 0, distance > 0))
    return CuteLists(*_listed(masked), *_listed(full), block_size=(size, size // pieces))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Count and ascending indices per row of (H, nq, columns) tiles, with a leading dimension for the batch."""
    # a stable sort brings the kept columns to the front
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]


@cache
def _modules() -> tuple[Any, Any]:
    return importlib.import_module("flash_attn.cute"), importlib.import_module("flash_attn.cute.block_sparsity")

