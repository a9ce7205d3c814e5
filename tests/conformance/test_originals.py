"""What runs where accel does not: the model's own attention, whichever it is, with the mask its own mask function builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conformance.families import FAMILIES, instance, text_config, words
from conformance.methods import METHODS, SPARSE_METHODS, EveryBlock, MethodCase
from conformance.reference import ROUNDING, recorded, reference, run
from conformance.subjects import snapshot, subject
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import accel

every_method = pytest.mark.parametrize("case", METHODS, ids=str)
sparse_methods = pytest.mark.parametrize("case", SPARSE_METHODS, ids=str)
# flex_attention compiles itself, which takes its time; its decoding kernel does not compile on every CPU even without accel
ORIGINALS = [
    *(("Llama", original) for original in ("eager", "sdpa")),
    *(("Gemma3Text", original) for original in ("eager", "sdpa")),
    pytest.param("Llama", "flex_attention", marks=pytest.mark.slow),
]


def left_padded() -> dict[str, Tensor]:
    ids = words(batch=2)
    mask = torch.ones_like(ids)
    ids[1, :30], mask[1, :30] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("family", "original"), ORIGINALS)
@torch.no_grad()
def test_every_original_falls_back_with_its_own_mask(family: str, original: str) -> None:
    windows = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"]} if family == "Gemma3Text" else {}
    cls = f"{family.removesuffix('Text')}ForCausalLM"
    model, inputs = instance(cls, text_config(f"{family}Config", **windows), attention=original), left_padded()
    assert model.config._attn_implementation == original
    dense = model(**inputs).logits
    with accel.apply(model, "streaming", block_size=16, window_blocks=1, min_seq_len=1000) as handle:
        assert torch.equal(model(**inputs).logits, dense)
        assert handle.stats.total.dense_calls.total() == 3
    with accel.apply(model, EveryBlock()) as handle:
        got = model(**inputs).logits
    rows = inputs["attention_mask"].bool()
    assert (got - dense)[rows].abs().max() <= ROUNDING * dense.abs().max()
    assert handle.stats.total.sparse_calls == (2 if windows else 3)


@pytest.mark.parametrize("original", ["eager", "sdpa"])
def test_the_original_does_not_change_what_a_method_computes(original: str) -> None:
    model, inputs = instance("LlamaForCausalLM", text_config("LlamaConfig"), attention=original), left_padded()
    with accel.apply(model, SPARSE_METHODS[0].sparse()) as handle, recorded(handle) as plans:
        got = run(model, inputs)
    with reference(model, plans):
        want = run(model, inputs)
    rows = inputs["attention_mask"].bool()
    assert (got.logits - want.logits)[rows].abs().max() <= ROUNDING * want.logits.abs().max()
    assert torch.equal(got.tokens, want.tokens)


@sparse_methods
def test_sliding_layers_stay_and_the_report_says_so(case: MethodCase) -> None:
    it = subject("gemma3")
    with accel.apply(it.model, case.sparse()) as handle, torch.no_grad():
        it.model(**it.inputs)
    assert handle.patched_layers == [1, 2]
    assert handle.skipped_layers == {0: "sliding window"}
    assert "2 of 3 layers" in handle.report()
    assert "skipped 0: sliding window" in handle.report()
    assert handle.stats.layers[0].sparse_calls == 0


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("mistral sliding", dict.fromkeys(range(3), "sliding window")),
        ("qwen3 next", {0: "linear attention"}),
        ("lfm2", {0: "conv"}),
        ("paligemma", dict.fromkeys(range(3), "attention is not causal")),
    ],
    ids=["one window for all", "linear attention", "convolution", "prefix attention"],
)
def test_layers_without_full_causal_attention_are_reported(name: str, skipped: dict[int, str]) -> None:
    with accel.apply(subject(name).model, "streaming") as handle:
        assert handle.skipped_layers == skipped
        assert handle.patched_layers == sorted(set(range(3)) - set(skipped))


@every_method
@pytest.mark.parametrize(
    ("config", "family"),
    [
        (lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=96), "Bloom"),
        (lambda: transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=96), "Falcon"),
        (lambda: transformers.XGLMConfig(d_model=32, ffn_dim=32, num_layers=2, attention_heads=2, vocab_size=96), "XGLM"),
    ],
    ids=["bloom", "falcon", "xglm"],
)
def test_models_without_the_interface_are_refused_untouched(config: Callable[[], Any], family: str, case: MethodCase) -> None:
    plain = getattr(transformers, f"{family}ForCausalLM")(config())
    before = snapshot(plain)
    with pytest.raises(accel.UnsupportedError) as caught:
        accel.apply(plain, case.sparse())
    assert any(f"{family}Attention" in reason for reason in caught.value.reasons)
    assert snapshot(plain) == before


def test_continuous_batching_is_refused_by_name() -> None:
    model, inputs = FAMILIES["llama"].build()
    before = snapshot(model)
    # transformers itself refuses the name under which the dispatcher runs
    with accel.apply(model, SPARSE_METHODS[0].sparse()), pytest.raises(ValueError, match="accel_sdpa"):
        model.generate_batch([inputs["input_ids"][0].tolist()], generation_config=GenerationConfig(max_new_tokens=3, do_sample=False))
    assert snapshot(model) == before


@sparse_methods
def test_a_paged_cache_that_arrives_all_the_same_is_refused(case: MethodCase) -> None:
    model = subject("llama").model
    q = torch.zeros(1, 4, 8, 16)
    with accel.apply(model, case.sparse()), pytest.raises(accel.UnsupportedError, match="paged cache"):
        ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation](model.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None, cache=object())
