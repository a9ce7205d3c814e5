"""The head profile that ships with small-var: it is of these weights, and runs."""

from __future__ import annotations

import accel
from accel.evals.models import load_model
from accel.evals.models.small_var.load import HERE
from accel.patches._head_profile import HeadProfile
from accel.recipe import Recipe


def test_the_shipped_recipe_holds_a_profile_of_the_shipped_weights() -> None:
    loaded = load_model("small-var")
    recipe = Recipe.load(HERE / "hack.yaml")
    with accel.apply(loaded.model, recipe) as handle:
        pictures = loaded.draw(range(10), seed=5)   # type: ignore[attr-defined]
    assert not any("no head profile" in notice for notice in handle.notices)
    assert loaded.judge.classes(pictures).tolist() == list(range(10))   # type: ignore[attr-defined]
    cache = handle.stats.cache
    assert cache.kept_share is not None
    assert 0.29 < cache.kept_share <= 0.3
    assert cache.peak_bytes < 0.6 * cache.whole_bytes


def test_its_heads_show_no_two_kinds() -> None:
    """What the card says: σ runs from head to head without a gap that is large beside the others. The models of the paper have one."""
    sigma = HeadProfile.load(HERE / "hack_profile.safetensors").sigma.flatten().sort().values
    assert sigma.shape == (24,)
    logs = sigma.log()
    assert float(logs.diff().max()) < 0.3 * float(logs[-1] - logs[0])
