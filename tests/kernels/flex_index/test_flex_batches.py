"""Batches: ragged lengths, padding, pages, prefixes, short and empty sequences; and what attention over the plan gives."""

from __future__ import annotations

import pytest
import torch

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, PagedKeys, Ragged
from accel.kernels.block_sparse.api import block_sparse_attention
from accel.kernels.flex_index import flex_index

LENGTHS = [(129, 129), (40, 90), (63, 63), (17, 200)]      # (L, N)
impls = pytest.mark.parametrize("impl", ["cpu", "naive"])


def _join(cases, gap):
    """Several sequences in one q and one k tensor, `gap` rows of NaN before, between and behind them."""
    hole = {name: torch.full((gap, *getattr(cases[0], name).shape[1:]), torch.nan) for name in ("q", "k", "v")}
    q, k, v = (torch.cat([part for one in cases for part in (hole[name], getattr(one, name))] + [hole[name]]) for name in ("q", "k", "v"))
    q_start, k_start, at_q, at_k = [], [], 0, 0
    for one in cases:
        q_start.append(at_q + gap)
        k_start.append(at_k + gap)
        at_q, at_k = at_q + gap + one.q.shape[0], at_k + gap + one.k.shape[0]
    lens = Ragged.of([one.q.shape[0] for one in cases], [one.k.shape[0] for one in cases], q_start=q_start)
    return q, ContiguousKeys(k, v, torch.tensor(k_start), lens.kv_len), lens


@pytest.mark.parametrize("gap", [0, 23], ids=["packed", "padded"])
@pytest.mark.parametrize("options", [{}, {"tau": 1.0}, {"gqa_mode": "group_union", "tau": 0.2}], ids=["default", "query-aware", "union"])
@impls
def test_a_batch_gives_each_sequence_what_it_gets_alone(case, rule, options, gap, impl):
    cases = [case.random(L, N, Hq=4, Hkv=2, sharpness=2.0, seed=i) for i, (L, N) in enumerate(LENGTHS)]
    q, keys, lens = _join(cases, gap)
    found = flex_index(q, keys, lens, rule=rule(**options), scale=cases[0].scale, impl=impl)
    assert found.is_finite.all()
    for one, rows in zip(cases, lens.rows(), strict=True):
        assert torch.equal(found.plan.block_mask(rows), one.mask(rule(**options), impl))


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_on_either_side_changes_nothing(case, rule, pad):
    cases = [case.random(L, L, Hq=4, Hkv=2, seed=i) for i, L in enumerate((129, 61))]
    batch = {name: torch.full((2, 129, *getattr(cases[0], name).shape[1:]), torch.nan) for name in ("q", "k", "v")}
    start = [0, 68 if pad == "left" else 0]
    for b, one in enumerate(cases):
        for name, tensor in batch.items():
            tensor[b, start[b] : start[b] + one.q.shape[0]] = getattr(one, name)
    lens = Ragged.of([129, 61], [129, 61], q_start=[0, 129 + start[1]])
    cache = [batch[name].transpose(1, 2).contiguous() for name in ("k", "v")]
    keys = ContiguousKeys.from_cache(*cache, start=torch.tensor(start), kv_len=lens.kv_len)
    q = batch["q"].flatten(0, 1)
    plan = flex_index(q, keys, lens, rule=rule(), scale=cases[0].scale).plan
    out = block_sparse_attention(q, keys, plan, lens, scale=cases[0].scale, impl="naive")
    for one, rows in zip(cases, lens.rows(), strict=True):
        assert torch.equal(plan.block_mask(rows), one.mask(rule()))
        alone = block_sparse_attention(one.q, one.keys, one.index(rule()).plan, one.lens, scale=one.scale, impl="naive")
        torch.testing.assert_close(out[rows.q_start : rows.q_start + rows.q_len], alone)


def test_paged_keys_give_the_same_plan_as_contiguous_ones(case, rule):
    one = case.random(70, 101, Hq=4, Hkv=2)
    page_table = torch.tensor([[5, 0, 3, 8, 1, 6, 2]], dtype=torch.int32)
    pages = torch.full((9, 16, 2, 16), torch.nan)
    for i, page in enumerate(page_table[0].tolist()):
        rows = one.k[i * 16 : (i + 1) * 16]
        pages[page, : len(rows)] = rows
    keys = PagedKeys(pages, pages, page_table, torch.tensor([101]))
    found = flex_index(one.q, keys, one.lens, rule=rule(tau=0.2), scale=one.scale)
    assert torch.equal(found.plan.block_mask(one.rows), one.mask(rule(tau=0.2)))


def test_a_static_cache_longer_than_its_content_is_read_only_where_valid(case, rule):
    one = case.random(70, 101, Hq=4, Hkv=2)
    cache = torch.full((1, 2, 256, 16), torch.nan)
    cache[0, :, :101] = one.k.transpose(0, 1)
    keys = ContiguousKeys.from_cache(cache, cache.clone(), kv_len=torch.tensor([101]))
    assert torch.equal(flex_index(one.q, keys, one.lens, rule=rule(), scale=one.scale).plan.block_mask(one.rows), one.mask(rule()))


@impls
def test_empty_sequences_keep_nothing_and_short_ones_keep_everything(case, rule, impl):
    cases = [case.random(L, N, seed=i) for i, (L, N) in enumerate([(100, 100), (3, 90), (0, 60), (0, 0), (60, 60)])]
    q, keys, lens = _join(cases, 5)
    found = flex_index(q, keys, lens, rule=rule(min_q=32, min_kv=64), scale=cases[0].scale, impl=impl, diagnostics=True)
    assert [d is None for d in found.diagnostics] == [False, True, True, True, True]
    kept = [int(found.plan.block_mask(rows).sum()) for rows in lens.rows()]
    dense = [2 * rows.causal_tiles(16) for rows in lens.rows()]
    assert kept[0] < dense[0]
    assert kept[1:] == dense[1:]
    assert kept[2] == kept[3] == 0


def test_a_single_query_and_a_single_token_are_planned(case, rule):
    for L, N in [(1, 1), (1, 40), (2, 17)]:
        tiles = case.random(L, N).mask(rule())
        assert tiles[:, -1, 0].all()
        assert tiles[:, -1, -1].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_plan_of_lower_precision_inputs_is_that_of_the_same_numbers_in_fp32(case, rule, dtype):
    one = case.random(129, 150, Hq=4, Hkv=2)
    low = case(one.q.to(dtype), one.k.to(dtype), scale=one.scale)
    assert torch.equal(low.mask(rule()), case(low.q.float(), low.k.float(), scale=one.scale).mask(rule()))


def test_published_selection_ignores_the_scale_of_the_layer(case, rule):
    one = case.random(129, 129)
    scaled = case(one.q, one.k, scale=7 * one.scale)
    assert torch.equal(scaled.mask(rule(fidelity="published")), one.mask(rule(fidelity="published")))
    assert not torch.equal(scaled.mask(rule()), one.mask(rule()))


# --- attention over the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "L, N, options",
    [
        pytest.param(100, 140, {"gamma": 1.0}, id="gamma-1"),
        pytest.param(25, 32, {"gamma": 0.1}, id="two-blocks"),
        pytest.param(60, 60, {"gamma": 0.1, "min_kv": 64}, id="too-few-keys"),
        pytest.param(20, 100, {"gamma": 0.1, "min_q": 32}, id="too-few-queries"),
        pytest.param(100, 100, {"gamma": 0.1, "min_budget": 100}, id="budget-of-everything"),
    ],
)
def test_where_everything_is_kept_the_output_is_dense_attention(case, rule, L, N, options):
    one = case.random(L, N, Hq=4, Hkv=2)
    plan = one.index(rule(**options)).plan
    assert plan.density(one.lens, 4) == 1.0
    out = block_sparse_attention(one.q, one.keys, plan, one.lens, scale=one.scale, out=torch.full_like(one.q, torch.nan))
    dense = torch.einsum("hln,nhd->lhd", one.dense_probabilities(), one.v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(out.double(), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": 1.0}, {"tau": 0.0, "coverage": "token", "min_budget": 0}], ids=str)
def test_the_error_of_every_row_stays_below_twice_the_lost_mass(case, rule, options):
    # sparse-attention.md §1.3: ‖sparse − dense‖ ≤ 2·(1 − c)·max ‖v‖, c the dense mass of the kept keys
    one = case.random(150, 180, Hq=4, Hkv=2, sharpness=2.0)
    plan = one.index(rule(gamma=0.6, **options)).plan
    weights = one.dense_probabilities()
    held = (weights * one.token_mask(plan.block_mask(one.rows), 16)).sum(-1)
    assert held.min() < 0.9     # something is lost, or the bound says nothing
    out = block_sparse_attention(one.q, one.keys, plan, one.lens, scale=one.scale, out=torch.full_like(one.q, torch.nan))
    v = one.v.double().repeat_interleave(2, 1)
    error = (out.double() - torch.einsum("hln,nhd->lhd", weights, v)).norm(dim=-1).T
    limit = 2 * (1 - held) * v.norm(dim=-1).max(0).values[:, None] + 1e-4
    assert (error <= limit).all()


# --- what is refused -------------------------------------------------------------------------------------------------------------


def test_an_unknown_executor_is_named_with_the_known_ones(case, rule):
    with pytest.raises(OptionError, match="auto, cpu, naive"):
        case.random(20, 20).index(rule(), impl="fast")
    with pytest.raises(UnsupportedError, match="triton"):
        case.random(20, 20).index(rule(), impl="triton")


def test_shapes_that_do_not_fit_are_refused(case, rule):
    one = case.random(40, 60, Hq=4, Hkv=2)
    call = {"rule": rule(), "scale": 1.0}
    with pytest.raises(ValueError, match="tokens, heads, head_dim"):
        flex_index(one.q[None], one.keys, one.lens, **call)
    with pytest.raises(ValueError, match="does not fit"):
        flex_index(one.q[:, :3], one.keys, one.lens, **call)
    with pytest.raises(ValueError, match="does not fit"):
        flex_index(one.q[..., :8], one.keys, one.lens, **call)
    with pytest.raises(ValueError, match="2 sequences"):
        flex_index(one.q, one.keys, Ragged.of([20, 20], [30, 30]), **call)
    with pytest.raises(ValueError, match="60 keys held"):
        flex_index(one.q, one.keys, Ragged.of([40], [61]), **call)
    with pytest.raises(ValueError, match="70 queries"):
        flex_index(torch.zeros(70, 4, 16), one.keys, Ragged.of([70], [60]), **call)


def test_eight_bit_keys_are_refused(case, rule):
    one = case.random(40, 60)
    k = one.k.to(torch.float8_e4m3fn)
    keys = ContiguousKeys(k, k, torch.zeros(1, dtype=torch.int64), torch.tensor([60]))
    with pytest.raises(UnsupportedError, match="dequantise"):
        flex_index(one.q, keys, one.lens, rule=rule(), scale=1.0)
