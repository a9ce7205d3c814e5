"""Attention over one or two groups of KV heads, each with its own base pointers, strides and lengths, in one launch.

A program finds its group by its number and its head by one load; keys are dense, so that nothing is looked up in its loop.

    fwd       one program per tile of query rows and query head
    decode    few rows: the rows of all query heads of a KV head in one tile, its keys split among programs, the last of which merges
"""

# jit functions have no types to write down, and triton brings none
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.block_sparse.triton_decode import merge_parts, store_part, write_rows
from accel.kernels.block_sparse.triton_kernels import attend_step, load_tile

# integers that change from call to call or layer to layer, and are not worth a compilation when one is 1 or a multiple of 16
VARYING = ["L", "N0", "N1", "H0", "H1", "n_causal", "n_tiles", "n_first", "splits0", "splits1", "tiles_each"]


@triton.jit
def group_keys(
    is_second, i_b, i_s, k0_ptr, v0_ptr, len0_ptr, k1_ptr, v1_ptr, len1_ptr,
    stride_k0b, stride_k0h, stride_k0n, stride_v0b, stride_v0h, stride_v0n,
    stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n, N0, N1, H0, H1,
):
    """Where K and V of head i_s of the first or second group begin, the strides of their entries, and how many count."""
    n = tl.where(is_second, N1, N0)
    if len0_ptr is not None:
        n0 = tl.load(len0_ptr + i_b * H0 + i_s, mask=is_second == 0, other=0)
        n = tl.where(is_second, n, tl.minimum(tl.maximum(n0, 0), n))
    if len1_ptr is not None:
        n1 = tl.load(len1_ptr + i_b * H1 + i_s, mask=is_second, other=0)
        n = tl.where(is_second, tl.minimum(tl.maximum(n1, 0), n), n)
    p_k = tl.where(is_second, k1_ptr + i_b * stride_k1b + i_s * stride_k1h, k0_ptr + i_b * stride_k0b + i_s * stride_k0h)
    p_v = tl.where(is_second, v1_ptr + i_b * stride_v1b + i_s * stride_v1h, v0_ptr + i_b * stride_v0b + i_s * stride_v0h)
    return p_k, p_v, tl.where(is_second, stride_k1n, stride_k0n), tl.where(is_second, stride_v1n, stride_v0n), n


@triton.jit(do_not_specialize=VARYING)
def head_grouped_fwd_kernel(
    q_ptr, out_ptr, lse_ptr,                      # q, out (B, Hq, L, D), last stride 1; lse (B, Hq, L) fp32, contiguous, or None
    heads_ptr,                                    # (H0 + H1,) int32, KV heads of the layer in the groups' order
    k0_ptr, v0_ptr, len0_ptr, k1_ptr, v1_ptr, len1_ptr,     # k, v (B, H, N, D), last stride 1; len (B, H) int32, contiguous, or None
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol,
    stride_k0b, stride_k0h, stride_k0n, stride_v0b, stride_v0h, stride_v0n,
    stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n,
    scale_log2, cap_log2, cap_scale,
    L, N0, N1, H0, H1, n_causal, n_tiles, n_first,          # row tiles of a head; programs of the first group
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    is_second = pid >= n_first
    place = pid - tl.where(is_second, n_first, 0)
    H = tl.where(is_second, H1, H0)
    # row tiles fastest: those of one head run side by side and read its keys from the L2. The last first: with n_causal they see most
    row0 = (n_tiles - 1 - place % n_tiles) * ROWS
    i_g, i_s, i_b = place // n_tiles % G, (place // (n_tiles * G) % H).to(tl.int64), (place // (n_tiles * G) // H).to(tl.int64)
    i_h = tl.load(heads_ptr + tl.where(is_second, H0, 0) + i_s).to(tl.int64) * G + i_g
    p_k, p_v, stride_kn, stride_vn, n = group_keys(
        is_second, i_b, i_s, k0_ptr, v0_ptr, len0_ptr, k1_ptr, v1_ptr, len1_ptr,
        stride_k0b, stride_k0h, stride_k0n, stride_v0b, stride_v0h, stride_v0n,
        stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n, N0, N1, H0, H1,
    )  # fmt: skip

    o_m, o_d = row0 + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_m = o_m < L
    m_q = m_m[:, None] & (o_d < D)[None, :]
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_ql + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)

    # the causal entries belong to the last rows, one each: a row does not see those of the rows behind it
    o_seen = n - tl.minimum(n_causal, tl.maximum(L - 1 - o_m, 0))
    row_last = tl.minimum(row0 + ROWS, L) - 1
    n_seen = n - tl.minimum(n_causal, L - 1 - row_last)
    n_whole = tl.maximum(n - tl.minimum(n_causal, L - 1 - row0), 0) // COLS * COLS
    b_m = tl.full((ROWS,), -1e30, tl.float32)
    b_l = tl.zeros((ROWS,), tl.float32)
    b_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    m_all = m_m[:, None]
    for token in range(0, n_whole, COLS):
        b_k = load_tile(p_k, tl.cast(token, tl.int64), 0, 0, stride_kn, n, D, COLS, BLOCK_D, 0, True, False, UPCAST)
        b_v = load_tile(p_v, tl.cast(token, tl.int64), 0, 0, stride_vn, n, D, COLS, BLOCK_D, 0, True, False, UPCAST)
        b_acc, b_m, b_l = attend_step(b_q, b_k, b_v, b_acc, b_m, b_l, m_all, scale_log2, cap_log2, cap_scale, False, SOFTCAP, PRECISION)
    for token in range(n_whole, n_seen, COLS):
        b_k = load_tile(p_k, tl.cast(token, tl.int64), 0, 0, stride_kn, n, D, COLS, BLOCK_D, 0, True, True, UPCAST)
        b_v = load_tile(p_v, tl.cast(token, tl.int64), 0, 0, stride_vn, n, D, COLS, BLOCK_D, 0, True, True, UPCAST)
        m_s = (token + tl.arange(0, COLS))[None, :] < o_seen[:, None]
        b_acc, b_m, b_l = attend_step(b_q, b_k, b_v, b_acc, b_m, b_l, m_s, scale_log2, cap_log2, cap_scale, True, SOFTCAP, PRECISION)

    p_out = out_ptr + i_b * stride_ob + i_h * stride_oh + o_m.to(tl.int64)[:, None] * stride_ol + o_d[None, :]
    p_lse = o_m
    if lse_ptr is not None:
        p_lse = lse_ptr + (i_b * HQ + i_h) * L + o_m
    write_rows(b_acc, b_m, b_l, p_out, p_lse, m_m, o_d, D, lse_ptr is not None)


@triton.jit(do_not_specialize=VARYING)
def head_grouped_decode_kernel(
    q_ptr, out_ptr, lse_ptr, heads_ptr, k0_ptr, v0_ptr, len0_ptr, k1_ptr, v1_ptr, len1_ptr,         # as above
    part_ptr, counter_ptr,                        # workspace: results of the splits, arrivals (0 before and after)
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol,
    stride_k0b, stride_k0h, stride_k0n, stride_v0b, stride_v0h, stride_v0n,
    stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n,
    scale_log2, cap_log2, cap_scale,
    L, N0, N1, H0, H1, n_causal, n_first, splits0, splits1, tiles_each,     # programs per head and row tile; tiles of keys per program
    HQ: tl.constexpr, G: tl.constexpr, N_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    is_second = pid >= n_first
    place = pid - tl.where(is_second, n_first, 0)
    H, splits = tl.where(is_second, H1, H0), tl.where(is_second, splits1, splits0)
    i_split, i_unit = place % splits, place // splits
    i_m, i_s, i_b = i_unit % N_M, (i_unit // N_M % H).to(tl.int64), (i_unit // N_M // H).to(tl.int64)
    p_k, p_v, stride_kn, stride_vn, n = group_keys(
        is_second, i_b, i_s, k0_ptr, v0_ptr, len0_ptr, k1_ptr, v1_ptr, len1_ptr,
        stride_k0b, stride_k0h, stride_k0n, stride_v0b, stride_v0h, stride_v0n,
        stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n, N0, N1, H0, H1,
    )  # fmt: skip
    # every program takes as many tiles: long heads have more of them, those of short ones have nothing to do
    n_active = tl.maximum(tl.cdiv(tl.cdiv(n, COLS), tiles_each), 1)
    if i_split >= n_active:
        return

    # row m of the tile: query row m // G of head m % G
    o_m, o_d = i_m * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    o_r, o_h = (o_m // G).to(tl.int64), tl.load(heads_ptr + tl.where(is_second, H0, 0) + i_s).to(tl.int64) * G + o_m % G
    m_row = o_r < L
    p_q = q_ptr + i_b * stride_qb + o_h[:, None] * stride_qh + o_r[:, None] * stride_ql + o_d[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    o_seen = n - tl.minimum(n_causal, tl.maximum(L - 1 - o_r, 0)).to(tl.int32)
    b_m = tl.full((ROWS,), -1e30, tl.float32)
    b_l = tl.zeros((ROWS,), tl.float32)
    b_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    end = tl.minimum((i_split + 1) * tiles_each * COLS, n)
    for token in range(i_split * tiles_each * COLS, end, COLS):
        b_k = load_tile(p_k, tl.cast(token, tl.int64), 0, 0, stride_kn, n, D, COLS, BLOCK_D, 0, True, True, UPCAST)
        b_v = load_tile(p_v, tl.cast(token, tl.int64), 0, 0, stride_vn, n, D, COLS, BLOCK_D, 0, True, True, UPCAST)
        m_s = (token + tl.arange(0, COLS))[None, :] < o_seen[:, None]
        b_acc, b_m, b_l = attend_step(b_q, b_k, b_v, b_acc, b_m, b_l, m_s, scale_log2, cap_log2, cap_scale, True, SOFTCAP, PRECISION)

    p_out = out_ptr + i_b * stride_ob + o_h[:, None] * stride_oh + o_r[:, None] * stride_ol + o_d[None, :]
    p_lse = o_h
    if lse_ptr is not None:
        p_lse = lse_ptr + (i_b * HQ + o_h) * L + o_r
    if n_active == 1:
        write_rows(b_acc, b_m, b_l, p_out, p_lse, m_row, o_d, D, lse_ptr is not None)
    else:
        store_part(b_acc, b_m, b_l, part_ptr, pid.to(tl.int64), m_row, ROWS, BLOCK_D)
        # every thread's part before the arrival; the last to arrive sees all of them
        tl.debug_barrier()
        p_counter = counter_ptr + (pid - i_split)
        if tl.atomic_add(p_counter, 1, sem="acq_rel") == n_active - 1:
            b_acc, b_m, b_l = merge_parts(part_ptr, (pid - i_split).to(tl.int64), n_active, m_row, ROWS, BLOCK_D)
            write_rows(b_acc, b_m, b_l, p_out, p_lse, m_row, o_d, D, lse_ptr is not None)
            tl.store(p_counter, 0)
