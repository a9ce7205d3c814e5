"""RULER's needles in a haystack: one generator for its eight tasks, and for the needle map."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._prompts import chat_sample, random_uuid, sample_rng
from accel.evals.tasks._ruler import CAVEAT, GROUP, NIAH_TOKENS, NOISE
from accel.evals.tasks._text import sentences
from accel.evals.tasks._words import ALL_ADJECTIVES, ALL_NOUNS

# in prose, needles begin at some of 40 places that are equally far from each other, the first and the last sentence among them
DEPTHS = tuple(i / 39 for i in range(40))
NAMES = {"numbers": "number", "uuids": "UUID"}


@dataclass(frozen=True)
class Niah:
    """One kind of haystack and of needles.

    haystack: one line again and again, prose, or needles with keys that nobody asks for. keys, values: adjective and noun, seven digits, or UUIDs.
    n_keys: needles with keys of their own, n_queries of them asked for; n_values: needles that each key has. depth: of the first needle in sample i
    where it is not left to chance. Every needle looks like every other.
    """

    name: str
    haystack: Literal["noise", "prose", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    max_new_tokens: int = NIAH_TOKENS
    depth: Callable[[int], float] | None = None

    def task(self) -> Task:
        """The task of group "ruler"."""
        return Task(self.samples, group=GROUP, caveat=CAVEAT)

    def samples(self, tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
        """n prompts, each the longest that leaves the new tokens of `n_tokens`; one answer per value that is asked for."""
        return [self._sample(tokenizer, n_tokens, index, seed) for index in range(n)]

    def _sample(self, tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
        rng = sample_rng(self.name, seed, index)
        keys = _distinct(lambda: self._key(rng), self.n_keys)
        pairs = [(key, value) for key in keys for value in _distinct(lambda: self._value(rng), self.n_values)]
        depths = self._depths(rng, index)
        # the asked values in the order of their questions, and those of one question in the order of the text
        asked = [keys[i] for i in rng.sample(range(self.n_keys), self.n_queries)]
        found = sorted(((asked.index(key), depth, key, value) for (key, value), depth in zip(pairs, depths, strict=True) if key in asked))
        hay = self._hay(rng, n_tokens, set(keys))
        needles = sorted(zip(depths, [self._needle(*pair) for pair in pairs], strict=True), reverse=True)

        def question(n_units: int) -> str:
            lines = [hay(i) for i in range(n_units)]
            # from the back, so that an earlier place is not moved by a later needle
            for depth, needle in needles:
                lines.insert(int(depth * n_units), needle)
            return self._question((" " if self.haystack == "prose" else "\n").join(lines), asked)

        values = [value for *_, value in found]
        return chat_sample(
            tokenizer, task=self.name, n_tokens=n_tokens, most_units=n_tokens // 4 + 64, question=question, prefix=self._prefix(asked),
            answer=f" {', '.join(values)}", parts=values, labels=[f"{key} (at {depth:.0%})" for _, depth, key, _ in found],
            max_new_tokens=self.max_new_tokens, id=index, seed=seed, depths=[depth for _, depth, *_ in found],
        )  # fmt: skip

    def _key(self, rng: random.Random) -> str:
        return f"{rng.choice(ALL_ADJECTIVES)}-{rng.choice(ALL_NOUNS)}" if self.keys == "words" else random_uuid(rng)

    def _value(self, rng: random.Random) -> str:
        return str(rng.randrange(1_000_000, 10_000_000)) if self.values == "numbers" else random_uuid(rng)

    def _depths(self, rng: random.Random, index: int) -> list[float]:
        n = self.n_keys * self.n_values
        depths = rng.sample(DEPTHS, n) if self.haystack == "prose" else [rng.random() for _ in range(n)]
        return depths if self.depth is None else [self.depth(index), *depths[1:]]

    def _hay(self, rng: random.Random, n_tokens: int, keys: set[str]) -> Callable[[int], str]:
        """Unit i of the haystack."""
        if self.haystack == "noise":
            return lambda i: NOISE
        if self.haystack == "prose":
            text = sentences()
            start = rng.randrange(len(text))
            return lambda i: text[(start + i) % len(text)]
        others = ((self._key(rng), self._value(rng)) for _ in range(n_tokens // 4 + 64))
        lines = [self._needle(key, value) for key, value in others if key not in keys]
        # a key that is asked for by chance leaves a gap, which the first lines fill
        return lambda i: lines[i % len(lines)]

    def _needle(self, key: str, value: str) -> str:
        return f"One of the secret {NAMES[self.values]}s of {key} is: {value}."

    def _question(self, text: str, asked: list[str]) -> str:
        name = NAMES[self.values]
        if self._is_one:
            before = f"A secret {name} is hidden in the text below. Remember it: I will ask for it afterwards."
        else:
            before = f"Some secret {name}s are hidden in the text below. Remember them: I will ask for them afterwards."
        return f"{before}\n\n{text}\n\nWhat {'is' if self._is_one else 'are all'} {self._subject(asked)} in the text above?"

    def _prefix(self, asked: list[str]) -> str:
        subject = self._subject(asked)
        return f"{subject[0].upper()}{subject[1:]} in the text above {'is' if self._is_one else 'are'}"

    def _subject(self, asked: list[str]) -> str:
        return f"the secret {NAMES[self.values]}{'' if self._is_one else 's'} of {_listed(asked)}"

    @property
    def _is_one(self) -> bool:
        return self.n_queries * self.n_values == 1


def _distinct(make: Callable[[], str], n: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found[make()] = None
    return list(found)


def _listed(names: list[str]) -> str:
    """ "a", or "a, b, and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
