"""Checks of options: what every method says when one has a wrong value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accel.errors import OptionError
from accel.protocols import Method


def require(method: Method, holds: bool, message: str) -> None:
    """Raises OptionError with the method's name in front unless `holds`."""
    if not holds:
        raise OptionError(f"{method.method_name()}: {message}")


def require_number(method: Method, option: str, low: float, high: float, *, above: bool = False) -> None:
    """Raises OptionError unless the option is a number from `low` (with `above`: beyond it) to `high`."""
    value = getattr(method, option)
    fits = is_number(value) and (low < value if above else low <= value) and value <= high
    require(method, fits, f"{option} must be a number in {'(' if above else '['}{low:g}, {high:g}], got {value!r}")


def require_share(method: Method, option: str) -> None:
    """Raises OptionError unless the option lies in (0, 1]."""
    value = getattr(method, option)
    require(method, is_number(value) and 0 < value <= 1, f"{option} must lie in (0, 1], got {value!r}")


def require_keep(method: Method, option: str = "keep") -> None:
    """Raises OptionError unless the option is a share in (0, 1], written with a point, or a whole number of tokens from 2 on."""
    value = method.options()[option]
    hint = ": 1.0 is everything, and a single token is no count" if is_whole(value) and value == 1 else ""
    fits = value > 1 if is_whole(value) else is_number(value) and 0 < value <= 1
    require(method, fits, f"{option} must be a share in (0, 1], such as 0.25, or a number of tokens, such as 64, got {value!r}{hint}")


def require_whole(method: Method, option: str, low: int, *, or_none: bool = False) -> None:
    """Raises OptionError unless the option is a whole number of at least `low`, or None where that is allowed."""
    value = getattr(method, option)
    fits = (or_none and value is None) or (is_whole(value) and value >= low)
    require(method, fits, f"{option} must be {'None or ' if or_none else ''}a whole number of at least {low}, got {value!r}")


def require_choice(method: Method, option: str, allowed: Sequence[str]) -> None:
    """Raises OptionError unless the option is one of these words."""
    value = getattr(method, option)
    require(method, value in allowed, f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def require_flag(method: Method, option: str) -> None:
    """Raises OptionError unless the option is True or False."""
    value = getattr(method, option)
    require(method, isinstance(value, bool), f"{option} must be true or false, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a value is a number; True, False, NaN and infinities are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
