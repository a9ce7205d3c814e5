"""Runs tasks on one model under several methods, saving every sample as it finishes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import accel
from accel.errors import AccelError, OptionError
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedModel
from accel.evals.results import RunFolder, SampleKey, SampleRecord
from accel.evals.scoring import score
from accel.evals.summary import BASELINE, summarise
from accel.evals.tasks import Sample, load_task
from accel.protocols import Method, SparseAttention
from accel.registry import build, method_class

if TYPE_CHECKING:
    from accel.handle import Handle

# what a control shares with the method it is compared to, apart from the density
_SHARED = ("block_size", "min_seq_len", "dense_layers", "dense_kernel", "precision")


@dataclass(frozen=True)
class Block:
    """Samples of one task and length, measured under one method (label)."""

    task: str
    tokens: int
    label: str


def run_accuracy(
    loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], *, n: int, seed: int,
    folder: RunFolder, controls: Sequence[str] = (), limit: int | None = None, progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Table rows (summary.py) of dense attention, the methods by label, and the controls, on the same n prompts per task and length.

    controls: names of methods with a `density` option; each runs on every prompt at the density that the first sparse method reached on it.
    limit: stops after so many new samples. Samples already in `folder` are not run again. Batch 1; each method is taken off again.
    """
    _check(loaded, methods, tasks, lengths, n, controls)
    labels = [BASELINE, *methods, *(control_label(name) for name in controls)]
    blocks = [Block(task, tokens, label) for task in tasks for tokens in lengths for label in labels]
    wanted = [SampleKey(block.task, block.label, block.tokens, i) for block in blocks for i in range(n)]
    missing = [key for key in wanted if key not in folder.done()]
    with _bar(min(len(missing), len(missing) if limit is None else limit), progress) as bar, quiet_notices():
        prompts: dict[tuple[str, int], list[Sample]] = {}
        for key in missing[:limit]:
            place = (key.task, key.tokens)
            if place not in prompts:
                prompts = {place: load_task(key.task).samples(loaded.tokenizer, key.tokens, n, seed)}
            bar.set_description(f"{key.task} {key.tokens} {key.label}")
            applied = _methods_for(key, methods, controls, folder)
            sample = prompts[place][key.sample]
            _require_same_prompt(folder, key, sample)
            folder.append(_measure(loaded, key, sample, applied))
            bar.update()
    return rows_of(folder, wanted)


def reference_label(methods: Mapping[str, Sequence[Method]]) -> str | None:
    """Label of the variant whose density the controls get: the first with a sparse-attention method."""
    return next((label for label, group in methods.items() if any(isinstance(m, SparseAttention) for m in group)), None)


def control_label(name: str) -> str:
    return f"{name} (same density)"


def rows_of(folder: RunFolder, wanted: Sequence[SampleKey]) -> list[dict[str, Any]]:
    """Rows of the finished samples among `wanted`, in that order."""
    groups: dict[Block, list[SampleRecord]] = {}
    for key in wanted:
        record = folder.get(key)
        if record is not None:
            groups.setdefault(Block(key.task, key.tokens, key.label), []).append(record)
    return [summarise(records, load_task(block.task).metric) for block, records in groups.items()]


def _check(
    loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], n: int, controls: Sequence[str]
) -> None:
    """Everything that can be known before the first prompt, so that a long run does not fail in the middle."""
    for task in tasks:
        load_task(task)
    if n < 1:
        raise OptionError(f"the number of samples must be at least 1, got {n}")
    if BASELINE in methods:
        raise OptionError(f"the label {BASELINE!r} is that of the unpatched model, which always runs")
    most = loaded.max_positions
    too_long = [length for length in lengths if most is not None and length > most]
    if too_long:
        raise OptionError(f"{loaded.name} holds {most} tokens, asked for prompts of {', '.join(map(str, too_long))}")
    if controls and reference_label(methods) is None:
        raise OptionError(f"the controls {', '.join(controls)} run at the density of a sparse-attention method: name one")
    for name in controls:
        if "density" not in {f.name for f in fields(method_class(name))}:
            raise OptionError(f"{name} has no option 'density', so it cannot be a control at equal density")


def _require_same_prompt(folder: RunFolder, key: SampleKey, sample: Sample) -> None:
    """Raises where a resumed run would compare methods on different prompts: their text comes from Python's own library."""
    for done in folder.records:
        if (done.task, done.tokens, done.sample) == (key.task, key.tokens, key.sample) and done.prompt_hash != sample.prompt_hash:
            raise AccelError(
                f"prompt {key.sample} of {key.task} at {key.tokens} tokens is not the one that {folder.path} was begun with: "
                "resume it with the same Python, tokenizer and version of accel, or start a new run"
            )


def _methods_for(key: SampleKey, methods: Mapping[str, Sequence[Method]], controls: Sequence[str], folder: RunFolder) -> Sequence[Method]:
    """What is applied for one sample: nothing for dense, the methods of its label, or a control at the density reached on this very prompt."""
    if key.label == BASELINE:
        return ()
    if key.label in methods:
        return methods[key.label]
    name = next(name for name in controls if control_label(name) == key.label)
    reference = reference_label(methods)
    assert reference is not None
    found = folder.get(key._replace(label=reference))
    if found is None:
        raise AccelError(f"{key.label} needs the density of {reference} on {key.task} at {key.tokens} tokens, prompt {key.sample}, which was not run")
    sparse = next(m for m in methods[reference] if isinstance(m, SparseAttention))
    if found.density is None:
        # where the reference ran dense throughout, so does its control
        return [_control(name, sparse, density=1.0, seed=key.sample)]
    # whatever length its own crossover names, a control of a sparse run runs sparse
    return [replace(_control(name, sparse, density=found.density, seed=key.sample), min_seq_len=0)]


def _control(name: str, reference: SparseAttention, *, density: float, seed: int) -> SparseAttention:
    """The control that differs from `reference` in what it reads only. seed: where it draws, a draw of its own for every prompt."""
    known = {f.name for f in fields(method_class(name))}
    shared = {option: value for option, value in reference.options().items() if option in _SHARED and option in known and value is not None}
    control = build(name, {**shared, "density": density, **({"seed": seed} if "seed" in known else {})})
    assert isinstance(control, SparseAttention)
    return control


def _measure(loaded: LoadedModel, key: SampleKey, sample: Sample, methods: Sequence[Method]) -> SampleRecord:
    """Scores one sample with the methods on; the counters are read when the prompt is through, so that decoding does not dilute them."""
    prefill: dict[str, Any] = {"density": None, "sparse_calls": 0, "dense_calls": {}, "selection_s": None}
    with accel.apply(loaded.model, *methods) if methods else nullcontext() as handle:
        scored = score(loaded.model, loaded.tokenizer, sample, on_prefill=lambda: prefill.update(_counters(handle)))
    if not all(math.isfinite(p) for p in scored.log_probs):
        raise AccelError(f"{key.label} gives log-probabilities that are not finite on {key.task} at {key.tokens} tokens, prompt {key.sample}")
    selection_s = prefill.pop("selection_s")
    return SampleRecord(
        task=key.task, label=key.label, options=[{m.method_name(): m.changed_options()} for m in methods], tokens=key.tokens, sample=key.sample,
        seed=sample.seed, n_tokens=sample.n_prompt or len(sample.input_ids), prompt_hash=sample.prompt_hash,
        log_prob=statistics.fmean(scored.log_probs), exact=statistics.fmean(scored.hits), log_probs=scored.log_probs, hits=scored.hits,
        questions=[a.question for a in sample.answers], expected=[a.text for a in sample.answers], answers=scored.texts,
        prefill_ms=scored.prefill_ms, selection_ms=None if selection_s is None else selection_s * 1e3, **prefill,
    )  # fmt: skip


def _counters(handle: Handle | None) -> dict[str, Any]:
    if handle is None:
        return {}
    counted = handle.stats.as_dict()
    return {name: counted[name] for name in ("density", "sparse_calls", "dense_calls", "selection_s")}


@contextmanager
def _bar(total: int, is_shown: bool) -> Iterator[Any]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(total=total, unit="sample", disable=not is_shown, dynamic_ncols=True) as bar:
        yield bar
