"""VFlowOpt: the importance map, recycling within the budget, and the strategy over three stages. Golden vectors: visual-token-pruning.md §8."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_contexts import INFO, PROJECTOR, Grid, assert_well_formed, context, kept_of, maps, places, random_maps
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches import _tokens
from accel.patches._tokens import budget
from accel.patches.vflowopt import VFlowOpt, cells_of, grey_entropy, recycled
from accel.protocols import Keep, ModelInfo, Observation, PruningContext, Stage
from accel.recipe import Recipe

ONEVISION = ModelInfo("llava_onevision", 28, 28, 4, 128, ("full_attention",) * 28, "cpu", "float32", has_vision=True)


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    _tokens._warn_once.cache_clear()


# --- importance (V-I, V-E) ----------------------------------------------------------------------------------------------------

ATTENTION = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.55, 0.1, 0.3]])
ENTROPY = torch.tensor([0.0, 1.0, 2.0, 1.0])


def context_relevance(method: VFlowOpt) -> Tensor:
    """(4,): what a host makes of the rows that the method selects."""
    rows = method.select_rows(ATTENTION.mean(0)[None])
    assert rows.dtype == torch.bool
    return ATTENTION[rows[0]].mean(0)


@pytest.mark.parametrize(
    ("hub_factor", "expected"),
    [(0, [0.2, 0.425, 0.1875, 0.1875]), (1, [0.1, 0.6, 0.2, 0.1]), (1.5, [0.1, 0.6, 0.2, 0.1]), (2, [0.1, 0.6, 0.2, 0.1])],
    ids=["all", "one hub", "still one", "none, hence the largest"],
)
def test_importance_is_the_mean_row_of_the_hubs(hub_factor: float, expected: list[float]) -> None:
    torch.testing.assert_close(context_relevance(VFlowOpt(hub_factor=hub_factor)), torch.tensor(expected), atol=1e-6, rtol=0)


def test_hubs_are_found_in_each_segment_alone() -> None:
    rows = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.4, 0.4]])
    assert VFlowOpt(hub_factor=1.5).select_rows(rows).tolist() == [[True, False, False, False]] * 2 + [[False, False, True, True]]


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, [0.136165, 0.698306, 0.467223, 0.198306]), (-1.0, [0.027671, 0.403388, -0.334447, -0.096612])])
def test_entropy_is_weighed_by_alpha_and_carried_to_the_next_stage(alpha: float, expected: list[float]) -> None:
    method = VFlowOpt(keep=0.5, hub_factor=1, alpha=alpha, recycle=False).bind(INFO)
    assert [o.what for o in method.observe()] == ["mean_selected_rows", "pixel_map"]
    ctx = context([Grid(2, 2)], observed={"mean_selected_rows": context_relevance(method)[None], "pixel_map": ENTROPY.softmax(0)[None]})
    keep = method.select(ctx)
    assert keep is not None
    assert keep.scores is not None
    best = sorted(torch.tensor(expected).topk(2).indices.tolist())
    assert places(keep, 0) == best
    torch.testing.assert_close(keep.scores[0], torch.tensor(expected)[best], atol=2e-6, rtol=0)


def test_entropy_of_grey_levels_is_in_bits() -> None:
    pixels = torch.stack([torch.full((196,), 7), torch.arange(196) % 2 * 255, torch.arange(196)]).to(torch.uint8)
    torch.testing.assert_close(grey_entropy(pixels), torch.tensor([0.0, 1.0, 7.614710]), atol=1e-5, rtol=0)
    torch.testing.assert_close(VFlowOpt(alpha=0.5).map_pixels(pixels), torch.tensor([0.0, 1.0, 7.614710]).softmax(0), atol=1e-6, rtol=0)


def test_pixels_are_observed_only_where_they_count_and_with_the_given_normalisation() -> None:
    assert VFlowOpt(scoring_layer=25, max_queries=512).observe() == (Observation("mean_selected_rows", layer=25, max_queries=512),)
    assert VFlowOpt(alpha=0.1, pixel_mean=[0.5, 0.5, 0.4], pixel_std=0.5).observe()[1] == Observation(  # type: ignore[arg-type]
        "pixel_map", pixel_mean=(0.5, 0.5, 0.4), pixel_std=0.5
    )


# --- recycling (V-R, V-N) -----------------------------------------------------------------------------------------------------

GOLDEN = torch.tensor([0.09, 0.02, 0.05, 0.01, 0.08, 0.03, 0.04, 0.10, 0.07, 0.06, 0.015, 0.025, 0.11, 0.12, 0.035, 0.045])


def grid_place(height: int, width: int) -> Tensor:
    at = torch.arange(height * width)
    return torch.stack([torch.zeros_like(at), at // width, at % width], 1)


def golden_recycled(n_kept: int) -> tuple[set[int], dict[int, dict[int, float]]] | None:
    """Tokens kept as they are, and for each anchor its sources with their weights; lone ones among the former."""
    cells = cells_of(grid_place(4, 4), torch.full((16,), 2.0).double())
    found = recycled(GOLDEN.argsort(descending=True, stable=True), cells, GOLDEN, n_kept)
    if found is None:
        return None
    table: dict[int, dict[int, float]] = {}
    for anchor, source, weight in zip(*(part.tolist() for part in found), strict=True):
        table.setdefault(anchor, {})[source] = weight
    return set(range(16)) - set(found[1].tolist()), table


def test_eight_tokens_of_the_golden_map() -> None:
    found = golden_recycled(8)
    assert found is not None
    direct, table = found
    assert direct == {0, 7, 12, 13}
    expected = {
        2: {2: 0.5, 3: 0.1, 6: 0.4}, 4: {1: 0.153846, 4: 0.615385, 5: 0.230769}, 8: {8: 0.538462, 9: 0.461538},
        15: {10: 0.125, 11: 0.208333, 14: 0.291667, 15: 0.375},
    }  # fmt: skip
    assert table.keys() == expected.keys()
    for anchor, sources in expected.items():
        assert table[anchor] == pytest.approx(sources, abs=1e-6)


@pytest.mark.parametrize(
    ("n_kept", "direct", "anchors"), [(6, {12, 13}, {0, 7, 8, 15}), (4, set(), {0, 7, 13, 15})], ids=["six", "cells only"]
)
def test_smaller_budgets_of_the_golden_map(n_kept: int, direct: set[int], anchors: set[int]) -> None:
    found = golden_recycled(n_kept)
    assert found is not None
    assert found[0] == direct
    assert found[1].keys() == anchors


def test_golden_counts_of_all_budgets() -> None:
    # f(k) = 4 5 6 7 8 9 10 10 11 12 13 14 15 16 16 16 16: the k tokens kept as they are, the largest k of those that fit
    f = [4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 16, 16, 16, 16]
    for n_kept in range(4, 17):
        found = golden_recycled(n_kept)
        assert found is not None
        assert len(found[0]) == max(k for k, total in enumerate(f) if total == n_kept)
    assert golden_recycled(3) is None


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), cell=st.sampled_from([2, 3.7, 11.76]), seed=st.integers(0, 10_000), data=st.data()
)
def test_any_budget_from_the_number_of_cells_on_is_met_exactly(height: int, width: int, cell: float, seed: int, data: st.DataObject) -> None:
    n = height * width
    # few levels: many ties
    scores = torch.randint(-1, 6, (n,), generator=torch.Generator().manual_seed(seed)).float()
    order = scores.argsort(descending=True, stable=True)
    cells = cells_of(grid_place(height, width), torch.full((n,), cell).double())
    n_cells = len(set(zip((torch.arange(n) // width // cell).int().tolist(), (torch.arange(n) % width // cell).int().tolist(), strict=True)))
    assert len(cells.unique()) == n_cells
    n_kept = data.draw(st.integers(n_cells, n))
    found = recycled(order, cells, scores, n_kept)
    assert found is not None
    anchor, source, weight = found
    direct = set(range(n)) - set(source.tolist())
    assert len(direct) + len(anchor.unique()) == n_kept
    assert set(source.tolist()) == set(order[len(direct) :].tolist()), "the least important are merged"
    assert torch.equal(cells[anchor], cells[source])
    totals = torch.zeros(n).index_add(0, anchor, weight)
    torch.testing.assert_close(totals[anchor], torch.ones(len(anchor)))
    rank = order.argsort()
    assert all(rank[a] == rank[source[cells[source] == cells[a]]].min() for a in anchor.unique()), "anchors are the best of what is merged"
    assert recycled(order, cells, scores, n_cells - 1) is None


def asked(method: VFlowOpt, importance: Tensor, *grids: Grid) -> tuple[Keep, PruningContext]:
    ctx = context(list(grids), observed={"mean_selected_rows": importance})
    keep = method.bind(INFO).select(ctx)
    assert keep is not None
    assert_well_formed(keep, ctx)
    return keep, ctx


def test_the_first_stage_recycles_and_keeps_the_order_of_the_prompt() -> None:
    keep, ctx = asked(VFlowOpt(keep=0.5, cell=2), GOLDEN[None], Grid(4, 4, has_newline=True))
    assert kept_of(keep, ctx) == [[0, 2, 4, 7, 8, 12, 13, 15]]
    assert len(places(keep, 0)) == 12, "newlines are not counted"
    assert keep.merge is not None
    assert keep.scores is not None
    # places in the prompt, not in the unit: anchor 15 is behind three newlines
    real = keep.merge.anchor[0] == 18
    features = (keep.merge.weight[0, real, None] * ctx.features[0, keep.merge.source[0, real]]).sum(0)
    own = ctx.features[0][ctx.is_visual[0]]
    members = torch.tensor([10, 11, 14, 15])
    torch.testing.assert_close(features, (GOLDEN[members, None] * own[members]).sum(0) / GOLDEN[members].sum(), atol=1e-6, rtol=1e-6)
    # the anchor keeps its own importance
    assert keep.scores[0, places(keep, 0).index(18)] == GOLDEN[15]
    assert keep.scores[0, places(keep, 0).index(4)] == 0, "structural tokens have none"


def test_cells_grow_until_they_fit_but_not_for_a_handful_of_tokens() -> None:
    # 16 cells of one token; budgets below need larger ones
    keep, ctx = asked(VFlowOpt(keep=0.25, cell=1), GOLDEN[None], Grid(4, 4))
    assert keep.merge is not None
    assert len(kept_of(keep, ctx)[0]) == 4
    assert set(keep.merge.source[0].tolist()) | set(kept_of(keep, ctx)[0]) == set(range(16)), "nothing is lost"
    few, ctx = asked(VFlowOpt(keep=3 / 16, cell=2), GOLDEN[None], Grid(4, 4))
    assert few.merge is None
    assert kept_of(few, ctx) == [[7, 12, 13]]
    # in one cell three tokens fit: two stay, the third is the rest
    fits, ctx = asked(VFlowOpt(keep=3 / 16, cell=4), GOLDEN[None], Grid(4, 4))
    assert fits.merge is not None
    assert kept_of(fits, ctx) == [[7, 12, 13]]
    assert fits.merge.anchor[0].unique().tolist() == [7]


def test_more_maps_than_tokens_are_pruned_without_recycling() -> None:
    rows = random_maps(*[4] * 6)
    keep, ctx = asked(VFlowOpt(keep=0.01, min_tokens=0, recycle_multi=True), rows, *[Grid(2, 2)] * 6)
    assert keep.merge is None
    assert sum(map(len, kept_of(keep, ctx))) == 0
    keep, ctx = asked(VFlowOpt(keep=5 / 24, min_tokens=0), rows, *[Grid(2, 2)] * 6)
    assert keep.merge is None
    assert sum(map(len, kept_of(keep, ctx))) == 5


@pytest.mark.parametrize(
    ("grids", "recycle_multi", "recycles"),
    [
        ([Grid(4, 4), Grid(8, 8)], False, True),
        ([Grid(4, 4), Grid(8, 8, picture=1)], False, False),
        ([Grid(4, 4), Grid(8, 8, picture=1)], True, True),
        ([Grid(4, 4, modality="video"), Grid(8, 8, modality="video")], False, False),
        ([Grid(4, 4, modality="video"), Grid(8, 8, modality="video")], True, True),
    ],
    ids=["tiles", "images", "images, multi", "video", "video, multi"],
)
def test_cells_stay_within_a_map_and_several_pictures_recycle_on_request(grids: list[Grid], recycle_multi: bool, recycles: bool) -> None:
    keep, ctx = asked(VFlowOpt(keep=0.5, recycle_multi=recycle_multi), random_maps(16, 64), *grids)
    n = [len(found) for found in kept_of(keep, ctx)]
    assert sum(n) == 40
    if grids[1].picture:
        assert n == [8, 32], "images have budgets of their own"
    assert (keep.merge is not None) == recycles
    if keep.merge is not None:
        real = keep.merge.weight[0] > 0
        assert torch.equal(ctx.place[0, keep.merge.anchor[0, real], 0], ctx.place[0, keep.merge.source[0, real], 0])
    assert asked(VFlowOpt(keep=0.5, recycle=False, recycle_multi=True), random_maps(16, 64), *grids)[0].merge is None


def test_a_row_of_the_batch_is_as_alone() -> None:
    rows = random_maps(16, 64, 35)
    method = VFlowOpt(keep=0.4).bind(INFO)
    grids = [Grid(4, 4), Grid(8, 8), Grid(5, 7)]
    ctx = context([grids[0]], [], [grids[1]], [grids[2]], observed={"mean_selected_rows": rows})
    keep = method.select(ctx)
    assert keep is not None
    assert keep.merge is not None
    assert places(keep, 1) == []
    for b, u in ((0, 0), (2, 1), (3, 2)):
        alone = method.select(context([grids[u]], observed={"mean_selected_rows": rows[u : u + 1, : grids[u].n]}))
        assert alone is not None
        assert alone.merge is not None
        assert places(keep, b) == places(alone, 0)
        real = keep.merge.weight[b] > 0
        assert torch.equal(keep.merge.weight[b, real], alone.merge.weight[0])
        assert torch.equal(keep.merge.source[b, real], alone.merge.source[0])


# --- stages (V-S, V-B) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "counts", "average"), [(0.5, [5332, 3992, 1944], 0.50077), (0.25, [1954, 1921, 1685], 0.25068), (0.1, [860, 860, 517], 0.1)]
)
def test_released_strategies_have_their_published_counts_and_averages(share: float, counts: list[int], average: float) -> None:
    method = VFlowOpt.released(share)
    left, found = 7371, []
    for kept_share in method.shares(28):
        left = budget(left, kept_share)
        found.append(left)
    assert found == counts
    assert method.average_share(28) == pytest.approx(average, abs=1e-5)
    layers = [stage.layer for stage in method.stages(ONEVISION)]
    # where nothing is dropped there is no stage
    assert layers == ([None, 18] if share == 0.1 else [None, 9, 18])
    assert all(stage.is_known_ahead for stage in method.stages(ONEVISION))


def test_the_third_share_meets_the_average() -> None:
    method = VFlowOpt(keep=0.25, r1=0.3, r2=0.8)
    r1, r2, r3 = method.shares(32)
    assert (r1, r2) == (0.3, 0.8)
    assert r3 == pytest.approx(((32 * 0.25 - 10 * 0.3 - 10 * 0.24) / 12) / 0.24)
    assert method.average_share(32) == pytest.approx(0.25)
    # worst case of the tuner's ranges (§4.7)
    assert VFlowOpt(keep=0.25, r1_factor=1.5).shares(28)[2] == pytest.approx(0.0666667)
    # never above 1, though the average then stays below
    assert VFlowOpt(keep=0.5, r1=0.3, r2=0.9).shares(28) == (0.3, 0.9, 1.0)


def test_infeasible_shares_are_refused_when_bound() -> None:
    method = VFlowOpt(keep=0.25, r1=0.5)
    with pytest.raises(OptionError, match=r"r1=0.5 and r2=1 keep more over 8 of 12 layers than keep=0.25"):
        method.bind(INFO)
    assert replace(method, r3=0.1).bind(INFO).shares(12) == (0.5, 1.0, 0.1)


@pytest.mark.parametrize("n_layers", [3, 12, 28, 31, 32])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 1 / 3, 0.9, 1.0])
def test_uncalibrated_everything_goes_at_the_first_stage(share: float, n_layers: int) -> None:
    method = VFlowOpt(keep=share)
    assert method.shares(n_layers) == (share, 1.0, 1.0)
    assert [s.layer for s in method.stages(replace(INFO, n_layers=n_layers))] == ([] if share == 1 else [None])
    assert method.average_share(n_layers) == pytest.approx(share)


def test_notices_say_what_was_not_tuned() -> None:
    assert "uncalibrated" in str(VFlowOpt().notice(ONEVISION))
    assert VFlowOpt(keep=1.0).notice(ONEVISION) is None
    assert VFlowOpt.released(0.25).notice(ONEVISION) is None
    assert "LLaVA-OneVision" in str(VFlowOpt.released(0.25).notice(INFO))
    assert VFlowOpt(r1=0.3, r2=0.8).notice(INFO) is None


def after(ctx: PruningContext, keep: Keep, stage: Stage) -> PruningContext:
    """What a host hands over at the next stage: survivors only, compacted, with their scores, and features of width 0."""
    width = int(keep.ok.sum(1).max())

    def cut(whole: Tensor) -> Tensor:
        return torch.stack([whole[b, keep.index[b, :width]] for b in range(len(whole))])

    masks = {name: cut(getattr(ctx, name)) & keep.ok for name in ("is_visual", "is_structural", "is_text")}
    assert keep.scores is not None
    scores = keep.scores.masked_fill(~keep.ok, 0)
    return replace(ctx, stage=stage, unit=cut(ctx.unit), place=cut(ctx.place), features=torch.zeros(*keep.index.shape, 0), scores=scores, **masks)


def test_stages_are_nested_follow_one_map_and_keep_their_promise() -> None:
    method = VFlowOpt(keep=0.5, r1=0.6, r2=0.8, recycle=False).bind(INFO)
    stages = method.stages(INFO)
    assert [stage.layer for stage in stages] == [None, 4, 8]
    rows = random_maps(64, 35)
    ctx = context([Grid(8, 8, has_newline=True)], [Grid(5, 7)], observed={"mean_selected_rows": rows})
    original = [torch.arange(ctx.is_visual.shape[1])] * 2
    now, keep = ctx, None
    for stage in stages:
        now = now if keep is None else after(now, keep, stage)
        keep = method.select(now)
        assert keep is not None
        assert keep.ok.sum(1).tolist() == method.count(stage, ctx.units)
        assert now.is_structural[0, keep.index[0]].sum() == 8
        original = [original[b][keep.index[b, keep.ok[b]]] for b in range(2)]
        for b, u in ((0, 0), (1, 1)):
            visual = original[b][ctx.is_visual[b, original[b]]]
            own = ctx.is_visual[b].nonzero().flatten()
            best = own[rows[u, : len(own)].argsort(descending=True, stable=True)[: len(visual)]]
            assert visual.tolist() == sorted(best.tolist()), "the best of the first map at every stage"
    assert method.count(stages[2], ctx.units) == [budget(budget(38, 0.8), method.shares(12)[2]) + 8, budget(budget(21, 0.8), method.shares(12)[2])]


def test_later_stages_merge_nothing_and_ignore_what_is_observed() -> None:
    method = VFlowOpt.released(0.5).bind(ONEVISION)
    first = context([Grid(6, 6)], observed={"mean_selected_rows": random_maps(36)})
    keep = method.select(first)
    assert keep is not None
    second = replace(after(first, keep, method.stages(ONEVISION)[1]), observed={})
    later = method.select(second)
    assert later is not None
    assert later.merge is None
    assert later.ok.sum() == budget(budget(36, 0.7233201448753168), 0.748747637472693)


def test_frames_compete_for_one_budget_and_none_is_lost() -> None:
    rows = maps(torch.full((16,), 0.5), torch.full((16,), 1e-4), torch.full((16,), 1e-5))
    frames = [Grid(4, 4, modality="video")] * 3
    keep, ctx = asked(VFlowOpt(keep=0.25), rows, *frames)
    assert [len(found) for found in kept_of(keep, ctx)] == [10, 1, 1]
    keep, ctx = asked(VFlowOpt(keep=0.25, min_tokens=0), rows, *frames)
    assert [len(found) for found in kept_of(keep, ctx)] == [12, 0, 0]
    assert VFlowOpt(keep=0.25).bind(INFO).count(PROJECTOR, ctx.units) is None


def test_a_broken_map_gives_evenly_spread_tokens(caplog: pytest.LogCaptureFixture) -> None:
    rows = random_maps(64)
    rows[0, 5] = torch.nan
    with caplog.at_level(logging.WARNING):
        keep, ctx = asked(VFlowOpt(keep=0.25, recycle=False), rows, Grid(8, 8))
    [found] = kept_of(keep, ctx)
    assert found == list(range(0, 64, 4))
    assert keep.scores is not None
    assert keep.scores.isfinite().all()
    assert "vflowopt: scores are not finite" in caplog.text


def test_a_broken_frame_competes_as_an_average_one() -> None:
    rows = random_maps(64, 64)
    rows[0] = torch.nan
    keep, ctx = asked(VFlowOpt(keep=0.25), rows, Grid(8, 8, modality="video"), Grid(8, 8, modality="video"))
    broken, fine = (len(found) for found in kept_of(keep, ctx))
    assert broken + fine == 32
    assert min(broken, fine) >= 8


def test_shares_of_one_keep_everything_however_they_are_given() -> None:
    for method in (VFlowOpt(keep=1.0), VFlowOpt(r1=1.0, r3=1), VFlowOpt(keep=0.8, r1_factor=1.25, r3=1.0)):
        assert method.stages(INFO) == []
        assert method.observe() == ()
        assert method.notice(INFO) is None
    assert [s.layer for s in VFlowOpt(keep=1.0, r2=0.5).stages(INFO)] == [None, 4]
    # two thirds see everything, the rest pays for it
    assert [s.layer for s in VFlowOpt(keep=0.9, r1=1.0).stages(INFO)] == [None, 8]


def test_shallow_models_are_refused_where_stages_were_asked_for() -> None:
    [reason] = VFlowOpt(r1=0.3, r2=0.5).supports(replace(INFO, n_layers=2), "transformers", [])
    assert "at least 3 layers" in reason
    assert VFlowOpt().supports(replace(INFO, n_layers=2), "transformers", []) == []


def test_unbound_it_cannot_tell_its_stages() -> None:
    with pytest.raises(UnsupportedError, match="bound"):
        VFlowOpt().count(PROJECTOR, [])


# --- options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("keep", 0), ("keep", 2), ("keep", float("nan")), ("r1", 0), ("r1", 1.1), ("r1", True), ("r2", None), ("r2", 0.0),
        ("r3", -0.5), ("r1_factor", 0), ("r1_factor", "a"), ("hub_factor", -1), ("hub_factor", float("inf")), ("cell", 0), ("cell", -2),
        ("cell", float("nan")), ("alpha", 1.5), ("alpha", -1.5), ("recycle", 1), ("recycle_multi", None), ("min_tokens", -1), ("scoring_layer", -1),
        ("max_queries", 0), ("pixel_mean", "a"), ("pixel_std", 0), ("pixel_std", ()), ("position_mode", "none"),
    ],
)  # fmt: skip
def test_option_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"vflowopt: {option} must "):
        VFlowOpt(**{option: value})


def test_two_ways_to_give_the_first_share_are_refused() -> None:
    with pytest.raises(OptionError, match="say the same thing"):
        VFlowOpt(r1=0.3, r1_factor=1.2)


def test_a_strategy_that_was_not_released_is_refused() -> None:
    with pytest.raises(OptionError, match=r"released for 0.5, 0.25, 0.1, got 0.3"):
        VFlowOpt.released(0.3)


def test_recipe_and_search_know_the_options() -> None:
    method = VFlowOpt.released(0.25, alpha=0.1, pixel_mean=(0.5, 0.5, 0.5))
    assert Recipe.from_dict(Recipe.of(method).as_dict()).methods == (method,)
    assert hash(method) == hash(VFlowOpt.released(0.25, alpha=0.1, pixel_mean=[0.5, 0.5, 0.5]))
    for option, space in VFlowOpt.search_space().items():
        for value in (space.low, space.high):  # type: ignore[union-attr]
            VFlowOpt(**{option: value}).bind(ONEVISION)
