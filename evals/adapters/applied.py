"""Methods on the model of a harness, and what they did there: a run that stayed dense must not look like one that did not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from accel.errors import AccelError, OptionError
from accel.handle import Handle
from accel.patching import apply, check_together
from accel.protocols import KVCompression, Method, SparseAttention, TokenPruning
from accel.stats import CacheStats, Stats

logger = logging.getLogger("accel")


def read_methods(method: str | None, recipe: str | Path | None, beside: Sequence[str] = ()) -> list[Method]:
    """What a harness's `method=` (one, as `flexprefill:gamma=0.9`) or `recipe=` (a file) asks for; empty without either, for the dense baseline.

    beside: names of the harness's other arguments. It splits its arguments at commas, so a second option of the method ends up among them; that
    raises OptionError, as does anything wrong in the two.
    """
    from accel.cli.options import parse_method
    from accel.recipe import Recipe

    if method is not None and recipe is not None:
        raise OptionError(f"give a method or a recipe, which may hold several methods; got method={method} and recipe={recipe}")
    if recipe is not None:
        methods = list(Recipe.load(recipe).methods)
        check_together(methods)
        return methods
    if method is None:
        return []
    found = parse_method(method)
    if astray := sorted({field.name for field in fields(found)} & set(beside)):
        raise OptionError(
            f"{', '.join(astray)}: an option of {found.method_name()}, cut off at a comma, which separates the arguments of a model here. "
            f"Write several options into a recipe (recipe=FILE.yaml), or give the arguments as a mapping: {{'method': '{method},{astray[0]}=…', …}}"
        )
    return [found]


class Applied:
    """Methods on a model, with their counters told apart by what a harness asked for.

    handle: None where there are no methods. calls: what `counting` has counted, plain numbers, one entry each.
    """

    def __init__(
        self, model: Any, methods: Sequence[Method], *, require_effect: bool = False, tell: Callable[[str], None] = logger.info
    ) -> None:
        """Applies the methods. require_effect: `counting` raises AccelError where a method had no effect, instead of warning. tell: takes reports."""
        if require_effect and not methods:
            raise OptionError("require_effect asks that methods have an effect, and neither a method nor a recipe is given")
        self.methods = tuple(methods)
        self.handle: Handle | None = apply(model, *methods) if methods else None
        self.require_effect = require_effect
        self.calls: list[dict[str, Any]] = []
        self._tell = tell

    @contextmanager
    def counting(self, kind: str, n: int) -> Iterator[None]:
        """Counts what runs inside as `n` requests of one kind, and reports it."""
        if self.handle is None:
            yield
            return
        self.handle.stats.reset()
        yield
        self.calls.append({"kind": kind, "requests": n, **self.handle.stats.as_dict()})
        report = self.handle.report()
        idle = without_effect(self.methods, self.handle.stats)
        if idle and self.require_effect:
            raise AccelError(f"{', '.join(idle)} had no effect in {n} requests of {kind}:\n{report}")
        if idle:
            logger.warning("%s had no effect in %d requests of %s", ", ".join(idle), n, kind)
        self._tell(f"{n} requests of {kind}: {report}")

    def info(self) -> dict[str, Any]:
        """What was asked for, where it was put and what ran in this process, ready for JSON.

        AccelError where effects were required and no request came.
        """
        if self.handle is None:
            return {"methods": []}
        if self.require_effect and not self.calls:
            raise AccelError("no request reached the model, so no method had an effect: did all answers come from the harness's cache of responses?")
        return {
            "methods": [{m.method_name(): m.changed_options()} for m in self.methods],
            "patched_layers": list(self.handle.patched_layers),
            "skipped_layers": dict(self.handle.skipped_layers),
            "notices": list(self.handle.notices),
            "calls": self.calls,
        }

    def undo(self) -> None:
        """Takes the methods off; the counts stay."""
        if self.handle is not None:
            self.handle.undo()


def without_effect(methods: Sequence[Method], stats: Stats) -> list[str]:
    """Names of the methods of a kind that did nothing: no sparse attention call, no visual token dropped, no cache entry dropped."""
    tokens = stats.tokens
    acted = {
        SparseAttention.kind: stats.total.sparse_calls > 0,
        TokenPruning.kind: tokens.layer_tokens < tokens.all_layer_tokens or tokens.kept_structural < tokens.structural,
        KVCompression.kind: _shrank(stats.cache),
    }
    return [method.method_name() for method in methods if not acted[method.kind]]


def _shrank(cache: CacheStats) -> bool:
    if cache.kept_share is not None:
        return cache.kept_share < 1
    return bool(cache.held_by_layer) and cache.peak_bytes < cache.whole_bytes
