"""Where the caches of generations come from while a method is on a next-scale model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.protocols import KVCompression, ModelInfo

if TYPE_CHECKING:
    from accel.models.cache import Schedule
    from accel.patches.hosts.nextscale.cache import CompressedCache


class Door:
    """Makes a cache per generation. While it is off (`handle.paused()`), generations that begin are the model's own."""

    def __init__(self, method: KVCompression, info: ModelInfo, handle: Handle) -> None:
        self.method, self.info, self.handle = method, info, handle
        self.is_on = True

    def cache(self, schedule: Schedule, *, is_guided: bool) -> CompressedCache:
        """A cache for one generation, which asks the method."""
        from accel.patches.hosts.nextscale.cache import CompressedCache

        return CompressedCache(schedule, self.method, self.info, counters=lambda: self.handle.stats.cache, is_guided=is_guided)

    def refusal(self, what: str) -> UnsupportedError:
        """The error for a pass that is no generation; `what` says what it does instead."""
        return UnsupportedError(
            f"{self.method.method_name()} drops cache entries scale by scale, and {what}",
            ["undo() the handle, or run the pass inside `with handle.paused():`"],
        )
