"""The length from which a sparse method pays on this machine: measured by `accel tune crossover`, read by every method."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accel.protocols import AttentionStep, SparseAttention

# Where nothing was measured: on CPUs 4K is break-even with a small trained model (smollm2-baseline.md §4), on GPUs 16K (sparse-attention.md §2.2).
DEFAULT_TOKENS = {"cpu": 4096, "cuda": 16384}


def crossover_file() -> Path:
    """Where measured crossovers live; `ACCEL_CACHE` overrides the folder."""
    folder = os.environ.get("ACCEL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accel"
    return Path(folder) / "crossover.json"


def crossover_key(method_name: str, *, device: str, dtype: str, head_dim: int) -> str:
    return f"{method_name}/{device}/{dtype}/d{head_dim}"


@cache
def measured_crossovers() -> dict[str, int]:
    """This machine's measured crossovers by `crossover_key`; empty when none was measured."""
    path = crossover_file()
    return {key: int(value) for key, value in json.loads(path.read_text()).items()} if path.exists() else {}


def record_crossover(key: str, tokens: int) -> Path:
    """Writes one measured crossover beside the others, and returns the file."""
    path = crossover_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**measured_crossovers(), key: tokens}, indent=2, sort_keys=True) + "\n")
    measured_crossovers.cache_clear()
    return path


def crossover_tokens(method: SparseAttention, step: AttentionStep) -> int:
    """Keys from which `method` is expected to beat dense attention here: measured, or else a cautious default."""
    key = crossover_key(method.method_name(), device=step.device, dtype=step.dtype, head_dim=step.head_dim)
    return measured_crossovers().get(key, DEFAULT_TOKENS.get(step.device, DEFAULT_TOKENS["cuda"]))
