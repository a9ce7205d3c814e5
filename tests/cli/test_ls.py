"""`accel ls` shows every registered method against every host, and the notes that a host keeps."""

from __future__ import annotations

import argparse
import json
import sys
import types

import pytest

from accel.cli import ls
from accel.registry import method_names


def show(capsys: pytest.CaptureFixture[str], *, as_json: bool) -> str:
    assert ls.main(argparse.Namespace(json=as_json)) == 0
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
    text = show(capsys, as_json=False)
    assert [line.split()[0] for line in text.splitlines()[2 : 2 + len(method_names())]] == method_names()
    assert "transformers" in text.splitlines()[0]
    assert "powerattention: quality depends on adapting" in text


def test_what_a_method_wants_to_be_measured_is_listed_and_not_reported_twice(capsys: pytest.CaptureFixture[str]) -> None:
    from next_scale import INFO

    from accel.registry import build

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
    text = show(capsys, as_json=False)
    assert "On transformers\n  FSDP: never tried" in text


def test_refusal_of_a_host_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = ls.MethodRow("toy", "kv_compression", "Forgets.", None, {"transformers": ["no such cache", "nor head"]})
    monkeypatch.setattr(ls, "method_rows", lambda: [row])
    text = show(capsys, as_json=False)
    assert text.splitlines()[2].split() == ["toy", "kv", "compression", "no", "none"]
    assert "toy on transformers: no such cache; nor head" in text
