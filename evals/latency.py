"""Time to first token, time per output token and peak memory, with and without methods, in one interleaved run (style.md §10).

Variants run in turn, A B A B, so that a busy or warming machine meets all of them alike; ratios are taken round by round. Every run
holds both dense baselines: the model's own attention, and on a CPU our dense matrix-product path, so that a better dense kernel is
never sold as sparsity (smollm2-baseline.md §4).
"""

from __future__ import annotations

import copy
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import accel
from accel.errors import OptionError
from accel.evals.memory import track_peak
from accel.evals.prompt_cache import branch, cache_argument, filled_cache, last_logits_only
from accel.protocols import KVCompression, Method
from accel.registry import build

Variants = Mapping[str, Sequence[Method]]
Progress = Callable[[str], None]       # told what begins now

OWN_DENSE = "dense (accel)"
# how the reason of a call with too few keys begins (`SparseAttention.why_short`)
SHORT = "shorter than"


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of `n` timings."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
        return cls(statistics.median(values), deciles[1], deciles[7], len(values))


@dataclass(frozen=True)
class Pass:
    """One timed pass of one variant, and what its methods counted."""

    elapsed_s: float
    selection_s: float = 0.0
    density: float | None = None
    sparse_calls: int = 0
    dense_calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyRow:
    """One variant at one length.

    metric: "ttft_ms" or "tpot_ms". tokens: prompt length, or length of the cache after the last step.
    speedup: by baseline label, the median over rounds of baseline time / this time; above 1 is faster than the baseline.
    selection_share: part of the time spent choosing blocks (host clock). density: share of the causal tiles that sparse calls computed,
    None where none was sparse. peak_bytes: growth over the bytes held before, from a warm-up pass; None without one.
    """

    metric: str
    label: str
    methods: list[dict[str, Any]]
    tokens: int
    ms: Spread
    speedup: dict[str, float]
    selection_share: float | None
    density: float | None
    sparse_calls: int
    dense_calls: dict[str, int]
    peak_bytes: int | None
    note: str
    is_baseline: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def stock_label(model: Any) -> str:
    """The name of the stock baseline: "dense (sdpa)", or whichever attention the model was loaded with."""
    return f"dense ({getattr(model.config, '_attn_implementation', None) or 'own'})"


def baselines(model: Any) -> dict[str, list[Method]]:
    """The dense variants that every table holds, by label. Off the CPU the stock attention is the best dense there is, and stands alone."""
    stock: dict[str, list[Method]] = {stock_label(model): []}
    return {**stock, **own_dense(model)}


def own_dense(model: Any) -> dict[str, list[Method]]:
    """Our own dense kernel, where there is one: on a CPU."""
    return {OWN_DENSE: [build("dense", {"dense_kernel": "accel"})]} if _device(model).type == "cpu" else {}


def measure_ttft(
    model: Any,
    input_ids: Tensor,
    variants: Variants,
    *,
    repeats: int = 5,
    warmup: int = 1,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> list[LatencyRow]:
    """Time to first token of each variant, both baselines first: prefill with a fresh cache, logits of the last token only, and its argmax.

    input_ids: (B, L) on the model's device. Selection counts, patching does not. Peak memory is taken in the warm-up passes.
    budget_s: no further round begins once this is used up; one round always runs, and each row says how many did.
    """

    def begin(label: str, methods: Sequence[Method]) -> Callable[[], Pass]:
        return lambda: timed_pass(model, methods, lambda: _prefill(model, input_ids))

    rounds = _Rounds(repeats, warmup, budget_s, progress)
    return _measure("ttft_ms", model, variants, begin, tokens=input_ids.shape[1], rounds=rounds)


def measure_decode(
    model: Any,
    input_ids: Tensor,
    variants: Variants,
    *,
    steps: int = 16,
    repeats: int = 5,
    warmup: int = 1,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> list[LatencyRow]:
    """Time per output token of each variant while the cache grows to `input_ids.shape[1]` over the last `steps` tokens, fed one by one.

    The model's own attention fills the cache once, before any timing; every variant then starts from that same cache, those that drop cache entries
    from what they left of it themselves.
    """
    n_filled = input_ids.shape[1] - steps
    if n_filled < 1:
        raise OptionError(f"decode over {steps} steps needs more than {steps} tokens, got {input_ids.shape[1]}")
    with torch.no_grad(), quiet_notices():
        stock = filled_cache(model, input_ids[:, :n_filled], [])
        own = {
            label: filled_cache(model, input_ids[:, :n_filled], methods)
            for label, methods in variants.items()
            if any(isinstance(m, KVCompression) for m in methods)
        }

    def decode(cache: Any) -> None:
        for i in range(n_filled, input_ids.shape[1]):
            out = model(input_ids=input_ids[:, i : i + 1], use_cache=True, **{cache_argument(model): cache})
            out.logits[:, -1].argmax(-1).tolist()

    def begin(label: str, methods: Sequence[Method]) -> Callable[[], Pass]:
        # what has lost entries cannot be cut back; a copy lies outside the clock
        ready = ExitStack()
        cache = copy.deepcopy(own[label]) if label in own else ready.enter_context(branch(stock, n_filled))

        def one_pass() -> Pass:
            with ready:
                return timed_pass(model, methods, lambda: decode(cache), units=steps)

        return one_pass

    rounds = _Rounds(repeats, warmup, budget_s, progress)
    rows = _measure("tpot_ms", model, variants, begin, tokens=input_ids.shape[1], rounds=rounds)
    return [replace(row, note=row.note or _evictions(variants[row.label], steps)) if row.label in own else row for row in rows]


def _evictions(methods: Sequence[Method], steps: int) -> str:
    """How often the cache lost entries while it was timed; a reader must know whether that is in the time."""
    every = [when.every for m in methods if isinstance(m, KVCompression) for when in m.when if when.moment == "every_n_steps" and when.every]
    if not every:
        return ""
    return f"no eviction in {steps} steps, one comes every {min(every)}" if steps < min(every) else f"evicts every {min(every)} steps"


def rows_from_passes(
    metric: str, tokens: int, variants: Variants, base: Sequence[str], passes: Mapping[str, Sequence[Pass]], peaks: Mapping[str, int | None]
) -> list[LatencyRow]:
    """The table's rows, from the passes of each variant in the order of the rounds. `base`: the labels of the dense baselines."""
    rows = []
    for label, methods in variants.items():
        mine = passes[label]
        last = mine[-1]
        rows.append(
            LatencyRow(
                metric=metric,
                label=label,
                methods=[{"method": m.method_name(), **m.options()} for m in methods],
                tokens=tokens,
                ms=Spread.of([p.elapsed_s * 1e3 for p in mine]),
                speedup={b: statistics.median(d.elapsed_s / p.elapsed_s for d, p in zip(passes[b], mine, strict=True)) for b in base},
                selection_share=statistics.median(p.selection_s / p.elapsed_s for p in mine) if last.sparse_calls else None,
                density=last.density,
                sparse_calls=last.sparse_calls,
                dense_calls=last.dense_calls,
                peak_bytes=peaks.get(label),
                note="baseline" if label in base else dense_note(last),
                is_baseline=label in base,
            )
        )
    return rows


def dense_note(done: Pass) -> str:
    """What a reader must know of the calls that ran dense; empty where none did."""
    n_dense = sum(done.dense_calls.values())
    if not n_dense:
        return ""
    # layers that are always dense say nothing about why the others were
    reason = max(done.dense_calls, key=lambda r: (r != "dense layer", r.startswith(SHORT), done.dense_calls[r]))
    if not done.sparse_calls:
        return f"dense: {reason}"
    return f"{n_dense} of {n_dense + done.sparse_calls} calls dense ({reason})"


def describe_method(method: Method) -> str:
    """The method's name with the options that differ from their defaults, short enough for a table."""
    options = ", ".join(f"{name}={value}" for name, value in method.changed_options().items())
    return f"{method.method_name()}({options})" if options else method.method_name()


def memory_note(model: Any) -> str:
    """How peak memory is measured on this model's device, in one line."""
    with track_peak(_device(model)) as peak:
        pass
    return peak.how


def count_passes(model: Any, variants: Variants, *, repeats: int, warmup: int) -> int:
    """Passes that one length takes at most, for a progress bar."""
    return len({**baselines(model), **variants}) * (repeats + warmup)


def timed_pass(model: Any, methods: Sequence[Method], call: Callable[[], object], *, units: int = 1) -> Pass:
    """One timed `call` with the methods on, per unit; patching and unpatching lie outside the clock, the device is synchronised."""
    if not methods:
        return Pass(_seconds(model, call) / units)
    with accel.apply(model, *methods) as handle:
        elapsed_s = _seconds(model, call) / units
        total = handle.stats.total
        return Pass(elapsed_s, total.selection_s / units, handle.stats.density, total.sparse_calls, dict(total.dense_calls))


@contextmanager
def quiet_notices() -> Iterator[None]:
    """Keeps the one-line notices of methods from being repeated at every pass; the command line prints them once."""
    logger = logging.getLogger("accel")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Rounds:
    repeats: int
    warmup: int
    budget_s: float | None
    progress: Progress | None

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmup < 0:
            raise OptionError(f"repeats must be at least 1 and warmup at least 0, got {self.repeats} and {self.warmup}")


def _measure(
    metric: str, model: Any, variants: Variants, begin: Callable[[str, Sequence[Method]], Callable[[], Pass]], *, tokens: int, rounds: _Rounds
) -> list[LatencyRow]:
    """begin(label, methods) → one pass, made ready outside the clock and the watch on memory."""
    base = baselines(model)
    if clash := set(base) & set(variants):
        raise OptionError(f"the labels {', '.join(sorted(clash))} belong to the dense baselines, which every run holds")
    everything = {**base, **variants}
    passes: dict[str, list[Pass]] = {label: [] for label in everything}
    peaks: dict[str, int | None] = {}
    start = time.perf_counter()
    with torch.no_grad(), quiet_notices():
        for i_round in range(rounds.warmup + rounds.repeats):
            if i_round > rounds.warmup and rounds.budget_s is not None and time.perf_counter() - start > rounds.budget_s:
                break
            # between rounds, so that no variant pays for what the others left behind
            gc.collect()
            for label, methods in everything.items():
                if rounds.progress:
                    rounds.progress(f"{label}, {tokens} tokens")
                one_pass = begin(label, methods)
                if i_round < rounds.warmup:
                    with track_peak(_device(model)) as peak:
                        one_pass()
                    peaks[label] = max(peaks.get(label) or 0, peak.peak_bytes or 0)
                else:
                    passes[label].append(one_pass())
    return rows_from_passes(metric, tokens, everything, list(base), passes, peaks)


def _seconds(model: Any, call: Callable[[], object]) -> float:
    _synchronize(model)
    start = time.perf_counter()
    call()
    _synchronize(model)
    return time.perf_counter() - start


def _prefill(model: Any, input_ids: Tensor) -> None:
    out = model(input_ids=input_ids, use_cache=True, **last_logits_only(model))
    # the token itself, on the host: that is when a user sees it
    out.logits[:, -1].argmax(-1).tolist()


def _device(model: Any) -> torch.device:
    device: torch.device = next(iter(model.parameters())).device
    return device


def _synchronize(model: Any) -> None:
    if _device(model).type == "cuda":
        torch.cuda.synchronize(_device(model))
