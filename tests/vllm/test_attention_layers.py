"""Layers that no method may thin out stay vLLM's, each with its reason, beside layers that run it; and vLLM's own packing of keys."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_oracle import greedy as hf_greedy
from hf_oracle import patched
from tiny_vllm import VOCAB, engine, greedy, prompts, report

import accel
from accel.patches.hosts.vllm.options import engine_options
from accel.patches.hosts.vllm.plugin import BACKENDS

BATCH = prompts(3, 70, 333)
POWER = accel.PowerAttention(block_size=32, window_blocks=2, is_adapted=True, min_seq_len=0)
OPTIONS = {"block_size": 32, "skip_tokenizer_init": True}


def save_gemma(folder: Path, kind: str, **changes: Any) -> str:
    """A random Gemma 2 or 3 of four layers, every second one with a window of 64 tokens."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, {"Gemma2": "Gemma2Config", "Gemma3": "Gemma3TextConfig"}[kind])(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=VOCAB, max_position_embeddings=4096, sliding_window=64, initializer_range=0.12, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        # tied embeddings of a common size would answer every token with itself
        model.model.embed_tokens.weight.mul_(0.1)
    model.save_pretrained(folder)
    return str(folder)


def test_windows_beside_full_layers_equal_the_transformers_host(tmp_path: Path) -> None:
    folder = save_gemma(tmp_path, "Gemma3")
    with patched(folder) as (model, _):
        dense = [hf_greedy(model, p) for p in BATCH]
    with patched(folder, POWER) as (model, handle):
        wanted, counters = [hf_greedy(model, p) for p in BATCH], handle.stats.as_dict()
    with engine(folder, POWER, max_num_batched_tokens=2048, **OPTIONS) as llm:
        assert greedy(llm, BATCH) == wanted != dense
        found = report(llm)
    assert found["patched_layers"] == [1, 3]
    assert found["skipped_layers"] == {0: "sliding window", 2: "sliding window"}
    assert found["problems"] == []
    assert found["sparse_calls"] == counters["sparse_calls"] > 0
    assert found["dense_calls"]["sliding window"] == 2 * 3 * 8


def test_a_model_without_a_layer_to_thin_out_is_stock_vllm_and_a_problem(tmp_path: Path) -> None:
    folder = save_gemma(tmp_path, "Gemma2", attn_logit_softcapping=30.0)
    with engine(folder, **OPTIONS) as llm:
        stock = greedy(llm, BATCH)
    with engine(folder, POWER, **OPTIONS) as llm:
        [problem] = report(llm)["problems"]
        assert greedy(llm, BATCH) == stock
        found = report(llm)
    assert problem == (
        "powerattention runs in no attention layer (layer 0: sliding window; layer 1: soft cap; layer 2: sliding window; layer 3: soft cap)"
    )
    assert found["sparse_calls"] == 0
    assert found["dense_calls"] == {"sliding window": 2 * 3 * 8, "soft cap": 2 * 3 * 8}


@pytest.mark.parametrize(("isa", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("vec16", torch.float32), ("amx", torch.bfloat16)])
def test_keys_are_read_where_vllm_writes_them(isa: str, dtype: torch.dtype) -> None:
    from accel.patches.hosts.vllm.attention.layouts import TiledKeys, plain_pages, sides
    from accel.patches.hosts.vllm.attention.pooled import PooledKeys
    from accel.patches.hosts.vllm.compat import cpu_attn_reshape_and_cache

    pages, page, heads, dim = 4, 32, 2, 64
    cache = torch.zeros(pages, heads, page, 2 * dim, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2 * page, heads, dim, generator=g).to(dtype) for _ in range(2))
    # pages 2 and 1, in this order
    slots = torch.cat([torch.arange(page) + 2 * page, torch.arange(page) + page])
    cpu_attn_reshape_and_cache(k, v, *sides(cache), slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    table, kv_len = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([50])
    view = TiledKeys(*sides(cache), table, kv_len) if isa == "amx" else PooledKeys(*plain_pages(cache), table, kv_len)
    for found, written in zip(view.tokens(0), (k, v), strict=True):
        assert torch.equal(found, written[:50].transpose(0, 1))


def config_of(folder: str, name: str, *methods: Any) -> SimpleNamespace:
    """As much of a `VllmConfig` without layers as builders read."""
    from transformers import AutoConfig

    return SimpleNamespace(
        additional_config=engine_options(methods, {}, None)["additional_config"] if methods else {}, instance_id=name, speculative_config=None,
        model_config=SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder), dtype=torch.float32, max_model_len=4096),
        compilation_config=SimpleNamespace(static_forward_context={}, max_cudagraph_capture_size=None),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )  # fmt: skip


@pytest.mark.parametrize("methods", [(), (POWER,)], ids=["unasked", "asked"])
def test_vllm_does_not_put_another_table_under_ours(methods: tuple[Any, ...], tiny_llama: str) -> None:
    from accel.patches.hosts.vllm.attention.mixins import SparseBuilder

    class Plain:
        supports_update_block_table = True

        def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            self.vllm_config, self.layer_names, self.device = vllm_config, layer_names, device

    class Sparse(SparseBuilder, Plain):
        plain = Plain

    builder = Sparse(None, [], config_of(tiny_llama, f"table {len(methods)}", *methods), torch.device("cpu"))
    assert (builder.group is None) is (not methods)
    assert builder.supports_update_block_table is (not methods)


@pytest.mark.parametrize("path", BACKENDS.values(), ids=BACKENDS)
def test_an_engine_that_did_not_ask_has_vllms_backend(path: str, tiny_llama: str) -> None:
    from accel.patches.hosts.vllm.compat import AttentionCGSupport

    module, name = path.rsplit(".", 1)
    ours = getattr(importlib.import_module(module), name)
    [plain] = ours.__bases__
    assert ours.get_name() == plain.get_name()
    # no model is under construction
    assert ours.get_impl_cls() is plain.get_impl_cls()
    builder, stock = ours.get_builder_cls(), plain.get_builder_cls()
    assert issubclass(builder, stock)
    config, asked = config_of(tiny_llama, f"unasked {name}"), config_of(tiny_llama, name, POWER)
    assert builder.get_cudagraph_support(config, None) is stock.get_cudagraph_support(config, None)
    support = builder.get_cudagraph_support(asked, None)
    assert support.value == min(stock.get_cudagraph_support(asked, None).value, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value)
