"""Controls: what runs beside a method with the same budget, so that a gain of its choice is not mistaken for a gain of its size.

A sparse-attention control gets the density that the first sparse method reached on the very same prompt; a token-pruning control the share or count
that the methods beside it are asked to keep, or the share that they reached on the very same prompt where that is another one: controls drop tokens
in front of the decoder, others inside it. A control of cache methods gets the share or count of entries that they are asked to keep, or the share
that they read in the end where they have no such option. No method is named here: a control is whatever has the option `density` or `keep`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accel.errors import AccelError, OptionError
from accel.evals.results import SampleRecord
from accel.protocols import KVCompression, Method, ModelInfo, SparseAttention, TokenPruning, Unit
from accel.registry import build, method_class

# what a control shares with the method it is compared to, apart from the budget
_SHARED = (
    "block_size", "min_seq_len", "dense_layers", "dense_kernel", "precision", "position_mode", "newline", "min_tokens", "budget_scope",
    "min_entries", "every", "protect_text",
)  # fmt: skip
_BUDGETS: dict[type[Method], str] = {SparseAttention: "density", TokenPruning: "keep", KVCompression: "keep"}
# by the same kinds, what a control runs at
_RUNS_AT: dict[type[Method], str] = {
    SparseAttention: "the density of a sparse-attention method", TokenPruning: "the budget of a token-pruning method",
    KVCompression: "the budget of a method that compresses the cache",
}  # fmt: skip
_KEEPING = (TokenPruning, KVCompression)
# a picture of a usual size, on which what a method is asked to keep is compared to what the layers see; the rest is rounding
_PICTURE = Unit(0, 576, 24, 24)
_ROUNDING = 0.02
# of a path, as many as can be told apart in a label
MOST_PARTS = 64


@dataclass(frozen=True)
class Control:
    """label: its name in tables. name: of the method. references: labels that it is compared to; the budget is that of the first.

    keep: a share as a float or a count as an int; None for the share, or the density, that the first reference reached on the same prompt.
    by_cache: of an image model's cache, as many entries as the reference stored at most between two scales, not as many as it read at the last.
    """

    label: str
    name: str
    references: tuple[str, ...]
    keep: float | int | None = None
    by_cache: bool = False


def plan_controls(names: Sequence[str], methods: Mapping[str, Sequence[Method]], info: ModelInfo | None = None) -> list[Control]:
    """The controls that the methods (by label) need: one per name, for methods that are told how much to keep one per name and budget.

    info: of the model, which tells whether its layers see on average what a method is asked to keep; without it, that is taken for granted.
    Raises OptionError for names without the option that sets the budget, and where no method is there to be compared to.
    """
    return [control for name in names for control in _plan(name, methods, info)]


def keep_of(methods: Sequence[Method]) -> float | int | None:
    """What the methods are asked to keep, a share as a float or a count as an int.

    None where none of them drops visual tokens or cache entries, where several do, and where the one that does has no such option.
    """
    keeping = [m for m in methods if isinstance(m, _KEEPING)]
    keep = keeping[0].options().get("keep") if len(keeping) == 1 else None
    return keep if isinstance(keep, float | int) else None


def reference_label(methods: Mapping[str, Sequence[Method]]) -> str | None:
    """Label of the variant whose density the sparse controls get: the first with a sparse-attention method."""
    return next((label for label, group in methods.items() if any(isinstance(m, SparseAttention) for m in group)), None)


def swept(methods: Mapping[str, Sequence[Method]], keeps: Sequence[float | int]) -> dict[str, list[Method]]:
    """The methods by label, those that can be told how much to keep once per value. Raises OptionError where none can."""
    found: dict[str, list[Method]] = {}
    for label, group in methods.items():
        if keep_of(group) is None:
            found[label] = list(group)
            continue
        for keep in keeps:
            changed = [build(m.method_name(), {**m.options(), "keep": keep}) if isinstance(m, _KEEPING) else m for m in group]
            add_variant(found, changed)
    if not any(keep_of(group) is not None for group in found.values()):
        got = ", ".join(methods) or "none"
        raise OptionError(f"keeps are tried on methods that prune tokens or compress the cache and can be told how much to keep, got {got}")
    return found


def add_variant(variants: dict[str, list[Method]], methods: Sequence[Method]) -> str:
    """Adds methods under a label of their own, which is returned: files of one name show as much of their paths as tells them apart."""
    label = ""
    for n_parts in range(1, MOST_PARTS + 1):
        label = " + ".join(describe(m, n_parts=n_parts) for m in methods)
        if variants.get(label, list(methods)) == list(methods):
            break
    variants[label] = list(methods)
    return label


def describe(method: Method, *, n_parts: int = 1) -> str:
    """The method's name with what it keeps and the options that differ from their defaults.

    n_parts: of files, so many of the last parts of the path: whole ones make labels that no table can hold.
    """
    keep = keep_of([method])
    files = {f.name for f in fields(method) if f.metadata.get("is_path")}
    changed = {name: Path(*Path(value).parts[-n_parts:]) if name in files and value else value for name, value in method.changed_options().items()}
    shown = {**({} if keep is None else {"keep": keep}), **changed}
    return f"{method.method_name()}({', '.join(f'{name}={value}' for name, value in shown.items())})" if shown else method.method_name()


def build_control(control: Control, methods: Sequence[Method], found: SampleRecord) -> Method:
    """The control as it runs on one prompt. methods: those it is compared to, found: their sample; a control that draws draws anew for each."""
    known = _options(method_class(control.name))
    reference = _reference(control.name, methods)
    assert reference is not None
    options = {**_shared(control.name, reference), **({"seed": _seed(found)} if "seed" in known else {})}
    if isinstance(reference, SparseAttention):
        # where the reference ran dense throughout, so does its control; whatever length its crossover names, a control of a sparse run runs sparse
        dense: dict[str, Any] = {"density": 1.0}
        return build(control.name, {**options, **(dense if found.density is None else {"density": found.density, "min_seq_len": 0})})
    if control.by_cache and found.cache is not None:
        return build(control.name, {**options, "keep": max(2, round(max(found.cache["retained"])))})
    # a prompt that the reference left whole is no budget to be beaten at
    is_reached = control.keep is None or (isinstance(reference, TokenPruning) and found.kept_share is None and bool(found.not_pruned))
    return build(control.name, {**options, "keep": _reached(reference, found) if is_reached else control.keep})


def _plan(name: str, methods: Mapping[str, Sequence[Method]], info: ModelInfo | None) -> list[Control]:
    kind = _kind(name)
    beside = {label: reference for label, group in methods.items() if (reference := _reference(name, group)) is not None}
    if not beside:
        raise OptionError(f"the control {name} runs at {_RUNS_AT[kind]}: name one")
    if _BUDGETS[kind] == "density":
        return [Control(f"{name} (same density)", name, (next(iter(beside)),))]
    groups: dict[tuple[str, float | int | None], list[str]] = {}
    stored = []
    for label, reference in beside.items():
        if info is not None and isinstance(reference, KVCompression) and not _stores_what_it_reads(reference, info):
            stored.append(Control(f"{name} (cache of {label})", name, (label,), by_cache=True))
        keep = keep_of([m for m in methods[label] if isinstance(m, kind)])
        if keep is not None and info is not None and isinstance(reference, TokenPruning) and not _sees_what_is_asked(reference, keep, info):
            keep = None
        budget = f"share kept by {label}" if keep is None else f"keep {keep}"
        shared = [f"{key} {value}" for key, value in _shared(name, reference).items() if value != _default(name, key)]
        groups.setdefault((f"{name} ({', '.join([budget, *shared])})", keep), []).append(label)
    return [*(Control(label, name, tuple(references), keep) for (label, keep), references in groups.items()), *stored]


def _reference(name: str, methods: Sequence[Method]) -> Method | None:
    """The first of the methods that this control can be compared to: of its kind, and not the same."""
    return next((m for m in methods if isinstance(m, _kind(name)) and m.method_name() != name), None)


def _stores_what_it_reads(method: KVCompression, info: ModelInfo) -> bool:
    """Whether a cache that is as large takes as much memory: heads of a next-scale model that are given much store less, having no more to store."""
    if info.scale_shapes is None or len(info.scale_shapes) < 2:
        return True
    sizes = [height * width for height, width in info.scale_shapes]
    try:
        bound = method.bind(info)
        stored, read = (
            sum(min(end, group.budget) * len(group.heads) for layer in range(info.n_layers) for group in bound.groups(
                info, layer, step=step, n_entries=end))
            for step, end in ((len(sizes) - 2, sum(sizes[:-1])), (len(sizes) - 1, sum(sizes)))
        )  # fmt: skip
    except AccelError:
        # it does not run on this model at all, and says so when it is applied
        return True
    mean = read / (info.n_layers * info.n_kv_heads)
    even = min(mean, sum(sizes[:-1])) * info.n_layers * info.n_kv_heads
    return abs(stored - even) <= _ROUNDING * even


def _sees_what_is_asked(method: TokenPruning, keep: float | int, info: ModelInfo) -> bool:
    """Whether the decoder layers see, as a mean, what the method is asked to keep. False where only a run can tell."""
    try:
        bound = method.bind(info)
        stages = bound.stages(info)
    except AccelError:
        # it does not run on this model at all, and says so when it is applied
        return True
    if all(not stage.layer for stage in stages):
        return True
    seen, left, begin = 0, _PICTURE.n_tokens, 0
    for stage in stages:
        counts = bound.count(stage, [_PICTURE])
        if counts is None:
            return False
        layer = stage.layer or 0
        seen, left, begin = seen + left * (layer - begin), counts[0], layer
    mean = (seen + left * (info.n_layers - begin)) / info.n_layers
    wanted = keep if isinstance(keep, int) else keep * _PICTURE.n_tokens
    return abs(mean - wanted) <= _ROUNDING * wanted


def _reached(reference: Method, found: SampleRecord) -> float:
    """The share that a method kept of one prompt, never nothing: a control keeps a token, or an entry, at least."""
    if isinstance(reference, KVCompression):
        # of a decoder, of its bytes; of a next-scale model, of the entries read at the last scale
        kept, whole = (None, 1) if found.cache is None else (found.cache["kept_share"], found.cache["whole"][-1])
    else:
        kept, whole = found.kept_share, found.visual_tokens
    return 1.0 if kept is None else min(1.0, max(kept, 1 / max(whole, 1)))


def _seed(found: SampleRecord) -> int:
    """Of a control's own draws: others for each prompt, and in each run of another seed."""
    return int.from_bytes(hashlib.sha256(f"{found.seed} {found.sample}".encode()).digest()[:4])


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
