"""The way on and off a next-scale model (kv-compression.md §9). What differs from one kind of model to the other is in `own.py` and `official.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from accel.errors import PatchError, UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import Mark
from accel.patches.hosts.identity import bare
from accel.patches.hosts.nextscale import official, own
from accel.patches.hosts.nextscale.door import Door
from accel.protocols import KVCompression, Method, ModelInfo

ACCEPTS = (
    "a next-scale image model (accel.models.var.VAR, accel.models.infinity.Infinity, the VAR class of FoundationVision), or one wrapped by PEFT, "
    "torch.compile, DataParallel or DistributedDataParallel"
)
MARK = "_accel_cache"


class Kind(Protocol):
    """A kind of next-scale model: whether a model without wrappers is one, its sizes, and how its generations come to the door's caches."""

    def matches(self, base: Any) -> bool: ...

    def describe(self, base: Any) -> ModelInfo: ...

    def attach(self, base: Any, door: Door, handle: Handle) -> None: ...


KINDS: tuple[Kind, ...] = (own, official)


def matches(model: Any) -> bool:
    """Whether `model` is a next-scale model of a known kind, bare or wrapped. Loads nothing that is not loaded already."""
    base = bare(model)
    return any(kind.matches(base) for kind in KINDS)


def refusals(method: Method) -> list[str]:
    """Why this host cannot run a method at all."""
    if isinstance(method, KVCompression):
        return []
    return [f"the next-scale host runs KV-compression methods only, and this is a {method.kind.replace('_', '-')} method"]


def describe(model: Any) -> ModelInfo:
    """The transformer's sizes as methods see them."""
    base = bare(model)
    return _kind(base).describe(base)


def plain_model() -> ModelInfo:
    """A next-scale model without any speciality: what a method refuses here, it refuses on every one of them."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    shapes = tuple((side, side) for side in sides)
    return ModelInfo("accel_var", 16, 16, 16, 64, ("full_attention",) * 16, "cpu", "float32", hidden_size=1024, scale_shapes=shapes)


def attach(model: Any, methods: Sequence[Method], info: ModelInfo, handle: Handle) -> None:
    """Gives every generation a cache that asks the method. All changes of the model are made through `handle`."""
    base = bare(model)
    names = list(getattr(getattr(base, MARK, None), "names", []))
    if names:
        raise PatchError(f"this {type(base).__name__} is patched already, with {', '.join(names)}; call undo() on its handle first")
    [method] = methods
    assert isinstance(method, KVCompression)
    # the fingerprint function holds the model, and caches must not
    door = Door(method, replace(info, fingerprint=None), handle)
    handle.set_attr(base, MARK, Mark([method.method_name()]))
    _kind(base).attach(base, door, handle)
    handle.on_pause(partial(setattr, door, "is_on"))
    handle.notices += _notices(method, info)


def _kind(base: Any) -> Kind:
    return next(kind for kind in KINDS if kind.matches(base))


def _notices(method: KVCompression, info: ModelInfo) -> list[str]:
    """What budgets so large that they save less than a user may expect deserve, for the default schedule."""
    assert info.scale_shapes is not None
    tokens = [height * width for height, width in info.scale_shapes]
    name, whole, stored = method.method_name(), sum(tokens), sum(tokens[:-1])
    last = len(tokens) - 1
    try:
        groups = [group for layer in range(info.n_layers) for group in method.groups(info, layer, step=last, n_entries=whole) if group.heads]
    except UnsupportedError as error:
        # every generation may bring scales of its own: those raise when they come
        return [f"{name} will not draw with the default scales: {error}"]
    least = min(group.budget for group in groups)
    if least >= whole:
        return [f"{name}: keeps all {whole} entries of every head with these options; images stay bit for bit the same"]
    if least >= stored:
        return [f"{name}: {least} entries per head save attention but no memory: without the last scale, never stored, a cache holds {stored}"]
    return []
