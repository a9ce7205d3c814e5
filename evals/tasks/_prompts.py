"""Prompts of a wanted number of tokens, with answers whose token positions are known."""

from __future__ import annotations

import datetime
import itertools
import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import OptionError, UnsupportedError
from accel.evals.tasks import Answer, Sample


@dataclass(frozen=True)
class Piece:
    """Tokens of a text, and the token spans (start, stop) of the parts that were asked for."""

    ids: list[int]
    spans: list[tuple[int, int]]


def sample_rng(task: str, seed: int, index: int) -> random.Random:
    """Random numbers of one sample: the same in every process, and for every length, so that lengths can be compared."""
    return random.Random(f"{task}/{seed}/{index}")


# of every prompt whose template tells one
DATE = datetime.date(2026, 1, 1)


def random_uuid(rng: random.Random) -> str:
    """A UUID of version 4 from these random numbers."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    # verbose: without it the tokenizer warns about texts longer than the model, of which only a part will be used
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_parts(tokenizer: Any, text: str, parts: Sequence[str]) -> Piece:
    """Token ids of `text` and the spans of `parts`, which stand in it in this order."""
    if not tokenizer.is_fast:
        raise UnsupportedError("the tasks need a tokenizer that knows the offsets of its tokens (a fast one)")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets, spans, at = encoded["offset_mapping"], [], 0
    for part in parts:
        low = text.index(part, at)
        at = low + len(part)
        inside = [i for i, (start, stop) in enumerate(offsets) if start < at and stop > low]
        spans.append((inside[0], inside[-1] + 1))
    return Piece(list(encoded["input_ids"]), spans)


def opening(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text, or nothing."""
    ids, plain = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    starts = [i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain]
    return list(ids[: starts[0]]) if starts else []


def filler(tokenizer: Any, units: Sequence[str], n_tokens: int, *, start: int, separator: str = " ") -> list[int]:
    """Exactly `n_tokens` tokens of the units from number `start` on, again from the first when they end."""
    average = max(1, sum(map(len, units)) // len(units))
    n_units = 8 + n_tokens * 3 // average       # three characters a token, to begin with
    while True:
        ids = encode(tokenizer, separator.join(itertools.islice(itertools.cycle(units), start, start + n_units)))
        if len(ids) >= n_tokens:
            return ids[:n_tokens]
        n_units *= 2


def insert(haystack: list[int], needles: Sequence[Sequence[int]], depths: Sequence[float], n_tokens: int) -> list[int]:
    """The haystack with needle i beginning at share depths[i] of a prompt of `n_tokens`. depths ascend."""
    done: list[int] = []
    taken = 0
    for needle, depth in zip(needles, depths, strict=True):
        more = max(0, int(depth * n_tokens) - len(done))
        done += [*haystack[taken : taken + more], *needle]
        taken += more
    return done + haystack[taken:]


def require_length(task: str, n_tokens: int, shortest: int) -> None:
    """Raises OptionError where the fixed parts of a prompt alone are longer than the prompt may be."""
    if n_tokens < shortest:
        raise OptionError(f"{task} needs prompts of at least {shortest} tokens with this tokenizer, asked for {n_tokens}")


def chat_prompt(tokenizer: Any, turn: str, prefix: str) -> list[int]:
    """Token ids of the user's turn and the begun reply, in the model's chat template; where it has none, one below the other."""
    if tokenizer.chat_template is None:
        return [*opening(tokenizer), *encode(tokenizer, f"{turn}\n{prefix}")]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}], chat_template=_dated(tokenizer.get_chat_template()), add_generation_prompt=True, tokenize=False,
        date_string=f"{DATE:%d %b %Y}",
    )  # fmt: skip
    return encode(tokenizer, text + prefix)


def _dated(template: str) -> str:
    """The template with a clock of its own, which stands still: one that tells the date would make other prompts tomorrow."""
    formats = [format for _, format in re.findall(r"""strftime_now\(\s*(["'])(.*?)\1""", template)]
    if not formats:
        return template
    dates = json.dumps({format: DATE.strftime(format) for format in formats})
    return f"{{%- macro strftime_now(format) -%}}{{{{ {dates}[format] }}}}{{%- endmacro -%}}{template}"


def chat_sample(
    tokenizer: Any, *, task: str, n_tokens: int, most_units: int, question: Callable[[int], str], prefix: str, answer: str, parts: Sequence[str],
    labels: Sequence[str], max_new_tokens: int, id: int, seed: int, depths: Sequence[float] | None = None, rule: str = "contains",
) -> Sample:  # fmt: skip
    """The longest prompt for which prompt and new tokens fit into `n_tokens`; the model's chat template around it where there is one.

    question(k): the user's text with k units of filler. prefix begins the reply; `answer` is what should follow it, `parts` the scored words
    in it, `labels` their names in tables and `depths` their places. The model may write `max_new_tokens`, or as many as the answer has where
    that is more.
    """
    expected = encode_parts(tokenizer, answer, parts)
    reserved = max(max_new_tokens, len(expected.ids))

    def prompt(k: int) -> list[int]:
        return chat_prompt(tokenizer, question(k), prefix)

    shortest = len(prompt(0))
    require_length(task, n_tokens, shortest + reserved)
    n_units = _most_that_fit(lambda k: len(prompt(k)), shortest, n_tokens - reserved, most_units)
    if n_units == most_units:
        raise OptionError(f"{task}: the text for filling ends before {n_tokens} tokens; ask for a shorter length")
    return written_sample(
        prompt(n_units), expected, parts=parts, labels=labels, depths=depths, rule=rule, max_new_tokens=reserved, id=id, seed=seed,
        has_template=tokenizer.chat_template is not None,
    )  # fmt: skip


def _most_that_fit(length: Callable[[int], int], shortest: int, room: int, most: int) -> int:
    """The most units with which a prompt has at most `room` tokens. shortest: length(0), which fits."""
    low, n_low, high, guess = 0, shortest, most, min(16, most)
    while low < high:
        n = length(guess)
        if n > room:
            high = guess - 1
            guess = (low + high + 1) // 2
        else:
            low, n_low = guess, n
            # as many more as would fill the rest: far fewer prompts are made than by halving alone
            guess = low + max(1, (room - n_low) * low // max(1, n_low - shortest))
        guess = min(guess, high)
    return low


def written_sample(
    prompt: Sequence[int], expected: Piece, *, parts: Sequence[str], labels: Sequence[str], depths: Sequence[float] | None = None, rule: str,
    max_new_tokens: int, id: int, seed: int, has_template: bool | None = None,
) -> Sample:  # fmt: skip
    """A sample whose answers, the parts of `expected`, are to be written behind the prompt."""
    n = len(prompt)
    places: Sequence[float | None] = depths or [None] * len(parts)
    answers = tuple(
        Answer(label, part, start + n, stop + n, depth=depth)
        for label, part, (start, stop), depth in zip(labels, parts, expected.spans, places, strict=True)
    )
    return Sample(
        id, seed, (*prompt, *expected.ids), answers, n_prompt=n, max_new_tokens=max_new_tokens, rule=rule, has_template=has_template
    )  # fmt: skip
