"""The observation window: who votes, who is voted for, and the pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from next_scale import context

from accel.errors import OptionError
from accel.patches.snapkv import SnapKV
from accel.protocols import HeadGroup

HEADS = (0, 1, 2, 3)


def planted(places: dict[int, int], *, window: int = 2) -> dict[str, torch.Tensor]:
    """q and k such that the last `window` queries of the scale attend to places[head], and all others to entry 0."""
    q, k = torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 30, 8)
    q[:, :, :-window, 0], q[:, :, -window:, 1] = 10.0, 10.0
    k[:, :, 0, 0] = 1.0
    for head, place in places.items():
        k[:, head, place, 1] = 1.0
    return {"q": q, "k": k}


def test_only_the_last_queries_vote_and_their_own_entries_stay() -> None:
    ctx = context(14, **planted({0: 8, 1: 9, 2: 20, 3: 5}))
    index = SnapKV(window=2, kernel=1).select(ctx, HeadGroup(HEADS, 4)).cache_index
    assert index[0].tolist() == [[0, 8, 28, 29], [0, 9, 28, 29], [0, 20, 28, 29], [0, 5, 28, 29]]
    # entry 0 is the first of those that tie, not what the other queries attend to: without room it goes
    assert SnapKV(window=2, kernel=1).select(ctx, HeadGroup(HEADS, 3)).cache_index[1].tolist() == [[0, 8, 29], [0, 9, 29], [0, 20, 29], [0, 5, 29]]


def test_neighbours_of_what_is_voted_for_stay_with_it() -> None:
    ctx = context(14, **planted({0: 8, 1: 9, 2: 20, 3: 5}))
    index = SnapKV(window=2, kernel=5, pooling="max").select(ctx, HeadGroup(HEADS, 7)).cache_index
    for head, place in enumerate((8, 9, 20, 5)):
        assert index[0, head].tolist() == [*range(place - 2, place + 3), 28, 29]


def test_average_pooling_ranks_what_lies_between_two_votes_highest() -> None:
    extra = planted({0: 8, 1: 8, 2: 8, 3: 8})
    extra["k"][:, :, 11, 1] = 1.0
    # kernel 5 around 9 and 10 covers both votes
    index = SnapKV(window=1, kernel=5, pooling="avg").select(context(14, **extra), HeadGroup(HEADS, 3)).cache_index
    assert (index == torch.tensor([9, 10, 29])).all()
    index = SnapKV(window=1, kernel=5, pooling="max").select(context(14, **extra), HeadGroup(HEADS, 3)).cache_index
    assert (index == torch.tensor([6, 7, 29])).all()


def test_the_window_lends_no_votes_to_its_neighbours() -> None:
    # the window attends to its own entry 28: entries 26 and 27 beside it gain nothing
    ctx = context(14, **planted({0: 28, 1: 28, 2: 28, 3: 28}))
    index = SnapKV(window=2, kernel=5).select(ctx, HeadGroup(HEADS, 4)).cache_index
    assert index[0, 0].tolist() == [0, 1, 28, 29]


def test_a_scale_smaller_than_the_window_votes_whole() -> None:
    index = SnapKV(window=32, kernel=1).select(context(1, 1), HeadGroup(HEADS, 3)).cache_index
    assert index.shape == (2, 4, 3)
    # at most half of the budget for the window's own entries
    assert (index[..., -1] == 4).all()


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": 1.5}, {"kernel": 4}, {"kernel": 0}, {"kernel": True}, {"pooling": "sum"}], ids=str
)
def test_options_out_of_range_raise(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="snapkv: "):
        SnapKV(**options)
