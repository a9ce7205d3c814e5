"""A calibration that was stopped goes on where it was, and only there: kills, folders of something else, damage, and budgets that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import Drawn, calibrate, drawing
from next_scale import tiny_var

from accel import Recipe
from accel.errors import OptionError
from accel.patches._hack_subjects import FIRST_SEED
from accel.patches._head_plan import HeadPlan
from accel.patches._head_profile import HeadProfile

PARTIAL = "profile.partial.safetensors"
TENSORS = ("sigma", "sigma_unconditional", "entropy", "scale_use")


def profile_in(folder: Path) -> HeadProfile:
    return HeadProfile.load(folder / "profile.safetensors")


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_killed_call_goes_on_and_ends_in_the_same_profile_bit_for_bit(killed_at: int, tmp_path: Path) -> None:
    model, drawn = tiny_var(), Drawn()

    def kill(number: int) -> None:
        if number == killed_at:
            raise KeyboardInterrupt

    calibrate(drawing(model), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        calibrate(drawing(model, drawn, on_picture=kill), tmp_path / "killed")
    # the picture behind which it was killed is not counted: it was not written
    assert (tmp_path / "killed" / PARTIAL).exists() == (killed_at > 1)
    assert not (tmp_path / "killed" / "profile.safetensors").exists()
    again = Drawn()
    calibrate(drawing(model, again), tmp_path / "killed")
    assert again == [(0, FIRST_SEED), (1, FIRST_SEED + 1), (3, FIRST_SEED + 2)][killed_at - 1 :]
    whole, found = profile_in(tmp_path / "whole"), profile_in(tmp_path / "killed")
    assert found.header == whole.header
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert not (tmp_path / "killed" / PARTIAL).exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a call that was killed behind its first picture."""
    folder = tmp_path_factory.mktemp("interrupted")

    def kill(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(drawing(tiny_var(), on_picture=kill), folder)
    return (folder / PARTIAL).read_bytes()


@pytest.mark.parametrize("change", ["seed", "samples", "weights", "dtype", "name"])
def test_what_was_begun_otherwise_is_not_continued(change: str, interrupted: bytes, tmp_path: Path) -> None:
    (tmp_path / PARTIAL).write_bytes(interrupted)
    model: Any = tiny_var()
    drawn = Drawn()
    options: dict[str, Any] = {"seed": {"seed": 1}, "samples": {"n_samples": 4}}.get(change, {})
    if change == "weights":
        with torch.no_grad():
            model.blocks[1].attn.qkv.weight.mul_(-1.5)
    found = drawing(model.to(torch.float64) if change == "dtype" else model, drawn)
    with pytest.raises(OptionError, match="holds a profile begun otherwise"):
        calibrate(replace(found, name="other") if change == "name" else found, tmp_path, **options)
    assert drawn == []
    assert (tmp_path / PARTIAL).read_bytes() == interrupted
    # options of the result do not change what is measured
    calibrate(drawing(tiny_var(), drawn), tmp_path, fixed={"keep": 0.9})
    assert len(drawn) == 2


def test_a_damaged_beginning_is_told(interrupted: bytes, tmp_path: Path) -> None:
    from safetensors.torch import load, save_file

    file = tmp_path / PARTIAL
    for damage in (lambda: file.write_bytes(interrupted[:-9]), lambda: file.write_text("no"), lambda: save_file(load(interrupted), file)):
        damage()
        with pytest.raises(OptionError, match=r"partial\.safetensors is damaged .*remove it to begin anew"):
            calibrate(drawing(tiny_var()), tmp_path)


@pytest.mark.parametrize("change", ["seed", "samples", "weights", "name", "nothing"])
def test_a_folder_with_another_profile_is_left_alone_and_one_with_the_same_gets_another_recipe(change: str, tmp_path: Path) -> None:
    model, drawn = tiny_var(), Drawn()
    calibrate(drawing(model), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options: dict[str, Any] = {"seed": {"seed": 1}, "samples": {"n_samples": 4}}.get(change, {})
    found = drawing(tiny_var(num_classes=6) if change == "weights" else model, drawn)
    found = replace(found, name="other") if change == "name" else found
    if change == "nothing":
        assert calibrate(found, tmp_path, fixed={"keep": 0.9}).keep == 0.9
        assert (tmp_path / "profile.safetensors").read_bytes() == before["profile.safetensors"]
        assert HeadPlan.load(tmp_path / "plan.json")[0].keep == 0.9
    else:
        with pytest.raises(OptionError, match=r"holds another profile .*choose another folder"):
            calibrate(found, tmp_path, **options)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert drawn == []


def test_budgets_that_do_not_fit_cost_no_pictures(tmp_path: Path) -> None:
    model, drawn = tiny_var(), Drawn()
    with pytest.raises(OptionError, match="keep more"):
        calibrate(drawing(model, drawn), tmp_path, fixed={"keep": 2})
    assert len(drawn) == 3, "which budgets fit is known behind the last picture only"
    calibrate(drawing(model, drawn), tmp_path, fixed={"keep": 15})
    assert len(drawn) == 3
    assert Recipe.load(tmp_path / "recipe.yaml").methods[0].options()["keep"] == 15
