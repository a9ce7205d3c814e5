"""`accel run` on models that draw: which model, methods and controls run, and that drawing the report's pictures can fail without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from accel.cli.main import main

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
WORDS = ["run", "--model", "small-var", "--tasks", "images", "--dtype", "float32", "--method", "h2o", "--method", "snapkv", "--keeps", "0.5,0.3"]
CONTROLS = [f"{name} (keep {keep})" for name in ("random_kv", "streaming_kv") for keep in (0.5, 0.3)]
LABELS = ["dense", *(f"{name}(keep={keep})" for name in ("h2o", "snapkv") for keep in (0.5, 0.3)), *CONTROLS]


@pytest.mark.parametrize(
    ("tasks", "model"), [("images", "small-var"), ("scenes", "small-vlm"), ("needle", "smollm2"), ("scenes,images", "smollm2")],
    ids=["drawn", "pictures", "text", "mixed"],
)  # fmt: skip
def test_without_a_model_one_is_chosen_that_can_run_the_tasks(tasks: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--tasks", tasks, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out)["model"] == model
    assert [model in line for line in shown.err.splitlines() if "--model" in line] == ([] if model == "smollm2" else [True])
    assert main(["run", "--model", model, "--tasks", tasks, "--dry-run"]) == 0
    assert "--model" not in capsys.readouterr().err


def test_budgets_need_a_method_also_where_dense_is_usual(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--tasks", "images", "--keeps", "0.5", "--dry-run"]) == 2
    assert "such as --method h2o" in capsys.readouterr().err


def test_cache_methods_are_swept_beside_controls_of_the_same_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r"
    assert main([*WORDS, "--samples", "2", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert [row["label"] for row in result["scores"]] == LABELS
    assert [row["label"] for row in result["drawn"]] == [*LABELS, "real pictures"]
    assert [row["title"] for row in result["grids"]] == LABELS
    assert [row["cache"]["kept_share"] for row in result["drawn"][:-1]] == [1.0, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3]
    assert [row["cache"] and row["cache"]["kept_share"] for row in result["scores"]] == [None, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3]
    shown = capsys.readouterr().out
    assert "h2o(keep=0.3) − random_kv (keep 0.3)" in shown
    assert "peak resident growth" in shown
    assert "No smaller than a whole cache" in shown
    assert (out / "report.html").read_text().count("data:image/png;base64,") == len(LABELS)


def test_a_failure_while_pictures_are_drawn_loses_nothing_and_the_next_run_only_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"

    def fail(*_: Any) -> None:
        # what a killed run leaves behind is what is there by now
        assert [row["label"] for row in json.loads((out / "result.json").read_text())["drawn"]][:2] == LABELS[:2]
        raise RuntimeError("no memory for pictures")

    with monkeypatch.context() as patch:
        patch.setattr("accel.evals.drawing.album.draw_grids", fail)
        with pytest.raises(RuntimeError, match="no memory for pictures"):
            main([*WORDS, "--samples", "2", "--out", str(out)])
    first, samples = json.loads((out / "result.json").read_text()), (out / "samples.jsonl").read_text()
    assert "grids" not in first
    assert (out / "report.html").exists()
    monkeypatch.setattr("accel.evals.measuring.draw_sample", lambda *_, **__: pytest.fail("measured again"))
    assert main([*WORDS, "--samples", "2", "--out", str(out), "--resume"]) == 0
    second = json.loads((out / "result.json").read_text())
    assert (out / "samples.jsonl").read_text() == samples
    assert second["drawn"] == first["drawn"]
    assert [row["title"] for row in second["grids"]] == LABELS
