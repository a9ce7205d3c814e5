"""`accel run` from a saved model to the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_llama import save_tiny

from accel.cli.main import main

SPARSE = "flexprefill:min_seq_len=0,min_budget=128,block_size=64,gamma=0.6"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=2048))


def run(model: str, *words: str) -> int:
    return main(["run", "--model", model, "--dtype", "float32", "--method", SPARSE, "--tasks", "needle", "--lengths", "1k", *words])


def test_one_command_leaves_a_whole_folder_and_a_table(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--out", str(tmp_path / "r")) == 0
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"config.yaml", "samples.jsonl", "result.json", "report.md", "report.html"}
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    labels = ["dense", "flexprefill", "streaming (same density)", "random_blocks (same density)"]
    assert [row["label"].replace(SPARSE, "").split("(min")[0] for row in result["scores"]] == labels
    assert len(result["answers"]) == 16
    assert result["n_missing"] == 0
    out = capsys.readouterr()
    assert all(label in out.out for label in labels)
    assert "report.html" in out.err


def test_a_run_stopped_at_its_limit_is_unfinished_until_resumed(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "r")
    assert run(model, "--out", folder, "--limit", "3") == 1
    assert "1 samples are missing" in capsys.readouterr().out
    assert run(model, "--out", folder) != 0, "without --resume the folder is not touched"
    assert run(model, "--out", folder, "--resume") == 0
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 4
    assert run(model, "--out", folder, "--resume", "--seed", "5") == 2
    assert "seed" in capsys.readouterr().err


def test_the_dry_run_shows_flags_over_file_over_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("tasks: code\nlengths: 2k\nsamples: 3\n")
    assert main(["run", "--config", str(file), "--lengths", "1k", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["tasks"], shown["lengths"], shown["samples"], shown["model"]) == ("code", "1k", 3, "smollm2")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "nedle"], "did you mean 'needle'"),
        (["--method", "flexprefil"], "did you mean 'flexprefill'"),
        (["--resume"], "--out"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--lengths", "4q"], "a length is"),
    ],
    ids=["task", "method", "resume_without_folder", "limit", "length"],
)
def test_a_wrong_word_is_told_before_anything_loads(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
