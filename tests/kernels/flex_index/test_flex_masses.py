"""The probe's reductions, the token counts and the distance: golden values, sums, exact splits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kernels.block_sparse import Rows
from accel.kernels.flex_index import naive
from accel.kernels.flex_index.counts import count_to_reach
from accel.kernels.flex_index.probe import run_probe
from accel.kernels.flex_index.rule import SelectionRule
from accel.kernels.flex_index.select import js_distance, slash_block_mass

# sparse-attention.md §2.11: N, b, a_v[0], a_v[N-1], K_v = K_s at gamma 0.9, u_v, distance
GOLDEN = [
    pytest.param(8, 2, 0.133929, 0.062500, 7, [0.267857] * 3 + [0.196429], 0.045530, id="N8-b2"),
    pytest.param(1024, 128, 0.001043, 0.0000076, 864, [0.133462] * 7 + [0.065768], 0.071829, id="N1024-b128"),
    pytest.param(1000, 128, 0.001069, 0.0000078, 842, [0.136892] * 6 + [0.134443, 0.044202], 0.104627, id="N1000-b128"),
]


@pytest.mark.parametrize("impl", ["cpu", "naive"])
@pytest.mark.parametrize("N, b, first, last, count, by_block, distance", GOLDEN)
def test_uniform_attention_gives_the_golden_values(case, N, b, first, last, count, by_block, distance, impl):
    uniform = case.uniform(N)
    found = uniform.heads(SelectionRule(block_size=b, gamma=0.9, min_budget=0), impl)
    by_key = run_probe(uniform.q, uniform.k.transpose(0, 1), uniform.rows, block_size=b, scale=1.0, softcap=None).column_mass[0]
    assert by_key[0].item() == pytest.approx(first, abs=6e-7)
    assert by_key[-1].item() == pytest.approx(last, abs=6e-8)
    assert found.vertical_tokens.tolist() == found.slash_tokens.tolist() == [count]
    assert found.vertical_mass[0].tolist() == pytest.approx(by_block, abs=6e-7)
    assert found.distance.item() == pytest.approx(distance, abs=2e-6)


def test_a_partial_last_block_flips_the_class_of_uniform_attention_unless_sizes_are_corrected(case):
    ragged = case.uniform(1000)
    assert not ragged.heads(SelectionRule(block_size=128, min_budget=0)).is_query_aware.item()
    corrected = ragged.heads(SelectionRule(block_size=128, min_budget=0, size_corrected_estimate=True))
    assert corrected.is_query_aware.item()
    # equal logits plus ln of the visible keys are the true shares, but for the rows' different lengths: 0.0023 against 0.1046
    assert corrected.distance.item() < 0.005


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("L, N", [(63, 63), (129, 129), (48, 48), (33, 200), (5, 90), (1, 40)])
def test_every_mass_sums_to_one_and_matches_the_dense_attention_of_the_probe_rows(case, L, N, softcap):
    one = case.random(L, N, Hq=4, Hkv=2, softcap=softcap)
    b = 16
    probe = run_probe(one.q, one.k.transpose(0, 1), one.rows, block_size=b, scale=one.scale, softcap=softcap)
    dense = one.dense_probabilities()[:, -min(b, L) :]
    for mass in (probe.column_mass, probe.distance_mass, probe.tile_mass.flatten(1)):
        assert mass.sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    torch.testing.assert_close(probe.column_mass.double(), dense.mean(1), atol=1e-6, rtol=1e-5)
    by_distance = torch.stack([naive.distance_mass(head) for head in dense])
    torch.testing.assert_close(probe.distance_mass.double(), by_distance, atol=1e-6, rtol=1e-5)
    for pooling in ("split", "reference"):
        u_s = slash_block_mass(probe.distance_mass, SelectionRule(block_size=b, slash_pooling=pooling))
        assert u_s.sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize("N", [128, 121], ids=["on-the-grid", "straddling"])
def test_slash_sums_split_as_the_place_inside_the_grid_blocks_says(case, N):
    # design.md §4, tile by tile: of a key at block distance d, 1 − a goes to d, and a to d + 1 (r > c) or d − 1 (r < c), a = |r − c| / b
    b, one = 16, case.random(N, N)
    dense = one.dense_probabilities()[0, -b:]
    want = torch.zeros(math.ceil(N / b), dtype=torch.float64)
    for row, position in enumerate(range(N - b, N)):
        for key in range(position + 1):
            d, r, c = position // b - key // b, position % b, key % b
            a, mass = abs(r - c) / b, dense[row, key] / b
            want[d] += (1 - a) * mass
            want[min(d + 1, len(want) - 1) if r > c else d - 1] += a * mass
    torch.testing.assert_close(one.heads(SelectionRule(block_size=b)).slash_mass[0].double(), want, atol=1e-6, rtol=1e-5)


def test_reference_pooling_cuts_runs_from_the_largest_distance_down():
    mass = torch.arange(1.0, 8.0)[None]     # N = 7, distances 0 … 6
    rule = SelectionRule(block_size=3, slash_pooling="reference")
    # runs from the far end: distances 6 5 4, then 3 2 1, then 0
    assert slash_block_mass(mass, rule).tolist() == [[1.0, 2.0 + 3.0 + 4.0, 5.0 + 6.0 + 7.0]]


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 400), st.floats(0.01, 0.999), st.sampled_from([0.5, 1.0, 8.0, 40.0]), st.booleans())
def test_counting_without_a_sort_equals_counting_with_one(seed, n, share, sharpness, has_ties):
    logits = torch.randn(3, n, generator=torch.Generator().manual_seed(seed)) * sharpness
    mass = (logits.round() if has_ties else logits).softmax(-1)
    total = mass.double().sort(dim=-1, descending=True).values.cumsum(-1)
    count = count_to_reach(mass, share)
    for row in range(3):
        k = int(count[row])
        # rounding of the last sum may move the count by one entry of that size, never further
        assert total[row, k - 1] >= share - 1e-12 or k == n
        assert k == 1 or total[row, k - 2] < share + 1e-12
    published = count_to_reach(mass, share, is_published=True)
    assert ((published == count) | (published == count + 1)).all()


def test_the_published_count_takes_one_more_where_a_prefix_hits_gamma_exactly():
    mass = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]])
    assert count_to_reach(mass, 0.75).tolist() == [2, 3]
    assert count_to_reach(mass, 0.75, is_published=True).tolist() == [3, 4]


def test_a_share_that_is_never_reached_and_nan_count_every_entry():
    mass = torch.tensor([[0.25, 0.25, 0.0], [math.nan, 0.5, 0.5], [0.0, 0.0, 0.0]])
    assert count_to_reach(mass, 0.9).tolist() == [3, 3, 3]


def test_the_distance_is_zero_for_equal_and_root_ln_2_for_disjoint_distributions():
    p = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).mul(4).softmax(-1)
    assert js_distance(p, p).tolist() == [0.0] * 5
    left, right = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.25, 0.75]])
    assert js_distance(left, right).item() == pytest.approx(math.sqrt(math.log(2)), abs=1e-7)
    assert naive.js_distance(left[0], right[0], is_guarded=True) == pytest.approx(math.sqrt(math.log(2)), abs=1e-12)


def test_zeros_and_nearly_equal_distributions_never_give_nan():
    # sparse-attention.md §2.6: the published formula is NaN for both, and files such heads as vertical-slash
    with_zero = torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.0, 1.0]])
    other = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    assert js_distance(with_zero, other).isfinite().all()
    assert js_distance(with_zero, other, is_guarded=False).isnan().all()
    p = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    q = (p * (1 + 1e-7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))).clamp_min(0)
    assert js_distance(p, q).isfinite().all()
    assert js_distance(p, q).max() < 1e-3
    assert js_distance(p, q, is_guarded=False).isnan().any()
    # closer than the rounding of fp64: the sum of the terms turns negative
    closer = p.double() * (1 + 1e-12 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    assert js_distance(p.double(), closer).isfinite().all()


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60))
def test_the_distance_is_symmetric_and_bounded(seed, n):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(n, generator=g).mul(20).softmax(-1) for _ in range(2))
    d = js_distance(p, q).item()
    assert 0.0 <= d <= math.sqrt(math.log(2)) + 1e-6
    assert d == pytest.approx(js_distance(q, p).item(), abs=1e-6)
    assert d == pytest.approx(naive.js_distance(p.double(), q.double(), is_guarded=True), abs=1e-6)


def test_probe_rows_are_counted_by_their_own_query_block():
    # 20 keys in blocks of 8: the 8 probe rows 12 … 19 lie in blocks 1 and 2, four in each
    q, k = torch.zeros(20, 1, 4), torch.zeros(1, 20, 4)
    tiles = run_probe(q, k, Rows(0, 0, 20, 20), block_size=8, scale=1.0, softcap=None).tile_mass[0]
    assert tiles.shape == (2, 3)
    assert tiles.sum(-1).tolist() == pytest.approx([0.5, 0.5])
    assert tiles[0, 2].item() == 0.0


def test_the_default_dtype_of_torch_changes_nothing(case):
    # buffers of the default dtype raised in the product, or kept sums in bf16
    one = case.random(100, 300)
    options = {"block_size": 32, "scale": one.scale, "softcap": None}
    want = run_probe(one.q, one.k.transpose(0, 1), one.rows, **options)
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = run_probe(one.q, one.k.transpose(0, 1), one.rows, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.column_mass, want.column_mass)
    assert torch.equal(got.distance_mass, want.distance_mass)
    assert torch.equal(got.mean_keys, want.mean_keys)
