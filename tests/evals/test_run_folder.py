"""A run folder that several processes write to, that cannot be written to, or that somebody has damaged."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from accel.errors import AccelError
from accel.evals.results import RunFolder, SampleRecord

CONFIG = {"model": "tiny"}


def record(sample: int, label: str = "dense", **changes: Any) -> SampleRecord:
    needed: dict[str, Any] = {
        "task": "needle", "options": [], "tokens": 8, "seed": 0, "n_tokens": 8, "prompt_hash": f"p{sample}", "log_prob": -1.0, "exact": 1.0,
        "log_probs": [-1.0], "hits": [1.0], "questions": ["q"], "expected": ["e"], "answers": ["e"], "density": None, "sparse_calls": 0,
        "dense_calls": {}, "prefill_ms": 10.0,
    }  # fmt: skip
    return SampleRecord(**{**needed, "sample": sample, "label": label, **changes})


def line(one: SampleRecord) -> str:
    return json.dumps(asdict(one), ensure_ascii=False) + "\n"


def test_parts_are_taken_in_in_the_order_of_the_run(tmp_path: Path) -> None:
    main, other = RunFolder.create(tmp_path, CONFIG), RunFolder.join(tmp_path, CONFIG, part=1)
    for sample in (0, 2):
        main.append(record(sample))
    other.append(record(1))
    assert main.get(record(1).key) is None
    assert main.n_saved() == other.n_saved() == 3
    main.collect([record(sample).key for sample in range(3)])
    assert [r.sample for r in main.records] == [0, 1, 2]
    assert [json.loads(text)["sample"] for text in (tmp_path / "samples.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert not list(tmp_path.glob("samples-*"))


def test_a_kill_between_taking_a_part_in_and_removing_it_loses_and_doubles_nothing(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).append(record(0))
    (tmp_path / "samples-1.jsonl").write_text(line(record(0)) + line(record(1)))
    assert [r.sample for r in RunFolder.create(tmp_path, CONFIG, resume=True).records] == [0, 1]
    assert (tmp_path / "samples.jsonl").read_text() == line(record(0)) + line(record(1))


def test_a_part_alone_is_a_run_that_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "samples-2.jsonl").write_text(line(record(0)))
    with pytest.raises(AccelError, match="holds a run already"):
        RunFolder.create(tmp_path, CONFIG)


def test_a_sample_that_is_told_twice_and_otherwise_is_an_error(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "samples.jsonl").write_text(line(record(0)) + line(record(0, log_prob=-2.0)))
    with pytest.raises(AccelError, match=r"samples\.jsonl, line 2, tells .* a second time"):
        RunFolder.create(tmp_path, CONFIG, resume=True)


def test_characters_that_end_a_line_elsewhere_end_none_here(tmp_path: Path) -> None:
    # next line, line separator, form feed: what str.splitlines ends lines at
    one = record(0, answers=["a\x85b\u2028c\x0cd"])
    RunFolder.create(tmp_path, CONFIG).append(one)
    assert RunFolder.create(tmp_path, CONFIG, resume=True).records == [one]


def test_a_line_of_other_bytes_is_named_with_what_to_do(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "samples.jsonl").write_bytes(line(record(0)).encode() + b"\xff\xfe\x00\n")
    with pytest.raises(AccelError, match=r"line 2, is no sample.* --resume measures its sample again"):
        RunFolder.create(tmp_path, CONFIG, resume=True)


def test_a_full_disk_is_an_error_and_the_sample_is_not_taken_for_saved(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(AccelError, match=r"cannot write .*samples\.jsonl: No space left on device"):
        folder.append(record(0))
    assert folder.done() == set()


def test_a_result_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "result.json").mkdir()
    with pytest.raises(AccelError, match=r"cannot write .*result\.json"):
        folder.finish([])


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AccelError, match=r"file is a file. Choose another folder with --out"):
        RunFolder.check(tmp_path / "file" / "deeper" / "r", CONFIG)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(AccelError, match=f"no permission to write to {tmp_path}"):
        RunFolder.check(tmp_path / "deeper" / "r", CONFIG)


def test_two_processes_cannot_add_to_one_run_at_once(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", {})
    again = "from accel.evals.results import RunFolder; RunFolder.create({!r}, {{}}, resume=True)".format(str(tmp_path / "r"))

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)

    assert f"another process is adding to {tmp_path / 'r'}" in other().stderr
    del folder
    gc.collect()
    assert other().returncode == 0


def test_what_has_changed_since_a_run_was_begun_is_told(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", {})
    assert folder.changes_since_begun({"device": "Small, 1 threads", "torch": "2.13", "triton": None}) == []
    again = RunFolder.create(tmp_path / "r", {}, resume=True)
    assert again.changes_since_begun({"device": "Small, 1 threads", "torch": "2.13", "triton": None}) == []
    [line] = again.changes_since_begun({"device": "Large, 9 threads", "torch": "2.13", "triton": "3.9"})
    assert "device Small, 1 threads, then Large, 9 threads; triton None, then 3.9" in line
