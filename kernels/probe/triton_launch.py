"""Host side of the probe on a GPU: tile sizes, buffers and two launches. Reads no value from the device."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels.block_sparse import ContiguousKeys, KeyView, PagedKeys
from accel.kernels.probe import triton_kernels as kernels
from accel.kernels.probe.request import Columns, Request

# Programs of the first pass: where rows are few, their keys are split until about so many run, each with a few tiles to do
_PROGRAMS = 512
_FEWEST_TILES = 4
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one pass and how it is compiled."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


def choose_tiles(block_d: int, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Of the two passes, for a padded head_dim. They compile without spills on sm_80, sm_90 and sm_100 (tests/aot)."""
    if dtype == torch.float32:
        # no tensor cores: a larger product would not fit the registers
        side = 32 if block_d <= 64 else 16
        return Tiles(side, side, 4, 2), Tiles(side, side, 4, 2)
    # Blackwell spills with 64 rows in the second pass
    return (Tiles(128, 64, 8, 3) if block_d <= 128 else Tiles(64, 64, 4, 2)), Tiles(32, 128, 8, 2)


def fit(tiles: Tiles, most_rows: int) -> Tiles:
    """`tiles` with no more rows than are asked for."""
    rows = min(tiles.rows, max(16, triton.next_power_of_2(most_rows)))
    return replace(tiles, rows=rows, num_warps=tiles.num_warps if rows == tiles.rows else 4)


@torch.no_grad()
def probe(request: Request, *, tiles: tuple[Tiles, Tiles] | None = None, n_splits: int | None = None) -> Columns:
    """Reductions of all sequences by two launches whose sizes depend on bounds alone, so that a CUDA graph can record them.

    tiles: of the two passes. n_splits: ranges of keys in the first one; both found from the sizes by default.
    Memory beside the result: two fp32 numbers per row that counts, head and range.
    """
    q, keys, lens, rows = request.q, request.keys, request.lens, request.rows
    batch, heads, n, head_dim = lens.batch, q.shape[1], lens.max_kv, q.shape[2]
    if not batch * heads * n * rows.most:
        return Columns.zeros(request)
    block_d = max(16, triton.next_power_of_2(head_dim))
    for_stats, for_columns = (fit(one, rows.most) for one in tiles or choose_tiles(block_d, q.dtype))
    n_row_tiles, n_key_tiles = triton.cdiv(rows.most, for_stats.rows), triton.cdiv(n, for_stats.cols)
    wanted = n_splits or max(1, min(_PROGRAMS // (n_row_tiles * heads * batch), n_key_tiles // _FEWEST_TILES))
    tiles_each = triton.cdiv(n_key_tiles, wanted)
    splits = triton.cdiv(n_key_tiles, tiles_each)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    row_max, row_sum = (new(batch, heads, splits, rows.most) for _ in range(2))
    mean = new(batch, heads, n)
    n_tiles = triton.cdiv(n, for_columns.cols)
    variance, entropy = (new(batch, heads, n), new(batch, heads, n_tiles)) if request.wants_spread else (None, None)

    k, place, page, key_strides = _key_layout(keys)
    mask = None if request.key_mask is None else request.key_mask.contiguous().view(torch.uint8)
    lengths = (t.contiguous() for t in (lens.q_start, lens.q_len, lens.kv_len))
    given = (q, k, place, *lengths, rows.index, rows.count.contiguous(), mask)
    strides = (*q.stride(), *key_strides)
    sizes = {"D": head_dim, "BLOCK_D": block_d, "PAGE": page, "HAS_CAP": request.softcap is not None, "IS_CAUSAL": request.is_causal}
    scales = (request.scale * _LOG2_E, 0.0) if request.softcap is None else (request.scale / request.softcap, request.softcap * _LOG2_E)
    sizes["UPCAST"] = q.device.type == "cpu"
    numbers = (rows.most, n, request.group)
    # triton launches on the current device, whichever device the tensors are on
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        kernels.probe_fwd_kernel_stats[(n_row_tiles * splits, heads, batch)](
            *given, row_max, row_sum, *strides, *scales, tiles_each, splits, *numbers, **sizes, **_options(for_stats)
        )
        row_max, row_sum = _merged(row_max, row_sum)
        kernels.probe_fwd_kernel_columns[(n_tiles, heads, batch)](
            *given, row_max, row_sum, mean, variance, entropy, *strides, *scales, *numbers,
            **sizes, SPREAD=request.wants_spread, **_options(for_columns),
        )  # fmt: skip
    return Columns(mean, variance, None if entropy is None else entropy.sum(-1) * math.log(2))


def _merged(row_max: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and sums over all ranges of keys, (B, Hq, n): not in the second pass, whose loop a loop over ranges would keep from pipelining."""
    if row_max.shape[2] == 1:
        return row_max, row_sum
    largest = row_max.amax(2, keepdim=True)
    # a row that sees no key keeps the sum 0
    return largest, (row_sum * (row_max - largest.masked_fill(largest == -torch.inf, 0)).exp2_()).sum(2)


def _options(tiles: Tiles) -> dict[str, Any]:
    return {
        "ROWS": tiles.rows, "COLS": tiles.cols, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _key_layout(keys: KeyView) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
    """K, where its rows lie, tokens of a page (0 without pages), and the strides of pages, rows, heads, columns and the page table."""
    if isinstance(keys, PagedKeys):
        return keys.k_pages, keys.page_table, keys.page_size, (*keys.k_pages.stride(), keys.page_table.stride(0))
    assert isinstance(keys, ContiguousKeys)
    return keys.k, keys.start, 0, (0, *keys.k.stride(), 0)
