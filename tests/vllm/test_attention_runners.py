"""The same tokens from vLLM's newer model runner and its Triton attention, in Triton's interpreter, and from two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hf_oracle import greedy as hf_greedy
from hf_oracle import patched
from tiny_vllm import engine, greedy, prompts, save_llama

import accel
from accel.recipe import Recipe

POWER = accel.PowerAttention(block_size=32, window_blocks=2, is_adapted=True, min_seq_len=0, dense_layers=(1,))
OPTIONS = {"block_size": 32, "skip_tokenizer_init": True}
pytestmark = pytest.mark.slow


def interpreted(**request: Any) -> dict[str, Any]:
    """What `interpreted.py` found, in a process of its own."""
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(request)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def test_the_newer_runner_with_triton_attention(tmp_path: Path) -> None:
    folder, batch = save_llama(tmp_path, layers=2), prompts(3, 150, 40)
    with patched(folder, POWER) as (model, handle):
        wanted, counters = [hf_greedy(model, p, 4) for p in batch], handle.stats.as_dict()
    with patched(folder) as (model, _):
        assert wanted != [hf_greedy(model, p, 4) for p in batch]
    found = interpreted(
        folder=folder, backend="accel.patches.hosts.vllm.attention.triton_backend.AccelTritonAttention", recipe=Recipe((POWER,)).as_dict(),
        prompts=batch, n=4, options=OPTIONS,
    )  # fmt: skip
    assert found["runner"].startswith("vllm.v1.worker.cpu.")
    assert found["tokens"] == wanted
    assert found["report"]["backends"] == ["TRITON_ATTN"]
    # the prompt of 150 tokens and its three steps of decoding, by a shorter block table
    assert found["report"]["sparse_calls"] == counters["sparse_calls"] == 4
    assert found["report"]["dense_calls"] == counters["dense_calls"]


def test_two_ranks_give_the_tokens_of_one(tiny_llama: str) -> None:
    flex = accel.FlexPrefill(block_size=32, min_budget=64, gamma=0.9, tau=0.3, min_seq_len=0)
    batch = prompts(3, 70, 333, 500)
    with patched(tiny_llama, flex) as (model, handle):
        wanted, density = [hf_greedy(model, p) for p in batch], handle.stats.density
    with engine(tiny_llama, flex, tensor_parallel_size=2, max_num_batched_tokens=2048, **OPTIONS) as llm:
        assert greedy(llm, batch) == wanted
        reports = llm.collective_rpc("accel_report")
    assert [r["sparse_calls"] for r in reports] == [4 * 3] * 2
    # each has half of the heads
    assert sum(r["active_tiles"] for r in reports) / sum(r["causal_tiles"] for r in reports) == pytest.approx(density)
