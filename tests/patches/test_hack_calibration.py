"""Measuring the heads of a model: `profile_heads` and `accel tune hack`. What is drawn and what is left, guidance, features, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import Drawn, calibrate, drawing, info_of
from next_scale import SHAPES, last_logits, tiny_infinity, tiny_var

import accel
from accel import Recipe
from accel.cli.main import main
from accel.errors import OptionError, UnsupportedError
from accel.evals.models import LoadedImageModel, LoadedModel
from accel.models.cache import Schedule
from accel.models.var import VAR
from accel.patches import _hack_calibration
from accel.patches._hack_subjects import FIRST_SEED, STRIDE
from accel.patches._head_plan import HeadPlan
from accel.patches._head_profile import HeadProfile
from accel.patches.hack import HACK

TENSORS = ("sigma", "sigma_unconditional", "entropy", "scale_use")


def profile_in(folder: Path) -> HeadProfile:
    return HeadProfile.load(folder / "profile.safetensors")


def test_a_profile_a_plan_and_a_recipe_are_left_that_work(tmp_path: Path) -> None:
    model, drawn = tiny_var(), Drawn()
    dense = last_logits(model, [1, 2])
    method = calibrate(drawing(model, drawn), tmp_path, fixed={"keep": 0.75, "merge": None})
    # five classes, three pictures: spread over all of them
    assert drawn == [(0, FIRST_SEED), (1, FIRST_SEED + 1), (3, FIRST_SEED + 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "profile.safetensors", "recipe.yaml"]
    header = profile_in(tmp_path).header
    info = info_of(model)
    assert info.fingerprint is not None
    assert (header.model, header.fingerprint, header.n_layers, header.n_heads) == ("toy", info.fingerprint(), 2, 4)
    assert (header.scale_shapes, header.dtype, header.n_samples, header.data) == (SHAPES, "float32", 3, "3 pictures of classes, seed 0")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.methods == (method,)
    assert method == HACK(profile=str(tmp_path / "profile.safetensors"), keep=0.75, merge=None)
    plan, about = HeadPlan.load(tmp_path / "plan.json")
    assert plan == method.bind(info).plan_for(info)
    assert (about["weights"], about["dtype"], about["alpha"]) == (info.fingerprint(), "float32", plan.alpha)
    assert all(word in recipe.note for word in ("toy", "3 pictures", f"{plan.alpha:.0%}", "keep=0.75"))
    # nothing of the measurement is left on the model
    assert torch.equal(last_logits(model, [1, 2]), dense)
    for used in (recipe, HACK(plan=str(tmp_path / "plan.json"), keep=0.75, merge=None)):
        with accel.apply(model, used):
            compressed = last_logits(model, [1, 2])
        assert not torch.equal(compressed, dense)
    with accel.apply(model, recipe):
        assert torch.equal(last_logits(model, [1, 2]), compressed), "a plan is the same as the profile that it was made of"


def test_pictures_are_drawn_as_without_the_measurement_and_seeds_do_not_meet(tmp_path: Path) -> None:
    model = tiny_var()
    plain = [model.generate_codes([i % 5], seed=[FIRST_SEED + 7 * STRIDE + i])[0] for i in range(6)]
    codes: list[Any] = []
    hook = model.tokenizer.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[0].clone()))
    drawn = Drawn()
    calibrate(drawing(model, drawn), tmp_path, n_samples=6, seed=7)
    hook.remove()
    # more pictures than classes: in turn
    assert drawn == [(i % 5, FIRST_SEED + 7 * STRIDE + i) for i in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(codes, [one for scales in plain for one in scales], strict=True))


def test_a_profile_is_the_mean_over_its_pictures(tmp_path: Path) -> None:
    model = tiny_var()
    calibrate(drawing(model), tmp_path / "all", n_samples=3)
    single: list[HeadProfile] = []
    for label, seed in ((0, FIRST_SEED), (1, FIRST_SEED + 1), (3, FIRST_SEED + 2)):
        one = drawing(model)
        draw = one.draw
        assert draw is not None
        calibrate(replace(one, draw=lambda subjects, *, seed, draw=draw, own=(label, seed): draw([own[0]], seed=[own[1]])),
                  tmp_path / str(label), n_samples=1)  # fmt: skip
        single.append(profile_in(tmp_path / str(label)))
    found = profile_in(tmp_path / "all")
    for name in TENSORS:
        parts = [getattr(one, name).double() for one in single]
        torch.testing.assert_close(getattr(found, name).double(), sum(parts) / 3, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(parts[0], parts[1], atol=1e-4), f"{name}: pictures differ"
    # every scale hands out one
    shares = found.scale_use.sum(-1)
    torch.testing.assert_close(shares, torch.ones_like(shares))
    assert (found.scale_use.triu(1) == 0).all()
    assert ((found.entropy > 0) & (found.entropy < 1)).all()


# --- guidance and texts -------------------------------------------------------------------------------------------------------


def test_with_guidance_the_other_half_is_measured_beside_the_first(tmp_path: Path) -> None:
    model = tiny_var()
    guided, plain = (calibrate(drawing(model, guidance_scale=scale), tmp_path / str(scale), n_samples=2) for scale in (1.5, 0.0))
    found, unguided = profile_in(tmp_path / "1.5"), profile_in(tmp_path / "0.0")
    assert found.sigma_unconditional is not None
    assert not torch.allclose(found.sigma_unconditional, found.sigma, atol=1e-3)
    assert found.header.rank_correlation is not None
    assert -1 <= found.header.rank_correlation <= 1
    assert unguided.sigma_unconditional is None
    assert unguided.header.rank_correlation is None
    notes = [Recipe.load(tmp_path / name / "recipe.yaml").note for name in ("1.5", "0.0")]
    assert [f"correlates with {found.header.rank_correlation:.2f} by rank" in note for note in notes] == [True, False]
    assert guided.profile != plain.profile


@pytest.fixture
def infinity(monkeypatch: pytest.MonkeyPatch) -> Any:
    model: Any = tiny_infinity()
    monkeypatch.setattr(model, "default_schedule", lambda: Schedule(SHAPES))
    return model


def features(path: Path, n: int, *, seed: int = 0) -> Path:
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    save_file({str(i): torch.randn(2 + i % 5, 24, generator=draw) for i in range(n)}, path)
    return path


def test_a_model_that_draws_texts_is_given_features_in_turn(infinity: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path, drawn = features(tmp_path / "texts.safetensors", 11), Drawn()
    method = calibrate(drawing(infinity, drawn, schedule=SHAPES), tmp_path / "run", data=str(path), n_samples=13)
    held = load_file(path)
    # in the order of their numbers, not of their names: 0, 1, 2, …, 10, and again 0, 1
    for number, (text, seed) in enumerate(drawn):
        assert torch.equal(text, held[str(number % 11)])
        assert seed == FIRST_SEED + number
    header = profile_in(tmp_path / "run").header
    assert header.data.startswith(f"13 pictures of {path} (SHA-256 ")
    with accel.apply(infinity, method) as handle:
        infinity.generate_codes([held["0"]], seed=0, schedule=SHAPES)
    assert handle.stats.cache.kept_share is not None
    assert handle.stats.cache.kept_share < 1


def test_other_texts_under_the_same_name_are_other_data(infinity: Any, tmp_path: Path) -> None:
    path, drawn = features(tmp_path / "texts.safetensors", 3), Drawn()

    def kill(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(drawing(infinity, on_picture=kill, schedule=SHAPES), tmp_path / "run", data=path)
    features(path, 3, seed=1)
    with pytest.raises(OptionError, match="begun otherwise"):
        calibrate(drawing(infinity, drawn, schedule=SHAPES), tmp_path / "run", data=path)
    features(path, 3)
    calibrate(drawing(infinity, drawn, schedule=SHAPES), tmp_path / "run", data=path)
    assert len(drawn) == 2


def test_a_picture_of_other_scales_than_the_models_own_is_no_measurement(infinity: Any, tmp_path: Path) -> None:
    path = features(tmp_path / "texts.safetensors", 1)
    with pytest.raises(UnsupportedError) as caught:
        calibrate(drawing(infinity, schedule=[1, 2, 3, 5]), tmp_path / "run", data=path)
    assert caught.value.reasons == ["it is drawn with the scales 1 2 3 5, the model's own are 1 2 3 4"]


# --- mistakes -----------------------------------------------------------------------------------------------------------------


def test_features_that_cannot_be_used_are_told(infinity: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    files = {name: tmp_path / f"{name}.safetensors" for name in ("gone", "text", "empty", "flat")}
    files["text"].write_text("a red ball")
    save_file({}, files["empty"])
    save_file({"0": torch.zeros(24)}, files["flat"])
    for path in files.values():
        with pytest.raises(OptionError, match=path.name):
            calibrate(drawing(infinity), tmp_path / "run", data=str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "scenes"}, "data is “classes”, or a .safetensors file"), ({"data": None}, "data is “classes”"),
        ({"fixed": {"profile": "other.safetensors"}}, "leave out profile"), ({"fixed": {"plan": "plan.json"}}, "leave out plan"),
        ({"fixed": {"merge": "mean"}}, "merge must be"), ({"fixed": {"keep": 2.0}}, "keep must be"), ({"n_samples": 0}, "at least one picture"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_drawn(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    drawn = Drawn()
    with pytest.raises(OptionError, match=message):
        calibrate(drawing(tiny_var(), drawn), tmp_path / "run", **options)
    assert drawn == []
    assert not (tmp_path / "run").exists()


def test_calibration_draws_no_picture_of_the_task_images() -> None:
    from accel.evals.tasks import load_task

    task: Any = load_task("images")
    for seed in (0, 1):
        drawn = {FIRST_SEED + seed * STRIDE + i for i in range(50)}
        judged = {sample.picture_seed for other in (0, 1, 2) for sample in task.samples(10_000, other)}
        assert not drawn & judged


def test_models_that_cannot_be_measured_are_refused(infinity: Any, tmp_path: Path) -> None:
    from tiny_llama import tiny_model

    with pytest.raises(OptionError, match=r"draws texts: give it a .safetensors file of their features"):
        calibrate(drawing(infinity), tmp_path)
    # a language model reads text tasks or prose
    with pytest.raises(OptionError, match="no task is called 'classes'"):
        calibrate(LoadedModel(tiny_model(), None, "toy"), tmp_path)


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_recipe_for_the_small_var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usual: Any = _hack_calibration.profile_heads.__kwdefaults__
    monkeypatch.setitem(usual, "n_samples", 2)
    words = ["--model", "small-var", "--dtype", "float32", "--data", "classes", "--out", str(tmp_path / "run")]
    assert main(["tune", "hack:keep=0.6,merge=null", *words]) == 0
    out = capsys.readouterr().out
    assert "accel tune: heads of small-var from 2 pictures of classes" in out
    assert "recipe.yaml, and beside it the profile of hack" in out
    [method] = Recipe.load(tmp_path / "run" / "recipe.yaml").methods
    assert isinstance(method, HACK)
    assert (method.keep, method.merge) == (0.6, None)
    from accel.evals.models import load_model

    model = load_model("small-var")
    assert isinstance(model, LoadedImageModel)
    assert isinstance(model.model, VAR)
    assert model.draw is not None
    dense = model.draw([3], seed=1)
    with accel.apply(model.model, Recipe.load(tmp_path / "run" / "recipe.yaml")) as handle:
        assert not torch.equal(model.draw([3], seed=1), dense)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    kept = handle.stats.cache.kept_share
    assert kept is not None
    assert kept <= 0.6
    assert plan["model"] == "small-var"
    assert main(["tune", "hack:keep=0.6", *words[:-3], "scenes", "--out", str(tmp_path / "no")]) != 0
    assert "data is “classes”" in capsys.readouterr().err
