"""Peak memory sees an allocation that is gone by the end, and not what was held before."""

from __future__ import annotations

import pytest
import torch

from accel.evals import memory
from accel.evals.memory import track_peak

MIB = 2**20


@pytest.fixture(params=["kernel", "sampled"])
def instrument(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_can_reset_kernel_peak", lambda: False)
    elif not memory._can_reset_kernel_peak():
        pytest.skip("this kernel does not reset VmHWM")
    return request.param


def test_a_passing_allocation_counts_and_earlier_ones_do_not(instrument: str) -> None:
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    with track_peak(torch.device("cpu")) as peak:
        passing = torch.ones(48 * MIB, dtype=torch.uint8)
        # several sampling periods, so that the sampler meets it too
        highest = max(int(passing.max()) for _ in range(8))
        del passing
    assert highest == 1
    assert held.numel() == 64 * MIB
    assert peak.peak_bytes is not None
    assert 44 * MIB <= peak.peak_bytes <= 60 * MIB
    assert ("VmHWM" in peak.how) == (instrument == "kernel")


def test_nothing_allocated_is_nearly_nothing(instrument: str) -> None:
    with track_peak(torch.device("cpu")) as peak:
        pass
    assert peak.peak_bytes is not None
    assert peak.peak_bytes < 4 * MIB
