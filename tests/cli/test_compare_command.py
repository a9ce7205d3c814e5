"""`accel compare` from the shell: tables, files, exit codes, and a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from written_runs import write_bench, write_run

from accel.cli.main import main

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    run = write_run(tmp_path / "scores", {"m": [1, 1, 1, 0]})
    bench = write_bench(tmp_path / "times", {"dense (sdpa)": 100.0, "dense (accel)": 80.0, "m": 40.0})
    return [str(run), str(bench)]


def test_tables_and_files(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compared"
    assert main(["compare", *folders, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for title in ("Folders", "Scores", "Differences, prompt by prompt", "Time to first token", "Accuracy against time"):
        assert f"\n{title}\n" in f"\n{text}"
    assert "exact McNemar" in text
    assert "2.00×" in text, "80 ms of the fastest dense over 40 ms"
    assert "\n× fastest dense: its time over that of the row, above 1 is faster." in text
    assert "1K: score of needle; time to first token." in text.replace("\n", " ")
    assert {file.name for file in out.iterdir()} == {"compare.json", "compare.md", "compare.html"}
    written = json.loads((out / "compare.json").read_text())
    assert [row["label"] for row in written["fronts"] if row["is_front"]] == ["dense (accel)", "m"]
    assert "## Accuracy against time" in (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    assert page.count("<svg") >= 2, "score against density and against time"
    assert "accel compare" in page
    assert main(["compare", folders[0], "--out", str(out)]) == 0, "an earlier comparison may be written over"


def test_a_gate_that_holds_and_one_that_fails(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *folders, "--gate", "0.3"]) == 0
    shown = capsys.readouterr()
    assert "Gate\n" in shown.out
    assert "gate: needle at 1024 tokens rests on 4 prompts; fewer than 10 tell little of others" in shown.out
    assert shown.err == ""
    out = tmp_path / "compared"
    assert main(["compare", *folders, "--gate", "needle=0.2", "--out", str(out)]) == 1
    sentence = "gate: m on needle at 1024 tokens: it loses 0.250 of score against dense, more than the margin of 0.2 (4 prompts)"
    assert sentence in capsys.readouterr().err
    assert f"> {sentence}" in (out / "compare.md").read_text()
    assert main(["compare", *folders, "--gate", "0.3", "--confidence", "0.95"]) == 1
    assert "cannot be ruled out (95%, one-sided" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", " , "])
def test_a_gate_without_a_margin_is_a_mistake(given: str, folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *folders, "--gate", given]) == 2
    assert "names no margin" in capsys.readouterr().err


def test_a_gate_on_what_dense_cannot_do_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "scores", {"m": [0, 0]}, dense=[0, 0])
    assert main(["compare", str(run), "--gate", "0.02"]) == 1
    assert "gate: m on needle at 1024 tokens: dense answers none of 2 prompts: no method can be told from it" in capsys.readouterr().err


def test_json_is_all_that_is_printed(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *folders, "--json", "--gate", "0.3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"][0]["loss"] == 0.25
    assert found["comparisons"][0]["p"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--confidence", "0.9"], "give a margin with --gate"), (["--gate", "0.1", "--confidence", "95"], "between 0.5 and 1"),
        (["--gate", "fewshot=0.1"], "no folder has scores of fewshot"), (["--out", "."], "holds other files"), (["nowhere"], "nowhere is not there"),
    ],
    ids=["confidence_alone", "percent", "task", "out", "folder"],
)  # fmt: skip
def test_mistakes_are_one_line(words: list[str], message: str, folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *folders, *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
