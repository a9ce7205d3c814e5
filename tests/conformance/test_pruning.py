"""Dropping visual tokens: every family of vision-language models, against the whole model with the same columns hidden."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from conformance.families import FAMILIES
from conformance.hidden_columns import hide_by_layer, hiding
from conformance.methods import EveryBlock
from conformance.pruning_methods import Chosen
from conformance.reference import N_NEW, ROUNDING, Run, assert_bit_equal, run
from conformance.subjects import snapshot, subject
from torch import Tensor

import accel
from accel.errors import AccelError, UnsupportedError
from accel.stats import PruningEvent

VLMS = [f.name for f in FAMILIES.values() if f.has_images]
every_family = pytest.mark.parametrize("name", VLMS)
# one of each container of features and each kind of position and mask
some_families = pytest.mark.parametrize("name", ["llava", "llava next", "internvl", "smolvlm", "paligemma", "gemma3 vlm", "qwen2.5 vl", "qwen3 vl"])
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


# --- T-HIDE, T-HIDE-L, T-DEEP, T-POS, T-RET ------------------------------------------------------------------------------------


@every_way
@every_family
def test_dropping_equals_hiding(name: str, method: Chosen) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    got, gone = pruned_run(model, inputs, method)
    if not method.hides:
        assert got.logits.shape[1] == int(gone.left.sum())
    want = hidden_run(model, inputs, gone)
    assert (want.scores - run(model, inputs).scores).abs().max() > 1e-3     # the reference itself lost something
    if method.hides:
        got = Run(got.logits[:, gone.left[0]], got.tokens, got.scores)
    assert_equals_hiding(got, want, gone)
    # the caller's prompt comes back whole
    assert torch.equal(got.tokens[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize(
    "method", [Chosen(ragged=1), Chosen(at=((None, 0.75), (1, 0.5)), ragged=1), Chosen(at=((1, 0.0),))], ids=["front", "two", "all"]
)
@every_family
def test_padding_and_unequal_keeps_equal_hiding(name: str, method: Chosen) -> None:
    model, inputs = subject(name).model, batch_of(name)
    got, gone = pruned_run(model, inputs, method)
    assert_equals_hiding(got, hidden_run(model, inputs, gone), gone)


@every_family
def test_a_picture_does_not_change_what_another_keeps(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    together, _ = pruned_run(model, inputs, Chosen(at=((None, 0.5), (1, 0.5))))
    for b in range(2):
        alone, _ = pruned_run(model, row_of(inputs, b), Chosen(at=((None, 0.5), (1, 0.5))))
        assert torch.equal(together.tokens[b, -N_NEW:], alone.tokens[0, -N_NEW:])
        scale = alone.logits.abs().max()
        assert (together.scores[b] - alone.scores[0]).abs().max() / scale <= ROUNDING


# --- T-BEAM and other ways to generate -----------------------------------------------------------------------------------------


@every_family
def test_beams_equal_those_of_single_rows(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))):
        together = run_generate(model, inputs, **beams).sequences
        for b in range(2):
            alone = run_generate(model, row_of(inputs, b), **beams).sequences
            assert torch.equal(together[2 * b : 2 * b + 2, -N_NEW:], alone[:, -N_NEW:])


@pytest.mark.parametrize(
    "method", [Chosen(ragged=1), Chosen(at=((1, 0.5),), ragged=1), Chosen(at=((None, 0.5), (1, 0.5)))], ids=["front", "middle", "both"]
)
@some_families
def test_a_static_cache_equals_the_dynamic_one(name: str, method: Chosen) -> None:
    model, inputs = subject(name).model, batch_of(name)
    with accel.apply(model, method):
        dynamic = run_generate(model, inputs)
        static = run_generate(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    scale = dynamic.logits[0].abs().max()
    assert (torch.stack(static.logits) - torch.stack(dynamic.logits)).abs().max() / scale <= ROUNDING


def test_a_static_cache_forgets_the_last_prompt() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    with accel.apply(model, FRONT):
        first = run_generate(model, inputs, cache_implementation="static").sequences
    dense = run_generate(model, inputs, cache_implementation="static").sequences
    assert torch.equal(dense, subject("llava").dense.tokens)
    assert not torch.equal(first, dense)


CHUNKS = ["llava", "internvl", "qwen2.5 vl", "gemma3 vlm"]


@pytest.mark.parametrize("size", [5, 7, 64])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_prompt_in_chunks_equals_a_whole_one(name: str, size: int) -> None:
    model, inputs = subject(name).model, batch_of(name)
    # older releases fail on a picture in a prompt in chunks, or lose it without a word
    try:
        can_split = torch.equal(run_generate(model, inputs, prefill_chunk_size=size).sequences, run_generate(model, inputs).sequences)
    except (RuntimeError, ValueError):
        can_split = False
    if not can_split:
        pytest.skip("this release cannot split the prompt of the plain model either")
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)), is_known_ahead=True, ragged=1)) as handle:
        whole = run_generate(model, inputs)
        chunks = run_generate(model, inputs, prefill_chunk_size=size)
        assert handle.stats.tokens.prompts == 4
        assert handle.stats.tokens.kept_share < 0.6
    assert torch.equal(chunks.sequences, whole.sequences)


def test_a_choice_by_hidden_states_refuses_chunks() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    with accel.apply(model, Chosen(at=((1, 0.5),))), pytest.raises((UnsupportedError, ValueError), match=r"one piece|Chunked prefill"):
        run_generate(model, inputs, prefill_chunk_size=7)


@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl", "gemma3 vlm"])
def test_prompt_lookup_equals_plain_decoding(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))):
        plain = run_generate(model, inputs, max_new_tokens=12).sequences
        looked_up = run_generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(plain, looked_up)


@pytest.mark.parametrize("method", [FRONT, Chosen(at=((1, 0.5),))], ids=["front", "middle"])
@pytest.mark.parametrize("name", ["llava", "gemma3 vlm", "paligemma", "internvl"])
def test_a_second_turn_equals_hiding(name: str, method: Chosen) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    ids = inputs["input_ids"]
    more = torch.tensor([[31, 32, 33, 34]])
    events: list[PruningEvent] = []
    with accel.apply(model, method) as handle, handle.observe_pruning(events.append):
        first = run_generate(model, inputs)
        cache = getattr(first, "cache", None) or first.past_key_values
        longer = torch.cat([first.sequences, more], 1)
        got = run_generate(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, past_key_values=cache)
    gone = dropped(events, inputs, model)
    with hiding(model, hide_by_layer(gone.events, model.get_decoder().config.num_hidden_layers)):
        first = run_generate(model, inputs)
        cache = getattr(first, "cache", None) or first.past_key_values
        longer = torch.cat([first.sequences, more], 1)
        want = run_generate(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, past_key_values=cache)
    assert torch.equal(got.sequences, want.sequences)
    assert longer.shape[1] > ids.shape[1]


# --- off, copied, paused -------------------------------------------------------------------------------------------------------


@every_family
def test_undo_gives_back_the_same_objects_and_logits(name: str) -> None:
    it = subject(name)
    before = snapshot(it.model)
    handle = accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5))))
    run(it.model, it.inputs)
    with handle.paused():
        assert_bit_equal(run(it.model, it.inputs), it.dense)
    handle.undo()
    assert snapshot(it.model) == before
    assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_family
def test_a_method_that_keeps_everything_changes_nothing(name: str) -> None:
    it = subject(name)
    before = snapshot(it.model)
    with accel.apply(it.model, Chosen(at=())):
        assert snapshot(it.model) == before
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_family
def test_keeping_every_token_after_all_equals_dense(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, Chosen(at=((None, 1.0), (1, 1.0)))):
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@pytest.mark.parametrize("name", ["llava", "qwen3 vl"])
def test_a_copy_is_not_pruned(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, FRONT) as handle:
        twin = copy.deepcopy(it.model)
        assert_bit_equal(run(twin, it.inputs), it.dense)
        assert handle.stats.tokens.prompts == 0
        assert twin.model.get_image_features.__self__ is twin.model


def test_a_saved_model_is_not_pruned() -> None:
    # of a model that has run, transformers itself leaves hooks behind that cannot be saved
    model, inputs = FAMILIES["llava"].build()
    stored = io.BytesIO()
    with accel.apply(model, FRONT):
        torch.save(model, stored)
    stored.seek(0)
    assert_bit_equal(run(torch.load(stored, weights_only=False), inputs), run(model, inputs))


def test_a_pruned_cache_is_refused_by_the_model_as_it_was() -> None:
    it = subject("llava")
    with accel.apply(it.model, FRONT):
        first = run_generate(it.model, it.inputs)
    cache = getattr(first, "cache", None) or first.past_key_values
    longer = torch.cat([first.sequences, torch.tensor([[31]])], 1)
    with pytest.raises(UnsupportedError, match="not patched now"):
        it.model(input_ids=longer[:, -2:], past_key_values=cache)


# --- text, pictures that do not fit, what is refused ---------------------------------------------------------------------------


@every_family
def test_a_prompt_without_a_picture_is_left_alone(name: str) -> None:
    it = subject(name)
    ids = it.inputs["input_ids"].clone()
    ids[ids < 10] = 10
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "paligemma":
        text["token_type_ids"] = torch.zeros_like(ids)
    dense = run(it.model, text)
    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))):
        assert_bit_equal(run(it.model, text), dense)


@every_family
def test_a_row_without_a_picture_equals_the_row_alone(name: str) -> None:
    it = subject(name)
    inputs = dict(inputs_of(name))
    ids = inputs["input_ids"]
    text = ids.clone()
    text[text < 10] = 10
    both = {**inputs, "input_ids": torch.cat([text, ids]), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.int64)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            both[key] = torch.cat([torch.zeros_like(inputs[key]), inputs[key]])
    try:
        run_generate(it.model, both)
    except (ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"the plain model cannot do this either: {error}")
    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))) as handle:
        got = run_generate(it.model, both)
        assert handle.stats.tokens.skipped["no picture"] == 1
        alone = run_generate(it.model, inputs)
    assert torch.equal(got.sequences[1, -N_NEW:], alone.sequences[0, -N_NEW:])
    plain = {key: value[:1] for key, value in both.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
    assert torch.equal(got.sequences[0, -N_NEW:], run_generate(it.model, plain).sequences[0, -N_NEW:])


@every_family
def test_placeholders_that_do_not_fit_are_refused(name: str) -> None:
    it = subject(name)
    inputs = {key: value.clone() for key, value in it.inputs.items()}
    place = int((inputs["input_ids"][0] == it.model.config.image_token_id).nonzero()[0])
    inputs["input_ids"][0, place] = 20
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key][0, place] = 0
    with accel.apply(it.model, FRONT), pytest.raises((AccelError, ValueError, RuntimeError), match=r"placeholder|match|tokens"):
        it.model(**inputs)


def test_embeddings_without_ids_are_refused() -> None:
    it = subject("llava")
    embeds = it.model.get_input_embeddings()(it.inputs["input_ids"])
    with accel.apply(it.model, FRONT):
        it.model.model.get_image_features(it.inputs["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default")
        with pytest.raises(UnsupportedError, match="input_ids"):
            it.model(inputs_embeds=embeds, attention_mask=it.inputs["attention_mask"])


def test_an_offloaded_cache_is_refused() -> None:
    from transformers import DynamicCache

    it = subject("llava")
    cache = DynamicCache(config=it.model.config.text_config)
    cache.offloading = True
    with accel.apply(it.model, FRONT), pytest.raises(UnsupportedError, match="offloaded"):
        it.model(**it.inputs, past_key_values=cache, use_cache=True)


def test_a_text_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="vision"):
        accel.apply(subject("llama").model, FRONT)


# --- with sparse attention, other implementations, compiled --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl", "internvl"])
def test_sparse_attention_runs_on_what_is_left(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    method = Chosen(at=((None, 0.5), (1, 0.5)))
    alone, _ = pruned_run(model, inputs, method)
    with accel.apply(model, method, EveryBlock()) as handle:
        both = run_generate(model, inputs)
        assert handle.stats.total.sparse_calls > 0
        assert handle.stats.tokens.prompts == 2
    assert torch.equal(both.sequences, alone.tokens)
    assert (torch.stack(both.logits, 1) - alone.scores).abs().max() / alone.logits.abs().max() <= ROUNDING


def test_eager_attention_equals_hiding() -> None:
    model = copy.deepcopy(subject("llava").model)
    model.set_attn_implementation({"text_config": "eager"})
    inputs = batch_of("llava")
    got, gone = pruned_run(model, inputs, Chosen(at=((None, 0.5), (1, 0.5)), ragged=1))
    assert_equals_hiding(got, hidden_run(subject("llava").model, inputs, gone), gone)


# flex_attention compiles itself, which takes its time; its decoding kernel does not compile on every CPU even without accel
@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_equals_sdpa() -> None:
    model = copy.deepcopy(subject("llava").model)
    inputs, method = batch_of("llava"), Chosen(at=((None, 0.5), (1, 0.5)), ragged=1)
    with accel.apply(model, method):
        want = model(**inputs, use_cache=False).logits
    model.set_attn_implementation({"text_config": "flex_attention"})
    with accel.apply(model, method):
        got = model(**inputs, use_cache=False).logits
    n = min(int(row.sum()) for row in dropped([], inputs, model).left) - 16
    assert (got[:, -n:] - want[:, -n:]).abs().max() / want.abs().max() <= ROUNDING


def test_a_step_on_a_static_cache_compiles_whole() -> None:
    from transformers import CompileConfig

    model, inputs = subject("llava").model, inputs_of("llava")
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))):
        plain = run_generate(model, inputs).sequences
        config = CompileConfig(fullgraph=True, backend="eager", mode=None)
        config._compile_all_devices = True
        compiled = run_generate(model, inputs, cache_implementation="static", compile_config=config).sequences
    assert torch.equal(plain, compiled)


# --- training ------------------------------------------------------------------------------------------------------------------


@every_family
def test_the_loss_is_that_of_the_text_in_the_hidden_run(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] < 10) | (inputs["attention_mask"] == 0), -100)
    events: list[PruningEvent] = []
    with accel.apply(model, Chosen(ragged=1)) as handle, handle.observe_pruning(events.append), torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    gone = dropped(events, inputs, model)
    logits = hidden_run(model, inputs, gone).logits
    kept = [(row[left][:-1], own[left][1:]) for row, own, left in zip(logits, labels, gone.left, strict=True)]
    want = torch.nn.functional.cross_entropy(torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept]), ignore_index=-100)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    plain = model(**inputs, labels=labels).loss
    assert (plain - want).abs() > 1e-4


def test_labels_with_a_stage_inside_the_model_are_refused() -> None:
    it = subject("llava")
    with accel.apply(it.model, Chosen(at=((1, 0.5),))), pytest.raises(UnsupportedError, match="labels"):
        it.model(**it.inputs, labels=it.inputs["input_ids"])


def test_gradients_reach_the_projector() -> None:
    model, inputs = FAMILIES["llava"].build()
    model.requires_grad_(True)
    with accel.apply(model, FRONT):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
