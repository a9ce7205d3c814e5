"""What the GPU's checks and benchmarks are given: pages, plans of a density, drawn prompts."""

from __future__ import annotations

import pytest
import torch

from accel.evals.gpu.cases import Call, Prompt, lines_of_density, lists_of_density, random_plan, work_of
from accel.kernels.block_sparse import ImplicitPlan, PagedKeys
from accel.kernels.block_sparse.naive import naive_attention
from accel.kernels.flex_index import SelectionRule, flex_index

CPU = torch.device("cpu")


def test_paged_calls_hold_the_same_keys():
    options = {"heads": (2, 1), "head_dim": 8, "dtype": torch.float32, "device": CPU}
    flat, pages = (Call.random([20, 3], [20, 40], page_size=size, **options) for size in (0, 16))
    assert isinstance(pages.keys, PagedKeys)
    for b in range(2):
        for a, c in zip(flat.keys.tokens(b), pages.keys.tokens(b), strict=True):
            assert torch.equal(a, c)


@pytest.mark.parametrize("make", [lists_of_density, lines_of_density])
def test_plans_have_about_the_density_asked_for(make):
    plan = make(8192, 3, 64, 0.25, CPU)
    rows = next(Prompt.random(8192, (3, 3), 8, torch.float32, CPU).call.lens.rows())
    mask = plan.block_mask(rows)
    assert mask[:, :, 0].all()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    work = work_of(plan, 8192, 6)
    assert work.density == pytest.approx(mask.float().mean().item() * 128 * 128 / (128 * 129 / 2))
    assert work.density == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(mask[0], mask[1])
    # six heads share the plans of three; blocks on the diagonal count with 64 · 65 / 2 pairs
    own = 3 * 128
    assert work.pairs == 2 * ((int(mask.sum()) - own) * 64 * 64 + own * 64 * 65 // 2)


def test_lists_are_ascending_without_the_own_block():
    plan = lists_of_density(1024, 2, 64, 0.4, CPU)
    for i in range(16):
        listed = plan.full_index[0, 1, i, : plan.full_count[0, 1, i]].tolist()
        assert listed == sorted(set(listed))
        assert all(j < i for j in listed)


def test_dense_work_is_the_triangle():
    assert work_of(None, 256, 2).pairs == work_of(ImplicitPlan.dense(64), 256, 2).pairs == 2 * 256 * 257 // 2
    # two products of 128 · 2 operations per pair
    assert work_of(None, 256, 2).tflops(128, 1.0) == pytest.approx(2 * 256 * 257 / 2 * 4 * 128 / 1e9)


def test_lifelike_prompts_have_structure():
    prompt = Prompt.lifelike(512, (2, 1), 32, torch.float32, CPU)
    call = prompt.call
    plan = random_plan("window", call, 32)
    out, lse = naive_attention(call.q, call.keys, plan, call.lens, scale=call.scale)
    _, dense_lse = naive_attention(call.q, call.keys, ImplicitPlan.dense(32), call.lens, scale=call.scale)
    assert out.isfinite().all()
    # sink and two blocks hold far more of the attention than their share of keys in the last rows
    assert (lse - dense_lse)[:, -64:].exp().mean() > 0.3


def test_longer_lifelike_prompts_are_thinner():
    density = {}
    for n in (16384, 65536):
        call = Prompt.lifelike(n, (8, 2), 64, torch.float32, CPU).call
        plan = flex_index(call.q, call.keys, call.lens, rule=SelectionRule(), scale=call.scale).plan
        rows = next(call.lens.rows())
        density[n] = plan.block_mask(rows).sum((1, 2)) / rows.causal_tiles(128)
    assert 0.3 < density[65536].mean() < density[16384].mean() < 0.7
    # some heads look near, others everywhere
    assert density[65536].max() - density[65536].min() > 0.5
