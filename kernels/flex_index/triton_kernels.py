"""FlexPrefill's selection on a GPU: six kernels for all sequences and heads of a layer, without host synchronisation (sparse-attention.md §2.3–2.7).

    probe_stats     row maxima and sums of the probe, split over keys; pooled keys
    probe_masses    attention mass by key and by token distance; logits of the pooled estimate
    token_counts    K_v and K_s; mass by key block and by block diagonal
    select_lines    class of the head; columns and diagonals
    pooled_map      query-aware heads only: the pooled map, or a row's choice of it
    map_cover       query-aware heads only: the fewest tiles of the map that hold gamma

A program reads the lengths of its sequence from memory; one without work ends there. Logits are in base 2. Non-negative fp32 numbers are ordered
like their bits, so thresholds are found by bisection over int32. Nothing is added by atomics: equal inputs give equal plans.
"""

# Triton reads these functions, not Python: their arguments have no Python types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# what changes with the length of the prompt, and is not worth a compilation when it is 1 or a multiple of 16. The kernels of the pooled map
# read and write rows of NK entries over and over: there it is.
LENGTHS = ["tiles_each", "NK"]


@triton.jit
def sequence_lengths(q_len_ptr, kv_len_ptr, i_b, min_q, min_kv):
    """Query rows and keys of a sequence, int32, and whether it keeps every tile without a look at its attention."""
    n_q = tl.load(q_len_ptr + i_b).to(tl.int32)
    n_kv = tl.load(kv_len_ptr + i_b).to(tl.int32)
    return n_q, n_kv, (n_q == 0) | (n_q < min_q) | (n_kv < min_kv)


@triton.jit
def scaled_logits(x, scale, cap, HAS_CAP: tl.constexpr):
    """Base-2 logits of dot products: x·scale, or tanh(x·scale)·cap, where `scale` and `cap` hold log2(e)."""
    x = x * scale
    if HAS_CAP:
        # tanh by exp2 of a negative number: no overflow
        shrunk = tl.exp2(tl.abs(x) * -2.8853900817779268)
        x = tl.where(x < 0, -cap, cap) * ((1.0 - shrunk) / (1.0 + shrunk))
    return x


@triton.jit
def probe_logits(b_q, b_k, scale, cap, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
    return scaled_logits(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), scale, cap, HAS_CAP)


@triton.jit
def load_probe_rows(
    q_ptr, q_start_ptr, i_b, i_h, n_q, n_rows, first, stride_qn, stride_qh, stride_qd,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """ROWS of the last `n_rows` query rows, from the `first` of them on, (ROWS, BLOCK_D); zeros behind them."""
    o_r, o_d = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    row = tl.load(q_start_ptr + i_b).to(tl.int64) + n_q - n_rows + o_r
    m_q = (o_r < n_rows)[:, None] & (o_d < D)[None, :]
    return tl.load(q_ptr + row[:, None] * stride_qn + i_h * stride_qh + o_d[None, :] * stride_qd, mask=m_q, other=0.0)


@triton.jit
def key_origin(place_ptr, i_b, stride_pb, PAGE: tl.constexpr):
    """What `load_keys` finds the keys of a sequence by: its row of the page table, or without pages its first row, int64."""
    # read here, before any loop: in a loop that also stores, it would be read again in every turn, and keys prefetched a turn later for it
    return place_ptr + i_b * stride_pb if PAGE else tl.load(place_ptr + i_b).to(tl.int64)


@triton.jit
def load_keys(
    k_ptr, origin, i_kv, first, n_kv, stride_kp, stride_kn, stride_kh, stride_kd,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
):
    """ROWS keys from `first` on, (ROWS, BLOCK_D); zeros behind the last key."""
    o_n, o_d = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_n = o_n < n_kv
    if PAGE:
        page = tl.load(origin + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
        row = page * stride_kp + (o_n % PAGE).to(tl.int64) * stride_kn
    else:
        row = (origin + o_n) * stride_kn
    p_k = k_ptr + row[:, None] + i_kv * stride_kh + o_d[None, :] * stride_kd
    return tl.load(p_k, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def add_row_stats(b_max, b_sum, b_s):
    """Running row maxima and sums of exp2, with the logits of one more tile."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # rows that have seen no key keep the sum 0
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
    return b_new, b_sum * tl.exp2(b_max - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)


@triton.jit(do_not_specialize=LENGTHS)
def probe_stats_fwd_kernel(
    q_ptr, k_ptr, place_ptr,                # q (tokens, Hq, D); k (tokens, Hkv, D), or with pages (pages, PAGE, Hkv, D)
    q_start_ptr, q_len_ptr, kv_len_ptr,     # (B,) int64
    max_ptr, sum_ptr,                       # out: (B, Hq, S, BLOCK) fp32, of each probe row over one of S ranges of keys
    mean_ptr,                               # out: (B, Hkv, NK, D) fp32, mean key of each block
    stride_qn, stride_qh, stride_qd, stride_kp, stride_kn, stride_kh, stride_kd, stride_pb,
    scale, cap, min_q, min_kv, tiles_each, NK, GROUP,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
    COLS: tl.constexpr,
):
    # heads vary fastest: those of one group run side by side and find their key tiles in the L2 cache
    i_h, i_s, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    Hq, S = tl.num_programs(0), tl.num_programs(1)
    n_q, n_kv, is_whole = sequence_lengths(q_len_ptr, kv_len_ptr, i_b, min_q, min_kv)
    j_first, j_end = i_s * tiles_each, tl.minimum((i_s + 1) * tiles_each, tl.cdiv(n_kv, BLOCK))
    if is_whole | (j_first >= j_end):
        return
    n_rows = tl.minimum(n_q, BLOCK)
    i_kv = i_h // GROUP
    o_r, o_x, o_d = tl.arange(0, BLOCK), tl.arange(0, COLS), tl.arange(0, BLOCK_D)
    b_q = load_probe_rows(q_ptr, q_start_ptr, i_b, i_h, n_q, n_rows, 0, stride_qn, stride_qh, stride_qd, D, BLOCK, BLOCK_D)
    origin = key_origin(place_ptr, i_b, stride_pb, PAGE)
    position = n_kv - n_rows + o_r
    b_max = tl.full([BLOCK], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for at in range(j_first * BLOCK, j_end * BLOCK, COLS):
        b_k = load_keys(k_ptr, origin, i_kv, at, n_kv, stride_kp, stride_kn, stride_kh, stride_kd, D, COLS, BLOCK_D, PAGE)
        b_s = probe_logits(b_q, b_k, scale, cap, HAS_CAP, UPCAST)
        b_s = tl.where((at + o_x)[None, :] <= position[:, None], b_s, -float("inf"))
        b_max, b_sum = add_row_stats(b_max, b_sum, b_s)
    part = ((i_b * Hq + i_h) * S + i_s) * BLOCK + o_r
    tl.store(max_ptr + part, b_max)
    tl.store(sum_ptr + part, b_sum)

    # the heads of a group take turns in pooling; read again by few rows at a time, keys need no registers beside the logits
    PART: tl.constexpr = 16
    for j in range(j_first + (i_h + GROUP - j_first % GROUP) % GROUP, j_end, GROUP):
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(j * BLOCK, tl.minimum((j + 1) * BLOCK, n_kv), PART):
            b_k = load_keys(k_ptr, origin, i_kv, first, n_kv, stride_kp, stride_kn, stride_kh, stride_kd, D, PART, BLOCK_D, PAGE)
            total += tl.sum(b_k.to(tl.float32), 0)
        p_mean = mean_ptr + ((i_b * (Hq // GROUP) + i_kv) * NK + j) * D + o_d
        tl.store(p_mean, total / tl.minimum(n_kv - j * BLOCK, BLOCK), mask=o_d < D)


@triton.jit
def row_weights(max_ptr, sum_ptr, i_bh, S, n_ranges, n_rows, BLOCK: tl.constexpr):
    """Maxima of the probe rows over all keys, and what makes exp2(logit − maximum) their part of the mean attention."""
    # ranges are read side by side: one after the other, a program would wait for memory as often as it has tiles
    RANGES: tl.constexpr = 16
    o_r, o_s = tl.arange(0, BLOCK), tl.arange(0, RANGES)
    b_max = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, n_ranges, RANGES):
        part = (i_bh * S + first + o_s[:, None]) * BLOCK + o_r[None, :]
        b_max = tl.maximum(b_max, tl.max(tl.load(max_ptr + part, mask=(first + o_s < n_ranges)[:, None], other=-float("inf")), 0))
    b_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_ranges, RANGES):
        part = (i_bh * S + first + o_s[:, None]) * BLOCK + o_r[None, :]
        m_s = (first + o_s < n_ranges)[:, None]
        b_part = tl.load(max_ptr + part, mask=m_s, other=-float("inf"))
        b_sum += tl.sum(tl.load(sum_ptr + part, mask=m_s, other=0.0) * tl.exp2(b_part - b_max[None, :]), 0)
    # rows past the last have logits 0: no weight, and no overflow
    return tl.where(o_r < n_rows, b_max, 0.0), tl.where(o_r < n_rows, 1.0 / (b_sum * n_rows), 0.0)


@triton.jit
def few_rows(b_x, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """(BLOCK, COLS) summed to at most 16 rows: what a thread holds of a column, where rows take turns among the warps."""
    ROWS: tl.constexpr = min(BLOCK, 16)
    return tl.sum(tl.reshape(b_x, [BLOCK // ROWS, ROWS, COLS]), 0)


@triton.jit(do_not_specialize=LENGTHS)
def probe_masses_fwd_kernel(
    q_ptr, k_ptr, place_ptr, q_start_ptr, q_len_ptr, kv_len_ptr,    # as above
    max_ptr, sum_ptr, mean_ptr,             # from the first pass
    token_ptr,                              # out: (2, B, Hq, NK·BLOCK) fp32, mass by key (a_v) and by token distance (a_s)
    estimate_ptr,                           # out: (B, Hq, NK) fp32, base-2 logits of the pooled estimate
    tile_ptr,                               # out with TILES: (B, Hq, NK) fp32, mass of the probe rows before the last query block
    stride_qn, stride_qh, stride_qd, stride_kp, stride_kn, stride_kh, stride_kd, stride_pb,
    scale, cap, min_q, min_kv, tiles_each, NK, GROUP,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
    COLS: tl.constexpr, TILES: tl.constexpr,
):
    # keys are taken COLS = BLOCK or BLOCK / 2 at a time: a skewed tile of 128 x 128 does not fit the registers
    SPAN: tl.constexpr = BLOCK // COLS
    tl.static_assert((SPAN == 1) | (SPAN == 2))
    i_h, i_s, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    Hq, S = tl.num_programs(0), tl.num_programs(1)
    n_q, n_kv, is_whole = sequence_lengths(q_len_ptr, kv_len_ptr, i_b, min_q, min_kv)
    nk = tl.cdiv(n_kv, BLOCK)
    j_first, j_end = i_s * tiles_each, tl.minimum((i_s + 1) * tiles_each, nk)
    if is_whole | (j_first >= j_end):
        return
    n_rows = tl.minimum(n_q, BLOCK)
    i_kv, i_bh = i_h // GROUP, i_b * Hq + i_h
    o_r, o_x = tl.arange(0, BLOCK), tl.arange(0, COLS)
    b_q = load_probe_rows(q_ptr, q_start_ptr, i_b, i_h, n_q, n_rows, 0, stride_qn, stride_qh, stride_qd, D, BLOCK, BLOCK_D)
    origin = key_origin(place_ptr, i_b, stride_pb, PAGE)
    b_max, weight = row_weights(max_ptr, sum_ptr, i_bh, S, tl.cdiv(nk, tiles_each), n_rows, BLOCK)
    p_token = token_ptr + i_bh * (NK * BLOCK)
    p_distance = p_token + tl.num_programs(2).to(tl.int64) * Hq * NK * BLOCK

    mean_q = tl.sum(b_q.to(tl.float32), 0) / n_rows
    o_d = tl.arange(0, BLOCK_D)
    PART: tl.constexpr = 16
    for first in range(j_first, j_end, PART):
        o_j = first + tl.arange(0, PART)
        p_mean = mean_ptr + ((i_b * (Hq // GROUP) + i_kv) * NK + o_j[:, None]) * D + o_d[None, :]
        mean_k = tl.load(p_mean, mask=(o_j < j_end)[:, None] & (o_d < D)[None, :], other=0.0)
        tl.store(estimate_ptr + i_bh * NK + o_j, scaled_logits(tl.sum(mean_k * mean_q[None, :], 1), scale, cap, HAS_CAP), mask=o_j < j_end)

    # A row r and a key c of tile m are at distance n_kv − n_rows − m·COLS + r − c. With r − c = x + COLS·band and 0 ≤ x < COLS, band is 1, 0 or
    # −1: a tile adds to three runs of COLS distances, and a run is complete one tile after its own. Until then few of its rows are added up;
    # the sum over all of them, which threads must meet for, is taken once a tile, over keys and over distances together.
    beyond = o_r[:, None] - o_x[None, :]
    opening = few_rows(tl.zeros([BLOCK, COLS], tl.float32), BLOCK, COLS)
    closing = opening
    early = 0.0
    m_first = j_first * SPAN
    # the two tiles before the range are computed again, only for what they hand on
    for m in range(tl.maximum(m_first - 2, 0), j_end * SPAN):
        b_k = load_keys(k_ptr, origin, i_kv, m * COLS, n_kv, stride_kp, stride_kn, stride_kh, stride_kd, D, COLS, BLOCK_D, PAGE)
        b_s = probe_logits(b_q, b_k, scale, cap, HAS_CAP, UPCAST)
        b_s = tl.where((m * COLS + o_x)[None, :] <= (n_kv - n_rows + o_r)[:, None], b_s, -float("inf"))
        b_p = tl.exp2(b_s - b_max[:, None]) * weight[:, None]
        is_own = m >= m_first
        # a bound, not `& is_own`: the interpreter spoils a mask combined with a scalar
        n_own = tl.where(is_own, n_kv, 0)
        if TILES:
            is_early = (n_kv - n_rows + o_r) // BLOCK < nk - 1
            early = tl.where(m % SPAN == 0, 0.0, early) + tl.sum(tl.sum(tl.where(is_early[:, None], b_p, 0.0), 0), 0)
            tl.store(tile_ptr + i_bh * NK + m // SPAN, early, mask=is_own)
        # column x of the skewed tile holds, row by row, the key with that x
        skewed = tl.gather(b_p, beyond & (COLS - 1), 1)
        if SPAN == 2:
            closing += few_rows(tl.where(beyond >= COLS, skewed, 0.0), BLOCK, COLS)
        mass, run = tl.split(tl.sum(tl.join(few_rows(b_p, BLOCK, COLS), closing), 0))
        tl.store(p_token + m * COLS + o_x, mass, mask=m * COLS + o_x < n_own)
        distance = n_kv - n_rows - (m - 1) * COLS + o_x
        tl.store(p_distance + distance, run, mask=(distance >= 0) & (distance < n_own))
        closing = opening + few_rows(tl.where((beyond >= 0) & (beyond < COLS), skewed, 0.0), BLOCK, COLS)
        opening = few_rows(tl.where(beyond < 0, skewed, 0.0), BLOCK, COLS)
    # what the last tile hands on, where no other range takes it
    n_last = tl.where(j_end == nk, n_kv, 0)
    distance = n_kv - n_rows - (j_end * SPAN - 1) * COLS + o_x
    tl.store(p_distance + distance, tl.sum(closing, 0), mask=(distance >= 0) & (distance < n_last))
    tl.store(p_distance + distance - COLS, tl.sum(opening, 0), mask=(distance >= COLS) & (distance - COLS < n_last))


@triton.jit
def thresholds_between(low, high):
    """Three thresholds that cut [low, high] into quarters: all above `low`, some at `high` where there are no three between."""
    span = high - low
    return low + (span + 3) // 4, low + (span + 1) // 2, high - span // 4


@triton.jit
def add_from(b_mass, b_count, b_0, b_1, b_2, b_3, threshold):
    """Adds the entries with bits of at least `threshold`, which is positive: four in fp32, these in fp64, and their number."""
    is_0, is_1 = b_0.to(tl.int32, bitcast=True) >= threshold, b_1.to(tl.int32, bitcast=True) >= threshold
    is_2, is_3 = b_2.to(tl.int32, bitcast=True) >= threshold, b_3.to(tl.int32, bitcast=True) >= threshold
    four = (tl.where(is_0, b_0, 0.0) + tl.where(is_1, b_1, 0.0)) + (tl.where(is_2, b_2, 0.0) + tl.where(is_3, b_3, 0.0))
    count = (is_0.to(tl.int32) + is_1.to(tl.int32)) + (is_2.to(tl.int32) + is_3.to(tl.int32))
    return b_mass + four.to(tl.float64), b_count + count


@triton.jit
def masses_from(p_mass, n, t1, t2, t3, CHUNK: tl.constexpr):
    """Sums (fp64) and numbers of the entries with bits of at least each threshold, among n. Sums never fall as a threshold does."""
    mass1, n1 = tl.zeros([CHUNK], tl.float64), tl.zeros([CHUNK], tl.int32)
    mass2, n2, mass3, n3 = mass1, n1, mass1, n1
    for at in range(0, n, 4 * CHUNK):
        o_n = at + tl.arange(0, CHUNK)
        # four loads on their way together: the search waits for memory as much as for arithmetic
        b_0 = tl.load(p_mass + o_n, mask=o_n < n, other=0.0)
        b_1 = tl.load(p_mass + o_n + CHUNK, mask=o_n + CHUNK < n, other=0.0)
        b_2 = tl.load(p_mass + o_n + 2 * CHUNK, mask=o_n + 2 * CHUNK < n, other=0.0)
        b_3 = tl.load(p_mass + o_n + 3 * CHUNK, mask=o_n + 3 * CHUNK < n, other=0.0)
        mass1, n1 = add_from(mass1, n1, b_0, b_1, b_2, b_3, t1)
        mass2, n2 = add_from(mass2, n2, b_0, b_1, b_2, b_3, t2)
        mass3, n3 = add_from(mass3, n3, b_0, b_1, b_2, b_3, t3)
    return tl.sum(mass1, 0), tl.sum(mass2, 0), tl.sum(mass3, 0), tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)


@triton.jit
def narrowed(low, n_low, high, n_high, held, share, t1, t2, t3, mass1, mass2, mass3, n1, n2, n3):
    """The quarter that `share` lies in: entries of at least `low` hold it, those of at least `high` do not, but `held`."""
    is1, is2, is3 = mass1 >= share, mass2 >= share, mass3 >= share
    low = tl.where(is3, t3, tl.where(is2, t2, tl.where(is1, t1, low)))
    n_low = tl.where(is3, n3, tl.where(is2, n2, tl.where(is1, n1, n_low)))
    high = tl.where(is3, high, tl.where(is2, t3, tl.where(is1, t2, t1)))
    n_high = tl.where(is3, n_high, tl.where(is2, n3, tl.where(is1, n2, n1)))
    held = tl.where(is3, held, tl.where(is2, mass3, tl.where(is1, mass2, mass1)))
    return low, n_low, high, n_high, held


@triton.jit
def missing_ties(share, held, threshold):
    """How many entries of size `threshold` (bits) bring `held` up to `share`."""
    size = threshold.to(tl.float32, bitcast=True).to(tl.float64)
    return tl.minimum(tl.ceil((share - held) / size), 2147483520.0).to(tl.int32)


@triton.jit(do_not_specialize=["NK"])
def token_counts_fwd_kernel(
    q_len_ptr, kv_len_ptr,
    token_ptr,                              # (2, B, Hq, NK·BLOCK) fp32, a_v and a_s
    count_ptr,                              # out: (2, B, Hq) int32, K_v and K_s
    block_ptr,                              # out: (2, B, Hq, NK) fp32, mass by key block (u_v) and by block diagonal (u_s)
    gamma_high, gamma_low, min_q, min_kv, NK,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):
    # without EXACT the search ends as soon as ⌈K / BLOCK⌉ is certain
    i_h, i_side, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    Hq, B = tl.num_programs(0), tl.num_programs(2)
    _, n_kv, is_whole = sequence_lengths(q_len_ptr, kv_len_ptr, i_b, min_q, min_kv)
    if is_whole:
        return
    i_out = (i_side * B + i_b) * Hq + i_h
    p_mass = token_ptr + i_out * (NK * BLOCK)
    gamma = tl.zeros((), tl.float64) + gamma_high + gamma_low
    # entries of at least `low` hold gamma, or low = 0; those of at least `high` do not. 2.0 is above every mass
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0x40000000, tl.int32)
    n_low = n_kv
    held = tl.zeros((), tl.float64)
    n_high = tl.zeros((), tl.int32)
    is_open = n_low > 1
    while is_open:
        t1, t2, t3 = thresholds_between(low, high)
        mass1, mass2, mass3, n1, n2, n3 = masses_from(p_mass, n_kv, t1, t2, t3, CHUNK)
        low, n_low, high, n_high, held = narrowed(low, n_low, high, n_high, held, gamma, t1, t2, t3, mass1, mass2, mass3, n1, n2, n3)
        is_open = (high - low > 1) & (n_low - n_high > 1)
        if not EXACT:
            is_open = is_open & (tl.cdiv(n_high + 1, BLOCK) != tl.cdiv(n_low, BLOCK))
    # between neighbouring thresholds only entries of one size are left. low = 0: those of positive size do not hold gamma
    exact = tl.minimum(n_high + missing_ties(gamma, held, tl.maximum(low, 1)), n_low)
    tl.store(count_ptr + i_out, tl.where((high - low > 1) | (low == 0), n_low, exact))

    nk = tl.cdiv(n_kv, BLOCK)
    ROWS: tl.constexpr = CHUNK // BLOCK
    for first in range(0, nk, ROWS):
        o_j = first + tl.arange(0, ROWS)
        o_t = tl.arange(0, BLOCK)
        own = o_j[:, None] * BLOCK + o_t[None, :]
        if i_side == 0:
            u = tl.sum(tl.load(p_mass + own, mask=own < n_kv, other=0.0), 1)
        elif SPLIT:
            beyond = (o_t.to(tl.float32) / BLOCK)[None, :]
            b_own = tl.load(p_mass + own, mask=own < n_kv, other=0.0)
            b_before = tl.load(p_mass + own - BLOCK, mask=(own >= BLOCK) & (own - BLOCK < n_kv), other=0.0)
            # the last diagonal keeps what it would hand on
            share = tl.where((o_j == nk - 1)[:, None], 1.0, 1.0 - beyond)
            u = tl.sum(b_own * share + b_before * beyond, 1)
        else:
            # runs are cut from the largest distance down
            own = n_kv - (nk - o_j[:, None]) * BLOCK + o_t[None, :]
            u = tl.sum(tl.load(p_mass + own, mask=(own >= 0) & (own < n_kv), other=0.0), 1)
        tl.store(block_ptr + i_out * NK + o_j, u, mask=o_j < nk)


@triton.jit
def top_blocks(b_bits, is_free, n):
    """The n largest of the entries in `is_free`, ties by index. b_bits: their int32 bits, non-negative."""
    low = tl.full((), -1, tl.int32)
    # above infinity; at least n entries are ≥ low, fewer than n are ≥ high
    high = tl.full((), 0x7F800001, tl.int32)
    n_low = tl.sum(is_free.to(tl.int32), 0)
    while (high - low > 1) & (n_low != n):
        middle = low + (high - low) // 2
        n_middle = tl.sum((is_free & (b_bits >= middle)).to(tl.int32), 0)
        low = tl.where(n_middle >= n, middle, low)
        n_low = tl.where(n_middle >= n, n_middle, n_low)
        high = tl.where(n_middle >= n, high, middle)
    above = is_free & (b_bits > low)
    ties = is_free & (b_bits == low)
    rank = tl.cumsum(ties.to(tl.int32), 0)
    return above | (ties & (rank <= n - tl.sum(above.to(tl.int32), 0)))


@triton.jit
def count_to_hold(b_x, is_free, held, share):
    """How many of the largest entries in `is_free` bring `held` (fp64) up to `share`; all where they cannot."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_wide = b_x.to(tl.float64)
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0x40000000, tl.int32)
    held_high = held
    n_high = tl.zeros((), tl.int32)
    n_low = tl.where(held >= share, 0, tl.sum(is_free.to(tl.int32), 0))
    while (high - low > 1) & (n_low - n_high > 1):
        middle = low + (high - low) // 2
        is_in = is_free & (b_bits >= middle)
        mass = held + tl.sum(tl.where(is_in, b_wide, 0.0), 0)
        n_middle = tl.sum(is_in.to(tl.int32), 0)
        reaches = mass >= share
        low = tl.where(reaches, middle, low)
        n_low = tl.where(reaches, n_middle, n_low)
        high = tl.where(reaches, high, middle)
        n_high = tl.where(reaches, n_high, n_middle)
        held_high = tl.where(reaches, held_high, mass)
    # low = 0: entries of positive size do not reach it
    exact = tl.minimum(n_high + missing_ties(share, held_high, tl.maximum(low, 1)), n_low)
    return tl.where((low > 0) & (n_low - n_high > 1), exact, n_low)


@triton.jit
def visible_keys(n_rows, n_kv, o_j, BLOCK: tl.constexpr):
    """Mean number of keys of each block that a probe row sees, fp32: a sum of clamp(y, 0, BLOCK) over consecutive y, in closed form."""
    last = (n_kv - o_j * BLOCK).to(tl.int64)
    before = last - n_rows
    sums = tl.zeros_like(last)
    for side in tl.static_range(2):
        y = last if side == 0 else before
        inner = tl.minimum(tl.maximum(y, 0), BLOCK)
        part = inner * (inner + 1) // 2 + tl.maximum(y - BLOCK, 0) * BLOCK
        sums += part if side == 0 else -part
    return sums.to(tl.float32) / n_rows


@triton.jit(do_not_specialize=["NK"])
def select_lines_fwd_kernel(
    q_len_ptr, kv_len_ptr,
    count_ptr, block_ptr, estimate_ptr,     # (2, B, Hq) int32; (2, B, Hq, NK) fp32; (B, Hq, NK) fp32
    line_ptr,                               # out: (2, B, Hq, NK) bool bytes, columns and diagonals
    aware_ptr, finite_ptr,                  # out: (B, Hq) bool bytes
    distance_ptr, blocks_ptr,               # out: (B, Hq) fp32, Jensen–Shannon; (2, B, Hq) int32, n_v and n_s
    gamma_high, gamma_low, tau, min_q, min_kv, min_blocks, max_blocks, sink_blocks, local_blocks, NK,
    BLOCK: tl.constexpr, BLOCK_NK: tl.constexpr, COVER: tl.constexpr, SIZED: tl.constexpr,
):
    i_h, i_side, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    Hq, B = tl.num_programs(0), tl.num_programs(2)
    i_bh, i_out = i_b * Hq + i_h, (i_side * B + i_b) * Hq + i_h
    n_q, n_kv, is_whole = sequence_lengths(q_len_ptr, kv_len_ptr, i_b, min_q, min_kv)
    nk = tl.cdiv(n_kv, BLOCK)
    o_j = tl.arange(0, BLOCK_NK)
    # all columns and no diagonal, for what keeps everything
    everything = o_j < tl.where(i_side == 0, nk, 0)
    if is_whole:
        tl.store(line_ptr + i_out * NK + o_j, everything.to(tl.uint8), mask=o_j < NK)
        if i_side == 0:
            tl.store(aware_ptr + i_bh, 0)
            tl.store(finite_ptr + i_bh, 1)
        return
    n_rows = tl.minimum(n_q, BLOCK)
    b_truth = tl.load(block_ptr + i_bh * NK + o_j, mask=o_j < nk, other=0.0)
    total = tl.sum(b_truth, 0)
    is_finite = (total == total) & (tl.abs(total) != float("inf"))

    b_logit = tl.load(estimate_ptr + i_bh * NK + o_j, mask=o_j < nk, other=-float("inf"))
    if SIZED:
        b_logit += tl.log2(tl.where(o_j < nk, visible_keys(n_rows, n_kv, o_j, BLOCK), 1.0))
    b_logit = tl.exp2(b_logit - tl.max(b_logit, 0))
    b_estimate = (b_logit / tl.sum(b_logit, 0)).to(tl.float64)
    b_true = b_truth.to(tl.float64)
    middle = (b_estimate + b_true) * 0.5
    middle = tl.where(middle > 0, middle, 1.0)
    # a zero contributes nothing, although its logarithm is infinite
    terms = b_estimate * tl.log(tl.where(b_estimate > 0, b_estimate / middle, 1.0))
    terms += b_true * tl.log(tl.where(b_true > 0, b_true / middle, 1.0))
    divergence = tl.sum(terms, 0) * 0.5
    distance = tl.sqrt(tl.where(divergence > 0, divergence, 0.0)).to(tl.float32)
    is_aware = is_finite & (distance < tau)

    gamma = tl.zeros((), tl.float64) + gamma_high + gamma_low
    n_forced = tl.where(i_side == 0, sink_blocks, local_blocks)
    # the second half holds diagonals
    b_mass = tl.load(block_ptr + i_out * NK + o_j, mask=o_j < nk, other=0.0)
    is_forced = (o_j < n_forced) & (o_j < nk)
    is_free = (o_j >= n_forced) & (o_j < nk)
    count = tl.cdiv(tl.load(count_ptr + i_out), BLOCK)
    if COVER:
        held = tl.sum(tl.where(is_forced, b_mass, 0.0).to(tl.float64), 0)
        count = tl.maximum(count, tl.sum(is_forced.to(tl.int32), 0) + count_to_hold(b_mass, is_free, held, gamma))
    fewest = tl.minimum(nk, tl.maximum(min_blocks, tl.maximum(n_forced, 1)))
    most = tl.minimum(nk, tl.maximum(fewest, max_blocks))
    count = tl.where(is_aware, fewest, tl.minimum(tl.maximum(count, fewest), most))
    kept = is_forced | top_blocks(b_mass.to(tl.int32, bitcast=True), is_free, count - tl.sum(is_forced.to(tl.int32), 0))
    kept = tl.where(is_finite, kept, everything)
    tl.store(line_ptr + i_out * NK + o_j, kept.to(tl.uint8), mask=o_j < NK)
    tl.store(blocks_ptr + i_out, count)
    if i_side == 0:
        tl.store(aware_ptr + i_bh, is_aware.to(tl.uint8))
        tl.store(finite_ptr + i_bh, is_finite.to(tl.uint8))
        tl.store(distance_ptr + i_bh, distance)


@triton.jit
def pooled_map_fwd_kernel(
    q_ptr, q_start_ptr, q_len_ptr, kv_len_ptr,
    mean_ptr, aware_ptr,
    line_ptr, finite_ptr,                   # changed where the map is not finite: the head keeps every tile
    map_ptr,                                # scratch and, for map_cover, out: (B, Hq, NQ, NK) fp32, rows sum to 1
    extra_ptr,                              # out: (B, Hq, NQ, NK) bool bytes; for map_cover only the zeros
    stride_qn, stride_qh, stride_qd, scale, cap, gamma_high, gamma_low, NK, GROUP,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_NK: tl.constexpr,
    HAS_CAP: tl.constexpr, BY_ROW: tl.constexpr,
):
    i, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    NQ, Hq = tl.num_programs(0), tl.num_programs(1)
    i_bh = i_b * Hq + i_h
    n_q, n_kv = tl.load(q_len_ptr + i_b).to(tl.int32), tl.load(kv_len_ptr + i_b).to(tl.int32)
    nk = tl.cdiv(n_kv, BLOCK)
    # the grid block of this row of the map, and with it the number of blocks the row may see, less one
    i_abs = (n_kv - n_q) // BLOCK + i
    o_j = tl.arange(0, BLOCK_NK)
    row = (i_bh * NQ + i) * NK
    is_aware = tl.load(aware_ptr + i_bh) != 0
    if (not is_aware) | (i_abs >= nk):
        tl.store(extra_ptr + row + o_j, tl.zeros([BLOCK_NK], tl.uint8), mask=o_j < NK)
        return
    o_r = i_abs * BLOCK - (n_kv - n_q) + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    m_r = (o_r >= 0) & (o_r < n_q)
    place = (tl.load(q_start_ptr + i_b).to(tl.int64) + o_r) * stride_qn
    b_q = tl.load(q_ptr + place[:, None] + i_h * stride_qh + o_d[None, :] * stride_qd, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    mean_q = tl.sum(b_q.to(tl.float32), 0) / tl.sum(m_r.to(tl.int32), 0)
    p_mean = mean_ptr + (i_b * (Hq // GROUP) + i_h // GROUP) * NK * D
    for first in range(0, i_abs + 1, BLOCK_J):
        o_part = first + tl.arange(0, BLOCK_J)
        b_k = tl.load(p_mean + o_part[:, None] * D + o_d[None, :], mask=(o_part <= i_abs)[:, None] & (o_d < D)[None, :], other=0.0)
        tl.store(map_ptr + row + o_part, scaled_logits(tl.sum(b_k * mean_q[None, :], 1), scale, cap, HAS_CAP), mask=o_part <= i_abs)
    # other threads of this program wrote what is read now
    tl.debug_barrier()
    b_logit = tl.load(map_ptr + row + o_j, mask=o_j <= i_abs, other=-float("inf"))
    b_share = tl.exp2(b_logit - tl.max(b_logit, 0))
    total = tl.sum(b_share, 0)
    b_share = b_share / total
    if total != total:
        # several rows may write this, the same values each
        tl.store(finite_ptr + i_bh, 0)
        tl.store(line_ptr + i_bh * NK + o_j, (o_j < nk).to(tl.uint8), mask=o_j < NK)
    if BY_ROW:
        gamma = tl.zeros((), tl.float64) + gamma_high + gamma_low
        n = count_to_hold(b_share, o_j <= i_abs, tl.zeros((), tl.float64), gamma)
        kept = top_blocks(b_share.to(tl.int32, bitcast=True), o_j <= i_abs, n)
        tl.store(extra_ptr + row + o_j, kept.to(tl.uint8), mask=o_j < NK)
    else:
        tl.store(map_ptr + row + o_j, b_share, mask=o_j < NK)


@triton.jit
def map_cover_fwd_kernel(
    q_len_ptr, kv_len_ptr, aware_ptr,
    map_ptr,                                # (B, Hq, NQ, NK) fp32
    extra_ptr,                              # out: (B, Hq, NQ, NK) bool bytes, of query-aware heads
    gamma_high, gamma_low, NQ, NK,
    BLOCK: tl.constexpr, BLOCK_NK: tl.constexpr, CHUNK: tl.constexpr,
):
    i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_bh = i_b * tl.num_programs(0) + i_h
    if tl.load(aware_ptr + i_bh) == 0:
        return
    n_q, n_kv = tl.load(q_len_ptr + i_b).to(tl.int32), tl.load(kv_len_ptr + i_b).to(tl.int32)
    first = (n_kv - n_q) // BLOCK
    nq = tl.cdiv(n_kv, BLOCK) - first
    p_map = map_ptr + i_bh * NQ * NK
    share = (tl.zeros((), tl.float64) + gamma_high + gamma_low) * nq
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0x40000000, tl.int32)
    held = tl.zeros((), tl.float64)
    n_high = tl.zeros((), tl.int32)
    n_low = tl.full((), 0x7FFFFFFF, tl.int32)
    # once a single entry lies between the thresholds, all from `low` on is the answer. Cells above the diagonal are 0
    while (high - low > 1) & (n_low - n_high > 1):
        t1, t2, t3 = thresholds_between(low, high)
        mass1, mass2, mass3, n1, n2, n3 = masses_from(p_map, nq * NK, t1, t2, t3, CHUNK)
        low, n_low, high, n_high, held = narrowed(low, n_low, high, n_high, held, share, t1, t2, t3, mass1, mass2, mass3, n1, n2, n3)
    p_extra = extra_ptr + i_bh * NQ * NK
    # low = 0: the whole map does not reach its share, zeros are listed too
    if (low == 0) | (n_low - n_high <= 1):
        for at in range(0, nq * NK, CHUNK):
            o_c = at + tl.arange(0, CHUNK)
            b_bits = tl.load(p_map + o_c, mask=o_c < nq * NK, other=0.0).to(tl.int32, bitcast=True)
            tl.store(p_extra + o_c, ((o_c % NK <= first + o_c // NK) & (b_bits >= low)).to(tl.uint8), mask=o_c < nq * NK)
    else:
        # of the entries of size `low` the first ones, row by row
        n_ties = missing_ties(share, held, low)
        o_j = tl.arange(0, BLOCK_NK)
        row = tl.zeros([BLOCK_NK], tl.int64) + o_j
        for i in range(0, nq):
            is_cell = o_j <= first + i
            b_bits = tl.load(p_map + row, mask=is_cell, other=0.0).to(tl.int32, bitcast=True)
            ties = is_cell & (b_bits >= low) & (b_bits < high)
            kept = (is_cell & (b_bits >= high)) | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= n_ties))
            n_ties -= tl.sum(ties.to(tl.int32), 0)
            tl.store(p_extra + row, kept.to(tl.uint8), mask=o_j < NK)
            row += NK
