"""A cache layer that loses entries: what transformers does to cache layers, and what a method's records make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.kv_runs import CACHE, METHODS, Uneven, groups_of, kept_of, small
from support import tiny_llama
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import accel
from accel.errors import UnsupportedError
from accel.patches.hosts.entries import Entries
from accel.patches.hosts.transformers.kv.layer import CompressedLayer

every_method = pytest.mark.parametrize("method", METHODS)
without_h2o = pytest.mark.parametrize("method", [name for name in METHODS if name != "h2o"])


def ids(length: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def conversation(model: Any, *steps: int | str, batch: int = 1, seed: int = 0) -> tuple[Tensor, DynamicCache]:
    """The last logits behind passes of so many tokens each; "-3" cuts three. Tokens are those of their places, cut or not."""
    held = DynamicCache(config=model.config)
    text, out = ids(400, batch=batch, seed=seed), None
    for step in steps:
        if isinstance(step, str):
            held.crop(int(step))
            continue
        past = int(held.get_seq_length())
        out = model(text[:, past : past + step], **{CACHE: held}).logits
    assert out is not None
    return out, held


def assert_same_conversation(one: tuple[Tensor, DynamicCache], other: tuple[Tensor, DynamicCache]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert int(one[1].get_seq_length()) == int(other[1].get_seq_length())
    kept = kept_of(one[1]), kept_of(other[1])
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][layer], kept[1][layer]) for layer in kept[0])


# --- crop ----------------------------------------------------------------------------------------------------------------------


@every_method
@torch.no_grad()
def test_a_crop_of_newer_tokens_is_as_if_they_had_not_come(method: str) -> None:
    model = tiny_llama()
    with accel.apply(model, small(method, every=100)):
        assert_same_conversation(conversation(model, 90, 1, 1, 1, "-2", 1, 1), conversation(model, 90, 1, 1, 1))
        assert_same_conversation(conversation(model, 90, 1, 1, "-2", 1), conversation(model, 90, 1))


# h2o cannot take back the attention that the cut tokens have given
@without_h2o
@torch.no_grad()
def test_evictions_behind_a_crop_are_as_if_the_cut_tokens_had_not_come(method: str) -> None:
    model = tiny_llama()
    with accel.apply(model, small(method, every=4)):
        assert_same_conversation(conversation(model, 90, 1, 1, 1, "-2", 1, 1, 1, 1, 1), conversation(model, 90, *[1] * 6))


@without_h2o
@torch.no_grad()
def test_a_crop_of_a_whole_layer_is_as_if_the_cut_tokens_had_not_come(method: str) -> None:
    model = tiny_llama()
    with accel.apply(model, small(method, keep=50, min_entries=1, every=4)):
        # nothing is dropped before 51 entries
        assert_same_conversation(conversation(model, 40, 1, 1, "-2", 60, 1, 1), conversation(model, 40, 60, 1, 1))
        assert_same_conversation(conversation(model, 49, "-9", 60, 1), conversation(model, 40, 60, 1))


@torch.no_grad()
def test_mass_and_counts_follow_a_crop() -> None:
    model = tiny_llama()
    with accel.apply(model, small("h2o", min_entries=200, every=100)):
        _, held = conversation(model, 40, 1, 1, "-5", 1, 7)
    for layer in held.layers:
        assert isinstance(layer, CompressedLayer)
        assert layer.mass is not None
        assert layer.mass.shape == (1, 2, 45)
        assert layer.n_taken == layer.n_entries == 45
        # whatever was cut, the new tokens are read by themselves
        assert bool((layer.mass[..., -7:] > 0).all())


@pytest.mark.parametrize("steps", [(90, "-1"), (90, 1, "-2"), (90, 1, 1, 1, 1, "-1"), (90, 5, "-1")], ids=str)
@torch.no_grad()
def test_a_crop_past_an_eviction_raises_and_takes_nothing(steps: tuple[Any, ...]) -> None:
    model = tiny_llama()
    with accel.apply(model, Uneven(every=4)):
        _, held = conversation(model, *steps[:-1])
        before, length = kept_of(held), int(held.get_seq_length())
        with pytest.raises(UnsupportedError, match="before its last eviction"):
            held.crop(int(steps[-1]))
        assert int(held.get_seq_length()) == length
        assert all(torch.equal(kept, before[layer]) for layer, kept in kept_of(held).items())
        held.crop(0)


# --- rows ----------------------------------------------------------------------------------------------------------------------


CHANGES: dict[str, tuple[Any, list[int]]] = {
    "reorder": (lambda held: held.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda held: held.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("steps", [(20,), (20, 1), (90,), (90, 1), (90, 1, 1, 1)], ids=str)
@every_method
@torch.no_grad()
def test_rows_move_with_everything_that_is_known_of_them(method: str, steps: tuple[int, ...], change: str) -> None:
    model, (move, rows) = tiny_llama(), CHANGES[change]
    method_ = small(method, keep=30, min_entries=4, every=3)
    with accel.apply(model, method_):
        _, held = conversation(model, *steps, batch=3)
        move(held)
        got, alone = [], []
        more = [ids(n, batch=3, seed=50 + i)[rows] for i, n in enumerate((1, 1, 1, 1, 6, 1, 1, 1))]
        for new in more:
            got.append(model(new, **{CACHE: held}).logits)
        _, straight = conversation(model, *steps, batch=3)
        whole = [ids(n, batch=3, seed=50 + i) for i, n in enumerate((1, 1, 1, 1, 6, 1, 1, 1))]
        for new in whole:
            alone.append(model(new, **{CACHE: straight}).logits)
    for one, other in zip(got, alone, strict=True):
        torch.testing.assert_close(one, other[rows], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_was_reset_is_a_new_one() -> None:
    model = tiny_llama()
    with accel.apply(model, small("h2o")) as handle:
        _, held = conversation(model, 90, 1, 1, 1)
        want = [model(ids(n, seed=n), **{CACHE: fresh}).logits for fresh in [DynamicCache(config=model.config)] for n in (70, 1, 1, 1)]
        held.reset()
        assert int(held.get_seq_length()) == 0
        assert all(not list(layer.tensors()) for layer in held.layers)
        got = [model(ids(n, seed=n), **{CACHE: held}).logits for n in (70, 1, 1, 1)]
        assert handle.stats.cache.generations == 3
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


# --- what is held --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_entries_are_the_rows_of_the_whole_cache_bit_for_bit() -> None:
    model = tiny_llama()
    whole = conversation(model, 90)[1]
    keys, values = ([getattr(layer, name) for layer in whole.layers] for name in ("keys", "values"))
    with accel.apply(model, Uneven()):
        held = conversation(model, 90)[1]
    for number in range(3):
        for heads, entries in zip(held.layers[number].heads, groups_of(held, number), strict=True):
            assert entries.position is not None
            assert entries.position.dtype == torch.int32
            for i, head in enumerate(heads):
                places = entries.position[0, i].long()
                assert torch.equal(entries.k[0, i], keys[number][0, head, places])
                assert torch.equal(entries.v[0, i], values[number][0, head, places])


@torch.no_grad()
def test_lengths_are_physical_inside_and_logical_outside() -> None:
    model = tiny_llama()
    with accel.apply(model, Uneven(few=20, many=45, every=3)):
        _, held = conversation(model, 90)
        lengths = []
        for i in range(7):
            model(ids(1, seed=i), **{CACHE: held})
            lengths.append(sorted(len(entries) for entries in groups_of(held, 0)))
            assert int(held.get_seq_length()) == 91 + i
            assert tuple(held.layers[0].get_mask_sizes(3)) == (94 + i, 0)
    # back to the budget behind every third step
    assert lengths == [[21, 46], [22, 47], [20, 45], [21, 46], [22, 47], [20, 45], [21, 46]]


def test_a_stock_layer_is_taken_over_with_what_it_holds() -> None:
    stock = DynamicLayer()
    empty = CompressedLayer(stock)
    assert (empty.n_taken, empty.n_entries, int(empty.get_seq_length())) == (0, 0, 0)
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    stock.update(keys, values)
    layer = CompressedLayer(stock)
    assert (layer.n_taken, layer.n_entries, int(layer.get_seq_length())) == (5, 5, 5)
    assert layer.keys is stock.keys
    found = layer.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4))
    assert found[0].shape == (2, 3, 6, 4)
    assert layer.held_bytes() == 2 * 2 * 3 * 6 * 4 * 4


def test_an_announcement_lets_one_update_of_a_compressed_layer_pass() -> None:
    layer, new = CompressedLayer(DynamicLayer()), torch.randn(1, 2, 1, 4)
    layer.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    layer.compress([(0, 1)], [Entries(layer.keys[:, :, :3].clone(), layer.values[:, :, :3].clone())])
    layer.is_expected = True
    assert layer.update(new, new)[0] is new
    # an interrupt may keep everybody from saying that the call has ended
    with pytest.raises(UnsupportedError, match="not patched now"):
        layer.update(new, new)
    assert int(layer.get_seq_length()) == 6


@pytest.mark.parametrize("softcap", [None, 5.0], ids=str)
@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_attention_of_several_heads_read_by_several_queries(softcap: float | None, n_rows: int, is_padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, n_rows), (3, 9), (3, 9)))
    valid = torch.rand(2, 3, 9, generator=generator) < 0.6
    # all that a whole row of queries could see is padding
    valid[1, 2, : 9 - n_rows + 1] = False
    valid[1, 2, -1] = False
    entries = Entries(k, v, valid=valid if is_padded else None)
    got = entries.attention(q, 0.3, softcap=softcap, n_causal=n_rows)
    received = entries.received(q, 0.3, softcap=softcap, n_causal=n_rows)
    want, sums = torch.zeros_like(q), torch.zeros(2, 3, 9)
    for b in range(2):
        for head in range(6):
            for row in range(n_rows):
                seen = torch.arange(9) <= 9 - n_rows + row
                seen &= valid[b, head // 2] if is_padded else True
                if not seen.any():
                    continue
                logits = k[b, head // 2] @ q[b, head, row] * 0.3
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                weights = logits.masked_fill(~seen, -torch.inf).softmax(0)
                want[b, head, row] = weights @ v[b, head // 2]
                sums[b, head // 2] += weights
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received, sums, rtol=1e-5, atol=1e-6)
