"""InfiniteBench's retrieval tasks: one fact in each prompt, the published length of replies, and the published rules on replies made by hand."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from tiny_llama import byte_tokenizer

from accel.evals.tasks import Sample, expand_names, load_text_task
from accel.evals.tasks._infinitebench import random_digits
from accel.evals.tasks._ruler import NOISE
from accel.evals.tasks._rules import RULES
from accel.evals.tasks.number_string import number

UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# rule: (answer, reply, score)
REPLIES: dict[str, list[tuple[str, str, float]]] = {
    "contains": [
        ("1234567", " 1234567.", 1), ("1234567", "It is 91234567!", 1), ("Piano", "the PIANO, I think", 1), ("1234567", "1234 567", 0), ("a", "", 0),
    ],
    "first_number": [
        ("71432", " 71432.", 1), ("71432", "the pass key is\n71432, or 5", 1), ("71432", "1. 71432", 0), ("71432", " 714325", 0),
        ("71432", "none", 0), ("0055", "0055", 1), ("0055", "55", 0),
    ],
    "word": [
        ("ab-12", 'ab-12"', 1), ("ab-12", '{"key": "ab-12"}', 1), ("ab-12", "xab-12", 0), ("ab-12", "ab-123", 0), ("ab-12", "It is ab-12.", 1),
        ("ab-12", "AB-12", 0),
    ],
    "line_similarity": [
        ("return x", "    return x\n    return y\n", 1), ("return x", "\n# as asked\nreturn x", 1), ("return x", "```python\nreturn x\n```", 1),
        # seven of eight characters in their order
        ("return x", "return y", 14 / 16), ("return x", "", 0), ("abc", "xyz", 0),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def made(name: str, tokenizer: Any, n_tokens: int = 9001) -> list[Sample]:
    return load_text_task(name).samples(tokenizer, n_tokens, 3, 0)


@pytest.mark.parametrize(("rule", "answer", "reply", "score"), [(rule, *case) for rule, cases in REPLIES.items() for case in cases])
def test_replies_are_scored_by_the_published_rules(rule: str, answer: str, reply: str, score: float) -> None:
    assert RULES[rule](answer, reply) == pytest.approx(score)


def test_every_rule_has_replies_here() -> None:
    assert set(REPLIES) == set(RULES)


def test_the_group_has_three_tasks() -> None:
    assert expand_names(["infinitebench"]) == ["kv_retrieval", "number_string", "passkey"]


@pytest.mark.parametrize(("name", "what", "digits", "n_new"), [("passkey", "pass key", 5, 6), ("number_string", "sequence of digits", 10, 12)])
def test_one_number_is_told_twice_in_one_place(name: str, what: str, digits: int, n_new: int, tokenizer: Any) -> None:
    for sample in made(name, tokenizer):
        [answer] = sample.answers
        text = tokenizer.decode(sample.input_ids[: sample.n_prompt])
        assert re.findall(r"\d+", text) == [answer.text] * 2
        assert len(answer.text) == digits
        assert text.endswith(f"What is the {what}?\nThe {what} is")
        assert text.count(NOISE) > 50
        assert sample.max_new_tokens == n_new
        assert sample.rule == "first_number"
        assert answer.depth is not None
        assert text.index(answer.text) / len(text) == pytest.approx(answer.depth, abs=0.04)


def test_a_pass_key_may_begin_with_a_zero() -> None:
    rng = random.Random(0)
    assert {random_digits(rng, 5)[0] for _ in range(200)} == set("0123456789")


def test_number_strings_are_five_digits_of_which_some_are_repeated() -> None:
    rng = random.Random(0)
    found = [number(rng) for _ in range(200)]
    runs = [len(list(itertools.groupby(n))) for n in found]
    assert all(len(n) == 10 and n.isdigit() for n in found)
    assert max(runs) == 5, "a digit is repeated beside itself"
    # two of five digits in a row are equal one time in ten
    assert runs.count(5) > 100
    assert len(set(found)) > 190


def test_the_object_holds_the_pair_that_is_asked_for(tokenizer: Any) -> None:
    for sample in made("kv_retrieval", tokenizer):
        [answer] = sample.answers
        text = tokenizer.decode(sample.input_ids[: sample.n_prompt])
        pairs = json.loads(text.split("\n\n")[1])
        assert all(re.fullmatch(UUID, part) for pair in pairs.items() for part in pair)
        asked = re.search(rf'What is the value of the key "({UUID})"\?\nThe value of the key "\1" is "$', text)
        assert asked is not None
        assert pairs[asked[1]] == answer.text
        assert len(pairs) > 80
        assert (sample.rule, sample.max_new_tokens) == ("word", 50)
