"""Errors a user can meet. Each message says what was asked, what was found and what is possible."""

from __future__ import annotations

from collections.abc import Sequence


class AccelError(Exception):
    """Base of every error that accel raises on purpose."""


class OptionError(AccelError, ValueError):
    """An unknown method or option, or a value outside its range."""


class UnsupportedError(AccelError):
    """The method cannot work here. `reasons` holds one sentence per obstacle."""

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        self.reasons = list(reasons)
        super().__init__("\n  - ".join([message, *self.reasons]))


class NotFiniteError(AccelError):
    """A method or a model gives NaN or infinity where numbers are compared."""


class PatchError(AccelError, RuntimeError):
    """A model cannot be patched or restored in its present state."""
