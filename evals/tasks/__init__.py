"""Tasks whose prompts are made by code: one file each, found by its name. A file here defines `TASK`; files that start with `_` are helpers.

The docstring of a task's file is its card: what it asks, its source and parameters, and what was changed. `python -m accel.evals.tasks NAME`
prints it. "data:FILE" and "data:HUB/ID" are tasks too, from one's own prompts (`_data.py`). A task makes samples of one kind: text prompts of a
length (`Task`), pictures with a question (`PictureTask`), or pictures to be drawn (`ImageTask`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from accel.errors import OptionError


@dataclass(frozen=True)
class Answer:
    """One scored answer: tokens start … stop − 1 of the sample, `text` as a reader would write it, `question` for tables.

    lead: the token with which its question begins, where questions can be asked each by itself behind what stands before the first of them.
    depth: where in the prompt the answer is found, or stands, as a share of it; None where that is no one place.
    """

    question: str
    text: str
    start: int
    stop: int
    lead: int | None = None
    depth: float | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt with its right answers.

    input_ids: prompt and answers, the answers where a perfect model would write them. Teacher forcing scores them in one forward.
    n_prompt: None, or the tokens that are given where the model has to write the answers itself, at most `max_new_tokens` of them.
    rule: by which a written reply is compared with an answer, a name of `_rules.RULES`. has_template: whether the model's chat template is around
    the prompt; None where the task's prompts are plain text for every model.
    """

    id: int
    seed: int
    input_ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    n_prompt: int | None = None
    max_new_tokens: int = 0
    rule: str = "contains"
    has_template: bool | None = None

    @property
    def prompt_hash(self) -> str:
        """Tells two runs whether they saw the same tokens."""
        return hashlib.sha256(" ".join(map(str, self.input_ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class PictureSample:
    """One picture with one question.

    image: (height, width, 3) uint8. answers: spellings that count as right, the usual one first. instruction: what a model that can follow one is
    told beside the question. The model writes at most `max_new_tokens`.
    """

    id: int
    seed: int
    image: Any
    question: str
    answers: tuple[str, ...]
    instruction: str = ""
    max_new_tokens: int = 16

    @property
    def picture_hash(self) -> str:
        """Tells which samples share a picture."""
        return hashlib.sha256(repr(self.image.shape).encode() + self.image.tobytes()).hexdigest()[:16]

    @property
    def prompt_hash(self) -> str:
        """Tells two runs whether they saw the same picture and question."""
        return hashlib.sha256(f"{self.picture_hash} {self.question} {self.instruction}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ClassSample:
    """One picture to be drawn from `picture_seed`, of class `number` modulo the classes that the model knows."""

    id: int
    seed: int
    number: int
    picture_seed: int

    @property
    def prompt_hash(self) -> str:
        """Tells two runs whether the same was asked of them."""
        return hashlib.sha256(f"{self.number} {self.picture_seed}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """samples(tokenizer, n_tokens, n, seed) → n prompts of `n_tokens` tokens of that tokenizer; raises OptionError where that cannot be.

    metric: "exact" is the share of right answers; "perplexity" that of the answers' tokens.
    group: a name that stands for several tasks on the command line. caveat: what its scores cannot show, for reports.
    most_samples: how many prompts there are; None where as many are made as were asked for.
    """

    kind: ClassVar[Literal["text"]] = "text"

    samples: Callable[[Any, int, int, int], list[Sample]]
    metric: Literal["exact", "perplexity"] = "exact"
    group: str = ""
    caveat: str = ""
    most_samples: int | None = None


@dataclass(frozen=True)
class PictureTask:
    """samples(n, seed) → n pictures with a question each; there is no length to choose.

    baselines(numbers, seed) → by name, the share of right answers that needs no look at the picture, or only a guess at what it holds, on the
    samples of these numbers. group: a name that stands for several tasks on the command line. caveat: what its scores cannot show, for reports.
    """

    kind: ClassVar[Literal["picture"]] = "picture"
    metric: ClassVar[Literal["exact"]] = "exact"

    samples: Callable[[int, int], list[PictureSample]]
    baselines: Callable[[Sequence[int], int], Mapping[str, float]]
    group: str = ""
    caveat: str = ""


@dataclass(frozen=True)
class ImageTask:
    """samples(n, seed) → n pictures to be drawn, right where a judge sees their class; there is no length to choose. caveat: as in `PictureTask`."""

    kind: ClassVar[Literal["class"]] = "class"
    metric: ClassVar[Literal["exact"]] = "exact"

    samples: Callable[[int, int], list[ClassSample]]
    group: str = ""
    caveat: str = ""


AnyTask = Task | PictureTask | ImageTask
# names that begin so are not files here
OWN_DATA = "data:"


@cache
def task_names() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def group_names() -> list[str]:
    """Names that stand for several tasks, sorted."""
    return sorted({"all", *(group for name in task_names() if (group := load_task(name).group))})


def load_task(name: str) -> AnyTask:
    """The task of that name, or of one's own data ("data:FILE"); an unknown name raises OptionError with the closest known one."""
    if name.startswith(OWN_DATA):
        from accel.evals.tasks._data import data_task

        return data_task(name.removeprefix(OWN_DATA))
    if name not in task_names():
        groups = group_names()
        close = difflib.get_close_matches(name, [*groups, *task_names()], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        known = f"Tasks: {', '.join(task_names())}; groups: {', '.join(groups)}; {OWN_DATA}FILE for prompts of your own"
        raise OptionError(f"no task is called {name!r}{hint} {known}")
    task = importlib.import_module(f"accel.evals.tasks.{name}").TASK
    assert isinstance(task, AnyTask)
    return task


def card(name: str) -> str:
    """What a task asks, from where, and what its scores cannot show: the docstring of its file and its caveat."""
    task = load_task(name)
    about = importlib.import_module(f"accel.evals.tasks.{name}").__doc__ if name in task_names() else None
    return "\n\n".join(part.strip() for part in (about, textwrap.fill(task.caveat, 148)) if part)


def load_text_task(name: str) -> Task:
    """The text task of that name; OptionError for unknown names and tasks about pictures."""
    task = load_task(name)
    if not isinstance(task, Task):
        raise OptionError(f"the task {name} asks about pictures: it has no prompt of a length")
    return task


def own_rows(name: str) -> int | None:
    """How many rows one's own data has; None for the tasks that are files here."""
    task = load_task(name)
    return task.most_samples if name.startswith(OWN_DATA) and isinstance(task, Task) else None


def expand_names(names: Sequence[str]) -> list[str]:
    """Task names in the order given, without repeats; groups ("ruler", "scenes") and "all", which is every text task, replaced by their members."""
    found: dict[str, None] = {}
    for name in names:
        members = [t for t in task_names() if name == load_task(t).group or (name == "all" and load_task(t).kind == "text")]
        for member in members or [name]:
            load_task(member)
            found[member] = None
    return list(found)
