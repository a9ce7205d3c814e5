"""`accel tune` for methods that need more than options: what is made lands in a folder, with a recipe that works from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import accel
from accel import Recipe
from accel.cli.main import main

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some drawn pictures, with a question and its answer each."""
    from accel.evals.scenes import held_out

    folder = tmp_path_factory.mktemp("asked")
    rows = []
    for item in held_out("color", "validation", 12):
        Image.fromarray(item.scene.image).save(folder / f"{item.index}.png")
        rows.append({"image": f"{item.index}.png", "text": item.question.text, "answer": item.question.answer})
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "asked.jsonl"


def tune(what: str, data: Path | str, out: Path, *words: str, model: str = "small-vlm") -> int:
    return main(["tune", what, "--model", model, "--dtype", "float32", "--data", str(data), "--out", str(out), *words])


def test_a_calibration_writes_a_recipe_that_can_be_applied(
    asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert tune("dyvte:candidate_layers=[5,6],batch_mode=ragged", asked, out) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out / 'recipe.yaml'}, and beside it the routers of dyvte" in printed
    assert "12 questions" in printed
    moved = out.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    recipe = Recipe.load(moved / "recipe.yaml")
    assert recipe.methods[0].options()["batch_mode"] == "ragged"

    from accel.evals.models import load_model

    with accel.apply(load_model("small-vlm").model, recipe) as handle:
        assert handle.methods == recipe.methods


def test_the_same_call_measures_nothing_twice_and_another_is_refused(
    asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert tune("dyvte:candidate_layers=[6]", asked, out) == 0
    first = load_file(out / "routers.safetensors")
    monkeypatch.setattr("accel.patches._dyvte_table.measure", None)
    assert tune("dyvte:candidate_layers=[6]", asked, out) == 0
    again = load_file(out / "routers.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert tune("dyvte:candidate_layers=[5]", asked, out) != 0
    err = capsys.readouterr().err
    assert "holds another table" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "what, data, message",
    [
        ("dyvte", "gone", "there are no questions to train on in 'gone'"), ("dyvte:exit_layer=3", "scenes", "leave out exit_layer"),
        ("dyvte:candidate_layers=[9]", "scenes", "before the last of 8 layers"),
    ],
    ids=["no_data", "fixed_exit", "no_such_layer"],
)  # fmt: skip
def test_mistakes_are_one_line(what: str, data: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(what, data, tmp_path / "run") != 0
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_trials_and_objectives_mean_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("dyvte", "scenes", tmp_path / "run", "--trials", "2") != 0
    assert "dyvte has nothing to tune" in capsys.readouterr().err


def test_the_list_says_what_is_made_and_from_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "dyvte"]) == 0
    out = capsys.readouterr().out
    assert "makes routers, from questions about pictures with answers" in out
    assert ".jsonl" in out
    assert main(["tune", "vflowopt"]) == 0
    assert "makes" not in capsys.readouterr().out
