"""`accel ls` shows every registered method against every host, and the notes that a host keeps."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import types

import pytest

from accel.cli import ls
from accel.errors import OptionError
from accel.patches.streaming_kv import StreamingKV
from accel.registry import build, method_names


def show(capsys: pytest.CaptureFixture[str], *methods: str, as_json: bool = False, notes: bool = False) -> str:
    assert ls.main(argparse.Namespace(json=as_json, methods=methods, notes=notes)) == 0
    return capsys.readouterr().out


def test_every_method_has_a_row_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(show(capsys, as_json=True))["methods"]
    assert [row["name"] for row in rows] == method_names()
    for row in rows:
        assert len(row["summary"]) > 20, "the first line of the class's docstring"
        cache = row["kind"] == "kv_compression"
        homes = [host for host, reasons in row["hosts"].items() if not reasons]
        # what works from scale to scale does not run on decoders, and what decides inside the model not in vLLM
        assert homes in ([["nextscale"], ["nextscale", "transformers"]] if cache else [["transformers"], ["transformers", "vllm"]])


def test_text_names_methods_hosts_and_training(capsys: pytest.CaptureFixture[str]) -> None:
    text = show(capsys)
    assert [line.split()[0] for line in text.splitlines()[2 : 2 + len(method_names())]] == method_names()
    assert "transformers" in text.splitlines()[0]
    assert "powerattention: quality depends on adapting" in text


def test_what_a_method_wants_to_be_measured_is_listed_and_not_reported_twice(capsys: pytest.CaptureFixture[str]) -> None:
    from next_scale import INFO

    [row] = [row for row in json.loads(show(capsys, as_json=True))["methods"] if row["name"] == "hack"]
    assert "with profile=FILE: `accel tune hack" in row["needs_training"]
    notice = str(build("hack").notice(INFO))
    assert notice.count("accel tune hack") == 1
    assert row["needs_training"] not in notice


def test_notes_of_a_host_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notes = types.ModuleType("accel.patches.hosts.transformers.notes")
    notes.HOST_NOTES = {"FSDP": "never tried"}  # type: ignore[attr-defined]
    notes.__spec__ = ls.importlib.util.spec_from_loader(notes.__name__, loader=None)
    monkeypatch.setitem(sys.modules, notes.__name__, notes)
    assert json.loads(show(capsys, as_json=True))["notes"]["transformers"] == {"FSDP": "never tried"}
    assert "On transformers\n  FSDP: never tried" in show(capsys, notes=True)
    assert "FSDP" not in show(capsys)


def test_refusal_of_a_host_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = ls.MethodRow("toy", "kv_compression", "Forgets.", None, {"transformers": ["no such cache", "nor head"]})
    monkeypatch.setattr(ls, "method_rows", lambda names: [row])
    assert show(capsys).splitlines()[2].split() == ["toy", "kv", "compression", "no", "none"]
    assert "  on transformers: no such cache; nor head\n" in show(capsys, "toy")


@pytest.mark.parametrize("name", method_names())
def test_a_method_tells_each_of_its_options_and_the_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = json.loads(show(capsys, name, as_json=True))["methods"]
    assert row["name"] == name
    told = " ".join(row["text"])
    # in front of a colon, alone or in a list, or quoted where another option or the first line tells it
    assert not [option for option in row["defaults"] if not re.search(rf"\b{option}(, \w+)*: |`{option}`", told)]
    assert not [text for text in row["text"] if "Base of" in text], "what a base says of itself is for those who write methods"
    text = show(capsys, name)
    defaults = text.split("  defaults: ")[1].split("  training: ")[0].split()
    assert " ".join(defaults) == ", ".join(f"{field.name}={field.default!r}" for field in dataclasses.fields(build(name)) if field.init)


@pytest.mark.parametrize("name", method_names())
def test_a_card_speaks_of_nothing_that_users_cannot_see(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not re.search(r"\.md §|`_|accel\.patches\._|`make_plan`|`structural_index`", show(capsys, name))


def test_an_option_is_told_by_the_class_that_is_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    told = [line.strip() for line in show(capsys, "hack").splitlines()]
    [keep] = [line for line in told if line.startswith("keep: ")]
    assert "as a mean (1 − ρ)" in keep
    assert sum(line.startswith("every: ") for line in told) == 1, "of its base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silent(StreamingKV):
    places: frozenset[str] = frozenset({"here"})


Silent.__doc__ = dataclasses.make_dataclass("Silent", ["places"]).__doc__


def test_a_method_without_words_and_with_an_odd_default_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("accel.registry.build", lambda name: Silent())
    [row] = json.loads(show(capsys, "streaming_kv", as_json=True))["methods"]
    assert row["summary"] == "(says nothing of itself)"
    assert row["defaults"]["places"] == "frozenset({'here'})"
    assert row["text"][0].startswith("sinks: ")


def test_an_unknown_method_is_named_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"no method is called 'flexprefil'.*flexprefill"):
        ls.method_rows(["flexprefil"])
