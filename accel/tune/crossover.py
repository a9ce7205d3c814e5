"""Measures the length from which a sparse method pays on this machine, and writes it into a recipe. `accel.crossover` keeps the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accel.crossover import NEVER_TOKENS
from accel.errors import OptionError, UnsupportedError
from accel.patching import host_for
from accel.protocols import SparseAttention
from accel.recipe import Recipe
from accel.tune.search import progress_bar


@dataclass(frozen=True)
class LengthTimes:
    """Time to first token at one length, from one interleaved run.

    speedup: by dense baseline, median over rounds of its time / the method's. sparse_calls: 0 where the method ran dense after all; `note`
    says why.
    """

    tokens: int
    ms: Mapping[str, float]
    speedup: Mapping[str, float]
    sparse_calls: int
    note: str = ""

    @property
    def against_best_dense(self) -> float:
        return min(self.speedup.values())


def measure_crossover(
    model: Any,
    input_ids: Any,
    method: SparseAttention,
    lengths: Sequence[int],
    *,
    repeats: int = 5,
    show_progress: bool = True,
) -> list[LengthTimes]:
    """Time to first token of `method`, sparse from the first token on, against every dense baseline, at rising lengths.

    input_ids: (1, at least the longest length), real text: what is selected, and so the time, depends on it.
    Raises UnsupportedError where the method runs dense at every length: there is nothing to compare then.
    """
    from accel.evals.latency import count_passes, measure_ttft

    if not isinstance(method, SparseAttention):
        raise OptionError(f"a crossover is measured for sparse attention; {method.method_name()} is of kind {method.kind}")
    ordered = sorted(set(lengths))
    if not ordered or ordered[0] < 1 or ordered[-1] > input_ids.shape[1]:
        raise OptionError(f"lengths must lie between 1 and {input_ids.shape[1]} tokens, the length of the text; got {list(lengths)}")
    label = method.method_name()
    sparse = replace(method, min_seq_len=0)
    # what shapes and options decide alone is told before anything is timed
    if (why := sparse.why_always_dense(host_for(model).describe(model), ordered[-1])) is not None:
        raise UnsupportedError(f"{label} runs dense at every length up to {ordered[-1]} tokens ({why}): ask for longer ones, or change its options")
    variants = {label: [sparse]}
    times = []
    n_passes = len(ordered) * count_passes(model, variants, repeats=repeats, warmup=1)
    with progress_bar(n_passes, "crossover", is_shown=show_progress) as advance:
        for n in ordered:
            rows = measure_ttft(model, input_ids[:, :n], variants, repeats=repeats, progress=advance)
            mine = next(row for row in rows if row.label == label)
            times.append(LengthTimes(n, {row.label: row.ms.median for row in rows}, mine.speedup, mine.sparse_calls, mine.note))
    if not any(row.sparse_calls for row in times):
        raise UnsupportedError(f"{label} ran dense at every length:", [f"{row.tokens} tokens: {row.note}" for row in times])
    return times


def find_crossover(times: Sequence[LengthTimes], *, margin: float = 0.02) -> int | None:
    """The smallest measured length from which the method stays faster than the best dense baseline; None where it never does.

    margin: share by which it must be faster, so that noise around break-even is no gain.
    """
    found = None
    for row in sorted(times, key=lambda row: row.tokens, reverse=True):
        if not row.sparse_calls or not all(ratio >= 1 + margin for ratio in row.speedup.values()):
            break
        found = row.tokens
    return found


def crossover_recipe(method: SparseAttention, times: Sequence[LengthTimes], *, where: str) -> Recipe:
    """The recipe that runs `method` from its measured crossover on; a method that never pays is kept dense, and the note says so.

    where: model, device and dtype of the measurement, for the note.
    """
    tokens = find_crossover(times)
    longest = max(row.tokens for row in times)
    if tokens is None:
        note = f"accel tune crossover: never faster than the best dense attention up to {longest} tokens ({where}); kept dense"
    else:
        span = f"at {tokens} tokens, the longest measured" if tokens == longest else f"from {tokens} to {longest} tokens"
        note = f"accel tune crossover: faster than the best dense attention {span} ({where})"
    return Recipe.of(replace(method, min_seq_len=NEVER_TOKENS if tokens is None else tokens), note=note)
