"""Finished run folders made by hand, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accel.evals.results import SampleRecord
from accel.evals.summary.scores import summarise

GAMMA = 0.9


def write_run(
    folder: Path, hits: Mapping[str, Sequence[float]], *, dense: Sequence[float] | None = None, controls: Sequence[str] = (), seed: int = 0,
    samples: int | None = None, prompt: str = "p", model: str = "tiny", device: str = "CPU, 1 threads", prefill_ms: Mapping[str, float] | None = None,
    log_prob: Mapping[str, float] | None = None, metric: Any = "exact", env: Mapping[str, Any] | None = None, n_missing: int = 0, tokens: int = 1024,
    gamma: float = GAMMA,
) -> Path:  # fmt: skip
    """A folder of `accel run` on needle. hits: by label, of single-answer prompts; dense is right everywhere unless told otherwise."""
    n = max(map(len, hits.values()))
    everything = {"dense": dense or [1.0] * n, **hits}
    records = [
        SampleRecord(
            task="needle", label=label, options=[] if label == "dense" else [{"toy": {"gamma": gamma}}], tokens=tokens, sample=i, seed=seed,
            n_tokens=tokens, prompt_hash=f"{prompt}{i}", log_prob=None if log_prob is None else log_prob[label], exact=float(hit),
            log_probs=[] if log_prob is None else [log_prob[label]], hits=[float(hit)], questions=["key (at 50%)"], expected=["1"], answers=["1"],
            density=None if label == "dense" else 0.5, sparse_calls=0, dense_calls={}, prefill_ms=(prefill_ms or {}).get(label, 100.0),
        )
        for label, own in everything.items() for i, hit in enumerate(own)
    ]  # fmt: skip
    shown = [r for r in records if samples is None or r.sample < samples]
    rows = [summarise([r for r in shown if r.label == label], metric) for label in everything]
    result = {
        "schema": 1, "command": "run", "title": "tiny: accuracy", "model": model, "dtype": "float32", "device": device, "created": "now",
        "config": {"command": "run", "seed": seed, "samples": samples or n, "controls": list(controls),
                   "methods": {label: [{"toy": {"gamma": gamma}}] for label in hits if label not in controls}},
        "env": {"torch": "2.13", "accel": "0.1", **(env or {})}, "scores": rows, "n_missing": n_missing,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_bench(folder: Path, ms: Mapping[str, float], *, model: str = "tiny", device: str = "CPU, 1 threads", gamma: float = GAMMA) -> Path:
    """A folder of `accel bench` at 1024 tokens. ms: time to first token by label; the first is the stock dense attention."""
    stock = next(iter(ms))
    rows = [
        {"metric": "ttft_ms", "label": label, "tokens": 1024, "ms": {"median": value, "p20": value, "p80": value, "n": 3},
         "methods": [] if label == stock else [{"method": "dense" if label.startswith("dense") else "toy", "gamma": gamma, "block_size": 64}],
         "speedup": {base: ms[base] / value for base in ms if base.startswith("dense")}, "selection_share": None, "density": None, "sparse_calls": 0,
         "dense_calls": {}, "peak_bytes": None, "note": "", "is_baseline": label.startswith("dense")}
        for label, value in ms.items()
    ]  # fmt: skip
    result = {"schema": 1, "command": "bench", "model": model, "dtype": "float32", "device": device, "created": "now", "config": {"seed": 0},
              "env": {"torch": "2.13", "accel": "0.1"}, "latency": rows}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder
