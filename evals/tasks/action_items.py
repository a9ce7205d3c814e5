"""Eight action items in minutes of a long meeting, all to be listed: extraction from the whole prompt, as a summary needs it.

"Action item: Maria brings the piano." stands at eight random depths of prose that has nothing to do with it; the question, behind it, asks for all in
order, and the reply is begun with the first two words. The score is the share of the items that stand in the reply word for word. Under teacher
forcing they stand in the order of the text, each told by what is left to say. No published task: summaries cannot be scored without a judge.
"""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, sample_rng
from accel.evals.tasks._text import sentences
from accel.evals.tasks._words import ALL_NOUNS

N_ITEMS = 8
# more than the items themselves, for a model that says something else between them
MAX_NEW_TOKENS = 128
LEAD = "Action item:"
PEOPLE = (
    "Maria", "Peter", "Anna", "David", "Laura", "Simon", "Julia", "Martin", "Sarah", "Thomas", "Helen", "Victor", "Clara", "Oscar", "Emma", "Daniel",
)  # fmt: skip
VERBS = ("brings", "paints", "sells", "repairs", "orders", "returns", "cleans", "draws")
CAVEAT = "action_items: items that stand out from their text are not a summary of it; read its scores as recall of many places at once."


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with eight answers."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("action_items", seed, index)
    people, things = rng.sample(PEOPLE, N_ITEMS), rng.sample(ALL_NOUNS, N_ITEMS)
    items = [f"{person} {rng.choice(VERBS)} the {thing}" for person, thing in zip(people, things, strict=True)]
    depths = sorted(rng.random() for _ in items)
    text = sentences()
    start = rng.randrange(len(text))

    def question(n_sentences: int) -> str:
        lines = [text[(start + i) % len(text)] for i in range(n_sentences)]
        # from the back, so that an earlier place is not moved by a later item
        for depth, item in reversed(list(zip(depths, items, strict=True))):
            lines.insert(int(depth * (n_sentences + 1)), f"{LEAD} {item}.")
        return f"Below are the minutes of a meeting.\n\n{' '.join(lines)}\n\nList all of its {N_ITEMS} action items in their order, one a line."

    return chat_sample(
        tokenizer, task="action_items", n_tokens=n_tokens, most_units=n_tokens // 4 + 64, question=question, prefix=LEAD,
        answer=f"\n{LEAD}".join(f" {item}." for item in items), parts=items, labels=[f"item {i + 1} (at {d:.0%})" for i, d in enumerate(depths)],
        max_new_tokens=MAX_NEW_TOKENS, id=index, seed=seed, depths=depths,
    )  # fmt: skip


TASK = Task(samples, caveat=CAVEAT)
