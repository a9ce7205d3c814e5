"""The handle that `accel.apply` returns: an undo log, counters, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from accel.protocols import Method
from accel.stats import PruningEvent, Stats

_MISSING = object()
# a layer of a higher density than this gains nothing from being sparse
NEARLY_DENSE = 0.9


class Handle:
    """What was changed on a model, and the way back. Use it as a context manager, or call `undo()`.

    methods: what is applied, in order. stats: counters since `apply` or `stats.reset()`.
    """

    def __init__(self, methods: Sequence[Method], host: str) -> None:
        self.methods = tuple(methods)
        self.host = host
        self.stats = Stats()
        self.patched_layers: list[int] = []
        self.skipped_layers: dict[int, str] = {}
        self.notices: list[str] = []
        self.prunes_tokens = False      # whether visual tokens may be dropped; not where the options keep everything
        self.is_active = False
        self._undo_log: list[Callable[[], None]] = []
        self._switches: list[Callable[[bool], None]] = []
        self._checks: list[Callable[[], str | None]] = []
        self._pauses = 0
        self._observers: list[Callable[..., None]] = []
        self._pruning_observers: list[Callable[[PruningEvent], None]] = []

    # --- for hosts ------------------------------------------------------------------------------------------------------------

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        """Sets an instance attribute, remembering the old object or that there was none."""
        old = vars(owner).get(name, _MISSING)

        def restore() -> None:
            if old is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

        self.on_undo(restore)
        setattr(owner, name, value)

    def on_undo(self, step: Callable[[], None]) -> None:
        """Adds a step to the undo log; steps run newest first."""
        self._undo_log.append(step)

    def on_pause(self, switch: Callable[[bool], None]) -> None:
        """Registers `switch(is_on)`, called when the methods are paused and resumed."""
        self._switches.append(switch)

    def on_report(self, check: Callable[[], str | None]) -> None:
        """Registers `check()`, asked for every report: a sentence where something took the methods out of use, or None."""
        self._checks.append(check)

    def notify(self, **event: Any) -> None:
        """Tells the observers of one sparse call."""
        for observer in self._observers:
            observer(**event)

    def notify_pruning(self, event: Callable[[], PruningEvent]) -> None:
        """Tells the observers of one pruning stage; `event` is built only where somebody listens."""
        if self._pruning_observers:
            built = event()
            for observer in self._pruning_observers:
                observer(built)

    # --- for users ------------------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Gives back the same objects, newest change first. May be called twice; all steps run even when one of them fails."""
        errors = []
        while self._undo_log:
            step = self._undo_log.pop()
            try:
                step()
            except Exception as error:  # collected and raised below: one failing step must not keep the others from running
                errors.append(error)
        self.is_active = False
        self._switches.clear()
        self._checks.clear()
        if errors:
            raise ExceptionGroup("undo could not restore everything", errors)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Runs the model as it was, for an A/B comparison without undoing. May be nested: the outermost end resumes."""
        self._pauses += 1
        self._switch()
        try:
            yield
        finally:
            self._pauses -= 1
            self._switch()

    def _switch(self) -> None:
        for switch in self._switches:
            switch(self._pauses == 0)

    @contextmanager
    def observe(self, observer: Callable[..., None]) -> Iterator[None]:
        """Calls `observer(step=AttentionStep, plan=BlockPlan, lens=Ragged)` after each sparse attention call."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    @contextmanager
    def observe_pruning(self, observer: Callable[[PruningEvent], None]) -> Iterator[None]:
        """Calls `observer(event)` after each stage at which visual tokens were asked to leave."""
        self._pruning_observers.append(observer)
        try:
            yield
        finally:
            self._pruning_observers.remove(observer)

    def __repr__(self) -> str:
        names = ", ".join(_describe(m) for m in self.methods)
        state = "patched" if self.is_active else "patched (undone)"
        n_layers = len(self.patched_layers) + len(self.skipped_layers)
        # pruning methods leave the layers themselves as they are
        where = f"{len(self.patched_layers)} of {n_layers} layers {state}" if n_layers else state
        return f"{names} on {self.host}: {where}"

    def report(self) -> str:
        """What was patched, what was skipped and why, what ran, in a few lines."""
        lines = [repr(self)]
        lines += [f"skipped {_ranges(layers)}: {reason}" for reason, layers in _by_reason(self.skipped_layers).items()]
        lines += self.notices
        lines += [trouble for check in self._checks if (trouble := check()) is not None]
        lines += [*self._token_lines(), *self._cache_lines()]
        counts_calls = self.patched_layers and any(m.kind == "sparse_attention" for m in self.methods)
        return "\n".join([*lines, *self._call_lines()] if counts_calls or self.stats.layers else lines)

    def _call_lines(self) -> list[str]:
        """Attention calls: how many sparse, how many dense and why."""
        total = self.stats.total
        sparse = f"{total.sparse_calls} sparse" + (f" (density {self.stats.density:.2f})" if self.stats.density is not None else "")
        dense = [f"{count} dense ({reason})" for reason, count in total.dense_calls.most_common()]
        full = _nearly_dense({i: layer.density for i, layer in sorted(self.stats.layers.items()) if layer.density is not None})
        return [*full, "calls: " + ", ".join([sparse, *dense])]

    def _token_lines(self) -> list[str]:
        """Visual tokens: how many of how many were kept."""
        if not self.prunes_tokens:
            return []
        tokens = self.stats.tokens
        skipped = [f"{count} left whole ({reason})" for reason, count in tokens.skipped.items() if count]
        if tokens.kept_share is None:
            return ["visual tokens: " + ", ".join(["no prompt with a picture yet", *skipped])]
        kept = f"{tokens.kept_patches} of {tokens.patches} left in {tokens.prompts} prompts ({tokens.kept_share:.1%} as a mean over the layers)"
        structural = [f"{tokens.kept_structural} of {tokens.structural} structural ones"] if tokens.structural else []
        return ["visual tokens: " + ", ".join([kept, *structural, *skipped])]

    def _cache_lines(self) -> list[str]:
        """Cache entries: how many of how many the last scale read, and bytes measured between attention calls."""
        if not any(m.kind == "kv_compression" for m in self.methods):
            return []
        cache = self.stats.cache
        skipped = [f"cache left whole in {count} calls: {reason}" for reason, count in cache.skipped.items() if count]
        if cache.held_by_layer:
            now, most = sum(cache.held_by_layer.values()), cache.peak_bytes
            held = f"{now} bytes held now, at most {most}, {cache.whole_bytes} without compression, in {cache.generations} prompts"
            return [f"cache: {held} (keys, values, positions and what the method records, no activations)", *skipped]
        if cache.kept_share is None:
            return ["cache: no generation yet", *skipped]
        last = max(cache.total)
        read = f"{cache.attended[last]} of {cache.total[last]} entries read at step {last} ({cache.kept_share:.1%}), {cache.generations} generations"
        held = f"at most {cache.peak_bytes} bytes held by one, {cache.whole_bytes} without compression (keys, values and positions, no activations)"
        return [f"cache: {read}", f"cache: {held}", "cache by step: " + ", ".join(str(n) for _, n in sorted(cache.bytes_by_scale.items())) + " bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def _describe(method: Method) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in method.changed_options().items())
    return f"{method.method_name()}({options})" if options else method.method_name()


def _by_reason(skipped: dict[int, str]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for layer, reason in sorted(skipped.items()):
        grouped.setdefault(reason, []).append(layer)
    return grouped


def _nearly_dense(densities: dict[int, float]) -> list[str]:
    """What to do about layers that read nearly everything; densities: of the layers that ran sparse."""
    full = [layer for layer, density in densities.items() if density > NEARLY_DENSE]
    if not full:
        return []
    if len(full) == len(densities):
        # leaving all of them dense would take the method off
        return [f"every sparse layer read more than {NEARLY_DENSE:.0%} of the blocks: a higher min_seq_len leaves such prompts dense"]
    return [f"layers {_ranges(full)} read more than {NEARLY_DENSE:.0%} of the blocks: dense_layers={full} spares them the selection"]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
