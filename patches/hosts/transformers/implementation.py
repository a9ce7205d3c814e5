"""The `_attn_implementation` of a config, switched and switched back. Models may share one config object."""

from __future__ import annotations

import copyreg
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accel.handle import Handle
from accel.patches.hosts.transformers.dispatch import original_of


@dataclass
class _Switched:
    config: Any             # keeps the object, and with it its id, alive
    original: str
    name: str
    users: set[int] = field(default_factory=set)


_SWITCHED: dict[int, _Switched] = {}


def switch_implementation(config: Any, name: str, handle: Handle, *, is_needed: bool = True) -> None:
    """Sets the config's attention implementation to `name` until the last handle that asked for it is undone or thrown away.

    The second of two models that share a config finds the name set already; the first one's undo must not take it away.
    is_needed: whether the methods stand still once somebody sets another implementation; reports then say so.
    """
    entry = _SWITCHED.get(id(config))
    if entry is not None and id(handle) in entry.users:
        return
    current = config._attn_implementation_internal
    if entry is None:
        entry = _SWITCHED[id(config)] = _Switched(config, current, name)
        copyreg.dispatch_table.setdefault(type(config), _reduce)
    elif current != entry.name:
        # somebody called set_attn_implementation since: theirs is what the last undo gives back
        entry.original, entry.name = current, name
    config._attn_implementation_internal = name
    entry.users.add(id(handle))
    release = partial(_release, id(config), id(handle))
    handle.on_undo(release)
    if is_needed:
        handle.on_report(partial(_why_out_of_use, entry))
    weakref.finalize(handle, release)


def _release(config_id: int, handle_id: int) -> None:
    entry = _SWITCHED.get(config_id)
    if entry is None or handle_id not in entry.users:
        return
    entry.users.discard(handle_id)
    if not entry.users:
        # a choice made while the model was patched stays
        if entry.config._attn_implementation_internal == entry.name:
            entry.config._attn_implementation_internal = entry.original
        del _SWITCHED[config_id]
        cls = type(entry.config)
        if copyreg.dispatch_table.get(cls) is _reduce and all(type(other.config) is not cls for other in _SWITCHED.values()):
            del copyreg.dispatch_table[cls]


def _reduce(config: Any) -> tuple[Any, ...]:
    """How copies and pickles of a config are made while one of its class is patched: they name the original, which every process knows.

    The name itself must stay a plain string, and the config of its own class: Dynamo traces through both.
    """
    reduced: tuple[Any, ...] = config.__reduce_ex__(2)
    # a class may have a way of its own, with another state or none
    state = reduced[2] if len(reduced) > 2 else None
    if not isinstance(state, dict):
        return reduced
    original = original_of(state.get("_attn_implementation_internal", ""))
    return reduced if original is None else (*reduced[:2], {**state, "_attn_implementation_internal": original}, *reduced[3:])


def _why_out_of_use(entry: _Switched) -> str | None:
    current = entry.config._attn_implementation_internal
    if current == entry.name:
        return None
    return f"not in use: the model's attention was set to {current!r} since; undo and apply again"
