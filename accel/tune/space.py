"""Points of a space of options, as `accel tune` stores them.

What is stored lies in the whole box: where an option has a floor, its range is stretched over what is left above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.protocols import Choice, Method, Uniform

Space = Mapping[str, Uniform | Choice]


def options_at(space: Space, params: Mapping[str, Any], default: Method) -> dict[str, Any]:
    """The options at a stored point; fewer for a trial that was cut short before it had all."""
    options, found = default.options(), {}
    for option, values in space.items():
        if option in params:
            found[option] = options[option] = _value(values, params[option], options)
    return found


def suggest(trial: Any, option: str, values: Uniform | Choice) -> Any:
    """Asks an optuna trial for what it stores."""
    if isinstance(values, Choice):
        return trial.suggest_categorical(option, [_label(value) for value in values.values])
    if values.is_integer:
        return trial.suggest_int(option, int(values.low), int(values.high), log=values.is_log)
    return trial.suggest_float(option, values.low, values.high, log=values.is_log)


# optuna stores plain choices only; a label stands for tuples and the like
def _label(value: Any) -> str:
    return repr(value)


def _value(values: Uniform | Choice, stored: Any, options: Mapping[str, Any]) -> Any:
    """The value behind a stored one. options: of the method, those before this one as they were chosen."""
    if isinstance(values, Choice):
        return next(value for value in values.values if _label(value) == stored)
    if values.floor is None:
        return stored
    low = _low(values, options)
    value = low + (stored - values.low) / (values.high - values.low) * (values.high - low)
    return round(value) if values.is_integer else min(value, values.high)


def stored_value(values: Uniform | Choice, value: Any, options: Mapping[str, Any]) -> Any:
    """What the study stores for a value: the other way round."""
    if isinstance(values, Choice):
        return _label(value)
    low = _low(values, options)
    if low == values.low or low == values.high:
        return value
    stored = values.low + (value - low) / (values.high - low) * (values.high - values.low)
    return round(stored) if values.is_integer else stored


def holds(values: Uniform | Choice, value: Any, options: Mapping[str, Any]) -> bool:
    """Whether a value lies in the space; options: those beside it."""
    if isinstance(values, Choice):
        return value in values.values
    return isinstance(value, (int, float)) and _low(values, options) <= value <= values.high


def _low(values: Uniform, options: Mapping[str, Any]) -> float:
    return values.low if values.floor is None else min(values.high, max(values.low, values.floor(options)))


def describe(values: Uniform | Choice) -> str:
    """The values, for people."""
    if isinstance(values, Choice):
        return "one of " + ", ".join(map(repr, values.values))
    kind = (", whole numbers" if values.is_integer else "") + (", logarithmic" if values.is_log else "")
    return f"{values.low:g} to {values.high:g}{kind}"
