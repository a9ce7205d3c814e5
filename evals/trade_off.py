"""What a method reaches on tasks, and in what share of dense's time: the objective of `accel tune … --objective accuracy@latency`."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import OptionError
from accel.evals.latency import OWN_DENSE, own_dense
from accel.evals.models import LoadedModel
from accel.evals.results import RunFolder, SampleRecord
from accel.evals.runner import require_samples, run_accuracy
from accel.evals.summary.fronts import mean_score
from accel.evals.summary.scores import BASELINE
from accel.evals.tasks import load_task
from accel.protocols import Method
from accel.tune.front import FrontResult, Measured

TRIED = "trial"


@dataclass(frozen=True)
class TradeOff:
    """Call it with a method: dense and the method answer the same prompts in turn, each timed as it is scored, after one untimed pass of its own.

    On a CPU our own dense kernel runs beside the model's, so that a better dense kernel is not taken for sparsity.

    A machine that warms up or has other work slows both, and their ratio stays. Samples are kept in `folder`, by the method's options: what was
    measured before a kill is not measured again.
    """

    loaded: LoadedModel
    tasks: Sequence[str]
    lengths: Sequence[int]
    n: int
    seed: int
    folder: Path

    def __post_init__(self) -> None:
        require_answers(self.tasks)
        # a prompt that cannot be made is no fault of the options that are tried
        require_samples(self.loaded, self.tasks, self.lengths, self.n, self.seed)

    def __call__(self, method: Method) -> Measured:
        options = json.dumps(method.options(), sort_keys=True, default=repr)
        config = {"command": "tune", "methods": {TRIED: json.loads(json.dumps([{method.method_name(): method.changed_options()}], default=repr))}}
        folder = RunFolder.create(self.folder / hashlib.sha256(options.encode()).hexdigest()[:16], config, resume=True)
        rows = run_accuracy(
            self.loaded, {TRIED: [method], **own_dense(self.loaded.model)}, self.tasks, self.lengths, n=self.n, seed=self.seed, folder=folder,
            progress=False, warmup=1,
        )  # fmt: skip
        mine, dense = (mean_score([row for row in rows if row["label"] == label], "score") for label in (TRIED, BASELINE))
        return Measured(mine[0], dense[0], time_share(folder.records), mine[1])


def require_answers(tasks: Sequence[str]) -> None:
    """Raises OptionError for tasks whose score is no share of right answers."""
    graded = [task for task in tasks if load_task(task).metric == "perplexity"]
    if graded:
        raise OptionError(f"accuracy@latency needs tasks that are scored by right answers; {', '.join(graded)} is scored by a perplexity")


def time_share(records: Sequence[SampleRecord]) -> float:
    """Prefill of the trial as a share of the faster dense one: by task and length the median of the ratios prompt by prompt, of these the geometric
    mean."""
    by_place: dict[tuple[str, int, int], dict[str, float]] = {}
    for record in records:
        by_place.setdefault((record.task, record.tokens, record.sample), {})[record.label] = record.prefill_ms
    ratios: dict[tuple[str, int], list[float]] = {}
    for (task, tokens, _), ms in by_place.items():
        ratios.setdefault((task, tokens), []).append(ms[TRIED] / min(ms[BASELINE], ms.get(OWN_DENSE, math.inf)))
    return math.exp(statistics.fmean(math.log(statistics.median(own)) for own in ratios.values()))


def tuning_result(found: FrontResult, *, margin: float, tasks: Sequence[str]) -> dict[str, Any]:
    """Sections of a result.json: `trials` for the tables and the picture, what must be known, and what it cannot claim."""
    rows = [{**row, "options": _plain(row["options"])} for row in found.rows]
    notices = [] if found.within_margin else [f"No trial came within {margin:g} of dense's score: the recipe is the one with the highest score."]
    dense = found.measured.dense_score
    if not found.has_basis:
        notices.append(f"Dense answers none of the prompts of {', '.join(tasks)}: no trial can lose anything against it, so that the recipe is the "
                       "fastest, whatever it does to answers. Choose tasks or lengths that the model can do.")  # fmt: skip
    elif dense <= margin:
        notices.append(f"Dense scores {dense:.3f}, no more than the margin of {margin:g}: no trial can lose more.")
    if found.measured.time_share >= 1:
        notices.append(f"The recipe is no faster than dense here ({found.measured.time_share:.2f} of its prefill time): dense needs no method.")
    limits = [
        f"The recipe is the best of {len(rows)} trials on these very prompts, so that score and gain are likely to be lower on others. Check it on "
        "prompts of another seed: accel run --recipe recipe.yaml --seed 1, then accel compare --gate.",
        "Time is that of the prefill, each prompt once: what a method saves or costs while tokens are written is not in it.",
    ]
    about = {"margin": margin, "tasks": list(tasks), "n_failed": found.n_failed}
    return {"trials": rows, "trials_about": about, "notices": notices, "limits": limits}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(options), default=repr))
    return plain
