"""What can be answered without looking, and by naming something that is there: the two baselines that a family has to leave behind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from accel.evals.scenes.questions import Item, held_out

N_FITTED = 1000


@dataclass(frozen=True)
class Baselines:
    """Shares of right answers. no_image: the likeliest answer to each question text. present: a guess among what is present in the picture."""

    no_image: float
    present: float

    @property
    def best(self) -> float:
        return max(self.no_image, self.present)


def baselines(items: Sequence[Item]) -> Baselines:
    """Both baselines on held-out questions of one family; what they know in advance is fitted on questions of the training split.

    present: for yes and no, whether the parts of the question stand in the picture often enough (the threshold is fitted), or a coin where that
    is no better; otherwise the expected score of a uniform guess among the colours, shapes or counts that the picture holds.
    """
    family = items[0].question.family
    replies, fallback, threshold = _fitted(family)
    blind = [replies.get(item.question.text, fallback) == item.question.answer for item in items]
    if items[0].question.guesses == ("yes", "no"):
        hinted = [(item.question.hint >= threshold) == (item.question.answer == "yes") for item in items]
        present = max(0.5, sum(hinted) / len(items))
    else:
        present = sum((item.question.answer in item.question.guesses) / len(item.question.guesses) for item in items) / len(items)
    return Baselines(sum(blind) / len(items), present)


@cache
def _fitted(family: str) -> tuple[dict[str, str], str, float]:
    """The likeliest answer by question text and overall, and the threshold on the hint, from training questions."""
    items = [item.question for item in held_out(family, "train", N_FITTED)]
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in items:
        by_text[asked.text][asked.answer] += 1
    overall = Counter(asked.answer for asked in items).most_common(1)[0][0]
    hints = sorted({asked.hint for asked in items})
    threshold = max(hints, key=lambda t: sum((asked.hint >= t) == (asked.answer == "yes") for asked in items))
    return {text: answers.most_common(1)[0][0] for text, answers in by_text.items()}, overall, threshold
