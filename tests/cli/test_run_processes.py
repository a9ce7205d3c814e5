"""Runs that are killed, and runs of two processes: real ones, by real signals and a real launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import save_tiny

from accel.cli.main import main
from accel.evals.results import MEASURED

ROOT = Path(__file__).resolve().parents[2]
SPARSE = "flexprefill:min_seq_len=0,min_budget=128,block_size=64,gamma=0.6"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=2048))
    return ["run", "--model", model, "--dtype", "float32", "--method", SPARSE, "--controls", "random_blocks", "--tasks", "needle,passkey",
            "--lengths", "1k", "--samples", "2", "--warmup", "0", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "r"
    assert main([*words, "--out", str(folder)]) == 0
    return folder


def saved(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def scores(folder: Path) -> list[Any]:
    rows = json.loads((folder / "result.json").read_text())["scores"]
    return [[row[name] for name in ("task", "label", "n", "n_prompts", "score", "log_prob", "density", "calls", "hash")] for row in rows]


def alike(one: Any, other: Any) -> bool:
    """Whether two results are the same but for rounding: which of our kernels is fastest here is measured, and may come out otherwise elsewhere."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == pytest.approx(other, abs=1e-3)) if isinstance(one, float) else bool(one == other)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launched(script: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    return subprocess.run([*launcher, *script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False)


def test_a_run_that_is_killed_resumes_to_the_result_of_one_that_is_not(words: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    # long before the end, and in the middle: wherever the signal meets it
    for n_lines, more in ((1, []), (7, ["--resume"])):
        child = subprocess.Popen([sys.executable, "-m", "accel", *words, "--out", str(folder), *more], cwd=ROOT, env=environment(),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        samples = folder / "samples.jsonl"
        deadline = time.monotonic() + 200
        while not samples.exists() or samples.read_bytes().count(b"\n") < n_lines:
            assert child.poll() is None, "it must not end by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert len(saved_lines(samples)) < len(saved(whole))
    assert main(["run", "--out", str(folder), "--resume"]) == 0
    assert alike(saved(folder), saved(whole))
    assert alike(scores(folder), scores(whole))


def saved_lines(samples: Path) -> list[bytes]:
    return samples.read_bytes().split(b"\n")[:-1]


def test_two_processes_have_the_samples_and_scores_of_one(words: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    done = launched(["-m", "accel", *words, "--out", str(folder)])
    assert done.returncode == 0, done.stderr
    assert alike(saved(folder), saved(whole))
    assert alike(scores(folder), scores(whole))
    assert done.stdout.count("Measured by 2 processes at once") == 1
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_process_that_dies_fails_the_run_and_what_it_saved_is_gone_on_with(words: list[str], whole: Path, tmp_path: Path) -> None:
    folder, script = tmp_path / "r", tmp_path / "dying.py"
    script.write_text(textwrap.dedent(f"""
        import os, signal, sys
        from accel.cli.main import main
        from accel.evals.results import RunFolder
        append = RunFolder.append
        def dying(self, record):
            append(self, record)
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        RunFolder.append = dying
        sys.exit(main({[*words, "--out", str(folder)]!r}))
    """))
    died = launched([str(script)])
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stderr
    assert f"Go on with `accel run --out {folder} --resume`" in died.stderr
    assert not (folder / "result.json").exists()
    assert len(saved_lines(folder / "samples-1.jsonl")) == 1
    # one process is enough to go on
    assert main(["run", "--out", str(folder), "--resume"]) == 0
    assert alike(saved(folder), saved(whole))
    assert alike(scores(folder), scores(whole))
