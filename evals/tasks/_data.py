"""Tasks from one's own prompts: `data:FILE` for JSONL, JSON, CSV or Parquet, `data:OWNER/NAME` or `data:OWNER/NAME@SPLIT` for a dataset of the hub.

One row is one prompt: `prompt` (or `input`, as in RULER's own files) and `answers` (or `outputs`, or `answer`), a text or a list of texts that are
all wanted. Optional: `prefix` (or `answer_prefix`) that begins the reply, `max_new_tokens` (64), `rule` (a name of `_rules.RULES`; "contains"), and
`template`: false for plain text whatever the model has, true where its chat template must be there. Prompts are used as they are, never cut:
--lengths is the room for prompt and reply, and a row that does not fit is an error. n samples are the first n rows, whatever the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from accel.errors import OptionError
from accel.evals.tasks import OWN_DATA, Sample, Task
from accel.evals.tasks._prompts import chat_prompt, encode, encode_parts, opening, written_sample
from accel.evals.tasks._rules import RULES

MAX_NEW_TOKENS = 64
# by file ending, the loader of `datasets`
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PROMPT, ANSWERS, PREFIX = ("prompt", "input"), ("answers", "outputs", "answer"), ("prefix", "answer_prefix")
TEXTS = (*PROMPT, *ANSWERS, *PREFIX, "rule")
CAVEAT = "{}: prompts of your own, scored by the share of right answers in the replies; its lengths are the room that prompts had, not theirs."


@dataclass(frozen=True)
class Row:
    """One checked row. place: where it stands, for errors."""

    place: str
    prompt: str
    answers: tuple[str, ...]
    prefix: str
    max_new_tokens: int
    rule: str
    wants_template: bool | None


@cache
def data_task(where: str) -> Task:
    """The task of a file or of a dataset of the hub. OptionError names the file and line, or the row, of what is missing or wrong."""
    rows = tuple(read_rows(where))
    return Task(partial(_samples, where, rows), caveat=CAVEAT.format(OWN_DATA + where), most_samples=len(rows))


def read_rows(where: str) -> list[Row]:
    """All rows, checked."""
    path = Path(where).expanduser()
    if path.is_file():
        found = _local(path)
    elif path.suffix in LOADERS or where.count("/") > 1 or not where:
        raise OptionError(f"there is no file {where!r} for {OWN_DATA}{where}")
    else:
        found = _from_hub(where)
    rows = [_checked(place, fields) for place, fields in found]
    if not rows:
        raise OptionError(f"{where} holds no rows")
    return rows


def _local(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if path.suffix not in LOADERS:
        raise OptionError(f"{path}: cannot read files that end in {path.suffix!r}; there are loaders for {', '.join(LOADERS)}")
    # the loaders fail on such a file, each in its own words
    if path.stat().st_size == 0:
        raise OptionError(f"{path}: the file is empty")
    places = _line_numbers(path) if path.suffix == ".jsonl" else None
    datasets = _datasets()
    # texts of a CSV file as they stand there: the reader would make 7 of 007, and nothing of NA
    as_written: dict[str, Any] = {}
    if path.suffix == ".csv":
        as_written = {"converters": dict.fromkeys(TEXTS, lambda text: text or None), "keep_default_na": False, "na_values": [""]}
    try:
        # streaming: without it a copy of the file would stay in the cache of `datasets`
        rows = list(datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train", streaming=True, **as_written))
    # whatever the loader raises: its own errors, and those of the libraries that read for it
    except Exception as error:
        raise OptionError(f"{path} cannot be read: {_first_line(error)}. Every row needs the same fields, with values of the same kinds") from error
    return [(f"{path}, {f'line {places[i]}' if places else f'row {i + 1}'}", row) for i, row in enumerate(rows)]


def _line_numbers(path: Path) -> list[int]:
    """Numbers of the lines with a row, all of which are JSON objects: `datasets` does not say which one is not."""
    numbers = []
    # bytes: a text file would be decoded in blocks, whose errors tell no line
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                _require_object(f"{path}, line {number}", line)
                numbers.append(number)
    return numbers


def _require_object(place: str, line: bytes) -> None:
    try:
        text = line.decode("utf-8").strip()
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise OptionError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"{place}: not JSON ({error.msg} at column {error.colno}): {text[:60]!r}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{place}: not a JSON object: {text[:60]!r}")


def _from_hub(where: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    name, _, split = where.partition("@")
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, **({"split": split} if split else {}))
    # no network, no such dataset, no such split, …
    except Exception as error:
        raise OptionError(f"{OWN_DATA}{where} is neither a file nor a dataset that can be loaded: {_first_line(error)}") from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise OptionError(f"{name} has the splits {', '.join(found)}: choose one, such as {OWN_DATA}{name}@{next(iter(found))}")
        [found] = found.values()
    return [(f"{where}, row {i + 1}", row) for i, row in enumerate(found)]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise OptionError(f"{OWN_DATA}… needs the package datasets: pip install 'accel-inference[evals]'") from error
    return datasets


def _checked(place: str, fields: Mapping[str, Any]) -> Row:
    # a field that other rows have is None here
    given = {key: value for key, value in fields.items() if value is not None}
    prompt, answers = _one_of(place, given, PROMPT), _one_of(place, given, ANSWERS)
    answers = answers if isinstance(answers, list) else [answers]
    # numbers are usual in JSON files
    answers = [str(a) if isinstance(a, int) else a for a in answers]
    if not isinstance(prompt, str) or not prompt:
        raise OptionError(f"{place}: the prompt must be a text, got {prompt!r}")
    if not answers or not all(isinstance(a, str) and a for a in answers):
        raise OptionError(f"{place}: the answers must be texts, at least one, got {answers!r}")
    prefix = next((given[key] for key in PREFIX if key in given), "")
    rule, n_new, template = given.get("rule", "contains"), given.get("max_new_tokens", MAX_NEW_TOKENS), given.get("template")
    if not isinstance(prefix, str):
        raise OptionError(f"{place}: the prefix must be a text, got {prefix!r}")
    if rule not in RULES:
        raise OptionError(f"{place}: there is no rule {rule!r}; there are {', '.join(RULES)}")
    # a column of numbers with gaps comes as floats
    n_new = int(n_new) if isinstance(n_new, float) and n_new.is_integer() else n_new
    if not isinstance(n_new, int) or isinstance(n_new, bool) or n_new < 1:
        raise OptionError(f"{place}: max_new_tokens must be a whole number above 0, got {n_new!r}")
    if template is not None and not isinstance(template, bool):
        raise OptionError(f"{place}: template must be true or false, got {template!r}")
    return Row(place, prompt, tuple(answers), prefix, n_new, rule, template)


def _one_of(place: str, given: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    found = [name for name in names if name in given]
    if not found:
        raise OptionError(f"{place} has no {' or '.join(names)}; it has {', '.join(given) or 'nothing'}")
    if len(found) > 1:
        raise OptionError(f"{place} has {' and '.join(found)}, of which only one can count")
    return given[found[0]]


def _samples(where: str, rows: tuple[Row, ...], tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    if n > len(rows):
        raise OptionError(f"{where} has {len(rows)} rows, asked for {n} samples")
    return [_sample(tokenizer, row, n_tokens, index, seed) for index, row in enumerate(rows[:n])]


def _sample(tokenizer: Any, row: Row, n_tokens: int, index: int, seed: int) -> Sample:
    has_template = row.wants_template is not False and tokenizer.chat_template is not None
    if row.wants_template and not has_template:
        raise OptionError(f"{row.place} asks for a chat template, and this model's tokenizer has none; without `template` the prompt is plain text")
    plain = row.prompt + row.prefix
    prompt = chat_prompt(tokenizer, row.prompt, row.prefix) if has_template else [*opening(tokenizer), *encode(tokenizer, plain)]
    expected = encode_parts(tokenizer, f" {', '.join(row.answers)}", row.answers)
    n_new = max(row.max_new_tokens, len(expected.ids))
    if len(prompt) + n_new > n_tokens:
        raise OptionError(f"{row.place}: {len(prompt)} tokens and {n_new} new ones do not fit into {n_tokens}; give more room with --lengths")
    labels = [f"row {index + 1}" if len(row.answers) == 1 else f"row {index + 1}, answer {i + 1}" for i in range(len(row.answers))]
    return written_sample(
        prompt, expected, parts=row.answers, labels=labels, rule=row.rule, max_new_tokens=n_new, id=index, seed=seed, has_template=has_template,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
