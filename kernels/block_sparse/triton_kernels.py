"""Prefill over listed key blocks, one program per (row tile, sequence, query head), and the two small kernels around it.

A query block of BLOCK tokens is cut into row tiles of ROWS, a key block into steps of COLS tokens. First come the listed blocks that lie
wholly below the query block, in one pipelined loop without a causal mask, then the masked ones, as a rule the diagonal block alone.
"""

# arguments of kernels have no Python types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# how the kernel learns its blocks: computed from the row, read from a plan's lists, read from lists that `vertical_slash_lists_kernel` wrote
IMPLICIT = tl.constexpr(0)
LISTED = tl.constexpr(1)
SCRATCH = tl.constexpr(2)
# What changes from prompt to prompt or plan to plan, and is not worth a compilation when it is 1 or a multiple of 16. Lists are read entry
# by entry, wherever they begin; but the strides of q, k, v and out must be known to be multiples of 16.
VARYING = ["batch", "n_heads", "i_row0", "window", "n_sink", "power_lo", "power_hi", "stride_lh", "stride_place"]
VARYING += [f"stride_{of}{along}" for of in "cfm" for along in "bhr"]
LISTS = ["full_count_ptr", "full_index_ptr", "mask_count_ptr", "mask_index_ptr"]
BITMAP_VARYING = ["n_heads", "i_row0", "n_rows", "width", *(f"stride_{of}{along}" for of in "vse" for along in "bh"), "stride_er"]
BITMAPS = ["vertical_ptr", "slash_ptr", "extra_ptr"]


@triton.jit
def rows_of(i_b, i_blk_from_end, i_part, p_q_len, p_kv_len, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Block index, position of the tile's first row, position behind its last, offset (P) and kv_len of a sequence's row tile.

    Blocks are counted from the end of the sequence: the longest rows come first. The tile is empty where the last two positions say so.
    """
    # positions inside one sequence fit 32 bits, offsets into memory do not
    kv_len = tl.load(p_kv_len + i_b).to(tl.int32)
    offset = kv_len - tl.load(p_q_len + i_b).to(tl.int32)
    i_blk = (kv_len - 1) // BLOCK - i_blk_from_end
    first = i_blk * BLOCK + i_part * ROWS
    return i_blk, first, tl.minimum(tl.minimum(first + ROWS, (i_blk + 1) * BLOCK), kv_len), offset, kv_len


@triton.jit
def implicit_counts(i_blk, window, n_sink, power_lo, power_hi):
    """How many blocks below block i are sink, how many lie at power-of-two distances, and where the window starts (plan.py, `row_blocks`)."""
    start = tl.maximum(i_blk - window + 1, 0)
    sinks = tl.minimum(tl.minimum(n_sink, start), i_blk)
    m = tl.arange(0, 32)
    # distances 2^m past the window (2^m >= window, hence m >= power_lo) that stay above the sink
    is_power = (m >= power_lo) & (m <= power_hi) & ((tl.full((32,), 1, tl.int64) << m) <= i_blk - n_sink) & (start > 0)
    return sinks, tl.sum(is_power.to(tl.int32), 0), start


@triton.jit
def implicit_block(e, i_blk, sinks, powers, start, power_lo):
    """The e-th block of that list, ascending."""
    m = tl.maximum(power_lo + powers - 1 - (e - sinks), 0)
    distance = tl.full((), 1, tl.int32) << tl.minimum(m, 30)
    past_sinks = tl.where(e < sinks + powers, i_blk - distance, start + (e - sinks - powers))
    return tl.where(e < sinks, e, past_sinks)


@triton.jit
def pages_of(p_pages, token, kv_len, COLS: tl.constexpr, PAGE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """Page of each of the COLS tokens from `token` on, one number where they share it; 0 where keys are contiguous or end before."""
    if PAGE == 0:
        page = token.to(tl.int64) * 0
    elif ONE_PAGE:
        page = tl.load(p_pages + token // PAGE, mask=token < kv_len, other=0).to(tl.int64)
    else:
        o_t = token + tl.arange(0, COLS)
        page = tl.load(p_pages + o_t // PAGE, mask=o_t < kv_len, other=0).to(tl.int64)
    return page


@triton.jit
def load_tile(
    p_x, token, page, stride_page, stride_token, limit,
    WIDTH: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, ONE_PAGE: tl.constexpr,
    HAS_LIMIT: tl.constexpr, UPCAST: tl.constexpr,
):
    """Rows `token` … of K or V, (COLS, BLOCK_D); rows at or past `limit` and columns past WIDTH are 0."""
    # int64 before the multiplications: rows times strides pass 2**31 near one million tokens
    o_n = tl.arange(0, COLS).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    token = token.to(tl.int64)
    if PAGE == 0:
        # one product per row and step: as base plus row offsets, the offsets of all rows would be kept in registers
        p_tile = p_x + ((token + o_n) * stride_token)[:, None] + o_d[None, :]
    elif ONE_PAGE:
        p_tile = p_x + page * stride_page + ((token % PAGE + o_n) * stride_token)[:, None] + o_d[None, :]
    else:
        p_tile = p_x + (page * stride_page + ((token + o_n) % PAGE) * stride_token)[:, None] + o_d[None, :]
    if HAS_LIMIT:
        m_n = token + o_n < limit
        if WIDTH == BLOCK_D:
            b_x = tl.load(p_tile, mask=m_n[:, None], other=0.0)
        else:
            b_x = tl.load(p_tile, mask=m_n[:, None] & (o_d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_D:
        b_x = tl.load(p_tile)
    else:
        b_x = tl.load(p_tile, mask=(o_d < WIDTH)[None, :], other=0.0)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def attend_step(
    b_q, b_k, b_v, b_acc, b_m, b_l, m_s, scale_log2, cap_log2, cap_scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):
    """Online softmax over one step. b_m holds maxima in units of log2; it starts finite, so that no −inf meets another."""
    # PRECISION matters to fp32 operands only: "tf32x3" and "ieee" keep their digits, "tf32" would lose half of them
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if SOFTCAP:
        # cap · tanh(s / cap), by exp2: cap_scale = 2 · log2(e) · scale / cap
        b_s = cap_log2 * (1.0 - 2.0 / (tl.exp2(b_s * cap_scale) + 1.0))
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    if SOFTCAP:
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_m_new[:, None])
    else:
        # one fused multiply-add per score; scale is positive
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_m_new[:, None])
    b_decay = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
    return b_acc, b_m_new, b_l


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=LISTS)
def block_sparse_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,        # q (T, Hq, D), out (T, Hq, DV), last stride 1; lse (Hq, T) fp32
    q_start_ptr, q_len_ptr, kv_len_ptr,           # (B,) int64
    kv_place_ptr,                                 # contiguous keys: first row of each sequence, (B,) int64; pages: page table (B, pages) int32
    full_count_ptr, full_index_ptr, mask_count_ptr, mask_index_ptr,
    stride_qt, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh, stride_place,
    stride_cb, stride_ch, stride_cr, stride_fb, stride_fh, stride_fr, stride_mb, stride_mh, stride_mr,
    scale_log2, cap_log2, cap_scale,
    batch, n_heads, i_row0,                       # i_row0: blocks from the end of each sequence that earlier launches have done
    window, n_sink, power_lo, power_hi,           # of the implicit pattern
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PLAN: tl.constexpr, PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr, WANTS_LSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = (BLOCK + ROWS - 1) // ROWS
    STEPS: tl.constexpr = (BLOCK + COLS - 1) // COLS
    IS_EVEN: tl.constexpr = BLOCK % COLS == 0
    ONE_PAGE: tl.constexpr = IS_EVEN and PAGE % COLS == 0
    # heads of one group are neighbours and read the same keys
    pid = tl.program_id(0)
    i_h, i_b = (pid % n_heads).to(tl.int64), (pid // n_heads % batch).to(tl.int64)
    i_tile = pid // n_heads // batch
    i_from_end = i_row0 + i_tile // PARTS
    i_blk, row0, row_end, offset, kv_len = rows_of(i_b, i_from_end, PARTS - 1 - i_tile % PARTS, q_len_ptr, kv_len_ptr, BLOCK, ROWS)
    # beyond the sequence's first row, or no rows at all
    if row_end <= tl.maximum(row0, offset):
        return

    o_m = row0 + tl.arange(0, ROWS)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_m = (o_m >= offset) & (o_m < row_end)
    o_q = tl.load(q_start_ptr + i_b).to(tl.int64) + (o_m - offset)
    p_q = q_ptr + i_h * stride_qh + o_q[:, None] * stride_qt + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    p_k, p_v = k_ptr + i_h // GROUP * stride_kh, v_ptr + i_h // GROUP * stride_vh
    p_pages = kv_place_ptr + i_b * stride_place
    if PAGE == 0:
        start = tl.load(p_pages).to(tl.int64)
        p_k += start * stride_kt
        p_v += start * stride_vt

    if PLAN == IMPLICIT:
        n_sinks, n_powers, win0 = implicit_counts(i_blk, window, n_sink, power_lo, power_hi)
        n_full = n_sinks + n_powers + tl.maximum(i_blk - win0, 0)
        n_mask = ((window > 0) | (i_blk < n_sink)).to(tl.int32)
        block = implicit_block(i_blk * 0, i_blk, n_sinks, n_powers, win0, power_lo)
    else:
        i_row = (i_from_end - i_row0 if PLAN == SCRATCH else i_blk - offset // BLOCK).to(tl.int64)
        o_c = i_b * stride_cb + i_h * stride_ch + i_row * stride_cr
        p_full = full_index_ptr + i_b * stride_fb + i_h * stride_fh + i_row * stride_fr
        if PLAN == LISTED:
            p_mask = mask_index_ptr + i_b * stride_mb + i_h * stride_mh + i_row * stride_mr
        n_full, n_mask = tl.load(full_count_ptr + o_c), tl.load(mask_count_ptr + o_c)
        block = tl.load(p_full, mask=n_full > 0, other=0).to(tl.int32)

    b_m = tl.full((ROWS,), -1e30, tl.float32)
    b_l = tl.zeros((ROWS,), tl.float32)
    b_acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    m_all = o_m[:, None] >= 0
    token = block * BLOCK
    page = pages_of(p_pages, token, kv_len, COLS, PAGE, ONE_PAGE)
    for s in range(0, n_full * STEPS):
        # the next block and page are read one step ahead: an index loaded just before its tile costs a stage of the pipeline
        e_next = (s + 1) // STEPS
        if PLAN == IMPLICIT:
            block_next = implicit_block(e_next, i_blk, n_sinks, n_powers, win0, power_lo)
        else:
            block_next = tl.load(p_full + e_next, mask=e_next < n_full, other=0).to(tl.int32)
        token_next = block_next * BLOCK + (s + 1) % STEPS * COLS
        page_next = pages_of(p_pages, token_next, kv_len, COLS, PAGE, ONE_PAGE)
        end = token // BLOCK * BLOCK + BLOCK
        b_k = load_tile(p_k, token, page, stride_kp, stride_kt, end, D, COLS, BLOCK_D, PAGE, ONE_PAGE, not IS_EVEN, UPCAST)
        b_v = load_tile(p_v, token, page, stride_vp, stride_vt, end, DV, COLS, BLOCK_DV, PAGE, ONE_PAGE, not IS_EVEN, UPCAST)
        if not IS_EVEN:
            m_all = (token + tl.arange(0, COLS) < end)[None, :]
        b_acc, b_m, b_l = attend_step(
            b_q, b_k, b_v, b_acc, b_m, b_l, m_all, scale_log2, cap_log2, cap_scale, not IS_EVEN, SOFTCAP, PRECISION
        )
        token, page = token_next, page_next

    for e in range(0, n_mask):
        # minus e, which is 0: what depends on the loop is not computed before the first one, where it would fill registers
        block = tl.load(p_mask + e).to(tl.int32) if PLAN == LISTED else i_blk - e
        # nothing behind the tile's last row is visible to it
        end = tl.minimum((block + 1) * BLOCK, row_end)
        for s in range(0, tl.maximum(end - block * BLOCK + COLS - 1, 0) // COLS):
            token = block * BLOCK + s * COLS
            page = pages_of(p_pages, token, end, COLS, PAGE, ONE_PAGE)
            o_n = token + tl.arange(0, COLS)
            b_k = load_tile(p_k, token, page, stride_kp, stride_kt, end, D, COLS, BLOCK_D, PAGE, ONE_PAGE, True, UPCAST)
            b_v = load_tile(p_v, token, page, stride_vp, stride_vt, end, DV, COLS, BLOCK_DV, PAGE, ONE_PAGE, True, UPCAST)
            m_s = (o_n[None, :] <= o_m[:, None]) & (o_n < end)[None, :]
            b_acc, b_m, b_l = attend_step(
                b_q, b_k, b_v, b_acc, b_m, b_l, m_s, scale_log2, cap_log2, cap_scale, True, SOFTCAP, PRECISION
            )

    # a row that saw nothing has sum 0: output 0, LSE −inf. A NaN stays one.
    b_sum = tl.where(b_l == 0.0, 1.0, b_l)
    b_out = b_acc / b_sum[:, None]
    p_out = out_ptr + i_h * stride_oh + o_q[:, None] * stride_ot + o_dv[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & (o_dv < DV)[None, :])
    if WANTS_LSE:
        b_lse = tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_sum)) * 0.6931471805599453)
        tl.store(lse_ptr + i_h * stride_lh + o_q, b_lse, mask=m_m)


@triton.jit(do_not_specialize=BITMAP_VARYING, do_not_specialize_on_alignment=[*LISTS, *BITMAPS])
def vertical_slash_lists_kernel(
    vertical_ptr, slash_ptr, extra_ptr,           # (B, Hq, nk), (B, Hq, nk), (B, Hq, nq, nk) bytes, last stride 1
    q_len_ptr, kv_len_ptr,
    full_count_ptr, mask_count_ptr, full_index_ptr,    # (B, Hq, n_rows) int32 twice, (B, Hq, n_rows, width) int16 or int32, contiguous
    stride_vb, stride_vh, stride_sb, stride_sh, stride_eb, stride_eh, stride_er,
    n_heads, i_row0, n_rows, width,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_EXTRA: tl.constexpr,
):
    """Lists of the blocks below the diagonal of one query block and head, and whether the diagonal is listed. Grid (n_rows · B · Hq,)."""
    # one axis: the others end at 65535
    pid = tl.program_id(0).to(tl.int64)
    i_row, i_bh = pid % n_rows, pid // n_rows
    i_b, i_h = i_bh // n_heads, i_bh % n_heads
    i_blk, row0, row_end, offset, _ = rows_of(i_b, i_row0 + i_row, 0, q_len_ptr, kv_len_ptr, BLOCK, BLOCK)
    if row_end <= tl.maximum(row0, offset):
        return
    p_v, p_s = vertical_ptr + i_b * stride_vb + i_h * stride_vh, slash_ptr + i_b * stride_sb + i_h * stride_sh
    p_e = extra_ptr
    if HAS_EXTRA:
        p_e += i_b * stride_eb + i_h * stride_eh + (i_blk - offset // BLOCK) * stride_er
    i_out = i_bh * n_rows + i_row
    p_index = full_index_ptr + i_out * width
    n = tl.zeros((), tl.int32)
    for j0 in range(0, i_blk, CHUNK):
        o_j = j0 + tl.arange(0, CHUNK)
        m_j = o_j < i_blk
        keep = tl.load(p_v + o_j, mask=m_j, other=0) | tl.load(p_s + (i_blk - o_j), mask=m_j, other=0)
        if HAS_EXTRA:
            keep |= tl.load(p_e + o_j, mask=m_j, other=0)
        is_kept = (keep != 0).to(tl.int32)
        place = n + tl.cumsum(is_kept, 0) - is_kept
        tl.store(p_index + place, o_j.to(full_index_ptr.dtype.element_ty), mask=is_kept != 0)
        n += tl.sum(is_kept, 0)
    own = tl.load(p_v + i_blk) | tl.load(p_s)
    if HAS_EXTRA:
        own |= tl.load(p_e + i_blk)
    tl.store(full_count_ptr + i_out, n)
    tl.store(mask_count_ptr + i_out, (own != 0).to(tl.int32))


@triton.jit(do_not_specialize=["n_tokens", "batch", "n_heads"])
def clear_gaps_kernel(
    out_ptr, lse_ptr, q_start_ptr, q_len_ptr, stride_ot, stride_oh, stride_lh, n_tokens, batch, n_heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr, WANTS_LSE: tl.constexpr,
):
    """Sets the rows of q that belong to no sequence to 0, their LSE to −inf. Grid (ceil(T / ROWS),)."""
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_owners = tl.zeros((ROWS,), tl.int32)
    for b0 in range(0, batch, SEQUENCES):
        o_b = b0 + tl.arange(0, SEQUENCES)
        start = tl.load(q_start_ptr + o_b, mask=o_b < batch, other=0)
        end = start + tl.load(q_len_ptr + o_b, mask=o_b < batch, other=0)
        owns = (o_t[:, None] >= start[None, :]) & (o_t[:, None] < end[None, :])
        n_owners += tl.sum(owns.to(tl.int32), 1)
    is_gap = (n_owners == 0) & (o_t < n_tokens)
    if tl.max(is_gap.to(tl.int32), 0) == 0:
        return
    o_d = tl.arange(0, BLOCK_DV)
    m_out = is_gap[:, None] & (o_d < DV)[None, :]
    zeros = tl.zeros((ROWS, BLOCK_DV), out_ptr.dtype.element_ty)
    for i_h in range(0, n_heads):
        tl.store(out_ptr + tl.cast(i_h, tl.int64) * stride_oh + o_t[:, None] * stride_ot + o_d[None, :], zeros, mask=m_out)
        if WANTS_LSE:
            tl.store(lse_ptr + tl.cast(i_h, tl.int64) * stride_lh + o_t, tl.full((ROWS,), float("-inf"), tl.float32), mask=is_gap)
