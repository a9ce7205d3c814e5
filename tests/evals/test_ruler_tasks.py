"""RULER's generators: how many things of each kind a prompt holds, where they stand, what is asked, and that the answers follow from the prompt."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest
from tiny_llama import byte_tokenizer

from accel.errors import OptionError
from accel.evals.tasks import Sample, _niah, cwe, expand_names, load_task, load_text_task
from accel.evals.tasks._ruler import NOISE
from accel.evals.tasks._text import sentences
from accel.evals.tasks.fwe import counts

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS, NUMBER = r"[a-z]+-[a-z]+", r"\d{7}"
# name: haystack, key, value, needles that are no haystack, keys asked for, answers; as published
NIAH: dict[str, tuple[str, str, str, int, int, int]] = {
    "niah_single_1": ("noise", WORDS, NUMBER, 1, 1, 1),
    "niah_single_2_prose": ("prose", WORDS, NUMBER, 1, 1, 1),
    "niah_single_3_prose": ("prose", WORDS, UUID, 1, 1, 1),
    "niah_multikey_1_prose": ("prose", WORDS, NUMBER, 4, 1, 1),
    "niah_multikey_2": ("needles", WORDS, NUMBER, 1, 1, 1),
    "niah_multikey_3": ("needles", UUID, UUID, 1, 1, 1),
    "niah_multivalue_prose": ("prose", WORDS, NUMBER, 4, 1, 4),
    "niah_multiquery_prose": ("prose", WORDS, NUMBER, 4, 4, 4),
}
NEW_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def made(name: str, tokenizer: Any, n_tokens: int = 8001, n: int = 3) -> list[Sample]:
    return load_text_task(name).samples(tokenizer, n_tokens, n, 0)


def prompt_of(tokenizer: Any, sample: Sample) -> str:
    text: str = tokenizer.decode(sample.input_ids[: sample.n_prompt])
    return text


def test_the_group_has_the_eleven_that_need_no_download() -> None:
    assert expand_names(["ruler"]) == sorted(NEW_TOKENS)
    assert all("published tables" not in load_task(name).caveat and "tables elsewhere" in load_task(name).caveat for name in NEW_TOKENS)


@pytest.mark.parametrize("name", sorted(NEW_TOKENS))
def test_the_model_may_write_as_many_tokens_as_published(name: str, tokenizer: Any) -> None:
    [sample] = made(name, tokenizer, 12001, n=1)
    assert sample.n_prompt is not None
    needed = len(sample.input_ids) - sample.n_prompt
    # bytes are short tokens: four UUIDs or five names need more of them than was meant for words
    assert sample.max_new_tokens == max(NEW_TOKENS[name], needed)
    assert sample.n_prompt + sample.max_new_tokens <= 12001
    assert sample.rule == "contains"
    assert sample.has_template is True


# --- needles ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NIAH))
def test_prompts_hold_the_needles_that_were_published(name: str, tokenizer: Any) -> None:
    haystack, key, value, n_needles, n_queries, n_answers = NIAH[name]
    kind = "UUID" if value == UUID else "number"
    for sample in made(name, tokenizer):
        prompt = prompt_of(tokenizer, sample)
        needles = re.findall(rf"One of the secret {kind}s of ({key}) is: ({value})\.", prompt)
        asked = re.search(rf"What (?:is|are all) the secret {kind}s? of (.*) in the text above\?</user><assistant>(.*)$", prompt)
        assert asked is not None, "question, template and begun reply must close the prompt"
        keys = re.split(r", and |, ", asked[1])
        assert len(keys) == n_queries
        plural = "s" if n_answers > 1 else ""
        assert asked[2] == f"The secret {kind}{plural} of {asked[1]} in the text above {'are' if plural else 'is'}"
        # every value of the keys that are asked for, in the order of question and text, and nothing else
        assert [a.text for a in sample.answers] == [v for k in keys for own, v in needles if own == k]
        assert len(sample.answers) == n_answers
        assert len({v for _, v in needles}) == len(needles)
        if haystack == "needles":
            assert len(needles) > 50
            assert len(prompt) < len("".join(f"One of the secret {kind}s of {k} is: {v}.\n" for k, v in needles)) + 500
        else:
            assert len(needles) == n_needles
            # four values have one key, everything else has keys of its own
            assert len({k for k, _ in needles}) == n_needles * n_queries // n_answers


def test_no_line_of_the_haystack_has_the_key_that_is_asked_for(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # twelve keys for a hundred lines
    monkeypatch.setattr(_niah, "ALL_ADJECTIVES", ("red", "green", "blue"))
    monkeypatch.setattr(_niah, "ALL_NOUNS", ("dog", "cat", "cow", "hen"))
    for sample in made("niah_multikey_2", tokenizer):
        prompt = prompt_of(tokenizer, sample)
        asked = re.findall(r"of ([a-z-]+) in the text above\?", prompt)[0]
        assert prompt.count(f"of {asked} is: ") == 1
        assert len(re.findall("is: ", prompt)) > 50


def test_noise_is_one_line_and_the_needle_stands_between_whole_lines(tokenizer: Any) -> None:
    [sample] = made("niah_single_1", tokenizer, n=1)
    lines = prompt_of(tokenizer, sample).split("\n")[2:-2]
    assert Counter(lines)[NOISE] == len(lines) - 1


def test_prose_is_whole_sentences_in_their_order(tokenizer: Any) -> None:
    [sample] = made("niah_single_2_prose", tokenizer, n=1)
    text = re.sub(r" One of the secret numbers of [a-z-]+ is: \d+\.", "", prompt_of(tokenizer, sample).split("\n\n")[1])
    whole = " ".join((*sentences(), *sentences()))
    assert text in whole


@pytest.mark.parametrize(("name", "n_places"), [("niah_single_1", None), ("niah_single_2_prose", 40), ("niah_multikey_1_prose", 40)])
def test_needles_are_spread_evenly_over_the_depths(name: str, n_places: int | None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    # without the search for the length, hundreds of prompts are made in a moment
    monkeypatch.setattr(_niah, "chat_sample", lambda *_args, **given: found.extend(given["depths"]))
    load_text_task(name).samples(tokenizer, 1000, 500, 0)
    assert len(found) == 500
    if n_places:
        assert set(found) == set(_niah.DEPTHS)
        assert len(set(found)) == n_places
        assert (min(found), max(found)) == (0.0, 1.0)
    # of 500 draws a fifth of the prompt gets 100 ± 9
    fifths = Counter(min(4, int(5 * d)) for d in found)
    assert all(70 <= fifths[i] <= 130 for i in range(5))


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multiquery_prose", "needle_map"])
def test_needles_stand_at_the_depth_that_their_answer_tells(name: str, tokenizer: Any) -> None:
    # sentences of prose differ in length, lines do not
    tolerance = 0.03 if name in ("niah_single_1", "niah_multikey_2") else 0.1
    for sample in made(name, tokenizer, 12001, n=3):
        prompt = prompt_of(tokenizer, sample)
        start, stop = prompt.index("\n\n") + 2, prompt.rindex("\n\n")
        for answer in sample.answers:
            assert answer.depth is not None
            # sentences of prose differ in length
            assert (prompt.index(answer.text) - start) / (stop - start) == pytest.approx(answer.depth, abs=tolerance)
            assert f"(at {answer.depth:.0%})" in answer.question


def test_a_prompt_asks_the_same_at_every_length(tokenizer: Any) -> None:
    for name in NIAH:
        (short,), (long,) = (made(name, tokenizer, n_tokens, n=1) for n_tokens in (5009, 9001))
        assert [(a.question, a.text) for a in short.answers] == [(a.question, a.text) for a in long.answers]


def test_the_map_has_eleven_depths_and_every_sample_the_next(tokenizer: Any) -> None:
    samples = made("needle_map", tokenizer, 3001, n=23)
    assert [s.answers[0].depth for s in samples] == [i % 11 / 10 for i in range(23)]
    assert len({s.answers[0].text for s in samples}) == 23


# --- variables ----------------------------------------------------------------------------------------------------------------


def test_one_chain_of_four_hops_leads_to_the_five_answers(tokenizer: Any) -> None:
    for sample in made("vt", tokenizer, 12001):
        prompt = prompt_of(tokenizer, sample)
        example, question = prompt.split("Follow the variables in the text below.")[1:]
        solved = re.findall(r"[A-Z]{3}", example.split(":")[-1])
        for part, given, n_letters in ((example, solved, 3), (question, [a.text for a in sample.answers], 5)):
            asked = re.findall(r"have the value (\d{5}) in the text above\?", part)
            links = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", part)
            assert [source for _, source in links] == [asked[0], *(name for name, _ in links[:-1])], "each takes the value of the one before"
            assert given == [name for name, _ in links]
            assert [len(name) for name, _ in links] == [n_letters] * 5
        assert question.endswith(f"</user><assistant>By the assignments in the text above, 5 variables have the value {asked[0]}:")
        # names of the question are nowhere but in the assignments: the reply is not given away
        assert prompt.count(sample.answers[-1].text) == 1
        assert question.count(NOISE) > 50
        assert example.count(NOISE) == 10
        assert not re.search(r"VAR [^\n]*\nVAR ", prompt), "no assignment stands beside another"


# --- counted words ------------------------------------------------------------------------------------------------------------


def listed(text: str) -> list[str]:
    found = re.findall(r"(\d+)\. ([a-z]+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(
    ("n_tokens", "repeats", "example_repeats", "n_example"), [(16001, (30, 3), (10, 3), 40), (4095, (6, 1), (3, 1), 20)], ids=["long", "short"]
)
def test_ten_words_stand_more_often_than_all_others(
    n_tokens: int, repeats: tuple[int, int], example_repeats: tuple[int, int], n_example: int, tokenizer: Any
) -> None:
    for sample in made("cwe", tokenizer, n_tokens):
        _, example, question = prompt_of(tokenizer, sample).split("Below is a list of words.")
        shown, solved = example.split("Which 10 words")
        for text, (often, rarely), answers in (
            (shown, example_repeats, listed(solved.split(":")[1])),
            (question.split("Which 10 words")[0], repeats, [a.text for a in sample.answers]),
        ):
            found = Counter(listed(text))
            assert {word for word, n in found.items() if n == often} == set(answers)
            assert {n for word, n in found.items() if word not in answers} == {rarely}
            assert len(answers) == 10
        assert len(Counter(listed(shown))) == n_example


def test_prompts_are_short_below_4096_tokens(tokenizer: Any) -> None:
    load_text_task("cwe").samples(tokenizer, 4095, 1, 0)
    # thirty times ten words are more than 4096 bytes: the published repeats hold from there on
    with pytest.raises(OptionError, match="cwe needs prompts of at least"):
        load_text_task("cwe").samples(tokenizer, 4096, 1, 0)


def test_no_reply_can_name_a_word_by_naming_another(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = cwe.english_words()
    assert len(words) > 5000
    assert not [(a, b) for a in words[::7] for b in words if a != b and a in b]
    words = words[::20]
    monkeypatch.setattr(cwe, "english_words", lambda: words)
    [sample] = made("cwe", tokenizer, 30_001, n=1)
    rest = set(listed(prompt_of(tokenizer, sample).split("Below is a list of words.")[2].split("Which 10")[0])) - {a.text for a in sample.answers}
    assert rest - set(words), "the English words end before this length, and made-up ones follow"
    assert not [word for word in rest for a in sample.answers if a.text in word]


def test_made_up_words_hold_none_of_the_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    # ten pairs of letters, which six letters drawn by chance hold often
    monkeypatch.setattr(cwe, "english_words", lambda: ("an", "be", "do", "go", "he", "in", "it", "me", "no", "so"))
    common, rare = cwe._words(random.Random(0), 300)
    assert sorted(common) == sorted(cwe.english_words())
    assert len(set(rare)) == 300
    assert not [word for word in rare for known in common if known in word]


def test_frequencies_of_coded_words_fall_as_a_zeta_distribution(tokenizer: Any) -> None:
    for sample in made("fwe", tokenizer, 16001):
        prompt = prompt_of(tokenizer, sample)
        text = prompt.split("Find the three most frequent ones.\n")[1].split("\nWhich three")[0].split(" ")
        (dots, n_dots), *ranked = Counter(text).most_common()
        assert dots == "..."
        assert [word for word, _ in ranked[:3]] == [a.text for a in sample.answers]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        for rank, (_, n) in enumerate(ranked[:6], 2):
            assert n == pytest.approx(n_dots / rank**2, abs=1)
        # one word per 50 tokens, of which those are left whose share makes one
        assert len(text) / len(ranked) > 5


def test_counts_of_known_sizes_are_those_of_the_definition() -> None:
    # 1000 words: 1000 / 1.6449 = 607.9, a quarter of it 151.98, a ninth 67.5, a sixteenth 37.99, a twenty-fifth 24.3
    assert counts(1000, 5) == [607, 151, 67, 37, 24]
    # the third and the fourth word that are not dots differ at the shortest
    assert all(counts(n, 5)[3] > counts(n, 5)[4] for n in range(75, 3000))
