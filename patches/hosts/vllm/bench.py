"""vLLM's own serving benchmark against a dense and a patched server, one after the other, with the same prompts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.patches.hosts.vllm import compat
from accel.patches.hosts.vllm.cpu_fixes import apply_cpu_fixes, name_vllm_cpu
from accel.protocols import Method
from accel.recipe import Recipe

# seconds: large models load for minutes
START_SECONDS, STOP_SECONDS = 1800.0, 60.0
METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (20, 80, 99)
# in front of the user's words, which win: prompts that two servers can be compared on, and the figures that the report shows
CLIENT = (
    "--save-detailed", "--seed", "0", "--temperature", "0", "--percentile-metrics", ",".join(METRICS),
    "--metric-percentiles", ",".join(map(str, PERCENTILES)),
)  # fmt: skip


def measure(
    model: str, variants: Mapping[str, Sequence[Method]], *, server: Sequence[str], client: Sequence[str], folder: Path, port: int | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per server: dense first, then each variant. What vLLM's client measured is left in `folder`, with the servers' logs and recipes.

    server, client: words for `vllm serve` and `vllm bench serve`. AccelError where a server does not start or the two were sent other prompts.
    """
    compat.require_vllm()
    rows: list[dict[str, Any]] = []
    asked: list[int] | None = None
    for number, (label, methods) in enumerate({"dense": [], **variants}.items()):
        name = f"{number}-{methods[0].method_name() if methods else 'dense'}"
        recipe = Recipe(tuple(methods)).save((folder / f"{name}.recipe.yaml").absolute()) if methods else None
        with started(model, recipe, words=server, log=folder / f"{name}.log", port=port or free_port()) as url:
            found = run_client(model, url, client)
            counted = own_metrics(url) if methods else {}
        (folder / f"{name}.client.json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        lengths = list(found["input_lens"])
        if asked is not None and lengths != asked:
            raise AccelError(f"{label} was sent other prompts than the dense server; without a fixed --seed of the client they cannot be compared")
        asked = lengths
        rows.append(served_row(label, found, counted, dense=rows[0] if rows else None))
    return rows


@contextmanager
def started(model: str, recipe: Path | None, *, words: Sequence[str], log: Path, port: int) -> Iterator[str]:
    """The address of a server that answers, ended on the way out. AccelError, with the end of its log, where it does not come up."""
    given = ["--recipe", str(recipe)] if recipe else []
    command = [sys.executable, "-m", "accel", "serve", model, *given, *words, "--host", "127.0.0.1", "--port", str(port)]
    print(f"starting: accel {' '.join(command[3:])}", file=sys.stderr)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, log)
        yield url
    finally:
        _end(process)


def run_client(model: str, url: str, words: Sequence[str]) -> dict[str, Any]:
    """What `vllm bench serve` measures of a server, as it would save it. Its own tables go to stderr."""
    from contextlib import redirect_stdout

    from accel.evals.models import pretrained_path

    apply_cpu_fixes()
    name_vllm_cpu()
    parser = compat.FlexibleArgumentParser(prog="vllm bench serve")
    compat.add_bench_arguments(parser)
    path = pretrained_path(model)
    named = ["--served-model-name", model] if path != model else []
    args = parser.parse_args(["--model", path, *named, "--base-url", url, *CLIENT, *words])
    with redirect_stdout(sys.stderr):
        return dict(compat.run_bench(args))


def own_metrics(url: str) -> dict[str, Any]:
    """Our counters of a patched server, as `counters` joins them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return counters(answer.read().decode())


def counters(text: str) -> dict[str, Any]:
    """Our counters in the text of `/metrics`. Calls are added up over workers, which have their own heads; density is weighted by their calls.

    Every worker counts every picture: visual tokens are those of the worker that saw most.
    """
    from prometheus_client.parser import text_string_to_metric_families

    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name.startswith("accel_")]

    def by_worker(name: str) -> dict[str, float]:
        return {s.labels["worker"]: float(s.value) for s in samples if s.name == name}

    sparse, density = by_worker("accel_sparse_calls_total"), by_worker("accel_attention_density")
    visual, kept = by_worker("accel_visual_tokens_total"), by_worker("accel_visual_tokens_kept_total")
    most = max(visual, key=lambda worker: visual[worker], default="")
    n_calls = sum(sparse[worker] for worker in density)
    dense: dict[str, int] = {}
    for s in samples:
        if s.name == "accel_dense_calls_total":
            dense[s.labels["reason"]] = dense.get(s.labels["reason"], 0) + int(s.value)
    return {
        "workers": len(sparse), "sparse_calls": int(sum(sparse.values())), "dense_calls": dense,
        "density": sum(share * sparse[worker] for worker, share in density.items()) / n_calls if n_calls else None,
        "visual_tokens": int(visual.get(most, 0)), "kept_tokens": int(kept.get(most, 0)),
    }  # fmt: skip


def served_row(label: str, found: Mapping[str, Any], counted: Mapping[str, Any], *, dense: Mapping[str, Any] | None) -> dict[str, Any]:
    """One server in the report. found: of vLLM's client; dense: the row of the dense server, None for itself."""
    row: dict[str, Any] = {
        "label": label, "is_baseline": dense is None, "completed": found["completed"], "asked": len(found["input_lens"]),
        "input_tokens": found["total_input_tokens"], "output_tokens": found["total_output_tokens"], "request_throughput": found["request_throughput"],
        "output_throughput": found["output_throughput"], "texts": list(found["generated_texts"]), **counted,
    }  # fmt: skip
    for metric in METRICS:
        row[f"{metric}_ms"] = {"median": found[f"median_{metric}_ms"], **{f"p{p}": found.get(f"p{p}_{metric}_ms") for p in PERCENTILES}}
    if dense is not None:
        row["same_texts"] = sum(ours == theirs for ours, theirs in zip(row["texts"], dense["texts"], strict=True))
        row["ttft_ratio"] = dense["ttft_ms"]["median"] / row["ttft_ms"]["median"] if row["ttft_ms"]["median"] else None
    return row


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AccelError(f"the server ended with exit code {process.returncode} before it answered; its log, {log}, ends with:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AccelError(f"the server did not answer within {START_SECONDS:.0f} s; its log: {log}")


def _tail(log: Path) -> str:
    """What we said in a log, where we did; its last lines otherwise."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # the last: a server that began well had said so before
    ours = max((i for i, line in enumerate(lines) if line.startswith("accel: ")), default=None)
    return "\n".join(lines[ours : ours + 8] if ours is not None else lines[-8:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server as Ctrl-C would, so that it takes its workers with it."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
