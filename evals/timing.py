"""What one timed sample took: seconds with the device waited for, and joules where NVML counts them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Serving metrics of one sample, under vLLM's names; None where there is no such figure.

    ttft_ms: until the first token behind the prompt is known on the host; where the model writes nothing, until the one pass over prompt and right
    answers has given its tokens, and there are no further figures. tpot_ms: mean time of each further token that the model wrote. e2el_ms:
    both together, until the last token of the reply. n_output_tokens: the reply's, the end token among them. finish_reason: "stop" at the end token,
    "length" where the reply was cut at the most tokens it may have. energy_j: of the whole device while the sample's clock ran, whoever else used it;
    the counter moves in steps of many milliseconds, so that only sums over many short samples mean something.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    n_output_tokens: int | None = None
    finish_reason: str | None = None
    energy_j: float | None = None

    @classmethod
    def of_prompt(cls, prompt: Lap) -> Times:
        """Of a sample for which the model writes nothing of its own."""
        return cls(ttft_ms=prompt.ms, energy_j=prompt.energy_j)

    @classmethod
    def of_reply(cls, prompt: Lap, writing: Lap, *, n_output_tokens: int, finish_reason: str) -> Times:
        """Of a prompt and the tokens behind its first one."""
        energies = [lap.energy_j for lap in (prompt, writing) if lap.energy_j is not None]
        return cls(
            prompt.ms, writing.ms / (n_output_tokens - 1) if n_output_tokens > 1 else None, prompt.ms + writing.ms, n_output_tokens, finish_reason,
            sum(energies) if len(energies) == 2 else None,
        )  # fmt: skip

    def of_batch(self) -> Times:
        """Without the times, which are those of the batch and of no sample in it."""
        return replace(self, ttft_ms=None, tpot_ms=None, e2el_ms=None)


@dataclass
class Lap:
    """Milliseconds and joules of one `Stopwatch.lap`, once it has ended; energy_j is None where nothing counts it."""

    ms: float = 0.0
    energy_j: float | None = None


class Stopwatch:
    """Times what runs on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._joules = energy_counter(device)

    @contextmanager
    def lap(self) -> Iterator[Lap]:
        """The time inside the block, the device waited for at both ends."""
        lap = Lap()
        begin, joules = self._now()
        yield lap
        end, joules_after = self._now()
        lap.ms = (end - begin) * 1e3
        if joules is not None and joules_after is not None:
            lap.energy_j = joules_after - joules

    def _now(self) -> tuple[float, float | None]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), self._joules() if self._joules else None


_COUNTERS: dict[torch.device, Callable[[], float] | None] = {}


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules that a GPU has used so far; None on a CPU, without `pynvml` (nvidia-ml-py), and on GPUs that do not count them."""
    if device.type != "cuda":
        return None
    if device not in _COUNTERS:
        _COUNTERS[device] = _nvml_counter(device)
    return _COUNTERS[device]


def _nvml_counter(device: torch.device) -> Callable[[], float] | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        # by its UUID: torch numbers the visible devices only, NVML all of them
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

        def joules() -> float:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        joules()
    except nvml.NVMLError:      # no driver, a share of a GPU, or one that keeps no such counter
        return None
    return joules
