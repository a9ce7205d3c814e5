"""`accel bench` from a saved model to the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_llama import save_tiny

from accel.cli.main import main

pytest.importorskip("matplotlib")

BASE = ("dense (sdpa)", "dense (accel)")
SPARSE = "flexprefill:min_seq_len=0,min_budget=128,gamma=0.6"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=2048))


def bench(*words: str) -> int:
    return main(["bench", *words, "--dtype", "float32"])


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    words = ("--model", model, "--method", SPARSE, "--method", "streaming", "--lengths", "1k,1500", "--what", "ttft,decode")
    assert bench(*words, "--repeats", "2", "--decode-steps", "3", "--out", str(folder)) == 0
    return folder, json.loads((folder / "result.json").read_text())


def test_one_folder_holds_the_whole_run(run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "result.json", "report.md", "report.html"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["lengths"] == "1k,1500"
    assert result["env"]["torch"]


def test_every_row_has_both_baselines(run: tuple[Path, dict[str, Any]]) -> None:
    rows = run[1]["latency"]
    # 2 metrics, 2 lengths, 2 baselines and 2 methods
    assert len(rows) == 16
    assert all(set(row["speedup"]) == set(BASE) for row in rows)
    assert {row["label"] for row in rows if row["is_baseline"]} == set(BASE)
    assert {(row["metric"], row["tokens"]) for row in rows} == {(m, n) for m in ("ttft_ms", "tpot_ms") for n in (1024, 1500)}


def test_sparse_and_dense_rows_say_which_they_are(run: tuple[Path, dict[str, Any]]) -> None:
    by_name = {(row["metric"], row["label"].split("(")[0]): row for row in run[1]["latency"] if row["tokens"] == 1500}
    sparse, below, decode = (by_name[key] for key in (("ttft_ms", "flexprefill"), ("ttft_ms", "streaming"), ("tpot_ms", "flexprefill")))
    assert 0.0 < sparse["density"] < 1.0
    assert 0.0 < sparse["selection_share"] < 1.0
    assert sparse["peak_bytes"] > 0
    assert below["note"].startswith("dense: shorter than")
    assert decode["note"] == "dense: decode"


def test_tables_go_to_stdout_and_progress_to_stderr(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", model, "--method", "streaming", "--lengths", "1k", "--what", "ttft", "--repeats", "1", "--warmup", "0")
    assert bench(*words, "--out", str(tmp_path / "run")) == 0
    output = capsys.readouterr()
    for text in (*BASE, "× dense (sdpa)", "× dense (accel)", "dense: shorter than"):
        assert text in output.out
    assert "pass" in output.err or "%" in output.err
    assert "%|" not in output.out


def test_dry_run_prints_the_merged_settings_and_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "settings.yaml"
    file.write_text("lengths: 2k\nrepeats: 9\nmodel: some/model\n")
    assert bench("--config", str(file), "--repeats", "3", "--dry-run") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["model"], settings["lengths"], settings["repeats"], settings["warmup"]) == ("some/model", "2k", 3, 1)
    assert list(tmp_path.iterdir()) == [file]


def test_the_printed_settings_are_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--method", SPARSE, "--method", "streaming", "--dry-run") == 0
    text = capsys.readouterr().out
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert bench("--config", str(file), "--dry-run") == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    "words, message",
    [
        (("--method", "flexprefil"), "did you mean 'flexprefill'"),
        (("--method", "flexprefill:gama=0.9"), "did you mean 'gamma'"),
        (("--what", "speed"), "--what knows operator, ttft, decode"),
        (("--lengths", "4k"), "2048 positions"),
        (("--repeats", "0", "--lengths", "1k"), "repeats must be at least 1"),
        (("--decode-steps", "0"), "--decode-steps must be at least 1"),
        (("--head-dim", "0"), "--head-dim must be at least 1"),
        (("--model", "smolm2"), "did you mean 'smollm2'"),
        (("--lengths", ""), "a length is a positive number of tokens"),
        (("--what", ""), "got nothing"),
        (("--threads", "0"), "threads must be at least 1"),
        (("--heads", "8,3"), "a multiple of the second"),
        (("--densities", "0.5,2"), "shares in"),
        (("--device", "cuda", "--what", "operator"), "operator part runs on the cpu"),
    ],
    ids=[
        "method", "option", "part", "too-long", "repeats", "decode-steps", "head-dim", "model", "no-length", "no-part", "threads", "heads",
        "densities", "operator-on-cuda",
    ],
)
def test_a_wrong_argument_explains_itself(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert bench("--model", model, "--what", "ttft", "--out", str(tmp_path / "run"), *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_operator_part_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shape = ("--heads", "4,2", "--head-dim", "16", "--densities", "0.5,0.25", "--lengths", "512,1k")
    assert bench("--model", "no/such-model", "--method", "streaming", "--what", "operator", *shape, "--repeats", "2", "--out", str(folder)) == 0
    rows = json.loads((folder / "result.json").read_text())["operator"]
    assert [(row["tokens"], row["density"]) for row in rows] == [(512, 0.5), (512, 0.25), (1024, 0.5), (1024, 0.25)]
    assert all(row["to_sdpa"] > 0 and row["to_dense"] > 0 for row in rows)
    text = capsys.readouterr().out
    for column in ("of dense (sdpa)", "of dense (accel)", "float32, 4 query and 2 key heads of 16"):
        assert column in text


def test_cache_methods_have_lines_of_their_own(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", model, "--method", "streaming_kv:keep=0.25", "--method", "streaming", "--what", "decode,cache", "--lengths", "1k,1500")
    assert bench(*words, "--repeats", "1", "--warmup", "0", "--decode-steps", "2", "--chunk", "256", "--out", str(tmp_path / "run")) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = {(row["label"], row["tokens"]): row for row in result["cache_memory"]}
    assert len(rows) == 8
    for tokens in (1024, 1500):
        window, dense = rows["streaming_kv(keep=0.25)", tokens], rows["dense (sdpa)", tokens]
        assert window["held_bytes"] == window["predicted_bytes"] < dense["held_bytes"] / 3
        assert dense["held_bytes"] == dense["whole_bytes"]
    decode = {row["label"] for row in result["latency"]}
    assert decode == {*BASE, "streaming_kv(keep=0.25)", "streaming"}
    out = capsys.readouterr().out
    for text in ("Cache and memory", "peak, chunks of 256", "no eviction in 2 steps, one comes every 32"):
        assert text in out
    assert "Cache and memory" in (tmp_path / "run" / "report.md").read_text()


def test_the_cache_part_is_left_out_without_a_cache_method(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", model, "--method", "streaming", "--lengths", "1k", "--out", str(tmp_path / "run"))
    assert bench(*words, "--what", "cache") == 2
    assert "methods that compress the cache, got streaming" in capsys.readouterr().err
    assert bench(*words, "--what", "ttft,cache", "--repeats", "1", "--warmup", "0") == 0
    assert "cache_memory" not in json.loads((tmp_path / "run" / "result.json").read_text())
