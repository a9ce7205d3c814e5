"""What a cache method costs and saves in one self-attention layer of a known next-scale model, scale by scale, beside the plain cache.

The layer is a real `ScaleAttention` with random weights, driven through the cache that `accel.apply` gives: times and bytes are those of a
generation, what it draws means nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accel
from accel.evals.latency import Spread, quiet_notices
from accel.evals.memory import track_peak
from accel.models.blocks import ScaleAttention
from accel.models.cache import ScaleCache, Schedule
from accel.patching import host_for
from accel.protocols import CompressionContext, HeadGroup, KVCompression, Retain

DENSE = "dense"


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a published model. n_layers: of the whole model, for bytes of all layers; one layer runs. rows: of one guided picture."""

    width: int
    n_heads: int
    n_layers: int
    sides: tuple[int, ...]
    has_rope: bool
    rows: int = 2

    @property
    def schedule(self) -> Schedule:
        return Schedule.of(self.sides)


MEGAPIXEL = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SHAPES = {
    "infinity-8b": CacheShape(3584, 28, 40, MEGAPIXEL, has_rope=True),
    "infinity-2b": CacheShape(2048, 16, 32, MEGAPIXEL, has_rope=True),
    "var-d36": CacheShape(2304, 36, 36, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), has_rope=False),
    "var-d30": CacheShape(1920, 30, 30, VAR_256, has_rope=False),
    "var-d16": CacheShape(1024, 16, 16, VAR_256, has_rope=False),
}


@dataclass
class ScaleTime:
    """Seconds of one layer at one scale. attention_s: writing entries and choosing among them included; module_s: also projections and rotation.

    select_s: of attention_s, what the method took to score and choose.
    """

    attention_s: float = 0.0
    select_s: float = 0.0
    module_s: float = 0.0


@dataclass(frozen=True)
class CacheRow:
    """One variant; times by scale, in seconds, and of all scales together behind the last.

    read: entries that attention reads at the last scale, per head and row, as a mean; cache_bytes: the most that the layer held between scales, of
    one layer; predicted_read, predicted_bytes: the same by arithmetic over the budgets, keys, values and positions. peak_bytes: growth of memory in
    one generation; how_peak: the instrument.
    """

    label: str
    attention: list[Spread]
    select: list[Spread]
    module: list[Spread]
    read: float
    predicted_read: float
    cache_bytes: int
    predicted_bytes: int
    peak_bytes: int | None
    how_peak: str


class Layer:
    """One self-attention layer of a shape, ready to run generations of random inputs."""

    def __init__(self, shape: CacheShape, *, dtype: torch.dtype, device: str, clock: Callable[[], float], seed: int = 0) -> None:
        self.shape, self.dtype, self.device, self.clock = shape, dtype, device, clock
        torch.manual_seed(seed)
        self.model = _one_layer_model(shape).to(device=device, dtype=dtype).eval()
        self.attention = _attention(self.model)
        for name, p in self.attention.named_parameters():
            if "log_scale" not in name:
                torch.nn.init.normal_(p, std=shape.width**-0.5)
        self.inputs = [torch.randn(shape.rows, n, shape.width, device=device, dtype=dtype) for n in shape.schedule.tokens]
        self.rotations = [_rotation(shape, scale, device) for scale in range(len(shape.sides))]

    @torch.no_grad()
    def run(self, method: KVCompression | None) -> tuple[list[ScaleTime], float, int]:
        """Times of every scale, entries read at the last, and the most bytes held, of one generation with a method or the plain cache."""
        selects = [0.0]
        with quiet_notices(), nullcontext() if method is None else accel.apply(self.model, _watched(method, self.clock, selects)) as handle:
            cache = self.model.new_cache(self.shape.schedule, is_guided=self.shape.rows == 2)
            times, most = [], 0
            for scale, x in enumerate(self.inputs):
                cache.begin(scale)
                found, selects[0] = ScaleTime(), 0.0
                begin = self.clock()
                self.attention(x, cache=_Timed(cache, found, self.clock), rope=self.rotations[scale])
                found.module_s, found.select_s = self.clock() - begin, selects[0]
                times.append(found)
                most = max(most, cache.cache_bytes())
            read = self.shape.schedule.total if handle is None else handle.stats.cache.attended[self.shape.schedule.last] / (
                self.shape.rows * self.shape.n_heads
            )
        return times, float(read), most


def measure(
    shape: CacheShape, methods: Mapping[str, KVCompression], *, dtype: torch.dtype, device: str, repeats: int, warmup: int = 1,
    is_processor_time: bool = False, advance: Callable[[str], None] = lambda label: None,
) -> list[CacheRow]:  # fmt: skip
    """One row per variant, the plain cache first, from `repeats` interleaved generations of one layer each."""
    layer = Layer(shape, dtype=dtype, device=device, clock=_clock(device, is_processor_time=is_processor_time))
    variants: dict[str, KVCompression | None] = {DENSE: None, **methods}
    times: dict[str, list[list[ScaleTime]]] = {label: [] for label in variants}
    for number in range(warmup + repeats):
        for label, method in variants.items():
            advance(label)
            gc.collect()
            found, _, _ = layer.run(method)
            if number >= warmup:
                times[label].append(found)
    rows = []
    for label, method in variants.items():
        with track_peak(torch.device(device)) as peak:
            _, read, held = layer.run(method)
        predicted = _predicted(layer, method)
        rows.append(CacheRow(label, *_spreads(times[label]), read, predicted[0], held, predicted[1], peak.peak_bytes, peak.how))
    return rows


def _predicted(layer: Layer, method: KVCompression | None) -> tuple[float, int]:
    """Entries read at the last scale per head and row, and the most bytes between scales, from the budgets alone."""
    shape, schedule = layer.shape, layer.shape.schedule
    ends = [schedule.span(scale)[1] for scale in range(len(schedule))]
    per_entry = 2 * shape.width // shape.n_heads * layer.dtype.itemsize
    if method is None:
        return float(ends[-1]), shape.rows * shape.n_heads * ends[-2] * per_entry
    # the shape's own scales, whatever the model draws when it is not told
    info = replace(host_for(layer.model).describe(layer.model), scale_shapes=schedule.sizes)
    bound = method.bind(info)
    held: dict[tuple[int, ...], int] = {}
    dropped: set[tuple[int, ...]] = set()
    most = 0
    for scale, (n, end) in enumerate(zip(schedule.tokens, ends, strict=True)):
        for group in bound.groups(info, 0, step=scale, n_entries=end):
            whole = held.get(group.heads, 0) + n
            held[group.heads] = min(whole, group.budget)
            if whole > group.budget:
                dropped.add(group.heads)
        if scale < schedule.last:
            # a position of four bytes each where something was dropped
            most = max(most, sum(len(heads) * entries * (per_entry + 4 * (heads in dropped)) for heads, entries in held.items()))
    return sum(len(heads) * entries for heads, entries in held.items()) / shape.n_heads, shape.rows * most


def planted_profile(shape: CacheShape, folder: Path, *, contextual: float = 0.5) -> Path:
    """A head profile in which every so many of the heads is contextual, for the one layer of `Layer`; HACK takes it with allow_other_model."""
    from accel.patches._head_profile import HeadProfile, ProfileHeader

    scales = len(shape.sides)
    sigma = torch.full((1, shape.n_heads), 0.5)
    spread = [int((i + 1) * contextual) > int(i * contextual) for i in range(shape.n_heads)]
    sigma[0, spread] = 0.01
    header = ProfileHeader("planted", "planted", 1, shape.n_heads, shape.schedule.sizes, "float32", 1, None, "nothing")
    use = torch.full((1, shape.n_heads, scales, scales), 1 / scales)
    return HeadProfile(sigma, torch.full_like(sigma, 0.5), use, header).save(folder / "profile.safetensors")


class _Timed:
    """A cache whose attention is timed."""

    def __init__(self, cache: ScaleCache, found: ScaleTime, clock: Callable[[], float]) -> None:
        self.cache, self.found, self.clock = cache, found, clock

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin = self.clock()
        out = self.cache.attend(layer, q, k, v)
        self.found.attention_s = self.clock() - begin
        return out


def _watched(method: KVCompression, clock: Callable[[], float], total: list[float]) -> KVCompression:
    """The same method, whose choosing is added to `total`."""

    class Watched(type(method)):    # type: ignore[misc]
        def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
            begin = clock()
            found: Retain = super().select(ctx, group)
            total[0] += clock() - begin
            return found

    Watched.__module__ = type(method).__module__
    found: KVCompression = Watched(**method.options())
    return found


def _one_layer_model(shape: CacheShape) -> Any:
    """A model with one layer of these sizes, and as little else as its classes allow."""
    from accel.models.infinity import Infinity, InfinityConfig
    from accel.models.var import VAR, VARConfig

    small = {"vae_channels": 32, "vae_multipliers": [1], "vae_blocks": 1}
    common = {"num_hidden_layers": 1, "hidden_size": shape.width, "num_attention_heads": shape.n_heads, "intermediate_size": shape.width}
    if shape.has_rope:
        return Infinity(InfinityConfig(**common, pool_heads=shape.n_heads, text_width=32, text_tokens=8, code_bits=4, tokenizer_bits=4, **small))
    return VAR(VARConfig(**common, schedule=list(shape.sides), num_classes=2, codebook_size=16, code_width=8, **small))


def _attention(model: Any) -> ScaleAttention:
    return next(module for module in model.modules() if isinstance(module, ScaleAttention))


def _rotation(shape: CacheShape, scale: int, device: str) -> tuple[Tensor, Tensor] | None:
    if not shape.has_rope:
        return None
    angles = torch.rand(shape.schedule.tokens[scale], shape.width // shape.n_heads // 2, device=device)
    return angles.cos(), angles.sin()


def _clock(device: str, *, is_processor_time: bool) -> Callable[[], float]:
    if torch.device(device).type != "cuda":
        return time.thread_time if is_processor_time else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def _spreads(runs: Sequence[Sequence[ScaleTime]]) -> tuple[list[Spread], list[Spread], list[Spread]]:
    """By part, the times of every scale and of all together."""
    attention, select, module = (
        [Spread.of(column) for column in zip(*([*own, sum(own)] for own in ([getattr(one, name) for one in run] for run in runs)), strict=True)]
        for name in ("attention_s", "select_s", "module_s")
    )
    return attention, select, module
