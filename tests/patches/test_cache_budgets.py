"""What every cache method with one budget for all heads promises: options, budgets per head, rows that do not meet, guidance pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from next_scale import INFO, SHAPES, context, last_logits, tiny_infinity, tiny_var

import accel
from accel.errors import OptionError
from accel.patches._cache import CacheBudget, attention_received, budget, evenly_spread, largest
from accel.patches._head_budgets import HeadBudgets
from accel.protocols import HeadGroup
from accel.recipe import Recipe
from accel.registry import build, method_class, method_names

# HACK without a profile treats all heads alike too, but protects entries; it has tests of its own
UNIFORM = [name for name in method_names() if issubclass(method_class(name), CacheBudget) and name != "hack"]
SCORED = [name for name in UNIFORM if "share_cfg_selection" in build(name).options()]
# the others divide one budget among layers anew at every scale
EQUAL = [name for name in UNIFORM if not build(name, {"keep": 0.5}).needs().every_step]  # type: ignore[attr-defined]
GROUP = HeadGroup((0, 1, 2, 3), 9)


def test_there_are_five() -> None:
    assert UNIFORM == ["cake", "h2o", "random_kv", "snapkv", "streaming_kv"]
    assert SCORED == ["cake", "h2o", "snapkv"]


# --- options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIFORM)
@pytest.mark.parametrize("keep", [0, 0.0, 1, -0.5, 1.5, True, "0.5", None, float("nan")], ids=str)
def test_a_keep_that_is_neither_share_nor_count_raises(name: str, keep: Any) -> None:
    with pytest.raises(OptionError, match=f"{name}: keep must be a share in"):
        build(name, {"keep": keep})


@pytest.mark.parametrize("name", UNIFORM)
def test_options_survive_a_recipe(name: str) -> None:
    for keep in (0.25, 64):
        method = build(name, {"keep": keep})
        assert Recipe.from_dict(Recipe.of(method).as_dict()).methods == (method,)


@pytest.mark.parametrize("name", UNIFORM)
def test_what_divides_budgets_from_scale_to_scale_refuses_models_without_scales(name: str) -> None:
    reasons = build(name).supports(replace(INFO, scale_shapes=None), "transformers", [])
    assert bool(reasons) == (not issubclass(method_class(name), HeadBudgets))
    assert all("needs a next-scale model" in reason for reason in reasons)
    assert build(name).supports(INFO, "nextscale", []) == []


@pytest.mark.parametrize("name", SCORED)
def test_share_cfg_selection_is_true_or_false(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}: share_cfg_selection must be true or false"):
        build(name, {"share_cfg_selection": 1})


# --- budgets ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, keep, expected", [(680, 0.3, 204), (100, 0.29, 29), (680, 1.0, 680), (10521, 0.3, 3156), (30, 0.01, 1), (30, 7, 7), (30, 99, 30)]
)
def test_a_budget_is_the_floor_of_a_share_or_the_count(n: int, keep: float, expected: int) -> None:
    assert budget(n, keep) == expected


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("keep, entries", [(0.5, 15), (0.2, 6), (7, 7), (2, 2), (0.04, 1)])
def test_every_head_keeps_exactly_its_budget_at_every_scale(name: str, keep: float, entries: int) -> None:
    model = tiny_var()
    with accel.apply(model, name, keep=keep) as handle:
        model.generate_codes([1, 2, 3], seed=0)
    cache = handle.stats.cache
    # 6 rows, 4 heads, 2 layers
    for scale, end in enumerate((1, 5, 14, 30)):
        assert cache.total[scale] == 48 * end
        assert cache.attended[scale] == 48 * min(end, entries)
        assert cache.cached[scale] == (48 * min(end, entries) if scale < 3 else 0)
    # two tensors of 8 channels in fp32, and a position where something was dropped; the mass where a method asks for it
    held = min(14, entries)
    per_entry = 2 * 8 * 4 + (4 if entries < 14 else 0) + (4 if build(name).needs().attention_mass else 0)  # type: ignore[attr-defined]
    assert cache.peak_bytes == 48 * held * per_entry
    assert cache.whole_bytes == 48 * 14 * 64


@pytest.mark.parametrize("name", UNIFORM)
def test_fewer_entries_are_fewer_bytes(name: str) -> None:
    model = tiny_infinity()
    peaks = []
    for keep in (1.0, 0.3, 0.2, 0.1):
        with accel.apply(model, name, keep=keep) as handle:
            model.generate_codes([torch.ones(3, 24)], seed=0, schedule=[1, 2, 3, 4])
        peaks.append(handle.stats.cache.peak_bytes)
    assert peaks == sorted(set(peaks), reverse=True)
    assert peaks[3] < 0.25 * peaks[0]


@pytest.mark.parametrize("name", UNIFORM)
def test_the_cache_of_a_method_is_released_behind_the_last_scale(name: str) -> None:
    method: Any = build(name)
    assert [method.release(INFO, 0, step=step) for step in range(4)] == [False, False, False, True]


# --- rows and heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIFORM)
def test_indexes_ascend_and_name_no_entry_twice(name: str) -> None:
    method: Any = build(name)
    index = method.select(context(14), GROUP).cache_index
    assert index.shape == (2, 4, 9)
    assert (index.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", UNIFORM)
def test_padding_is_kept_only_where_nothing_else_is_left(name: str) -> None:
    method: Any = build(name)
    valid = torch.ones(2, 4, 30, dtype=torch.bool)
    valid[0, :, 20:] = False
    valid[1, 2, 4:] = False
    index = method.select(context(14, valid=valid), GROUP).cache_index
    assert valid.gather(2, index).sum(-1).tolist() == [[9, 9, 9, 9], [9, 9, 4, 9]]


@pytest.mark.parametrize("name", EQUAL)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model = tiny_var()
    with accel.apply(model, name, keep=0.2):
        together = last_logits(model, [1, 2, 3], seed=[5, 6, 7])
        alone = [last_logits(model, [label], seed=[seed]) for label, seed in ((1, 5), (2, 6), (3, 7))]
    # conditional rows, then unconditional ones
    torch.testing.assert_close(together, torch.cat([torch.cat([one[half : half + 1] for one in alone]) for half in (0, 1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNIFORM)
def test_conditional_rows_do_not_depend_on_unconditional_ones(name: str) -> None:
    method: Any = build(name)
    ctx = context(14, batch=4, has_guidance_pairs=True)
    other = context(14, batch=4, seed=1)
    mixed = replace(ctx, **{part: torch.cat([getattr(ctx, part)[:2], getattr(other, part)[2:]]) for part in ("q", "k", "v")})
    assert torch.equal(method.select(mixed, GROUP).cache_index[:2], method.select(ctx, GROUP).cache_index[:2])


@pytest.mark.parametrize("name", SCORED)
def test_guidance_pairs_select_alike_where_the_option_says_so(name: str) -> None:
    ctx = context(14, batch=4, has_guidance_pairs=True)
    for shares in (False, True):
        method: Any = build(name, {"share_cfg_selection": shares})
        index = method.select(ctx, GROUP).cache_index
        assert torch.equal(index[:2], index[2:]) == shares
        assert not torch.equal(index[0], index[1]), "different images"
        # without pairs the option has nothing to say
        unpaired = method.select(replace(ctx, has_guidance_pairs=False), GROUP).cache_index
        assert torch.equal(unpaired, index) == (not shares)


@pytest.mark.parametrize("name", ["random_kv", "streaming_kv"])
def test_methods_without_scores_always_select_alike_for_a_pair(name: str) -> None:
    method: Any = build(name)
    index = method.select(context(14, batch=4, has_guidance_pairs=True), GROUP).cache_index
    assert torch.equal(index[:2], index[2:])


@pytest.mark.parametrize("name", SCORED)
def test_heads_select_on_their_own(name: str) -> None:
    method: Any = build(name)
    ctx = context(14)
    index = method.select(ctx, GROUP).cache_index
    assert not torch.equal(index[:, 0], index[:, 1])
    order = [2, 0, 3, 1]
    turned = replace(ctx, **{part: getattr(ctx, part)[:, order] for part in ("q", "k", "v")})
    assert torch.equal(method.select(turned, GROUP).cache_index, index[:, order])


# --- the shared functions -----------------------------------------------------------------------------------------------------


def test_largest_takes_forced_places_first_and_ties_to_the_lower() -> None:
    scores = torch.tensor([1.0, torch.inf, 3.0, 3.0, -torch.inf, 3.0])
    assert largest(scores, 3).tolist() == [1, 2, 3]
    # one that is −inf stays when it is forced, and one that is inf goes when all places are taken
    forced = torch.tensor([True, False, False, False, True, False])
    assert largest(scores, 2, forced=forced).tolist() == [0, 4]
    assert largest(scores, 3, forced=forced).tolist() == [0, 1, 4]


def test_spread_rows_are_the_middles_of_equal_parts() -> None:
    assert evenly_spread(16, 4, torch.device("cpu")).tolist() == [2, 6, 10, 14]
    assert evenly_spread(9, 3, torch.device("cpu")).tolist() == [1, 4, 7]
    assert evenly_spread(4, 32, torch.device("cpu")).tolist() == [0, 1, 2, 3]


def test_attention_received_is_the_column_sum_over_rows_and_query_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 16, 8, generator=generator)
    ctx = replace(context(14, q=q), scale=0.5, softcap=2.0)
    rows = torch.tensor([0, 3, 15])
    expected = torch.zeros(2, 4, 30)
    for head in range(8):
        logits = 2.0 * torch.tanh(q[:, head, rows] @ ctx.k[:, head // 2].mT * 0.5 / 2.0)
        expected[:, head // 2] += logits.softmax(-1).sum(1)
    torch.testing.assert_close(attention_received(ctx, rows), expected)


def test_the_scales_of_these_tests_are_those_of_the_model() -> None:
    assert tiny_var().schedule.sizes == SHAPES
