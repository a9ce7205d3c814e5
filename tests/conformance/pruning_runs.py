"""Runs of pruned models and of what they must equal, shared by the tests of the matrix."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from conformance.families import FAMILIES
from conformance.hidden_columns import hide_by_layer, hiding
from conformance.pruning_methods import Chosen
from conformance.reference import N_NEW, ROUNDING, Run, run
from conformance.subjects import subject
from torch import Tensor

import accel
from accel.stats import PruningEvent

VLMS = [f.name for f in FAMILIES.values() if f.has_images]
every_family = pytest.mark.parametrize("name", VLMS)
# one of each container of features and each kind of position and mask
some_families = pytest.mark.parametrize("name", ["llava", "llava next", "internvl", "smolvlm", "paligemma", "gemma3 vlm", "qwen2.5 vl", "qwen3 vl"])
# whose prompts transformers can split
CHUNKS = ["llava", "internvl", "qwen2.5 vl", "gemma3 vlm"]
FRONT = Chosen()
WAYS = {
    "front": Chosen(at=((None, 0.5),)),
    "front and first layer": Chosen(at=((None, 0.5), (1, 0.5))),
    "first layer": Chosen(at=((0, 0.5),)),
    "middle, all": Chosen(at=((1, 0.0),)),
    "middle and last": Chosen(at=((1, 0.5), (2, 0.0))),
    "all known ahead": Chosen(at=((None, 0.5), (1, 0.5), (2, 0.5)), is_known_ahead=True),
    "hidden, then dropped": Chosen(at=((1, 0.5),), hides=True),
}  # fmt: skip
every_way = pytest.mark.parametrize("method", WAYS.values(), ids=WAYS.keys())
PAD, N_PAD = 0, 3
# the name of the cache among a model's arguments changed in transformers 5.24
CACHE = "cache" if "cache" in inspect.signature(subject("llava").model.forward).parameters else "past_key_values"


@cache
def inputs_of(name: str) -> dict[str, Tensor]:
    inputs = dict(subject(name).inputs)
    if name == "paligemma":
        # without token types this family attends in both directions during prefill without saying so by a mask
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


@cache
def batch_of(name: str) -> dict[str, Tensor]:
    """The prompt and another: fewer words behind another picture, padded in front."""
    found = {}
    for key, value in inputs_of(name).items():
        if value.shape[0] == 1 and value.dim() == 2 and value.shape[1] == inputs_of(name)["input_ids"].shape[1]:
            pad = torch.full((1, N_PAD), PAD, dtype=value.dtype)
            other = torch.cat([pad, value[:, :-N_PAD]], 1)
        else:
            other = value.flip(-1) if value.is_floating_point() else value
        found[key] = torch.cat([value, other])
    return found


def row_of(inputs: Mapping[str, Tensor], b: int) -> dict[str, Tensor]:
    """One sequence of `batch_of`, without padding."""
    found = {}
    for key, value in inputs.items():
        own = value.chunk(2)[b]
        is_tokens = own.dim() == 2 and own.shape[1] == inputs["input_ids"].shape[1]
        found[key] = own[:, N_PAD:] if is_tokens and b == 1 else own
    return found


@dataclass
class Dropped:
    """What a pruned run dropped: (first layer, columns (B, S) bool) of every stage of its first prompt."""

    events: list[tuple[int, Tensor]]
    left: Tensor


def dropped(events: list[PruningEvent], inputs: Mapping[str, Tensor], model: Any) -> Dropped:
    ids = inputs["input_ids"]
    is_token = ids == model.config.image_token_id
    found = []
    left = inputs["attention_mask"].bool()
    for event in events:
        gone = torch.zeros_like(is_token)
        for b, row in enumerate(is_token):
            columns = row.nonzero().flatten()
            gone[b, columns] = ~event.is_kept[b, : len(columns)]
        found.append((event.stage.layer or 0, gone))
        left = left & ~gone
    return Dropped(found, left)


def pruned_run(model: Any, inputs: Mapping[str, Tensor], method: Any, *more: Any, **how: Any) -> tuple[Run, Dropped]:
    """Forward and generation with the methods on, and what they dropped in the forward. Logits are of the columns left, right-aligned."""
    events: list[PruningEvent] = []
    with accel.apply(model, method, *more) as handle, handle.observe_pruning(events.append):
        with torch.no_grad():
            logits = model(**inputs).logits
        n = len(events)
        found = run_generate(model, inputs, **how)
        assert handle.stats.tokens.prompts == 2 * len(inputs["input_ids"])
    assert events
    return Run(logits, found.sequences, torch.stack(found.logits, 1)), dropped(events[:n], inputs, model)


@torch.no_grad()
def run_generate(model: Any, inputs: Mapping[str, Tensor], **how: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **how})


def hidden_run(model: Any, inputs: Mapping[str, Tensor], gone: Dropped, **how: Any) -> Run:
    n_layers = model.get_decoder().config.num_hidden_layers
    with hiding(model, hide_by_layer(gone.events, n_layers)):
        return run(model, inputs, **how)


def assert_equals_hiding(got: Run, want: Run, gone: Dropped) -> None:
    scale = want.logits.abs().max()
    for b, left in enumerate(gone.left):
        n = int(left.sum())
        off = (got.logits[b, -n:] - want.logits[b, left]).abs().max() / scale
        assert off <= ROUNDING, f"logits of sequence {b} differ by {off:.1e} of the largest"
    off = (got.scores - want.scores).abs().max() / scale
    assert off <= ROUNDING, f"scores differ by {off:.1e} of the largest"
    assert torch.equal(got.tokens, want.tokens)


def kept_by(handle: Any, call: Any) -> list[list[int]]:
    events: list[PruningEvent] = []
    with handle.observe_pruning(events.append), torch.no_grad():
        call()
    return [event.is_kept[0].nonzero().flatten().tolist() for event in events]
