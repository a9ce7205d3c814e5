"""A static pattern in vLLM, prompts and decoding: the tokens of the transformers host, however prompts are cut, cached and mixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hf_oracle import greedy as hf_greedy
from hf_oracle import patched
from tiny_vllm import engine, greedy, prompts, report

import accel

BATCH = prompts(3, 70, 333, 500)
AGAIN = [BATCH[3][:384] + BATCH[2][:77]]
POWER = accel.PowerAttention(block_size=32, window_blocks=2, is_adapted=True, min_seq_len=0, dense_layers=(1,))
OPTIONS = {"block_size": 32, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def oracle(tiny_llama: str) -> dict[str, Any]:
    """The tokens of the transformers host, its counters for the first batch, and dense tokens."""
    with patched(tiny_llama) as (model, _):
        dense = [hf_greedy(model, p) for p in BATCH]
    with patched(tiny_llama, POWER) as (model, handle):
        found = {"tokens": [hf_greedy(model, p) for p in BATCH], "stats": handle.stats.as_dict(), "dense": dense}
        return {**found, "again": [hf_greedy(model, p) for p in AGAIN]}


def captured(worker: Any) -> dict[str, Any]:
    """What the engine's builder makes of a decoding step for a graph, twice, and for drafts."""
    import torch

    from accel.patches.hosts.vllm.attention.mixins import WORK
    from accel.patches.hosts.vllm.compat import CommonAttentionMetadata

    builder = worker.model_runner.attn_groups[0][0].get_metadata_builder(0)
    starts, lens = torch.arange(4, dtype=torch.int32), torch.tensor([300, 20, 1], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, seq_lens_cpu_upper_bound=lens, num_reqs=3, num_actual_tokens=3,
        max_query_len=1, max_seq_len=300, block_table_tensor=torch.arange(192, dtype=torch.int32).view(3, 64), slot_mapping=torch.zeros(3).long(),
    )  # fmt: skip
    first, second = (builder.build_for_cudagraph_capture(common) for _ in range(2))
    works = [getattr(metadata, WORK) for metadata in (first, second)]
    return {
        "layers": sorted(works[0]),
        "lens": works[0][0].rest.seq_lens.tolist(),
        "is_shared": works[0][0].rest is works[0][2].rest,
        "stays": [getattr(works[0][0].rest, t).data_ptr() == getattr(works[1][0].rest, t).data_ptr() for t in ("block_table", "seq_lens")],
        "whole": first.seq_lens.tolist(),
        "drafting": hasattr(builder.build_for_drafting(common, 0), WORK),
        "updates_table": builder.supports_update_block_table,
    }


def test_whole_prompts_and_decoding_equal_the_transformers_host(tiny_llama: str, oracle: dict[str, Any]) -> None:
    with engine(tiny_llama, POWER, **OPTIONS) as llm:
        assert report(llm)["problems"] == []
        assert report(llm)["patched_layers"] == [0, 1, 2, 3]
        assert greedy(llm, BATCH) == oracle["tokens"] != oracle["dense"]
        found = report(llm)
        [graph] = llm.collective_rpc(captured)
        assert report(llm) == found
    # two sets of metadata in memory that stays: layer 1 decodes with whole tables
    assert graph == {
        "layers": [0, 2, 3], "lens": [32 * 5 + 12, 20, 1], "is_shared": True, "stays": [True, True], "whole": [300, 20, 1], "drafting": False,
        "updates_table": False,
    }  # fmt: skip
    # every request is counted as if it ran alone, decoding by shorter block tables included
    for counter in ("sparse_calls", "dense_calls", "density_by_layer"):
        assert found[counter] == oracle["stats"][counter], counter
    assert set(found["density_by_layer"]) == {0, 2, 3}
    assert found["dense_calls"]["dense layer"] == 4 * 8
    assert found["notices"] == []


def test_chunks_cached_prefixes_and_mixed_steps_change_no_token(tiny_llama: str, oracle: dict[str, Any]) -> None:
    with engine(tiny_llama, POWER, max_num_batched_tokens=128, **OPTIONS) as llm:
        assert greedy(llm, BATCH) == oracle["tokens"]
        before = report(llm)["sparse_calls"]
        assert greedy(llm, AGAIN) == oracle["again"]
        # of 461 tokens 384 were there: one chunk, and seven steps of decoding, in three layers
        assert report(llm)["sparse_calls"] - before == 8 * 3
        # chunks are calls of their own
        assert report(llm)["sparse_calls"] > oracle["stats"]["sparse_calls"]


@pytest.mark.parametrize("page", [64, 128])
def test_pages_larger_than_the_patterns_blocks(page: int, tiny_llama: str, oracle: dict[str, Any]) -> None:
    # no shorter block table can say what is read: decoding goes through our kernel, between the prompts of a step
    with engine(tiny_llama, POWER, max_num_batched_tokens=200, **{**OPTIONS, "block_size": page}) as llm:
        assert greedy(llm, BATCH) == oracle["tokens"]
        found = report(llm)
    assert found["dense_calls"].keys() == {"dense layer", "shorter than 129 tokens"}
    assert found["sparse_calls"] >= oracle["stats"]["sparse_calls"]


def test_prompts_alone_can_be_sparse(tiny_llama: str) -> None:
    method = replace(POWER, apply_to="prefill")
    with patched(tiny_llama, method) as (model, handle):
        wanted, counters = [hf_greedy(model, p) for p in BATCH], handle.stats.as_dict()
    with engine(tiny_llama, method, **OPTIONS) as llm:
        assert greedy(llm, BATCH) == wanted
        found = report(llm)
    assert found["dense_calls"] == counters["dense_calls"]
    assert found["dense_calls"]["decode"] > 0
    assert found["sparse_calls"] == 2 * 3
