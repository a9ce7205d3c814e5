"""Our attention backend with nothing to thin out: the tokens of stock vLLM, chunked, from cached prefixes and in mixed steps."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_vllm import engine, greedy, prompts, report

import accel

BATCH = prompts(3, 70, 333, 500)
# shares its first 384 tokens with a prompt that was there before
AGAIN = [BATCH[3][:384] + BATCH[2][:77], BATCH[2]]
OPTIONS = {"block_size": 32, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def stock(tiny_llama: str) -> list[list[list[int]]]:
    """The tokens of vLLM as it is, and that none of our classes ran."""
    with engine(tiny_llama, **OPTIONS) as llm:
        [classes] = llm.collective_rpc(impl_modules)
        assert classes == {"vllm.v1.attention.backends.cpu_attn"}
        return [greedy(llm, BATCH), greedy(llm, AGAIN)]


def impl_modules(worker: Any) -> set[str]:
    """Where the attention implementations of a worker come from."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return {type(layer.impl).__module__ for layer in layers if hasattr(layer, "impl")}


@pytest.mark.parametrize("kernel", ["original", "accel"])
def test_dense_attention_is_token_identical_to_stock_vllm(kernel: Any, tiny_llama: str, stock: list[list[list[int]]]) -> None:
    # 128 tokens a step: prompts in chunks, beside requests that decode
    with engine(tiny_llama, accel.Dense(dense_kernel=kernel), max_num_batched_tokens=128, **OPTIONS) as llm:
        first = greedy(llm, BATCH)
        calls = report(llm)["dense_calls"]["dense control"]
        assert [first, greedy(llm, AGAIN)] == stock
        found = report(llm)
    # of 461 and 333 tokens 384 and 320 were there, the rest is one step
    assert found["dense_calls"]["dense control"] - calls == 2 * 8 * 4
    assert found["problems"] == []
    assert found["patched_layers"] == [0, 1, 2, 3]
    assert found["backends"] == ["CPU_ATTN"]
    assert found["sparse_calls"] == 0
    assert found["dense_calls"].keys() == {"dense control"}
    # 500 and 333 tokens came in chunks
    assert calls > 4 * 8 * 4
