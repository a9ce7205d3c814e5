"""Our VAR and Infinity: `new_cache`, replaced, is all that changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.handle import Handle
from accel.patches.hosts.bound import replace_method
from accel.patches.hosts.identity import fingerprint, is_next_scale
from accel.patches.hosts.nextscale.door import Door
from accel.protocols import ModelInfo

if TYPE_CHECKING:
    from accel.models.cache import ScaleCache, Schedule

matches = is_next_scale


def describe(base: Any) -> ModelInfo:
    """Sizes from the configuration, scales from the default schedule; a generation brings its own."""
    config = base.config
    n_layers, n_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    return ModelInfo(
        family=config.model_type, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=config.hidden_size // n_heads,
        layer_types=("full_attention",) * n_layers, device=base.device.type, dtype=str(base.dtype).removeprefix("torch."),
        hidden_size=config.hidden_size, scale_shapes=base.default_schedule().sizes, fingerprint=lambda: fingerprint(base),
    )  # fmt: skip


def attach(base: Any, door: Door, handle: Handle) -> None:
    """Gives every generation a cache of the door's."""
    replace_method(base, "new_cache", partial(_new_cache, door), handle)


def _new_cache(
    door: Door, original: Callable[..., ScaleCache], schedule: Schedule, *, is_guided: bool = False, teacher_forced: bool = False
) -> ScaleCache:
    if not door.is_on:
        return original(schedule, is_guided=is_guided, teacher_forced=teacher_forced)
    if teacher_forced:
        raise door.refusal("a teacher-forced pass computes all scales at once")
    return door.cache(schedule, is_guided=is_guided)
