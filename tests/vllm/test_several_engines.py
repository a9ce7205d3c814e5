"""Engines of one process that live at the same time: each runs its own recipe, or none; and what is compiled runs it too."""

from __future__ import annotations

from typing import Any

import pytest
from hf_oracle import greedy as hf_greedy
from hf_oracle import patched
from tiny_vllm import engine, greedy, prompts, report

import accel

BATCH = prompts(3, 70, 333)
POWER = accel.PowerAttention(block_size=32, window_blocks=2, is_adapted=True, min_seq_len=0)
STREAMING = accel.Streaming(block_size=32, window_blocks=1, min_seq_len=0)
OPTIONS = {"block_size": 32, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def wanted(tiny_llama: str) -> dict[str, list[list[int]]]:
    """By method, the tokens of the transformers host."""
    found = {}
    for name, methods in {"dense": (), "power": (POWER,), "streaming": (STREAMING,)}.items():
        with patched(tiny_llama, *methods) as (model, _):
            found[name] = [hf_greedy(model, p) for p in BATCH]
    assert len({str(tokens) for tokens in found.values()}) == 3
    return found


def test_engines_side_by_side_share_nothing(tiny_llama: str, wanted: dict[str, Any]) -> None:
    few = {**OPTIONS, "num_gpu_blocks_override": 80}
    with engine(tiny_llama, POWER, **few) as power, engine(tiny_llama, **few) as stock, engine(tiny_llama, STREAMING, **few) as streaming:
        assert greedy(stock, BATCH) == wanted["dense"]
        assert report(power)["sparse_calls"] == report(streaming)["sparse_calls"] == 0
        assert greedy(streaming, BATCH) == wanted["streaming"]
        assert report(streaming)["methods"] == ["streaming"]
        # prompts of 70 and 333 tokens hide some keys, in four layers
        assert report(streaming)["sparse_calls"] == 2 * 4
        assert report(power)["sparse_calls"] == 0
        assert greedy(power, BATCH) == wanted["power"]
        assert report(power)["methods"] == ["powerattention"]
        # the prompt of 333 tokens and its seven steps of decoding
        assert report(power)["sparse_calls"] == 8 * 4
        assert report(streaming)["sparse_calls"] == 2 * 4


def test_a_compiled_model_runs_the_method(tiny_llama: str, wanted: dict[str, Any]) -> None:
    # traced as by default, without the minute that Inductor takes
    compiled = {**OPTIONS, "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    with engine(tiny_llama, POWER, **compiled) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name == "DYNAMO_TRACE_ONCE"
        assert greedy(llm, BATCH) == wanted["power"]
        assert report(llm)["sparse_calls"] == 8 * 4
