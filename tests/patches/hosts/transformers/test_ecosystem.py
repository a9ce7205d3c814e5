"""The tools around transformers: compilers, PEFT, accelerate's device hooks, pipelines."""

from __future__ import annotations

import pytest
import torch
from support import tiny_llama
from torch import Tensor, nn
from transformers import CompileConfig

import accel
from accel.patches.hosts.identity import fingerprint

SPARSE = accel.Streaming(window_blocks=1, block_size=16, min_seq_len=0)


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (2, 96), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_a_compiled_model_is_one_graph_and_its_calls_are_counted(model: nn.Module, batch: dict, backend: str, is_padded: bool) -> None:
    inputs = batch if is_padded else {"input_ids": batch["input_ids"]}
    torch.compiler.reset()
    with accel.apply(model, SPARSE) as handle:
        eager = model(**inputs).logits
        handle.stats.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(2):
            real = batch["attention_mask"].bool() if is_padded else torch.ones(2, 96, dtype=torch.bool)
            torch.testing.assert_close(compiled(**inputs).logits[real], eager[real], atol=1e-6, rtol=1e-5)
        assert handle.stats.total.sparse_calls == 6


@torch.no_grad()
def test_dense_calls_of_a_compiled_model_are_counted_too(model: nn.Module, batch: dict) -> None:
    torch.compiler.reset()
    with accel.apply(model, "streaming", min_seq_len=2000) as handle:
        torch.compile(model, backend="aot_eager", fullgraph=True)(batch["input_ids"])
        assert handle.stats.total.dense_calls == {"shorter than 2000 tokens": 3}


@torch.no_grad()
def test_compiled_generation_on_a_static_cache_gives_the_same_tokens(model: nn.Module, batch: dict) -> None:
    torch.compiler.reset()
    with accel.apply(model, SPARSE) as handle:
        expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
        handle.stats.reset()
        config = CompileConfig(fullgraph=True, backend="eager")
        config._compile_all_devices = True
        got = model.generate(**batch, max_new_tokens=5, do_sample=False, cache_implementation="static", compile_config=config)
        assert torch.equal(got, expected)
        assert handle.stats.total.sparse_calls == 3


@torch.no_grad()
def test_a_lora_model_is_patched_through_its_wrapper(model: nn.Module, batch: dict) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    dense = wrapped(**batch).logits
    with accel.apply(wrapped, SPARSE) as handle:
        assert (wrapped(**batch).logits - dense).abs().max() > 1e-3
        assert handle.stats.total.sparse_calls == 3
        assert torch.equal(wrapped.generate(**batch, max_new_tokens=3, do_sample=False)[:, :96], batch["input_ids"])
    assert torch.equal(wrapped(**batch).logits, dense)


@torch.no_grad()
def test_offloaded_weights_give_the_same_result(model: nn.Module, batch: dict) -> None:
    from accelerate import cpu_offload

    with accel.apply(model, SPARSE):
        expected = model(**batch).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    with accel.apply(model, SPARSE) as handle:
        assert torch.equal(model(**batch).logits, expected)
        assert handle.stats.total.sparse_calls == 3


def test_offloaded_weights_are_known_by_the_same_fingerprint(model: nn.Module) -> None:
    from accelerate import cpu_offload

    here = fingerprint(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert fingerprint(model) == here
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(accel.UnsupportedError, match="not loaded"):
        fingerprint(empty)


@torch.no_grad()
def test_a_text_generation_pipeline_runs_the_patched_model(model: nn.Module) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(64)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pipe = pipeline("text-generation", model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0"))
    prompt = " ".join(f"w{2 + i % 60}" for i in range(96))
    with accel.apply(model, SPARSE) as handle:
        reply = pipe(prompt, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert handle.stats.total.sparse_calls == 3
    assert len(reply.split()) == 4
