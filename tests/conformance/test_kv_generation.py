"""Every way to generate with a compressed cache: batches, padding, beams, chunks, turns, drafts, other caches, other methods beside."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from conformance.families import N_TOKENS, instance, text_config, words
from conformance.kv_runs import (
    CACHE,
    METHODS,
    KVCompression,
    Uneven,
    assert_equals_hiding,
    cache_in,
    groups_of,
    kept_of,
    recorded,
    showing,
    small,
    visual_tokens,
)  # fmt: skip
from conformance.methods import METHODS as SPARSE
from conformance.reference import ROUNDING, run
from conformance.subjects import subject
from conformance.test_generation import assistant, padded, repetitive
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils

import accel
from accel.errors import UnsupportedError

every_method = pytest.mark.parametrize("method", METHODS)


@cache
def wide() -> PreTrainedModel:
    """Eight query heads of four KV heads, so that a group of heads holds several, each read by several queries."""
    return instance("LlamaForCausalLM", text_config("LlamaConfig", num_attention_heads=8, num_key_value_heads=4, head_dim=8))


def plain(batch: int = 1) -> dict[str, Tensor]:
    ids = words(batch=batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fresh(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch": (lambda: plain(3), {}),
    "left padding": (lambda: padded("left"), {}),
    "right padding": (lambda: padded("right"), {}),
    "chunked prefill": (plain, {"prefill_chunk_size": 40}),
    "chunked prefill, left padding": (lambda: padded("left"), {"prefill_chunk_size": 40}),
    "beams": (plain, {"num_beams": 3}),
    "beams, left padding": (lambda: padded("left"), {"num_beams": 2}),
    "beams, chunks": (plain, {"num_beams": 2, "prefill_chunk_size": 56}),
    "long answer": (plain, {"max_new_tokens": 24}),
    "several answers": (plain, {"num_return_sequences": 2, "num_beams": 2}),
    "no cache": (plain, {"use_cache": False}),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("method", ["uneven", *METHODS])
def test_every_way_equals_hiding_what_was_dropped(way: str, method: str) -> None:
    make, how = WAYS[way]
    check(wide(), make(), Uneven() if method == "uneven" else small(method), **how)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2.5 vl", "llava", "opt"])
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"max_new_tokens": 12}], ids=str)
def test_other_families_generate_as_well(name: str, how: dict[str, Any]) -> None:
    check(subject(name).model, subject(name).inputs, Uneven(), **how)


def check(model: Any, inputs: dict[str, Tensor], method: KVCompression, **how: Any) -> None:
    with accel.apply(model, method), recorded(model) as passes:
        got = run(model, inputs, **how)
    with showing(model, passes):
        want = run(model, inputs, **how)
    assert_equals_hiding(got, want, inputs["attention_mask"])
    # without a cache there is nothing to drop
    assert any(passes) == how.get("use_cache", True)


@every_method
@pytest.mark.parametrize("keep", [20, 60])
def test_a_left_padded_row_generates_what_it_generates_alone(method: str, keep: int) -> None:
    model, inputs = wide(), padded("left")
    with accel.apply(model, small(method, keep=keep)):
        batch = run(model, inputs, max_new_tokens=12)
        for row in range(2):
            valid = inputs["attention_mask"][row].bool()
            alone = run(model, {"input_ids": inputs["input_ids"][row, valid][None]}, max_new_tokens=12)
            assert (batch.scores[row] - alone.scores[0]).abs().max() <= ROUNDING * alone.logits.abs().max()


@every_method
@torch.no_grad()
def test_a_right_padded_row_keeps_what_it_keeps_alone(method: str) -> None:
    model, inputs, n = wide(), plain(2), 70
    inputs["attention_mask"][1, n:] = 0
    held, alone = fresh(model), fresh(model)
    with accel.apply(model, small(method, keep=20)):
        model(**inputs, **{CACHE: held})
        model(inputs["input_ids"][1:, :n], **{CACHE: alone})
    # padding behind a row is neither its newest tokens, nor has it a say in which others stay
    for layer, kept in kept_of(alone).items():
        assert torch.equal(kept_of(held)[layer][1, :, :n], kept[0])


# neighbours, which snapkv pools over, and numbers, which random_kv draws by, are others beside padding
@pytest.mark.parametrize("method", ["h2o", "hack", "streaming_kv"])
@torch.no_grad()
def test_padding_in_front_of_a_later_turn_has_no_say_in_what_stays(method: str) -> None:
    model, first, new = wide(), words(2, 60, seed=3), words(2, 30, seed=4)
    mask, positions = torch.ones(2, 90, dtype=torch.int64), torch.arange(60, 90).repeat(2, 1)
    mask[1, 60:80], positions[1, 20:] = 0, torch.arange(60, 70)
    held, alone = fresh(model), fresh(model)
    with accel.apply(model, small(method, keep=20)):
        model(first, **{CACHE: held})
        model(new, attention_mask=mask, position_ids=positions, **{CACHE: held})
        model(first[1:], **{CACHE: alone})
        model(new[1:, 20:], **{CACHE: alone})
    for layer, kept in kept_of(alone).items():
        assert torch.equal(kept_of(held)[layer][1][:, mask[1].bool()], kept[0])


def test_a_row_shorter_than_the_budget_keeps_all_it_has() -> None:
    model, inputs = wide(), padded("left")
    inputs["input_ids"][1, :90] = inputs["attention_mask"][1, :90] = 0
    held = fresh(model)
    with torch.no_grad(), accel.apply(model, small("snapkv", keep=40)):
        model(**inputs, **{CACHE: held})
    for entries in groups_of(held, 1):
        assert entries.valid is not None
        for positions, valid in zip(entries.positions()[1], entries.valid[1], strict=True):
            assert positions[valid].tolist() == list(range(90, N_TOKENS))


# --- turns ---------------------------------------------------------------------------------------------------------------------


def turns(model: Any, inputs: dict[str, Tensor], lengths: list[int]) -> list[Tensor]:
    """Logits of passes of these many new tokens behind the prompt, on one cache, without `generate` and its positions."""
    held, mask = fresh(model), inputs["attention_mask"]
    found = [model(**inputs, **{CACHE: held}).logits]
    for i, length in enumerate(lengths):
        new = words(len(mask), length, seed=20 + i)
        mask = torch.cat([mask, torch.ones(len(mask), length, dtype=torch.int64)], 1)
        found.append(model(new, attention_mask=mask, **{CACHE: held}).logits)
        assert int(held.get_seq_length()) == mask.shape[1]
    return found


@pytest.mark.parametrize("method", ["uneven", *METHODS])
@pytest.mark.parametrize("kind", ["plain", "batch", "left padding"])
@torch.no_grad()
def test_a_second_turn_sees_what_is_left_and_what_came_before_in_it(method: str, kind: str) -> None:
    model, inputs = wide(), {"plain": plain, "batch": lambda: plain(2), "left padding": lambda: padded("left")}[kind]()
    lengths = [7, 1, 1, 1, 33, 1, 2, 1, 1]
    with accel.apply(model, Uneven() if method == "uneven" else small(method)), recorded(model) as passes:
        got = turns(model, inputs, lengths)
    with showing(model, passes):
        want = turns(model, inputs, lengths)
    assert all(passes[1:])
    for i, (one, other) in enumerate(zip(got[1:], want[1:], strict=True)):
        assert (one - other).abs().max() <= ROUNDING * other.abs().max(), f"turn {i}"


@pytest.mark.parametrize("kind", ["plain", "left padding"])
@torch.no_grad()
def test_padding_among_the_new_tokens_of_a_turn_is_seen_by_nobody(kind: str) -> None:
    model, inputs = wide(), plain(2) if kind == "plain" else padded("left")
    new = words(2, 9, seed=5)
    more = torch.ones_like(new)
    more[1, :4] = 0
    mask = torch.cat([inputs["attention_mask"], more], 1)

    def both(width: int) -> list[Tensor]:
        held = fresh(model)
        model(**inputs, **{CACHE: held})
        second = model(new, attention_mask=mask[:, :width], **{CACHE: held}).logits
        last = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        return [second[more.bool()], model(words(2, 1, seed=6), attention_mask=last, **{CACHE: held}).logits]

    with accel.apply(model, Uneven()), recorded(model) as passes:
        got = both(mask.shape[1])
    with showing(model, passes):
        want = both(mask.shape[1])
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= ROUNDING * other.abs().max()


@every_method
@torch.no_grad()
def test_a_later_mask_may_hide_tokens_that_an_earlier_one_showed(method: str) -> None:
    model, mask = wide(), torch.ones(1, N_TOKENS + 3, dtype=torch.int64)
    mask[:, 5 : N_TOKENS - 6] = 0

    def both() -> list[Tensor]:
        held = fresh(model)
        model(words(), **{CACHE: held})
        hiding = model(words(length=3), attention_mask=mask, **{CACHE: held}).logits
        # hidden for a pass is not gone
        return [hiding, model(words(length=1), **{CACHE: held}).logits]

    with accel.apply(model, small(method, every=100)), recorded(model) as passes:
        got = both()
    with showing(model, passes):
        want = both()
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= ROUNDING * other.abs().max()


@torch.no_grad()
def test_a_mask_that_reaches_beyond_the_pass_is_read_where_the_pass_is() -> None:
    model, inputs = wide(), padded("left")
    new = words(2, 4, seed=5)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.int64)], 1)
    mask[1, N_TOKENS : N_TOKENS + 2] = 0
    found = []
    with accel.apply(model, Uneven()):
        for width in (N_TOKENS + 4, N_TOKENS + 12):
            held = fresh(model)
            model(**inputs, **{CACHE: held})
            found.append(model(new, attention_mask=mask[:, :width], **{CACHE: held}).logits)
    assert torch.equal(found[0], found[1])


@every_method
def test_a_conversation_by_generate_goes_on(method: str) -> None:
    model, how = wide(), {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}

    def two_turns() -> Tensor:
        first = model.generate(**plain(), **how)
        longer = torch.cat([first.sequences, words(length=30, seed=9)], 1)
        held = getattr(first, "cache", None) or first.past_key_values
        return model.generate(longer, **{CACHE: held}, **how).sequences

    with accel.apply(model, small(method)), recorded(model) as passes:
        got = two_turns()
    with showing(model, passes):
        assert torch.equal(two_turns(), got)


# --- drafts and other caches ---------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", ["assistant", "prompt lookup"])
def test_drafts_are_refused_once_entries_are_gone(method: str, kind: str) -> None:
    how = {"assistant_model": assistant()} if kind == "assistant" else {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    with accel.apply(wide(), small(method)), pytest.raises((UnsupportedError, ValueError), match=r"prompt lookup|can be cropped"):
        wide().generate(**repetitive(), **how, max_new_tokens=10, do_sample=False)


@every_method
@pytest.mark.parametrize("kind", ["assistant", "prompt lookup"])
def test_drafts_are_fine_while_all_entries_are_there(method: str, kind: str) -> None:
    how = {"assistant_model": assistant()} if kind == "assistant" else {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    how = {**how, "max_new_tokens": 10, "do_sample": False}
    dense = wide().generate(**repetitive(), **how)
    with accel.apply(wide(), small(method, min_entries=500)):
        assert torch.equal(wide().generate(**repetitive(), **how), dense)


CACHES = {"static": {}, "offloaded": {}, "offloaded_static": {}, "quantized": {"cache_config": {"backend": "fp8"}}}


@pytest.mark.parametrize("kind", list(CACHES))
def test_other_caches_are_refused_by_name_and_the_model_stays_usable(kind: str) -> None:
    if kind == "quantized" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no quantized cache without further packages")
    model, how = wide(), {"max_new_tokens": 4, "do_sample": False}
    with accel.apply(model, small("snapkv")) as handle:
        usual = model.generate(**plain(), **how)
        with pytest.raises(UnsupportedError, match=r"snapkv cannot drop entries of an? (Static|offloaded|Fp8Quantized).*DynamicCache"):
            model.generate(**plain(), **how, cache_implementation=kind, **CACHES[kind])
        # an offloaded cache needs a GPU to come back to
        if "offloaded" not in kind:
            with handle.paused():
                model.generate(**plain(), **how, cache_implementation=kind, **CACHES[kind])
        assert torch.equal(model.generate(**plain(), **how), usual)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no such layer")
def test_a_cache_that_would_make_other_layers_is_refused_before_it_does() -> None:
    held = cache_utils.Cache(layer_class_to_replicate=cache_utils.Fp8QuantizedLayer)
    with accel.apply(wide(), small("snapkv")), pytest.raises(UnsupportedError, match="Fp8QuantizedLayer"):
        wide()(words(), **{CACHE: held})


# --- other methods beside ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in SPARSE if case.cls.method_name() in ("flexprefill", "powerattention")], ids=str)
@every_method
def test_sparse_prefill_beside_changes_only_the_prefill(case: Any, method: str) -> None:
    it = subject("llama")
    with accel.apply(it.model, case.sparse()):
        sparse = run(it.model, it.inputs)
    with accel.apply(it.model, case.sparse(), small(method)) as handle, recorded(it.model) as passes:
        both = run(it.model, it.inputs)
        assert torch.equal(both.logits, sparse.logits)
        assert handle.stats.total.sparse_calls == 6
        assert handle.stats.total.dense_calls == {"entries were evicted per head": 12}
        assert len(handle.patched_layers) == 3
    assert all(passes[2:])
    assert (both.scores[:, 0] - sparse.scores[:, 0]).abs().max() == 0
    assert (both.scores[:, 1:] - sparse.scores[:, 1:]).abs().max() > 0


@pytest.mark.parametrize("name", ["llava", "llava next", "qwen2.5 vl", "internvl"])
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 60}, {"num_beams": 2}], ids=str)
def test_pruned_prompts_lose_entries_too(name: str, how: dict[str, Any]) -> None:
    it = subject(name)
    if "prefill_chunk_size" in how:
        try:
            it.model.generate(**it.inputs, max_new_tokens=2, do_sample=False, **how)
        except (RuntimeError, ValueError, IndexError) as error:
            pytest.skip(f"the plain model cannot do this either: {error}")
    is_visual = visual_tokens(it.model, it.inputs["input_ids"])[0]
    kept: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kept.append(cache_in(kwargs))

    with accel.apply(it.model, accel.FasterVLM(keep=0.5), small("snapkv", keep=60)) as handle:
        hook = it.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        pruned = it.model.generate(**it.inputs, max_new_tokens=6, do_sample=False, **how)
        hook.remove()
        assert handle.stats.tokens.kept_patches < handle.stats.tokens.patches
    if not how and is_visual.sum() > 40:
        positions = groups_of(kept[-1], 1)[0].positions()[0, 0]
        # numbers of the whole prompt, of which half of the picture is gone in front of the model
        assert int(positions.max()) >= N_TOKENS
        assert int(is_visual[positions[positions < N_TOKENS]].sum()) <= 0.5 * int(is_visual.sum())
    with accel.apply(it.model, accel.FasterVLM(keep=0.5)):
        whole = it.model.generate(**it.inputs, max_new_tokens=6, do_sample=False, **how)
    # nothing to drop: what the two methods do to masks and positions together changes nothing
    with accel.apply(it.model, accel.FasterVLM(keep=0.5), Uneven(few=500, many=500)):
        assert torch.equal(it.model.generate(**it.inputs, max_new_tokens=6, do_sample=False, **how), whole)
    assert pruned.shape == whole.shape


@torch.no_grad()
def test_a_second_picture_in_a_second_turn() -> None:
    it = subject("llava")
    held = fresh(it.model)
    with accel.apply(it.model, accel.FasterVLM(keep=0.5), small("snapkv")) as handle:
        it.model(**it.inputs, **{CACHE: held}, use_cache=True)
        mask = torch.ones(1, 2 * N_TOKENS, dtype=torch.int64)
        out = it.model(**{**it.inputs, "attention_mask": mask}, **{CACHE: held}, use_cache=True)
        assert out.logits.isfinite().all()
        assert int(held.get_seq_length()) == 2 * N_TOKENS
        assert handle.stats.tokens.prompts == 2
        assert handle.stats.cache.generations == 1
