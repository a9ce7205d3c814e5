"""The head profile that ships with SmolLM2."""

from __future__ import annotations

from pathlib import Path

from accel.evals.models import smollm2
from accel.patches._head_profile import HeadProfile, classify, standing_gap
from accel.recipe import Recipe

FOLDER = Path(smollm2.__file__).parent


def test_its_heads_are_of_two_kinds_and_the_first_layers_are_contextual() -> None:
    """What the card says."""
    profile = HeadProfile.load(FOLDER / "hack_profile.safetensors")
    assert standing_gap(profile.sigma.flatten(), profile.window) == 34
    types = classify(profile, alpha="auto", fallback=0.5)
    assert sum(map(sum, types)) == sum(map(sum, types[:12])) == 34


def test_the_recipe_names_the_profile_beside_it() -> None:
    [method] = Recipe.load(FOLDER / "hack.yaml").methods
    assert Path(str(method.options()["profile"])).resolve() == (FOLDER / "hack_profile.safetensors").resolve()
