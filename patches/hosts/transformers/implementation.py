"""The `_attn_implementation` of a config, switched and switched back. Models may share one config object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accel.handle import Handle


@dataclass
class _Switched:
    config: Any             # keeps the object, and with it its id, alive
    original: str
    name: str
    users: set[int] = field(default_factory=set)


_SWITCHED: dict[int, _Switched] = {}


def switch_implementation(config: Any, name: str, handle: Handle) -> None:
    """Sets the config's attention implementation to `name` until the last handle that asked for it is undone.

    The second of two models that share a config finds the name set already; the first one's undo must not take it away.
    """
    entry = _SWITCHED.get(id(config))
    if entry is None:
        entry = _SWITCHED[id(config)] = _Switched(config, config._attn_implementation_internal, name)
        config._attn_implementation_internal = name
    if id(handle) in entry.users:
        return
    entry.users.add(id(handle))

    def release() -> None:
        entry.users.discard(id(handle))
        if not entry.users:
            config._attn_implementation_internal = entry.original
            del _SWITCHED[id(config)]

    handle.on_undo(release)
