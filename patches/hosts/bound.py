"""Changes of one model instance that its copies do not inherit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from accel.handle import Handle


class Replaced:
    """Stands in an instance's `__dict__` for the method `name` and calls `around(original, *args, **kwargs)`.

    transformers reads the signature of some methods; `functools.update_wrapper` keeps it. A plain function would stay bound to the old model
    when the model is copied, and the copy would encode its pictures with somebody else's weights.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self.owner, self.name, self.around = owner, name, around
        self.original = getattr(owner, name)
        functools.update_wrapper(self, self.original)
        self.__signature__ = inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return outside_graph(partial(self.around, self.original, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # the copy of the owner is in the making and already in the memo
        return getattr(type(self.owner), self.name).__get__(memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def outside_graph(call: Callable[..., Any], *args: Any) -> Any:
    """Runs `call` eagerly, also while a compiler traces."""
    if not torch.compiler.is_compiling():
        return call(*args)
    disable: Any = torch.compiler.disable
    return disable(call)(*args)


def replace_method(owner: Any, name: str, around: Callable[..., Any], handle: Handle) -> None:
    """Puts `around` in front of `owner.name` until the handle is undone."""
    handle.set_attr(owner, name, Replaced(owner, name, around))


class Hook:
    """A module hook that copies and pickles of the model keep without effect."""

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return None if self.call is None else self.call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class Loss:
    """Stands in `_loss_function` of a model: around(original, logits, labels, …). Copies get the original."""

    def __init__(self, original: Callable[..., Any], around: Callable[..., Any]) -> None:
        self.original, self.around = original, around

    def __call__(self, logits: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        return outside_graph(partial(self.around, self.original, logits, labels, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.original

    def __reduce__(self) -> Any:
        return _itself, (self.original,)


def _itself(thing: Any) -> Any:
    return thing


class Mark:
    """On a model that methods (names) are in; copies carry none."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return Mark([])

    def __reduce__(self) -> tuple[type[Mark], tuple[list[str]]]:
        return Mark, ([],)
