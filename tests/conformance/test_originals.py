"""What runs where accel does not: the model's own attention, whichever it is, with the mask its own mask function builds."""

from __future__ import annotations

import pytest
import torch
import transformers
from conformance.families import FAMILIES, instance, text_config, words
from conformance.methods import METHODS, SPARSE_METHODS, EveryBlock, MethodCase
from conformance.reference import ROUNDING, recorded, reference, run
from conformance.subjects import snapshot, subject
from torch import Tensor

import accel

every_method = pytest.mark.parametrize("case", METHODS, ids=str)
sparse_methods = pytest.mark.parametrize("case", SPARSE_METHODS, ids=str)
originals = pytest.mark.parametrize("original", ["eager", "sdpa", "flex_attention"])


def left_padded() -> dict[str, Tensor]:
    ids = words(batch=2)
    mask = torch.ones_like(ids)
    ids[1, :30], mask[1, :30] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma3TextConfig"], ids=["llama", "gemma3"])
@originals
@torch.no_grad()
def test_every_original_falls_back_with_its_own_mask(family: str, original: str) -> None:
    windows = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"]} if "Gemma" in family else {}
    cls = family.replace("TextConfig", "Config").replace("Config", "ForCausalLM")
    model, inputs = instance(cls, text_config(family, **windows), attention=original), left_padded()
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


@originals
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
    ("config", "model"),
    [
        (lambda: transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=2, rotary_dim=8, vocab_size=96, n_positions=128), "GPTJForCausalLM"),
        (lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=96), "BloomForCausalLM"),
        (lambda: transformers.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=96, n_positions=128), "CodeGenForCausalLM"),
    ],
    ids=["gptj", "bloom", "codegen"],
)
def test_models_without_the_interface_are_refused_untouched(config: object, model: str, case: MethodCase) -> None:
    plain = getattr(transformers, model)(config())
    before = snapshot(plain)
    with pytest.raises(accel.UnsupportedError) as caught:
        accel.apply(plain, case.sparse())
    family = model.removesuffix("ForCausalLM")
    assert any(f"{family}Attention" in reason for reason in caught.value.reasons)
    assert snapshot(plain) == before


def test_continuous_batching_is_refused_and_runs_while_paused() -> None:
    model = FAMILIES["llama"].build()[0]
    with accel.apply(model, SPARSE_METHODS[0].sparse()), pytest.raises(accel.UnsupportedError, match="paged cache"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 8, 64), position_embeddings=(torch.ones(1, 8, 16), torch.zeros(1, 8, 16)), attention_mask=None, cache=object()
        )
