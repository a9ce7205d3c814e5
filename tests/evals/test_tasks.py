"""The prompts of every task: their exact lengths, where the answers stand, and that a perfect reader could give them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from tiny_llama import byte_tokenizer

from accel.errors import OptionError, UnsupportedError
from accel.evals.scenes import FAMILIES
from accel.evals.tasks import Sample, card, code_line, expand_names, load_task, load_text_task, task_names
from accel.evals.tasks._prompts import _most_that_fit, chat_prompt, encode_parts, insert, opening
from accel.evals.tasks._text import SOURCE_MODULES, paragraphs, sentences
from accel.evals.tasks._words import TOPICS

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
FORCED = ("needle", "fewshot", "code", "perplexity")
RULER = (
    "cwe", "fwe", "niah_multikey_1_prose", "niah_multikey_2", "niah_multikey_3", "niah_multiquery_prose", "niah_multivalue_prose", "niah_single_1",
    "niah_single_2_prose", "niah_single_3_prose", "vt",
)  # fmt: skip
INFINITEBENCH = ("kv_retrieval", "number_string", "passkey")
CHAT = (*RULER, *INFINITEBENCH, "key_value", "needle_map", "action_items")
# the model writes, behind plain text
WRITTEN = (*CHAT, "code_line")
# thirty times ten words do not fit into 5009 bytes
LONGER = {"cwe": 8001}
# bytes are short tokens: these lengths are those of prompts of about 700 and 2000 words
LENGTHS = (5009, 12001)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def made(name: str, tokenizer: Any, n_tokens: int, *, n: int = 1, seed: int = 0) -> list[Sample]:
    return load_text_task(name).samples(tokenizer, n_tokens, n, seed)


def text_of(tokenizer: Any, sample: Sample, stop: int | None = None) -> str:
    text: str = tokenizer.decode(sample.input_ids[:stop])
    return text


def test_tasks_are_the_files_of_the_folder() -> None:
    assert {name for name in task_names() if load_task(name).kind == "text"} == {*FORCED, *WRITTEN}


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("name", FORCED)
def test_forced_prompts_have_exactly_the_length_asked_for(name: str, n_tokens: int, tokenizer: Any) -> None:
    samples = made(name, tokenizer, n_tokens, n=2)
    assert [len(s.input_ids) for s in samples] == [n_tokens, n_tokens]
    assert [s.id for s in samples] == [0, 1]
    assert all(s.n_prompt is None for s in samples)


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("name", CHAT)
def test_chat_prompts_fill_what_the_reply_leaves(name: str, n_tokens: int, chat_tokenizer: Any) -> None:
    n_tokens = max(n_tokens, LONGER.get(name, 0))
    [sample] = made(name, chat_tokenizer, n_tokens)
    assert sample.n_prompt is not None
    assert sample.n_prompt + sample.max_new_tokens <= n_tokens
    assert len(sample.input_ids) - sample.n_prompt <= sample.max_new_tokens
    # at most one sentence short; the longest of the essays has 1350 characters
    assert sample.n_prompt + sample.max_new_tokens > n_tokens - 1400


@pytest.mark.parametrize("name", [*FORCED, *WRITTEN])
def test_the_answers_stand_where_they_are_said_to(name: str, chat_tokenizer: Any) -> None:
    for sample in made(name, chat_tokenizer, LONGER.get(name, 5009), n=2):
        assert sample.answers
        for answer in sample.answers:
            found = chat_tokenizer.decode(sample.input_ids[answer.start : answer.stop])
            # where a token begins with the space before its word, the space is a part of it
            assert found.strip() == answer.text.strip()


@pytest.mark.parametrize("name", [*FORCED, *WRITTEN])
def test_a_seed_fixes_the_prompts(name: str, tokenizer: Any) -> None:
    n_tokens = LONGER.get(name, 5009)
    first, second = made(name, tokenizer, n_tokens, n=2)
    assert made(name, tokenizer, n_tokens, n=2) == [first, second]
    [other] = made(name, tokenizer, n_tokens, seed=7)
    assert len({s.prompt_hash for s in (first, second, other)}) == 3


@pytest.mark.parametrize("name", ["needle", "fewshot", "code"])
def test_the_scored_end_is_the_same_at_every_length(name: str, tokenizer: Any) -> None:
    (short,), (long,) = (made(name, tokenizer, n) for n in LENGTHS)
    scored = LENGTHS[0] - short.answers[0].start
    assert short.input_ids[-scored:] == long.input_ids[-scored:]
    assert [a.text for a in short.answers] == [a.text for a in long.answers]


@pytest.mark.parametrize("name", [*FORCED, *WRITTEN])
def test_a_length_without_room_is_refused(name: str, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=r"at least \d+ tokens .* asked for 150"):
        made(name, tokenizer, 150)


def test_a_tokenizer_with_an_opening_token_has_it_once_and_first() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "A"
    plain = tokenizer.__call__

    class Opening:
        """Puts its first token before every text, as Llama's does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> Any:
            encoded = plain(text, add_special_tokens=False, **kwargs)
            if add_special_tokens:
                encoded["input_ids"] = [tokenizer.bos_token_id, *encoded["input_ids"]]
            return encoded

    for name in FORCED:
        [sample] = made(name, Opening(), 5009)
        assert sample.input_ids[0] == tokenizer.bos_token_id
        assert len(sample.input_ids) == 5009
        [answer, *_] = sample.answers
        assert tokenizer.decode(sample.input_ids[answer.start : answer.stop]).strip() == answer.text.strip()


def test_a_tokenizer_without_offsets_is_refused(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="offsets"):
        encode_parts(Slow(), "a b", ["b"])


def test_spans_of_parts_cover_their_tokens_only(tokenizer: Any) -> None:
    piece = encode_parts(tokenizer, "x is 12 and y is 12.", ["12", "12"])
    assert [tokenizer.decode(piece.ids[a:b]) for a, b in piece.spans] == ["12", "12"]
    assert piece.spans[0] != piece.spans[1]


def test_the_longest_prompt_that_fits_is_found_whatever_the_units_are() -> None:
    # units of 1 to 9 tokens, so that the first guess from their mean is wrong in both directions
    lengths = [10]
    for i in range(200):
        lengths.append(lengths[-1] + 1 + i * i % 9)
    for room in range(10, lengths[-1] + 5):
        found = _most_that_fit(lengths.__getitem__, 10, room, 200)
        assert found == max(k for k, n in enumerate(lengths) if n <= room)


def test_a_template_that_tells_the_date_makes_the_same_prompt_every_day(chat_tokenizer: Any) -> None:
    dated = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }} {{ date_string }} " + chat_tokenizer.chat_template
    told = copy.deepcopy(chat_tokenizer)
    told.chat_template = dated
    prompt = told.decode(chat_prompt(told, "Who?", "It is"))
    assert prompt.startswith("01 Jan 2026 2026-01-01 01 Jan 2026 <user>Who?")


@pytest.mark.parametrize(("before", "found"), [([], []), ([7], [7]), ([7, 9], [7, 9])])
def test_whatever_a_tokenizer_puts_before_a_text_opens_prompts(before: list[int], found: list[int]) -> None:
    def tokenizer(text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        # and a token behind it, which opens nothing
        return {"input_ids": [*before, 5, 6, 2] if add_special_tokens else [5, 6]}

    assert opening(tokenizer) == found


# --- texts --------------------------------------------------------------------------------------------------------------------


def test_the_essays_are_whole_paragraphs_of_prose() -> None:
    lines = paragraphs()
    assert len(set(lines)) == len(lines) > 600
    whole = re.compile(r"[A-Z\"'].*[.!?][\"')\]]*", re.ASCII)
    odd = [line[:60] for line in lines if not whole.fullmatch(line) or not line.isascii() or re.search(r"  |--|[`|*{}]", line)]
    assert not odd
    assert not [s for s in sentences() if re.fullmatch(r"[IVX]+\.|\d+\.|Mrs?\.", s)]


# --- needle -------------------------------------------------------------------------------------------------------------------


def test_needles_begin_at_their_depths(tokenizer: Any) -> None:
    n = 12001
    [sample] = made("needle", tokenizer, n)
    text = text_of(tokenizer, sample, n - 400)
    # byte tokens: characters are tokens, as far as the help topics are ASCII; the topics hold a few quotation marks of three bytes
    starts = [found.start() / n for found in re.finditer(r"\n\nNote that the magic number", text)]
    assert starts == pytest.approx([0.08, 0.33, 0.58, 0.83], abs=0.01)


def test_the_tail_repeats_the_needles_in_the_order_3_1_4_2(tokenizer: Any) -> None:
    [sample] = made("needle", tokenizer, 12001)
    text = text_of(tokenizer, sample)
    facts = re.findall(r"magic number for (\w+) is (\d{5})\.", text)
    assert len(facts) == 8
    assert facts[4:] == [facts[i] for i in (2, 0, 3, 1)]
    assert [a.text for a in sample.answers] == [number for _, number in facts[4:]]
    assert len({key for key, _ in facts}) == 4


def test_insert_keeps_every_token_of_the_haystack() -> None:
    hay = list(range(20))
    found = insert(hay, [[100, 101], [200]], [0.25, 0.5], 23)
    assert found.index(100) == 5
    assert found.index(200) == 11
    assert [x for x in found if x < 100] == hay


# --- few-shot -----------------------------------------------------------------------------------------------------------------


def test_the_label_follows_from_the_word_and_from_nothing_else(tokenizer: Any) -> None:
    topic_of = {word: topic for topic, words in TOPICS.items() for word in words}
    assert len(topic_of) == 100
    [sample] = made("fewshot", tokenizer, 12001)
    assert len(sample.answers) == 24
    for answer in sample.answers:
        assert topic_of[answer.question] == answer.text
    examples = re.findall(r"Sentence: (.*)\nTopic: (\w+)", text_of(tokenizer, sample))
    for sentence, label in examples[1:]:
        assert not any(topic in sentence for topic in TOPICS)
        assert [topic_of[word] for word in re.findall(r"\w+", sentence) if word in topic_of] == [label]


@pytest.mark.parametrize(("name", "begin"), [("needle", "\n\nNote that the magic number for"), ("fewshot", "Sentence: ")])
def test_every_question_can_be_asked_by_itself(name: str, begin: str, tokenizer: Any) -> None:
    [sample] = made(name, tokenizer, 12001)
    for answer, before in zip(sample.answers, [None, *sample.answers[:-1]], strict=True):
        assert answer.lead is not None
        assert tokenizer.decode(sample.input_ids[answer.lead : answer.start]).startswith(begin)
        # a question holds nothing of the answer before
        assert before is None or answer.lead >= before.stop


# --- key and value ------------------------------------------------------------------------------------------------------------


def test_one_pair_of_the_object_is_asked_for(chat_tokenizer: Any) -> None:
    for sample in made("key_value", chat_tokenizer, 5009, n=3):
        assert sample.n_prompt is not None
        [answer] = sample.answers
        key = answer.question.split(" (at")[0]
        text = text_of(chat_tokenizer, sample, sample.n_prompt)
        pairs = dict(re.findall(r'"([a-z]+-[a-z]+-\d\d)": "(\d{5})"', text))
        assert pairs[key] == answer.text
        assert len(pairs) > 100
        assert text.count(f'"{key}": "{answer.text}"') == 1
        assert text.endswith(f'What is the value of the key "{key}"?</user><assistant>"{key}": "')


# --- code ---------------------------------------------------------------------------------------------------------------------


def test_code_ends_with_the_module_and_scores_its_last_512_tokens(tokenizer: Any) -> None:
    import argparse
    from pathlib import Path

    [sample] = made("code", tokenizer, 5009)
    assert Path(argparse.__file__).read_text().endswith(text_of(tokenizer, sample)[10:])
    assert [a.start for a in sample.answers] == list(range(5009 - 512, 5009))


def test_more_code_samples_than_modules_are_refused(tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="one per module"):
        made("code", tokenizer, 2048, n=99)


def test_a_line_of_code_is_the_one_that_follows(tokenizer: Any) -> None:
    from accel.evals.tasks._text import SOURCE_MODULES, source

    for i, sample in enumerate(made("code_line", tokenizer, 9001, n=4)):
        [answer] = sample.answers
        assert sample.n_prompt is not None
        assert sample.n_prompt + sample.max_new_tokens == 9001
        assert answer.question.startswith(f"{SOURCE_MODULES[i]}, line ")
        assert 20 <= len(answer.text) <= 80
        # characters outside ASCII have several bytes, and the first of the prompt may be cut
        assert text_of(tokenizer, sample)[10:] in source(SOURCE_MODULES[i - 1]) + source(SOURCE_MODULES[i])
        assert text_of(tokenizer, sample, sample.n_prompt).endswith("\n")
        assert text_of(tokenizer, sample).endswith(answer.text + "\n")
        assert (sample.rule, sample.has_template) == ("line_similarity", None)


def test_no_line_of_code_is_asked_for_twice_while_there_are_others(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"value_of_line_{i} = compute({i})" for i in range(3)]
    monkeypatch.setattr(code_line, "source", lambda _module: "\n".join(["x = 1"] * 99 + lines))
    asked = [sample.answers[0].question for sample in made("code_line", tokenizer, 600, n=3 * len(SOURCE_MODULES))]
    assert len(set(asked)) == len(asked)
    assert len(made("code_line", tokenizer, 600, n=4 * len(SOURCE_MODULES))) == 4 * len(SOURCE_MODULES)


# --- perplexity by position ---------------------------------------------------------------------------------------------------


def test_perplexity_is_taken_at_sixteen_even_places(tokenizer: Any) -> None:
    [sample] = made("perplexity", tokenizer, 8000)
    starts = {depth: [a.start for a in sample.answers if a.depth == depth] for depth in (1 / 16, 0.5, 1.0)}
    assert starts == {1 / 16: [*range(468, 500)], 0.5: [*range(3968, 4000)], 1.0: [*range(7968, 8000)]}
    assert len(sample.answers) == 16 * 32
    assert all(a.stop == a.start + 1 for a in sample.answers)


def test_more_prose_than_there_is_is_refused(tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=r"perplexity has \d+ tokens of prose with this tokenizer, asked for 1000000"):
        made("perplexity", tokenizer, 1_000_000)


# --- extraction ---------------------------------------------------------------------------------------------------------------


def test_the_minutes_hold_eight_items_in_the_order_of_the_answers(chat_tokenizer: Any) -> None:
    with pytest.raises(OptionError) as refused:
        made("action_items", chat_tokenizer, 150)
    [shortest] = re.findall(r"at least (\d+) tokens", str(refused.value))
    # without any prose, all stand in the same place
    for sample in (*made("action_items", chat_tokenizer, int(shortest)), *made("action_items", chat_tokenizer, 9001, n=3)):
        prompt = text_of(chat_tokenizer, sample, sample.n_prompt)
        assert re.findall(r"Action item: (\w+ \w+ the \w+)\.", prompt) == [a.text for a in sample.answers]
        assert len(sample.answers) == 8
        assert len({word for a in sample.answers for word in a.text.split()[::3]}) == 16
        assert prompt.endswith("one a line.</user><assistant>Action item:")
        reply = text_of(chat_tokenizer, sample)[len(prompt) :]
        assert reply == "\nAction item:".join(f" {a.text}." for a in sample.answers)


# --- templates, cards ---------------------------------------------------------------------------------------------------------


def test_without_a_chat_template_the_question_stands_plainly_and_the_sample_says_so(tokenizer: Any, chat_tokenizer: Any) -> None:
    [plain], [chat] = (made("niah_single_1", t, 5009) for t in (tokenizer, chat_tokenizer))
    assert text_of(tokenizer, plain, plain.n_prompt).startswith("A secret number is hidden")
    assert text_of(tokenizer, chat, chat.n_prompt).startswith("<user>A secret number is hidden")
    assert (plain.has_template, chat.has_template) == (False, True)
    # what the template takes is not there for the text
    assert plain.n_prompt is not None
    assert plain.n_prompt + plain.max_new_tokens <= 5009
    assert made("needle", chat_tokenizer, 5009)[0].has_template is None


def test_every_task_has_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    from accel.evals.tasks.__main__ import main

    for name in task_names():
        assert len(card(name)) > 60, name
    assert main(["infinitebench", "vt"]) == 0
    told = capsys.readouterr().out
    assert [told.index(f"{name} (") for name in ("kv_retrieval", "number_string", "passkey", "vt")] == sorted(
        told.index(f"{name} (") for name in ("kv_retrieval", "number_string", "passkey", "vt")
    )
    assert "one chain of four hops" in told
    assert "RULER flatters sparse prefill" in told
    assert main(["vtt"]) == 2
    assert "did you mean 'vt'" in capsys.readouterr().err


def test_without_a_name_the_tasks_are_listed_and_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    from accel.evals.tasks.__main__ import main

    assert main([]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == task_names()
    assert all(line.split(maxsplit=1)[1] == card(line.split()[0]).splitlines()[0] for line in told)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m accel.evals.tasks" in capsys.readouterr().out


# --- names --------------------------------------------------------------------------------------------------------------------


def test_groups_stand_for_their_members() -> None:
    assert expand_names(["ruler", "needle", "niah_single_1"]) == [*RULER, "needle"]
    assert expand_names(["infinitebench"]) == [*INFINITEBENCH]
    assert expand_names(["all"]) == sorted([*FORCED, *WRITTEN])
    assert expand_names(["scenes"]) == [f"scene_{family}" for family in sorted(FAMILIES)]


def test_an_unknown_task_is_told_the_closest_one() -> None:
    with pytest.raises(OptionError, match=r"did you mean 'scenes'.* groups: all, infinitebench, ruler, scenes; data:FILE"):
        expand_names(["scene"])
    with pytest.raises(OptionError, match="did you mean 'needle'"):
        expand_names(["nedle"])
