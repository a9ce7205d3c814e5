"""Tasks whose prompts are made by code: one file each, found by its name. A file here defines `TASK`; files that start with `_` are helpers."""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from accel.errors import OptionError


@dataclass(frozen=True)
class Answer:
    """One scored answer: tokens start … stop − 1 of the sample, `text` as a reader would write it, `question` for tables."""

    question: str
    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Sample:
    """One prompt with its right answers.

    input_ids: prompt and answers, the answers where a perfect model would write them. Teacher forcing scores them in one forward.
    n_prompt: None, or the tokens that are given where the model has to write the answers itself, at most `max_new_tokens` of them.
    """

    id: int
    seed: int
    input_ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    n_prompt: int | None = None
    max_new_tokens: int = 0

    @property
    def prompt_hash(self) -> str:
        """Tells two runs whether they saw the same tokens."""
        return hashlib.sha256(" ".join(map(str, self.input_ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """samples(tokenizer, n_tokens, n, seed) → n prompts of `n_tokens` tokens of that tokenizer; raises OptionError where that cannot be.

    metric: "exact" is the share of right answers; "perplexity" that of the answers' tokens.
    group: a name that stands for several tasks on the command line.
    """

    samples: Callable[[Any, int, int, int], list[Sample]]
    metric: Literal["exact", "perplexity"] = "exact"
    group: str = ""


@cache
def task_names() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def load_task(name: str) -> Task:
    """The task of that name; an unknown name raises OptionError with the closest known one."""
    if name not in task_names():
        close = difflib.get_close_matches(name, task_names(), n=1)
        raise OptionError(f"no task is called {name!r}{f'; did you mean {close[0]!r}?' if close else '.'} Tasks: {', '.join(task_names())}")
    task = importlib.import_module(f"accel.evals.tasks.{name}").TASK
    assert isinstance(task, Task)
    return task


def expand_names(names: Sequence[str]) -> list[str]:
    """Task names, with groups ("ruler") and "all" replaced by their members, in the order given and without repeats."""
    found: dict[str, None] = {}
    for name in names:
        members = [t for t in task_names() if name == "all" or load_task(t).group == name]
        for member in members or [name]:
            load_task(member)
            found[member] = None
    return list(found)
