"""Questions about drawn scenes as tasks: one per family, each on pictures of the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accel.evals.scenes import baselines, held_out
from accel.evals.scenes.questions import NUMBERS
from accel.evals.tasks import PictureSample, PictureTask

SPLIT = "test"
CAVEAT = (
    "Drawn scenes are the friendly case: little content, easy to tell from the background, and no question about the background. They show that an "
    "implementation keeps what it should, not which method is better on photographs."
)


def scene_task(family: str) -> PictureTask:
    """The task of one family of questions."""

    def samples(n: int, seed: int) -> list[PictureSample]:
        items = held_out(family, SPLIT, n, seed=seed)
        instruction = "Answer with its three digits." if family == "word" else "Answer with one word."
        return [
            PictureSample(i, seed, item.scene.image, item.question.text, spellings(item.question.answer), instruction)
            for i, item in enumerate(items)
        ]

    def chances(numbers: Sequence[int], seed: int) -> Mapping[str, float]:
        items = held_out(family, SPLIT, max(numbers) + 1, seed=seed)
        found = baselines([items[i] for i in numbers])
        return {"no image": found.no_image, "among present": found.present}

    return PictureTask(samples, chances, group="scenes", caveat=CAVEAT)


def spellings(answer: str) -> tuple[str, ...]:
    """The answer, and what else says the same: numbers in digits, digits without spaces."""
    if answer in NUMBERS:
        return (answer, str(NUMBERS.index(answer)))
    return (answer, answer.replace(" ", "")) if " " in answer else (answer,)
