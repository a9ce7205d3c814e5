"""What ships for dyvte with the small vision-language model: routers, their recipe, and the table that compares them with fixed exits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import accel
from accel.evals.models.small_vlm import exits
from accel.evals.models.small_vlm.exits import Outcome
from accel.evals.scenes import held_out
from accel.evals.visual_bench.cost import DecoderShape, prefill_flops
from accel.patches._routers import read_header
from accel.patches.dyvte import DyVTE
from accel.recipe import Recipe
from accel.stats import PruningEvent

pytest.importorskip("PIL")
SHAPE = DecoderShape(4, 32, 4, 4, 8, 64, 64)


@pytest.fixture(scope="module")
def loaded() -> Any:
    from accel.evals.models import load_model

    return load_model("small-vlm")


def shipped() -> DyVTE:
    [method] = Recipe.load(exits.RECIPE).methods
    assert isinstance(method, DyVTE)
    return method


def test_the_recipe_names_its_routers_from_any_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "routers: routers.safetensors" in exits.RECIPE.read_text()
    monkeypatch.chdir(tmp_path)
    header = read_header(shipped().routers or "")
    assert (header.model, header.n_layers, header.hidden_size) == ("small-vlm", 8, 128)
    assert (exits.RECIPE.parent / "routers.safetensors").stat().st_size < 300e3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_routers_run_on_their_model_in_every_dtype(dtype: str) -> None:
    from accel.evals.models import load_model

    model = load_model("small-vlm", dtype=dtype)
    with accel.apply(model.model, Recipe.load(exits.RECIPE)) as handle:
        found = exits.answers(model, {"color": held_out("color", "validation", 1)}, ())
        assert handle.stats.tokens.prompts == len(found) == 1


def test_the_routers_leave_earlier_and_answer_nearly_as_well(loaded: Any) -> None:
    items = {family: held_out(family, "validation", 20) for family in exits.ASKED}
    whole, learned = exits.answers(loaded, items, ()), exits.answers(loaded, items, [shipped()])
    assert {o.layer for o in whole} == {7}
    assert sum(o.layer for o in learned) / len(learned) < 6
    assert sum(a.reply == b.reply for a, b in zip(whole, learned, strict=True)) >= 0.9 * len(whole)


def test_a_fixed_exit_is_seen_as_one(loaded: Any) -> None:
    items = {"exist": held_out("exist", "validation", 3), "word": held_out("word", "validation", 2)}
    found = exits.answers(loaded, items, [DyVTE(exit_layer=4)])
    assert [o.layer for o in found] == [4] * 5
    # the begin token and the words
    assert [o.n_text for o in found] == [1 + len(item.question.text.split()) for part in items.values() for item in part]


def test_the_exit_is_the_layer_before_the_first_stage_that_leaves_nothing() -> None:
    def event(layer: int, *kept: bool) -> PruningEvent:
        mask = torch.tensor(kept)[:, None].expand(-1, 3)
        none = torch.zeros_like(mask)
        return PruningEvent("dyvte", accel.DyVTE(exit_layer=layer - 1).stages(INFO)[0], [], none, none, none, mask, none)

    from pruning_contexts import INFO

    assert exits.exit_layers([event(3, True, False, True), event(5, True, False, False)], 3, 7) == [7, 2, 4]
    assert exits.exit_layers([], 2, 7) == [7, 7]


def outcome(layer: int, reply: str = "yes", is_right: bool = True) -> Outcome:
    return Outcome("exist", reply, is_right, layer, 6)


def test_what_is_saved_is_what_the_layers_behind_the_exit_cost() -> None:
    assert exits.layer_tokens(4, outcome(1), 10) == [16, 16, 6, 6]
    full, text = (prefill_flops(SHAPE, [n] * 4) for n in (16, 6))
    visual, prefill = exits.saved(SHAPE, [outcome(1), outcome(3)], 10)
    # half of the layers of half of the questions
    assert visual == pytest.approx(0.25)
    assert prefill == pytest.approx(0.25 * (full - text) / full)


def test_the_oracle_takes_the_first_exit_that_keeps_the_answer_right_or_wrong() -> None:
    own = [outcome(0, "no", False), outcome(1, "yes"), outcome(2, "no", False), outcome(3, "no", False)]
    assert exits.earliest(own).layer == 0
    assert exits.earliest([*own[1:3], outcome(3)]).layer == 1


def test_mixed_fixed_exits_lie_between_their_neighbours() -> None:
    fixed = [[outcome(n, is_right=right) for right in marks] for n, marks in enumerate([(0, 0), (0, 1), (1, 1)])]
    assert [exits.mixed(fixed, layer) for layer in (0, 0.5, 1.5, 2)] == pytest.approx([0, 0.25, 0.75, 1])
