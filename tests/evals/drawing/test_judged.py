"""Runs in which a model draws: judged, resumable, beside dense from the same seeds, with the pictures in the report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accel.cli.main import main
from accel.errors import OptionError
from accel.evals import image_metrics as M
from accel.evals.controls import plan_controls
from accel.evals.drawing import judged as drawn
from accel.evals.drawing.album import FOLDER, N_SHOWN, Album, draw_grids, file_name
from accel.evals.models import LoadedImageModel, LoadedModel, load_model
from accel.evals.results import RunFolder, SampleKey
from accel.evals.runner import run_accuracy
from accel.evals.summary.drawn import REAL, paired_row, summarise_drawn
from accel.evals.tasks import load_task
from accel.registry import build

pytest.importorskip("PIL")
N = 12
LABEL = "h2o(keep=0.3)"
METHODS = {LABEL: [build("h2o", {"keep": 0.3})]}
CONTROLS = ("random_kv", "streaming_kv")


def silent(loaded: LoadedModel) -> LoadedImageModel:
    """The same model, which must not draw."""
    return replace(drawn.image_model(loaded), draw=lambda *_, **__: pytest.fail("drawn again"))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("small-var")


@pytest.fixture(scope="module")
def folder(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = RunFolder.create(tmp_path_factory.mktemp("run") / "r", {"model": "small-var"})
    run_accuracy(loaded, {}, ["images"], [4096], n=N, seed=3, folder=made, progress=False)
    return made


@pytest.fixture(scope="module")
def compressed(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = RunFolder.create(tmp_path_factory.mktemp("compressed") / "r", {"model": "small-var"})
    run_accuracy(loaded, METHODS, ["images"], [4096], n=N, seed=3, folder=made, controls=CONTROLS, progress=False)
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
    found = summarise_drawn(loaded, folder.records)
    dense, real = found["drawn"]
    assert (dense["label"], dense["n"], real["label"], real["n"]) == ("dense", N, REAL, N)
    assert real["value"] >= 0.9
    assert dense["frechet"] > 0
    assert (dense["psnr"], dense["perceptual"], dense["to_dense"], dense["cache"]) == (None, None, None, None)
    assert found["drawn_paired"] == []


def test_a_summary_draws_nothing(loaded: LoadedModel, compressed: RunFolder) -> None:
    assert len(summarise_drawn(silent(loaded), compressed.records)["drawn"]) == 5


def test_every_method_and_control_is_compared_to_dense_on_all_pictures(loaded: LoadedModel, compressed: RunFolder) -> None:
    found = summarise_drawn(loaded, compressed.records, plan_controls(CONTROLS, METHODS))
    dense, h2o, random, streaming, _ = found["drawn"]
    assert [row["label"] for row in (dense, h2o, random, streaming)] == ["dense", LABEL, "random_kv (keep 0.3)", "streaming_kv (keep 0.3)"]
    for row in (h2o, random, streaming):
        assert (row["n"], row["psnr"]["n"], row["perceptual"]["n"], row["to_dense"]["n"]) == (N, N, N, N)
        assert 5 < row["psnr"]["value"] < 60
        assert row["psnr"]["stderr"] > 0
        assert row["perceptual"]["value"] > 0
        assert row["to_dense"]["value"] == pytest.approx(row["value"] - dense["value"])
    assert [(row["label"], row["other"]) for row in found["drawn_paired"]] == [(LABEL, random["label"]), (LABEL, streaming["label"])]
    assert found["drawn_paired"][0]["perceptual"]["value"] == pytest.approx(h2o["perceptual"]["value"] - random["perceptual"]["value"])


def test_distances_are_those_of_the_pictures_in_the_folder(loaded: LoadedModel, compressed: RunFolder) -> None:
    album, model = Album(compressed.path), drawn.image_model(loaded)
    for record in compressed.records:
        if record.label == "dense":
            continue
        mine, dense = (album.find(record.key._replace(label=label)) for label in (record.label, "dense"))
        assert mine is not None
        assert dense is not None
        assert record.psnr == pytest.approx(float(M.psnr(mine[None], dense[None])), rel=1e-4)
        assert record.perceptual == pytest.approx(float(M.perceptual_distance(mine[None], dense[None], model.judge)), rel=1e-4)


def test_cache_figures_are_entries_per_head_and_measured_bytes(loaded: LoadedModel, compressed: RunFolder) -> None:
    sides = (1, 2, 3, 4, 6, 8)
    whole = [sum(side * side for side in sides[: i + 1]) for i in range(len(sides))]
    for record in compressed.records:
        if record.label == "dense":
            assert record.cache is None
            continue
        assert record.cache is not None
        # 0.3 of 130
        assert record.cache["whole"] == whole
        assert record.cache["attended"] == [min(n, 39) for n in whole]
        assert record.cache["retained"] == [*(min(n, 39) for n in whole[:-1]), 0]
        assert record.cache["kept_share"] == 0.3
        # keys and values, fp32, two guidance rows, all layers, 128 wide
        assert record.cache["whole_bytes"] == 2 * 4 * 2 * 6 * 128 * whole[-2]
        assert 2 * 4 * 2 * 6 * 128 * 39 < record.cache["peak_bytes"] < record.cache["whole_bytes"]
    rows = summarise_drawn(loaded, compressed.records)["drawn"]
    assert rows[0]["cache"]["peak_bytes"] == rows[1]["cache"]["whole_bytes"]
    assert rows[0]["cache"]["retained"] == [*whole[:-1], 0]
    assert rows[1]["cache"] == next(r.cache for r in compressed.records if r.label == rows[1]["label"])


def test_controls_have_the_budget_and_draw_anew_for_each_picture(compressed: RunFolder) -> None:
    random = [r for r in compressed.records if r.label.startswith("random_kv")]
    assert {r.options[0]["random_kv"]["keep"] for r in random} == {0.3}
    assert len({r.options[0]["random_kv"]["seed"] for r in random}) == N
    assert {r.keep for r in random} == {0.3}


def test_memory_is_told_by_the_first_picture_of_each_label(compressed: RunFolder) -> None:
    for record in compressed.records:
        assert (record.memory is not None) == (record.sample == 0)
        if record.memory is not None:
            # a CPU has no allocator that counts: resident growth must not stand in for it
            assert (record.memory["allocated_bytes"], record.memory["reserved_bytes"]) == (None, None)
            assert record.memory["resident_bytes"] >= 0
            assert "resident" in record.memory["how"]


def test_on_a_gpu_the_allocator_tells_what_was_allocated_and_what_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        def parameters(self) -> Any:
            yield type("Parameter", (), {"device": torch.device("cuda")})

    order: list[str] = []
    for name, value in (("empty_cache", None), ("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100),
                        ("max_memory_allocated", 300), ("max_memory_reserved", 500)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: (order.append(name), value)[1])
    found = drawn.memory_figures(LoadedModel(OnGpu(), None, "x"), lambda: order.append("draw"))
    assert (found["allocated_bytes"], found["reserved_bytes"], found["resident_bytes"]) == (300, 500, None)
    assert order.index("empty_cache") < order.index("reset_peak_memory_stats") < order.index("draw") < order.index("max_memory_reserved")


def test_the_same_pictures_are_at_no_distance_from_dense(loaded: LoadedModel, tmp_path: Path) -> None:
    made = RunFolder.create(tmp_path / "r", {})
    whole = {"whole": [build("h2o", {"keep": 1.0})]}
    run_accuracy(loaded, whole, ["images"], [4096], n=2, seed=3, folder=made, progress=False)
    rows = summarise_drawn(loaded, made.records)["drawn"]
    assert (rows[1]["psnr"]["value"], rows[1]["perceptual"]["value"]) == (100.0, 0.0)
    assert rows[1]["frechet"] == pytest.approx(rows[0]["frechet"])


def test_a_dense_picture_that_is_gone_is_drawn_again(loaded: LoadedModel, compressed: RunFolder, tmp_path: Path) -> None:
    path = shutil.copytree(compressed.path, tmp_path / "r")
    shutil.rmtree(path / FOLDER)
    lines = [line for line in (path / "samples.jsonl").read_text().splitlines() if json.loads(line)["label"] != LABEL]
    (path / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    again = RunFolder.create(path, compressed.config, resume=True)
    run_accuracy(loaded, METHODS, ["images"], [4096], n=N, seed=3, folder=again, controls=CONTROLS, limit=1, progress=False)
    before, after = (f.get(SampleKey("images", LABEL, 0, 0)) for f in (compressed, again))
    assert before is not None
    assert after is not None
    assert (before.psnr, before.perceptual) == (after.psnr, after.perceptual)


def test_grids_are_put_together_from_the_folder_for_every_label(loaded: LoadedModel, compressed: RunFolder) -> None:
    grids = draw_grids(silent(loaded), compressed, compressed.records)
    assert [grid["title"] for grid in grids] == ["dense", LABEL, "random_kv (keep 0.3)", "streaming_kv (keep 0.3)"]
    assert len({grid["file"] for grid in grids}) == 4
    assert grids[0]["caption"] == f"{100 * sum(r.exact for r in compressed.records if r.label == 'dense') / N:.1f} % of {N} right"
    assert "perceptual distance to dense 0.0" in grids[1]["caption"]
    assert all((compressed.path / grid["file"]).read_bytes().startswith(b"\x89PNG") for grid in grids)


def test_a_grid_of_lost_pictures_is_drawn_as_it_was(loaded: LoadedModel, compressed: RunFolder, tmp_path: Path) -> None:
    grids = draw_grids(silent(loaded), compressed, compressed.records)
    path = shutil.copytree(compressed.path, tmp_path / "r")
    for folder in (FOLDER, "overlays"):
        shutil.rmtree(path / folder)
    again = draw_grids(drawn.image_model(loaded), RunFolder.create(path, compressed.config, resume=True), compressed.records)
    assert again == grids
    assert all((path / grid["file"]).read_bytes() == (compressed.path / grid["file"]).read_bytes() for grid in grids)


def test_the_album_keeps_all_of_dense_and_the_shown_ones_of_the_others(tmp_path: Path) -> None:
    album, pixels = Album(tmp_path), torch.rand(3, 4, 5)
    for label in ("dense", "h2o"):
        for sample in (N_SHOWN - 1, N_SHOWN):
            album.keep(SampleKey("images", label, 0, sample), pixels)
    assert album.find(SampleKey("images", "h2o", 0, N_SHOWN)) is None
    for key in (SampleKey("images", "dense", 0, N_SHOWN), SampleKey("images", "h2o", 0, N_SHOWN - 1)):
        found = album.find(key)
        assert found is not None
        torch.testing.assert_close(found, pixels, rtol=0, atol=0.5 / 255 + 1e-6)


def test_a_method_and_a_control_of_almost_the_same_name_do_not_share_a_file() -> None:
    assert file_name("random_kv (keep 0.3)") != file_name("random_kv(keep=0.3)")


def test_paired_differences_by_hand(compressed: RunFolder) -> None:
    one = next(r for r in compressed.records if r.label == LABEL)
    method = [replace(one, sample=i, exact=hit, perceptual=far) for i, (hit, far) in enumerate([(1.0, 0.1), (1.0, 0.2), (0.0, 0.3), (1.0, 9.0)])]
    other = [replace(one, label="other", sample=i, exact=hit, perceptual=0.2) for i, hit in enumerate([1.0, 0.0, 0.0])]
    row = paired_row(method, other)
    assert row is not None
    # right: 0, 1, 0; distance: −0.1, 0, 0.1
    assert row["right"] == pytest.approx({"value": 1 / 3, "stderr": 1 / 3, "n": 3})
    assert row["perceptual"] == pytest.approx({"value": 0.0, "stderr": 0.1 / 3**0.5, "n": 3})
    assert paired_row(method, [replace(r, sample=r.sample + 10) for r in other]) is None


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
    assert "Fréchet" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert {row["label"] for row in result["scores"]} == {"dense"}
    assert "data:image/png;base64," in (out / "report.html").read_text()


def test_samples_are_drawn_alike_alone_and_together(loaded: LoadedModel) -> None:
    model = drawn.image_model(loaded)
    assert model.draw is not None
    assert torch.allclose(model.draw([2, 5], seed=[9, 4])[1:], model.draw([5], seed=[4]), atol=1e-3)
