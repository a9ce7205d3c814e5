"""The probe on a GPU, two passes over Q·Kᵀ and no atomics: equal inputs give equal results.

    stats       maximum and sum of every row that counts, split over keys where rows are few
    columns     mean, variance and share of the entropy of a tile of keys, over all rows that count

A program reads the lengths of its sequence from memory; one without work writes its zeros and ends. Logits are in base 2.
"""

# Triton reads these functions, not Python: their arguments have no Python types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.flex_index.triton_kernels import add_row_stats, key_origin, load_keys, probe_logits

# what changes from picture to picture, and is not worth a compilation when it is 1 or a multiple of 16
VARYING = ["tiles_each", "S", "n_slots", "N"]


@triton.jit
def load_rows(
    q_ptr, q_start_ptr, rows_ptr, i_b, i_h, o_r, m_r, n_slots, stride_qn, stride_qh, stride_qd,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Numbers of the rows at places o_r of the list, and their queries, (rows, BLOCK_D); zeros outside m_r."""
    o_d = tl.arange(0, BLOCK_D)
    number = o_r.to(tl.int64)
    if rows_ptr is not None:
        number = tl.load(rows_ptr + i_b * n_slots + o_r, mask=m_r, other=0)
    place = tl.load(q_start_ptr + i_b).to(tl.int64) + number
    p_q = q_ptr + place[:, None] * stride_qn + i_h * stride_qh + o_d[None, :] * stride_qd
    return number, tl.load(p_q, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def key_is_valid(mask_ptr, i_b, o_n, n_kv, N):
    """Which of these keys exist and are no padding."""
    m_n = o_n < n_kv
    if mask_ptr is not None:
        m_n = m_n & (tl.load(mask_ptr + i_b * N + o_n, mask=m_n, other=0) != 0)
    return m_n


@triton.jit(do_not_specialize=VARYING)
def probe_fwd_kernel_stats(
    q_ptr, k_ptr, place_ptr,                # q (tokens, Hq, D); k (tokens, Hkv, D), or with pages (pages, PAGE, Hkv, D)
    q_start_ptr, q_len_ptr, kv_len_ptr,     # (B,) int64
    rows_ptr, count_ptr,                    # (B, n_slots) int64, the rows that count, or None for all; (B,) int64, how many
    mask_ptr,                               # (B, N) bytes, 0 for padding, or None
    max_ptr, sum_ptr,                       # out: (B, Hq, S, n_slots) fp32, of each row over one of S ranges of keys
    stride_qn, stride_qh, stride_qd, stride_kp, stride_kn, stride_kh, stride_kd, stride_pb,
    scale, cap, tiles_each, S, n_slots, N, GROUP,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    HAS_CAP: tl.constexpr, IS_CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):
    i_x, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_s = i_x % S
    # from the last rows on: with causality they take longest
    i_r = tl.num_programs(0) // S - 1 - i_x // S
    count = tl.load(count_ptr + i_b).to(tl.int32)
    if i_r * ROWS >= count:
        return
    n_q, n_kv = tl.load(q_len_ptr + i_b).to(tl.int32), tl.load(kv_len_ptr + i_b).to(tl.int32)
    o_r, o_c = i_r * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    m_r = o_r < count
    number, b_q = load_rows(q_ptr, q_start_ptr, rows_ptr, i_b, i_h, o_r, m_r, n_slots, stride_qn, stride_qh, stride_qd, D, BLOCK_D)
    position = n_kv - n_q + number.to(tl.int32)
    origin = key_origin(place_ptr, i_b, stride_pb, PAGE)
    n_seen = n_kv
    if IS_CAUSAL:
        n_seen = tl.minimum(n_kv, tl.max(tl.where(m_r, position, -1), 0) + 1)
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for j in range(i_s * tiles_each, tl.minimum((i_s + 1) * tiles_each, tl.cdiv(n_seen, COLS))):
        b_k = load_keys(k_ptr, origin, i_h // GROUP, j * COLS, n_kv, stride_kp, stride_kn, stride_kh, stride_kd, D, COLS, BLOCK_D, PAGE)
        b_s = probe_logits(b_q, b_k, scale, cap, HAS_CAP, UPCAST)
        o_n = j * COLS + o_c
        m_s = key_is_valid(mask_ptr, i_b, o_n, n_kv, N)[None, :] & m_r[:, None]
        if IS_CAUSAL:
            m_s = m_s & (o_n[None, :] <= position[:, None])
        b_max, b_sum = add_row_stats(b_max, b_sum, tl.where(m_s, b_s, -float("inf")))
    part = ((i_b * tl.num_programs(1) + i_h) * S + i_s) * n_slots + o_r
    tl.store(max_ptr + part, b_max, mask=m_r)
    tl.store(sum_ptr + part, b_sum, mask=m_r)


@triton.jit(do_not_specialize=VARYING)
def probe_fwd_kernel_columns(
    q_ptr, k_ptr, place_ptr, q_start_ptr, q_len_ptr, kv_len_ptr, rows_ptr, count_ptr, mask_ptr,     # as above
    max_ptr, sum_ptr,                       # (B, Hq, n_slots) fp32, from the first pass; −inf and 0 for a row that sees no key
    mean_ptr, variance_ptr,                 # out: (B, Hq, N) fp32, written to the end; variance with SPREAD
    entropy_ptr,                            # out with SPREAD: (B, Hq, tiles of keys) fp32, base 2; their sum is the mean entropy of a row
    stride_qn, stride_qh, stride_qd, stride_kp, stride_kn, stride_kh, stride_kd, stride_pb,
    scale, cap, n_slots, N, GROUP,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    HAS_CAP: tl.constexpr, IS_CAUSAL: tl.constexpr, SPREAD: tl.constexpr, UPCAST: tl.constexpr,
):
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_bh = i_b * tl.num_programs(1) + i_h
    count = tl.load(count_ptr + i_b).to(tl.int32)
    n_q, n_kv = tl.load(q_len_ptr + i_b).to(tl.int32), tl.load(kv_len_ptr + i_b).to(tl.int32)
    o_n = i_n * COLS + tl.arange(0, COLS)
    origin = key_origin(place_ptr, i_b, stride_pb, PAGE)
    b_k = load_keys(k_ptr, origin, i_h // GROUP, i_n * COLS, n_kv, stride_kp, stride_kn, stride_kh, stride_kd, D, COLS, BLOCK_D, PAGE)
    m_n = key_is_valid(mask_ptr, i_b, o_n, n_kv, N)
    # the rows before the first one that sees these keys give them 0
    i_first = 0
    if IS_CAUSAL and rows_ptr is None:
        i_first = tl.maximum(i_n * COLS - (n_kv - n_q), 0) // ROWS
    n_tiles = tl.where(i_n * COLS < n_kv, tl.cdiv(count, ROWS), 0)
    # without SPREAD the mean is kept as a sum
    b_mean = tl.zeros([COLS], tl.float32)
    b_dev = tl.zeros([COLS], tl.float32)
    b_ent = tl.zeros([COLS], tl.float32)
    for i in range(i_first, n_tiles):
        o_r = i * ROWS + tl.arange(0, ROWS)
        m_r = o_r < count
        number, b_q = load_rows(q_ptr, q_start_ptr, rows_ptr, i_b, i_h, o_r, m_r, n_slots, stride_qn, stride_qh, stride_qd, D, BLOCK_D)
        b_max = tl.load(max_ptr + i_bh * n_slots + o_r, mask=m_r, other=0.0)
        b_sum = tl.load(sum_ptr + i_bh * n_slots + o_r, mask=m_r, other=1.0)
        # keys first: (COLS, ROWS), summed inside threads
        b_s = probe_logits(b_k, b_q, scale, cap, HAS_CAP, UPCAST) - b_max[None, :]
        m_s = m_n[:, None] & m_r[None, :]
        if IS_CAUSAL:
            position = n_kv - n_q + number.to(tl.int32)
            m_s = m_s & (o_n[:, None] <= position[None, :])
        # a choice, no product with 0: a NaN stays with the keys that its row sees
        b_p = tl.where(m_s, tl.exp2(b_s) * (1.0 / b_sum)[None, :], 0.0)
        b_part = tl.sum(b_p, 1)
        if SPREAD:
            b_ent += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * (tl.log2(b_sum)[None, :] - b_s)), 1)
            # pairwise update of mean and squared deviations: nothing cancels
            n_before = i * ROWS
            n_part = tl.minimum(count - i * ROWS, ROWS).to(tl.float32)
            b_part = b_part / n_part
            b_off = tl.where(m_r[None, :], b_p - b_part[:, None], 0.0)
            b_delta = b_part - b_mean
            share = n_part / (n_before + n_part)
            b_dev += tl.sum(b_off * b_off, 1) + b_delta * b_delta * (n_before * share)
            b_mean += b_delta * share
        else:
            b_mean += b_part
    n_rows = tl.maximum(count, 1).to(tl.float32)
    out = i_bh * N + o_n
    if SPREAD:
        tl.store(mean_ptr + out, b_mean, mask=o_n < N)
        tl.store(variance_ptr + out, b_dev / n_rows, mask=o_n < N)
        tl.store(entropy_ptr + i_bh * tl.num_programs(0) + i_n, tl.sum(b_ent, 0) / n_rows)
    else:
        tl.store(mean_ptr + out, b_mean / n_rows, mask=o_n < N)
