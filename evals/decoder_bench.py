"""What a prompt's cache takes of memory: its bytes beside those that budgets predict, and the process's peak with whole and with chunked prefill."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import accel
from accel.errors import OptionError
from accel.evals.decoder_cache import predicted_bytes, whole_cache_bytes
from accel.evals.latency import Progress, Variants, baselines, quiet_notices
from accel.evals.memory import bytes_now, track_peak
from accel.evals.prompt_cache import read_prompt
from accel.patching import host_for
from accel.protocols import Method

CHUNK = 512


@dataclass(frozen=True)
class CacheRow:
    """One variant behind one prompt of so many tokens.

    held_bytes: what its cache holds, by the tensors; predicted_bytes: what its budgets say (decoder_cache.py); whole_bytes: keys and values of all
    tokens. left_bytes: growth of the memory in use once the prompt is read and the cache is all that is left of it. peak_bytes: growth at the peak,
    the prompt in one pass; chunked_peak_bytes, chunked_held_bytes: in passes of `chunk` tokens, behind each of which entries may leave. Memory as
    medians over `n` rounds.
    """

    label: str
    methods: list[dict[str, Any]]
    tokens: int
    held_bytes: int
    predicted_bytes: int
    whole_bytes: int
    left_bytes: int
    peak_bytes: int
    chunk: int
    chunked_peak_bytes: int
    chunked_held_bytes: int
    n: int
    is_baseline: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Reading:
    held: int
    left: int
    peak: int


def measure_cache(
    model: Any, input_ids: Tensor, variants: Variants, *, repeats: int = 3, chunk: int = CHUNK, progress: Progress | None = None
) -> list[CacheRow]:
    """One row per variant, both dense baselines first; they take turns in every round. input_ids: (B, L) on the model's device."""
    if repeats < 1 or chunk < 1:
        raise OptionError(f"repeats and chunk must be at least 1, got {repeats} and {chunk}")
    base = baselines(model)
    everything = {**base, **variants}
    n_tokens, info, itemsize = input_ids.shape[1], host_for(model).describe(model), model.dtype.itemsize
    whole: dict[str, list[_Reading]] = {label: [] for label in everything}
    chunked: dict[str, list[_Reading]] = {label: [] for label in everything}
    with torch.no_grad(), quiet_notices():
        for _ in range(repeats):
            for label, methods in everything.items():
                if progress:
                    progress(f"{label}, {n_tokens} tokens, memory")
                whole[label].append(_read(model, methods, input_ids, None))
                chunked[label].append(_read(model, methods, input_ids, chunk))
    sizes = {"itemsize": itemsize, "batch": input_ids.shape[0]}
    return [
        CacheRow(
            label=label, methods=[{"method": m.method_name(), **m.options()} for m in methods], tokens=n_tokens, held_bytes=whole[label][-1].held,
            predicted_bytes=predicted_bytes(methods, info, n_tokens, **sizes), whole_bytes=whole_cache_bytes(info, n_tokens, **sizes),
            left_bytes=_median(whole[label], lambda r: r.left), peak_bytes=_median(whole[label], lambda r: r.peak), chunk=chunk,
            chunked_peak_bytes=_median(chunked[label], lambda r: r.peak), chunked_held_bytes=chunked[label][-1].held, n=repeats,
            is_baseline=label in base,
        )
        for label, methods in everything.items()
    ]  # fmt: skip


def _read(model: Any, methods: Sequence[Method], input_ids: Tensor, chunk: int | None) -> _Reading:
    """One prompt read anew."""
    device = next(iter(model.parameters())).device
    with accel.apply(model, *methods) if methods else nullcontext() as handle:
        before = bytes_now(device)
        with track_peak(device) as peak:
            cache = read_prompt(model, input_ids, chunk=chunk)
        left = bytes_now(device) - before
        held = {} if handle is None else handle.stats.cache.held_by_layer
        return _Reading(sum(held.values()) or _tensor_bytes(cache), max(0, left), peak.peak_bytes or 0)


def _tensor_bytes(cache: Any) -> int:
    """Keys and values of a stock cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _median(readings: Sequence[_Reading], which: Callable[[_Reading], int]) -> int:
    return round(statistics.median(which(reading) for reading in readings))
