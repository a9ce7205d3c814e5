"""What a stopwatch takes, joules from NVML's counter, and the times of samples as figures of a row."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel.evals import timing
from accel.evals.results import SampleRecord
from accel.evals.summary.times import prefills_of, timings_of
from accel.evals.timing import Lap, Stopwatch, Times, energy_counter

GPU = torch.device("cuda:1")


class FakeNVML(SimpleNamespace):
    """One GPU, whose counter stands at 5 J and moves by 250 mJ at every reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counts: bool = True) -> None:
        super().__init__(millijoules=4_750, asked=[])
        self.counts = counts

    def nvmlInit(self) -> None:  # noqa: N802
        self.asked.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.counts:
            raise self.NVMLError("not supported")
        assert handle == "handle"
        self.millijoules += 250
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device of which torch says no more than Stopwatch asks."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_COUNTERS", {})
    return monkeypatch


def test_a_lap_takes_time_and_no_energy_on_a_cpu() -> None:
    with Stopwatch(torch.device("cpu")).lap() as lap:
        time.sleep(0.02)
    assert 20 <= lap.ms < 2000
    assert lap.energy_j is None


def test_joules_are_the_difference_of_the_counter_of_that_very_gpu(gpu: pytest.MonkeyPatch) -> None:
    nvml = FakeNVML()
    gpu.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    watch = Stopwatch(GPU)
    with watch.lap() as lap:
        nvml.millijoules += 1_000
    # moved by the second, and once more by the reading itself
    assert lap.energy_j == pytest.approx(1.25)
    assert nvml.asked == ["init", "GPU-uuid-of-cuda:1"]


def test_the_device_is_waited_for_at_both_ends(gpu: pytest.MonkeyPatch) -> None:
    gpu.setitem(sys.modules, "pynvml", None)
    waits: list[Any] = []
    gpu.setattr(torch.cuda, "synchronize", waits.append)
    with Stopwatch(GPU).lap():
        assert waits == [GPU]
    assert waits == [GPU, GPU]


@pytest.mark.parametrize("nvml", [None, FakeNVML(counts=False)], ids=["not_installed", "not_counted"])
def test_energy_is_never_made_up(gpu: pytest.MonkeyPatch, nvml: Any) -> None:
    gpu.setitem(sys.modules, "pynvml", nvml)
    assert energy_counter(GPU) is None
    with Stopwatch(GPU).lap() as lap:
        pass
    assert lap.energy_j is None


def test_times_of_a_reply_are_those_of_vllm() -> None:
    times = Times.of_reply(Lap(100.0, 2.0), Lap(40.0, 1.0), n_output_tokens=5, finish_reason="length")
    # four further tokens in 40 ms
    assert times == Times(100.0, 10.0, 140.0, 5, "length", 3.0)
    assert Times.of_reply(Lap(100.0), Lap(0.1, 1.0), n_output_tokens=1, finish_reason="stop") == Times(100.0, None, 100.1, 1, "stop", None)


def record(sample: int, **changes: Any) -> SampleRecord:
    needed: dict[str, Any] = {
        "task": "t", "label": "a", "options": [], "tokens": 8, "seed": 0, "n_tokens": 8, "prompt_hash": "x", "log_prob": -1.0, "exact": 1.0,
        "log_probs": [-1.0], "hits": [1.0], "questions": ["q"], "expected": ["e"], "answers": ["e"], "density": None, "sparse_calls": 0,
        "dense_calls": {}, "prefill_ms": 10.0,
    }  # fmt: skip
    return SampleRecord(**{**needed, "sample": sample, **changes})


def test_figures_are_medians_with_p20_and_p80_of_the_samples_that_have_them() -> None:
    records = [record(i, ttft_ms=float(10 * i), finish_reason="stop" if i else "length", peak_bytes=None if i else 7) for i in range(6)]
    found = timings_of([*records, record(6)])
    assert found["ttft_ms"] == {"median": 25.0, "p20": 10.0, "p80": 40.0, "n": 6}
    assert (found["tpot_ms"], found["energy_j"], found["selection_share"]) == (None, None, None)
    assert found["peak_bytes"] == 7
    assert found["finish_reasons"] == {"length": 1, "stop": 5}
    assert found["batch"] == 1


def test_the_share_of_selecting_is_of_the_prefill_and_only_where_something_was_sparse() -> None:
    assert record(0, selection_ms=2.5, sparse_calls=3).selection_share == 0.25
    assert record(0, selection_ms=2.5).selection_share is None
    assert record(0, sparse_calls=3).selection_share is None


def test_the_times_of_a_last_batch_of_one_prompt_are_not_those_of_the_row() -> None:
    records = [*(record(i, batch=2, prefill_ms=50.0 + i // 2) for i in range(4)), record(4, ttft_ms=9.0, tpot_ms=1.0, e2el_ms=12.0)]
    found = timings_of(records)
    assert (found["ttft_ms"], found["tpot_ms"], found["e2el_ms"], found["batch"]) == (None, None, None, 2)


def test_prefills_are_those_of_whole_batches() -> None:
    batches = [(8, 100.0)] * 8 + [(8, 120.0)] * 8 + [(1, 15.0)]
    records = [record(i, batch=batch, prefill_ms=ms) for i, (batch, ms) in enumerate(batches)]
    assert prefills_of(records) == [100.0, 120.0]
    assert prefills_of([record(i, prefill_ms=7.0) for i in range(2)]) == [7.0, 7.0]


def test_a_batch_is_counted_once_and_prompts_of_equal_time_are_not_taken_for_one() -> None:
    # two batches, whose samples repeat their figures
    batched = [record(i, batch=3, prefill_ms=50.0 + i // 3, energy_j=1.0 + i // 3) for i in range(6)]
    assert timings_of(batched)["energy_j"] == {"median": 1.5, "p20": pytest.approx(1.2), "p80": pytest.approx(1.8), "n": 2}
    single = timings_of([record(i, energy_j=1.0) for i in range(4)])["energy_j"]
    assert single is not None
    assert single["n"] == 4
