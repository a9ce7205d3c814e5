"""Every registered pruning method on every family: what it promises to keep, equality with hiding, exact undo, a bypass where it keeps all."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from conformance.pruning_runs import VLMS, assert_equals_hiding, batch_of, dropped, hidden_run, inputs_of, pruned_run, row_of, run_generate
from conformance.reference import assert_bit_equal, run
from conformance.subjects import snapshot, subject

import accel
from accel.patching import host_for
from accel.protocols import TokenPruning
from accel.registry import method_class, method_names
from accel.stats import PruningEvent

# By option name, for whichever method has the option: merged tokens have no counterpart among hidden ones.
SMALL: dict[str, Any] = {"keep": 0.5, "recycle": False, "layer": 2, "r1": 0.8, "r2": 0.75, "exit_layer": 0}
WHOLE: dict[str, Any] = {"keep": 1.0, "exit_layer": 99}
CASES = [(name, cls) for name in method_names() if issubclass(cls := method_class(name), TokenPruning)]
MERGING = {"downsample"}
every_method = pytest.mark.parametrize("cls", [cls for _, cls in CASES], ids=[name for name, _ in CASES])
every_family = pytest.mark.parametrize("name", VLMS)


def built(cls: type[TokenPruning], options: dict[str, Any]) -> TokenPruning:
    known = {f.name for f in fields(cls)}
    return cls(**{option: value for option, value in options.items() if option in known})


def small(cls: type[TokenPruning]) -> TokenPruning:
    return built(cls, SMALL)


@every_method
@every_family
def test_dropping_equals_hiding_and_counts_are_as_promised(name: str, cls: type[TokenPruning]) -> None:
    model, inputs = subject(name).model, batch_of(name)
    method = small(cls)
    events: list[PruningEvent] = []
    with accel.apply(model, method) as handle, handle.observe_pruning(events.append):
        run_generate(model, inputs)
        assert handle.stats.tokens.prompts == 2
        assert handle.stats.tokens.kept_patches < handle.stats.tokens.patches
        # what leaves inside the model leaves nothing behind, but some layers have seen it
        assert 0 < handle.stats.tokens.kept_share < 1
    bound = method.bind(host_for(model).describe(model))
    for event in events:
        promised = bound.count(event.stage, event.units)
        for u, n in enumerate(promised or []):
            assert int((event.is_kept & (event.unit == u)).sum()) == n
    if cls.method_name() in MERGING:
        return
    got, gone = pruned_run(model, inputs, method)
    assert_equals_hiding(got, hidden_run(model, inputs, gone), gone)


@every_method
@every_family
def test_a_batch_keeps_what_single_rows_keep(name: str, cls: type[TokenPruning]) -> None:
    model, inputs = subject(name).model, batch_of(name)
    kept: list[list[list[bool]]] = []
    with accel.apply(model, small(cls)) as handle:
        for batch in (inputs, row_of(inputs, 0), row_of(inputs, 1)):
            events: list[PruningEvent] = []
            with handle.observe_pruning(events.append), torch.no_grad():
                model(**batch)
            kept.append(events[-1].is_kept.tolist())
    together, first, second = kept
    assert together == [first[0], second[0]]


@every_method
@every_family
def test_undo_and_pauses_are_exact(name: str, cls: type[TokenPruning]) -> None:
    it = subject(name)
    before = snapshot(it.model)
    with accel.apply(it.model, small(cls)) as handle:
        assert not torch.equal(run(it.model, it.inputs).scores, it.dense.scores)
        with handle.paused():
            assert_bit_equal(run(it.model, it.inputs), it.dense)
    assert snapshot(it.model) == before
    assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_method
@every_family
def test_keeping_everything_is_a_bypass(name: str, cls: type[TokenPruning]) -> None:
    it = subject(name)
    before = snapshot(it.model)
    with accel.apply(it.model, built(cls, WHOLE)):
        assert snapshot(it.model) == before
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_family
def test_structural_tokens_that_end_no_row_survive_a_tiny_budget(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    events: list[PruningEvent] = []
    with accel.apply(model, accel.FasterVLM(keep=0.01)) as handle, handle.observe_pruning(events.append), torch.no_grad():
        model(**inputs)
    [event] = events
    is_kept = event.is_kept[0]
    stays = event.is_structural[0] & (event.place[0, :, 2] < 0)
    assert is_kept[stays].all()
    # one patch of every unit, and the newline of its row
    patches = is_kept & ~event.is_structural[0]
    assert patches.sum() == len(event.units)
    ends = event.is_structural[0] & ~stays & is_kept
    rows = {tuple(place[:2]) for place in event.place[0, patches].tolist()}
    assert {tuple(place[:2]) for place in event.place[0, ends].tolist()} <= rows


@pytest.mark.parametrize("name", ["llava", "qwen3 vl", "gemma3 vlm"])
def test_two_methods_follow_each_other(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    got, gone = pruned_run(model, inputs, accel.FasterVLM(keep=0.75), accel.FastV(keep=0.5, layer=2))
    assert [layer for layer, _ in gone.events] == [0, 2]
    assert_equals_hiding(got, hidden_run(model, inputs, gone), gone)


@pytest.mark.parametrize("method", [accel.VFlowOpt(r1=0.5, r3=0.5), accel.Downsample(keep=0.25)], ids=["vflowopt", "downsample"])
@pytest.mark.parametrize("name", VLMS)
def test_merging_methods_equal_single_rows(name: str, method: TokenPruning) -> None:
    model, inputs = subject(name).model, batch_of(name)
    together, _ = pruned_run(model, inputs, method)
    for b in range(2):
        alone, _ = pruned_run(model, row_of(inputs, b), method)
        scale = alone.logits.abs().max()
        assert (together.scores[b] - alone.scores[0]).abs().max() / scale <= 5e-6
        assert torch.isfinite(alone.logits).all()


def test_events_tell_what_was_left() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    _, gone = pruned_run(model, inputs, accel.FasterVLM(keep=4))
    assert int(gone.left.sum()) == inputs["input_ids"].shape[1] - 12
    assert dropped([], inputs, model).left.all()
