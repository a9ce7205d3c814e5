"""Perplexity of prose by position: 16 stretches of 32 tokens, evenly spread over a prompt of exactly N tokens, the last at its end.

Essays from a random paragraph on, none twice in a prompt; plain text without a chat template. The table by position shows where in the
prompt a method begins to lose. Perplexity does not separate sparse methods from a sliding window (PG19, PowerAttention's paper): read it beside
retrieval, never alone. Methods that drop cache entries do so before the first stretch, and all that follows is read behind what they left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accel.errors import OptionError
from accel.evals.tasks import Answer, Sample, Task
from accel.evals.tasks._prompts import encode, opening, require_length, sample_rng
from accel.evals.tasks._text import paragraphs

N_PLACES, N_SCORED = 16, 32
CAVEAT = (
    "perplexity: prompts begin at random paragraphs of the same 170 thousand tokens of essays. From the second on they may share text, and where all "
    "together have 60 thousand tokens about half of them do: standard errors take prompts for independent, and are too small then."
)


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts of exactly `n_tokens` tokens, one answer per scored token."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    require_length("perplexity", n_tokens, 2 * N_PLACES * N_SCORED)
    text = paragraphs()
    start = sample_rng("perplexity", seed, index).randrange(len(text))
    ids = [*opening(tokenizer), *_begun(tokenizer, (*text[start:], *text[:start]), n_tokens)]
    if len(ids) < n_tokens:
        raise OptionError(f"perplexity has {len(ids)} tokens of prose with this tokenizer, asked for {n_tokens}; ask for a shorter length")
    answers = []
    for place in range(1, N_PLACES + 1):
        stop, depth = place * n_tokens // N_PLACES, place / N_PLACES
        answers += [
            Answer(f"token {i} (at {depth:.0%})", tokenizer.decode([ids[i]]), i, i + 1, depth=depth) for i in range(stop - N_SCORED, stop)
        ]
    return Sample(index, seed, tuple(ids[:n_tokens]), tuple(answers))


def _begun(tokenizer: Any, text: Sequence[str], n_tokens: int) -> list[int]:
    """The tokens of more than `n_tokens` of these paragraphs, or of all there are: a whole book would take longer than to read the prompt."""
    n = n_tokens // 128 + 8
    while len(ids := encode(tokenizer, "\n\n".join(text[:n]))) <= n_tokens and n < len(text):
        n *= 2
    return ids


TASK = Task(samples, metric="perplexity", caveat=CAVEAT)
