"""What attention over blocks means, on inputs solved by hand and on batches taken apart; every implementation answers the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from accel.kernels.block_sparse import (
    ContiguousKeys,
    ImplicitPlan,
    ListPlan,
    PagedKeys,
    Ragged,
    VerticalSlashPlan,
    block_sparse_attention,
    dense_attention,
)

IMPLS = ["naive", "cpu"]


def by_hand(q_rows, v, mask, impl, *, block=2, n=None, dim=8):
    """Attention with keys that are all zero, so that every visible key weighs the same: the output is a mean of values."""
    n = len(v) if n is None else n
    keys = ContiguousKeys(torch.zeros(n, 1, dim), torch.tensor(v)[:, None, None].expand(n, 1, dim).contiguous(), torch.tensor([0]), torch.tensor([n]))
    lens = Ragged.of([q_rows], [n])
    plan = ListPlan.from_mask([torch.tensor(mask, dtype=torch.bool)], lens, block)
    out = torch.full((q_rows, 1, dim), torch.nan)
    _, lse = block_sparse_attention(torch.ones(q_rows, 1, dim), keys, plan, lens, scale=1.0, out=out, return_lse=True, impl=impl)
    return out[:, 0, 0].tolist(), lse[0].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_average_what_they_see_of_the_listed_blocks(impl):
    # blocks {0, 1}, {2, 3}, {4, 5}; the third row of tiles skips the middle one
    out, lse = by_hand(6, [6.0, 0.0, 3.0, 9.0, 0.0, 12.0], [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], impl)
    assert out == pytest.approx([6, 3, 3, 4.5, 2, 4.5])
    assert lse == pytest.approx([math.log(n) for n in (1, 2, 3, 4, 3, 4)])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_partial_last_block_has_only_its_real_keys(impl):
    out, lse = by_hand(5, [1.0, 2.0, 3.0, 4.0, 10.0], [[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], impl)
    assert out == pytest.approx([1, 1.5, 3, 3.5, 13 / 3])
    assert lse[4] == pytest.approx(math.log(3))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cached_prefix_keeps_the_grid_at_position_zero(impl):
    # three queries at positions 3, 4, 5: the first alone in block 1, which begins at position 2
    out, _ = by_hand(3, [8.0, 0.0, 1.0, 3.0, 5.0, 7.0], [[[0, 1, 0], [1, 0, 1]]], impl)
    assert out == pytest.approx([2, 13 / 3, 5])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_without_keys_is_zero_with_lse_minus_infinity(impl):
    out, lse = by_hand(4, [1.0, 2.0, 3.0, 4.0], [[[0, 0], [1, 0]]], impl)
    assert out == pytest.approx([0, 0, 1.5, 1.5])
    assert lse[:2] == [-math.inf, -math.inf]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_above_the_diagonal_is_never_read(impl):
    out, _ = by_hand(4, [1.0, 2.0, 3.0, 4.0], [[[1, 1], [0, 1]]], impl)
    assert out == pytest.approx([1, 1.5, 3, 3.5])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_softcap_and_scale_act_on_the_scores_in_that_order(impl, softcap):
    keys = ContiguousKeys(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([0]), torch.tensor([2]))
    lens = Ragged.of([1], [2])
    out = block_sparse_attention(torch.ones(1, 1, 1), keys, ImplicitPlan.dense(2), lens, scale=0.5, softcap=softcap, impl=impl)
    a, b = (0.5, 1.5) if softcap is None else (2 * math.tanh(0.25), 2 * math.tanh(0.75))
    assert out.item() == pytest.approx(1 / (1 + math.exp(a - b)), abs=1e-6)


@pytest.mark.parametrize("gap", [0, 7])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_batch_equals_its_sequences_one_by_one(case, gap, heads):
    lengths = [(70, 70), (0, 0), (1, 45), (33, 90), (5, 5), (0, 40), (129, 129)]
    whole = case([q for q, _ in lengths], [n for _, n in lengths], Hq=4, Hkv=2, gap=gap)
    plan = whole.random_plan(32, heads=heads)
    out, lse = whole.run(plan)
    for rows in whole.lens.rows():
        here = slice(rows.q_start, rows.q_start + rows.q_len)
        keys = replace(whole.keys, start=whole.keys.start[rows.index : rows.index + 1], kv_len=torch.tensor([rows.kv_len]))
        alone = replace(whole, q=whole.q[here], keys=keys, lens=Ragged.of([rows.q_len], [rows.kv_len]))
        if rows.q_len:
            own = ListPlan.from_mask([plan.block_mask(rows)], alone.lens, 32)
            want, want_lse = alone.run(own)
            assert torch.equal(out[here], want)
            assert torch.equal(lse[:, here], want_lse)
    gaps = ~whole.real_rows()
    assert (out[gaps] == 0).all()
    assert torch.isneginf(lse[:, gaps]).all()


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("layout", ["row_major", "vllm_cpu_transposed", "vllm_cuda_joint"])
@pytest.mark.parametrize("L", [1, 9, 100])
def test_paged_keys_equal_contiguous_keys(case, page_size, layout, L):
    one = case([L, L], [100, 173], Hq=4, Hkv=2)
    paged = replace(one, keys=into_pages(one, page_size, layout))
    for plan in (one.random_plan(32), one.random_plan(32, heads=1), None):
        (out, lse), (want, want_lse) = paged.run(plan), one.run(plan)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def into_pages(one, page_size, layout):
    """The keys of a case in shuffled pages whose unused slots hold NaN."""
    lengths = one.keys.kv_len.tolist()
    per_sequence = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(per_sequence) + 3, generator=torch.Generator().manual_seed(0))
    sides = [torch.full((len(order), page_size, 2, one.q.shape[2]), torch.nan) for _ in range(2)]
    table = torch.zeros(len(lengths), max(per_sequence), dtype=torch.int32)
    used = 0
    for b, n in enumerate(lengths):
        pages = order[used : used + per_sequence[b]]
        used += per_sequence[b]
        table[b, : len(pages)] = pages
        token = torch.arange(n)
        for side, source in zip(sides, one.keys.tokens(b), strict=True):
            side[pages[token // page_size], token % page_size] = source.transpose(0, 1)
    k, v = sides
    if layout == "vllm_cpu_transposed":
        # stored (pages, Hkv, D, page_size)
        k = k.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    elif layout == "vllm_cuda_joint":
        # stored (pages, Hkv, page_size, 2 D)
        joint = torch.cat([k, v], -1).transpose(1, 2).contiguous()
        k, v = joint.transpose(1, 2).split(k.shape[-1], -1)
    return PagedKeys(k, v, table, one.keys.kv_len)


@pytest.mark.parametrize("memory", ["token_major", "head_major", "padded_heads"])
def test_any_strides_of_q_keys_and_out(case, memory):
    one = case([150], Hq=4, Hkv=2)
    plan = one.random_plan(32)
    want, _ = one.run(plan)

    def laid_out(t):
        if memory == "head_major":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.nn.functional.pad(t, (0, 3))[..., : t.shape[-1]] if memory == "padded_heads" else t

    keys = replace(one.keys, k=laid_out(one.keys.k), v=laid_out(one.keys.v))
    out = laid_out(torch.full_like(want, torch.nan))
    got = block_sparse_attention(laid_out(one.q), keys, plan, one.lens, scale=one.scale, out=out, impl="cpu")
    assert got is out
    assert (out - want).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["q", "k", "v"])
@pytest.mark.parametrize("L", [12, 150], ids=["decode", "prefill"])
def test_a_nan_reaches_the_rows_that_see_it_and_no_other_block(case, side, L):
    block, n = 16, 150
    one = case([L], [n], Hq=2, Hkv=1)
    plan = one.random_plan(block, 0.3, heads=1)
    # in the sink block for the short call, which every row lists
    token = n - L + 3 if side == "q" else 37 if L > 16 else 5
    tensor = one.q if side == "q" else getattr(one.keys, side)
    tensor[token - (n - L) if side == "q" else token] = torch.nan
    rows = next(one.lens.rows())
    out, lse = one.run(plan)
    position = torch.arange(n - L, n)
    if side == "q":
        sees = position == token
        may_see = sees
    else:
        listed = plan.block_mask(rows)[0][position // block - rows.first_block(block), token // block]
        sees = listed & (position >= token)
        # a NaN value times probability 0 is NaN: it may reach the other rows of a tile that reads it, in decoding of the whole call
        may_see = listed if side == "v" and L > 16 else sees | (torch.full_like(sees, side == "v") & bool(listed.any()))
    found = out.isnan().any(-1).any(-1)
    assert sees.any()
    assert found[sees].all()
    assert not found[~may_see].any()
    if side != "v":
        assert torch.equal(lse.isnan().any(0), sees)


def test_garbage_behind_the_last_key_is_never_read(case):
    one = case([20], [50], Hq=2, Hkv=1)
    want, _ = one.run(one.random_plan(32))
    tail = torch.full((14, 1, 16), torch.nan)
    longer = replace(one.keys, k=torch.cat([one.keys.k, tail]), v=torch.cat([one.keys.v, tail]))
    for L in (20, 5):
        short = replace(one, q=one.q[20 - L :], lens=Ragged.of([L], [50]), keys=longer)
        assert torch.isfinite(short.run(short.random_plan(32))[0]).all()
    assert torch.equal(replace(one, keys=longer).run(one.random_plan(32))[0], want)


def test_inference_mode_and_normal_mode_share_the_buffers(case):
    one = case([100], Hq=2, Hkv=1)
    plan = one.random_plan(32)
    with torch.inference_mode():
        inside, _ = one.run(plan)
    outside, _ = one.run(plan)
    assert torch.equal(inside, outside)


def test_threads_do_not_share_the_buffers(case):
    from concurrent.futures import ThreadPoolExecutor

    cases = [case([200], Hq=4, Hkv=2, seed=seed) for seed in range(8)]
    plans = [one.random_plan(32, seed=seed) for seed, one in enumerate(cases)]
    want = [one.run(plan)[0] for one, plan in zip(cases, plans, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda pair: pair[0].run(pair[1])[0], zip(cases, plans, strict=True)))
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5


def test_dense_attention_of_a_whole_batch(case):
    one = case([70, 1, 33], [70, 45, 90], Hq=4, Hkv=2, gap=3)
    out, lse = dense_attention(one.q, one.keys, one.lens, scale=one.scale, return_lse=True)
    want, want_lse = one.exact()
    real = one.real_rows()
    assert (out - want).abs().max() <= 1e-5
    assert (lse - want_lse)[:, real].abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [4, 40], ids=["decode", "prefill"])
def test_a_plan_without_any_block_gives_zero_and_no_mass(dtype: torch.dtype, length: int) -> None:
    lens = Ragged.of([length], [64])
    q, k = torch.randn(length, 2, 16).to(dtype), torch.randn(64, 2, 16).to(dtype)
    keys = ContiguousKeys(k=k, v=k, start=torch.zeros(1, dtype=torch.int64), kv_len=lens.kv_len)
    nothing = torch.zeros(1, 2, 4, dtype=torch.bool)
    out, lse = block_sparse_attention(q, keys, VerticalSlashPlan(16, nothing, nothing), lens, scale=0.25, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("q_len", [5, 40])
def test_autocast_does_not_reach_the_products(case, q_len):
    one = case([q_len], [70], Hq=4, Hkv=2)
    plan = ImplicitPlan(block_size=16, window_blocks=2)
    want = one.run(plan)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(one.run(plan)[0], want)
