"""The controls at equal size (random, evenly spaced, downsampled) and FastV."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_contexts import INFO, PROJECTOR, Grid, assert_well_formed, context, kept_of, places
from torch import Tensor

from accel.errors import OptionError
from accel.patches import _tokens
from accel.patches.downsample import Downsample, coarser_grid
from accel.patches.fastv import FastV
from accel.patches.random_tokens import RandomTokens
from accel.patches.uniform_tokens import UniformTokens
from accel.protocols import Keep, Observation, PruningContext, Stage, TokenPruning


def kept(method: TokenPruning, ctx: PruningContext) -> list[list[int]]:
    keep = method.select(ctx)
    assert keep is not None
    assert_well_formed(keep, ctx)
    return kept_of(keep, ctx)


# --- random -------------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_sizes_of_the_sequence_only() -> None:
    method = RandomTokens(keep=0.25)
    alone = kept(method, context([Grid(8, 8)]))
    torch.manual_seed(7)
    assert kept(method, context([Grid(3, 3), Grid(8, 8)], [], [Grid(8, 8)]))[2:] == alone
    assert kept(RandomTokens(keep=0.25, seed=1), context([Grid(8, 8)])) != alone
    assert kept(method, context([Grid(4, 16)])) != alone
    # two images of a prompt are drawn one after the other
    first, second = kept(method, context([Grid(8, 8), Grid(8, 8, picture=1)]))
    assert first != second


def test_no_place_is_preferred() -> None:
    found = torch.zeros(16)
    for seed in range(400):
        found[kept(RandomTokens(keep=4, seed=seed), context([Grid(4, 4)]))[0]] += 1
    # 100 expected, standard deviation 8.7
    assert (found - 100).abs().max() < 45


def test_random_tokens_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    kept(RandomTokens(), context([Grid(4, 4)]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scope", ["unit", "image", "sample"])
def test_random_tokens_are_as_many_as_a_ranking_keeps(scope: str) -> None:
    ctx = context([Grid(8, 8), Grid(4, 4), Grid(2, 2, picture=1)], [Grid(24, 24)])
    n = [len(found) for found in kept(RandomTokens(**{"keep": 0.25, "budget_scope": scope}), ctx)]
    assert n[3] == 144
    assert {"unit": n[:3] == [16, 4, 1], "image": (n[0] + n[1], n[2]) == (20, 1), "sample": sum(n[:3]) == 21}[scope]
    assert min(n) >= 1


@pytest.mark.parametrize("value", [1.5, True, None, "a"])
def test_seed_must_be_whole(value: Any) -> None:
    with pytest.raises(OptionError, match="random_tokens: seed must be a whole number"):
        RandomTokens(seed=value)


# --- evenly spaced ------------------------------------------------------------------------------------------------------------


def test_uniform_tokens_are_evenly_spaced_row_after_row() -> None:
    ctx = context([Grid(4, 4, has_newline=True), Grid(2, 5, picture=1)], [Grid(1, 1)])
    method = UniformTokens(keep=0.25)
    assert kept(method, ctx) == [[2, 6, 10, 14], [1, 5, 8], [0]]
    keep = method.select(ctx)
    assert keep is not None
    # every row keeps a patch, hence its newline
    assert places(keep, 0) == [2, 4, 7, 9, 12, 14, 17, 19, 21, 25, 28]


def test_controls_keep_structural_tokens_at_the_smallest_budget() -> None:
    ctx = context([Grid(4, 4, has_newline=True, has_cls=True)])
    for cls in (UniformTokens, RandomTokens, Downsample):
        method = cls(keep=0.01, newline="all")
        keep = method.select(ctx)
        assert keep is not None
        assert set(ctx.is_structural[0].nonzero().flatten().tolist()) <= set(places(keep, 0))
        assert len(places(keep, 0)) == 1 + 5
        assert method.count(PROJECTOR, ctx.units) == [6]


@pytest.mark.parametrize("method", [UniformTokens(), RandomTokens(), Downsample(), FastV()], ids=lambda m: m.method_name())
def test_without_an_image_nothing_is_done(method: TokenPruning) -> None:
    assert method.select(context([], [])) is None


# --- downsampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "n", "expected"),
    [
        (24, 24, 144, {(12, 12)}), (24, 24, 576, {(24, 24)}), (24, 24, 58, {(7, 8), (8, 7)}), (27, 27, 73, {(8, 9), (9, 8)}), (4, 4, 1, {(1, 1)}),
        (1, 100, 50, {(1, 50)}), (100, 1, 50, {(50, 1)}), (12, 24, 72, {(6, 12)}), (24, 12, 72, {(12, 6)}), (3, 3, 100, {(3, 3)}),
    ],
)  # fmt: skip
def test_coarser_grid_is_the_largest_of_that_shape(height: int, width: int, n: int, expected: set[tuple[int, int]]) -> None:
    assert coarser_grid(height, width, n) in expected


@given(height=st.integers(1, 40), width=st.integers(1, 40), n=st.integers(1, 1600))
def test_coarser_grid_fits_and_is_not_much_smaller(height: int, width: int, n: int) -> None:
    rows, columns = coarser_grid(height, width, n)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= n
    # at most one row or one column short of the budget
    assert rows * columns > min(n, height * width) - max(rows, columns) - 1


def executed(keep: Keep, features: Tensor) -> Tensor:
    """The features after the merge, as a host computes them (B, tokens, D)."""
    assert keep.merge is not None
    out = features.clone()
    for b in range(len(features)):
        entries = keep.merge.weight[b] > 0
        anchor, source, weight = keep.merge.anchor[b, entries], keep.merge.source[b, entries], keep.merge.weight[b, entries]
        total = torch.zeros_like(out[b]).index_add(0, anchor, weight[:, None] * features[b, source])
        out[b, anchor.unique()] = total[anchor.unique()]
    return out


def test_downsampling_averages_each_cell_at_the_token_in_its_middle() -> None:
    ctx = context([Grid(6, 6)], [Grid(2, 2)])
    method = Downsample(keep=4)
    keep = method.select(ctx)
    assert keep is not None
    assert_well_formed(keep, ctx)
    # the centre of each 3×3 cell
    assert kept_of(keep, ctx) == [[7, 10, 25, 28], [0, 1, 2, 3]]
    expected = ctx.features[0].view(2, 3, 2, 3, 8).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(executed(keep, ctx.features)[0, places(keep, 0)], expected)
    torch.testing.assert_close(executed(keep, ctx.features)[1], ctx.features[1])


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.03])
def test_downsampling_weighs_every_token_once_and_keeps_what_it_promised(share: float) -> None:
    ctx = context([Grid(9, 7), Grid(5, 11, picture=1)], [Grid(6, 6)])
    method = Downsample(keep=share)
    keep = method.select(ctx)
    assert keep is not None
    assert keep.merge is not None
    assert [len(found) for found in kept_of(keep, ctx)] == method.count(PROJECTOR, ctx.units)
    for b in range(2):
        real = keep.merge.weight[b] > 0
        assert sorted(keep.merge.source[b, real].tolist()) == ctx.is_visual[b].nonzero().flatten().tolist()
        weights = torch.zeros(ctx.is_visual.shape[1]).index_add(0, keep.merge.anchor[b, real], keep.merge.weight[b, real])
        torch.testing.assert_close(weights[places(keep, b)], torch.ones(len(places(keep, b))))


def test_frames_of_one_unit_are_not_averaged_with_each_other() -> None:
    ctx = context([Grid(4, 4), Grid(4, 4)])
    ctx = replace(ctx, unit=torch.zeros_like(ctx.unit), units=[replace(ctx.units[0], n_tokens=32, frames=2, modality="video")])
    method = Downsample(keep=0.25)
    keep = method.select(ctx)
    assert keep is not None
    assert keep.merge is not None
    assert method.count(PROJECTOR, ctx.units) == [8]
    assert [i // 16 for i in places(keep, 0)] == [0] * 4 + [1] * 4
    assert torch.equal(keep.merge.anchor[0] // 16, keep.merge.source[0] // 16)


# --- FastV --------------------------------------------------------------------------------------------------------------------


def in_decoder(ctx: PruningContext, rows: Tensor) -> PruningContext:
    """The context between decoder layers: three text tokens behind the images, which get the most attention."""
    size = torch.Size((len(rows), 3))
    pad = {
        "is_visual": torch.zeros(size, dtype=torch.bool), "is_structural": torch.zeros(size, dtype=torch.bool),
        "is_text": torch.ones(size, dtype=torch.bool), "unit": torch.full(size, -1), "place": torch.full((*size, 3), -1),
    }  # fmt: skip
    joined = {name: torch.cat([getattr(ctx, name), more], 1) for name, more in pad.items()}
    observed = {"last_row": torch.cat([rows, torch.full(size, 9.0)], 1)}
    return replace(ctx, **joined, observed=observed, stage=Stage("layer", 2))


def test_fastv_ranks_the_images_of_a_sequence_together() -> None:
    ctx = context([Grid(2, 3, has_newline=True), Grid(1, 2, picture=1)], [Grid(2, 2)])
    rows = torch.zeros(2, 10)
    rows[0] = torch.tensor([0.1, 0.9, 0.2, 5.0, 0.3, 0.8, 0.1, 5.0, 0.7, 0.6])
    rows[1, :4] = torch.tensor([0.4, 0.1, 0.1, 0.3])
    keep = FastV(keep=0.5).select(in_decoder(ctx, rows))
    assert keep is not None
    # 8 visual tokens: the four best, and both newlines whatever attention they got
    assert [places(keep, b) for b in range(2)] == [[1, 3, 5, 7, 8, 9], [0, 3]]


def test_fastv_asks_for_the_row_of_the_layer_before() -> None:
    method = FastV(layer=3)
    assert method.stages(INFO) == [Stage("layer", 3)]
    assert method.observe() == (Observation("last_row", layer=2),)
    assert method.supports(INFO, "transformers", []) == []
    [reason] = FastV(layer=12).supports(INFO, "transformers", [])
    assert "below the 12 layers" in reason
    assert FastV(layer=11).supports(INFO, "transformers", []) == []


def test_fastv_keeps_evenly_spaced_tokens_where_attention_is_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    _tokens._warn_once.cache_clear()
    rows = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    best = sorted(rows[1].topk(4).indices.tolist())
    rows[0, 3] = torch.nan
    with caplog.at_level(logging.WARNING):
        keep = FastV(keep=0.25).select(in_decoder(context([Grid(4, 4)], [Grid(4, 4)]), rows))
    assert keep is not None
    assert [places(keep, b) for b in range(2)] == [[2, 6, 10, 14], best]
    assert "fastv: scores are not finite" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("keep", 0), ("keep", 1.2), ("keep", True), ("keep", float("nan")), ("layer", 0), ("layer", -1), ("layer", 1.5),
        ("layer", True),
    ],
)  # fmt: skip
def test_fastv_option_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"fastv: {option} must .*{value}"):
        FastV(**{option: value})
