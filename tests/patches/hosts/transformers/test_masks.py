"""The lazy mask: nothing is built unless the original attention asks, and then once per forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.methods import EveryBlock
from support import tiny_llama
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function

import accel
from accel.patches.hosts.transformers import attend
from accel.patches.hosts.transformers.attend import runs_of
from accel.patches.hosts.transformers.dispatch import decode_row
from accel.patches.hosts.transformers.masks import LazyMask, mask_function_for


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the original mask function."""
    calls: list[dict[str, Any]] = []
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def counting(**arguments: Any) -> Any:
        calls.append(arguments)
        return original(**arguments)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counting)
    return calls


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 64, (2, 96), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_a_sparse_forward_builds_no_mask(built: list) -> None:
    model = tiny_llama()
    with accel.apply(model, "streaming", window_blocks=1, block_size=16, min_seq_len=0) as handle:
        model(**padded_batch())
        assert handle.stats.total.sparse_calls == 3
    assert built == []


@torch.no_grad()
def test_a_dense_forward_builds_one_mask_for_all_layers(built: list) -> None:
    model = tiny_llama()
    with accel.apply(model, "streaming", window_blocks=1, block_size=16, min_seq_len=1000):
        model(**padded_batch())
    assert len(built) == 1


def lazy(**changes: Any) -> LazyMask:
    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 6, "q_offset": 2, "kv_offset": 0, **changes}
    mask = mask_function_for("sdpa")(**arguments)
    assert isinstance(mask, LazyMask)
    return mask


def test_the_offset_of_a_static_cache_is_frozen_when_the_mask_is_made() -> None:
    counter = torch.tensor(2)
    mask = lazy(q_offset=counter)
    counter += 4
    assert int(mask.q_offset) == 2
    assert mask.build()[0, 0].sum(-1).tolist() == [3, 4, 5, 6]


def test_only_the_plain_causal_rule_counts_as_plain() -> None:
    assert lazy().is_plain_causal
    assert not lazy(mask_function=and_masks(causal_mask_function, causal_mask_function)).is_plain_causal
    assert not lazy(kv_offset=1).is_plain_causal


def test_a_mask_that_comes_back_is_returned_unchanged() -> None:
    mask = lazy()
    assert mask_function_for("sdpa")(batch_size=1, q_length=4, kv_length=6, attention_mask=mask) is mask


def test_a_decoding_step_on_a_static_cache_gets_a_tensor() -> None:
    mask = mask_function_for("sdpa")(batch_size=1, q_length=1, kv_length=8, q_offset=torch.tensor(3), allow_is_causal_skip=False)
    assert mask.tolist() == [[[[True] * 4 + [False] * 4]]]


def test_padding_is_extended_with_missing_keys() -> None:
    mask = lazy(attention_mask=torch.tensor([[False, True, True]]))
    assert mask.valid_keys(5).tolist() == [[False, True, True, False, False]]
    assert lazy().valid_keys(5) is None


@torch.no_grad()
def test_a_mask_of_ones_is_looked_at_once_and_not_by_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    # each look would wait for a GPU
    monkeypatch.setattr(attend, "runs_of", lambda valid: pytest.fail("a layer looked at the padding"))
    model, ids = tiny_llama(), padded_batch()["input_ids"]
    with accel.apply(model, "streaming", window_blocks=1, block_size=16, min_seq_len=0) as handle:
        ones = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(ones, model(input_ids=ids).logits)
        assert handle.stats.total.sparse_calls == 6


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_padding_is_read_once_for_all_layers(how: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    plain = attend.runs_of
    monkeypatch.setattr(attend, "runs_of", lambda valid: (seen.append(valid.shape), plain(valid))[1])
    model = tiny_llama()
    with accel.apply(model, EveryBlock()) as handle:
        model.generate(**padded_batch(), max_new_tokens=4, do_sample=False, **how)
        assert handle.stats.total.sparse_calls == 4 * len(handle.patched_layers)
    assert len(seen) == 4


def test_a_mask_that_is_written_into_between_steps_is_read_again() -> None:
    mask = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
    mask[..., :3] = True
    assert int(decode_row(mask, 1)[1]) == 2
    mask[..., 3] = True
    valid, last = decode_row(mask, 1)
    assert int(last) == 3
    assert valid.tolist() == [[True] * 4 + [False] * 2]
    assert decode_row(mask, 1)[0] is valid


@pytest.mark.parametrize(
    ("row", "has_padding"), [([1] * 6, False), ([1] * 6 + [0], False), ([0] + [1] * 5, True), ([1] * 5 + [0], True), ([1] * 5, True)],
    ids=["ones", "zeros behind", "left", "right", "short"],
)  # fmt: skip
def test_only_ones_up_to_the_last_query_are_no_padding(row: list[int], has_padding: bool) -> None:
    valid = lazy(attention_mask=torch.tensor([row], dtype=torch.bool)).valid_keys(6)
    assert (valid is not None) == has_padding
    # a counter in a tensor might be on a GPU
    assert lazy(attention_mask=torch.tensor([row], dtype=torch.bool), q_offset=torch.tensor(2)).valid_keys(6) is not None


@pytest.mark.parametrize(
    ("row", "expected"),
    [([0, 0, 1, 1], (2, 4)), ([1, 1, 0, 0], (0, 2)), ([0, 1, 1, 0], (1, 3)), ([1, 1, 1, 1], (0, 4)), ([1, 0, 1, 1], None), ([0, 0, 0, 0], (0, 0))],
    ids=["left", "right", "both", "none", "hole", "all"],
)
def test_runs_of_padding(row: list[int], expected: tuple[int, int] | None) -> None:
    runs = runs_of(torch.tensor([row], dtype=torch.bool))
    assert (runs and tuple(int(t) for t in runs)) == expected
