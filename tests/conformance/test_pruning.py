"""Dropping visual tokens: every family of vision-language models, against the whole model with the same columns hidden."""

from __future__ import annotations

import copy
import inspect
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
from transformers import DynamicCache, LogitsProcessorList, StaticCache

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


@every_family
def test_a_static_cache_without_padding_equals_the_dynamic_one(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))):
        dynamic = run_generate(model, inputs, max_new_tokens=9)
        static = run_generate(model, inputs, max_new_tokens=9, cache_implementation="static")
    scale = dynamic.logits[0].abs().max()
    assert (torch.stack(static.logits) - torch.stack(dynamic.logits)).abs().max() / scale <= ROUNDING


@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl"])
def test_a_static_cache_that_is_reset_forgets_the_last_prompt(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=150)
    with accel.apply(model, FRONT), torch.no_grad():
        first = model(**inputs, **{CACHE: cache}, use_cache=True).logits
        cache.reset()
        assert torch.equal(model(**inputs, **{CACHE: cache}, use_cache=True).logits, first)
    cache.reset()
    plain = StaticCache(config=model.config.get_text_config(), max_cache_len=150)
    with torch.no_grad():
        want = model(**inputs, **{CACHE: plain}, use_cache=True).logits
        assert torch.equal(model(**inputs, **{CACHE: cache}, use_cache=True).logits, want)


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
        got = run_generate(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, **{CACHE: cache})
    gone = dropped(events, inputs, model)
    with hiding(model, hide_by_layer(gone.events, model.get_decoder().config.num_hidden_layers)):
        first = run_generate(model, inputs)
        cache = getattr(first, "cache", None) or first.past_key_values
        longer = torch.cat([first.sequences, more], 1)
        want = run_generate(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, **{CACHE: cache})
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
    try:
        torch.save(model, io.BytesIO())
    except AttributeError as error:
        pytest.skip(f"this release cannot save the plain model: {error}")
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
        it.model(input_ids=longer[:, -2:], **{CACHE: cache})


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


def test_pixels_beside_embeddings_without_ids_are_refused() -> None:
    it = subject("llava")
    embeds = it.model.get_input_embeddings()(it.inputs["input_ids"])
    with accel.apply(it.model, FRONT), pytest.raises(UnsupportedError, match="input_ids"):
        it.model(inputs_embeds=embeds, attention_mask=it.inputs["attention_mask"], pixel_values=it.inputs["pixel_values"])


def test_embeddings_alone_are_left_whole_and_counted() -> None:
    it = subject("llava")
    embeds = it.model.get_input_embeddings()(it.inputs["input_ids"])
    plain = it.model(inputs_embeds=embeds).logits
    with accel.apply(it.model, FRONT) as handle:
        assert torch.equal(it.model(inputs_embeds=embeds).logits, plain)
        assert handle.stats.tokens.skipped["embeddings without input_ids"] == 1
        assert "embeddings without input_ids" in handle.report()


def test_an_offloaded_cache_is_refused() -> None:
    it = subject("llava")
    cache = DynamicCache(config=it.model.config.text_config)
    cache.offloading = True
    with accel.apply(it.model, FRONT), pytest.raises(UnsupportedError, match="offloaded"):
        it.model(**it.inputs, **{CACHE: cache}, use_cache=True)


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


# --- whose pictures, whose prompt ----------------------------------------------------------------------------------------------


def test_an_error_inside_the_decoder_leaves_nothing_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    it = subject("llava")
    text = torch.arange(20, 80)[None]
    plain = it.model(input_ids=text).logits
    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))):
        with monkeypatch.context() as patch:
            patch.setattr(it.model.get_decoder().layers[1].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                it.model(**it.inputs)
        assert torch.equal(it.model(input_ids=text).logits, plain)


@every_family
def test_generation_without_a_cache_equals_that_with_one(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    # without a cache, a placeholder in the answer would ask for features
    how = {"suppress_tokens": [model.config.image_token_id]}
    dense = run_generate(model, inputs, use_cache=False, **how)
    if not torch.equal(dense.sequences, run_generate(model, inputs, **how).sequences):
        pytest.skip("the plain model does not do this either")
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))) as handle:
        cached = run_generate(model, inputs, **how)
        without = run_generate(model, inputs, use_cache=False, **how)
        assert handle.stats.tokens.prompts == 2
    assert torch.equal(without.sequences, cached.sequences)
    scale = cached.logits[0].abs().max()
    assert (torch.stack(without.logits) - torch.stack(cached.logits)).abs().max() / scale <= ROUNDING


def kept_by(handle: Any, call: Any) -> list[list[int]]:
    events: list[PruningEvent] = []
    with handle.observe_pruning(events.append), torch.no_grad():
        call()
    return [event.is_kept[0].nonzero().flatten().tolist() for event in events]


def test_features_encoded_earlier_bring_their_own_scores() -> None:
    it = subject("llava")
    text = {key: it.inputs[key] for key in ("input_ids", "attention_mask")}
    pixels = [it.inputs["pixel_values"], it.inputs["pixel_values"].flip(-1)]
    how = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "return_dict": True}
    before = it.model.model.get_image_features(pixels[0], **how)
    with accel.apply(it.model, accel.FasterVLM(keep=0.25)) as handle:
        want = [kept_by(handle, lambda p=p: it.model(**text, pixel_values=p)) for p in pixels]
        assert want[0] != want[1]
        features = [it.model.model.get_image_features(p, **how) for p in pixels]
        for made, kept in zip(features, want, strict=True):
            assert kept_by(handle, lambda made=made: it.model(**text, mm_encoder_outputs={"image": made})) == kept
            generate = lambda made=made: it.model.generate(**text, mm_encoder_outputs={"image": made}, max_new_tokens=2)    # noqa: E731
            assert kept_by(handle, generate) == kept
        with pytest.raises(UnsupportedError, match="before accel was applied"):
            it.model(**text, mm_encoder_outputs={"image": before})


def test_a_forward_of_its_own_inside_generate_is_its_own_prompt() -> None:
    it = subject("llava")
    other = {**it.inputs, "input_ids": torch.cat([it.inputs["input_ids"][:, :2], it.inputs["input_ids"][:, 4:30]], 1)}
    del other["attention_mask"]
    found: list[Tensor] = []

    def judge(ids: Tensor, scores: Tensor) -> Tensor:
        found.append(it.model(**other).logits)
        return scores

    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))), torch.no_grad():
        alone = it.model(**other).logits
        plain = run_generate(it.model, it.inputs).sequences
        judged = run_generate(it.model, it.inputs, logits_processor=LogitsProcessorList([judge])).sequences
    assert torch.equal(plain, judged)
    assert len(found) == N_NEW
    assert all(torch.equal(one, alone) for one in found)


@pytest.mark.parametrize("method", [accel.FastV(keep=0.5, layer=2), accel.FasterVLM(keep=0.5)], ids=["fastv", "fastervlm"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl"])
def test_padding_behind_changes_nothing(name: str, method: Any) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    behind = {}
    for key, value in inputs.items():
        is_tokens = value.dim() == 2 and value.shape[1] == inputs["input_ids"].shape[1]
        behind[key] = torch.cat([value, torch.full((1, 5), PAD, dtype=value.dtype)], 1) if is_tokens else value
    with accel.apply(model, method) as handle:
        assert kept_by(handle, lambda: model(**behind)) == kept_by(handle, lambda: model(**inputs))


@pytest.mark.parametrize("name", ["llava", "gemma3 vlm"])
def test_candidates_of_assisted_decoding_have_no_say(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    with accel.apply(model, accel.FastV(keep=0.25, layer=2)):
        plain = run_generate(model, inputs, max_new_tokens=12).sequences
        assert torch.equal(run_generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3).sequences, plain)


def test_methods_at_one_layer_see_the_same_tokens() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    with accel.apply(model, Chosen(at=((2, 0.5),)), accel.FastV(keep=0.5, layer=2)) as handle:
        first, second = kept_by(handle, lambda: model(**inputs))
    with accel.apply(model, accel.FastV(keep=1e-9 + 0.999, layer=2)) as handle:
        scores: list[PruningEvent] = []
        with handle.observe_pruning(scores.append):
            model(**inputs)
    assert set(second) < set(first)
    assert len(second) == 4


def test_merges_in_front_follow_each_other() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    embeds: list[Tensor] = []
    with accel.apply(model, accel.Downsample(keep=8), accel.Downsample(keep=4)), torch.no_grad():
        hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda m, a, k: embeds.append(a[0]), with_kwargs=True)
        model(**inputs)
        hook.remove()
    # the mean of means of equal cells is the mean of all
    features = model.model.get_image_features(
        inputs["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
    ).pooler_output[0]
    place = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    torch.testing.assert_close(embeds[0][0, place : place + 4].mean(0), features.mean(0), rtol=1e-5, atol=1e-5)


def test_a_second_pruning_method_is_refused_whichever_comes_first() -> None:
    it = subject("llava")
    before = snapshot(it.model)
    for first, second in ((FRONT, FRONT), (FRONT, EveryBlock()), (EveryBlock(), FRONT)):
        with accel.apply(it.model, first), pytest.raises(accel.PatchError, match="patched already"):
            accel.apply(it.model, second)
        assert snapshot(it.model) == before


def test_a_loss_that_is_set_while_patched_stays() -> None:
    model, _ = FAMILIES["llava"].build()

    def mine(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return logits.sum() * 0

    with accel.apply(model, FRONT):
        model.loss_function = mine
    assert model.loss_function is mine


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
@pytest.mark.parametrize("mode", ["keep", "compact"])
def test_a_cache_whose_rows_move_keeps_their_tokens_and_positions(how: str, mode: str) -> None:
    model, inputs = subject("llava").model, batch_of("llava")
    move = {"reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])), "select": lambda c: c.batch_select_indices(torch.tensor([1])),
            "repeat": lambda c: c.batch_repeat_interleave(2)}[how]  # fmt: skip
    rows = {"reorder": [1, 0], "select": [1], "repeat": [0, 0, 1, 1]}[how]
    with accel.apply(model, Chosen(ragged=2, position_mode=mode)), torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        twin = copy.deepcopy(cache)
        new, mask = torch.tensor([[30], [31]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        want = model(input_ids=new, attention_mask=mask, position_ids=positions, **{CACHE: twin}).logits[rows]
        move(cache)
        got = model(input_ids=new[rows], attention_mask=mask[rows], position_ids=positions[rows], **{CACHE: cache}).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 30, 90, 113])
def test_a_cropped_cache_goes_on_as_from_the_shorter_prompt(n: int) -> None:
    model, inputs = subject("llava").model, batch_of("llava")
    size = inputs["input_ids"].shape[1]
    with accel.apply(model, Chosen(at=((1, 0.5),), ragged=1)) as handle, torch.no_grad():
        events: list[PruningEvent] = []
        with handle.observe_pruning(events.append):
            out = model(**inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        cache.crop(-n)
        left = max(0, size - n)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [left] * 3
        if left == 0:
            return
        again, mask = inputs["input_ids"][:, left:], inputs["attention_mask"]
        if (again == model.config.image_token_id).any():
            return
        got = model(input_ids=again, attention_mask=mask, **{CACHE: cache}).logits
    torch.testing.assert_close(got, out.logits[:, -n:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_model_prunes_outside_the_graph() -> None:
    model, inputs = FAMILIES["llava"].build()
    with accel.apply(model, accel.FasterVLM(keep=0.5), accel.FastV(keep=0.5, layer=1)) as handle:
        want = model(**inputs).logits
        got = torch.compile(model, backend="eager")(**inputs).logits
        assert handle.stats.tokens.prompts == 2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_checkpoints_give_the_same_gradients_or_an_error() -> None:
    model, inputs = FAMILIES["llava"].build()
    model.requires_grad_(True)
    with accel.apply(model, FRONT):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        weight = model.model.multi_modal_projector.linear_1.weight
        want, weight.grad = weight.grad, None
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        except UnsupportedError as error:
            assert "checkpoints" in str(error)     # noqa: PT017 - which of the two depends on the release
            return
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-6)


def test_options_that_keep_everything_are_said_to_change_nothing() -> None:
    it = subject("llava")
    with accel.apply(it.model, accel.FasterVLM(keep=1.0)) as handle:
        it.model(**it.inputs)
        assert "nothing was changed" in handle.report()
        assert "no prompt with a picture" not in handle.report()


def test_an_inner_model_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="LlavaModel does not generate"):
        accel.apply(subject("llava").model.model, FRONT)
