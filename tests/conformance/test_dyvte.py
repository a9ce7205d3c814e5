"""DyVTE on every family of vision-language models: fixed exits against hiding the same columns, learned exits of a batch against single rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hidden_columns import hide_by_layer, hiding
from conformance.methods import EveryBlock
from conformance.pruning_runs import (
    CHUNKS,
    assert_equals_hiding,
    batch_of,
    dropped,
    every_family,
    hidden_run,
    inputs_of,
    pruned_run,
    row_of,
    run_generate,
    some_families,
)
from conformance.reference import N_NEW, ROUNDING, assert_bit_equal, run
from conformance.subjects import snapshot, subject
from routers import sign_router
from torch import Tensor

import accel
from accel.errors import UnsupportedError
from accel.patches._dyvte_table import _forced, _Reader
from accel.patches._routers import RouterHeader, save_routers
from accel.patching import host_for
from accel.stats import PruningEvent

NEVER = 99
both_modes = pytest.mark.parametrize("mode", ["mask_then_drop", "ragged"])


def features_of(model: Any, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """By layer, what its router reads of each sequence, (B, 2D)."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for b in range(len(inputs["input_ids"])):
        row = row_of(inputs, b) if len(inputs["input_ids"]) == 2 else inputs
        reader = _Reader(layers=tuple(layers))
        with accel.apply(model, reader), torch.no_grad():
            model(**row)
        for layer in layers:
            found[layer].append(reader.seen[layer])
    return {layer: torch.stack(rows) for layer, rows in found.items()}


def leaving(model: Any, inputs: Mapping[str, Tensor], exits: Sequence[int], folder: Path, **options: Any) -> accel.DyVTE:
    """DyVTE whose routers send sequence b away behind layer exits[b] (NEVER: not at all)."""
    info = host_for(model).describe(model)
    layers = tuple(range(info.n_layers - 1))
    features = features_of(model, inputs, layers)
    routers = {layer: sign_router(features[layer], [layer >= exit for exit in exits]) for layer in layers}
    assert info.fingerprint is not None
    assert info.hidden_size is not None
    header = RouterHeader("toy", info.fingerprint(), info.n_layers, info.hidden_size, 2, layers, 0.5, 1.03, 1e-6, "signs")
    path = save_routers(folder / "routers.safetensors", routers, header, dtype=torch.float32)
    return accel.DyVTE(routers=str(path), **options)


# --- D-X: fixed exits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@every_family
def test_a_fixed_exit_equals_hiding_from_the_next_layer_on(name: str, layer: int) -> None:
    model, inputs = subject(name).model, batch_of(name)
    got, gone = pruned_run(model, inputs, accel.DyVTE(exit_layer=layer))
    assert [first for first, _ in gone.events] == [layer + 1]
    # every visual token of both rows, structural ones too
    assert torch.equal(gone.left, inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id))
    assert_equals_hiding(got, hidden_run(model, inputs, gone), gone)


@pytest.mark.parametrize("layer", [2, 40])
@every_family
def test_an_exit_at_the_last_layer_or_beyond_is_no_exit(name: str, layer: int) -> None:
    it = subject(name)
    before = snapshot(it.model)
    with accel.apply(it.model, accel.DyVTE(exit_layer=layer)):
        assert snapshot(it.model) == before
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@pytest.mark.parametrize("size", [5, 64])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_fixed_exit_takes_a_prompt_in_chunks(name: str, size: int) -> None:
    model, inputs = subject(name).model, batch_of(name)
    try:
        can_split = torch.equal(run_generate(model, inputs, prefill_chunk_size=size).sequences, run_generate(model, inputs).sequences)
    except (RuntimeError, ValueError):
        can_split = False
    if not can_split:
        pytest.skip("this release cannot split the prompt of the plain model either")
    with accel.apply(model, accel.DyVTE(exit_layer=0)):
        assert torch.equal(run_generate(model, inputs, prefill_chunk_size=size).sequences, run_generate(model, inputs).sequences)


# --- D-B: learned exits --------------------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("exits", [(0, 1), (1, 0), (0, 0)], ids=str)
@every_family
def test_rows_that_leave_at_different_layers_equal_each_row_alone(name: str, exits: tuple[int, int], mode: Any, tmp_path: Path) -> None:
    model, inputs = subject(name).model, batch_of(name)
    method = leaving(model, inputs, exits, tmp_path, batch_mode=mode)
    together, gone = pruned_run(model, inputs, method)
    assert [first for first, _ in gone.events] == sorted({layer + 1 for layer in exits})
    assert_equals_hiding(together, hidden_run(model, inputs, gone), gone)
    for b, layer in enumerate(exits):
        # a fixed exit knows no batch rule
        alone, _ = pruned_run(model, row_of(inputs, b), accel.DyVTE(exit_layer=layer))
        assert torch.equal(together.tokens[b, -N_NEW:], alone.tokens[0, -N_NEW:])
        assert (together.scores[b] - alone.scores[0]).abs().max() / alone.logits.abs().max() <= ROUNDING


@both_modes
@every_family
def test_a_row_that_never_leaves_equals_the_whole_model(name: str, mode: Any, tmp_path: Path) -> None:
    model, inputs = subject(name).model, batch_of(name)
    method = leaving(model, inputs, (0, NEVER), tmp_path, batch_mode=mode)
    together, _ = pruned_run(model, inputs, method)
    alone, _ = pruned_run(model, row_of(inputs, 0), accel.DyVTE(exit_layer=0))
    whole = run(model, row_of(inputs, 1))
    for b, want in enumerate((alone, whole)):
        assert torch.equal(together.tokens[b, -N_NEW:], want.tokens[0, -N_NEW:])
        assert (together.scores[b] - want.scores[0]).abs().max() / want.logits.abs().max() <= ROUNDING


def test_nothing_changes_where_no_router_fires(tmp_path: Path) -> None:
    it = subject("llava")
    method = leaving(it.model, it.inputs, [NEVER], tmp_path)
    with accel.apply(it.model, method):
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@both_modes
def test_a_row_without_a_picture_neither_leaves_nor_blocks(mode: Any, tmp_path: Path) -> None:
    it = subject("llava")
    ids = it.inputs["input_ids"]
    text = ids.clone()
    text[text < 10] = 10
    both = {**it.inputs, "input_ids": torch.cat([text, ids]), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.int64)}
    plain = run_generate(it.model, {"input_ids": text, "attention_mask": torch.ones_like(text)}).sequences
    events: list[PruningEvent] = []
    with accel.apply(it.model, leaving(it.model, it.inputs, [0], tmp_path, batch_mode=mode)) as handle, handle.observe_pruning(events.append):
        got = run_generate(it.model, both).sequences
        alone = run_generate(it.model, it.inputs).sequences
    assert torch.equal(got[0, -N_NEW:], plain[0, -N_NEW:])
    assert torch.equal(got[1, -N_NEW:], alone[0, -N_NEW:])
    # dropped at once, not hidden until somebody else leaves
    assert [event.stage.layer for event in events] == [1, 1]


@both_modes
@pytest.mark.parametrize("exits", [(0, 1), (1, NEVER)], ids=str)
@some_families
def test_a_static_cache_equals_the_dynamic_one(name: str, exits: tuple[int, int], mode: Any, tmp_path: Path) -> None:
    model, inputs = subject(name).model, batch_of(name)
    with accel.apply(model, leaving(model, inputs, exits, tmp_path, batch_mode=mode)):
        dynamic = run_generate(model, inputs)
        static = run_generate(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    assert (torch.stack(static.logits) - torch.stack(dynamic.logits)).abs().max() / dynamic.logits[0].abs().max() <= ROUNDING


@both_modes
@pytest.mark.parametrize("exits", [(0, 1), (1, NEVER)], ids=str)
@some_families
def test_beams_equal_those_of_single_rows(name: str, exits: tuple[int, int], mode: Any, tmp_path: Path) -> None:
    model, inputs = subject(name).model, batch_of(name)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with accel.apply(model, leaving(model, inputs, exits, tmp_path, batch_mode=mode)):
        together = run_generate(model, inputs, **beams).sequences
        for b in range(2):
            alone = run_generate(model, row_of(inputs, b), **beams).sequences
            assert torch.equal(together[2 * b : 2 * b + 2, -N_NEW:], alone[:, -N_NEW:])


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", ["llava", "gemma3 vlm", "paligemma", "internvl"])
def test_a_second_turn_equals_hiding(name: str, learned: bool, tmp_path: Path) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    method = leaving(model, inputs, [1], tmp_path) if learned else accel.DyVTE(exit_layer=1)

    def two_turns() -> Tensor:
        first = run_generate(model, inputs)
        cache = getattr(first, "cache", None) or first.past_key_values
        longer = torch.cat([first.sequences, torch.tensor([[31, 32, 33, 34]])], 1)
        found: Tensor = run_generate(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, past_key_values=cache).sequences
        return found

    events: list[PruningEvent] = []
    with accel.apply(model, method) as handle, handle.observe_pruning(events.append):
        got = two_turns()
    with hiding(model, hide_by_layer(dropped(events, inputs, model).events, model.get_decoder().config.num_hidden_layers)):
        assert torch.equal(got, two_turns())


def test_a_learned_exit_refuses_chunks(tmp_path: Path) -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    with accel.apply(model, leaving(model, inputs, [0], tmp_path)), pytest.raises((UnsupportedError, ValueError), match=r"one piece|Chunked prefill"):
        run_generate(model, inputs, prefill_chunk_size=7)


# --- beside other methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl", "qwen3 vl", "gemma3 vlm"])
def test_exit_follows_what_fastervlm_left(name: str, learned: bool, tmp_path: Path) -> None:
    model, inputs = subject(name).model, batch_of(name)
    # routers made for the whole prompt decide otherwise on less: which rows leave where is read from the events
    method = leaving(model, inputs, (0, 1), tmp_path) if learned else accel.DyVTE(exit_layer=1)
    got, gone = pruned_run(model, inputs, accel.FasterVLM(keep=0.5), method)
    assert gone.events[0][0] == 0
    assert learned or [first for first, _ in gone.events] == [0, 2]
    want = hidden_run(model, inputs, gone)
    assert (got.scores - want.scores).abs().max() / want.logits.abs().max() <= ROUNDING
    assert torch.equal(got.tokens, want.tokens)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl", "internvl"])
def test_sparse_attention_runs_on_what_is_left(name: str, learned: bool, tmp_path: Path) -> None:
    model, inputs = subject(name).model, batch_of(name)
    method = leaving(model, inputs, (0, 1), tmp_path) if learned else accel.DyVTE(exit_layer=0)
    alone, _ = pruned_run(model, inputs, method)
    with accel.apply(model, method, EveryBlock()) as handle:
        both = run_generate(model, inputs)
        assert handle.stats.total.sparse_calls > 0
    assert torch.equal(both.sequences, alone.tokens)
    assert (torch.stack(both.logits, 1) - alone.scores).abs().max() / alone.logits.abs().max() <= ROUNDING


# --- what routers are given, and what stays as it was --------------------------------------------------------------------------


@every_family
def test_a_router_reads_the_output_of_its_layer_and_no_padding(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    n = inputs["input_ids"].shape[1]
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    alone = features_of(model, inputs, [0, 1])
    place = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    behind = torch.arange(int(place[-1]) + 1, n)
    for layer in (0, 1):
        own = states[layer + 1][0, behind]
        torch.testing.assert_close(alone[layer][0], torch.cat([own[:-1].mean(0), own[-1]]), rtol=1e-4, atol=1e-5)
    if name in ("paligemma", "gemma3 vlm"):
        return      # these take token types beside the ids, which padding would have to follow
    padded = {key: torch.cat([value, value.new_zeros(1, 4)], 1) if value.shape == (1, n) else value for key, value in inputs.items()}
    for layer, feature in features_of(model, padded, [0, 1]).items():
        torch.testing.assert_close(feature, alone[layer], rtol=1e-4, atol=1e-5)


@every_family
def test_the_answer_behind_the_prompt_equals_decoding_step_by_step(name: str) -> None:
    """What training labels rest on: the prompt and its answer, one forward each."""
    model, inputs = subject(name).model, inputs_of(name)
    for method in ([], [accel.DyVTE(exit_layer=0)]):
        handle = accel.apply(model, *method) if method else None
        try:
            stepped = run_generate(model, inputs)
            answer = stepped.sequences[0, -N_NEW:]
            with torch.no_grad():
                forced = _forced(model, inputs, answer)
        finally:
            if handle is not None:
                handle.undo()
        want = torch.cat(list(stepped.logits))
        assert (forced - want).abs().max() / want.abs().max() <= ROUNDING


def test_routers_are_no_part_of_the_model(tmp_path: Path) -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    method = leaving(model, inputs, [0], tmp_path)
    before = list(model.state_dict())
    n_parameters = sum(1 for _ in model.parameters())
    with accel.apply(model, method):
        run_generate(model, inputs)
        assert list(model.state_dict()) == before
        assert sum(1 for _ in model.parameters()) == n_parameters
