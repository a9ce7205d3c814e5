"""The measurement behind `accel demo`: dense and sparse prefill of one small model, quality and time from the same passes.

Every pass is one forward over a task's prompt under one variant, timed and scored at once, so that nobody can pair one run's speed with
another run's quality. The controls get the density that the recipe's method reached on the very same prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import accel
from accel.evals.block_maps import HeadMaps
from accel.evals.latency import LatencyRow, Pass, baselines, quiet_notices, rows_from_passes
from accel.evals.models import LoadedModel
from accel.evals.scoring import Scored, score
from accel.evals.tasks import Sample, load_task
from accel.kernels.block_sparse.plan import ImplicitPlan
from accel.kernels.block_sparse.ragged import Ragged
from accel.protocols import Method, SparseAttention
from accel.registry import build

WARM_UP_TOKENS = 512
MAX_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One prompt: what is asked and how long it is. `is_scored`: whether its answers are reported, or only its time."""

    task: str
    tokens: int
    title: str
    is_scored: bool = True


CASES = (
    Case("needle", 4096, "needles"),
    Case("fewshot", 8192, "few-shot labels"),
    Case("needle", 2048, "time below the crossover", is_scored=False),
)


@dataclass
class Measured:
    """Everything measured on one case: passes in the order of the rounds, the scores of the first, and what the heads read in it."""

    case: Case
    sample: Sample
    variants: dict[str, list[Method]]
    base: list[str]
    passes: dict[str, list[Pass]] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    maps: dict[str, HeadMaps] = field(default_factory=dict)
    round_s: float = 0.0

    def rows(self) -> list[LatencyRow]:
        return rows_from_passes("ttft_ms", self.case.tokens, self.variants, self.base, self.passes, {})


def run_demo(
    loaded: LoadedModel, recipe: Sequence[Method], *, cases: Sequence[Case] = CASES, seed: int, deadline: float, progress: Callable[[str], None]
) -> list[Measured]:
    """Measures every case once, then repeats whole rounds of all variants while they are expected to end before `deadline`.

    recipe: the methods the demo is about; the first must be sparse attention. deadline: in seconds of `time.perf_counter`.
    """
    with torch.no_grad(), quiet_notices():
        first = _first_case(loaded, recipe, cases[0], seed=seed, progress=progress)
        done = [first]
        for case in cases[1:]:
            done.append(_first_round(loaded, recipe, case, seed=seed, fallback=first.passes[_label(recipe)][0].density, progress=progress))
        _further_rounds(loaded, done, deadline, progress)
    return done


def n_first_passes(model: Any, cases: Sequence[Case] = CASES) -> int:
    """Passes of the rounds that always run, for a progress bar."""
    return len(cases) * (len(baselines(model)) + 4)


def controls(reference: SparseAttention, density: float, tokens: int) -> dict[str, list[Method]]:
    """The methods shown beside the recipe's, at its density where they can be set to one, and sparse from the same length on."""
    shared = {"min_seq_len": reference.min_seq_len}
    window = window_blocks_at(density, tokens, reference_block(reference))
    options: dict[str, dict[str, Any]] = {
        "powerattention": {},
        "streaming": {"window_blocks": window},
        "random_blocks": {"density": density},
    }
    return {type(m).__name__: [m] for m in (build(name, {**shared, **own}) for name, own in options.items())}


def reference_block(method: SparseAttention) -> int:
    """Tokens per block of the recipe's method."""
    return getattr(method, "block_size", None) or 128


def window_blocks_at(density: float, tokens: int, block_size: int) -> int:
    """Window, in blocks, with which one sink block and a window come nearest to `density` of a prompt's causal tiles."""
    lens = Ragged.of([tokens], [tokens])

    def reached(window: int) -> float:
        return ImplicitPlan(block_size, window_blocks=window, sink_blocks=1, powers=False).density(lens, 1)

    return min(range(1, math.ceil(tokens / block_size) + 1), key=lambda window: abs(reached(window) - density))
