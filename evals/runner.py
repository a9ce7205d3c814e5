"""Runs tasks on one model under several methods, saving every sample as it finishes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.controls import Control, build_control, plan_controls
from accel.evals.decoder_cache import is_compressing
from accel.evals.drawing.album import Album
from accel.evals.drawing.judged import image_model
from accel.evals.latency import quiet_notices
from accel.evals.measuring import AnySample, Measurer, model_info, place
from accel.evals.models import LoadedModel
from accel.evals.parallel import Team
from accel.evals.pictures.questions import vision_model
from accel.evals.results import RunFolder, SampleKey, SampleRecord
from accel.evals.scoring.batched import require_padding
from accel.evals.summary.scores import BASELINE, summarise
from accel.evals.tasks import Task, load_task
from accel.protocols import Method

__all__ = ["Block", "check_run", "head_rows", "model_info", "require_kinds", "require_samples", "rows_of", "run_accuracy", "wanted_samples"]


@dataclass(frozen=True)
class Block:
    """Samples of one task and length, measured under one method (label)."""

    task: str
    tokens: int
    label: str


def run_accuracy(
    loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], *, n: int, seed: int,
    folder: RunFolder, controls: Sequence[str] = (), limit: int | None = None, progress: bool = True, shares_prefill: bool = False,
    batch_size: int = 1, warmup: int = 0, team: Team | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Table rows (summary/scores.py) of dense attention, the methods by label, and the controls, on the same n samples per task and length.

    lengths: of text prompts; tasks about pictures have none. controls: names of methods that run beside the others at the same budget (controls.py).
    limit: stops after so many new samples. Samples already in `folder` are not run again. Each method is taken off again. shares_prefill: dense and
    methods that drop cache entries go on from one unpatched prefill of each text prompt, where they can (scoring/cached.py). batch_size: text prompts
    read together (scoring/batched.py). warmup: untimed passes before the first sample of each label, length and kind.
    team: the processes among which the prompts are shared out; this one measures its own, and the rows are those of what its `folder` holds.
    """
    team = team or Team()
    check_run(loaded, methods, tasks, lengths, n, controls=controls, batch_size=batch_size)
    planned = plan_controls(controls, methods, model_info(loaded))
    wanted = wanted_samples(methods, tasks, lengths, n=n, controls=planned, batch_size=batch_size)
    done = folder.done()
    missing = set([key for key in wanted if key not in done][:limit])
    mine = team.share(_units(wanted, missing, batch_size))
    measurer = Measurer(
        loaded, Album(folder.path), any(map(is_compressing, methods.values())), shares_prefill, warmup=warmup,
        # of equal label and length, the first: later ones would overwrite it
        peaks_at={(key.label, key.tokens): key for key in reversed(wanted)},
    )  # fmt: skip
    with _bar(sum(len(missing.intersection(batch)) for unit in mine for batch in unit), progress and team.is_main) as bar, quiet_notices():
        prompts: dict[tuple[str, int], Sequence[AnySample]] = {}
        for batch in (batch for unit in mine for batch in unit):
            key = batch[0]
            if (key.task, key.tokens) not in prompts:
                prompts = {(key.task, key.tokens): _samples(loaded, key, n, seed)}
                _require_same_prompts(folder, key, prompts[key.task, key.tokens])
            bar.set_description(" ".join(part for part in (key.task, str(key.tokens or ""), key.label) if part))
            samples = [prompts[key.task, key.tokens][k.sample] for k in batch]
            for record in measurer.measure(batch, samples, _methods_for(key, methods, planned, folder)):
                if record.key in missing:
                    folder.append(record)
                    bar.update()
    return rows_of(folder, wanted)


def wanted_samples(
    methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], *, n: int, controls: Sequence[Control] = (),
    batch_size: int = 1,
) -> list[SampleKey]:  # fmt: skip
    """Every sample of a run, in the order in which they are measured: prompt by prompt, or batch of prompts by batch, so that a run that is stopped
    has the same ones of all labels; a control after what it is compared to.
    """
    labels = [BASELINE, *methods, *(control.label for control in controls)]
    return [
        SampleKey(task, label, tokens, i)
        for task in tasks
        for tokens in (lengths if load_task(task).kind == "text" else (0,))
        for first in range(0, n, batch_size)
        for label in labels
        for i in range(first, min(first + batch_size, n))
    ]


def _units(wanted: Sequence[SampleKey], missing: Collection[SampleKey], batch_size: int) -> list[list[list[SampleKey]]]:
    """The work: by prompt, or by prompts that are read together, the batch of each label that has a missing sample.

    A batch is whole even where only one of its samples is missing: a smaller one would be rounded otherwise, and a resumed run differ from one that
    never stopped. All labels of a prompt stay together, since a control needs what its reference did.
    """
    units: dict[tuple[str, int, int], dict[str, list[SampleKey]]] = {}
    for key in wanted:
        units.setdefault((key.task, key.tokens, key.sample // batch_size), {}).setdefault(key.label, []).append(key)
    found = [[batch for batch in by_label.values() if any(key in missing for key in batch)] for by_label in units.values()]
    return [unit for unit in found if unit]


def head_rows(loaded: LoadedModel, methods: Mapping[str, Sequence[Method]]) -> list[dict[str, Any]]:
    """What the methods (by label) know of the model's heads: the fields of `HeadNumbers`, and the label."""
    info = model_info(loaded)
    return [{"label": label, **asdict(numbers)} for label, group in methods.items() for m in group for numbers in m.bind(info).head_numbers(info)]


def rows_of(folder: RunFolder, wanted: Sequence[SampleKey]) -> list[dict[str, Any]]:
    """Rows of the finished samples among `wanted`, in that order."""
    groups: dict[Block, list[SampleRecord]] = {}
    for key in wanted:
        record = folder.get(key)
        if record is not None:
            groups.setdefault(Block(key.task, key.tokens, key.label), []).append(record)
    return [summarise(records, load_task(block.task).metric) for block, records in groups.items()]


def require_kinds(name: str, reads: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises OptionError where the model of that name cannot be given the samples of one of the tasks. reads: the kinds that it can be given."""
    asked = {kind: ", ".join(task for task in tasks if load_task(task).kind == kind) for kind in ("text", "picture", "class")}
    if asked["picture"] and "picture" not in reads:
        raise OptionError(f"{name} cannot be asked about pictures (tasks: {asked['picture']}). small-vlm can, with --model small-vlm")
    if asked["class"] and "class" not in reads:
        raise OptionError(f"{name} draws no pictures of classes, as {asked['class']} ask for. small-var does, with --model small-var")
    if asked["text"] and "text" not in reads:
        instead = "knows only questions about pictures, asked for the text tasks {}: try --tasks scenes"
        if "picture" not in reads:
            instead = "draws pictures and reads no text, asked for the text tasks {}"
        raise OptionError(f"{name} {instead.format(asked['text'])}")


def check_run(
    loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], n: int, *,
    controls: Sequence[str] = (), batch_size: int = 1,
) -> None:  # fmt: skip
    """Everything that can be known before the first prompt is made, so that a long run does not fail in the middle."""
    if n < 1 or batch_size < 1:
        raise OptionError(f"the number of samples and the batch size must be at least 1, got {n} and {batch_size}")
    require_batches(methods, tasks, controls, batch_size)
    if BASELINE in methods:
        raise OptionError(f"the label {BASELINE!r} is that of the unpatched model, which always runs")
    kinds = {load_task(task).kind for task in tasks}
    if "picture" in kinds:
        vision_model(loaded)
    require_kinds(loaded.name, loaded.reads, tasks)
    if "class" in kinds and image_model(loaded).judge is None:
        raise OptionError(
            f"nothing here can judge what {loaded.name} draws: `accel draw` makes folders for the public scripts, and small-var has a judge"
        )
    most = loaded.max_positions
    too_long = [length for length in lengths if most is not None and length > most]
    if too_long and "text" in kinds:
        raise OptionError(f"{loaded.name} holds {most} tokens, asked for prompts of {', '.join(map(str, too_long))}")
    if batch_size > 1:
        require_padding(loaded.model, loaded.name)


def require_samples(loaded: LoadedModel, tasks: Sequence[str], lengths: Sequence[int], n: int, seed: int) -> None:
    """Raises OptionError, with all of them, where text tasks have no prompts of such a length, or fewer than n; ask before the first is measured.

    One prompt of each length is made; of tasks that have only so many, all that were asked for.
    """
    found: dict[str, None] = {}
    for task in (task for name in tasks if isinstance(task := load_task(name), Task)):
        for tokens in lengths:
            try:
                task.samples(loaded.tokenizer, tokens, 1 if task.most_samples is None else n, seed)
            except OptionError as error:
                # too few samples are so at every length
                found[str(error)] = None
    if len(found) > 1:
        raise OptionError("\n  - ".join(["some prompts of this run cannot be made:", *found]))
    if found:
        raise OptionError(next(iter(found)))


def require_batches(methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], controls: Sequence[str], batch_size: int) -> None:
    """Raises UnsupportedError, with the reasons, where prompts of this run cannot be read together."""
    if batch_size == 1:
        return
    kinds = {load_task(task).kind for task in tasks}
    reasons = []
    if "picture" in kinds:
        reasons.append("each question about a picture is asked by itself")
    if "class" in kinds:
        reasons.append("each picture is drawn by itself, from its own seed")
    if compressing := [label for label, group in methods.items() if is_compressing(group)]:
        reasons.append(f"{', '.join(compressing)}: what a compressed cache holds is told of each prompt")
    if controls:
        reasons.append(f"the controls {', '.join(controls)} run at the budget that was reached on each prompt, which a batch does not tell apart: "
                       "--controls none goes without")  # fmt: skip
    if reasons:
        raise UnsupportedError(f"prompts of this run cannot be read in batches of {batch_size}; --batch-size 1 can be had:", reasons)


def _samples(loaded: LoadedModel, key: SampleKey, n: int, seed: int) -> Sequence[AnySample]:
    task = load_task(key.task)
    return task.samples(loaded.tokenizer, key.tokens, n, seed) if isinstance(task, Task) else task.samples(n, seed)


def _require_same_prompts(folder: RunFolder, key: SampleKey, samples: Sequence[AnySample]) -> None:
    """Raises where a resumed run would mix prompts of two kinds in one row: tasks change with accel, and some texts with Python's own library."""
    for i, sample in enumerate(samples):
        if (before := folder.prompt_hash(key._replace(sample=i))) is not None and before != sample.prompt_hash:
            raise AccelError(
                f"prompt {i} of {place(key)} is not the one that {folder.path} was begun with: "
                "resume it with the same Python, tokenizer and version of accel, or start a new run"
            )


def _methods_for(key: SampleKey, methods: Mapping[str, Sequence[Method]], controls: Sequence[Control], folder: RunFolder) -> Sequence[Method]:
    """What is applied for one sample: nothing for dense, the methods of its label, or a control with the budget used on this very prompt."""
    if key.label == BASELINE:
        return ()
    if key.label in methods:
        return methods[key.label]
    control = next(control for control in controls if control.label == key.label)
    reference = control.references[0]
    found = folder.get(key._replace(label=reference))
    if found is None:
        raise AccelError(f"{key.label} needs what {reference} read on {place(key)}, prompt {key.sample}, which was not run")
    return [build_control(control, methods[reference], found)]


@contextmanager
def _bar(total: int, is_shown: bool) -> Iterator[Any]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(total=total, unit="sample", disable=not is_shown, dynamic_ncols=True) as bar:
        yield bar
