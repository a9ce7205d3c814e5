"""Runs tasks on one model under several methods, saving every sample as it finishes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import accel
from accel.errors import AccelError, OptionError
from accel.evals.album import Album
from accel.evals.cached_scoring import Prefix, can_share, score_behind_cache, shared_prefix
from accel.evals.controls import Control, build_control, keep_of, plan_controls
from accel.evals.decoder_cache import held_figures, held_now, is_compressing
from accel.evals.drawn import cache_figures, dense_picture, draw_sample, image_model
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedModel
from accel.evals.pictures import ask, is_right, vision_model
from accel.evals.results import RunFolder, SampleKey, SampleRecord
from accel.evals.scoring import Scored, score
from accel.evals.summary import BASELINE, summarise
from accel.evals.tasks import ClassSample, PictureSample, Sample, Task, load_task
from accel.evals.visual_layers import layer_tokens
from accel.patching import host_for
from accel.protocols import Method, ModelInfo
from accel.stats import PruningEvent

if TYPE_CHECKING:
    from accel.handle import Handle

AnySample = Sample | PictureSample | ClassSample


@dataclass(frozen=True)
class Block:
    """Samples of one task and length, measured under one method (label)."""

    task: str
    tokens: int
    label: str


def run_accuracy(
    loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], *, n: int, seed: int,
    folder: RunFolder, controls: Sequence[str] = (), limit: int | None = None, progress: bool = True, shares_prefill: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Table rows (summary.py) of dense attention, the methods by label, and the controls, on the same n samples per task and length.

    lengths: of text prompts; tasks about pictures have none. controls: names of methods that run beside the others at the same budget (controls.py).
    limit: stops after so many new samples. Samples already in `folder` are not run again. Batch 1; each method is taken off again. shares_prefill:
    dense and methods that drop cache entries go on from one unpatched prefill of each text prompt, where they can (cached_scoring.py).
    """
    check_run(loaded, methods, tasks, lengths, n)
    planned = plan_controls(controls, methods, model_info(loaded))
    wanted = wanted_samples(methods, tasks, lengths, n=n, controls=planned)
    done, scorer = folder.done(), _Scorer(loaded, any(map(is_compressing, methods.values())), shares_prefill)
    missing = [key for key in wanted if key not in done]
    with _bar(min(len(missing), len(missing) if limit is None else limit), progress) as bar, quiet_notices():
        prompts: dict[tuple[str, int], Sequence[AnySample]] = {}
        for key in missing[:limit]:
            place = (key.task, key.tokens)
            if place not in prompts:
                prompts = {place: _samples(loaded, key, n, seed)}
            bar.set_description(" ".join(part for part in (key.task, str(key.tokens or ""), key.label) if part))
            applied = _methods_for(key, methods, planned, folder)
            sample = prompts[place][key.sample]
            _require_same_prompt(folder, key, sample)
            folder.append(_measure(scorer, key, sample, applied, Album(folder.path)))
            bar.update()
    return rows_of(folder, wanted)


def wanted_samples(
    methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], *, n: int, controls: Sequence[Control] = ()
) -> list[SampleKey]:
    """Every sample of a run, in the order in which they are measured: prompt by prompt, so that a run that is stopped has the same ones of all
    labels; a control after what it is compared to.
    """
    labels = [BASELINE, *methods, *(control.label for control in controls)]
    return [
        SampleKey(task, label, tokens, i)
        for task in tasks
        for tokens in (lengths if load_task(task).kind == "text" else (0,))
        for i in range(n)
        for label in labels
    ]


def model_info(loaded: LoadedModel) -> ModelInfo:
    """What methods and the plan of their controls may know of the model."""
    info: ModelInfo = host_for(loaded.model).describe(loaded.model)
    return info


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


def check_run(loaded: LoadedModel, methods: Mapping[str, Sequence[Method]], tasks: Sequence[str], lengths: Sequence[int], n: int) -> None:
    """Everything that can be known before the first prompt, so that a long run does not fail in the middle."""
    if n < 1:
        raise OptionError(f"the number of samples must be at least 1, got {n}")
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


def _samples(loaded: LoadedModel, key: SampleKey, n: int, seed: int) -> Sequence[AnySample]:
    task = load_task(key.task)
    return task.samples(loaded.tokenizer, key.tokens, n, seed) if isinstance(task, Task) else task.samples(n, seed)


def _require_same_prompt(folder: RunFolder, key: SampleKey, sample: AnySample) -> None:
    """Raises where a resumed run would compare methods on different prompts: their text comes from Python's own library."""
    if (before := folder.prompt_hash(key)) is not None and before != sample.prompt_hash:
        raise AccelError(
            f"prompt {key.sample} of {_place(key)} is not the one that {folder.path} was begun with: "
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
        raise AccelError(f"{key.label} needs what {reference} read on {_place(key)}, prompt {key.sample}, which was not run")
    return [build_control(control, methods[reference], found)]


@dataclass
class _Scorer:
    """How the text samples of a run are scored: behind_cache where one of its methods drops cache entries, dense and all."""

    loaded: LoadedModel
    behind_cache: bool
    shares_prefill: bool
    prefix: Prefix | None = None

    def prepare(self, sample: Sample, methods: Sequence[Method]) -> Prefix | None:
        """The prefill that this sample goes on from; ask with no method on."""
        if not (self.behind_cache and self.shares_prefill and can_share(methods)):
            return None
        if self.prefix is None or self.prefix.prompt_hash != sample.prompt_hash:
            self.prefix = shared_prefix(self.loaded.model, sample)
        return self.prefix

    def score(self, sample: Sample, prefix: Prefix | None, on_prefill: Callable[[], None]) -> Scored:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if self.behind_cache:
            return score_behind_cache(model, tokenizer, sample, prefix=prefix, on_prefill=on_prefill)
        return score(model, tokenizer, sample, on_prefill=on_prefill)


def _measure(scorer: _Scorer, key: SampleKey, sample: AnySample, methods: Sequence[Method], album: Album) -> SampleRecord:
    """Scores one sample with the methods on; the counters are read when the prompt is through, so that decoding does not dilute them."""
    loaded = scorer.loaded
    prefix = scorer.prepare(sample, methods) if isinstance(sample, Sample) else None
    dense = dense_picture(image_model(loaded), key, sample, album) if isinstance(sample, ClassSample) else None
    prefill: dict[str, Any] = {"density": None, "sparse_calls": 0, "dense_calls": {}, "selection_ms": None}
    events: list[PruningEvent] = []
    at_prompt: dict[str, int] = {}
    with ExitStack() as stack:
        handle = stack.enter_context(accel.apply(loaded.model, *methods)) if methods else None
        if handle is not None:
            stack.enter_context(handle.observe_pruning(events.append))

        def count() -> None:
            prefill.update(_counters(loaded, handle, events))
            if handle is not None:
                at_prompt.update(held_now(handle.stats.cache))

        if isinstance(sample, Sample):
            outcome = _scored(scorer, key, sample, prefix, count)
        elif isinstance(sample, PictureSample):
            outcome = _asked(loaded, key, sample, count)
        else:
            outcome = draw_sample(image_model(loaded), key, sample, album, dense=dense, on_drawn=count)
        if handle is not None and (held := held_figures(handle.stats.cache, at_prompt, outcome["n_tokens"])) is not None:
            prefill["cache"] = held
    options = [{m.method_name(): m.changed_options()} for m in methods]
    outcome = {**outcome, **prefill, "visual_tokens": prefill.get("visual_tokens") or outcome.get("visual_tokens", 0)}
    return SampleRecord(
        task=key.task, label=key.label, options=options, tokens=key.tokens, sample=key.sample, seed=sample.seed, prompt_hash=sample.prompt_hash,
        keep=keep_of(methods), **outcome,
    )  # fmt: skip


def _scored(scorer: _Scorer, key: SampleKey, sample: Sample, prefix: Prefix | None, on_prefill: Callable[[], None]) -> dict[str, Any]:
    """What a text sample adds to its record."""
    scored = scorer.score(sample, prefix, on_prefill)
    if not all(math.isfinite(p) for p in scored.log_probs):
        raise AccelError(f"{key.label} gives log-probabilities that are not finite on {_place(key)}, prompt {key.sample}")
    return {
        "n_tokens": sample.n_prompt or len(sample.input_ids), "log_prob": statistics.fmean(scored.log_probs), "exact": statistics.fmean(scored.hits),
        "log_probs": scored.log_probs, "hits": scored.hits, "questions": [a.question for a in sample.answers],
        "expected": [a.text for a in sample.answers], "answers": scored.texts, "prefill_ms": scored.prefill_ms,
    }  # fmt: skip


def _asked(loaded: LoadedModel, key: SampleKey, sample: PictureSample, on_prefill: Any) -> dict[str, Any]:
    """What a question about a picture adds to its record."""
    reply = ask(vision_model(loaded), sample, on_prefill=on_prefill)
    hit = float(is_right(reply.text, sample.answers))
    return {
        "n_tokens": reply.n_prompt, "log_prob": None, "exact": hit, "log_probs": [], "hits": [hit], "questions": [sample.question],
        "expected": [sample.answers[0]], "answers": [reply.text], "prefill_ms": reply.prefill_ms, "picture_hash": sample.picture_hash,
        "visual_tokens": reply.n_visual,
    }  # fmt: skip


def _counters(loaded: LoadedModel, handle: Handle | None, events: Sequence[PruningEvent]) -> dict[str, Any]:
    """What a handle counted in one prompt. events: its pruning stages."""
    if handle is None:
        return {}
    counted, tokens = handle.stats.as_dict(), handle.stats.tokens
    found = {name: counted[name] for name in ("density", "sparse_calls", "dense_calls")}
    found |= {"selection_ms": counted["selection_s"] * 1e3}
    if tokens.patches:
        found |= {"visual_tokens": tokens.patches, "kept_tokens": tokens.kept_patches, "kept_share": tokens.kept_share}
        n_layers = tokens.all_layer_tokens // tokens.patches
        found |= {"structural_tokens": tokens.structural, "layer_tokens": layer_tokens(events, tokens.patches + tokens.structural, n_layers)}
    if handle.stats.cache.generations:
        found["cache"] = cache_figures(handle.stats.cache, model_info(loaded))
    return {**found, "not_pruned": {reason: n for reason, n in tokens.skipped.items() if n}}


def _place(key: SampleKey) -> str:
    """ "needle at 2048 tokens"; the task alone where there is no length."""
    return f"{key.task} at {key.tokens} tokens" if key.tokens else key.task


@contextmanager
def _bar(total: int, is_shown: bool) -> Iterator[Any]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(total=total, unit="sample", disable=not is_shown, dynamic_ncols=True) as bar:
        yield bar
