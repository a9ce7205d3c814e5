"""vLLM's `LLM` with methods: the same class, whose engine is built with them and asked afterwards whether it runs them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel.errors import OptionError, UnsupportedError
from accel.patches.hosts.vllm.cpu_fixes import apply_cpu_fixes

# before vLLM is imported, and with it torchvision
apply_cpu_fixes()

from accel.cli.options import parse_method  # noqa: E402
from accel.evals.models import pretrained_path  # noqa: E402
from accel.patches.hosts.vllm import compat  # noqa: E402
from accel.patches.hosts.vllm.checks import prepare  # noqa: E402
from accel.patches.hosts.vllm.metrics import Report, joined_stats, report_text, why_not_served  # noqa: E402
from accel.patching import resolve  # noqa: E402
from accel.protocols import Method  # noqa: E402
from accel.recipe import Recipe  # noqa: E402
from accel.stats import Stats  # noqa: E402

compat.require_vllm()
logger = logging.getLogger("accel")


class LLM(compat.LLM):
    """`vllm.LLM` with methods in it.

    method: a name, with options as in `flexprefill:gamma=0.9` or without, a method object, a `Recipe`, or a sequence of them. recipe: the same from a
    file. Exactly one of both, or neither for vLLM as it is. options: vLLM's own. model: what vLLM takes, or an embedded transformers model (smollm2).
    Raises UnsupportedError, with all reasons, before weights are loaded for what cannot work, and afterwards where a worker does not run the methods.
    """

    def __init__(
        self, model: str, method: str | Method | Recipe | Sequence[str | Method] | None = None, *, recipe: str | Path | None = None, **options: Any
    ) -> None:  # fmt: skip
        self.methods = tuple(_methods(method, recipe))
        path = pretrained_path(model)
        super().__init__(path, **(prepare(path, self.methods, options) if self.methods else options))
        reports: list[Report] = list(self.collective_rpc("accel_ready")) if self.methods else []
        reasons = why_not_served(reports, [m.method_name() for m in self.methods]) if self.methods else []
        if reasons:
            self.llm_engine.engine_core.shutdown()
            raise UnsupportedError(f"the engine was built, and does not run {', '.join(m.method_name() for m in self.methods)}:", reasons)
        for notice in dict.fromkeys(notice for report in reports for notice in report["notices"]):
            logger.warning(notice)

    def reports(self) -> list[Report]:
        """What each worker says of itself, as plain values; none without methods."""
        return list(self.collective_rpc("accel_report")) if self.methods else []

    @property
    def stats(self) -> Stats:
        """Counters since the engine was built, of all workers; a copy."""
        return joined_stats(self.reports())

    def report(self) -> str:
        """What was patched, what was skipped and why, what ran, in a few lines."""
        return report_text(self.methods, self.reports()) if self.methods else "vLLM as it is: no method was asked for"


def _methods(method: str | Method | Recipe | Sequence[str | Method] | None, recipe: str | Path | None) -> list[Method]:
    if recipe is not None:
        if method is not None:
            raise OptionError("methods are given by method or by recipe, not by both")
        return list(Recipe.load(recipe).methods)
    if method is None:
        return []
    given = [method] if isinstance(method, str | Method | Recipe) else method
    return resolve(*(parse_method(item) if isinstance(item, str) else item for item in given))
