"""Encoder, prefill and decoding of a prompt with visual tokens, with and without token pruning, in one interleaved run (style.md §10).

Dense is the model as it was loaded. Beside every measured ratio stands what the arithmetic of `cost.py` gives for the tokens that were really
left in each layer, wherever a method drops them.
"""

from __future__ import annotations

import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import accel
from accel.errors import OptionError
from accel.evals.latency import Progress, Spread, quiet_notices, stock_label
from accel.evals.memory import track_peak
from accel.evals.prompt_cache import last_logits_only
from accel.evals.visual_bench.cost import DecoderShape, EncoderShape, decode_bytes, encoder_flops, prefill_flops, token_kv_bytes
from accel.evals.visual_bench.shapes import VisualPrompt
from accel.protocols import Method
from accel.stats import PruningEvent

Part = Literal["encoder", "prefill", "head", "ttft", "decode"]
Clock = Literal["wall", "processor"]
PARTS: tuple[Part, ...] = ("encoder", "prefill", "head", "ttft", "decode")


@dataclass(frozen=True)
class VisualPass:
    """Seconds of one pass. decode_s: per further token.

    prefill_s: look-up of the words, choosing among the features, and the decoder. head_s: the first token from what the decoder gave.
    """

    encoder_s: float
    prefill_s: float
    head_s: float
    decode_s: float

    def seconds(self, part: Part) -> float:
        if part == "ttft":
            return self.encoder_s + self.prefill_s + self.head_s
        return float(getattr(self, f"{part}_s"))


@dataclass(frozen=True)
class Held:
    """What one prefill left. layer_tokens: by layer and sequence, visual tokens, structural ones included. layer_bytes: by layer, of the KV cache."""

    layer_tokens: list[list[int]]
    layer_bytes: list[int]
    peak_bytes: int | None


@dataclass(frozen=True)
class VisualRow:
    """One variant. All token counts are per sequence.

    visual_tokens: left behind the last stage; mean_layer_tokens: as a mean over the decoder layers, structural ones included in both.
    ms: by part, "encoder", "prefill", "head", "ttft" (the sum of the three) and "decode" (per token).
    speedup: by part, median over rounds of dense / this time. predicted: the same from arithmetic, FLOPs of prefill and of encoder + prefill,
    bytes of a decoding step; what is unknown is missing.
    kv_bytes: cache after prefill, and its visual part; predicted_visual_kv_bytes: that of the tokens left.
    peak_bytes: growth during a pass over what was held before.
    """

    label: str
    methods: list[dict[str, Any]]
    is_baseline: bool
    visual_tokens: float
    mean_layer_tokens: float
    ms: dict[Part, Spread]
    speedup: dict[Part, float]
    predicted: dict[Part, float]
    kv_bytes: int
    visual_kv_bytes: int
    predicted_visual_kv_bytes: int
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_visual(
    model: Any,
    prompt: VisualPrompt,
    variants: Mapping[str, Sequence[Method]],
    *,
    decode_steps: int = 8,
    repeats: int = 5,
    clock: Clock = "wall",
    progress: Progress | None = None,
) -> list[VisualRow]:
    """One row per variant, the model's own dense attention first. A first round warms up and takes peaks and counts; `repeats` rounds are timed.

    clock: "processor" counts the time that a processor spent on this process, which other processes move far less than the wall clock. It is
    a latency only where one thread does all the work.
    """
    if clock == "processor" and (model.device.type != "cpu" or torch.get_num_threads() != 1):
        have = f"{model.device.type} with {torch.get_num_threads()} threads"
        raise OptionError(f"processor time is latency on a CPU with one thread, got {have}: use --threads 1")
    if repeats < 1 or decode_steps < 1:
        raise OptionError(f"repeats and decode steps must be at least 1, got {repeats} and {decode_steps}")
    dense = stock_label(model)
    if dense in variants:
        raise OptionError(f"the label {dense} belongs to the dense baseline, which every run holds")
    everything: dict[str, Sequence[Method]] = {dense: [], **variants}
    held: dict[str, Held] = {}
    passes: dict[str, list[VisualPass]] = {label: [] for label in everything}
    with quiet_notices():
        # what a process sets up once, by whichever method first needs it, belongs to nobody's peak
        for methods in everything.values():
            visual_pass(model, prompt, methods, decode_steps=decode_steps)
        for i_round in range(1 + repeats):
            gc.collect()
            # another one begins every round: what runs behind the collection finds its caches cold
            for label in rotated(list(everything), i_round):
                methods = everything[label]
                if progress:
                    progress(label)
                if i_round:
                    passes[label].append(visual_pass(model, prompt, methods, decode_steps=decode_steps, clock=clock))
                else:
                    held[label] = inspect_pass(model, prompt, methods, decode_steps=decode_steps)
    return visual_rows(model, prompt, everything, held, passes)


def rotated(labels: Sequence[str], by: int) -> list[str]:
    """The same labels in the same cyclic order, beginning with number `by`."""
    first = by % len(labels)
    return [*labels[first:], *labels[:first]]


def visual_pass(
    model: Any,
    prompt: VisualPrompt,
    methods: Sequence[Method],
    *,
    decode_steps: int,
    clock: Clock = "wall",
    observe: Callable[[PruningEvent], None] | None = None,
    between: Callable[[Any], object] | None = None,
) -> VisualPass:
    """Times one prompt and `decode_steps` further tokens with the methods on; patching lies outside the clock.

    observe: told of every pruning stage. between: called with the cache between prefill and decoding, outside the clock.
    """
    from transformers import DynamicCache

    applied = accel.apply(model, *methods) if methods else nullcontext()
    cache = DynamicCache(config=model.config)
    more = {"cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values": cache, "use_cache": True}
    now = functools.partial(_now, model, clock)
    with applied as handle, torch.no_grad(), encoder_clock(model, now) as encoder_s:
        # behind the hooks of `apply`, whose time is the prefill's
        with handle.observe_pruning(observe) if handle and observe else nullcontext(), decoder_end(model, now) as ends:
            start = now()
            token = _newest(model(**prompt.inputs, **more, **last_logits_only(model)))
            first_token = now()
        if between:
            between(cache)
        resumed = now()
        for _ in range(decode_steps):
            token = _newest(model(input_ids=token, **more))
        decode_s = (now() - resumed) / decode_steps
    return VisualPass(sum(encoder_s), ends[-1] - start - sum(encoder_s), first_token - ends[-1], decode_s)


def inspect_pass(model: Any, prompt: VisualPrompt, methods: Sequence[Method], *, decode_steps: int) -> Held:
    """What one pass with the methods on leaves in the layers and in memory."""
    events: list[PruningEvent] = []
    found: list[int] = []

    def read(cache: Any) -> None:
        found.extend(cache_bytes(cache))

    with track_peak(next(iter(model.parameters())).device) as peak:
        visual_pass(model, prompt, methods, decode_steps=decode_steps, observe=events.append, between=read)
    return Held(tokens_by_layer(events, len(found), [prompt.n_visual] * prompt.batch), found, peak.peak_bytes)


def tokens_by_layer(events: Sequence[PruningEvent], n_layers: int, n_visual: Sequence[int]) -> list[list[int]]:
    """By layer and sequence, the visual tokens that reach it. n_visual: those of each sequence, for layers in front of which nothing left."""
    found = []
    for layer in range(n_layers):
        before = [event.is_kept for event in events if (event.stage.layer or 0) <= layer]
        found.append(list(n_visual) if not before else [int(n) for n in torch.stack(before).all(0).sum(1)])
    return found


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of memory behind the keys and values of each layer, tensors of which only a part is shown counted whole."""
    return [sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) for layer in cache.layers]


@contextmanager
def encoder_clock(model: Any, now: Callable[[], float]) -> Iterator[list[float]]:
    """Notes the seconds of every `get_image_features` inside, observation of the encoder included."""
    base = model.base_model
    original, had_own = base.get_image_features, "get_image_features" in vars(base)
    spent: list[float] = []

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(now() - start)

    base.get_image_features = timed
    try:
        yield spent
    finally:
        if had_own:
            base.get_image_features = original
        else:
            del base.get_image_features


@contextmanager
def decoder_end(model: Any, now: Callable[[], float]) -> Iterator[list[float]]:
    """Notes when the text decoder came back, for every call inside."""
    ends: list[float] = []
    hook = model.get_decoder().register_forward_hook(lambda *_: ends.append(now()))
    try:
        yield ends
    finally:
        hook.remove()


def visual_rows(
    model: Any,
    prompt: VisualPrompt,
    variants: Mapping[str, Sequence[Method]],
    held: Mapping[str, Held],
    passes: Mapping[str, Sequence[VisualPass]],
) -> list[VisualRow]:
    """The table's rows from what every variant left and took, in the order of the rounds. The first variant is the baseline."""
    shape, encoder = DecoderShape.from_config(model.config), EncoderShape.from_config(model.config)
    number_bytes = int(model.dtype.itemsize)
    costs = {label: costs_of(shape, encoder, prompt, h, number_bytes) for label, h in held.items()}
    dense = next(iter(variants))
    rows = []
    for label, methods in variants.items():
        own, mine = held[label], passes[label]
        text_bytes = prompt.n_text * prompt.batch * shape.n_layers * token_kv_bytes(shape, number_bytes)
        rows.append(
            VisualRow(
                label=label,
                methods=[{"method": m.method_name(), **m.options()} for m in methods],
                is_baseline=label == dense,
                visual_tokens=statistics.fmean(own.layer_tokens[-1]),
                mean_layer_tokens=statistics.fmean(n for layer in own.layer_tokens for n in layer),
                ms={part: Spread.of([1e3 * p.seconds(part) for p in mine]) for part in PARTS},
                speedup={
                    part: statistics.median(d.seconds(part) / p.seconds(part) for d, p in zip(passes[dense], mine, strict=True)) for part in PARTS
                },
                predicted={part: costs[dense][part] / cost for part, cost in costs[label].items()},
                kv_bytes=sum(own.layer_bytes),
                visual_kv_bytes=sum(own.layer_bytes) - text_bytes,
                predicted_visual_kv_bytes=sum(map(sum, own.layer_tokens)) * token_kv_bytes(shape, number_bytes),
                peak_bytes=own.peak_bytes,
            )
        )
    return rows


def costs_of(shape: DecoderShape, encoder: EncoderShape | None, prompt: VisualPrompt, held: Held, number_bytes: int) -> dict[Part, float]:
    """The arithmetic cost of each part: FLOPs, and bytes for "decode". Parts whose cost is unknown are missing."""
    by_sequence = [[n + prompt.n_text for n in layers] for layers in zip(*held.layer_tokens, strict=True)]
    prefill = sum(prefill_flops(shape, layers) for layers in by_sequence)
    cache = sum(map(sum, by_sequence)) * token_kv_bytes(shape, number_bytes)
    found: dict[Part, float] = {"prefill": prefill, "decode": decode_bytes(shape, cache, number_bytes)}
    if encoder is not None:
        seen = encoder_flops(encoder, prompt.n_tiles) * prompt.batch
        found.update({"encoder": seen, "ttft": seen + prefill})
    return found


def _newest(out: Any) -> Tensor:
    """The likeliest next token of each sequence, (B, 1), on the host's side too: that is when a user sees it."""
    token: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
    token.tolist()
    return token


def _now(model: Any, clock: Clock) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() if clock == "wall" else time.process_time()
