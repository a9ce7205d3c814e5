"""Times of calls on a GPU: device events, cold caches, contestants in turn, the clocks noted beside them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Run = Callable[[], object]
# larger than the L2 cache of any GPU so far
FLUSH_BYTES = 256 << 20
# calls on the host: before the first that counts, and one after the other of the same contestant
WARM_CALLS, TURN = 64, 16


@dataclass(frozen=True)
class Times:
    """Milliseconds: median, 20th and 80th percentile of n repeats."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, ms: list[float]) -> Times:
        low, middle, high = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return cls(middle, low, high, len(ms))


class Timer(Protocol):
    """How one call is timed."""

    def ms(self, run: Run) -> float:
        """Time of one call, caches cold."""
        ...

    def settle(self) -> None:
        """Waits until everything asked for is done; raises where it failed."""
        ...

    def replayable(self, run: Run) -> Run:
        """The call without its cost on the host: a recorded graph, where there are any."""
        ...


class CudaTimer:
    """Events around the call. Before each, L2 is filled with other data, and the device is kept busy until the host has issued the call.

    So the host's time is not measured, but for calls that wait for the device themselves.
    """

    FEWEST_CYCLES, MOST_CYCLES, CYCLES_PER_MS = 500_000, 10_000_000, 2_000_000

    def __init__(self, device: torch.device) -> None:
        self._scratch = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device=device)
        self._cycles = self.FEWEST_CYCLES

    def ms(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # read, not written: lines that were written would go out to memory while the call runs
        self._scratch.max()
        torch.cuda._sleep(self._cycles)  # type: ignore[no-untyped-call]
        begin.record()
        start = time.perf_counter()
        run()
        issued_ms = 1e3 * (time.perf_counter() - start)
        end.record()
        end.synchronize()
        # the next call finds the device busy for twice as long as this one took the host; the first of a comparison is not counted
        wanted = int(2 * issued_ms * self.CYCLES_PER_MS)
        self._cycles = max(self._cycles, min(max(wanted, self.FEWEST_CYCLES), self.MOST_CYCLES))
        return float(begin.elapsed_time(end))

    def settle(self) -> None:
        torch.cuda.synchronize()

    def replayable(self, run: Run) -> Run:
        from accel.evals.gpu.checks import captured

        return captured(run).replay


class HostTimer:
    """The host's clock, for tests on a CPU."""

    def ms(self, run: Run) -> float:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)

    def settle(self) -> None:
        pass

    def replayable(self, run: Run) -> Run:
        return run


class DeviceLostError(RuntimeError):
    """The device answers no more in this process, since `contestant` ran."""

    def __init__(self, contestant: str, error: BaseException) -> None:
        self.contestant = contestant
        super().__init__(f"{contestant}: {reason(error)}")


@dataclass
class Comparison:
    """Times by contestant, and why those that fell out did."""

    times: dict[str, Times] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def compare(timer: Timer, runs: Mapping[str, Run], *, seconds: float, fewest: int = 3, most: int = 25) -> Comparison:
    """Every contestant in turn, A B C A B C, as often as fits `seconds`; one that raises while it warms up is left out, with its reason.

    Raises DeviceLostError where the device is unusable afterwards, as an illegal access leaves it.
    """
    found, warm = Comparison(), {}
    for name, run in runs.items():
        try:
            # twice: the first call compiles
            run()
            timer.settle()
            warm[name] = timer.ms(run)
            timer.settle()
        # one baseline that is not installed, or a variant that needs too much shared memory, must not end the benchmark
        except Exception as error:
            found.failed[name] = reason(error)
            try:
                timer.settle()
            except RuntimeError as lost:
                raise DeviceLostError(name, lost) from error
    repeats = most if not warm else max(fewest, min(most, int(1e3 * seconds / max(sum(warm.values()), 1e-6))))
    ms: dict[str, list[float]] = {name: [] for name in warm}
    for _ in range(repeats):
        for name in warm:
            ms[name].append(timer.ms(runs[name]))
    found.times = {name: Times.of(values) for name, values in ms.items()}
    return found


def host_us(runs: Mapping[str, Run], timer: Timer, *, calls: int) -> Comparison:
    """Microseconds (not milliseconds) that the host needs to issue one call, without waiting for the device.

    The contestants take turns of `TURN` calls, after each has issued `WARM_CALLS`: a processor that has just woken up would count against the
    first of them. A turn begins with as many calls that are not counted, because the caches hold another contestant's code. One that raises
    while it warms up is left out, with its reason.
    """
    found, us = Comparison(), {}
    for name, run in runs.items():
        try:
            for _ in range(0, WARM_CALLS, TURN):
                _issue_us(run, timer, TURN)
            us[name] = list[float]()
        # Triton's errors are no RuntimeErrors
        except Exception as error:
            found.failed[name] = reason(error)
    for done in range(0, calls, TURN):
        for name, taken in us.items():
            _issue_us(runs[name], timer, TURN)
            taken += _issue_us(runs[name], timer, min(TURN, calls - done))
    found.times = {name: Times.of(taken) for name, taken in us.items()}
    return found


def _issue_us(run: Run, timer: Timer, calls: int) -> list[float]:
    """What each of some calls costs the host. So few that the queue does not fill up: the host would wait for the device."""
    us = []
    for _ in range(calls):
        begin = time.perf_counter()
        run()
        us.append(1e6 * (time.perf_counter() - begin))
    timer.settle()
    return us


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def clocks() -> dict[str, Any]:
    """What nvidia-smi says of clocks, temperature, power and throttling now; empty where it cannot be asked. Changes nothing."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(CLOCK_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in asked.stdout.splitlines()[0].split(",")]
    return dict(zip(CLOCK_FIELDS, values, strict=False))
