"""Decoding on a GPU: few query rows per sequence against the key blocks a plan lists for them, in one launch (kernels.md §4.2).

The keys of a sequence are split among several programs; the one that finishes last adds the parts up. The query heads that share a KV head
and a list are one tile of rows: row m of the tile is query row m // PACK, head m % PACK.

- `ImplicitPlan`: the blocks are computed in the kernel. Rows in different query blocks read the union of their lists, masked per row.
- `ListPlan`: one program per query head and query block, so that each follows its own list; heads that share a list are packed.
- `VerticalSlashPlan`: a first launch turns the lines of the query block into such a list; the rest is the same.
"""

# jit functions have no types to write down, and triton brings none
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.errors import UnsupportedError
from accel.kernels.block_sparse.keys import ContiguousKeys, KeyView, PagedKeys
from accel.kernels.block_sparse.plan import BlockPlan, ImplicitPlan, ListPlan, VerticalSlashPlan
from accel.kernels.block_sparse.ragged import Ragged
from accel.kernels.block_sparse.triton_launch import check_tensors, padded, power_of_two
from accel.kernels.block_sparse.triton_workspace import Buffers, workspace

# with more rows than this per sequence the prefill kernel wastes less
MAX_ROWS = 16
# programs per multiprocessor to aim at, and where the device has none to count (the interpreter)
WAVES, MULTIPROCESSORS = 3, 132
GAP_ROWS = 16
# bitmap entries per step of the list kernel
LIST_CHUNK = 1024
LOG2E = 1.4426950408889634
# integers of the kernel that change from call to call or plan to plan, and are not worth a compilation when one is 1 or a multiple of 16
VARYING = ["pitch_lse", "pitch_page", *(f"pitch_{of}{along}" for of in ("mc", "mi", "fc", "fi") for along in "bhq")]
VARYING += ["T", "B", "n_groups", "splits", "min_tiles", "sink", "window", "near_back", "power_lo", "power_hi", "max_distance"]


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Tile of the decode kernel. splits: programs that share the keys of a sequence at most; None: as many as fill the device."""

    block_m: int = 16               # query rows times heads, a power of two from 16 on
    block_n: int                    # keys per step, a power of two from 16 on
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    splits: int | None = None
    min_tokens: int = 128           # keys per split at least,
    min_blocks: int = 2             # and key blocks

    @classmethod
    def of_shape(cls, rows: int, head_dim: int, itemsize: int, block_size: int) -> DecodeConfig:
        """The tile for `rows` query rows times heads: no spills, and two programs per multiprocessor even on sm_80.

        Keys of a step take 16 KB, and so do its values; half of that in fp32, whose products run without tensor cores and want registers. More
        rows than a tile holds read the keys again, from the L2.
        """
        row_bytes = power_of_two(head_dim) * itemsize
        block_m = 32 if rows > 16 and itemsize < 4 and row_bytes <= 256 else 16
        fitting = (16384 if itemsize < 4 else 8192) // row_bytes
        block_n = max(16, min(128, fitting, power_of_two(block_size)))
        # without the bound ptxas aims at 128 registers for the widest heads on sm_80, and spills; 168 are three programs per multiprocessor
        maxnreg = 168 if row_bytes == 512 and itemsize < 4 else None
        return cls(block_m=block_m, block_n=block_n, num_stages=2 if row_bytes > 512 else 3, maxnreg=maxnreg)


@triton.jit
def floor_log2(x):
    """Exponent of the largest power of two that is at most x, for x from 1 on. Exact below 2**24, past that it may be one too high."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def implicit_slots(i_lo, i_hi, sink, window, near_back, power_lo, power_hi, max_distance):
    """How the union of the lists of rows i_lo … i_hi is enumerated: sink blocks, each power for all rows, the neighbourhood.

    Returns the number of slots, and what `slot_block` needs. From 2^power_lo on, the spans [i_lo − 2^m, i_hi − 2^m] of different m are
    disjoint and end before the window of row i_lo.
    """
    near = tl.maximum(i_lo - near_back, 0)
    n_sink = tl.minimum(sink, near)
    top = tl.minimum(power_hi, floor_log2(tl.maximum(i_hi - n_sink, 1)))
    n_far = tl.where(n_sink < near, tl.maximum(top - power_lo + 1, 0), 0) * (i_hi - i_lo + 1)
    return n_sink + n_far + i_hi - near + 1, (i_lo, i_hi, near, n_sink, n_far, window, power_lo, max_distance)


@triton.jit
def slot_block(x, slots, IMPLICIT: tl.constexpr, MULTI: tl.constexpr):
    """Key block in slot x, −1 where the slot is void: past the end, or a block of the union that another part or no row lists."""
    if IMPLICIT:
        i_lo, i_hi, near, n_sink, n_far, window, power_lo, max_distance = slots
        at = tl.maximum(x - n_sink, 0)
        if MULTI:
            n_rows = i_hi - i_lo + 1
            far = i_lo + at % n_rows - (1 << tl.minimum(power_lo + at // n_rows, 30))
        else:
            far = i_lo - (1 << tl.minimum(power_lo + at, 30))
        far = tl.where((far >= n_sink) & (far < near), far, -1)
        block = tl.where(at < n_far, far, near + at - n_far)
        if MULTI:
            # the neighbourhood reaches past the windows where powers of neighbouring rows meet: is one of the distances a power?
            back = tl.maximum(i_lo - block, 1)
            next_power = 1 << floor_log2(2 * back - 1)
            is_void = (i_lo - block >= window) & (next_power > tl.minimum(i_hi - block, max_distance))
            block = tl.where(is_void, -1, block)
        block = tl.where(x < n_sink, x, block)
    else:
        n_mask, n_blocks, p_mask, p_full = slots
        # the masked blocks first
        block = tl.load(p_full + (x - n_mask), mask=(x >= n_mask) & (x < n_blocks), other=-1)
        block = tl.where(x < n_mask, tl.load(p_mask + x, mask=x < n_mask, other=-1), block)
    return block


@triton.jit
def row_sees_block(i_row, block, window, sink, max_distance):
    """Whether query blocks i_row list a key block (sparse-attention.md §3.2)."""
    distance = i_row - block
    is_power = (distance > 0) & ((distance & (distance - 1)) == 0) & (distance <= max_distance)
    # the sink is block < sink, said in vectors: the interpreter mixes up flags of a scalar and a vector
    return (distance > i_row - sink) | (distance < window) | is_power


@triton.jit
def tile_tokens(block, tile, kv_len, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens of one tile of a key block, (BLOCK_N,) int32, and which of them are keys. Tiles of the block −1 have none."""
    o_in = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = block * BLOCK + o_in
    return o_n, (o_n >= 0) & (o_in < BLOCK) & (o_n < kv_len)


@triton.jit
def tile_pages(block, tile, kv_len, p_page, PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of a tile of a key block: one where the tile lies inside a page, else one per token. 0 where keys are not paged."""
    if PAGE == 0:
        pages = 0
    elif PAGE % BLOCK_N == 0 and BLOCK % BLOCK_N == 0:
        first = block * BLOCK + tile * BLOCK_N
        pages = tl.load(p_page + first // PAGE, mask=(block >= 0) & (first < kv_len), other=0)
    else:
        o_n, m_n = tile_tokens(block, tile, kv_len, BLOCK, BLOCK_N)
        pages = tl.load(p_page + o_n // PAGE, mask=m_n, other=0)
    return pages


@triton.jit
def clear_gaps(
    i_tile, out_ptr, lse_ptr, q_start_ptr, q_len_ptr, stride_ot, stride_oh, pitch_lse, T, B,
    HQ: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """Writes 0 and LSE −inf into those of BLOCK_T rows that belong to no sequence."""
    o_t = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_DV)
    taken = tl.zeros([BLOCK_T], tl.int32)
    for lo in range(0, B, 64):
        o_b = lo + tl.arange(0, 64)
        start = tl.load(q_start_ptr + o_b, mask=o_b < B, other=0)
        length = tl.load(q_len_ptr + o_b, mask=o_b < B, other=0)
        inside = (o_t[:, None] >= start[None, :]) & (o_t[:, None] < (start + length)[None, :])
        taken = tl.maximum(taken, tl.max(inside.to(tl.int32), 1))
    m_t = (o_t < T) & (taken == 0)
    b_zero = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    p_out, p_lse = out_ptr + o_t.to(tl.int64)[:, None] * stride_ot + o_d[None, :], lse_ptr
    for _ in range(HQ):
        tl.store(p_out, b_zero.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & (o_d < DV)[None, :])
        p_out += stride_oh
        if lse_ptr is not None:
            tl.store(p_lse + o_t, tl.full([BLOCK_T], float("-inf"), tl.float32), mask=m_t)
            p_lse += pitch_lse


@triton.jit
def write_rows(b_acc, b_max, b_sum, p_out, p_lse, m_row, o_d, DV: tl.constexpr, HAS_LSE: tl.constexpr):
    """Divides by the sums and stores. A row with nothing visible has the sum 0, one that saw a NaN keeps it."""
    is_empty = b_sum == 0.0
    b_out = b_acc / tl.where(is_empty, 1.0, b_sum)[:, None]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_d < DV)[None, :])
    if HAS_LSE:
        b_lse = (b_max + tl.log2(tl.where(is_empty, 1.0, b_sum))) * 0.6931471805599453
        tl.store(p_lse, tl.where(is_empty, float("-inf"), b_lse), mask=m_row)


@triton.jit
def store_part(b_acc, b_max, b_sum, part_ptr, at, m_row, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Leaves one split's result in the workspace: rows, maxima, sums. Only real rows are written, and read by `merge_parts`."""
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    p_part = part_ptr + at * BLOCK_M * (BLOCK_DV + 2)
    tl.store(p_part + o_m[:, None] * BLOCK_DV + o_d[None, :], b_acc, mask=m_row[:, None])
    tl.store(p_part + BLOCK_M * BLOCK_DV + o_m, b_max, mask=m_row)
    tl.store(p_part + BLOCK_M * (BLOCK_DV + 1) + o_m, b_sum, mask=m_row)


@triton.jit
def merge_parts(part_ptr, at, n_active, m_row, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Sum of the parts `at`, `at` + 1, …, always in this order: (acc, max, sum)."""
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # several parts in flight, as far as registers hold them
    UNROLL: tl.constexpr = 4 if BLOCK_M * BLOCK_DV <= 2048 else 8192 // (BLOCK_M * BLOCK_DV)
    for s in tl.range(0, n_active, loop_unroll_factor=UNROLL):
        p_part = part_ptr + (at + s) * BLOCK_M * (BLOCK_DV + 2)
        # .cg: written by other multiprocessors, so not from this one's L1
        b_part_max = tl.load(p_part + BLOCK_M * BLOCK_DV + o_m, mask=m_row, other=float("-inf"), cache_modifier=".cg")
        b_part_sum = tl.load(p_part + BLOCK_M * (BLOCK_DV + 1) + o_m, mask=m_row, other=0.0, cache_modifier=".cg")
        b_part = tl.load(p_part + o_m[:, None] * BLOCK_DV + o_d[None, :], mask=m_row[:, None], other=0.0, cache_modifier=".cg")
        b_new = tl.maximum(b_max, b_part_max)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old_scale, b_part_scale = tl.exp2(b_max - b_base), tl.exp2(b_part_max - b_base)
        b_acc = b_acc * b_old_scale[:, None] + b_part * b_part_scale[:, None]
        b_sum = b_sum * b_old_scale + b_part_sum * b_part_scale
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def attend_tiles(
    b_q, lo, hi, slots, i_row, position, kv_len, p_k, p_v, p_page, start, stride_kp, stride_kn, stride_vp, stride_vn,
    scale, softcap, window, sink, max_distance,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IMPLICIT: tl.constexpr, MULTI: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):
    """Online softmax over the tiles lo … hi − 1 of the slots: unnormalised output, maximum (base 2) and sum of each row."""
    TILES: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # a block id is read two steps ahead and its pages one, so that the loads of keys never wait for an address
    block, after = slot_block(lo // TILES, slots, IMPLICIT, MULTI), slot_block((lo + 1) // TILES, slots, IMPLICIT, MULTI)
    pages = tile_pages(block, lo % TILES, kv_len, p_page, PAGE, BLOCK, BLOCK_N)
    # both ids in one number: a value handed on unchanged for two iterations would switch the pipelining off
    pair = (after.to(tl.int64) << 32) | (block.to(tl.int64) & 0xFFFFFFFF)
    for e in range(lo, hi):
        block, after = pair.to(tl.int32), (pair >> 32).to(tl.int32)
        pages_next = tile_pages(after, (e + 1) % TILES, kv_len, p_page, PAGE, BLOCK, BLOCK_N)
        pair = (slot_block((e + 2) // TILES, slots, IMPLICIT, MULTI).to(tl.int64) << 32) | (after.to(tl.int64) & 0xFFFFFFFF)
        o_n, m_n = tile_tokens(block, e % TILES, kv_len, BLOCK, BLOCK_N)
        if PAGE == 0:
            k_rows, v_rows = (start + o_n) * stride_kn, (start + o_n) * stride_vn
        else:
            k_rows = pages.to(tl.int64) * stride_kp + (o_n % PAGE).to(tl.int64) * stride_kn
            v_rows = pages.to(tl.int64) * stride_vp + (o_n % PAGE).to(tl.int64) * stride_vn
        b_k = tl.load(p_k + k_rows[:, None] + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        b_v = tl.load(p_v + v_rows[:, None] + o_dv[None, :], mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)
        if UPCAST:
            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)

        # (BLOCK_M, BLOCK_N), logits in base 2
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if SOFTCAP:
            # cap · tanh(x / cap); scale holds log2(e) / cap · 2, softcap cap · log2(e)
            b_s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(b_s)))
        m_s = m_n[None, :]
        if MULTI:
            m_s = m_s & (o_n[None, :] <= position[:, None])
            if IMPLICIT:
                m_s = m_s & row_sees_block(i_row, block, window, sink, max_distance)[:, None]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # a row that has seen nothing yet: exp2(−inf − 0) = 0, where −inf − (−inf) would be NaN
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_scale = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision="ieee")
        b_max = b_new
        pages = pages_next
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=VARYING)
def block_sparse_decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,              # q (T, Hq, D), out (T, Hq, Dv), lse (Hq, T) or None; last strides 1
    q_start_ptr, q_len_ptr, kv_len_ptr,                 # (B,) integers
    start_ptr, page_ptr,                                # first row of each sequence, or its page table: one of them, the other None
    mask_count_ptr, mask_index_ptr, full_count_ptr, full_index_ptr,     # lists of a row, (B, heads, blocks[, capacity]) int32, or None
    part_ptr, counter_ptr,                              # workspace: results of the splits, arrivals (0 before and after)
    stride_qt, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh, stride_ot, stride_oh, pitch_lse, pitch_page,
    pitch_mcb, pitch_mch, pitch_mcq, pitch_mib, pitch_mih, pitch_miq, pitch_fcb, pitch_fch, pitch_fcq, pitch_fib, pitch_fih, pitch_fiq,
    scale, softcap, T, B, n_groups, splits, min_tiles, sink, window, near_back, power_lo, power_hi, max_distance,
    HQ: tl.constexpr, G: tl.constexpr, PACK: tl.constexpr, N_M: tl.constexpr, N_T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GAP: tl.constexpr, IMPLICIT: tl.constexpr, MULTI: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):
    i_group, i_split = tl.program_id(0), tl.program_id(1)
    if i_group >= n_groups:
        if i_split == 0:
            i_tile = i_group - n_groups
            clear_gaps(i_tile, out_ptr, lse_ptr, q_start_ptr, q_len_ptr, stride_ot, stride_oh, pitch_lse, T, B, HQ, DV, GAP, BLOCK_DV)
        return
    # heads fastest: those of one KV head run side by side and meet in the L2
    i_ht, i_rest = i_group % (HQ // PACK), i_group // (HQ // PACK)
    i_t, i_m, i_b = i_rest % N_T, i_rest // N_T % N_M, (i_rest // (N_T * N_M)).to(tl.int64)
    q_len, kv_len = tl.load(q_len_ptr + i_b).to(tl.int32), tl.load(kv_len_ptr + i_b).to(tl.int32)
    offset = kv_len - q_len

    # rows of the tile, from r_lo up to r_hi; with lists all of one query block
    r_first, r_hi = 0, q_len
    if not IMPLICIT:
        i_own = offset // BLOCK + i_t
        r_first, r_hi = tl.maximum(i_own * BLOCK - offset, 0), tl.minimum(q_len, (i_own + 1) * BLOCK - offset)
    r_lo = r_first + i_m * BLOCK_M // PACK
    if r_lo >= r_hi:
        return
    o_m, o_d, o_dv = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    o_r, o_h = r_first + o_m // PACK, (i_ht * PACK + o_m % PACK).to(tl.int64)
    m_row = o_r < r_hi
    position = tl.where(m_row, offset + o_r, -1)

    if IMPLICIT:
        r_last = tl.minimum(r_hi - 1, r_first + ((i_m + 1) * BLOCK_M - 1) // PACK)
        n_blocks, slots = implicit_slots(
            (offset + r_lo) // BLOCK, (offset + r_last) // BLOCK, sink, window, near_back, power_lo, power_hi, max_distance
        )
    else:
        i_list = i_ht.to(tl.int64)
        p_full = full_index_ptr + i_b * pitch_fib + i_list * pitch_fih + i_t * pitch_fiq
        # without a list of masked blocks that list is empty, wherever it may begin
        n_mask, p_mask = 0, p_full
        if mask_count_ptr is not None:
            n_mask = tl.load(mask_count_ptr + i_b * pitch_mcb + i_list * pitch_mch + i_t * pitch_mcq)
            p_mask = mask_index_ptr + i_b * pitch_mib + i_list * pitch_mih + i_t * pitch_miq
        n_blocks = n_mask + tl.load(full_count_ptr + i_b * pitch_fcb + i_list * pitch_fch + i_t * pitch_fcq)
        slots = (n_mask, n_blocks, p_mask, p_full)
    # short lists are shared by fewer programs than there are; the others have nothing to do
    n_tiles = n_blocks * ((BLOCK + BLOCK_N - 1) // BLOCK_N)
    n_active = tl.maximum(tl.minimum(splits, tl.cdiv(n_tiles, min_tiles)), 1)
    if i_split >= n_active:
        return

    o_token = tl.load(q_start_ptr + i_b).to(tl.int64) + o_r
    p_q = q_ptr + o_token[:, None] * stride_qt + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    i_kv = (i_ht * PACK // G).to(tl.int64)
    start, p_page = 0, page_ptr
    if PAGE == 0:
        start = tl.load(start_ptr + i_b).to(tl.int64)
    else:
        p_page = page_ptr + i_b * pitch_page
    b_acc, b_max, b_sum = attend_tiles(
        b_q, n_tiles * i_split // n_active, n_tiles * (i_split + 1) // n_active, slots, position // BLOCK, position, kv_len,
        k_ptr + i_kv * stride_kh, v_ptr + i_kv * stride_vh, p_page, start, stride_kp, stride_kn, stride_vp, stride_vn,
        scale, softcap, window, sink, max_distance,
        D, DV, BLOCK, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, IMPLICIT, MULTI, SOFTCAP, UPCAST,
    )  # fmt: skip

    p_out = out_ptr + o_token[:, None] * stride_ot + o_h[:, None] * stride_oh + o_dv[None, :]
    p_lse = o_h
    if lse_ptr is not None:
        p_lse = lse_ptr + o_h * pitch_lse + o_token
    if n_active == 1:
        write_rows(b_acc, b_max, b_sum, p_out, p_lse, m_row, o_dv, DV, lse_ptr is not None)
    else:
        at = i_group.to(tl.int64) * splits
        store_part(b_acc, b_max, b_sum, part_ptr, at + i_split, m_row, BLOCK_M, BLOCK_DV)
        # every thread's part before the arrival; the last to arrive sees all of them
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + i_group, 1, sem="acq_rel") == n_active - 1:
            b_acc, b_max, b_sum = merge_parts(part_ptr, at, n_active, m_row, BLOCK_M, BLOCK_DV)
            write_rows(b_acc, b_max, b_sum, p_out, p_lse, m_row, o_dv, DV, lse_ptr is not None)
            tl.store(counter_ptr + i_group, 0)


@triton.jit
def decode_lists_kernel(
    vertical_ptr, slash_ptr, extra_ptr,                 # (B, H, nk), (B, H, nk), (B, H, nq, nk) or None; bytes
    count_ptr, index_ptr, q_len_ptr, kv_len_ptr,        # count (B, H, N_T), index (B, H, N_T, nk) int32, written
    pitch_vb, pitch_vh, pitch_vj, pitch_sb, pitch_sh, pitch_sj, pitch_eb, pitch_eh, pitch_eq, pitch_ej, nk,
    H: tl.constexpr, N_T: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):
    """Key blocks on the lines of each query block of a decoding call, ascending (VerticalSlashPlan). One program per head and query block."""
    i_list = tl.program_id(0).to(tl.int64)
    i_t, i_h, i_b = i_list % N_T, i_list // N_T % H, i_list // (N_T * H)
    q_len, kv_len = tl.load(q_len_ptr + i_b).to(tl.int32), tl.load(kv_len_ptr + i_b).to(tl.int32)
    i_own = (kv_len - q_len) // BLOCK + i_t.to(tl.int32)
    count = 0
    for lo in range(0, tl.where(i_own * BLOCK < kv_len, i_own + 1, 0), CHUNK):
        o_j = lo + tl.arange(0, CHUNK)
        m_j = (o_j <= i_own) & (o_j < nk)
        keep = tl.load(vertical_ptr + i_b * pitch_vb + i_h * pitch_vh + o_j * pitch_vj, mask=m_j, other=0)
        keep |= tl.load(slash_ptr + i_b * pitch_sb + i_h * pitch_sh + (i_own - o_j) * pitch_sj, mask=m_j, other=0)
        if extra_ptr is not None:
            keep |= tl.load(extra_ptr + i_b * pitch_eb + i_h * pitch_eh + i_t * pitch_eq + o_j * pitch_ej, mask=m_j, other=0)
        b_keep = (keep != 0).to(tl.int32)
        tl.store(index_ptr + i_list * nk + count + tl.cumsum(b_keep, 0) - 1, o_j, mask=b_keep != 0)
        count += tl.sum(b_keep, 0)
    tl.store(count_ptr + i_list, count)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def takes_decode(plan: BlockPlan, lens: Ragged) -> bool:
    """Whether this call is decoding, with a plan that `triton_decode` reads. Looks at shapes and types only."""
    return lens.max_q <= MAX_ROWS and isinstance(plan, (ImplicitPlan, ListPlan, VerticalSlashPlan))


def triton_decode(
    q: Tensor,
    keys: KeyView,
    plan: BlockPlan,
    lens: Ragged,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
    config: DecodeConfig | None = None,
) -> None:
    """Writes the attention of every query row into `out` (T, Hq, Dv) and, where given, `lse` (Hq, T) fp32; see `naive_attention`.

    q: (T, Hq, D), at most `MAX_ROWS` rows per sequence; head sizes up to 256. Fastest where all strides are multiples of 16 elements.
    One launch, with a `VerticalSlashPlan` two; no host synchronisation, and nothing depends on values: CUDA graphs may record it.
    A NaN in v may reach the rows of the same sequence that are computed together.
    """
    check_arguments(q, keys, plan, lens, lse)
    if q.shape[0] == 0:
        return
    group, block, several = q.shape[1] // keys.n_kv_heads, plan.block_size, lens.max_q > 1
    buffers = workspace.on_stream_of(q.device)
    if isinstance(plan, ImplicitPlan):
        n_t, pack, lists = 1, group, Lists()
        pattern, longest = implicit_arguments(plan, lens)
    else:
        # query blocks that the rows of a sequence may lie in
        n_t = (lens.max_q - 2) // block + 2 if several else 1
        lists = line_lists(plan, lens, n_t, buffers) if isinstance(plan, VerticalSlashPlan) else Lists.of_plan(plan, n_t)
        n_t, pack = lists.n_blocks, group if lists.n_heads == 1 else 1
        pattern, longest = (0, 0, 0, 0, -1, 0), min(lists.capacity, -(-lens.max_kv // block))
    rows, head_dim, d_v = pack * lens.max_q, max(q.shape[2], keys.value_dim), padded(keys.value_dim)
    tile = DecodeConfig.of_shape(rows, head_dim, q.element_size(), block) if config is None else config
    n_m, n_kv, tiles = -(-rows // tile.block_m), q.shape[1] // pack, -(-block // tile.block_n)
    min_tiles = max(tile.min_blocks * tiles, tile.min_tokens // tile.block_n)
    n_tasks = max(lens.batch * n_kv * n_m, 1)
    splits = tile.splits or (WAVES * multiprocessors(q.device) + n_tasks // 2) // n_tasks
    splits = max(1, min(splits, -(-longest * tiles // min_tiles), 65535))
    n_groups = lens.batch * n_m * n_t * n_kv
    # with one split never read, but the kernel is compiled for their types
    n_parts = n_groups * splits if splits > 1 else 0
    parts = buffers.take("parts", n_parts * tile.block_m * (d_v + 2), torch.float32)
    arrivals = buffers.take("arrivals", n_groups if splits > 1 else 0, torch.int32, is_zero=True)
    memory = memory_arguments(keys)
    options: dict[str, object] = {} if tile.maxnreg is None else {"maxnreg": tile.maxnreg}
    block_sparse_decode_kernel[n_groups + -(-q.shape[0] // GAP_ROWS), splits](
        q, memory.k, memory.v, out, lse, lens.q_start.contiguous(), lens.q_len.contiguous(), lens.kv_len.contiguous(), memory.start, memory.pages,
        *lists.tensors, parts, arrivals,
        q.stride(0), q.stride(1), *memory.strides, out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0), memory.page_pitch,
        *lists.pitches,
        scale * LOG2E if softcap is None else 2 * scale * LOG2E / softcap, 0.0 if softcap is None else softcap * LOG2E,
        q.shape[0], lens.batch, n_groups, splits, min_tiles, *pattern,
        HQ=q.shape[1], G=group, PACK=pack, N_M=max(n_m, 1), N_T=max(n_t, 1), D=q.shape[2], DV=keys.value_dim, BLOCK=block, PAGE=memory.page_size,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=padded(q.shape[2]), BLOCK_DV=d_v, GAP=GAP_ROWS,
        IMPLICIT=isinstance(plan, ImplicitPlan), MULTI=several, SOFTCAP=softcap is not None,
        # the interpreter multiplies the bits of bf16 numbers
        UPCAST=q.device.type == "cpu" and q.dtype == torch.bfloat16,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **options,
    )  # fmt: skip


def check_arguments(q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, lse: Tensor | None) -> None:
    if not takes_decode(plan, lens):
        found = f"{lens.max_q} rows and {type(plan).__name__}"
        raise ValueError(f"decoding takes at most {MAX_ROWS} query rows per sequence and one of the three kinds of plan, got {found}")
    if max(q.shape[2], keys.value_dim) > 256:
        raise UnsupportedError("the decode kernel cannot run", [f"head sizes up to 256, got q {q.shape[2]} and v {keys.value_dim}"])
    if lse is not None and lse.stride(1) != 1:
        raise ValueError(f"lse must be (heads, tokens) with last stride 1, got strides {lse.stride()}")
    check_tensors(q, keys, plan, lens)


def implicit_arguments(plan: ImplicitPlan, lens: Ragged) -> tuple[tuple[int, int, int, int, int, int], int]:
    """Sink, window, near_back, power_lo, power_hi and max_distance of the kernel, and the most blocks that the rows of a sequence read together.

    near_back: how far before the first row's block the neighbourhood begins. It is the window; but spans of powers below the number of query
    blocks would overlap, so these are walked through as part of the neighbourhood.
    """
    n_rows = (lens.max_q - 2) // plan.block_size + 2 if lens.max_q > 1 else 1
    nk = -(-lens.max_kv // plan.block_size)
    window, sink = min(plan.window_blocks, 2**30), min(plan.sink_blocks, 2**30)
    if not plan.powers:
        return (sink, window, max(window - 1, 0), 0, -1, 0), min(nk, sink + window + n_rows)
    power_lo = (max(window, n_rows) - 1).bit_length()
    power_hi = 29 if plan.max_power is None else min(plan.max_power, 29)
    near_back = max(window - 1, 1 << (power_lo - 1) if n_rows > window else 0)
    n_powers = max(min(power_hi, nk.bit_length()) - power_lo + 1, 0)
    return (sink, window, near_back, power_lo, power_hi, 1 << power_hi), min(nk, sink + near_back + n_rows * (1 + n_powers))


@dataclass(frozen=True)
class Lists:
    """The kernel's arguments for a plan whose lists lie in memory; without any, those of an `ImplicitPlan`."""

    tensors: tuple[Tensor | None, ...] = (None, None, None, None)      # masked count and index, full count and index
    pitches: tuple[int, ...] = (0,) * 12
    n_heads: int = 1
    n_blocks: int = 1
    capacity: int = 0

    @classmethod
    def of_plan(cls, plan: BlockPlan, n_t: int) -> Lists:
        assert isinstance(plan, ListPlan)
        tensors = (plan.mask_count, unit_stride(plan.mask_index), plan.full_count, unit_stride(plan.full_index))
        _, heads, nq = plan.mask_count.shape
        pitches = [t.stride(d) if d != 1 or heads > 1 else 0 for t in tensors for d in range(3)]
        capacity = plan.mask_index.shape[-1] + plan.full_index.shape[-1]
        return cls(tensors, tuple(pitches), heads, min(n_t, nq), capacity)


def unit_stride(index: Tensor) -> Tensor:
    return index if index.stride(-1) == 1 else index.contiguous()


def line_lists(plan: VerticalSlashPlan, lens: Ragged, n_t: int, buffers: Buffers) -> Lists:
    """Lists of the few query blocks of a decoding call, written on the device."""
    batch, heads, nk = plan.vertical.shape
    index = buffers.take("list index", batch * heads * n_t * nk, torch.int32)
    count = buffers.take("list count", batch * heads * n_t, torch.int32)
    n_t = n_t if plan.extra is None else min(n_t, plan.extra.shape[2])
    vertical, slash, extra = (None if t is None else t.view(torch.uint8) for t in (plan.vertical, plan.slash, plan.extra))
    assert vertical is not None
    assert slash is not None
    decode_lists_kernel[batch * heads * n_t,](
        vertical, slash, extra, count, index, lens.q_len.contiguous(), lens.kv_len.contiguous(),
        *vertical.stride(), *slash.stride(), *((0,) * 4 if extra is None else extra.stride()), nk,
        H=heads, N_T=n_t, BLOCK=plan.block_size, CHUNK=max(16, min(LIST_CHUNK, power_of_two(nk))), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    per_list = [heads * n_t, 0 if heads == 1 else n_t, 1]
    pitches = (0,) * 6 + tuple(per_list) + tuple(pitch * nk for pitch in per_list)
    return Lists((None, None, count, index), pitches, heads, n_t, nk)


@dataclass(frozen=True)
class Memory:
    """The kernel's arguments for keys of either layout; page_size 0 means one (tokens, heads, head_dim) view."""

    k: Tensor
    v: Tensor
    start: Tensor | None
    pages: Tensor | None
    strides: tuple[int, int, int, int, int, int]
    page_pitch: int = 0
    page_size: int = 0


def memory_arguments(keys: KeyView) -> Memory:
    if isinstance(keys, ContiguousKeys):
        return Memory(keys.k, keys.v, keys.start.contiguous(), None, (0, keys.k.stride(0), keys.k.stride(1), 0, keys.v.stride(0), keys.v.stride(1)))
    if not isinstance(keys, PagedKeys):
        raise UnsupportedError("the decode kernel cannot run", [f"it reads ContiguousKeys and PagedKeys, got {type(keys).__name__}"])
    k, v, table = keys.k_pages, keys.v_pages, keys.page_table
    for name, t in (("k_pages", k), ("v_pages", v), ("page_table", table)):
        if t.stride(-1) != 1:
            raise UnsupportedError("the decode kernel cannot run", [f"{name} must have last stride 1, got strides {t.stride()}"])
    strides = (k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2))
    return Memory(k, v, None, table, strides, table.stride(0), keys.page_size)
