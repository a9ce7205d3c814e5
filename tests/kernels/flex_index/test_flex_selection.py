"""What the selection of one sequence guarantees (sparse-attention.md §2.11), on every implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kernels.flex_index.naive import pooled_map

# L queries that are the last of N keys; often no multiple of the block, often behind a cached prefix
sizes = st.tuples(st.integers(1, 90), st.integers(0, 90)).map(lambda x: (x[0], x[0] + x[1]))
gammas = st.floats(0.05, 0.995)
taus = st.sampled_from([0.0, 0.1, 0.25, 0.84])
budgets = st.integers(0, 250)
seeds = st.integers(0, 2**31)
sharpnesses = st.sampled_from([0.0, 1.0, 4.0, 20.0])
quick = settings(max_examples=40)
impls = pytest.mark.parametrize("impl", ["cpu", "naive"])


@quick
@given(sizes, seeds, sharpnesses, gammas, taus, budgets, st.integers(0, 3), st.integers(1, 3), st.sampled_from(["published", "corrected"]))
def test_forced_blocks_are_kept_and_nothing_lies_above_the_diagonal(
    case, rule, size, seed, sharpness, gamma, tau, budget, sinks, local, fidelity
):
    one = case.random(*size, seed=seed, sharpness=sharpness)
    options = {"gamma": gamma, "tau": tau, "min_budget": budget, "sink_blocks": sinks, "local_blocks": local, "fidelity": fidelity}
    found = one.index(rule(**options, max_budget=budget + 16))
    tiles = found.plan.block_mask(one.rows)
    first = one.rows.first_block(16)
    for i in range(tiles.shape[1]):
        absolute = first + i
        assert tiles[:, i, : min(sinks, absolute + 1)].all()
        assert tiles[:, i, max(0, absolute - local + 1) : absolute + 1].all()
        assert not tiles[:, i, absolute + 1 :].any()
        assert found.plan.extra is None or not found.plan.extra[0, :, i, absolute + 1 :].any()


@impls
def test_forced_blocks_are_kept_beyond_the_maximum_budget(case, rule, impl):
    plan = case.random(150, 150).index(rule(tau=0.0, min_budget=0, max_budget=16, sink_blocks=3, local_blocks=2), impl).plan
    assert plan.vertical[0, 0].nonzero().flatten().tolist() == [0, 1, 2]
    assert plan.slash[0, 0].nonzero().flatten().tolist() == [0, 1]


@quick
@given(sizes, seeds, sharpnesses, st.tuples(gammas, gammas).map(sorted), taus, st.sampled_from(["global", "row"]), st.booleans())
def test_a_larger_gamma_only_adds_tiles(case, rule, size, seed, sharpness, both, tau, scope, is_reference):
    one = case.random(*size, seed=seed, sharpness=sharpness)
    options = {"coverage": "token", "slash_pooling": "reference", "fidelity": "published"} if is_reference else {}
    less, more = (one.mask(rule(gamma=gamma, tau=tau, qa_scope=scope, **options)) for gamma in both)
    assert not (less & ~more).any()


@quick
@given(sizes, seeds, sharpnesses, gammas, taus, st.tuples(budgets, budgets).map(sorted))
def test_a_larger_minimum_budget_only_adds_tiles(case, rule, size, seed, sharpness, gamma, tau, both):
    one = case.random(*size, seed=seed, sharpness=sharpness)
    less, more = (one.mask(rule(gamma=gamma, tau=tau, min_budget=budget)) for budget in both)
    assert not (less & ~more).any()


@quick
@given(sizes, seeds, sharpnesses, gammas, st.integers(0, 80), st.integers(0, 80))
def test_lines_stay_within_their_budgets(case, rule, size, seed, sharpness, gamma, low, extra):
    one = case.random(*size, seed=seed, sharpness=sharpness)
    plan = one.index(rule(gamma=gamma, tau=0.0, min_budget=low, max_budget=max(low + extra, 1))).plan
    nk = one.rows.key_blocks(16)
    fewest, most = min(nk, max(1, -(-low // 16))), min(nk, max(1, -(-(low + extra) // 16)))
    for lines in (plan.vertical, plan.slash):
        assert ((lines.sum(-1) >= fewest) & (lines.sum(-1) <= most)).all()


@quick
@given(sizes, seeds, sharpnesses, st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_a_larger_tau_only_adds_query_aware_heads(case, rule, size, seed, sharpness, both):
    one = case.random(*size, seed=seed, sharpness=sharpness, Hq=6, Hkv=2)
    less, more = (one.heads(rule(tau=tau)).is_query_aware for tau in both)
    assert not (less & ~more).any()


@quick
@given(sizes, seeds, sharpnesses, gammas)
def test_tau_zero_makes_no_head_query_aware_and_tau_above_root_ln_2_makes_every_head(case, rule, size, seed, sharpness, gamma):
    one = case.random(*size, seed=seed, sharpness=sharpness, Hq=4, Hkv=2)
    assert not one.heads(rule(gamma=gamma, tau=0.0)).is_query_aware.any()
    assert one.heads(rule(gamma=gamma, tau=0.8326)).is_query_aware.all()


@quick
@given(sizes, seeds, sharpnesses, gammas, st.integers(0, 3), st.integers(1, 3), st.sampled_from([None, 3.0]))
def test_vertical_slash_heads_hold_gamma_of_the_probe_rows(case, rule, size, seed, sharpness, gamma, sinks, local, softcap):
    # only of the mean of the probe rows: earlier rows carry no guarantee
    one = case.random(*size, seed=seed, sharpness=sharpness, softcap=softcap)
    options = rule(gamma=gamma, tau=0.0, min_budget=0, sink_blocks=sinks, local_blocks=local)
    inside = (one.dense_probabilities() * one.token_mask(one.mask(options), 16)).sum(-1)[:, -16:].mean(-1)
    assert (inside >= gamma - 1e-4).all()
    torch.testing.assert_close(one.heads(options).probe_coverage.double(), inside, atol=1e-5, rtol=0)


def test_token_coverage_may_lose_columns_that_block_coverage_keeps(case, rule):
    # one hot key in each of 20 blocks: 18 tokens hold gamma, which makes ⌈18 / 16⌉ = 2 blocks (sparse-attention.md §2.9, item 2)
    k = torch.zeros(320, 1, 8)
    k[5::16, 0, 0] = 60.0
    one = case(torch.ones(320, 1, 8), k)
    held = {}
    for coverage in ("token", "block"):
        found = one.index(rule(coverage=coverage, tau=0.0, min_budget=0))
        held[coverage] = (found.diagnostics[0].vertical_mass * found.plan.vertical[0]).sum().item()
    assert held["token"] < 0.15
    assert held["block"] >= 0.9


@pytest.mark.parametrize("L, N", [(100, 100), (96, 96), (70, 155), (5, 40)])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@impls
def test_query_aware_heads_hold_gamma_of_the_pooled_map(case, rule, L, N, gamma, impl):
    one = case.random(L, N, sharpness=8.0)
    for scope in ("global", "row"):
        options = rule(gamma=gamma, tau=1.0, qa_scope=scope, min_budget=0)
        tiles = one.mask(options, impl)
        for h in range(2):
            means = torch.stack([part.mean(0) for part in one.k[:, 0].double().split(16)])
            pooled = pooled_map(one.q[:, h].double(), means, one.rows, 16, one.scale, None)
            held = (pooled * tiles[h]).sum(-1)
            assert held.sum() >= gamma * len(held) - 1e-6
            assert scope == "global" or (held >= gamma - 1e-6).all()


def test_published_query_aware_sets_stop_short_of_gamma(case, rule):
    one = case.random(160, 160, sharpness=8.0)
    corrected, published = (one.index(rule(tau=1.0, fidelity=fidelity)).plan.extra for fidelity in ("corrected", "published"))
    assert (corrected.sum((-1, -2)) == published.sum((-1, -2)) + 1).all()
    assert not (published & ~corrected).any()


@impls
@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_gamma_beyond_rounding_lists_no_tile_above_the_diagonal(case, rule, scope, impl):
    # the sum of the map rounds to less than gamma: everything is needed, empty tiles included (sparse-attention.md §2.9, item 10)
    one = case.random(100, 120)
    plan = one.index(rule(gamma=1 - 1e-15, tau=1.0, qa_scope=scope), impl).plan
    first = one.rows.first_block(16)
    assert all(not plan.extra[0, :, i, first + i + 1 :].any() for i in range(plan.extra.shape[2]))
    assert plan.extra[0, :, -1, :].all()


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("G", [1, 3, 8], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("L, N", [(129, 129), (63, 100), (200, 216), (48, 148)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"tau": 1.0}, id="query-aware"),
        pytest.param({"tau": 1.0, "qa_scope": "row"}, id="query-aware-rows"),
        pytest.param({"coverage": "token", "slash_pooling": "reference", "fidelity": "published"}, id="published"),
        pytest.param({"size_corrected_estimate": True, "sink_blocks": 2, "local_blocks": 3, "tau": 0.2}, id="corrected-sizes"),
        pytest.param({"gqa_mode": "group_union", "max_budget": 48}, id="union"),
    ],
)
def test_the_streaming_selection_equals_the_definition(case, rule, options, L, N, G, softcap):
    one = case.random(L, N, Hq=2 * G, Hkv=2, D=24, seed=G, sharpness=1.5, softcap=softcap)
    fast, exact = (one.index(rule(**options), impl) for impl in ("cpu", "naive"))
    assert torch.equal(fast.plan.block_mask(one.rows), exact.plan.block_mask(one.rows))
    for field in dataclasses.fields(fast.diagnostics[0]):
        got, want = (getattr(found.diagnostics[0], field.name).double() for found in (fast, exact))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0, equal_nan=True, msg=lambda text, name=field.name: f"{name}: {text}")


@impls
def test_permuted_heads_give_permuted_tiles(case, rule, impl):
    one = case.random(100, 120, Hq=6, Hkv=2, sharpness=2.0)
    order = torch.tensor([4, 3, 5, 1, 2, 0])    # groups swapped, and heads inside them
    permuted = case(one.q[:, order], one.k[:, [1, 0]])
    assert torch.equal(permuted.mask(rule(tau=0.15), impl), one.mask(rule(tau=0.15), impl)[order])


@impls
@pytest.mark.parametrize("G", [1, 3, 8], ids=lambda g: f"G{g}")
def test_grouped_heads_equal_repeated_keys(case, rule, G, impl):
    one = case.random(77, 100, Hq=2 * G, Hkv=2, sharpness=2.0)
    repeated = case(one.q, one.k.repeat_interleave(G, 1))
    assert torch.equal(one.mask(rule(tau=0.15), impl), repeated.mask(rule(tau=0.15), impl))


def test_a_group_union_gives_every_head_the_tiles_of_its_group(case, rule):
    one = case.random(128, 160, Hq=6, Hkv=2, sharpness=6.0)
    each, union = (one.mask(rule(tau=0.3, gqa_mode=mode)) for mode in ("per_head", "group_union"))
    assert not torch.equal(each, union)
    for group in (slice(0, 3), slice(3, 6)):
        assert torch.equal(union[group], each[group].any(0).expand(3, -1, -1))


@impls
def test_a_hot_column_is_kept(case, rule, impl):
    q, k = torch.ones(200, 1, 16), 0.1 * torch.randn(200, 1, 16, generator=torch.Generator().manual_seed(0))
    k[70] = 5.0
    found = case(q, k).index(rule(tau=0.0), impl)
    assert found.plan.vertical[0, 0].nonzero().flatten().tolist() == [0, 70 // 16]
    assert found.diagnostics[0].vertical_tokens.item() == 1
    # the same column is another distance for every probe row
    assert found.diagnostics[0].slash_tokens.item() > 10


def _line_share(lines, N, distance, b):
    """Share of the rows that reach back `distance` whose key lies on a kept block diagonal."""
    kept = [bool(lines[t // b - (t - distance) // b]) for t in range(distance, N)]
    return sum(kept) / len(kept)


def _hot_distance(case, N, distance):
    """A head in which every token looks back by `distance`, and nowhere else."""
    code = torch.randn(N + distance, 1, 128, generator=torch.Generator().manual_seed(0))
    code /= code.norm(dim=-1, keepdim=True)
    return case(40 * code[:N], code[distance:], scale=1.0)


@pytest.mark.parametrize("N", [320, 311], ids=["on-the-grid", "ragged"])
@pytest.mark.parametrize("distance", [64, 66, 72, 79, 95])
@impls
def test_a_hot_distance_is_covered_over_all_rows(case, rule, N, distance, impl):
    b, gamma = 16, 0.9
    slash = _hot_distance(case, N, distance).index(rule(gamma=gamma, tau=0.0), impl).plan.slash[0, 0]
    near, beyond = divmod(distance, b)
    assert _line_share(slash, N, distance, b) >= gamma
    if min(beyond, b - beyond) / b > 1 - gamma:
        assert slash[near]
        assert slash[near + 1]


def test_reference_pooling_loses_most_of_a_line_just_below_a_block_multiple(case, rule):
    # sparse-attention.md §2.5.4: distance 79 = 4·16 + 15 lies on diagonal 5 for 15 of 16 rows, but is counted for 4
    one = _hot_distance(case, 320, 79)
    published = one.index(rule(tau=0.0, coverage="token", slash_pooling="reference", fidelity="published")).plan.slash[0, 0]
    assert _line_share(published, 320, 79, 16) < 0.1


@impls
def test_a_block_constant_map_is_query_aware_and_its_hot_tiles_are_kept(case, rule, impl):
    g = torch.Generator().manual_seed(3)
    code = torch.randn(12, 64, generator=g)
    code /= code.norm(dim=-1, keepdim=True)
    hot = [0, *(int(torch.randint(0, i, (1,), generator=g)) for i in range(1, 12))]
    q, k = (14 * code[hot]).repeat_interleave(16, 0)[:, None], code.repeat_interleave(16, 0)[:, None]
    one = case(q, k, scale=1.0)
    assert one.heads(rule(), impl).is_query_aware.item()
    # 12 rows with one hot tile each: 0.95 · 12 needs all of them, 0.9 · 12 would do with 11
    tiles = one.mask(rule(gamma=0.95), impl)[0]
    assert all(tiles[i, hot[i]] for i in range(12))
    assert tiles.sum() < 60     # of 78: the hot tiles are not kept because everything is


@impls
def test_gamma_one_keeps_every_tile_and_counts_as_dense(case, rule, impl):
    one = case.random(70, 100)
    plan = one.index(rule(gamma=1.0), impl).plan
    assert plan.density(one.lens, 2) == 1.0


@impls
@pytest.mark.parametrize("where", ["query", "key", "infinite key"])
def test_a_head_that_sees_nan_keeps_every_tile_and_says_so(case, rule, where, impl):
    one = case.random(100, 120, Hq=4, Hkv=2)
    if where == "query":
        one.q[-3, 1, 5] = torch.nan
    else:
        one.k[17, 0, 3] = torch.nan if where == "key" else torch.inf
    found = one.index(rule(tau=0.0), impl)
    # a logit of −inf is only a key without attention: one of the heads may bear the infinite key
    spoilt = one.dense_probabilities()[:, -16:].isnan().any(-1).any(-1)
    assert spoilt.tolist()[1:] == [True, False, False]
    assert torch.equal(found.is_finite[0], ~spoilt)
    rows = next(one.lens.rows())
    tiles = found.plan.block_mask(rows)
    assert tiles[spoilt].sum() == rows.causal_tiles(16) * int(spoilt.sum())
    clean = case.random(100, 120, Hq=4, Hkv=2).mask(rule(tau=0.0), impl)
    assert torch.equal(tiles[~spoilt], clean[~spoilt])


@impls
def test_nan_in_a_query_before_the_probe_only_matters_to_query_aware_heads(case, rule, impl):
    one = case.random(100, 120)
    one.q[4] = torch.nan
    assert one.index(rule(tau=0.0), impl).is_finite.all()
    aware = one.index(rule(tau=1.0, max_budget=32), impl)
    assert not aware.is_finite.any()
    assert aware.plan.density(one.lens, 2) == 1.0


def test_a_query_aware_map_may_be_computed_a_few_heads_at_a_time(case, rule, monkeypatch):
    one = case.random(100, 120, Hq=6, Hkv=2)
    whole = one.mask(rule(tau=1.0))
    monkeypatch.setattr("accel.kernels.flex_index.select._MAP_ELEMENTS", 1)
    assert torch.equal(one.mask(rule(tau=1.0)), whole)
