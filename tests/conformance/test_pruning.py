"""Dropping visual tokens: every family of vision-language models, every way to generate, against the whole model with the same columns hidden."""

from __future__ import annotations

import copy

import pytest
import torch
from conformance.hidden_columns import hide_by_layer, hiding
from conformance.methods import EveryBlock
from conformance.pruning_methods import Chosen
from conformance.pruning_runs import (
    CACHE,
    CHUNKS,
    FRONT,
    assert_equals_hiding,
    batch_of,
    dropped,
    every_family,
    every_way,
    hidden_run,
    inputs_of,
    pruned_run,
    row_of,
    run_generate,
    some_families,
)
from conformance.reference import N_NEW, ROUNDING, Run, run
from conformance.subjects import subject
from transformers import StaticCache

import accel
from accel.errors import UnsupportedError
from accel.stats import PruningEvent

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
