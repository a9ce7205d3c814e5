"""Topic labels learnt from the prompt: sentences about one of 100 words with one of five labels, the last 24 labels scored.

Prompt of exactly N tokens of "Sentence: … / Topic: animal"; the sentences never tell the topic but by their word. The last examples are
the same at every length: longer prompts only show more of them. The first example is cut at its front where N asks for it. Chance is one in
five. Only about seven of the 24 labels lie inside FlexPrefill's probe (the last block of queries), so that this task sees what retrieval
inside the probe does not. Where methods drop cache entries, each of the 24 is asked by itself, behind the examples before the first of them.
"""

from __future__ import annotations

import random
from typing import Any

from accel.evals.tasks import Answer, Sample, Task
from accel.evals.tasks._prompts import encode_parts, opening, require_length, sample_rng
from accel.evals.tasks._words import TOPICS

N_SCORED = 24
SENTENCES = (
    "We talked about the {word} for a long time.",
    "She wrote a short letter about the {word}.",
    "Nobody had expected to hear of the {word} again.",
    "He dreamt of the {word} all night.",
    "The picture on the wall shows the {word}.",
    "They asked me what I thought of the {word}.",
    "My neighbour never stops praising the {word}.",
    "There was a long report on the {word} today.",
)


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts of exactly `n_tokens` tokens, 24 answers each."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("fewshot", seed, index)
    head = opening(tokenizer)
    # from the last example to the first, so that the end is the same at every length
    ids: list[int] = []
    # word, label, and tokens counted back from the end: of the example, of its label
    spans: list[tuple[str, str, int, int, int]] = []
    while len(ids) < n_tokens - len(head) or len(spans) < N_SCORED:
        word, label, text = _example(rng)
        piece = encode_parts(tokenizer, text, [label])
        [(start, stop)] = piece.spans
        if len(spans) < N_SCORED:
            after = len(ids) + len(piece.ids)
            spans.append((word, label, after, after - start, after - stop))
        ids = piece.ids + ids
    require_length("fewshot", n_tokens, len(head) + max(back for *_, back, _ in spans))
    ids = head + ids[len(ids) - (n_tokens - len(head)) :]
    answers = (
        Answer(word, label, n_tokens - start, n_tokens - stop, lead=max(len(head), n_tokens - lead))
        for word, label, lead, start, stop in reversed(spans)
    )
    return Sample(index, seed, tuple(ids), tuple(answers))


def _example(rng: random.Random) -> tuple[str, str, str]:
    """(word, label, text) of one example."""
    label = rng.choice(sorted(TOPICS))
    word = rng.choice(TOPICS[label])
    return word, label, f"Sentence: {rng.choice(SENTENCES).format(word=word)}\nTopic: {label}\n\n"


TASK = Task(samples)
