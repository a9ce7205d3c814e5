"""`accel.vllm.LLM`: vLLM's class with methods in its engine, or as it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from tiny_vllm import ENGINE, engine, greedy, prompts

import accel
from accel.errors import OptionError, UnsupportedError
from accel.patches.hosts.vllm.engine import Engine
from accel.stats import Stats
from accel.vllm import LLM

SPARSE = accel.Streaming(block_size=64, window_blocks=1, min_seq_len=0)
OPTIONS = {**ENGINE, "skip_tokenizer_init": True}
LENGTHS = (3, 70, 333, 500)


def close(llm: Any) -> None:
    """Ends an engine."""
    llm.llm_engine.engine_core.shutdown()


class Recorded(NamedTuple):
    """What a sparse engine said before and after it continued the prompts."""

    answers: list[list[int]]
    before: Stats
    after: Stats
    report: str


@pytest.fixture(scope="module")
def sparse(tiny_llama: str) -> Recorded:
    # closed at once: two engines of one process share what the first that ends takes away
    llm = LLM(tiny_llama, SPARSE, **OPTIONS)
    before = llm.stats
    answers = greedy(llm, prompts(*LENGTHS), n=4)
    found = Recorded(answers, before, llm.stats, llm.report())
    close(llm)
    return found


def test_a_report_says_where_it_runs_and_what_ran(sparse: Recorded) -> None:
    # of four prompts two are longer than sink and window; each of four layers reads them once
    assert (sparse.before.total.sparse_calls, sparse.after.total.sparse_calls) == (0, 2 * 4)
    assert sparse.after.total.dense_calls["decode"] == 4 * 3 * 4
    density = sparse.after.density
    assert density is not None
    assert 0 < density < 1
    first, *_, last = sparse.report.splitlines()
    assert first == "streaming(min_seq_len=0, block_size=64, window_blocks=1) on vllm: 4 of 4 layers patched"
    assert last.startswith(f"calls: 8 sparse (density {density:.2f}), 48 dense (decode)")


def test_an_engine_without_a_method_is_vllm_s_own(tiny_llama: str, sparse: Recorded) -> None:
    batch = prompts(*LENGTHS)
    plain = LLM(tiny_llama, **OPTIONS)
    try:
        found = greedy(plain, batch, n=4)
        assert plain.reports() == []
        assert "no method" in plain.report()
    finally:
        close(plain)
    with engine(tiny_llama, skip_tokenizer_init=True) as stock:
        assert found == greedy(stock, batch, n=4)
    assert found != sparse.answers, "the pattern hides most of the long prompts"


def test_two_workers_of_one_engine_are_asked_and_counted(tiny_llama: str, monkeypatch: pytest.MonkeyPatch, sparse: Recorded) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = LLM(tiny_llama, SPARSE, tensor_parallel_size=2, **OPTIONS)
    try:
        assert greedy(llm, prompts(*LENGTHS), n=4) == sparse.answers
        reports = llm.reports()
        assert [r["sparse_calls"] for r in reports] == [8, 8]
        assert [r["patched_layers"] for r in reports] == [[0, 1, 2, 3]] * 2
        assert llm.stats.total.sparse_calls == 16
        assert llm.stats.density == sparse.after.density
    finally:
        close(llm)


def test_an_engine_that_runs_nothing_is_not_handed_out(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # as where another plugin has taken the backend's place
    monkeypatch.setattr(Engine, "attention", property(lambda self: None))
    monkeypatch.setattr(Engine, "problems", lambda self: ["streaming runs in no attention layer"])
    with pytest.raises(UnsupportedError, match=r"does not run streaming:\n  - worker 0: streaming runs in no attention layer"):
        LLM(tiny_llama, SPARSE, **OPTIONS)


def test_methods_come_from_one_place(tmp_path: Any) -> None:
    file = tmp_path / "r.yaml"
    accel.Recipe((SPARSE,)).save(file)
    with pytest.raises(OptionError, match="not by both"):
        LLM("nowhere", SPARSE, recipe=file)
    with pytest.raises(OptionError, match="did you mean 'streaming'"):
        LLM("nowhere", "streming")
    with pytest.raises(OptionError, match="window_blocks must be"):
        LLM("nowhere", "streaming:window_blocks=0")


@pytest.mark.slow
def test_the_embedded_model_still_finds_a_fact_under_sparse_prefill() -> None:
    from vllm import SamplingParams

    from accel.evals.tasks import load_text_task

    method = accel.FlexPrefill(gamma=0.9, min_budget=256, min_seq_len=0)
    llm = LLM("smollm2", method, **{**ENGINE, "max_num_batched_tokens": 2048})
    try:
        tokenizer = llm.get_tokenizer()
        [sample] = load_text_task("needle").samples(tokenizer, 1024, 1, 0)
        # teacher forcing, as `accel run` scores it: every token of the answers must be the likeliest
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        [output] = llm.generate([{"prompt_token_ids": list(sample.input_ids)}], wanted, use_tqdm=False)
        hits = [all(output.prompt_logprobs[i][sample.input_ids[i]].rank == 1 for i in range(a.start, a.stop)) for a in sample.answers]
        stats = llm.stats
        assert stats.total.sparse_calls == 30
        assert 0.2 < stats.density < 0.9
        assert sum(hits) >= len(hits) / 2, hits
    finally:
        close(llm)
