"""What HACK becomes with other options: heavy hitters of one scale, and the rows of the ablation table (kv-compression.md §7.4, §8.2: 20, 21)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import info_of, saved
from next_scale import context, last_logits, tiny_var

import accel
from accel.patches.h2o import H2O
from accel.patches.hack import HACK
from accel.protocols import CompressionContext, HeadGroup, Retain

ROWS = ["CSCS", "SCCS"]
CONTEXTUAL, STRUCTURAL = HeadGroup((0, 1, 2, 3), 9, "contextual"), HeadGroup((0, 1, 2, 3), 9, "structural")


@dataclass(frozen=True, kw_only=True)
class Momentary(H2O):
    """H2O without its memory: the attention of earlier scales does not count, and it reads the rows that HACK reads."""

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        assert ctx.attention_mass is not None
        return super().select(replace(ctx, attention_mass=torch.zeros_like(ctx.attention_mass)), group)


@pytest.mark.parametrize("keep", [6, 0.4])
def test_equal_budgets_and_one_selector_without_merge_are_heavy_hitters_of_this_scale(keep: float, tmp_path: Path) -> None:
    model = tiny_var()
    path = saved(tmp_path, ROWS, info_of(model))
    logits = []
    for method in (
        HACK(profile=path, keep=keep, contextual_share=1, selectors="contextual", merge=None, n_queries=None),
        HACK(profile=path, keep=keep, alpha=1, merge=None, n_queries=None),
        Momentary(keep=keep, recent_share=0, n_queries=None),
        # the rows that stand for all are the same where the middles of equal parts are
        HACK(profile=path, keep=keep, alpha=1, merge=None, n_queries=12),
        Momentary(keep=keep, recent_share=0, n_queries=12),
    ):
        with accel.apply(model, method):
            logits.append(last_logits(model, [1, 2]))
    # one group or two attend in another order of heads, to the same entries
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[1], logits[2])
    assert torch.equal(logits[3], logits[4])
    assert not torch.equal(logits[2], logits[4])


def test_it_forgets_earlier_scales_where_h2o_does_not() -> None:
    mass = torch.zeros(2, 4, 30)
    mass[:, :, 9] = 100.0
    ctx = context(14, attention_mass=mass)
    assert (H2O(recent_share=0).select(ctx, CONTEXTUAL).cache_index == 9).any(-1).all()
    fresh = context(14)
    assert torch.equal(HACK().select(ctx, CONTEXTUAL).cache_index, HACK().select(fresh, CONTEXTUAL).cache_index)
    assert torch.equal(H2O(recent_share=0, n_queries=None).select(fresh, CONTEXTUAL).cache_index,
                       HACK(n_queries=None).select(fresh, CONTEXTUAL).cache_index)  # fmt: skip


def test_the_ablations_are_reached_by_options() -> None:
    ctx = context(14)
    protected, ranked = (HACK().select(ctx, replace(group, budget=24)) for group in (STRUCTURAL, CONTEXTUAL))
    assert not torch.equal(protected.cache_index, ranked.cache_index)
    assert protected.merge is None
    assert ranked.merge is not None
    for selectors, of_structural, of_contextual in (
        ("own", protected, ranked), ("swapped", ranked, protected), ("contextual", ranked, ranked), ("structural", protected, protected),
    ):  # fmt: skip
        for group, expected in ((STRUCTURAL, of_structural), (CONTEXTUAL, of_contextual)):
            found = HACK(selectors=selectors).select(ctx, replace(group, budget=24))    # type: ignore[arg-type]
            assert torch.equal(found.cache_index, expected.cache_index), (selectors, group.label)
            assert (found.merge is None) == (expected.merge is None), (selectors, group.label)
    # without protection structural heads rank everything, and still do not merge
    bare = HACK(protect=False).select(ctx, replace(STRUCTURAL, budget=24))
    assert torch.equal(bare.cache_index, ranked.cache_index)
    assert bare.merge is None


@pytest.mark.parametrize("options", [{"selectors": "swapped"}, {"selectors": "structural"}, {"selectors": "contextual"}, {"protect": False}], ids=str)
def test_ablations_run_with_small_budgets(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_var()
    with accel.apply(model, HACK(profile=saved(tmp_path, ROWS, info_of(model)), keep=0.3, **options)):
        assert torch.isfinite(last_logits(model, [1, 2])).all()
