"""Finished run folders side by side: what may be compared, paired tests between methods and dense, and accuracy against time over all of them.

Folders of `accel run` bring scores, those of `accel bench` times. A method of both is joined by its label and options. What must not be mixed is
refused (other models) or told and kept apart (other prompts, other machines).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.results import SCHEMA, SampleKey, SampleRecord
from accel.evals.summary.fronts import CLEAN, front_rows, without_times
from accel.evals.summary.run import log_prob_tasks
from accel.evals.summary.scores import BASELINE
from accel.evals.summary.significance import compared
from accel.registry import build

Row = dict[str, Any]
# environment that scores may depend on, and must not in CI
_VERSIONS = ("accel", "git", "torch", "transformers")
_SCORING = {"questions": "how questions are asked", "shared_prefill": "whether prefills are shared"}


@dataclass(frozen=True)
class Source:
    """One folder. name: of the folder, unlike those beside it. records: of `accel run`, finished samples under the labels of that run."""

    name: str
    path: Path
    result: Mapping[str, Any]
    records: list[SampleRecord]

    @property
    def is_run(self) -> bool:
        return bool(self.result["command"] == "run")

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.result.get("config", {})
        return found

    @property
    def machine(self) -> str:
        """Times of equal machines, and of batches of equal size, may stand in one picture."""
        batch = self.config.get("batch_size") or 1
        parts = [str(self.result[key]) for key in ("device", "dtype") if self.result.get(key)]
        return ", ".join([*parts, *([f"batches of {batch}"] if batch > 1 else [])])

    @property
    def scores(self) -> list[Row]:
        """Rows of `scores` without the tasks about pictures that failed their gate, and without times that cannot be compared."""
        failed = {gate["task"] for gate in self.result.get("gates", []) if not gate["passes"]}
        shown = [dict(row) for row in self.result.get("scores", []) if row["task"] not in failed]
        return without_times(shown) if self.config.get("shared_prefill") else shown

    @property
    def methods(self) -> list[str]:
        """Labels of what was to be measured: neither dense nor a control."""
        return list(self.config.get("methods") or {})


def read_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The folders of finished runs. AccelError for what is no such folder, UnsupportedError for folders of several models."""
    folders = [Path(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise OptionError(f"a folder is named twice: {', '.join(map(str, folders))}")
    names = _names(folders)
    sources = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    models = {source.name: source.result.get("model") for source in sources if source.result.get("model")}
    if len(set(models.values())) > 1:
        reasons = [f"{name}: {model}" for name, model in models.items()]
        raise UnsupportedError("these runs are of different models, so that neither scores nor times can be compared:", reasons)
    if not any(source.is_run for source in sources):
        raise OptionError("none of these folders holds scores: name at least one of `accel run`")
    return sources


def compare(sources: Sequence[Source]) -> dict[str, Any]:
    """A result like that of a run, for reports: `sources`, `scores`, `comparisons`, `fronts`, `latency`, and as `notices` what is not comparable."""
    names = display_names(sources)
    runs, benches = [s for s in sources if s.is_run], [s for s in sources if not s.is_run]
    records = [record for source in runs for record in renamed(source, names)]
    scores = _side_by_side([{**row, "label": names[source.name, row["label"]]} for source in runs for row in source.scores])
    failed = {gate["task"] for source in runs for gate in source.result.get("gates", []) if not gate["passes"]}
    fronts = _fronts(sources, names)
    notices = [*_unlike(sources), *_timed_twice(benches), *_prompts_that_differ(runs), *_fronts_apart(runs), *_unfinished(runs), *_failed_gates(runs),
               *_without_front(scores, fronts)]  # fmt: skip
    labels = {source.name: f" [{source.name}]" if len(benches) > 1 else "" for source in benches}
    return {
        "schema": SCHEMA, "command": "compare", "title": f"{', '.join(s.name for s in sources)}: accuracy against time",
        "model": next((s.result["model"] for s in sources if s.result.get("model")), None),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": [_describe(source) for source in sources], "notices": notices, "scores": scores,
        "comparisons": compared(records, _pairs(runs, names), log_prob_tasks=log_prob_tasks(scores), left_out=failed),
        "fronts": fronts,
        "latency": [{**row, "label": row["label"] + labels[source.name]} for source in benches for row in source.result.get("latency", [])],
        "config": {"folders": [str(source.path) for source in sources]}, "env": {source.name: source.result.get("env", {}) for source in sources},
    }  # fmt: skip


def display_names(sources: Sequence[Source]) -> dict[tuple[str, str], str]:
    """By folder and label, the name in tables: the label, with its folder behind it where several folders have scores under that label of the same
    task and length, or other options. Folders of other lengths share the columns of tables, and the rows over all."""
    runs = [source for source in sources if source.is_run]
    places = {source.name: dict.fromkeys((record.label, record.task, record.tokens) for record in source.records) for source in runs}
    n_folders = Counter(place for own in places.values() for place in own)
    methods = {(label, _as_text(source.config["methods"][label])) for source in runs for label in source.methods}
    other_options = {label for label, n in Counter(label for label, _ in methods).items() if n > 1}
    twice = {label for (label, _, _), n in n_folders.items() if n > 1} | other_options
    return {(name, label): f"{label} [{name}]" if label in twice else label for name, own in places.items() for label, _, _ in own}


def renamed(source: Source, names: Mapping[tuple[str, str], str]) -> list[SampleRecord]:
    """The samples of a folder under their names in tables."""
    return [replace(record, label=names[source.name, record.label]) for record in source.records]


# --- reading ------------------------------------------------------------------------------------------------------------------


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with those above them as far as needed to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _read(folder: Path, name: str) -> Source:
    if not folder.is_dir():
        raise AccelError(f"{folder} is {'no folder' if folder.exists() else 'not there'}: name the folder that a run has written")
    file = folder / "result.json"
    if not file.exists():
        raise AccelError(f"{folder} holds no result.json: the run has not finished, or this is not a run folder")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AccelError(f"cannot read {file}: {error}") from error
    command = result.get("command") if isinstance(result, dict) else None
    if command not in ("run", "bench"):
        raise AccelError(f"{folder} was written by `accel {command or '…'}`: compare takes folders of `accel run` and `accel bench`")
    records = _records(folder) if command == "run" else []
    if command == "run" and not records:
        raise AccelError(f"{folder} holds no samples: its samples.jsonl is missing or empty")
    # samples beyond the settings of the run stay out of its tables, and so out of every comparison
    shown = {(row["task"], row.get("tokens") or 0, row["label"]) for row in result.get("scores", [])}
    n = result.get("config", {}).get("samples")
    mine = [r for r in records if (r.task, r.tokens, r.label) in shown and (n is None or r.sample < n)]
    if lacking := shown - {(r.task, r.tokens, r.label) for r in mine}:
        task, tokens, label = sorted(lacking)[0]
        raise AccelError(f"{folder}: result.json has scores of {label} on {_place(task, tokens)}, and samples.jsonl has none of its samples")
    return Source(name, folder, result, mine)


def _records(folder: Path) -> list[SampleRecord]:
    """The finished samples, each once; a last line that is only half there is left alone, since the run may be going on."""
    found: dict[SampleKey, SampleRecord] = {}
    for file in sorted(folder.glob("samples*.jsonl")):
        data = file.read_bytes()
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
            try:
                record = SampleRecord(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise AccelError(f"{file}, line {number}, is no sample of this version of accel: {error}") from error
            # a file of a further process that has been taken in may still lie there
            found.setdefault(record.key, record)
    return list(found.values())


def _describe(source: Source) -> Row:
    config, env = source.config, source.result.get("env", {})
    return {
        "name": source.name, "command": source.result["command"], "model": source.result.get("model"), "machine": source.machine,
        "seed": config.get("seed"), "samples": config.get("samples"), "created": source.result.get("created"), "accel": env.get("accel"),
        "git": env.get("git"),
    }  # fmt: skip


# --- what is compared with what -----------------------------------------------------------------------------------------------


def _pairs(runs: Sequence[Source], names: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    """Each method with the dense model of its own folder; then methods of later folders with the first folder's method of that label, or its only
    one."""
    pairs = [
        (names[source.name, label], names[source.name, BASELINE])
        for source in runs for label in source.methods if (source.name, label) in names and (source.name, BASELINE) in names
    ]  # fmt: skip
    first, *later = runs
    for source in later:
        for label in source.methods:
            only = first.methods[0] if len(first.methods) == len(source.methods) == 1 else None
            other = label if label in first.methods else only
            if other is not None and (source.name, label) in names and (first.name, other) in names:
                pairs.append((names[source.name, label], names[first.name, other]))
    # folders of other lengths have the same names
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]


def _fronts(sources: Sequence[Source], names: Mapping[tuple[str, str], str]) -> list[Row]:
    """Rows of `fronts.front_rows` for each machine and set of prompts; `machine`, and `prompts` (the folders), are named where there are several.

    Means over other prompts differ by what was asked, too, so that they share no front.
    """
    runs = [source for source in sources if source.is_run]
    machines, groups = list(dict.fromkeys(source.machine for source in runs)), _by_prompts(runs)
    rows = []
    for machine, group in itertools.product(machines, groups):
        mine = [source for source in sources if source.machine == machine and (source in group or not source.is_run)]
        scores = [{**row, "label": names[source.name, row["label"]]} for source in mine if source.is_run for row in source.scores]
        if not scores:
            continue
        timed, copies = _joined_times(mine, names, scores)
        baselines, others = ([row for row in scores if bool(row.get("is_baseline")) == wanted] for wanted in (True, False))
        found = front_rows([*baselines, *copies, *others], timed)
        about = {**({"machine": machine} if len(machines) > 1 else {}), **({"prompts": _folders(group)} if len(groups) > 1 else {})}
        rows += [{**row, **about} for row in found]
    return rows


def _by_prompts(runs: Sequence[Source]) -> list[list[Source]]:
    """The runs in groups: two of one group have the same prompts at each task and length that both have."""
    prompts: dict[str, dict[tuple[str, int], set[str]]] = {}
    for source in runs:
        own = prompts.setdefault(source.name, {})
        for r in source.records:
            own.setdefault((r.task, r.tokens), set()).add(r.prompt_hash)
    groups: list[list[Source]] = []
    for source in runs:
        mine = prompts[source.name]
        fits = (g for g in groups if all(mine[place] == prompts[s.name][place] for s in g for place in mine.keys() & prompts[s.name].keys()))
        if (group := next(fits, None)) is None:
            groups.append(group := [])
        group.append(source)
    return groups


def _folders(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources)


def _side_by_side(scores: Sequence[Row]) -> list[Row]:
    """The rows by task, in the order in which tasks come, and length; within these as they are, folder by folder."""
    tasks = list(dict.fromkeys(row["task"] for row in scores))
    return sorted(scores, key=lambda row: (tasks.index(row["task"]), row.get("tokens") or 0))


def _joined_times(sources: Sequence[Source], names: Mapping[tuple[str, str], str], scores: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Times to first token under the labels of the scores; and rows of dense's score for each further way to run dense that was timed."""
    timed: list[Row] = []
    others: dict[str, None] = {}
    runs = [source for source in sources if source.is_run]
    for source in sources:
        for row in source.result.get("latency", []):
            if row["metric"] != CLEAN:
                continue
            if row["is_baseline"]:
                # the unpatched model is the run's dense; our own dense path computes the same, faster
                stock = [names[run.name, BASELINE] for run in runs if (run.name, BASELINE) in names]
                labels = [row["label"]] if row["methods"] else stock
                others |= dict.fromkeys(labels if row["methods"] else [])
            else:
                labels = [names[run.name, row["label"]] for run in runs
                          if (run.name, row["label"]) in names and _is_same(row, run.config["methods"].get(row["label"]))]  # fmt: skip
            timed += [{**row, "label": label} for label in labels]
    dense = next((names[run.name, BASELINE] for run in runs if (run.name, BASELINE) in names), None)
    return timed, [{**row, "label": label} for label in others for row in scores if row["label"] == dense]


def _is_same(row: Mapping[str, Any], methods: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a row of `accel bench` is of these methods, written as `accel run` keeps them: the options that were changed."""
    if methods is None or len(methods) != len(row["methods"]):
        return False
    for timed, entry in zip(row["methods"], methods, strict=True):
        [(name, changed)] = entry.items()
        # a recipe's label does not tell its options: those that the run left at their defaults count too
        wanted = {**{option: value for option, value in _defaults(name).items() if option in timed}, **changed}
        if timed["method"] != name or any(_plain(timed.get(option)) != _plain(value) for option, value in wanted.items()):
            return False
    return True


def _defaults(name: str) -> Mapping[str, Any]:
    """The options of a method with nothing changed; empty for one that is not installed here."""
    try:
        return build(name).options()
    except OptionError:
        return {}


def _plain(value: Any) -> Any:
    return json.loads(_as_text(value))


def _as_text(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


# --- what is not comparable ---------------------------------------------------------------------------------------------------


def _unlike(sources: Sequence[Source]) -> list[str]:
    """A line for whatever differs between folders and may move scores or times."""
    lines = []
    if len(machines := _values(sources, lambda s: s.machine or None)) > 1:
        lines.append(f"Other machines, threads, data types or batches, so that times stand apart: {_told(machines)}.")
    runs = [source for source in sources if source.is_run]
    if len(dtypes := _values(runs, lambda s: s.result.get("dtype"))) > 1:
        lines.append(f"Other data types: differences between folders hold the rounding too ({_told(dtypes)}).")
    if len(seeds := _values(runs, lambda s: s.config.get("seed"))) > 1:
        lines.append(f"Other seeds make other prompts, which are not compared one by one ({_told(seeds)}).")
    for key, what in _SCORING.items():
        if len(found := _values(runs, lambda s, key=key: str(s.config.get(key, "not set")))) > 1:
            lines.append(f"The folders differ in {what}: differences between them hold that too ({_told(found)}).")
    for key in _VERSIONS:
        if len(found := _values(runs, lambda s, key=key: s.result.get("env", {}).get(key))) > 1:
            lines.append(f"Other versions of {key}: {_told(found)}.")
    for source in (s for s in sources if not s.is_run):
        labels = {row["label"] for row in source.result.get("latency", []) if not row["is_baseline"]}
        joined = {row["label"] for row in source.result.get("latency", []) for run in runs
                  if _is_same(row, (run.config.get("methods") or {}).get(row["label"]))}  # fmt: skip
        if unmatched := sorted(labels - joined):
            lines.append(f"{source.name} timed what no folder has scores of (another label or other options): {', '.join(unmatched)}.")
    return lines


def _values(sources: Sequence[Source], value: Any) -> dict[str, list[str]]:
    """The folders by the value that they have; folders without one are left out."""
    found: dict[str, list[str]] = {}
    for source in sources:
        if (own := value(source)) is not None:
            found.setdefault(str(own), []).append(source.name)
    return found


def _told(values: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in values.items())


def _prompts_that_differ(runs: Sequence[Source]) -> list[str]:
    """A line for each task and length of which the later folders have other prompts than the first that has it, under the same seed."""
    lines = []
    for i, source in enumerate(runs):
        for before in runs[:i]:
            if source.config.get("seed") != before.config.get("seed"):
                continue
            theirs = {(r.task, r.tokens, r.sample): r.prompt_hash for r in before.records}
            mine = {(r.task, r.tokens, r.sample): r.prompt_hash for r in source.records}
            common = Counter((task, tokens) for task, tokens, sample in mine if (task, tokens, sample) in theirs)
            other = Counter(key[:2] for key, value in mine.items() if key in theirs and theirs[key] != value)
            lines += [
                f"{_place(task, tokens)}: {n} of {common[task, tokens]} prompts of {source.name} are not those of {before.name}; "
                "they are not compared one by one." for (task, tokens), n in other.items()
            ]  # fmt: skip
    return lines


def _fronts_apart(runs: Sequence[Source]) -> list[str]:
    """A line where folders have other prompts, or another number of them, for what both were asked."""
    groups = _by_prompts(runs)
    if len(groups) < 2:
        return []
    return [f"Other prompts, or another number of them, have another accuracy against time: {'; '.join(map(_folders, groups))}."]


def _unfinished(runs: Sequence[Source]) -> list[str]:
    return [f"{source.name} is not finished: {n} samples are missing." for source in runs if (n := source.result.get("n_missing"))]


def _failed_gates(runs: Sequence[Source]) -> list[str]:
    """A line for each folder with tasks about pictures that dense does not see well enough."""
    failed = {source.name: [gate["task"] for gate in source.result.get("gates", []) if not gate["passes"]] for source in runs}
    return [f"{name}: {', '.join(tasks)} left out of everything, since dense itself did not pass the gate there."
            for name, tasks in failed.items() if tasks]  # fmt: skip


def _timed_twice(benches: Sequence[Source]) -> list[str]:
    """A line where folders of one machine have timed the same: a front can show one of the times only."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for source in benches:
        for row in source.result.get("latency", []):
            if row["metric"] == CLEAN:
                found.setdefault((source.machine, row["label"], row["tokens"]), []).append(source.name)
    return [f"{_place(label, tokens)} was timed in {', '.join(names)}: accuracy against time goes by the last of them."
            for (_, label, tokens), names in found.items() if len(names) > 1]  # fmt: skip


def _without_front(scores: Sequence[Row], fronts: Sequence[Row]) -> list[str]:
    """A line for lengths at which no two methods can be compared in accuracy and time."""
    shown = {(row["kind"], row["tokens"]) for row in fronts}
    lacking = dict.fromkeys((row.get("kind", "text"), row.get("tokens") or 0) for row in scores)
    return [f"No accuracy against time for {_place(kind, tokens)}: no task that all labels have, or fewer than two that were timed."
            for kind, tokens in lacking if (kind, tokens) not in shown]  # fmt: skip


def _place(what: str, tokens: int) -> str:
    return f"{what} at {tokens} tokens" if tokens else what
