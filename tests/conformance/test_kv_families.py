"""Every cache method in every family: equal to the whole cache with the dropped entries hidden, honest about what stayed whole, gone after undo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.families import FAMILIES, N_TOKENS, instance, words
from conformance.kv_runs import (
    CACHE,
    COMPRESSED,
    METHODS,
    WHOLE,
    KVCompression,
    Uneven,
    assert_equals_hiding,
    cache_in,
    groups_of,
    recorded,
    showing,
    small,
    visual_tokens,
)  # fmt: skip
from conformance.reference import N_NEW, assert_bit_equal, deviation, run
from conformance.subjects import snapshot, subject
from transformers import DynamicCache, Gemma3nTextConfig, PreTrainedModel

import accel
from accel.patches.hosts.transformers.kv.layer import CompressedLayer
from accel.registry import method_class

every_family = pytest.mark.parametrize("name", COMPRESSED)
every_method = pytest.mark.parametrize("method", METHODS)


def test_the_matrix_is_as_large_as_promised() -> None:
    assert {"h2o", "hack", "random_kv", "snapkv", "streaming_kv"} <= set(METHODS)
    assert len(COMPRESSED) >= 34
    # a family that loses its last compressible layer must say so here
    assert set(WHOLE) | set(COMPRESSED) == set(FAMILIES)


def check(name: str, method: KVCompression) -> None:
    """A forward and a generation against the whole model that hides, head by head, what they had dropped."""
    it = subject(name)
    with accel.apply(it.model, method) as handle, recorded(it.model) as passes:
        got = run(it.model, it.inputs)
    with showing(it.model, passes):
        want = run(it.model, it.inputs)
    assert_equals_hiding(got, want)
    # §10.7, 32: what is dropped behind the prompt cannot change what was made of it
    assert torch.equal(got.logits, it.dense.logits)
    # otherwise the equality says nothing: every layer named as patched has lost entries by the second pass of the generation, and it shows
    layers = {number for kept in passes for number in kept}
    assert layers == set(handle.patched_layers)
    assert deviation(want, it.dense) > 1e-3
    assert handle.stats.cache.generations == 2


@every_family
def test_uneven_heads_read_what_they_kept_and_nothing_else(name: str) -> None:
    check(name, Uneven())


@every_family
@every_method
def test_decoding_reads_what_was_kept_and_nothing_else(name: str, method: str) -> None:
    check(name, small(method))


@pytest.mark.parametrize(("name", "method"), [*((name, "snapkv") for name in COMPRESSED), *(("llama", method) for method in METHODS)])
def test_keeping_everything_is_bit_equal_and_changes_nothing(name: str, method: str) -> None:
    it = subject(name)
    before = snapshot(it.model)
    with accel.apply(it.model, method_class(method)(keep=1.0)) as handle:
        assert snapshot(it.model) == before
        assert_bit_equal(run(it.model, it.inputs), it.dense)
        assert "keeps every cache entry" in handle.report()


@every_family
def test_a_budget_that_nothing_exceeds_is_bit_equal_too(name: str) -> None:
    # here the layers are ours, and asked after every pass
    it = subject(name)
    with accel.apply(it.model, Uneven(few=500, many=500)):
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_family
@torch.no_grad()
def test_undo_gives_back_the_same_objects_and_logits(name: str) -> None:
    it = subject(name)
    before = snapshot(it.model)
    handle = accel.apply(it.model, Uneven())
    run(it.model, it.inputs)
    assert list(it.model.state_dict()) == before["state_dict"]
    with handle.paused():
        assert_bit_equal(run(it.model, it.inputs), it.dense)
    handle.undo()
    handle.undo()
    assert snapshot(it.model) == before
    assert_bit_equal(run(it.model, it.inputs), it.dense)


@pytest.mark.parametrize("name", list(WHOLE))
def test_a_family_whose_cache_stays_whole_says_why(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, Uneven()) as handle:
        assert_bit_equal(run(it.model, it.inputs), it.dense)
        assert WHOLE[name] in handle.report()


OTHER_KINDS = {
    "gemma2": "sliding window", "gemma3": "sliding window", "llama4": "chunked attention", "qwen3 next": "linear attention", "lfm2": "conv",
}  # fmt: skip


@pytest.mark.parametrize(("name", "why"), OTHER_KINDS.items())
@torch.no_grad()
def test_layers_of_another_kind_are_left_alone_and_reported(name: str, why: str) -> None:
    it = subject(name)
    plain = it.model(**it.inputs, use_cache=True)
    kinds = [type(layer) for layer in (getattr(plain, "cache", None) or plain.past_key_values).layers]
    with accel.apply(it.model, Uneven()) as handle:
        out = it.model(**it.inputs, use_cache=True)
        assert handle.skipped_layers == {0: f"cache left whole: {why}"}
        assert f"skipped 0: cache left whole: {why}" in handle.report()
        assert "2 of 3 layers patched" in handle.report()
    layers = (getattr(out, "cache", None) or out.past_key_values).layers
    assert type(layers[0]) is kinds[0]
    assert all(isinstance(layer, CompressedLayer) and layer.is_compressed for layer in layers[1:])


@every_family
@torch.no_grad()
def test_stored_heads_are_kv_heads_and_bytes_the_closed_form(name: str) -> None:
    it = subject(name)
    text = it.model.config.get_text_config(decoder=True)
    n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    with accel.apply(it.model, Uneven(few=20, many=45)) as handle:
        out = it.model(**it.inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        total = 0
        for number in handle.patched_layers:
            layer = cache.layers[number]
            assert isinstance(layer, CompressedLayer)
            assert sorted(head for heads in layer.heads for head in heads) == list(range(n_heads))
            entries = sum(len(heads) * len(held) for heads, held in zip(layer.heads, layer.groups, strict=True))
            assert entries == n_heads // 2 * (20 + 45)
            width = layer.groups[0].k.shape[3]
            # keys and values in fp32, an int32 position; of a prompt with pictures also one byte per token, which are text
            expected = entries * (2 * width * 4 + 4) + (it.inputs["input_ids"].numel() if layer.protected is not None else 0)
            assert layer.held_bytes() == expected
            total += expected
        assert handle.stats.cache.as_dict()["held_bytes"] == total


# --- logical positions ---------------------------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_lengths_and_positions_are_those_of_the_whole_sequence(name: str) -> None:
    it = subject(name)
    seen: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        position = kwargs.get("position_ids")
        seen.append((int(cache_in(kwargs).get_seq_length()), None if position is None else position.tolist()))

    hook = it.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        it.model.generate(**it.inputs, max_new_tokens=N_NEW, do_sample=False)
        plain = list(seen)
        seen.clear()
        with accel.apply(it.model, Uneven()):
            it.model.generate(**it.inputs, max_new_tokens=N_NEW, do_sample=False)
    finally:
        hook.remove()
    assert [length for length, _ in seen] == [0, *range(N_TOKENS, N_TOKENS + N_NEW - 1)]
    assert seen == plain


# --- layers that share keys and values ------------------------------------------------------------------------------------------


def shared_model() -> PreTrainedModel:
    """Gemma 3n: the last two of six layers read keys and values that the two before them made."""
    config = Gemma3nTextConfig(
        vocab_size=96, vocab_size_per_layer_input=96, hidden_size=64, hidden_size_per_layer_input=8, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, layer_types=["full_attention", "sliding_attention"] * 3, sliding_window=24,
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 6, laurel_rank=8, altup_num_inputs=2, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return instance("Gemma3nForCausalLM", config)


def test_layers_that_share_keys_and_values_stay_whole() -> None:
    model = shared_model()
    inputs = {"input_ids": words(), "attention_mask": torch.ones(1, N_TOKENS, dtype=torch.int64)}
    with accel.apply(model, Uneven()) as handle, recorded(model) as passes:
        got = run(model, inputs)
        # the third and fifth layer have full attention too, but one makes what the other reads
        assert handle.patched_layers == [0]
        assert "layers share its keys and values" in handle.report()
    with showing(model, passes):
        want = run(model, inputs)
    assert_equals_hiding(got, want)


# --- pictures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava next", "internvl", "gemma3 vlm", "qwen2.5 vl", "qwen3 vl", "video llava"])
# streaming_kv looks at nothing: all that is not a sink is its window
@pytest.mark.parametrize("method", [name for name in METHODS if name != "streaming_kv"])
@torch.no_grad()
def test_text_stays_before_visual_tokens(name: str, method: str) -> None:
    it = subject(name)
    is_visual = visual_tokens(it.model, it.inputs["input_ids"])[0]
    n_text = int((~is_visual).sum())
    inputs = {**it.inputs, CACHE: DynamicCache(config=it.model.config.get_text_config(decoder=True))}
    # a little more than the text and a window of newest entries, which may be visual
    with accel.apply(it.model, small(method, keep=min(n_text + 2, N_TOKENS - 2), window=2, recent_share=0.02, sinks=1)) as handle:
        it.model(**inputs, use_cache=True)
        for number in handle.patched_layers:
            for held in groups_of(inputs[CACHE], number):
                for positions in held.positions()[0]:
                    kept = torch.zeros(N_TOKENS, dtype=torch.bool)
                    kept[positions] = True
                    assert int((kept & is_visual).sum()) > 0
                    # everything that is text, but for what a window or a sink took
                    assert int((~kept & ~is_visual).sum()) <= 1


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
@torch.no_grad()
def test_text_is_not_spared_where_it_must_not_be(method: str) -> None:
    it = subject("llava next")
    is_visual = visual_tokens(it.model, it.inputs["input_ids"])[0]
    visual = []
    for protect_text in (True, False):
        cache = DynamicCache(config=it.model.config.get_text_config())
        with accel.apply(it.model, small(method, keep=24, window=2, recent_share=0.02, protect_text=protect_text)):
            it.model(**it.inputs, **{CACHE: cache}, use_cache=True)
        positions = groups_of(cache, 1)[0].positions()[0]
        visual.append(int(is_visual[positions].sum()))
    # 24 words and 88 visual tokens: spared, words take the room
    assert visual[0] <= 4 < visual[1]
