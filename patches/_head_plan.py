"""Budgets of contextual and structural heads: whole numbers that sum to what was asked for (kv-compression.md §2.3)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from accel.errors import OptionError
from accel.patches._head_profile import Shapes

FORMAT = "accel.hack.plan.1"
# contextual share where the user names none: below, and from, this share of contextual heads on
FEW_CONTEXTUAL, SHARE_OF_FEW, SHARE_OF_MANY = 0.65, 1 / 3, 2 / 3
LEAST_SHARE = 0.1
# products such as 100 · 0.29 fall short of the whole number by rounding
ROUNDING = 1e-9


@dataclass(frozen=True)
class HeadPlan:
    """Which heads are contextual, and how many entries each head keeps. L layers, H heads, T tokens in all.

    is_contextual: (L, H). contextual, structural: (L,), entries of one head of that type, also where a layer has none. scale_shapes: height and width
    of every scale. n_protected: the first tokens, which structural heads never drop. keep: as asked, a share of T or a count. share: the contextual
    share s that was used.
    """

    is_contextual: tuple[tuple[bool, ...], ...]
    contextual: tuple[int, ...]
    structural: tuple[int, ...]
    scale_shapes: Shapes
    n_protected: int
    keep: float | int
    share: float

    @property
    def total(self) -> int:
        """Tokens of all scales."""
        return sum(height * width for height, width in self.scale_shapes)

    @property
    def n_newest(self) -> int:
        """Tokens of the last scale."""
        height, width = self.scale_shapes[-1]
        return height * width

    @property
    def alpha(self) -> float:
        """The share of heads that are contextual."""
        return _alpha(self.is_contextual)

    @property
    def truncates_newest(self) -> bool:
        """Whether structural heads have no room for the first tokens and the whole of the last scale."""
        return any(
            budget < self.n_protected + self.n_newest for budget, types in zip(self.structural, self.is_contextual, strict=True) if not all(types)
        )

    def heads(self, layer: int, *, contextual: bool) -> tuple[int, ...]:
        """The heads of one type, ascending."""
        return tuple(head for head, found in enumerate(self.is_contextual[layer]) if found == contextual)

    def n_entries(self) -> int:
        """Entries of all heads of all layers when every budget is full."""
        return sum(
            self.contextual[layer] if found else self.structural[layer] for layer, types in enumerate(self.is_contextual) for found in types
        )

    def save(self, path: str | Path, *, about: Mapping[str, Any]) -> Path:
        """Writes the plan as JSON. about: what it was made from, for people and for checks; no key of it is read here."""
        found = {"format": FORMAT, **about, "plan": asdict(self)}
        path = Path(path)
        path.write_text(json.dumps({"fingerprint": _fingerprint(found), **found}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> tuple[Self, dict[str, Any]]:
        """The plan of a file, and what it was made from. OptionError where the file is none, or was changed."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            written = found.pop("fingerprint")
            is_own = found["format"] == FORMAT and written == _fingerprint(found)
            plain = found.pop("plan")
            types = tuple(tuple(bool(one) for one in row) for row in plain.pop("is_contextual"))
            contextual, structural = (tuple(int(n) for n in plain.pop(name)) for name in ("contextual", "structural"))
            shapes = tuple((int(height), int(width)) for height, width in plain.pop("scale_shapes"))
            plan = cls(types, contextual, structural, shapes, **plain)
            if not types or {len(contextual), len(structural)} != {len(types)}:
                raise ValueError(f"{len(types)} layers with {len(contextual)} and {len(structural)} budgets")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"hack: {path} is no plan: {_why(Path(path), error)}. `accel tune hack` writes such files, named plan.json") from error
        if not is_own:
            raise OptionError(f"hack: {path} is of another version, or was changed after it was made; `accel tune hack` makes it anew")
        return plan, found


def _why(path: Path, error: Exception) -> str:
    """Why a file holds no plan, in words: what went wrong while it was read is a library's error."""
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "there is no such file"
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    if not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is JSON of something else, or incomplete ({error})"
    # safetensors begin with the length of their header, which is an object
    is_safetensors = path.read_bytes()[8:9] == b"{"
    return "it is a safetensors file; a head profile is given as profile=…" if is_safetensors else "it is no JSON"


def make_plan(
    is_contextual: Sequence[Sequence[bool]], *, scale_shapes: Shapes, n_protected: int, keep: float | int, share: float | Literal["auto"] = "auto"
) -> HeadPlan:
    """Budgets whose mean over all heads is `keep`, or less by under one entry per head of a layer.

    share: a contextual head gets this part of the mean, and structural heads what that leaves; 1 gives all the same. "auto": a third where less than
    65 % of the heads are contextual, else two thirds; less, down to a tenth, where structural heads could not hold the last scale.
    """
    types = tuple(tuple(bool(one) for one in row) for row in is_contextual)
    sizes = [height * width for height, width in scale_shapes]
    total = sum(sizes)
    mean = keep if isinstance(keep, int) else keep * total
    mean, alpha = min(mean, total), _alpha(types)
    used = _auto_share(alpha, mean, n_protected + sizes[-1]) if share == "auto" else share
    of_contextual, of_structural = real_budgets(alpha, mean, total, used)
    n_contextual = [sum(row) for row in types]
    n_structural = [len(row) - n for row, n in zip(types, n_contextual, strict=True)]
    contextual, structural = ([math.floor(budget + ROUNDING)] * len(types) for budget in (of_contextual, of_structural))
    left = math.floor(mean * sum(map(len, types)) + ROUNDING)
    left -= sum(b * n for budgets, counts in ((contextual, n_contextual), (structural, n_structural)) for b, n in zip(budgets, counts, strict=True))
    _spend(left, total, (structural, n_structural), (contextual, n_contextual))
    plan = HeadPlan(types, tuple(contextual), tuple(structural), tuple(scale_shapes), n_protected, keep, used)
    _require_room(plan)
    return plan


def real_budgets(alpha: float, mean: float, total: int, share: float) -> tuple[float, float]:
    """Entries of a contextual and of a structural head, before rounding: α · contextual + (1 − α) · structural = mean."""
    if alpha in (0, 1):
        # one type only: the other's number is of no head
        return mean, mean
    contextual, structural = share * mean, mean * (1 - alpha * share) / (1 - alpha)
    if structural > total:
        return (mean - (1 - alpha) * total) / alpha, float(total)
    return contextual, structural


def _auto_share(alpha: float, mean: float, whole_scale: int) -> float:
    share = SHARE_OF_FEW if alpha < FEW_CONTEXTUAL else SHARE_OF_MANY
    if alpha in (0, 1) or mean * (1 - alpha * share) / (1 - alpha) >= whole_scale:
        return share
    lower = (1 - (1 - alpha) * whole_scale / mean) / alpha
    return lower if lower >= LEAST_SHARE else share


def _spend(left: int, total: int, *types: tuple[list[int], list[int]]) -> None:
    """Spends what rounding left: one more for all heads of a type in a layer, layer by layer; the next type where the one before has everything.

    Ends at the first layer that cannot be paid. types: budgets, which are changed, and numbers of heads, by layer.
    """
    for budgets, counts in types:
        while any(n and budget < total for budget, n in zip(budgets, counts, strict=True)):
            for layer, n in enumerate(counts):
                if not n or budgets[layer] >= total:
                    continue
                if n > left:
                    return
                budgets[layer] += 1
                left -= n


def _require_room(plan: HeadPlan) -> None:
    n_first = min(plan.total, plan.n_protected + 1)
    for label, budgets, is_type, least in (("contextual", plan.contextual, True, 1), ("structural", plan.structural, False, n_first)):
        found = [budget for layer, budget in enumerate(budgets) if plan.heads(layer, contextual=is_type)]
        if found and min(found) < least:
            first = f", all {least} tokens" if plan.n_protected >= least else f", the first {plan.n_protected} tokens and one more"
            more = "" if least == 1 else first
            raise OptionError(
                f"hack: keep={plan.keep!r} of {plan.total} tokens gives {label} heads {min(found)} entries each, and they need {least} at "
                f"least{more}; keep more"
            )


def _fingerprint(found: Mapping[str, Any]) -> str:
    """Sixteen characters that differ where anything in a file does."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _alpha(types: Sequence[Sequence[bool]]) -> float:
    return sum(map(sum, types)) / sum(map(len, types))
