"""Controls: what runs beside a method with the same budget, so that a gain of its choice is not mistaken for a gain of its size.

A sparse-attention control gets the density that the first sparse method reached on the very same prompt; a token-pruning control the share or count
that the methods beside it are asked to keep. No method is named here: a control is whatever has the option `density` or `keep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from accel.errors import OptionError
from accel.evals.results import SampleRecord
from accel.protocols import Method, SparseAttention, TokenPruning
from accel.registry import build, method_class

# what a control shares with the method it is compared to, apart from the budget
_SHARED = (
    "block_size", "min_seq_len", "dense_layers", "dense_kernel", "precision", "position_mode", "newline", "min_tokens", "budget_scope",
)  # fmt: skip
_BUDGETS: dict[type[Method], str] = {SparseAttention: "density", TokenPruning: "keep"}


@dataclass(frozen=True)
class Control:
    """label: its name in tables. name: of the method. references: labels that it is compared to; the budget is that of the first."""

    label: str
    name: str
    references: tuple[str, ...]


def plan_controls(names: Sequence[str], methods: Mapping[str, Sequence[Method]]) -> list[Control]:
    """The controls that the methods (by label) need: one per name, for token pruning one per name and budget.

    Raises OptionError for names without the option that sets the budget, and where no method is there to be compared to.
    """
    return [control for name in names for control in _plan(name, methods)]


def pruning_of(methods: Sequence[Method]) -> TokenPruning | None:
    """The first method that drops visual tokens."""
    return next((m for m in methods if isinstance(m, TokenPruning)), None)


def keep_of(methods: Sequence[Method]) -> float | int | None:
    """What the first token-pruning method is asked to keep, a share as a float or a count as an int; None without such a method or option."""
    pruning = pruning_of(methods)
    keep = pruning.options().get("keep") if pruning else None
    return keep if isinstance(keep, float | int) else None


def reference_label(methods: Mapping[str, Sequence[Method]]) -> str | None:
    """Label of the variant whose density the sparse controls get: the first with a sparse-attention method."""
    return next((label for label, group in methods.items() if any(isinstance(m, SparseAttention) for m in group)), None)


def swept(methods: Mapping[str, Sequence[Method]], keeps: Sequence[float | int]) -> dict[str, list[Method]]:
    """The methods by label, those that can be told how much to keep once per value. Raises OptionError where none can."""
    found: dict[str, list[Method]] = {}
    for label, group in methods.items():
        pruning = pruning_of(group)
        if pruning is None or keep_of([pruning]) is None:
            found[label] = list(group)
            continue
        for keep in keeps:
            changed = [build(m.method_name(), {**m.options(), "keep": keep}) if m is pruning else m for m in group]
            found[" + ".join(describe(m) for m in changed)] = changed
    if not any(keep_of(group) is not None for group in found.values()):
        raise OptionError(f"keeps are tried on token-pruning methods that can be told how much to keep, got {', '.join(methods)}")
    return found


def describe(method: Method) -> str:
    """The method's name with what it keeps and the options that differ from their defaults."""
    keep = keep_of([method])
    shown = {**({} if keep is None else {"keep": keep}), **method.changed_options()}
    return f"{method.method_name()}({', '.join(f'{name}={value}' for name, value in shown.items())})" if shown else method.method_name()


def build_control(control: Control, methods: Sequence[Method], found: SampleRecord, *, seed: int) -> Method:
    """The control as it runs on one prompt. methods: those it is compared to, found: their sample. seed: of its own draws, other ones per prompt."""
    known = _options(method_class(control.name))
    kind = _kind(control.name)
    reference = next(m for m in methods if isinstance(m, kind))
    options = {**_shared(control.name, reference), **({"seed": seed} if "seed" in known else {})}
    if isinstance(reference, SparseAttention):
        # where the reference ran dense throughout, so does its control; whatever length its crossover names, a control of a sparse run runs sparse
        dense: dict[str, Any] = {"density": 1.0}
        return build(control.name, {**options, **(dense if found.density is None else {"density": found.density, "min_seq_len": 0})})
    keep = keep_of(methods)
    if keep is None:
        keep = 1.0 if found.kept_share is None else found.kept_share
    return build(control.name, {**options, "keep": keep})


def _plan(name: str, methods: Mapping[str, Sequence[Method]]) -> list[Control]:
    option = _BUDGETS[_kind(name)]
    beside = {label: m for label, group in methods.items() for m in group if isinstance(m, _kind(name)) and m.method_name() != name}
    if not beside:
        what = {"density": "the density of a sparse-attention method", "keep": "the budget of a token-pruning method"}[option]
        raise OptionError(f"the control {name} runs at {what}: name one")
    if option == "density":
        return [Control(f"{name} (same density)", name, (next(iter(beside)),))]
    groups: dict[str, list[str]] = {}
    for label, pruning in beside.items():
        keep = keep_of([pruning])
        budget = f"share kept by {label}" if keep is None else f"keep {keep}"
        shared = [f"{key} {value}" for key, value in _shared(name, pruning).items() if value != _default(name, key)]
        groups.setdefault(f"{name} ({', '.join([budget, *shared])})", []).append(label)
    return [Control(label, name, tuple(references)) for label, references in groups.items()]


def _kind(name: str) -> type[Method]:
    """The protocol of which this method can be a control. Raises OptionError for methods whose budget cannot be set."""
    cls = method_class(name)
    kind = next((kind for kind in _BUDGETS if issubclass(cls, kind)), SparseAttention)
    if _BUDGETS[kind] not in _options(cls):
        raise OptionError(f"{name} has no option {_BUDGETS[kind]!r}, so it cannot be a control of equal budget")
    return kind


def _shared(name: str, reference: Method) -> dict[str, Any]:
    """Options that the control takes over from the method it is compared to."""
    known = _options(method_class(name))
    return {option: value for option, value in reference.options().items() if option in _SHARED and option in known and value is not None}


def _default(name: str, option: str) -> Any:
    return next(f.default for f in fields(method_class(name)) if f.name == option)


def _options(cls: type[Method]) -> set[str]:
    return {f.name for f in fields(cls) if f.init}
