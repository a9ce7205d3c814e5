"""What the two kinds of heads keep: sampled queries, protected and truncated scales, merges (kv-compression.md §2.4, §2.5)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from next_scale import context
from torch import Tensor
from torch.nn import functional as F

from accel.patches import _head_selectors
from accel.patches._head_selectors import grid_places, merge_dropped, query_sample, structural_index, sub_grid
from accel.patches.hosts.entries import Entries
from accel.protocols import CompressionContext, Retain


def over(height: int, width: int) -> CompressionContext:
    """Queries of a single map of this size."""
    n = height * width
    q = torch.zeros(1, 1, n, 8)
    return replace(context(0, batch=1, heads=1), step=0, q=q, k=q, v=q, scale_shapes=((height, width),))


# --- sampled queries ----------------------------------------------------------------------------------------------------------


def test_all_queries_of_a_scale_with_no_more_than_asked() -> None:
    for n in (9, 10, 32, None):
        assert query_sample(over(3, 3), n).tolist() == list(range(9))


@pytest.mark.parametrize("height, width, n", [(13, 13, 32), (3, 3, 4), (5, 7, 8), (16, 1, 8), (1, 1, 1)])
def test_rows_are_the_middles_of_equal_parts(height: int, width: int, n: int) -> None:
    size = height * width
    assert math.gcd(max(1, size // n), width) == 1
    # round((i + ½) · size / n − ½), ties up
    expected = [math.floor((i + 0.5) * size / n) for i in range(n)]
    assert query_sample(over(height, width), n).tolist() == sorted(set(expected))


def test_a_stride_that_meets_few_columns_only_becomes_a_grid() -> None:
    # 8 divides 16: every eighth of 256 would be of two columns. 5 rows by 6 columns, in the middles of equal parts
    rows, columns = [1, 4, 8, 11, 14], [1, 4, 6, 9, 12, 14]
    assert query_sample(over(16, 16), 32).tolist() == [16 * row + column for row in rows for column in columns]
    # 64 // 16 = 4 and the width 4 share a factor: 8 rows of 2 columns in a high map
    found = query_sample(over(16, 4), 16)
    assert sorted({int(place) % 4 for place in found}) == [1, 3]
    assert len({int(place) // 4 for place in found}) == 8


@settings(max_examples=200)
@given(height=st.integers(1, 70), width=st.integers(1, 70), n=st.integers(1, 40))
def test_a_sample_is_never_empty_and_sees_all_parts_of_a_map(height: int, width: int, n: int) -> None:
    found = query_sample(over(height, width), n)
    assert 1 <= len(found) <= n or len(found) == height * width <= n
    assert (found.diff() > 0).all()
    assert found[0] >= 0
    assert found[-1] < height * width
    rows, columns = sub_grid(height, width, n)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= n
    if max(height, width) < 4 * min(height, width) and n >= 16 and height * width > n:
        # at least half of the rows asked for are used, and both halves of the map are seen
        assert len(found) >= n / 2
        assert {int(place) % width >= width / 2 for place in found} == {False, True} or width == 1
        assert {int(place) // width >= height / 2 for place in found} == {False, True} or height == 1


# --- structural heads ---------------------------------------------------------------------------------------------------------


def chosen(ctx: CompressionContext, scores: Tensor, budget: int, **changes: Any) -> Tensor:
    options: dict[str, Any] = {"n_protected": 5, "middle_share": 0.25, "recent_policy": "grid"} | changes
    index = structural_index(ctx, scores, budget, **options)
    assert index.shape == (*scores.shape[:2], budget)
    assert (index.diff(dim=-1) > 0).all()
    assert int(index.min()) >= 0
    assert int(index.max()) < scores.shape[2]
    return index


@pytest.mark.parametrize("worth", [0.0, -torch.inf], ids=["nothing", "−inf"])
def test_first_entries_and_the_newest_scale_stay_whatever_their_scores(worth: float) -> None:
    scores = torch.rand(2, 4, 30, generator=torch.Generator().manual_seed(0)) + 1
    scores[..., 7] = torch.inf
    scores[..., :5] = scores[..., 14:] = worth
    # 21 are protected: two of the nine between are left, by score
    index = chosen(context(14), scores, 23)
    assert torch.equal(index[..., :5], torch.arange(5).expand(2, 4, -1))
    assert torch.equal(index[..., 7:], torch.arange(14, 30).expand(2, 4, -1))
    between = scores[..., 5:14].argsort(-1, descending=True)[..., :2].sort(-1).values + 5
    assert torch.equal(index[..., 5:7], between)
    # no room for any of the others
    assert torch.equal(chosen(context(14), scores, 21), torch.cat([torch.arange(5), torch.arange(14, 30)]).expand(2, 4, -1))


def test_ties_between_go_to_the_lower_entry() -> None:
    index = chosen(context(14), torch.ones(2, 4, 30), 24)
    assert index[0, 0].tolist() == [*range(8), *range(14, 30)]


# room for 8 behind the first five: 2 of the middle, 6 of the scale: 2 rows of 3
GRID_OF_SIX = [0, 1, 3, 8, 9, 11]


@pytest.mark.parametrize(
    "budget, policy, share, middle, newest",
    [
        (13, "grid", 0.25, [9, 13], GRID_OF_SIX),
        (13, "score", 0.25, [9, 13], [2, 5, 7, 10, 13, 15]),
        # one beyond the grid's six goes by score
        (14, "grid", 0.25, [9, 13], [*GRID_OF_SIX, 15]),
        (13, "grid", 0.0, [], [0, 1, 2, 3, 8, 9, 10, 11]),
        (13, "score", 1.0, [5, 6, 7, 8, 9, 11, 12, 13], []),
        # the middle has nine: 6 of the 15 are the scale's
        (20, "grid", 1.0, [*range(5, 14)], GRID_OF_SIX),
        (6, "grid", 0.25, [], [0]),
    ],
    ids=["grid", "score", "filled by score", "no middle", "middle only", "middle full", "one"],
)
def test_a_scale_that_does_not_fit_keeps_a_part(budget: int, policy: str, share: float, middle: list[int], newest: list[int]) -> None:
    scores = torch.zeros(2, 4, 30)
    # of the middle 13 before 9 before the others but 10; of the scale the odd ones of the right half and two more, 15 first
    scores[..., 13], scores[..., 9], scores[..., 10] = 9.0, 8.0, -1.0
    for place, score in ((29, 7.0), (16, 6.0), (19, 6.0), (21, 6.0), (24, 6.0), (27, 6.0)):
        scores[..., place] = score
    index = chosen(context(14), scores, budget, recent_policy=policy, middle_share=share)
    assert index[1, 2].tolist() == [*range(5), *middle, *(14 + place for place in newest)]


def test_the_grid_keeps_the_proportion_of_the_map() -> None:
    # 12 places of 4 × 16: 1 row of 12? 1.73 rows would be in proportion, so one row
    assert sub_grid(4, 16, 12) == (1, 12)
    assert sub_grid(4, 16, 16) == (2, 8)
    assert grid_places(over(4, 16), 16).tolist() == [16 * row + column for row in (0, 2) for column in range(0, 16, 2)]
    assert grid_places(over(16, 4), 16).tolist() == [4 * row + column for row in range(0, 16, 2) for column in (0, 2)]
    assert grid_places(over(4, 4), 0).tolist() == []
    assert grid_places(over(4, 4), 16).tolist() == list(range(16))
    # many times as high as wide
    assert sub_grid(32, 2, 8) == (8, 1)
    assert sub_grid(2, 32, 8) == (1, 8)


def test_protected_entries_may_reach_into_the_scale_being_made() -> None:
    """Twenty first entries, of which fourteen are old: the first six of the new scale are protected too, and stay the first twenty."""
    scores = torch.zeros(2, 4, 30)
    scores[..., 21:] = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0)) + 1
    for policy in ("grid", "score"):
        index = chosen(context(14), scores, 24, n_protected=20, recent_policy=policy)
        assert torch.equal(index[..., :20], torch.arange(20).expand(2, 4, -1)), policy
    best = scores[..., 20:].argsort(-1, descending=True)[..., :4].sort(-1).values + 20
    assert torch.equal(index[..., 20:], best)


def test_a_budget_below_the_first_entries_keeps_the_first_of_them() -> None:
    # reached by contextual heads that choose the structural way, for the ablation
    assert chosen(context(14), torch.rand(2, 4, 30), 3)[0, 0].tolist() == [0, 1, 2]


@given(data=st.data())
def test_structural_indexes_keep_every_promise(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    n_old, n_new = data.draw(st.integers(0, 30)), height * width
    budget = data.draw(st.integers(1, max(1, n_old + n_new - 1)))
    n_protected, share = data.draw(st.integers(0, budget - 1)), data.draw(st.floats(0, 1))
    policy = data.draw(st.sampled_from(["grid", "score"]))
    if budget >= n_old + n_new:
        return
    scores = torch.rand(1, 2, n_old + n_new, generator=torch.Generator().manual_seed(budget))
    q = torch.zeros(1, 2, n_new, 8)
    ctx = replace(context(0, batch=1, heads=2), step=1, q=q, scale_shapes=((1, 1), (height, width)))
    index = chosen(ctx, scores, budget, n_protected=n_protected, middle_share=share, recent_policy=policy)
    kept = set(index[0, 0].tolist())
    assert set(range(min(n_protected, n_old + n_new))) <= kept
    if budget >= n_protected + n_new and n_protected <= n_old:
        assert set(range(n_old, n_old + n_new)) <= kept
    elif n_protected <= n_old:
        n_middle = min(math.floor(share * (budget - n_protected)), n_old - n_protected)
        assert len([place for place in kept if n_protected <= place < n_old]) == n_middle
        if policy == "grid":
            assert {n_old + place for place in grid_places(ctx, budget - n_protected - n_middle).tolist()} <= kept


# --- merge --------------------------------------------------------------------------------------------------------------------


def by_definition(rows: Tensor, keys: Tensor, kept: list[int], *, is_normalised: bool) -> dict[int, Tensor]:
    """§2.5 of one head: the new row of every kept entry that something is merged into. rows: keys or values (N, D)."""
    members: dict[int, list[tuple[int, float]]] = {}
    for i in range(len(keys)):
        if i not in kept:
            cosines = [float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in kept]
            best = max(range(len(kept)), key=cosines.__getitem__)
            members.setdefault(kept[best], []).append((i, max(0.0, cosines[best]) if is_normalised else cosines[best]))
    found = {}
    for anchor, parts in members.items():
        total = rows[anchor].double() + sum(weight * rows[i].double() for i, weight in parts)
        found[anchor] = total / (1 + (sum(weight for _, weight in parts) if is_normalised else len(parts)))
    return found


@pytest.mark.parametrize("chunk", [3, 1024], ids=["in chunks", "at once"])
@pytest.mark.parametrize("renorm_keys", [False, True])
@pytest.mark.parametrize("is_normalised", [False, True], ids=["lookm", "normalised"])
def test_merges_equal_their_definition_and_all_others_stay(
    is_normalised: bool, renorm_keys: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_head_selectors, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2, 3, 20, 4, generator=draw)
    # different for every row and head; six of 20 leave some anchors alone
    kept = torch.rand(2, 3, 20, generator=draw).argsort(-1)[..., :6].sort(-1).values
    merge = merge_dropped(k, kept, is_normalised=is_normalised)
    merged = Entries(k, v).merged(Retain(kept, merge=merge, renorm_keys=renorm_keys))
    n_alone = 0
    for row in range(2):
        for head in range(3):
            keys, index = k[row, head], kept[row, head].tolist()
            expected_k, expected_v = (by_definition(t[row, head], keys, index, is_normalised=is_normalised) for t in (k, v))
            n_alone += 6 - len(expected_k)
            for place in range(20):
                got = (merged.k[row, head, place], merged.v[row, head, place])
                if place in expected_k:
                    key = F.normalize(expected_k[place], dim=0) if renorm_keys else expected_k[place]
                    torch.testing.assert_close(got[0].double(), key, rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(got[1].double(), expected_v[place], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(got[0], keys[place])
                    assert torch.equal(got[1], v[row, head, place])
    assert n_alone > 0, "anchors into which nothing is merged were tried"


def test_a_dropped_entry_that_points_away_from_all_weighs_less_than_nothing_only_in_lookm() -> None:
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]])[None, None]
    kept = torch.tensor([[[0, 1]]])
    v = torch.tensor([[4.0, 0.0], [0.0, 4.0], [10.0, 10.0]])[None, None]
    lookm, normalised = (
        Entries(k, v).merged(Retain(kept, merge=merge_dropped(k, kept, is_normalised=is_normalised))) for is_normalised in (False, True)
    )
    # cosines −0.6 and −0.8: the first is larger
    torch.testing.assert_close(lookm.v[0, 0], torch.tensor([[-1.0, -3.0], [0.0, 4.0], [10.0, 10.0]]))
    torch.testing.assert_close(lookm.k[0, 0, 0], torch.tensor([(1 + 0.36) / 2, 0.48 / 2]))
    assert torch.equal(normalised.v, v)
    assert torch.equal(normalised.k, k)


def test_similarity_is_an_angle_and_not_a_length() -> None:
    # the long key has the larger product with the dropped one, the short one points the same way
    k = torch.tensor([[10.0, 10.0], [0.1, 0.0], [1.0, 0.0]])[None, None]
    merge = merge_dropped(k, torch.tensor([[[0, 1]]]), is_normalised=False)
    merged = Entries(k, k).merged(Retain(torch.tensor([[[0, 1]]]), merge=merge))
    assert torch.equal(merged.k[0, 0, 0], k[0, 0, 0])
    torch.testing.assert_close(merged.k[0, 0, 1], torch.tensor([0.55, 0.0]))
