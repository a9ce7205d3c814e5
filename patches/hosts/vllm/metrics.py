"""What the workers of an engine report, joined: reasons not to serve, counters as `Handle.stats` has them, and the text of `/metrics`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from accel.handle import Handle
from accel.protocols import Method
from accel.stats import LayerStats, Stats

# of one worker (`Engine.report`); None where its engine was never told of us
Report = Mapping[str, Any]


def why_not_served(reports: Sequence[Report | None], methods: Sequence[str]) -> list[str]:
    """Why these workers do not run what was asked for, or cannot tell; empty where every one does. methods: names, in their order."""
    if not reports:
        return ["no worker answered"]
    found = []
    for i, report in enumerate(reports):
        if report is None:
            found.append(f"worker {i} was not told of {', '.join(methods)}")
        elif list(report["methods"]) != list(methods):
            found.append(f"worker {i} runs {', '.join(report['methods'])}, and {', '.join(methods)} was asked for")
        else:
            found += [f"worker {i}: {problem}" for problem in report["problems"]]
    return found


def joined_stats(reports: Sequence[Report]) -> Stats:
    """The counters of all workers of one engine. Each counts the attention calls of its own heads and layers, and every picture: calls and tiles
    are added up, visual tokens are those of the worker that saw most.
    """
    stats = Stats()
    for report in reports:
        for index, layer in report["layers"].items():
            # keys of a mapping may have become text on their way
            stats.layer(int(index)).add(LayerStats(
                layer["sparse_calls"], Counter(layer["dense_calls"]), layer["active_tiles"], layer["causal_tiles"],
            ))  # fmt: skip
    seen = max((report["tokens"] for report in reports), key=lambda tokens: int(tokens["visual"]), default=None)
    if seen is not None:
        tokens = stats.tokens
        tokens.prompts, tokens.patches, tokens.kept_patches = seen["prompts"], seen["visual"], seen["kept"]
        tokens.layer_tokens, tokens.all_layer_tokens = seen["kept_by_layer"], seen["whole_by_layer"]
    return stats


def report_text(methods: Sequence[Method], reports: Sequence[Report]) -> str:
    """What was patched, what was skipped and why, what ran, in a few lines: `Handle.report` of all workers."""
    handle = Handle(methods, "vllm")
    handle.is_active, handle.stats = True, joined_stats(reports)
    handle.patched_layers = sorted({i for report in reports for i in report["patched_layers"]})
    handle.skipped_layers = {int(i): reason for report in reports for i, reason in report["skipped_layers"].items()}
    handle.notices = list(dict.fromkeys(notice for report in reports for notice in report["notices"]))
    handle.prunes_tokens = any(m.kind == "token_pruning" for m in methods)
    left = sum((Counter(report["left_alone"]) for report in reports), Counter[str]())
    lines = [f"{n} forward passes left as they were ({reason})" for reason, n in left.most_common()]
    return "\n".join([handle.report(), *lines])


def exposition(reports: Sequence[Report]) -> str:
    """The counters in Prometheus' text format, per worker, as `/metrics` shows them."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Families(reports))
    return str(generate_latest(registry).decode())


class _Families:
    """A collector of prometheus_client over reports."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = reports

    def collect(self) -> list[Any]:
        """One family per counter, one sample per worker."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        workers = GaugeMetricFamily("accel_workers", "Workers that answered this request for their counters", value=len(self.reports))
        sparse = CounterMetricFamily("accel_sparse_calls", "Attention calls of one prompt in one layer that ran sparse", labels=["worker"])
        dense = CounterMetricFamily("accel_dense_calls", "The same, that ran dense, by reason", labels=["worker", "reason"])
        density = GaugeMetricFamily("accel_attention_density", "Share of the causal tiles that sparse calls computed", labels=["worker"])
        visual = CounterMetricFamily("accel_visual_tokens", "Visual tokens of pruned prompts", labels=["worker"])
        kept = CounterMetricFamily("accel_visual_tokens_kept", "Those of them that were kept", labels=["worker"])
        left = CounterMetricFamily("accel_passes_left_alone", "Forward passes that a method left as they were", labels=["worker", "reason"])
        for i, report in enumerate(self.reports):
            worker = str(i)
            sparse.add_metric([worker], report["sparse_calls"])
            for reason, n in report["dense_calls"].items():
                dense.add_metric([worker, reason], n)
            # no sample before the first sparse call: 0 would say that nothing was computed
            if report["density"] is not None:
                density.add_metric([worker], report["density"])
            visual.add_metric([worker], report["tokens"]["visual"])
            kept.add_metric([worker], report["tokens"]["kept"])
            for reason, n in report["left_alone"].items():
                left.add_metric([worker, reason], n)
        return [workers, sparse, density, dense, visual, kept, left]
