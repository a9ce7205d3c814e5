"""The token maps that Infinity was trained on: aspect ratio (height / width) -> 13 (height, width) pairs. A smaller size is a prefix."""

from __future__ import annotations

from accel.errors import OptionError
from accel.models.cache import Schedule

Sizes = tuple[tuple[int, int], ...]

# number of scales of each size; the name is the number of pixels of the image
SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# fmt: off
_SQUARE_AND_TALL: dict[float, Sizes] = {
    1.0: ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (20, 20), (24, 24), (32, 32), (40, 40), (48, 48), (64, 64)),
    1.25: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36), (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36), (60, 45), (72, 54)),
    1.5: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32), (63, 42), (78, 52)),
    1.75: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32), (70, 40), (84, 48)),
    2.0: ((1, 1), (2, 1), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30), (74, 37), (90, 45)),
    2.5: ((1, 1), (2, 1), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26), (80, 32), (100, 40)),
    3.0: ((1, 1), (2, 1), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24), (90, 30), (111, 37)),
}
# fmt: on
SCHEDULES: dict[float, Sizes] = _SQUARE_AND_TALL | {
    round(1 / ratio, 3): tuple((w, h) for h, w in sizes) for ratio, sizes in _SQUARE_AND_TALL.items() if ratio != 1.0
}


def schedule_for(size: str, aspect_ratio: float) -> Schedule:
    """The trained schedule of a size ("0.06M", "0.25M", "0.60M", "1M") and a ratio height / width, which must be within 2 % of a trained one."""
    if size not in SIZES:
        raise OptionError(f"no size {size!r}; there are {', '.join(SIZES)}")
    nearest = min(SCHEDULES, key=lambda ratio: abs(ratio - aspect_ratio))
    if not abs(nearest - aspect_ratio) <= 0.02 * nearest:
        raise OptionError(f"no aspect_ratio (height / width) {aspect_ratio!r}; trained are {', '.join(map(str, sorted(SCHEDULES)))}")
    return Schedule(SCHEDULES[nearest][: SIZES[size]])


def longest(schedule: Schedule) -> Schedule:
    """The 1M schedule that `schedule` is a prefix of, or `schedule` where it is none of the trained."""
    for sizes in SCHEDULES.values():
        # every list starts with the same map or two: a prefix counts only where it tells the ratio
        if len(schedule) >= min(SIZES.values()) and sizes[: len(schedule)] == schedule.sizes:
            return Schedule(sizes)
    return schedule
