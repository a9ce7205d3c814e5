"""What token-pruning methods share: budgets, stable selection, scopes, newlines, and options that explain themselves."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_contexts import INFO, Grid, assert_well_formed, context, kept_of, maps, places, random_maps
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches import _tokens
from accel.patches.fastervlm import FasterVLM
from accel.patches.random_tokens import RandomTokens
from accel.protocols import Unit
from accel.registry import build


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    _tokens._warn_once.cache_clear()


# --- budgets ------------------------------------------------------------------------------------------------------------------

SHARES = (0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)
TABLE = {
    576: (432, 288, 144, 58, 29, 6, 1),
    729: (547, 365, 182, 73, 36, 7, 1),
    256: (192, 128, 64, 26, 13, 3, 1),
    196: (147, 98, 49, 20, 10, 2, 1),
    1: (1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("n", TABLE)
def test_budget_is_the_published_table(n: int) -> None:
    assert tuple(_tokens.budget(n, share) for share in SHARES) == TABLE[n]


@pytest.mark.parametrize(
    ("n", "keep", "min_tokens", "expected"),
    [
        (25, 1 - 0.9, 1, 3), (10, 4, 1, 4), (10, 400, 1, 10), (10, 1, 1, 1), (10, 1.0, 1, 10), (40, 0.01, 0, 0), (40, 0.01, 5, 5), (3, 0.01, 5, 3),
        (0, 0.5, 1, 0),
    ],
    ids=["2.4999", "count", "count above n", "one token", "everything", "none", "at least five", "at most n", "empty"],
)  # fmt: skip
def test_budget_of_shares_and_counts(n: int, keep: float, min_tokens: int, expected: int) -> None:
    assert _tokens.budget(n, keep, min_tokens) == expected


def test_counts_are_known_from_shapes_where_nothing_competes() -> None:
    units = [Unit(0, 576, 24, 24), Unit(0, 256, 16, 16, picture=1), Unit(1, 1, 1, 1)]
    assert FasterVLM(keep=0.1).count(context([Grid(1, 1)]).stage, units) == [58, 26, 1]
    assert RandomTokens(keep=64).count(context([Grid(1, 1)]).stage, units) == [64, 64, 1]
    # no two units of one picture: the same as alone
    assert FasterVLM(keep=0.1, budget_scope="image").count(context([Grid(1, 1)]).stage, units) == [58, 26, 1]
    assert FasterVLM(keep=0.1, budget_scope="sample").count(context([Grid(1, 1)]).stage, units) is None


@pytest.mark.parametrize(("newline", "expected"), [("all", [58 + 24]), ("nonempty", None), ("none", None)])
def test_counts_with_newlines(newline: str, expected: list[int] | None) -> None:
    units = [Unit(0, 576, 24, 24, n_structural=24)]
    assert build("fastervlm", {"keep": 0.1, "newline": newline}).count(context([Grid(1, 1)]).stage, units) == expected  # type: ignore[attr-defined]


# --- selection ----------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_index() -> None:
    assert _tokens.largest(torch.tensor([1.0, 2, 1, 2, 1, 1]), 4).tolist() == [0, 1, 2, 3]
    assert _tokens.largest(torch.ones(2000), 700).tolist() == list(range(700))


def test_padded_rows_end_in_entries_that_do_not_count() -> None:
    index, ok = _tokens.padded([torch.tensor([3, 5]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 2, 9])])
    assert index[ok].tolist() == [3, 5, 1, 2, 9]
    assert ok.tolist() == [[True, True, False], [False] * 3, [True] * 3]


@pytest.mark.parametrize(("n", "n_kept", "expected"), [(10, 3, [1, 5, 8]), (8, 4, [1, 3, 5, 7]), (5, 5, [0, 1, 2, 3, 4]), (7, 1, [3]), (7, 0, [])])
def test_stride_takes_the_middle_of_each_stretch(n: int, n_kept: int, expected: list[int]) -> None:
    assert _tokens.stride(n, n_kept, torch.zeros(1)).tolist() == expected


@given(n=st.integers(1, 300), data=st.data())
def test_spread_scores_leave_no_long_gap_at_any_budget(n: int, data: st.DataObject) -> None:
    n_kept = data.draw(st.integers(1, n))
    scores = _tokens.spread(torch.zeros(n))
    assert abs(float(scores.mean()) - 1) < 1e-4
    edges = [-1, *_tokens.largest(scores, n_kept).tolist(), n]
    # stretches are powers of two, hence up to twice the ideal, and the last one may be cut
    assert max(b - a for a, b in pairwise(edges)) <= 2 * -(-n // n_kept) + 1


@given(lens=st.lists(st.integers(1, 6), min_size=1, max_size=5), min_tokens=st.integers(0, 3), data=st.data())
def test_ranking_puts_the_best_of_every_unit_first(lens: list[int], min_tokens: int, data: st.DataObject) -> None:
    unit = torch.cat([torch.full((n,), u) for u, n in enumerate(lens)])
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=len(unit), max_size=len(unit)))).float()
    order = _tokens.ranking(scores, unit, min_tokens).tolist()
    assert sorted(order) == list(range(len(unit)))
    best = {i for u in range(len(lens)) for i in sorted((unit == u).nonzero().flatten().tolist(), key=lambda i: -scores[i])[:min_tokens]}
    for part in (order[: len(best)], order[len(best) :]):
        assert part == sorted(part, key=lambda i: (-scores[i], i))
    assert set(order[: len(best)]) == best


# --- scopes -------------------------------------------------------------------------------------------------------------------

# two tiles of one image and another image: the first tile's map is short on patches and long on mean
TILES = [Grid(2, 4), Grid(4, 4), Grid(4, 4, picture=1)]


def scored(*rows: Tensor) -> dict[str, Tensor]:
    return {"mean_received": maps(*rows)}


def test_scopes_share_a_budget_as_far_as_they_say() -> None:
    ctx = context(TILES, observed={"mean_received": random_maps(8, 16, 16)})
    lens = {}
    for scope in ("unit", "image", "sample"):
        keep = FasterVLM(keep=0.25, budget_scope=scope).select(ctx)
        assert keep is not None
        assert_well_formed(keep, ctx)
        lens[scope] = [len(found) for found in kept_of(keep, ctx)]
    assert lens["unit"] == [2, 4, 4]
    assert sum(lens["image"][:2]) == 6
    assert lens["image"][2] == 4
    assert sum(lens["sample"]) == 10


def test_a_small_unit_does_not_win_because_its_attention_is_shared_by_fewer() -> None:
    # both flat but for two tokens at twice the mean; raw attention of the small unit is twice as large throughout
    small, large = torch.ones(8) / 8, torch.ones(16) / 16
    small[[0, 1]] *= 2
    large[[3, 5, 7]] *= 3
    ctx = context([Grid(2, 4), Grid(4, 4)], observed=scored(small, large))
    keep = FasterVLM(keep=4, budget_scope="image").select(ctx)
    assert keep is not None
    assert kept_of(keep, ctx) == [[0], [3, 5, 7]]


def test_ties_between_interleaved_tiles_go_to_the_lower_place(caplog: pytest.LogCaptureFixture) -> None:
    # a 2×4 map: each row holds two tokens of the left tile, then two of the right
    ctx = context([Grid(2, 4)])
    ctx = replace(ctx, unit=torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]), units=[Unit(0, 4, 2, 2), Unit(0, 4, 2, 2)], observed=scored(*torch.ones(2, 4)))
    keep = FasterVLM(keep=4, budget_scope="image").select(ctx)
    assert keep is not None
    assert places(keep, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize(("min_tokens", "expected"), [(1, [1, 1, 6]), (2, [2, 2, 4]), (0, [0, 0, 8])])
def test_no_unit_loses_its_last_tokens_to_another(min_tokens: int, expected: list[int]) -> None:
    sharp = torch.full((16,), 1e-3)
    sharp[:8] = 1
    flat = torch.linspace(1.0, 1.1, 16)
    ctx = context([Grid(4, 4), Grid(4, 4), Grid(4, 4)], observed=scored(flat, flat, sharp))
    keep = FasterVLM(keep=8, budget_scope="sample", min_tokens=min_tokens).select(ctx)
    assert keep is not None
    assert [len(found) for found in kept_of(keep, ctx)] == expected


def test_min_tokens_outweigh_a_smaller_budget() -> None:
    ctx = context([Grid(4, 4)] * 3, observed={"mean_received": random_maps(16, 16, 16)})
    keep = FasterVLM(keep=2, budget_scope="sample").select(ctx)
    assert keep is not None
    assert [len(found) for found in kept_of(keep, ctx)] == [1, 1, 1]


def test_a_sequence_does_not_compete_with_others_of_the_batch() -> None:
    rows = random_maps(16, 8, 16)
    alone = FasterVLM(keep=0.25, budget_scope="sample")
    whole = context([TILES[1]], [Grid(2, 4), Grid(4, 4)], observed={"mean_received": rows})
    part = context([Grid(2, 4), Grid(4, 4)], observed={"mean_received": rows[1:]})
    together, single = alone.select(whole), alone.select(part)
    assert together is not None
    assert single is not None
    assert places(together, 1) == places(single, 0)


# --- newlines and other structural tokens -------------------------------------------------------------------------------------


def test_newlines_stay_with_their_rows_and_other_structural_tokens_always() -> None:
    scores = torch.zeros(16)
    scores[[4, 5, 13]] = torch.tensor([3.0, 2.0, 1.0])
    ctx = context([Grid(4, 4, has_newline=True, has_cls=True)], observed=scored(scores + 0.1))
    rows = {}
    for newline in ("nonempty", "all", "none"):
        keep = FasterVLM(keep=3, newline=newline).select(ctx)
        assert keep is not None
        assert_well_formed(keep, ctx)
        index = torch.tensor(places(keep, 0))
        assert 0 in index, "the token in front ends no row"
        ends = ctx.is_structural[0, index] & (ctx.place[0, index, 2] >= 0)
        rows[newline] = ctx.place[0, index[ends], 1].tolist()
        assert kept_of(keep, ctx) == [[4, 5, 13]]
    assert rows == {"nonempty": [1, 3], "all": [0, 1, 2, 3], "none": []}


def test_a_newline_belongs_to_the_whole_row_of_a_mosaic() -> None:
    # a 2×4 map of two 2×2 tiles: its newlines are counted with the right tile, but the left one may keep the patch
    ctx = context([Grid(2, 4, has_newline=True)])
    unit = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1]])
    units = [Unit(0, 4, 2, 2), Unit(0, 4, 2, 2, n_structural=2)]
    ctx = replace(ctx, unit=unit, units=units, observed=scored(torch.tensor([4.0, 1, 1, 1]), torch.tensor([4.0, 1, 1, 1])))
    keep = FasterVLM(keep=0.25).select(ctx)
    assert keep is not None
    assert places(keep, 0) == [0, 2, 4]
    left_only = FasterVLM(keep=0.125, min_tokens=0, budget_scope="image").select(ctx)
    assert left_only is not None
    assert places(left_only, 0) == [0, 4]


def test_rows_of_different_maps_or_sequences_do_not_lend_each_other_newlines() -> None:
    upper, lower = torch.tensor([9.0, 1, 1, 1]), torch.tensor([1.0, 1, 1, 9])
    grid = Grid(2, 2, has_newline=True)
    ctx = context([grid, grid], [grid], observed=scored(upper, lower, lower))
    keep = FasterVLM(keep=0.25).select(ctx)
    assert keep is not None
    assert [places(keep, b) for b in range(2)] == [[0, 2, 10, 11], [4, 5]]


# --- scores that cannot be trusted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_scores_that_are_not_finite_give_an_even_choice_for_that_unit_and_one_warning(value: float, caplog: pytest.LogCaptureFixture) -> None:
    rows = random_maps(16, 16)
    rows[0, 7] = value
    ctx = context([Grid(4, 4), Grid(4, 4, picture=1)], observed={"mean_received": rows})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            keep = FasterVLM(keep=4).select(ctx)
    assert keep is not None
    assert kept_of(keep, ctx) == [[2, 6, 10, 14], _tokens.largest(rows[1], 4).tolist()]
    assert [record.getMessage() for record in caplog.records] == ["fastervlm: scores are not finite; evenly spaced tokens are kept instead"]


def test_broken_unit_takes_its_share_of_a_common_budget() -> None:
    rows = random_maps(16, 16)
    rows[0] = torch.nan
    ctx = context([Grid(4, 4), Grid(4, 4)], observed={"mean_received": rows})
    keep = FasterVLM(keep=0.5, budget_scope="image").select(ctx)
    assert keep is not None
    n = [len(found) for found in kept_of(keep, ctx)]
    assert sum(n) == 16
    assert min(n) >= 4


def test_equal_scores_keep_the_first_tokens_and_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    ctx = context([Grid(4, 4), Grid(1, 1, picture=1)], observed=scored(torch.ones(16), torch.ones(1)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            keep = FasterVLM(keep=5).select(ctx)
    assert keep is not None
    assert kept_of(keep, ctx) == [[0, 1, 2, 3, 4], [0]]
    assert len(caplog.records) == 1
    assert "same score" in caplog.text


def test_a_single_token_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FasterVLM().select(context([Grid(1, 1)], observed=scored(torch.ones(1))))
    assert not caplog.records


def test_an_image_that_lost_tokens_before_is_refused() -> None:
    ctx = context([Grid(4, 4)], observed={"mean_received": random_maps(16)})
    thinned = replace(ctx, is_visual=ctx.is_visual & (torch.arange(16) != 3))
    with pytest.raises(UnsupportedError, match=r"15 of 16 tokens .* put it in front"):
        FasterVLM().select(thinned)


# --- options ------------------------------------------------------------------------------------------------------------------

SHARED = [
    ("keep", 0), ("keep", -0.1), ("keep", 1.5), ("keep", float("nan")), ("keep", True), ("keep", "half"),
    ("keep", None), ("keep", 1), ("keep", -3), ("keep", 2.5),
    ("min_tokens", -1), ("min_tokens", 0.5), ("newline", "some"), ("position_mode", "shift"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["fastervlm", "random_tokens", "uniform_tokens", "downsample"])
@pytest.mark.parametrize(("option", "value"), SHARED, ids=[f"{option}={value}" for option, value in SHARED])
def test_option_out_of_range_is_refused_by_name(name: str, option: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"{name}: {option} must .*{value}"):
        build(name, {option: value})


def test_one_is_neither_a_share_nor_a_count() -> None:
    with pytest.raises(OptionError, match=r"1\.0 is everything"):
        FasterVLM(keep=1)


@pytest.mark.parametrize("name", ["fastervlm", "random_tokens"])
def test_unknown_scope_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="budget_scope must be one of unit, image, sample, got 'batch'"):
        build(name, {"budget_scope": "batch"})


@pytest.mark.parametrize("name", ["fastervlm", "random_tokens", "uniform_tokens", "downsample", "fastv", "vflowopt"])
def test_compact_positions_are_refused_where_positions_have_axes(name: str) -> None:
    method = build(name, {"position_mode": "compact"})
    assert method.supports(INFO, "transformers", []) == []
    [reason] = method.supports(replace(INFO, has_multimodal_rope=True), "transformers", [])
    assert "compact" in reason
    assert build(name).supports(replace(INFO, has_multimodal_rope=True), "transformers", []) == []


@pytest.mark.parametrize("name", ["fastervlm", "random_tokens", "uniform_tokens", "downsample", "fastv", "vflowopt"])
def test_keeping_everything_asks_for_nothing(name: str) -> None:
    method = build(name, {"keep": 1.0})
    assert method.stages(INFO) == []  # type: ignore[attr-defined]
    assert list(method.observe()) == []  # type: ignore[attr-defined]
    [stage, *_] = build(name).stages(INFO)  # type: ignore[attr-defined]
    assert stage.is_known_ahead == (name != "fastv")
    assert stage.boundary == ("layer" if name == "fastv" else "projector")
