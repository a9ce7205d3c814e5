"""Random entries: fair, the same for everybody, and never back once they are gone."""

from __future__ import annotations

import pytest
import torch
from next_scale import context

from accel.errors import OptionError
from accel.patches.random_kv import STEP, RandomKV, mixed
from accel.protocols import HeadGroup

GROUP = HeadGroup((0, 1, 2, 3), 10)


def test_seed_layer_and_head_decide_and_nothing_else() -> None:
    index = RandomKV().select(context(14), GROUP).cache_index
    assert torch.equal(index, RandomKV().select(context(14, seed=7), GROUP).cache_index)
    assert torch.equal(index[0], index[1]), "all rows alike"
    assert len({tuple(row) for row in index[0].tolist()}) == 4, "every head on its own"
    assert not torch.equal(index, RandomKV(seed=1).select(context(14), GROUP).cache_index)


def test_heads_are_known_by_their_number_whatever_the_group() -> None:
    whole = RandomKV().select(context(14), GROUP).cache_index
    part = RandomKV().select(context(14, heads=2), HeadGroup((3, 1), 10)).cache_index
    assert torch.equal(part, whole[:, [3, 1]])


def test_survivors_of_all_scales_are_a_fair_draw() -> None:
    counts = torch.zeros(30)
    for seed in range(300):
        method = RandomKV(seed=seed)
        first = method.select(context(5, 2), GROUP)
        ctx = context(14)
        left = torch.cat([first.cache_index, torch.arange(14, 30).expand(2, 4, -1)], 2)
        later = method.select(context(10, position=left, valid=torch.ones(2, 4, 26, dtype=torch.bool)), GROUP)
        assert ctx.k.shape[2] == 30
        counts += torch.bincount(left.gather(2, later.cache_index)[0].flatten(), minlength=30)
    share = counts / (300 * 4)
    # a third of all positions, and no scale favoured: six standard deviations of a binomial draw
    assert (share - 1 / 3).abs().max() < 6 * (1 / 3 * 2 / 3 / 1200) ** 0.5


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    RandomKV().select(context(14), GROUP)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numbers_look_random_in_every_bit() -> None:
    bits = mixed(torch.arange(4096) * STEP)[:, None] >> torch.arange(64) & 1
    # half of them are set: six standard deviations
    assert (bits.float().mean(0) - 0.5).abs().max() < 6 * 0.5 / 64
    # the first numbers that the published SplitMix64 draws from seed 0
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [n % 2**64 for n in mixed(torch.tensor([1, 2, 3]) * STEP).tolist()] == published


@pytest.mark.parametrize("seed", [0.5, "a", True], ids=str)
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(OptionError, match="random_kv: seed must be a whole number"):
        RandomKV(seed=seed)  # type: ignore[arg-type]
