"""CAKE: how one budget is divided among layers, what an entry is worth, and that nothing of one generation reaches the next."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from next_scale import INFO, context, last_logits, tiny_var

import accel
from accel.errors import OptionError
from accel.patches._cache import attention_of, divided
from accel.patches.cake import CAKE
from accel.patches.hosts.nextscale.cache import CompressedCache
from accel.protocols import CompressionContext, HeadGroup

HEADS = (0, 1, 2, 3)
FOUR = replace(INFO, n_layers=4)


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=12), most=st.integers(1, 400), total=st.integers(12, 2000), least=st.floats(0, 1)
)  # fmt: skip
def test_parts_of_a_budget_are_whole_bounded_and_sum_to_it(weights: list[float], most: int, total: int, least: float) -> None:
    parts = divided(total, weights, most=most, least_share=least)
    assert sum(parts) == min(total, most * len(weights))
    lowest = min(most, max(1, math.floor(least * min(total, most * len(weights)) / len(weights))))
    assert all(lowest <= part <= most for part in parts)


def test_parts_follow_the_weights_and_what_does_not_fit_goes_to_the_others() -> None:
    assert divided(100, [1, 2, 2], most=100, least_share=0.1) == [20, 40, 40]
    assert divided(100, [0, 0, 0, 0], most=100, least_share=0.1) == [25, 25, 25, 25]
    # 8 of 10 parts are 160, of which 100 fit; the other 100 are divided 1 : 1
    assert divided(200, [8, 1, 1], most=100, least_share=0.1) == [100, 50, 50]
    # a layer that asks for nothing gets a tenth of an equal part
    assert divided(100, [0, 1], most=100, least_share=0.1) == [5, 95]
    assert divided(10, [1, 1, 1], most=100, least_share=0.1) == [4, 3, 3]


def budgets(shared: Any, *, step: int = 2, n_entries: int = 30) -> list[int]:
    return [CAKE(keep=0.5).groups(FOUR, layer, step=step, n_entries=n_entries, shared=shared)[0].budget for layer in range(4)]


def test_the_scale_before_divides_the_budget() -> None:
    # half of 30 entries in each of four layers
    assert budgets(None) == [15, 15, 15, 15]
    assert budgets({"cake 1": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}}) == [6, 12, 18, 24]
    # what was seen before the last scale is old
    assert budgets({"cake 0": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}}) == [15, 15, 15, 15]
    # a layer that was not looked at, because it was released, counts as an average one
    assert budgets({"cake 1": {0: 1.0, 1: 3.0, 2: 2.0}}) == [8, 22, 15, 15]
    # where all that has been made so far fits, nothing is dropped
    assert budgets({"cake 1": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}}, n_entries=14) == [14, 14, 14, 14]


def test_preference_is_entropy_and_variance_by_their_exponents() -> None:
    ctx = context(14)
    CAKE(window=5, tau_spread=2.0, tau_shift=0.5).observe(ctx, HeadGroup(HEADS, 30))
    attention = attention_of(ctx, torch.arange(11, 16)).double()
    spread = sum(-float((a * a.log()).sum()) for a in attention.flatten(0, 1)) / 8
    shift = sum(float(((a - a.mean(0)) ** 2).mean(0).sum()) for a in attention.flatten(0, 1)) / 8
    assert ctx.shared["cake 3"][1] == pytest.approx(spread**0.5 * shift**2, rel=1e-4)


def test_layers_that_read_the_same_entries_with_every_query_ask_for_nothing() -> None:
    """Planted: one layer reads one entry with all queries, one all entries alike, one different entries."""
    q, k = torch.zeros(3, 2, 4, 16, 8), torch.zeros(3, 2, 4, 30, 8)
    k[:, :, :, :8] = torch.eye(8)
    q[0, ..., 0] = 30.0
    q[2] = 30 * torch.eye(8).repeat(2, 1)
    q[2] += 20 * torch.eye(8).roll(1, 0).repeat(2, 1)
    shared: dict[str, Any] = {}
    for layer in range(3):
        CAKE(window=8).observe(replace(context(14, q=q[layer], k=k[layer]), layer=layer, shared=shared), HeadGroup(HEADS, 30))
    seen = shared["cake 3"]
    assert max(seen[0], seen[1]) < 1e-6 < seen[2]


def planted(restless: int, steady: int) -> CompressionContext:
    """All heads: entry `steady` gets more of all queries together than `restless`, which gets most of every second one."""
    q, k = torch.zeros(1, 4, 16, 8), torch.zeros(1, 4, 30, 8)
    q[:, :, 0::2, 0] = q[:, :, 1::2, 1] = 1.0
    k[:, :, steady, :2] = 4.0
    k[:, :, restless, 0] = 4.3
    return context(14, batch=1, q=q, k=k)


def test_gamma_prefers_what_is_read_unevenly() -> None:
    chosen = [
        CAKE(window=8, kernel=1, gamma=gamma).select(planted(5, 9), HeadGroup(HEADS, 2)).cache_index[0, 0].tolist() for gamma in (0.0, 200.0)
    ]
    assert chosen == [[9, 29], [5, 29]]


def test_neighbours_are_pooled_by_their_mean() -> None:
    index = CAKE(window=2, kernel=3).select(planted(5, 9), HeadGroup(HEADS, 5)).cache_index
    assert index[0, 0].tolist() == [4, 5, 6, 28, 29]


@pytest.mark.parametrize("options", [{"kernel": 4}, {"window": 0}, {"gamma": -1}, {"tau_spread": 0}, {"tau_shift": float("nan")}], ids=str)
def test_wrong_options_raise(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"cake: {next(iter(options))} must be"):
        CAKE(**options)


def test_nothing_of_one_generation_reaches_the_next() -> None:
    model = tiny_var(num_hidden_layers=3)
    with accel.apply(model, "cake", keep=0.3):
        first = last_logits(model, [1, 2])
        last_logits(model, [3, 4], seed=9)
        assert torch.equal(last_logits(model, [1, 2]), first)


def test_what_layers_hold_sums_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var(num_hidden_layers=3)
    held: list[int] = []
    begin = CompressedCache.begin

    def spy(cache: CompressedCache, scale: int) -> None:
        if scale == 3:
            held.extend(cache.entries(layer)[1].shape[-1] for layer in range(3))
        begin(cache, scale)

    monkeypatch.setattr(CompressedCache, "begin", spy)
    with accel.apply(model, "cake", keep=6):
        last_logits(model, [1])
    assert sum(held) == 18
    assert len(set(held)) > 1


def test_all_kept_is_bit_equal_to_dense() -> None:
    model = tiny_var()
    dense = last_logits(model, [1, 2])
    with accel.apply(model, "cake", keep=1.0):
        assert torch.equal(last_logits(model, [1, 2]), dense)
