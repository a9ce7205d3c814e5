"""A pattern found from the keys, in vLLM: whole prompts equal the transformers host, and chunks equal it when it is fed the same chunks."""

from __future__ import annotations

from typing import Any

from hf_oracle import greedy as hf_greedy
from hf_oracle import patched
from tiny_vllm import engine, greedy, prompts, report

import accel

BATCH = prompts(3, 70, 333, 500)
FLEX = accel.FlexPrefill(block_size=32, min_budget=64, gamma=0.9, tau=0.3, min_seq_len=0)
OPTIONS = {"block_size": 32, "skip_tokenizer_init": True}


def pools(worker: Any) -> list[int]:
    """Per layer, pages whose mean key is kept."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [0 if layer.impl.pool is None else int(layer.impl.pool.known.sum()) for layer in layers]


def test_whole_prompts_equal_the_transformers_host(tiny_llama: str) -> None:
    with patched(tiny_llama) as (model, _):
        dense = [hf_greedy(model, p) for p in BATCH]
    with patched(tiny_llama, FLEX) as (model, handle):
        wanted, counters = [hf_greedy(model, p) for p in BATCH], handle.stats.as_dict()
    with engine(tiny_llama, FLEX, max_num_batched_tokens=2048, enable_chunked_prefill=False, **OPTIONS) as llm:
        assert greedy(llm, BATCH) == wanted != dense
        found = report(llm)
        assert min(llm.collective_rpc(pools)[0]) > 0
    for counter in ("sparse_calls", "dense_calls", "density_by_layer"):
        assert found[counter] == counters[counter], counter
    assert found["sparse_calls"] == 4 * 3
    assert found["notices"] == []


def test_chunks_equal_the_transformers_host_fed_the_same_chunks(tiny_llama: str) -> None:
    shared = BATCH[3][:384]
    later = [shared + BATCH[2][:100], shared[:256] + BATCH[2][:200]]
    with patched(tiny_llama, FLEX) as (model, handle):
        wanted = [hf_greedy(model, p, chunk=128) for p in BATCH]
        calls = handle.stats.total.sparse_calls
        again = [hf_greedy(model, p, chunk=128) for p in later]
        whole = [hf_greedy(model, p) for p in BATCH]
    # few pages, so that later prompts are written over earlier ones
    few = {"max_num_batched_tokens": 128, "max_model_len": 640, "num_gpu_blocks_override": 24}
    with engine(tiny_llama, FLEX, **few, **OPTIONS) as llm:
        # one by one: beside others a prompt is cut elsewhere
        assert [greedy(llm, [p])[0] for p in BATCH] == wanted != whole
        found = report(llm)
        assert found["sparse_calls"] == calls
        [notice] = found["notices"]
        assert "chunks that the scheduler cuts, up to 128 tokens" in notice
        # prefixes written by another request, in whole chunks, with the means that were kept of their pages
        assert min(llm.collective_rpc(pools)[0]) > 0
        assert [greedy(llm, [p])[0] for p in later] == again
        # the prefix was not computed again: one chunk of 100, and two of 128 and 72
        assert report(llm)["sparse_calls"] - calls == 4 * 3
