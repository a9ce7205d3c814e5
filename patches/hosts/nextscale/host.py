"""The way on and off a next-scale model: its `new_cache`, replaced (kv-compression.md §9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.errors import PatchError, UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import Mark, replace_method
from accel.patches.hosts.identity import fingerprint, is_next_scale, unwrapped
from accel.protocols import KVCompression, Method, ModelInfo

if TYPE_CHECKING:
    from accel.models.cache import ScaleCache, Schedule

ACCEPTS = "a next-scale image model (accel.models.var.VAR, accel.models.infinity.Infinity), or one wrapped by PEFT"
MARK = "_accel_cache"


def matches(model: Any) -> bool:
    """Whether `model` is one of our next-scale models, bare or inside PEFT. Loads nothing that is not loaded already."""
    return is_next_scale(unwrapped(model))


def refusals(method: Method) -> list[str]:
    """Why this host cannot run a method at all."""
    if isinstance(method, KVCompression):
        return []
    return [f"the next-scale host runs KV-compression methods only, and this is a {method.kind.replace('_', '-')} method"]


def describe(model: Any) -> ModelInfo:
    """The transformer's sizes as methods see them. The scales are those of the default schedule; a generation brings its own."""
    base = unwrapped(model)
    config = base.config
    n_layers, n_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    return ModelInfo(
        family=config.model_type, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=config.hidden_size // n_heads,
        layer_types=("full_attention",) * n_layers, device=base.device.type, dtype=str(base.dtype).removeprefix("torch."),
        hidden_size=config.hidden_size, scale_shapes=base.default_schedule().sizes, fingerprint=lambda: fingerprint(base),
    )  # fmt: skip


def plain_model() -> ModelInfo:
    """A next-scale model without any speciality: what a method refuses here, it refuses on every one of them."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    shapes = tuple((side, side) for side in sides)
    return ModelInfo("accel_var", 16, 16, 16, 64, ("full_attention",) * 16, "cpu", "float32", hidden_size=1024, scale_shapes=shapes)


def attach(model: Any, methods: Sequence[Method], info: ModelInfo, handle: Handle) -> None:
    """Gives every generation a cache that asks the method. The only change of the model is its `new_cache`, made through `handle`."""
    base = unwrapped(model)
    names = list(getattr(getattr(base, MARK, None), "names", []))
    if names:
        raise PatchError(f"this {type(base).__name__} is patched already, with {', '.join(names)}; call undo() on its handle first")
    [method] = methods
    assert isinstance(method, KVCompression)
    # the fingerprint function holds the model, and caches must not
    door = Door(method, replace(info, fingerprint=None), handle)
    handle.set_attr(base, MARK, Mark([method.method_name()]))
    replace_method(base, "new_cache", door.new_cache, handle)
    handle.on_pause(partial(setattr, door, "is_on"))
    handle.notices += _notices(method, info)


def _notices(method: KVCompression, info: ModelInfo) -> list[str]:
    """What budgets so large that they save less than a user may expect deserve, for the default schedule."""
    assert info.scale_shapes is not None
    tokens = [height * width for height, width in info.scale_shapes]
    name, whole, stored = method.method_name(), sum(tokens), sum(tokens[:-1])
    last = len(tokens) - 1
    least = min(
        group.budget for layer in range(info.n_layers) for group in method.groups(info, layer, step=last, n_entries=whole) if group.heads
    )
    if least >= whole:
        return [f"{name}: keeps all {whole} entries of every head with these options; images stay bit for bit the same"]
    if least >= stored:
        return [f"{name}: {least} entries per head save attention but no memory: without the last scale, never stored, a cache holds {stored}"]
    return []


class Door:
    """Makes the cache of each generation; while the method is paused, the model's own."""

    def __init__(self, method: KVCompression, info: ModelInfo, handle: Handle) -> None:
        self.method, self.info, self.handle = method, info, handle
        self.is_on = True

    def new_cache(
        self, original: Callable[..., ScaleCache], schedule: Schedule, *, is_guided: bool = False, teacher_forced: bool = False
    ) -> ScaleCache:
        """A cache for one generation; a teacher-forced pass raises."""
        from accel.patches.hosts.nextscale.cache import CompressedCache

        if not self.is_on:
            return original(schedule, is_guided=is_guided, teacher_forced=teacher_forced)
        name = self.method.method_name()
        if teacher_forced:
            raise UnsupportedError(
                f"{name} drops cache entries scale by scale, and a teacher-forced pass computes all scales at once",
                ["undo() the handle, or run the pass inside `with handle.paused():`"],
            )
        return CompressedCache(schedule, self.method, self.info, counters=lambda: self.handle.stats.cache, is_guided=is_guided)
