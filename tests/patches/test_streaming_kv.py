"""Sinks and a window."""

from __future__ import annotations

import pytest
import torch
from next_scale import context, last_logits, tiny_var
from torch import Tensor

import accel
from accel.errors import OptionError
from accel.models.cache import ScaleCache, Schedule
from accel.patches.streaming_kv import StreamingKV
from accel.protocols import HeadGroup


@pytest.mark.parametrize(
    "sinks, budget, expected",
    [(4, 9, [0, 1, 2, 3, 25, 26, 27, 28, 29]), (0, 3, [27, 28, 29]), (4, 3, [0, 1, 29]), (4, 1, [29]), (2, 29, [0, 1, *range(3, 30)])],
    ids=["both", "no sinks", "small", "one entry", "all but one"],
)
def test_the_first_entries_and_the_newest_stay(sinks: int, budget: int, expected: list[int]) -> None:
    index = StreamingKV(sinks=sinks).select(context(14), HeadGroup((0, 1, 2, 3), budget)).cache_index
    assert index.shape == (2, 4, budget)
    assert (index == torch.tensor(expected)).all()


class Window(ScaleCache):
    """The definition, as a mask over everything: 2 sinks and the 5 newest so far."""

    def update(self, layer: int, k: Tensor, v: Tensor, *, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, _ = super().update(layer, k, v, query=query)
        assert query is not None
        places = torch.arange(k.shape[2])
        return k, v, ((places < 2) | (places >= k.shape[2] - 5)).expand(query.shape[2], -1)


def test_a_generation_equals_a_mask_over_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    with accel.apply(model, "streaming_kv", keep=7, sinks=2):
        compressed = last_logits(model, [1, 4])
    plain = last_logits(model, [1, 4])
    monkeypatch.setattr(model, "new_cache", lambda schedule, **_: Window(Schedule.of(schedule)))
    torch.testing.assert_close(compressed, last_logits(model, [1, 4]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(compressed, plain, atol=1e-2)


@pytest.mark.parametrize("options", [{"sinks": -1}, {"sinks": 1.5}], ids=str)
def test_options_out_of_range_raise(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="streaming_kv: sinks must be"):
        StreamingKV(**options)
