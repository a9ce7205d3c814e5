"""Heavy hitters: attention of earlier scales and of this one, beside the newest entries."""

from __future__ import annotations

import pytest
import torch
from next_scale import context

from accel.errors import OptionError
from accel.patches.h2o import H2O
from accel.protocols import HeadGroup


def planted(step: int = 3) -> dict[str, torch.Tensor]:
    """q and k such that every query of the scale puts nearly all its attention on entry 3 + head."""
    q, k = torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 30, 8)
    q[..., 0] = 10.0
    for head in range(4):
        k[:, head, 3 + head, 0] = 1.0
    return {"q": q, "k": k}


def test_what_this_scale_attends_to_stays() -> None:
    index = H2O(recent_share=0.5).select(context(14, **planted()), HeadGroup((0, 1, 2, 3), 4)).cache_index
    for head in range(4):
        # half of the budget is the newest two; of the others, which tie, the first stays
        assert index[:, head].tolist() == [[0, 3 + head, 28, 29]] * 2


def test_attention_of_earlier_scales_counts() -> None:
    mass = torch.zeros(2, 4, 30)
    # 16 queries of this scale give nearly 16 to the planted entry: 20 beats it, 10 does not
    mass[:, :, 9], mass[:, :, 12] = 20.0, 10.0
    select = H2O(recent_share=0).select
    ctx = context(14, attention_mass=mass, **planted())
    assert (select(ctx, HeadGroup((0, 1, 2, 3), 1)).cache_index == 9).all()
    two = select(ctx, HeadGroup((0, 1, 2, 3), 2)).cache_index
    assert two[0].tolist() == [[3, 9], [4, 9], [5, 9], [6, 9]]
    assert select(ctx, HeadGroup((0, 1, 2, 3), 3)).cache_index[0, 1].tolist() == [4, 9, 12]


def test_a_few_queries_stand_for_all_of_the_scale() -> None:
    mass = torch.zeros(2, 4, 30)
    mass[:, :, 9] = 15.0
    for n_queries in (1, 4, None):
        index = H2O(recent_share=0, n_queries=n_queries).select(context(14, attention_mass=mass, **planted()), HeadGroup((0, 1, 2, 3), 1)).cache_index
        assert index[0].flatten().tolist() == [3, 4, 5, 6], n_queries


def test_dropping_one_entry_drops_the_one_with_the_least_attention() -> None:
    ctx = context(14)
    index = H2O(recent_share=0, n_queries=None).select(ctx, HeadGroup((0, 1, 2, 3), 29)).cache_index
    received = (ctx.q @ ctx.k.mT).softmax(-1).sum(2)
    for row in range(2):
        for head in range(4):
            assert set(range(30)) - set(index[row, head].tolist()) == {int(received[row, head].argmin())}


def test_recent_share_one_keeps_the_newest_only() -> None:
    index = H2O(recent_share=1).select(context(14, **planted()), HeadGroup((0, 1, 2, 3), 5)).cache_index
    assert (index == torch.arange(25, 30)).all()


@pytest.mark.parametrize("options", [{"recent_share": 1.5}, {"recent_share": -0.1}, {"n_queries": 0}, {"n_queries": 2.5}], ids=str)
def test_options_out_of_range_raise(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="h2o: "):
        H2O(**options)
