"""Runs in which a model draws: judged, resumable, beside dense from the same seeds, with the pictures in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accel.cli.main import main
from accel.errors import OptionError
from accel.evals import drawn
from accel.evals.models import LoadedModel, load_model
from accel.evals.report import render_html
from accel.evals.results import RunFolder
from accel.evals.runner import run_accuracy
from accel.evals.tasks import load_task

pytest.importorskip("PIL")
N = 12


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("small-var")


@pytest.fixture(scope="module")
def folder(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = RunFolder.create(tmp_path_factory.mktemp("run") / "r", {"model": "small-var"})
    run_accuracy(loaded, {}, ["images"], [4096], n=N, seed=3, folder=made, progress=False)
    return made


def test_every_sample_is_one_picture_of_the_classes_in_turn(folder: RunFolder) -> None:
    assert [r.expected for r in folder.records] == [[str(i % 10)] for i in range(N)]
    assert all(r.exact == float(r.answers == r.expected) for r in folder.records)
    assert {r.n_tokens for r in folder.records} == {130}
    assert {r.tokens for r in folder.records} == {0}
    assert all(r.features is not None and len(r.features) == 64 for r in folder.records)


def test_a_resumed_run_draws_nothing_again(loaded: LoadedModel, folder: RunFolder) -> None:
    again = RunFolder.create(folder.path, folder.config, resume=True)
    [row] = run_accuracy(loaded, {}, ["images"], [4096], n=N, seed=3, folder=again, progress=False)
    assert again.records == folder.records
    assert (row["kind"], row["n"]) == ("class", N)


def test_neighbouring_seeds_share_no_picture() -> None:
    seeds = [s.picture_seed for seed in range(3) for s in load_task("images").samples(50, seed)]  # type: ignore[call-arg, arg-type]
    assert len(set(seeds)) == 150


def test_the_summary_stands_beside_real_pictures(loaded: LoadedModel, folder: RunFolder) -> None:
    found = drawn.summarise_drawn(loaded, folder, folder.records, {})
    dense, real = found["drawn"]
    assert (dense["label"], dense["n"], real["label"], real["n"]) == ("dense", N, drawn.REAL, N)
    assert real["value"] >= 0.9
    assert dense["frechet"] > 0
    [grid] = found["grids"]
    assert (folder.path / grid["file"]).read_bytes().startswith(b"\x89PNG")
    pytest.importorskip("jinja2")
    page = render_html({"command": "run", **found}, folder.path)
    assert page.count("data:image/png;base64,") == 1
    assert "Fréchet distance" in page


def test_the_same_pictures_are_at_no_distance_from_dense(loaded: LoadedModel, folder: RunFolder) -> None:
    twin = [type(r)(**{**r.__dict__, "label": "twin"}) for r in folder.records]
    rows = drawn.summarise_drawn(loaded, folder, [*folder.records, *twin], {"twin": []})["drawn"]
    assert (rows[1]["label"], rows[1]["psnr"], rows[1]["perceptual"], rows[1]["n_paired"]) == ("twin", 100.0, 0.0, N)
    assert rows[1]["frechet"] == rows[0]["frechet"]


def test_only_models_that_draw_are_asked_to(loaded: LoadedModel, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", {})
    with pytest.raises(OptionError, match="draws no pictures"):
        run_accuracy(load_model("small-vlm"), {}, ["images"], [4096], n=1, seed=0, folder=folder, progress=False)
    with pytest.raises(OptionError, match="reads no text"):
        run_accuracy(loaded, {}, ["needle"], [4096], n=1, seed=0, folder=folder, progress=False)


def test_the_command_runs_dense_where_no_method_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    assert main(["run", "--model", "small-var", "--tasks", "images", "--samples", "3", "--dtype", "float32", "--out", str(out)]) == 0
    assert "Fréchet distance" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert {row["label"] for row in result["scores"]} == {"dense"}
    assert "data:image/png;base64," in (out / "report.html").read_text()


def test_samples_are_drawn_alike_alone_and_together(loaded: LoadedModel) -> None:
    model = drawn.image_model(loaded)
    assert model.draw is not None
    assert torch.allclose(model.draw([2, 5], seed=[9, 4])[1:], model.draw([5], seed=[4]), atol=1e-3)
