"""The measurement behind `accel demo`: dense and sparse prefill of one small model, quality and time from the same passes.

Every pass is one forward over a task's prompt under one variant, timed and scored at once, so that nobody can pair one run's speed with
another run's quality. The controls get the density that the recipe's method reached on the very same prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import accel
from accel.evals.block_maps import HeadMaps
from accel.evals.latency import LatencyRow, Pass, baselines, quiet_notices, rows_from_passes, timed_pass
from accel.evals.models import LoadedModel
from accel.evals.prompt_cache import last_logits_only
from accel.evals.scoring.single import Scored, score
from accel.evals.tasks import Sample, load_text_task
from accel.protocols import Method, SparseAttention
from accel.registry import build

WARM_UP_TOKENS = 512
# a prompt of twice the length takes 3.0 to 3.5 times as long (smollm2-baseline.md §3)
GROWTH_PER_DOUBLING = 3.3
MAX_ROUNDS = 5
N_CONTROLS = 3

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One prompt. `title`: what its score counts; None where only its time is reported.

    shorter_tokens: the length taken instead where the machine is too slow for `tokens` within the time given. None: never shortened.
    """

    task: str
    tokens: int
    title: str | None
    shorter_tokens: int | None = None


CASES = (Case("needle", 4096, "needles found"), Case("fewshot", 8192, "few-shot labels right", shorter_tokens=4096), Case("needle", 2048, None))


@dataclass
class Measured:
    """One case: passes of every variant in the order of the rounds, the scores of the first round, and what the heads read in it."""

    case: Case
    sample: Sample
    variants: dict[str, list[Method]]
    base: list[str]
    passes: dict[str, list[Pass]] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    maps: dict[str, HeadMaps] = field(default_factory=dict)
    round_s: float = 0.0

    def rows(self) -> list[LatencyRow]:
        """Table rows, baselines first."""
        return rows_from_passes("ttft_ms", self.case.tokens, self.variants, self.base, self.passes, {})


def run_demo(
    loaded: LoadedModel, method: SparseAttention, *, cases: Sequence[Case] = CASES, seed: int, deadline: float, progress: Progress
) -> list[Measured]:
    """Measures every case once, then repeats whole rounds of all variants while they are expected to end before `deadline`.

    method: the one the demo is about. deadline: seconds on the clock of `time.perf_counter`. The first case always runs in full; a later
    one is shortened, never dropped, where its first round is not expected to end in time.
    """
    done: list[Measured] = []
    density: float | None = None
    with torch.no_grad(), quiet_notices():
        for case in (_in_time(case, done, deadline) for case in cases):
            [sample] = load_text_task(case.task).samples(loaded.tokenizer, case.tokens, 1, seed)
            base = baselines(loaded.model)
            measured = Measured(case, sample, {**base, type(method).__name__: [method]}, list(base))
            if not done:
                _warm_up(loaded.model, measured)
            _round(loaded, measured, progress)
            # where the method itself ran dense, the controls do so as well, and their density is only what they would have kept
            density = measured.passes[type(method).__name__][0].density or density or 0.5
            measured.variants |= controls(method, density)
            _round(loaded, measured, progress)
            done.append(measured)
        _further_rounds(loaded, done, deadline, progress)
    return done


def controls(method: SparseAttention, density: float) -> dict[str, list[Method]]:
    """What is shown beside the method: from the same length on, and at its density where they can be set to one."""
    options: Mapping[str, dict[str, Any]] = {"powerattention": {}, "streaming": {"density": density}, "random_blocks": {"density": density}}
    built = [build(name, {"min_seq_len": method.min_seq_len, **own}) for name, own in options.items()]
    return {type(control).__name__: [control] for control in built}


def n_first_passes(model: Any, cases: Sequence[Case] = CASES) -> int:
    """Passes of the rounds that always run, for a progress bar."""
    return len(cases) * (len(baselines(model)) + 1 + N_CONTROLS)


def _round(loaded: LoadedModel, measured: Measured, progress: Progress) -> None:
    """One pass of every variant that has fewer passes than the round asks for, in order."""
    start = time.perf_counter()
    fewest = min(len(measured.passes.get(label, ())) for label in measured.variants)
    for label, methods in measured.variants.items():
        if len(measured.passes.get(label, ())) > fewest:
            continue
        progress(f"{label}, {measured.case.task}, {measured.case.tokens} tokens")
        done, scored, maps = _scored_pass(loaded, measured.sample, methods)
        measured.passes.setdefault(label, []).append(done)
        if label not in measured.scored:
            measured.scored[label], measured.maps[label] = scored, maps
    measured.round_s += time.perf_counter() - start


def _further_rounds(loaded: LoadedModel, done: Sequence[Measured], deadline: float, progress: Progress) -> None:
    """Whole rounds, the case with the fewest first and of these the longest prompt, as long as the next one fits before the deadline."""
    while True:
        behind = [m for m in done if (n := _n_rounds(m)) < MAX_ROUNDS and time.perf_counter() + m.round_s / n < deadline]
        if not behind:
            return
        _round(loaded, min(behind, key=lambda m: (_n_rounds(m), -m.case.tokens)), progress)


def _in_time(case: Case, done: Sequence[Measured], deadline: float) -> Case:
    """The case, shortened where the growth of the first one says that it will not end before the deadline."""
    if not done or case.shorter_tokens is None:
        return case
    first = done[0]
    expected_s = first.round_s * GROWTH_PER_DOUBLING ** math.log2(case.tokens / first.case.tokens)
    return case if time.perf_counter() + expected_s < deadline else replace(case, tokens=case.shorter_tokens)


def _n_rounds(measured: Measured) -> int:
    return min(len(passes) for passes in measured.passes.values())


def _scored_pass(loaded: LoadedModel, sample: Sample, methods: Sequence[Method]) -> tuple[Pass, Scored, HeadMaps]:
    maps = HeadMaps()
    if not methods:
        scored = score(loaded.model, loaded.tokenizer, sample)
        return Pass(scored.prefill_ms / 1e3), scored, maps
    with accel.apply(loaded.model, *methods) as handle, handle.observe(maps.record):
        scored = score(loaded.model, loaded.tokenizer, sample)
        total = handle.stats.total
        done = Pass(scored.prefill_ms / 1e3, total.selection_s, handle.stats.density, total.sparse_calls, dict(total.dense_calls))
    return done, scored, maps


def _warm_up(model: Any, measured: Measured) -> None:
    """First-use costs (probes, compiled primitives, thread pools) on the start of the prompt, sparse on purpose, outside every timing."""
    ids = torch.tensor([measured.sample.input_ids[:WARM_UP_TOKENS]], device=next(iter(model.parameters())).device)
    for methods in measured.variants.values():
        sparse = [replace(m, min_seq_len=0) if isinstance(m, SparseAttention) else m for m in methods]
        timed_pass(model, sparse, lambda: model(input_ids=ids, use_cache=False, **last_logits_only(model)))
