"""What methods with a fixed pattern share: checks of their options, and which calls hold too few queries to be a prefill."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.protocols import AttentionStep, SparseAttention


def require_whole(method: SparseAttention, option: str, *, low: int) -> None:
    """Raises OptionError unless the option is a whole number of at least `low`."""
    value = getattr(method, option)
    if not is_whole(value) or value < low:
        raise OptionError(f"{method.method_name()}: {option} must be a whole number of at least {low}, got {value!r}")


def require_share(method: SparseAttention, option: str) -> None:
    """Raises OptionError unless the option lies in (0, 1]."""
    value = getattr(method, option)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not 0 < value <= 1:
        raise OptionError(f"{method.method_name()}: {option} must lie in (0, 1], got {value!r}")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def has_few_rows(step: AttentionStep, block_size: int) -> bool:
    """Whether the call looks like decoding: fewer than two blocks of queries behind a cached prefix (speculation, prompt lookup)."""
    return step.q_len < min(2 * block_size, step.kv_len)
