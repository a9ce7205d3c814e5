"""Prompts of one's own as a task: what a file may hold, and that everything wrong in it is told with its line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import byte_tokenizer

from accel.errors import OptionError
from accel.evals.tasks import card, expand_names, load_text_task

pytest.importorskip("datasets")

GOOD = {"prompt": "a", "answers": ["b"]}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def written(path: Path, *rows: Any, name: str = "own.jsonl") -> str:
    """The task's name for a file with these lines; dicts are written as JSON."""
    file = path / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return f"data:{file}"


def test_rows_are_prompts_with_answers_that_are_all_wanted(tmp_path: Path, tokenizer: Any) -> None:
    name = written(tmp_path, {"prompt": "Name two colours of ü.", "answers": ["red", "blue"]}, "", {"prompt": "And?", "answers": ["no"]})
    assert expand_names([name, "needle", name]) == [name, "needle"]
    first, second = load_text_task(name).samples(tokenizer, 200, 2, 0)
    assert tokenizer.decode(first.input_ids[: first.n_prompt]) == "Name two colours of ü."
    assert [tokenizer.decode(first.input_ids[a.start : a.stop]) for a in first.answers] == ["red", "blue"]
    assert [a.question for a in (*first.answers, *second.answers)] == ["row 1, answer 1", "row 1, answer 2", "row 2"]
    assert (first.max_new_tokens, first.rule, first.has_template) == (64, "contains", False)
    assert "of your own" in card(name)


def test_rulers_own_fields_and_options_are_understood(tmp_path: Path, tokenizer: Any) -> None:
    row = {"index": 0, "input": "text", "outputs": ["7"], "answer_prefix": " It is", "max_new_tokens": 6, "rule": "first_number", "length": 9}
    [sample] = load_text_task(written(tmp_path, row)).samples(tokenizer, 100, 1, 0)
    assert tokenizer.decode(sample.input_ids) == "text It is 7"
    assert (sample.max_new_tokens, sample.rule) == (6, "first_number")


def test_the_chat_template_is_used_unless_a_row_says_no(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": "Who?", "answer": "I", "prefix": "Me:", "template": wants} for wants in (None, False, True)]
    chat, plain, demanded = load_text_task(written(tmp_path, *rows)).samples(tokenizer, 200, 3, 0)
    assert demanded.input_ids == chat.input_ids
    assert tokenizer.decode(chat.input_ids) == "<user>Who?</user><assistant>Me: I"
    assert tokenizer.decode(plain.input_ids) == "Who?Me: I"
    assert (chat.has_template, plain.has_template) == (True, False)


def test_a_chat_template_that_is_demanded_must_be_there(tmp_path: Path, tokenizer: Any) -> None:
    name = written(tmp_path, GOOD, {**GOOD, "template": True})
    assert load_text_task(name).samples(tokenizer, 100, 1, 0)[0].has_template is False
    with pytest.raises(OptionError, match=r"line 2 asks for a chat template, and this model's tokenizer has none"):
        load_text_task(name).samples(tokenizer, 100, 2, 0)


def test_csv_files_are_read_too(tmp_path: Path, tokenizer: Any) -> None:
    [sample] = load_text_task(written(tmp_path, "prompt,answer", "one and one is,2", name="own.csv")).samples(tokenizer, 100, 1, 0)
    assert [a.text for a in sample.answers] == ["2"]


def test_texts_of_a_csv_file_are_taken_as_they_stand_there(tmp_path: Path, tokenizer: Any) -> None:
    rows = ["prompt,answer,max_new_tokens", '"The key, please:",007,5', "Not applicable is short:,NA,", "12,1.50,8"]
    samples = load_text_task(written(tmp_path, *rows, name="own.csv")).samples(tokenizer, 100, 3, 0)
    assert [sample.answers[0].text for sample in samples] == ["007", "NA", "1.50"]
    assert [sample.max_new_tokens for sample in samples] == [5, 64, 8]
    assert tokenizer.decode(samples[2].input_ids[: samples[2].n_prompt]) == "12"


def test_an_empty_answer_of_a_csv_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"own\.csv, row 2 has no answers or outputs or answer; it has prompt"):
        load_text_task(written(tmp_path, "prompt,answer", "a,b", "c,", name="own.csv"))


def test_a_prompt_is_never_cut(tmp_path: Path, tokenizer: Any) -> None:
    name = written(tmp_path, {"prompt": "x", "answers": ["y"]}, {"prompt": "x" * 100, "answers": ["y"]})
    assert len(load_text_task(name).samples(tokenizer, 164, 2, 0)) == 2
    with pytest.raises(OptionError, match=r"own\.jsonl, line 2: 100 tokens and 64 new ones do not fit into 163; .* --lengths"):
        load_text_task(name).samples(tokenizer, 163, 2, 0)
    with pytest.raises(OptionError, match="2 rows, asked for 3 samples"):
        load_text_task(name).samples(tokenizer, 164, 3, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", ', r"line 3: not JSON \(.* at column \d+\)"),
        ("[1, 2]", r"line 3: not a JSON object"),
        ({"answers": ["b"]}, r"line 3 has no prompt or input; it has answers"),
        ({"prompt": "a"}, r"line 3 has no answers or outputs or answer"),
        ({"prompt": "a", "answers": []}, r"line 3: the answers must be texts, at least one, got \[\]"),
        ({"prompt": "a", "answers": [""]}, r"line 3: the answers must be texts"),
        ({"prompt": "", "answers": ["b"]}, r"line 3: the prompt must be a text"),
        ({"prompt": "a", "input": "a", "answers": ["b"]}, r"line 3 has prompt and input, of which only one can count"),
        ({**GOOD, "rule": "exactly"}, r"line 3: there is no rule 'exactly'; there are contains, first_number"),
        ({**GOOD, "max_new_tokens": 0}, r"line 3: max_new_tokens must be a whole number above 0, got 0"),
        ({**GOOD, "template": "no"}, r"line 3: template must be true or false, got 'no'"),
        ({**GOOD, "prefix": 5}, r"line 3: the prefix must be a text, got 5"),
    ],
    ids=["cut", "list", "no prompt", "no answers", "empty answers", "empty answer", "empty prompt", "two prompts", "rule", "tokens",
         "template", "prefix"],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_with_its_line(row: Any, message: str, tmp_path: Path) -> None:
    # the empty line counts as a line and is no row
    with pytest.raises(OptionError, match=rf"own\.jsonl, {message}"):
        load_text_task(written(tmp_path, GOOD, "", row))


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no file '.*none\.jsonl'"):
        expand_names([f"data:{tmp_path}/none.jsonl"])
    with pytest.raises(OptionError, match=r"there is no file ''"):
        expand_names(["data:"])
    with pytest.raises(OptionError, match=r"cannot read files that end in '\.txt'; there are loaders for \.jsonl"):
        load_text_task(written(tmp_path, GOOD, name="own.txt"))
    with pytest.raises(OptionError, match="holds no rows"):
        load_text_task(written(tmp_path, "", name="blank.jsonl"))
    for name in ("empty.jsonl", "empty.csv"):
        with pytest.raises(OptionError, match=rf"{name}: the file is empty"):
            load_text_task(written(tmp_path, name=name))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xe4"}\n')
    with pytest.raises(OptionError, match=r"latin\.jsonl, line 2: not UTF-8 text .* at byte 12"):
        load_text_task(f"data:{tmp_path}/latin.jsonl")


def test_fields_of_several_kinds_are_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"own\.jsonl.*(line 2: the prompt must be a text|cannot be read)"):
        load_text_task(written(tmp_path, GOOD, {"prompt": {"a": 1}, "answers": ["b"]}))


def test_datasets_of_the_hub_are_asked_for_by_name_and_split(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    asked: list[tuple[str, Any]] = []
    parts = {"train": [GOOD], "test": [{"prompt": "c", "answers": ["d"]}]}

    def load(name: str, split: str | None = None) -> Any:
        asked.append((name, split))
        if name == "some/missing":
            raise ConnectionError("no network here\nmore")
        return parts[split] if split else {"test": parts["test"]} if name == "some/single" else parts

    monkeypatch.setattr(datasets, "load_dataset", load)
    [sample] = load_text_task("data:some/set@test").samples(tokenizer, 100, 1, 0)
    assert tokenizer.decode(sample.input_ids) == "c d"
    assert load_text_task("data:some/single").samples(tokenizer, 100, 1, 0) == [sample]
    assert asked == [("some/set", "test"), ("some/single", None)]
    with pytest.raises(OptionError, match=r"some/set has the splits train, test: choose one, such as data:some/set@train"):
        load_text_task("data:some/set")
    with pytest.raises(OptionError, match=r"neither a file nor a dataset that can be loaded: no network here$"):
        load_text_task("data:some/missing")


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"needs the package datasets: pip install 'accel-inference\[evals\]'"):
        load_text_task(written(tmp_path, GOOD))
