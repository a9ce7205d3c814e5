"""The run folder: every finished sample survives, and what cannot be gone on with says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from accel.errors import AccelError
from accel.evals.results import RunFolder, SampleKey, SampleRecord, environment
from accel.evals.summary.scores import answer_rows, summarise

CONFIG = {"model": "tiny", "seed": 0, "samples": 2, "methods": {"a": [{"streaming": {"density": 0.5}}]}}


def record(**changes: Any) -> SampleRecord:
    made = SampleRecord(
        task="needle", label="dense", options=[], tokens=2048, sample=0, seed=0, n_tokens=2048, prompt_hash="abc", log_prob=-1.0, exact=0.5,
        log_probs=[-0.5, -1.5], hits=[1.0, 0.0], questions=["x", "y"], expected=["1", "2"], answers=["1", "7"], density=None, sparse_calls=0,
        dense_calls={}, prefill_ms=12.0,
    )  # fmt: skip
    return replace(made, **changes)


def test_a_saved_sample_comes_back_whole(tmp_path: Path) -> None:
    options = [{"streaming": {"density": 0.25}}]
    one = record(label="a", options=options, density=0.25, sparse_calls=3, dense_calls={"dense layer": 1}, selection_ms=1.5)
    RunFolder.create(tmp_path / "r", CONFIG).append(one)
    back = RunFolder.create(tmp_path / "r", CONFIG, resume=True)
    assert back.records == [one]
    assert back.done() == {SampleKey("needle", "a", 2048, 0)}
    assert back.get(one.key) == one


def test_samples_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    script = f"""
        import json, os, sys, time
        from accel.evals.results import RunFolder, SampleRecord
        folder = RunFolder.create({str(tmp_path / "r")!r}, json.loads({json.dumps(CONFIG)!r}))
        fields = json.loads({json.dumps(asdict(record()))!r})
        for i in range(2):
            folder.append(SampleRecord(**dict(fields, sample=i)))
        with open(folder.path / "samples.jsonl", "a") as file:
            file.write('{{"task": "needle", "label": "de')
            file.flush()
            print("ready", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folder = RunFolder.create(tmp_path / "r", CONFIG, resume=True)
    assert [r.sample for r in folder.records] == [0, 1]
    folder.append(record(sample=2))
    assert [r.sample for r in RunFolder.create(tmp_path / "r", {**CONFIG, "samples": 3}, resume=True).records] == [0, 1, 2]


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).append(record())
    with pytest.raises(AccelError, match="--resume"):
        RunFolder.create(tmp_path, CONFIG)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"dtype": "bfloat16"}, "dtype"), ({"methods": {"a": [{"streaming": {"density": 0.6}}]}}, "method a")],
    ids=["other_value", "new_setting", "other_options_under_the_same_label"],
)
def test_other_settings_cannot_be_resumed(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(AccelError, match=f"cannot be resumed: {named} differ"):
        RunFolder.create(tmp_path, {**CONFIG, **change}, resume=True)


def test_a_resumed_run_may_go_further(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).append(record())
    further = {**CONFIG, "samples": 9, "methods": {**CONFIG["methods"], "b": [{"powerattention": {}}]}}
    assert len(RunFolder.create(tmp_path, further, resume=True).records) == 1
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == further


def test_a_resumed_run_never_loses_samples_from_its_report(tmp_path: Path) -> None:
    config = {**CONFIG, "samples": 4, "tasks": ["needle"]}
    folder = RunFolder.create(tmp_path, config)
    for i in range(3):
        folder.append(record(sample=i))
    with pytest.raises(AccelError, match=r"holds 3 samples per task, asked for 2: .* Ask for at least 3, or choose another folder with --out"):
        RunFolder.check(tmp_path, {**config, "samples": 2}, resume=True)
    # an unfinished run may end with what it has, and other tasks have no samples yet
    RunFolder.check(tmp_path, {**config, "samples": 3}, resume=True)
    RunFolder.check(tmp_path, {**config, "samples": 2, "tasks": ["code"]}, resume=True)


def test_a_sample_is_saved_once(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.append(record())
    with pytest.raises(AccelError, match="saved already"):
        folder.append(record(log_prob=-9.0))


def test_a_failure_to_save_is_an_error(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(AccelError, match=r"cannot write .*samples\.jsonl: Is a directory"):
        folder.append(record())
    assert folder.done() == set()


def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="JSON"):
        folder.append(record(log_prob=float("nan")))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    for i in range(2):
        folder.append(record(sample=i))
    first, second = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text(f"{first}\n{second[:40]}\n{second}\n")
    with pytest.raises(AccelError, match="line 2"):
        RunFolder.create(tmp_path, CONFIG, resume=True)


def test_the_result_holds_rows_settings_and_environment(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.append(record())
    result = json.loads(folder.finish([summarise(folder.records, "exact")], command="run").read_text())
    assert result["schema"] == 1
    assert result["command"] == "run"
    assert result["config"] == CONFIG
    assert result["scores"][0]["n"] == 2
    assert {"torch", "transformers", "python", "cpu", "threads", "device"} <= result["env"].keys()


def test_the_environment_names_the_commit_of_a_checkout() -> None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert commit.startswith(environment()["git"].rstrip("+"))


# --- summary ------------------------------------------------------------------------------------------------------------------


def test_errors_are_taken_over_prompts() -> None:
    records = [record(hits=[1.0, 1.0]), record(sample=1, hits=[1.0, 0.0]), record(sample=2, hits=[0.0, 0.0])]
    row = summarise(records, "exact")
    # prompt means 1, 0.5, 0: standard deviation 0.5, three prompts
    assert row["score"] == {"name": "exact", "value": pytest.approx(0.5), "stderr": pytest.approx(0.5 / 3**0.5)}
    assert (row["n"], row["n_prompts"], row["stderr_over"]) == (6, 3, "prompts")
    assert row["is_baseline"]


def test_one_prompt_has_its_error_over_answers() -> None:
    row = summarise([record(hits=[1.0, 0.0, 1.0, 1.0], log_probs=[-1.0, -3.0, -1.0, -1.0])], "exact")
    assert row["score"]["stderr"] == pytest.approx(0.25)
    assert row["log_prob"] == pytest.approx(-1.5)
    assert row["stderr_over"] == "answers"


def test_a_single_answer_has_no_error() -> None:
    assert summarise([record(hits=[1.0], log_probs=[-1.0])], "exact")["score"]["stderr"] is None


def test_perplexity_is_that_of_the_mean_log_probability() -> None:
    row = summarise([record(log_probs=[-1.0, -3.0])], "perplexity")
    e = 2.718281828459045
    # two values one apart from their mean: standard error 1, times exp(2) to first order
    assert row["score"] == {"name": "perplexity", "value": pytest.approx(e**2), "stderr": pytest.approx(e**2)}


def test_density_is_the_mean_of_the_sparse_prompts_and_dense_calls_are_told() -> None:
    row = summarise([record(sample=i, density=d, sparse_calls=3, dense_calls={"dense layer": 2}) for i, d in enumerate((0.2, 0.4))], "exact")
    assert row["density"] == pytest.approx(0.3)
    assert row["calls"] == {"sparse": 6, "dense": {"dense layer": 4}}
    assert row["note"] == "dense calls: dense layer (4)"
    assert summarise([record(dense_calls={"shorter than 4096 tokens": 3})], "exact")["note"] == "ran dense: shorter than 4096 tokens (3)"


def test_answers_are_shown_for_the_first_prompt_and_never_by_the_hundred() -> None:
    many = record(task="code", expected=["x"] * 512, questions=["q"] * 512, answers=["x"] * 512, hits=[1.0] * 512, log_probs=[-1.0] * 512)
    rows = answer_rows([record(answers=["the answer is 1", "7"]), record(sample=1), many])
    assert [(r["question"], r["answer"]) for r in rows] == [("needle 2048: x", "1"), ("needle 2048: y", "7")]


def test_a_folder_without_samples_holds_no_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "samples.jsonl").touch()
    assert RunFolder.create(tmp_path, {**CONFIG, "seed": 9}).config["seed"] == 9


def test_what_differs_is_told_in_words_of_the_user(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {**CONFIG, "reference": "a"})
    with pytest.raises(AccelError, match=r"cannot be resumed: the first sparse method \(the controls get its density\) differs from"):
        RunFolder.create(tmp_path, {**CONFIG, "reference": "b"}, resume=True)
    with pytest.raises(AccelError, match=r"cannot be resumed: --method \(beside one that drops cache entries, .*\) differs from"):
        RunFolder.create(tmp_path, {**CONFIG, "reference": "a", "questions": "apart"}, resume=True)
