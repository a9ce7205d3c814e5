"""One prompt, or a batch of prompts, under one method: scored, timed and counted, as records of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import accel
from accel.errors import NotFiniteError
from accel.evals.controls import keep_of
from accel.evals.decoder_cache import held_figures, held_now
from accel.evals.drawing.album import Album
from accel.evals.drawing.judged import cache_figures, dense_picture, draw_sample, image_model
from accel.evals.memory import track_peak
from accel.evals.models import LoadedModel, require_positions
from accel.evals.pictures.questions import ask, is_right, vision_model
from accel.evals.results import SampleKey, SampleRecord
from accel.evals.scoring.batched import score_batch
from accel.evals.scoring.cached import Prefix, can_share, score_behind_cache, shared_prefix
from accel.evals.scoring.single import Scored, device_of, score
from accel.evals.summary.visual_layers import layer_tokens
from accel.evals.tasks import ClassSample, PictureSample, Sample
from accel.patching import host_for
from accel.protocols import Method, ModelInfo
from accel.stats import PruningEvent

if TYPE_CHECKING:
    from accel.handle import Handle

AnySample = Sample | PictureSample | ClassSample
# a label at one length, whose first prompt pays for what is used for the first time
Kin = tuple[str, int]


@dataclass
class Measurer:
    """Measures samples of one run. behind_cache: whether text is scored behind a cache, as where one of the run's methods drops entries.

    warmup: untimed passes before the first sample of each label, length and kind (with and without a reply) that this process measures. peaks_at: on
    a CPU, where watching memory takes time, the sample of each label and length in whose warm-up it is watched.
    """

    loaded: LoadedModel
    album: Album
    behind_cache: bool = False
    shares_prefill: bool = False
    warmup: int = 0
    peaks_at: dict[Kin, SampleKey] = field(default_factory=dict)
    _prefix: Prefix | None = None
    _is_warm: set[tuple[str, int, bool]] = field(default_factory=set)

    def measure(self, keys: Sequence[SampleKey], samples: Sequence[AnySample], methods: Sequence[Method]) -> list[SampleRecord]:
        """Records of prompts of one task under one label, read together where they are several. The methods are taken off again."""
        prefix = self._prepared(samples[0], methods)
        peak_bytes = self._warm_up(keys, samples, methods, prefix)
        watched = _Watched(self.loaded)
        with track_peak(device_of(self.loaded.model)) if self._is_on_gpu else nullcontext() as peak:
            outcomes = self._outcomes(keys, samples, methods, prefix, watched)
        if peak is not None:
            peak_bytes = peak.peak_bytes
        options = [{m.method_name(): m.changed_options()} for m in methods]
        return [
            SampleRecord(
                task=key.task, label=key.label, options=options, tokens=key.tokens, sample=key.sample, seed=sample.seed, keep=keep_of(methods),
                prompt_hash=sample.prompt_hash, peak_bytes=peak_bytes,
                **{**outcome, **watched.figures, "visual_tokens": watched.figures.get("visual_tokens") or outcome.get("visual_tokens", 0)},
            )
            for key, sample, outcome in zip(keys, samples, outcomes, strict=True)
        ]  # fmt: skip

    @property
    def _is_on_gpu(self) -> bool:
        return device_of(self.loaded.model).type == "cuda"

    def _prepared(self, sample: AnySample, methods: Sequence[Method]) -> Prefix | None:
        """The prefill that this text sample goes on from; ask with no method on."""
        if not (isinstance(sample, Sample) and self.behind_cache and self.shares_prefill and can_share(methods)):
            return None
        if self._prefix is None or self._prefix.prompt_hash != sample.prompt_hash:
            self._prefix = shared_prefix(self.loaded.model, sample)
        return self._prefix

    def _warm_up(self, keys: Sequence[SampleKey], samples: Sequence[AnySample], methods: Sequence[Method], prefix: Prefix | None) -> int | None:
        """Runs the samples untimed where they are the first of their label, length and kind; the growth of memory in it, where that is watched."""
        kin = (keys[0].label, keys[0].tokens)
        kind = (*kin, bool(getattr(samples[0], "max_new_tokens", 0)))
        if kind in self._is_warm or not self.warmup:
            return None
        self._is_warm.add(kind)
        is_watched = not self._is_on_gpu and self.peaks_at.get(kin) == keys[0]
        with track_peak(device_of(self.loaded.model)) if is_watched else nullcontext() as peak:
            for _ in range(self.warmup):
                if isinstance(samples[0], ClassSample):
                    with accel.apply(self.loaded.model, *methods) if methods else nullcontext():
                        draw = image_model(self.loaded).draw
                        assert draw is not None
                        draw([samples[0].number % len(image_model(self.loaded).class_names)], seed=[samples[0].picture_seed])
                else:
                    # with the methods put on anew, so that nothing of it is left to the timed pass
                    self._outcomes(keys, samples, methods, prefix, _Watched(self.loaded))
        return None if peak is None else peak.peak_bytes

    def _outcomes(
        self, keys: Sequence[SampleKey], samples: Sequence[AnySample], methods: Sequence[Method], prefix: Prefix | None, watched: _Watched
    ) -> list[dict[str, Any]]:
        """What the samples add to their records, with the methods on; `watched` gets what these count."""
        first, key = samples[0], keys[0]
        dense = dense_picture(image_model(self.loaded), key, first, self.album) if isinstance(first, ClassSample) else None
        with ExitStack() as stack:
            if methods:
                watched.handle = stack.enter_context(accel.apply(self.loaded.model, *methods))
                stack.enter_context(watched.handle.observe_pruning(watched.events.append))
            if isinstance(first, ClassSample):
                found = [draw_sample(image_model(self.loaded), key, first, self.album, dense=dense, on_drawn=watched.count)]
            elif isinstance(first, PictureSample):
                found = [_asked(self.loaded, first, watched.count)]
            else:
                texts = [sample for sample in samples if isinstance(sample, Sample)]
                scored = self._scored(keys, texts, prefix, watched.count)
                found = [_as_fields(k, sample, s) for k, sample, s in zip(keys, texts, scored, strict=True)]
            watched.count_held(found[0]["n_tokens"])
        return found

    def _scored(self, keys: Sequence[SampleKey], samples: Sequence[Sample], prefix: Prefix | None, on_prefill: Callable[[], None]) -> list[Scored]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        for key, sample in zip(keys, samples, strict=True):
            n = len(sample.input_ids) if sample.n_prompt is None else max(len(sample.input_ids), sample.n_prompt + sample.max_new_tokens)
            require_positions(self.loaded, n, f"prompt {key.sample} of {place(key)} with its reply")
        if len(samples) > 1:
            return score_batch(model, tokenizer, samples, on_prefill=on_prefill)
        if self.behind_cache:
            return [score_behind_cache(model, tokenizer, samples[0], prefix=prefix, on_prefill=on_prefill)]
        return [score(model, tokenizer, samples[0], on_prefill=on_prefill)]


@dataclass
class _Watched:
    """What the methods count while samples are measured; read when the prompt is through, so that decoding does not dilute it."""

    loaded: LoadedModel
    handle: Handle | None = None
    events: list[PruningEvent] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=lambda: {"density": None, "sparse_calls": 0, "dense_calls": {}, "selection_ms": None})
    _at_prompt: dict[str, int] = field(default_factory=dict)

    def count(self) -> None:
        """Call it behind the prompt."""
        if self.handle is not None:
            self.figures.update(_counters(self.loaded, self.handle, self.events))
            self._at_prompt = held_now(self.handle.stats.cache)

    def count_held(self, n_tokens: int) -> None:
        """Call it behind the answers. n_tokens: those of the prompt."""
        if self.handle is not None and (held := held_figures(self.handle.stats.cache, self._at_prompt, n_tokens)) is not None:
            self.figures["cache"] = held


def model_info(loaded: LoadedModel) -> ModelInfo:
    """What methods and the plan of their controls may know of the model."""
    info: ModelInfo = host_for(loaded.model).describe(loaded.model)
    return info


def place(key: SampleKey) -> str:
    """ "needle at 2048 tokens"; the task alone where there is no length."""
    return f"{key.task} at {key.tokens} tokens" if key.tokens else key.task


def _as_fields(key: SampleKey, sample: Sample, scored: Scored) -> dict[str, Any]:
    """What a text sample adds to its record."""
    if not all(math.isfinite(p) for p in scored.log_probs):
        raise NotFiniteError(f"{key.label} gives log-probabilities that are not finite on {place(key)}, prompt {key.sample}")
    depths = [a.depth for a in sample.answers]
    return {
        "n_tokens": sample.n_prompt or len(sample.input_ids), "log_prob": statistics.fmean(scored.log_probs), "exact": statistics.fmean(scored.hits),
        "log_probs": scored.log_probs, "hits": scored.hits, "questions": [a.question for a in sample.answers],
        "expected": [a.text for a in sample.answers], "answers": scored.texts, "prefill_ms": scored.prefill_ms, "batch": scored.batch,
        "has_template": sample.has_template, "depths": None if set(depths) == {None} else depths, **asdict(scored.times),
    }  # fmt: skip


def _asked(loaded: LoadedModel, sample: PictureSample, on_prefill: Any) -> dict[str, Any]:
    """What a question about a picture adds to its record."""
    reply = ask(vision_model(loaded), sample, on_prefill=on_prefill)
    hit = float(is_right(reply.text, sample.answers))
    return {
        "n_tokens": reply.n_prompt, "log_prob": None, "exact": hit, "log_probs": [], "hits": [hit], "questions": [sample.question],
        "expected": [sample.answers[0]], "answers": [reply.text], "prefill_ms": reply.prefill_ms, "picture_hash": sample.picture_hash,
        "visual_tokens": reply.n_visual, **asdict(reply.times),
    }  # fmt: skip


def _counters(loaded: LoadedModel, handle: Handle, events: Sequence[PruningEvent]) -> dict[str, Any]:
    """What a handle counted in one prompt. events: its pruning stages."""
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
