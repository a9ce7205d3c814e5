"""Peak memory of one call, and how it was measured: a number whose origin is not said cannot be compared."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLE_S = 0.002


@dataclass
class PeakMemory:
    """Bytes above what was held when the block was entered, so weights and a filled cache do not count. None until the block is left.

    how: the instrument, in words that fit under a table.
    """

    how: str
    peak_bytes: int | None = None


@contextmanager
def track_peak(device: torch.device) -> Iterator[PeakMemory]:
    """Peak memory growth inside the block. CUDA: the allocator's own counter. CPU: resident memory of the whole process.

    On a CPU freed memory is handed back to the system first; otherwise the second of two equal calls would reuse it and seem free.
    """
    gc.collect()
    if device.type == "cuda":
        yield from _cuda_peak(device)
        return
    _return_freed_memory()
    yield from (_kernel_peak() if _can_reset_kernel_peak() else _sampled_peak())


def _cuda_peak(device: torch.device) -> Iterator[PeakMemory]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    peak = PeakMemory("growth of torch.cuda.max_memory_allocated")
    yield peak
    torch.cuda.synchronize(device)
    peak.peak_bytes = torch.cuda.max_memory_allocated(device) - before


def _kernel_peak() -> Iterator[PeakMemory]:
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    peak = PeakMemory("growth of the process's resident memory, peak kept by the kernel (VmHWM)")
    yield peak
    peak.peak_bytes = max(0, _status_bytes("VmHWM") - before)


def _sampled_peak() -> Iterator[PeakMemory]:
    before = highest = resident_bytes()
    stop = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(SAMPLE_S):
            highest = max(highest, resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    peak = PeakMemory(f"growth of the process's resident memory, sampled every {SAMPLE_S * 1e3:.0f} ms (shorter peaks are missed)")
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
    peak.peak_bytes = max(highest, resident_bytes()) - before


def bytes_now(device: torch.device) -> int:
    """Bytes in use. CUDA: what tensors take; CPU: resident memory of the process, freed memory handed back first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    _return_freed_memory()
    return resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process; where /proc is missing, its highest value so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    import resource

    # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _can_reset_kernel_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") > 0
    # not Linux, a kernel without the file, a sandbox that forbids it, or one whose status lacks the field
    except (OSError, StopIteration):
        return False


def _return_freed_memory() -> None:
    """Hands the C library's free pages back to the system, where it can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
