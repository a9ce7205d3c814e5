"""`accel.apply`: puts methods into a model, or leaves it untouched."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from accel.errors import OptionError, UnsupportedError
from accel.handle import Handle
from accel.protocols import KVCompression, Method, ModelInfo, SparseAttention
from accel.registry import build, method_names

if TYPE_CHECKING:
    from accel.recipe import Recipe

logger = logging.getLogger("accel")


def apply(model: Any, method: Method | str | Recipe, *more: Method | str | Recipe, **options: Any) -> Handle:
    """Puts one or several methods into `model` and returns the handle that takes them off again.

    method: a method object (`accel.FlexPrefill(gamma=0.9)`), a registry name, or a `Recipe`. `options` belong to a single name.
    Raises OptionError for unknown names, options and values, UnsupportedError (with `.reasons`) where the model or the combination
    cannot work, PatchError when the model is patched already. After any error the model is as it was.
    """
    methods = resolve(method, *more, **options)
    host = host_for(model)
    info = host.describe(model)
    name = host.__name__.split(".")[-2]
    reasons = _conflicts(methods) + _missing_layers(methods, info)
    for m in methods:
        others = [o for o in methods if o is not m]
        reasons += [f"{m.method_name()}: {reason}" for reason in (*host.refusals(m), *m.supports(info, name, others))]
    if reasons:
        raise UnsupportedError(f"cannot apply {', '.join(m.method_name() for m in methods)} to this {info.family} model:", reasons)
    handle = Handle(methods, name)
    handle.notices = [f"{m.method_name()}: {notice}" for m in methods if (notice := m.notice(info))]
    try:
        host.attach(model, [m.bind(info) for m in methods], info, handle)
    except BaseException:
        handle.undo()
        raise
    handle.is_active = True
    for notice in handle.notices:
        logger.warning(notice)
    return handle


def resolve(*items: Method | str | Recipe, **options: Any) -> list[Method]:
    """The method objects behind names, recipes and objects; `options` are allowed beside exactly one name."""
    from accel.recipe import Recipe

    methods: list[Method] = []
    for item in items:
        if isinstance(item, str):
            methods.append(build(item, options if len(items) == 1 else None))
        elif isinstance(item, Recipe):
            methods.extend(item.methods)
        elif isinstance(item, Method):
            methods.append(item)
        else:
            raise OptionError(f"a method is a name, a method object or a Recipe, got {item!r}. Methods: {', '.join(method_names())}")
    if options and not (len(items) == 1 and isinstance(items[0], str)):
        raise OptionError(f"options ({', '.join(options)}) go with a single method name; pass them to the method objects instead")
    return methods


@cache
def hosts() -> list[ModuleType]:
    """The host adapters that this installation can load, one per folder of `patches/hosts`."""
    folder = Path(__file__).parent / "patches" / "hosts"
    return [importlib.import_module(f"accel.patches.hosts.{p.parent.name}.host") for p in sorted(folder.glob("*/host.py"))]


def check_together(methods: Sequence[Method]) -> None:
    """Raises UnsupportedError where these methods cannot stand beside each other in any model; `apply`, which knows the model, asks more."""
    if reasons := _conflicts(methods):
        raise UnsupportedError(f"cannot apply {' and '.join(m.method_name() for m in methods)} together:", reasons)


def host_for(model: Any) -> ModuleType:
    """The host adapter for a model; raises UnsupportedError for anything else."""
    for host in hosts():
        if host.matches(model):
            return host
    if any(host.matches(getattr(model, "model", None)) for host in hosts()):
        raise UnsupportedError(f"accel cannot patch an object of type {type(model).__qualname__}; pass its `.model`")
    known = ", ".join(str(host.ACCEPTS) for host in hosts())
    raise UnsupportedError(f"accel cannot patch an object of type {type(model).__module__}.{type(model).__qualname__}; it takes: {known}")


def _missing_layers(methods: list[Method], info: ModelInfo) -> list[str]:
    named = {i for m in methods if isinstance(m, SparseAttention) for i in m.dense_layers if i >= info.n_layers}
    return [f"dense_layers names {', '.join(map(str, sorted(named)))}, but the model has {info.n_layers} layers"] if named else []


def _conflicts(methods: Sequence[Method]) -> list[str]:
    """Reasons why methods cannot stand beside each other (design.md §3)."""
    reasons = [] if methods else ["the recipe holds no method"]
    for kind, what in ((SparseAttention, "sparse-attention"), (KVCompression, "KV-compression")):
        names = [m.method_name() for m in methods if isinstance(m, kind)]
        if len(names) > 1:
            reasons.append(f"at most one {what} method fits into a model, got {', '.join(names)}")
    return reasons
