"""Settings, run folders and data types of the measuring commands."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel.cli import env, measuring
from accel.cli.measuring import choose_dtype, finish_run, merge_settings, new_folder
from accel.cli.table import format_table
from accel.errors import AccelError, OptionError

pytest.importorskip("matplotlib")

MEASURING = ("bench", "demo", "env", "inspect")


def arguments(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"config": None, "lengths": None, "repeats": None, **values})


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("lengths: 8k\nrepeats: 7\n")
    defaults = {"lengths": "4k", "repeats": 5}
    assert merge_settings(arguments(), defaults) == {"lengths": "4k", "repeats": 5}
    assert merge_settings(arguments(config=str(file)), defaults) == {"lengths": "8k", "repeats": 7}
    # 0 is a value, not an absent flag
    assert merge_settings(arguments(config=str(file), repeats=0), defaults) == {"lengths": "8k", "repeats": 0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("repeat: 7", "did you mean 'repeats'"),
        ("- 4k", "must hold settings"),
        ("a: [", "cannot read the settings"),
        ("model: 3", "model must be text, got 3"),
        ("out: [runs]", "out must be text"),
    ],
    ids=["unknown", "list", "broken", "number", "texts"],
)
def test_a_wrong_settings_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=message):
        merge_settings(arguments(config=str(file)), {"lengths": "4k", "repeats": 5, "model": "smollm2", "out": None})


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("a result")
    with pytest.raises(AccelError, match="--out"), new_folder("bench", str(tmp_path)):
        pass
    with new_folder("bench", str(tmp_path / "new" / "run")) as folder:
        assert folder.is_dir()


def test_a_command_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in ("new/run", "own", "own/run"):
        with pytest.raises(KeyboardInterrupt), new_folder("bench", str(tmp_path / name)):
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["own"], "a folder that was there stays"
    with new_folder("bench", str(tmp_path / "new" / "run")) as folder:
        (folder / "result.json").write_text("{}")
    assert (folder / "result.json").exists()


def test_a_run_that_could_not_be_reported_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.evals.report.page.NEEDED_FOR_HTML", ("no_such_package",))
    with pytest.raises(AccelError, match="pip install no_such_package"), new_folder("bench", str(tmp_path / "run")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_carries_date_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder("bench", None) as folder:
        assert folder.match("runs/20??-??-??-??????-bench")


def test_finished_runs_hold_settings_result_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish_run(tmp_path, {"command": "bench", "config": {"lengths": "4k"}})
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "result.json", "report.md", "report.html"}
    assert json.loads((tmp_path / "result.json").read_text())["config"] == {"lengths": "4k"}
    output = capsys.readouterr()
    assert output.out == ""
    assert "report.html" in output.err


@pytest.mark.parametrize("is_fast, expected", [(True, "bfloat16"), (False, "float32")], ids=["fast-bf16", "slow-bf16"])
def test_auto_takes_the_type_this_machine_is_fast_in(monkeypatch: pytest.MonkeyPatch, is_fast: bool, expected: str) -> None:
    monkeypatch.setattr(env, "is_bf16_fast", lambda: is_fast)
    assert choose_dtype("auto", "cpu")[0] == expected
    assert choose_dtype("float16", "cpu")[0] == "float16"


@pytest.mark.parametrize(
    "device, message",
    [("cuda", "finds no cuda device here; run it on --device cpu"), ("cuda:1", "finds no cuda"), ("gpu", "there is no device 'gpu'")],
)
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from accel.cli.main import main
    from accel.evals.cache_bench import __main__ as cache_bench

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in (["draw", "--labels", "1"], ["run", "--model", "small-var", "--tasks", "images"], ["bench", "--what", "ttft"],
                  ["inspect", "small-var"], ["tune", "hack", "--model", "small-var", "--data", "classes"]):  # fmt: skip
        assert main([*words, "--device", device, "--out", str(tmp_path / words[0])]) == 2, words
        err = capsys.readouterr().err
        assert message in err
        assert "Traceback" not in err
    assert cache_bench.main(["--device", device]) == 2
    assert message in capsys.readouterr().err
    # bench makes its folder before it knows
    assert {path.name for path in tmp_path.iterdir()} <= {"bench"}


def test_a_device_beyond_the_last_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_dtype("auto", "cuda:0")[0] == "bfloat16"
    with pytest.raises(OptionError, match="cuda:1, and torch finds 1 here"):
        choose_dtype("float32", "cuda:1")


def test_progress_goes_to_stderr_and_ends_full(capsys: pytest.CaptureFixture[str]) -> None:
    with measuring.progress_bar(2) as progress:
        for text in ("a", "b", "c"):
            progress(text)
    output = capsys.readouterr()
    assert output.out == ""
    assert "3/3" in output.err


def test_openmp_is_told_to_wait_passively_before_torch_loads() -> None:
    program = (
        "import os, sys; from accel.cli import bench, demo, inspect; from accel.cli.measuring import settle_threads;"
        "assert 'torch' not in sys.modules; settle_threads(None); assert 'torch' not in sys.modules;"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    )
    found = subprocess.run([sys.executable, "-c", program], env={"OMP_WAIT_POLICY": "active"}, capture_output=True, text=True, check=True)
    # what the user has set wins
    assert found.stdout.split() == ["active", "1000"]


@pytest.mark.parametrize("command", MEASURING)
def test_help_needs_no_torch_and_ends_with_a_line_to_run(command: str) -> None:
    program = (
        "import sys; from accel.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    elapsed = time.perf_counter() - start
    assert found.stdout.rstrip().splitlines()[-1].strip().startswith(f"accel {command}")
    # the promise is half a second; a loaded machine is given four times that, and a torch import takes longer still
    assert elapsed < 2.0


def test_table_columns_line_up() -> None:
    assert format_table(["name", "n"], [["a", "1"], ["long", "22"]]).splitlines() == ["name   n", "────  ──", "a      1", "long  22"]
