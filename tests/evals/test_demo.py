"""The demo's measurement on a tiny random model: one pass is both timed and scored, controls match the density, the time is kept."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.evals import demo
from accel.evals.demo import Case, Measured, run_demo
from accel.evals.latency import OWN_DENSE, SHORT, Pass
from accel.evals.models import LoadedModel

CASES = (Case("needle", 1536, "needles found"), Case("needle", 1024, None))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model(), byte_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def measured(loaded: LoadedModel) -> list[Measured]:
    method = accel.FlexPrefill(gamma=0.6, min_budget=128, min_seq_len=1200)
    return run_demo(loaded, method, cases=CASES, seed=0, deadline=0.0, progress=lambda _text: None)


def test_every_variant_is_timed_and_scored_once(measured: list[Measured]) -> None:
    labels = ["dense (sdpa)", OWN_DENSE, "FlexPrefill", "PowerAttention", "Streaming", "RandomBlocks"]
    for found in measured:
        assert list(found.variants) == list(found.passes) == list(found.scored) == labels
        assert all(len(passes) == 1 for passes in found.passes.values())
        assert all(len(scored.hits) == 4 for scored in found.scored.values())
        assert [row.label for row in found.rows()] == labels


def test_times_are_those_of_the_scored_pass(measured: list[Measured]) -> None:
    for found in measured:
        for label, scored in found.scored.items():
            assert found.passes[label][0].elapsed_s * 1e3 == pytest.approx(scored.prefill_ms)


def test_controls_reach_the_density_of_the_method(measured: list[Measured]) -> None:
    densities = {label: passes[0].density for label, passes in measured[0].passes.items()}
    wanted = densities["FlexPrefill"]
    assert wanted is not None
    assert wanted < 0.95, "the method must be sparse here for this test to say anything"
    # one row of a window is 12 of 78 tiles at most
    assert densities["Streaming"] == pytest.approx(wanted, abs=0.1)
    assert densities["RandomBlocks"] == pytest.approx(wanted, abs=0.02)


def test_below_the_crossover_everything_is_dense_and_scores_agree(measured: list[Measured]) -> None:
    short = measured[1]
    assert all(row.note.startswith(f"dense: {SHORT}") for row in short.rows() if not row.is_baseline)
    for label, scored in short.scored.items():
        assert scored.log_probs == pytest.approx(short.scored["dense (sdpa)"].log_probs, abs=1e-3), label


def test_what_the_heads_read_is_recorded(measured: list[Measured]) -> None:
    assert sorted(measured[0].maps["FlexPrefill"].masks) == [0, 1, 2]
    assert measured[0].maps["dense (sdpa)"].masks == {}


def test_spare_time_goes_into_whole_rounds(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAX_ROUNDS", 2)
    method = accel.FlexPrefill(gamma=0.6, min_budget=128, min_seq_len=0)
    lines: list[str] = []
    [found] = run_demo(loaded, method, cases=CASES[1:], seed=0, deadline=time.perf_counter() + 600, progress=lines.append)
    assert {len(passes) for passes in found.passes.values()} == {2}
    assert [line.split(",")[0] for line in lines] == list(found.variants) * 2


@pytest.mark.parametrize("seconds, tokens", [(1000.0, 8192), (20.0, 4096)], ids=["enough-time", "too-little"])
def test_a_slow_machine_gets_a_shorter_prompt_not_a_longer_wait(seconds: float, tokens: int) -> None:
    first = Measured(Case("needle", 4096, "needles found"), None, {}, [], {"A": [Pass(1.0)]}, round_s=30.0)
    case = Case("fewshot", 8192, "labels", shorter_tokens=4096)
    now = time.perf_counter()
    assert demo._in_time(case, [first], now + seconds) == replace(case, tokens=tokens)
    assert demo._in_time(replace(case, shorter_tokens=None), [first], now) == replace(case, shorter_tokens=None)


def test_controls_are_sparse_from_the_same_length_on() -> None:
    method = accel.FlexPrefill(min_seq_len=4096)
    assert {control.min_seq_len for [control] in demo.controls(method, 0.4).values()} == {4096}
