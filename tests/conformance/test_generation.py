"""Every way to generate: caches, beams, drafts, chunks, padding, turns. The result is that of dense attention over the same blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from conformance.families import instance, text_config, words
from conformance.methods import METHODS, SPARSE_METHODS, MethodCase
from conformance.reference import ROUNDING, assert_same, deviation, recorded, reference, run
from conformance.subjects import subject
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, cache_utils

import accel
from accel.protocols import AttentionStep, SparseAttention

every_method = pytest.mark.parametrize("case", METHODS, ids=str)
sparse_methods = pytest.mark.parametrize("case", SPARSE_METHODS, ids=str)
families = pytest.mark.parametrize("name", ["llama", "gemma3"])

# transformers 5.24 renamed the argument
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
SHORT = 75      # tokens of the short row of a batch: past every method's shortest sparse length at block 16


def padded(side: str) -> dict[str, Tensor]:
    """Two rows, the second one shorter and padded on `side`."""
    ids = words(batch=2)
    mask = torch.ones_like(ids)
    pads = slice(0, -SHORT) if side == "left" else slice(SHORT, None)
    ids[1, pads], mask[1, pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def repetitive() -> dict[str, Tensor]:
    """A prompt whose end occurs earlier in it, so that prompt lookup has something to propose."""
    ids = words()
    ids[:, -8:] = ids[:, 20:28]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def assistant() -> PreTrainedModel:
    """A smaller model that drafts."""
    return instance("LlamaForCausalLM", text_config("LlamaConfig", num_hidden_layers=1))


def plain() -> dict[str, Tensor]:
    return subject("llama").inputs


WAYS: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "batch": (lambda: {"input_ids": words(batch=3), "attention_mask": torch.ones(3, 112, dtype=torch.int64)}, {}),
    "left padding": (lambda: padded("left"), {}),
    "static cache": (plain, {"cache_implementation": "static"}),
    "static cache, left padding": (lambda: padded("left"), {"cache_implementation": "static"}),
    "chunked prefill": (plain, {"prefill_chunk_size": 40}),
    "chunked prefill, left padding": (lambda: padded("left"), {"prefill_chunk_size": 40}),
    "beams": (plain, {"num_beams": 3}),
    "beams, left padding": (lambda: padded("left"), {"num_beams": 2}),
    "assistant model": (plain, {"assistant_model": "tiny"}),
    "prompt lookup": (repetitive, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}),
    "no cache": (plain, {"use_cache": False}),
}


@families
@pytest.mark.parametrize("way", list(WAYS))
@sparse_methods
def test_generation_equals_dense_attention_over_the_same_blocks(name: str, way: str, case: MethodCase) -> None:
    make, how = WAYS[way]
    if "assistant_model" in how:
        how = {"assistant_model": assistant()}
    check_against_reference(name, case, make(), how)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no quantized cache without further packages")
@sparse_methods
def test_a_quantized_cache_is_read_as_dense_attention_reads_it(case: MethodCase) -> None:
    check_against_reference("llama", case, plain(), {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}})


def check_against_reference(name: str, case: MethodCase, inputs: dict[str, Tensor], how: dict[str, Any]) -> None:
    """Forward and generation of a patched model against dense attention over the recorded blocks."""
    model = subject(name).model
    dense = run(model, inputs, **how)
    with accel.apply(model, case.sparse()) as handle, recorded(handle) as plans:
        got = run(model, inputs, **how)
    # a static cache changes shapes, not results: the reference needs none
    with reference(model, plans):
        want = run(model, inputs, **{key: value for key, value in how.items() if value != "static"})
    rows = inputs["attention_mask"].bool()
    assert (got.logits - want.logits)[rows].abs().max() <= ROUNDING * want.logits.abs().max()
    assert (got.scores - want.scores).abs().max() <= ROUNDING * want.logits.abs().max()
    assert torch.equal(got.tokens, want.tokens)
    assert handle.stats.total.sparse_calls > 0
    assert deviation(want, dense) > 1e-3


@families
@pytest.mark.parametrize("side", ["left", "right"])
@every_method
@torch.no_grad()
def test_a_padded_row_equals_the_same_row_alone(name: str, side: str, case: MethodCase) -> None:
    model, inputs = subject(name).model, padded(side)
    # the positions that generate gives: counted from 0 behind the padding, other angles would round differently
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with accel.apply(model, case.sparse()):
        batch = model(**inputs, position_ids=positions).logits
        for row in range(2):
            valid = inputs["attention_mask"][row].bool()
            alone = model(inputs["input_ids"][row, valid][None]).logits[0]
            assert (batch[row, valid] - alone).abs().max() <= ROUNDING * alone.abs().max()


@every_method
def test_a_left_padded_row_generates_what_it_generates_alone(case: MethodCase) -> None:
    model, inputs = subject("llama").model, padded("left")
    with accel.apply(model, case.sparse()):
        batch = run(model, inputs)
        for row in range(2):
            valid = inputs["attention_mask"][row].bool()
            alone = run(model, {"input_ids": inputs["input_ids"][row, valid][None]})
            assert torch.equal(batch.tokens[row, 112:], alone.tokens[0, valid.sum() :])
            assert (batch.scores[row] - alone.scores[0]).abs().max() <= ROUNDING * alone.logits.abs().max()


@every_method
def test_chunked_prefill_equals_whole_where_the_pattern_is_fixed(case: MethodCase) -> None:
    it = subject("llama")
    method: SparseAttention = case.sparse()
    with accel.apply(it.model, method) as handle:
        whole = run(it.model, it.inputs)
        handle.stats.reset()
        chunked = run(it.model, it.inputs, prefill_chunk_size=56)
    patterns = [method.static_pattern(step_of(q_len=56, kv_len=56)), method.static_pattern(step_of(q_len=112, kv_len=112))]
    if not case.is_ever_sparse or (patterns[0] is not None and patterns[0] == patterns[1]):
        assert_same(chunked, whole)
    else:
        # planned chunk by chunk, on the keys seen so far
        assert handle.stats.total.sparse_calls > 3
    # 3 layers: one forward, two chunks, four decoding steps
    assert handle.stats.total.sparse_calls + handle.stats.total.dense_calls.total() == 3 * (1 + 2 + 4)


def step_of(*, q_len: int, kv_len: int) -> AttentionStep:
    return AttentionStep(
        layer=1, n_layers=3, batch=1, q_len=q_len, kv_len=kv_len, n_heads=4, n_kv_heads=2, head_dim=16, device="cpu", dtype="float32"
    )


@every_method
def test_a_second_prompt_does_not_feel_the_first(case: MethodCase) -> None:
    it = subject("llama")
    other = words(seed=8)
    with accel.apply(it.model, case.sparse()):
        fresh = run(it.model, it.inputs)
        run(it.model, {"input_ids": other})
        again = run(it.model, it.inputs)
    assert torch.equal(again.logits, fresh.logits)
    assert torch.equal(again.tokens, fresh.tokens)


@every_method
def test_a_second_turn_continues_the_cache(case: MethodCase) -> None:
    it = subject("llama")
    how = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}

    def two_turns() -> Tensor:
        first = it.model.generate(**it.inputs, **how)
        longer = torch.cat([first.sequences, words(length=60, seed=9)], 1)
        return it.model.generate(longer, **{CACHE: first.past_key_values}, **how).sequences

    with accel.apply(it.model, case.sparse()) as handle, recorded(handle) as plans:
        got = two_turns()
    with reference(it.model, plans):
        want = two_turns()
    assert torch.equal(got, want)
    if case.is_ever_sparse:
        # the second prompt stands behind the first in the cache, and was sparse too
        assert any(q_len < kv_len and q_len > 1 for _, q_len, kv_len in plans)


@sparse_methods
@torch.no_grad()
def test_packed_prompts_run_dense_and_stay_apart(case: MethodCase) -> None:
    it = subject("llama")
    packed = {"input_ids": words(), "position_ids": torch.arange(112)[None] % 56, "use_cache": False}
    dense = it.model(**packed).logits
    with accel.apply(it.model, case.sparse()) as handle:
        assert torch.equal(it.model(**packed).logits, dense)
    assert handle.stats.total.dense_calls == {"mask is not plain causal": 3}


@sparse_methods
@torch.no_grad()
def test_a_four_dimensional_mask_is_honoured_densely(case: MethodCase) -> None:
    it = subject("llama")
    mask = torch.ones(112, 112, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 20:40] = False
    mask |= torch.eye(112, dtype=torch.bool)
    dense = it.model(it.inputs["input_ids"], attention_mask=mask).logits
    assert not torch.equal(dense, it.dense.logits)
    with accel.apply(it.model, case.sparse()) as handle:
        assert torch.equal(it.model(it.inputs["input_ids"], attention_mask=mask).logits, dense)
    assert handle.stats.total.dense_calls == {"mask was given explicitly": 3}


@sparse_methods
@torch.no_grad()
def test_asking_for_attention_weights_runs_dense(case: MethodCase) -> None:
    it = subject("llama eager")
    dense = it.model(**it.inputs, output_attentions=True)
    with accel.apply(it.model, case.sparse()) as handle:
        got = it.model(**it.inputs, output_attentions=True)
    assert len(got.attentions) == 3
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, dense.attentions, strict=True))
    assert torch.equal(got.logits, dense.logits)
    assert handle.stats.total.sparse_calls == 0


@sparse_methods
@torch.no_grad()
def test_a_batch_with_a_hole_in_its_padding_runs_dense(case: MethodCase) -> None:
    it = subject("llama")
    inputs = {**it.inputs, "attention_mask": it.inputs["attention_mask"].clone()}
    inputs["attention_mask"][:, 30:40] = 0
    dense = it.model(**inputs).logits
    with accel.apply(it.model, case.sparse()) as handle:
        assert torch.equal(it.model(**inputs).logits, dense)
    assert handle.stats.total.dense_calls == {"padding between tokens": 3}
