"""HACK++, the decoupled variant: what stays follows what later scales rely on, attention reads more than that (kv-compression.md §2.8)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import info_of, profile_of, saved
from hypothesis import given
from hypothesis import strategies as st
from next_scale import INFO, SHAPES, context, last_logits, tiny_var
from torch import Tensor
from torch.nn import functional as F

import accel
from accel.errors import UnsupportedError
from accel.patches._cache import attention_received
from accel.patches._head_decoupled import cache_budgets, prior_scores
from accel.patches._head_plan import HeadPlan, make_plan
from accel.patches.hack import HACK
from accel.protocols import CompressionContext, HeadGroup, Retain

# half of the heads: such a gap is found
ROWS = ["CCCS", "CSSS"]
ENDS = (1, 5, 14, 30)


def plan(rows: list[str], keep: int = 30, share: float = 1.0) -> HeadPlan:
    return make_plan([[letter == "C" for letter in row] for row in rows], scale_shapes=SHAPES, n_protected=0, keep=keep, share=share)


def relied_on(by_head: list[list[float]]) -> Tensor:
    """(L, H, 4, 4): every scale reads of every earlier one, and of itself, what is given for its head."""
    return torch.tensor(by_head).float()[..., None, None].expand(-1, -1, 4, 4).tril()


# --- what stays ---------------------------------------------------------------------------------------------------------------


def test_budgets_follow_what_later_scales_rely_on() -> None:
    # layer 0: 1 and 2; layer 1: 3, and 1 as a mean of structural heads
    use = relied_on([[1, 1, 1, 2], [3, 0.5, 1, 1.5]])
    found = [cache_budgets(use, plan(ROWS), step=2, n_entries=14, mean=5.5, power=power) for power in (1.0, 0.0, 2.0)]
    # 44 entries = 3 · 4 + 8 + 12 + 3 · 4
    assert found[0] == [(4, 8), (12, 4)]
    # 5½ each: three and one of the halves can be paid for
    assert found[1] == [(6, 6), (5, 5)]
    # 1 : 4 : 9 : 1: nine parts do not fit, there are 14 entries; the other 30 = 3 · 3 + 12 + 3 · 3
    assert found[2] == [(3, 12), (14, 3)]


def test_only_later_scales_count_and_only_what_they_give_to_what_exists() -> None:
    use = torch.zeros(2, 4, 4, 4)
    use[:, :, 2, :2] = use[:, :, 3, :2] = 0.1
    # behind scale 1 these count: what scales 2 and 3 give to scales 0 and 1. 1.2 against 0.4
    use[0, :3, 2, 0] = use[0, :3, 3, 1] = 0.5
    expected = cache_budgets(use, plan(ROWS), step=1, n_entries=14, mean=3.5, power=1.0)
    assert expected == [(6, 2), (2, 2)]
    # and these do not: what earlier scales read, and what later ones give to themselves and to one another
    use[1, :, :2] = 9.0
    use[1, :, 2, 2:] = use[1, :, 3, 2:] = 9.0
    assert cache_budgets(use, plan(ROWS), step=1, n_entries=14, mean=3.5, power=1.0) == expected


def test_nothing_is_given_less_than_a_tenth_of_an_equal_part() -> None:
    use = relied_on([[0, 1, 1, 1], [0, 1, 1, 1]])
    # 160 entries: twice 2, and six times 26
    assert cache_budgets(use, plan(["CSSS", "CSSS"]), step=2, n_entries=30, mean=20.0, power=1.0) == [(2, 26), (2, 26)]


def test_a_kind_without_heads_takes_no_part() -> None:
    use = relied_on([[5, 5, 5, 5], [1, 1, 1, 1]])
    found = cache_budgets(use, plan(["CCCC", "SSSS"]), step=2, n_entries=14, mean=6.0, power=1.0)
    assert (found[0][0], found[1][1]) == (10, 2)


def test_nothing_stays_that_attention_would_not_read_and_the_rest_goes_to_the_others() -> None:
    # attention reads 4 of contextual heads and 20 of structural ones
    planned = plan(["CCSS"], keep=12, share=1 / 3)
    assert (planned.contextual, planned.structural) == ((4,), (20,))
    # alone they would share 32 entries 3 : 1, 12 and 4
    use = relied_on([[3, 3, 1, 1]])
    assert cache_budgets(use, planned, step=2, n_entries=14, mean=8.0, power=1.0) == [(4, 12)]
    # all that fits: 4 and, of 14 that exist, 14
    assert cache_budgets(use, planned, step=2, n_entries=14, mean=12.0, power=1.0) == [(4, 14)]


@given(data=st.data())
def test_budgets_are_whole_bounded_and_sum_to_what_was_asked(data: st.DataObject) -> None:
    rows = ["".join(row) for row in data.draw(st.lists(st.lists(st.sampled_from("CS"), min_size=4, max_size=4), min_size=1, max_size=4))]
    use = torch.rand(len(rows), 4, 4, 4, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) ** data.draw(st.integers(0, 9))
    planned = plan(rows, keep=data.draw(st.integers(6, 30)), share=data.draw(st.sampled_from([0.25, 0.5, 1.0])))
    step, mean, power = data.draw(st.integers(0, 2)), data.draw(st.floats(1, 30)), data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    n_entries = ENDS[step]
    found = cache_budgets(use, planned, step=step, n_entries=n_entries, mean=mean, power=power)
    total, room, largest = 0, 0, 0
    for layer, row in enumerate(rows):
        for place, (kind, reads) in enumerate((("C", planned.contextual), ("S", planned.structural))):
            budget, read, n = found[layer][place], reads[layer], row.count(kind)
            if n:
                assert 1 <= budget <= min(read, n_entries)
                total += n * budget
                room += n * min(read, n_entries)
                largest = max(largest, n)
    wanted = min(int(mean * 4 * len(rows)), room)
    assert total <= max(wanted, 4 * len(rows)), "a head holds one entry at least"
    assert total > wanted - largest


# --- how structural heads choose ----------------------------------------------------------------------------------------------


def test_the_prior_of_a_scale_is_shared_by_its_tokens_and_weighted_by_the_values() -> None:
    use = torch.zeros(4, 4, 4)
    use[:, 3] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    use[2, 3] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    ctx = context(14)
    scores = prior_scores(ctx, use)
    assert ctx.entry_scale is not None
    per_token = torch.tensor([0.1, 0.2 / 4, 0.3 / 9, 0.4 / 16])
    length = ctx.v.norm(dim=-1)
    torch.testing.assert_close(scores[:, 0], (length * per_token[ctx.entry_scale])[:, 0])
    torch.testing.assert_close(scores[:, 2, 0], 0.7 * length[:, 2, 0])
    # rows of other scales are not read, nor scales that do not exist yet
    earlier = prior_scores(context(5, step=2), use.roll(-1, 1).index_fill(2, torch.tensor([3]), float("nan")))
    assert torch.isfinite(earlier).all()


def method(folder: Path, *, rows: list[str] = ROWS, use: Tensor | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {"keep": 12, "mode": "decoupled"} | options
    return HACK(profile=saved(folder, rows, scale_use=use), **given).bind(INFO)


def asked(found: HACK, ctx: CompressionContext, label: str, heads: tuple[int, ...], budget: int) -> Retain:
    found.plan_for(INFO)
    return found.select(ctx, HeadGroup(heads, budget, label))


def test_structural_heads_do_not_look_at_queries_or_keys(tmp_path: Path) -> None:
    found, ctx = method(tmp_path), context(14)
    index = asked(found, ctx, "structural", (0, 1, 2, 3), 9).cache_index
    for name in ("q", "k"):
        other = asked(found, replace(ctx, **{name: getattr(context(14, seed=1), name)}), "structural", (0, 1, 2, 3), 9)
        assert torch.equal(other.cache_index, index), name
        contextual = [asked(found, c, "contextual", (0, 1, 2, 3), 9).cache_index for c in (ctx, replace(ctx, **{name: -getattr(ctx, name)}))]
        assert not torch.equal(*contextual), name
    longer = ctx.v.clone()
    longer[:, :, 17] *= 100
    assert (asked(found, replace(ctx, v=longer), "structural", (0, 1, 2, 3), 9).cache_index == 17).any(-1).all()


def test_heads_of_a_group_use_their_own_prior(tmp_path: Path) -> None:
    use = torch.full((2, 4, 4, 4), 0.1)
    # layer 1: head 1 reads scale 0, head 3 scale 3
    use[1, 1, 3, 0], use[1, 3, 3, 3] = 100.0, 10000.0
    ctx = context(14, heads=3)
    index = asked(method(tmp_path, use=use), ctx, "structural", (1, 2, 3), 3).cache_index
    assert (index[:, 0] == 0).any(-1).all()
    assert (index[:, 2] >= 14).all()


def test_contextual_heads_pool_the_attention_of_neighbours(tmp_path: Path) -> None:
    ctx = context(14)
    received = attention_received(ctx, torch.arange(16))
    pooled = torch.stack([F.pad(received, (2, 2), value=-1.0).roll(shift, -1)[..., 2:-2] for shift in range(-2, 3)]).amax(0)
    index = asked(method(tmp_path), ctx, "contextual", (0, 1, 2, 3), 7).cache_index
    expected = pooled.argsort(dim=-1, descending=True, stable=True)[..., :7].sort(-1).values
    assert torch.equal(index, expected)


def test_guidance_pairs_may_share_what_they_keep(tmp_path: Path) -> None:
    ctx = context(14, batch=4, has_guidance_pairs=True)
    for label in ("contextual", "structural"):
        for shares in (False, True):
            found = asked(method(tmp_path, share_cfg_selection=shares), ctx, label, (0, 1, 2, 3), 4)
            for index in (found.cache_index, found.attend_index):
                assert index is not None
                assert torch.equal(index[:2], index[2:]) == shares


# --- two budgets --------------------------------------------------------------------------------------------------------------


def test_attention_reads_its_own_budget_and_less_stays(tmp_path: Path) -> None:
    model = tiny_var()
    info = info_of(model)
    hack = HACK(profile=saved(tmp_path, ROWS, info), mode="decoupled", keep=12, cache_keep=6, contextual_share=0.5)
    bound = hack.bind(info)
    planned = bound.plan_for(info)
    with accel.apply(model, hack) as handle:
        last_logits(model, [1, 2])
    cache = handle.stats.cache
    held = {(layer, kind): 0 for layer in (0, 1) for kind in "CS"}
    for scale, end in enumerate(ENDS):
        attended = cached = 0
        new = end - (ENDS[scale - 1] if scale else 0)
        for layer, row in enumerate(ROWS):
            stays = {group.label[0].upper(): group.budget for group in bound.groups(info, layer, step=scale, n_entries=end)}
            for kind in "CS":
                there = held[layer, kind] + new
                reads = (planned.contextual if kind == "C" else planned.structural)[layer]
                attended += row.count(kind) * min(there, reads)
                held[layer, kind] = min(there, stays[kind]) if scale < 3 else 0
                cached += row.count(kind) * held[layer, kind]
        assert (cache.attended[scale], cache.cached[scale]) == (4 * attended, 4 * cached), scale
        if scale == 2:
            # of 8 heads with 6 entries each
            assert 48 - 4 < cached <= 48
    assert cache.attended[3] <= 4 * 8 * 12


def test_both_indexes_are_of_one_ranking(tmp_path: Path) -> None:
    found, ctx = method(tmp_path, contextual_share=1), context(14)
    for label in ("contextual", "structural"):
        answer = asked(found, ctx, label, (0, 1, 2, 3), 5)
        assert answer.attend_index is not None
        assert answer.attend_index.shape[2] == 12
        assert answer.merge is None
        # what stays are the best of what is read
        assert (answer.cache_index[..., None] == answer.attend_index[..., None, :]).any(-1).all()
    # where as many stay as are read one index is enough
    assert asked(found, ctx, "contextual", (0, 1, 2, 3), 12).attend_index is None


def test_equal_budgets_read_what_stays(tmp_path: Path) -> None:
    model = tiny_var()
    path = saved(tmp_path, ROWS, info_of(model))
    with accel.apply(model, "hack", profile=path, mode="decoupled", keep=10, cache_keep=10, contextual_share=1, reliance_power=0) as handle:
        last_logits(model, [1])
    cache = handle.stats.cache
    assert [cache.attended[scale] for scale in range(3)] == [cache.cached[scale] for scale in range(3)] == [16, 80, 160]
    assert cache.attended[3] == 160


def test_everything_may_be_read_of_a_small_cache(tmp_path: Path) -> None:
    model = tiny_var()
    path = saved(tmp_path, ROWS, info_of(model))
    with accel.apply(model, "hack", profile=path, mode="decoupled", keep=1.0, cache_keep=3, reliance_power=0) as handle:
        last_logits(model, [1])
    cache = handle.stats.cache
    # two rows of eight heads; what is left of earlier scales, and all of this one
    assert [cache.attended[scale] // 16 for scale in range(4)] == [1, 5, 3 + 9, 3 + 16]
    assert [cache.cached[scale] // 16 for scale in range(4)] == [1, 3, 3, 0]


def test_a_third_stays_unless_it_is_said(tmp_path: Path) -> None:
    budgets = [
        [method(tmp_path, keep=12, cache_keep=cache_keep).groups(INFO, layer, step=2, n_entries=14) for layer in (0, 1)] for cache_keep in (None, 4)
    ]
    assert budgets[0] == budgets[1]
    assert sum(len(group.heads) * group.budget for groups in budgets[0] for group in groups) == 32


def test_a_list_of_scales_longer_than_the_calibrated_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, ROWS)
    longer, shorter = (replace(INFO, scale_shapes=shapes) for shapes in ((*SHAPES, (6, 6)), SHAPES[:3]))
    HACK(profile=path, keep=0.9).bind(longer).plan_for(longer)
    found = HACK(profile=path, keep=0.9, mode="decoupled")
    with pytest.raises(UnsupportedError) as caught:
        found.bind(longer).groups(longer, 0, step=1, n_entries=5)
    assert "needs to know what is read at every scale" in caught.value.reasons[0]
    assert found.bind(shorter).groups(shorter, 0, step=1, n_entries=5)


def test_heads_that_rely_on_nothing_share_alike() -> None:
    planned, use = plan(ROWS), profile_of(ROWS).scale_use * 0
    assert {n for layer in cache_budgets(use, planned, step=1, n_entries=5, mean=3.0, power=1.0) for n in layer} == {3}
