"""The score of RULER's two QA tasks from lm-eval's samples: lm-eval (0.4.13 and before) computes another one.

An answer is right when one of the accepted answers is in it. lm-eval gives it the *share* of the accepted answers that are, and SQuAD's are often
several wordings of one, so that a right answer seldom gets the full score. HotpotQA has one accepted answer per question, and is not affected.
The average of the group `ruler` contains what lm-eval gives.

    python -m accel.evals.adapters.ruler_qa RESULTS_FOLDER      (of a run with --log_samples --output_path RESULTS_FOLDER)
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accel.cli.table import print_table
from accel.errors import AccelError

PREFIX = "ruler_qa_"


class Rescored(NamedTuple):
    """Scores in [0, 1] of the n samples of one length. reported: lm-eval's. score, stderr: recomputed; no stderr for a single sample."""

    n: int
    reported: float
    score: float
    stderr: float | None


def is_right(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an accepted answer is part of this one; capitals do not matter, and control characters count as line ends, as in RULER."""
    cleaned = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return any(text.lower() in cleaned for text in accepted)


def rescore(samples: Iterable[Mapping[str, Any]]) -> dict[int, Rescored]:
    """The scores by length, ascending, from lm-eval's samples of one QA task. Raises AccelError for other samples."""
    by_length: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for sample in samples:
        try:
            doc, answer = sample["doc"], sample["filtered_resps"][0]
            length, accepted = int(doc["max_length"]), doc["outputs"]
            reported = float(sample[str(length)])
        except (KeyError, IndexError, TypeError) as error:
            raise AccelError(f"this is no sample of a RULER QA task as lm-eval logs it: {type(error).__name__} {error}") from error
        by_length[length].append((reported, float(is_right(answer, accepted))))
    return {length: _mean(scores) for length, scores in sorted(by_length.items())}


def _mean(scores: list[tuple[float, float]]) -> Rescored:
    reported, right = zip(*scores, strict=True)
    stderr = statistics.stdev(right) / len(right) ** 0.5 if len(right) > 1 else None
    return Rescored(len(right), statistics.fmean(reported), statistics.fmean(right), stderr)


def rescore_results(results: Mapping[str, Any]) -> dict[str, dict[int, Rescored]]:
    """The scores by task and length, from what `lm_eval.simple_evaluate(…, log_samples=True)` returns; empty where no RULER QA task ran."""
    return {task: rescore(samples) for task, samples in (results.get("samples") or {}).items() if task.startswith(PREFIX)}


def rescore_folder(folder: Path) -> dict[str, dict[int, Rescored]]:
    """The scores by file and length, from the `samples_ruler_qa_*.jsonl` in and below a folder. AccelError where there are none."""
    files = sorted(folder.rglob(f"samples_{PREFIX}*.jsonl"))
    if not files:
        raise AccelError(f"no samples_{PREFIX}*.jsonl in or below {folder}: run lm-eval with --log_samples --output_path")
    found = {}
    for path in files:
        with path.open(encoding="utf-8") as lines:
            found[str(path.relative_to(folder))] = rescore(json.loads(line) for line in lines)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints the recomputed scores of a results folder."""
    parser = argparse.ArgumentParser(prog="python -m accel.evals.adapters.ruler_qa", description="RULER's QA scores from lm-eval's samples.")
    parser.add_argument("folder", type=Path, help="what was given to lm-eval as --output_path, together with --log_samples")
    try:
        found = rescore_folder(parser.parse_args(arguments).folder)
    except AccelError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [
        [name, str(length), str(row.n), f"{row.score:.4f}", "" if row.stderr is None else f"{row.stderr:.4f}", f"{row.reported:.4f}"]
        for name, by_length in found.items()
        for length, row in by_length.items()
    ]
    print_table(["samples", "tokens", "n", "score", "stderr", "lm-eval's"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
