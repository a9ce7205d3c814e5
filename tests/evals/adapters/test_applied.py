"""What the adapters share: reading a method or a recipe, and telling methods that worked from methods that did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_model

import accel
from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.adapters.applied import Applied, read_methods, without_effect
from accel.stats import Stats


def test_a_method_and_a_recipe_are_read_as_everywhere(tmp_path: Path) -> None:
    recipe = accel.Recipe.of(accel.FlexPrefill(gamma=0.8), accel.SnapKV(keep=0.3))
    assert read_methods(None, recipe.save(tmp_path / "r.yaml")) == list(recipe.methods)
    assert read_methods("flexprefill:gamma=0.8,min_budget=256", None) == [accel.FlexPrefill(gamma=0.8, min_budget=256)]
    assert read_methods(None, None) == []


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    two = accel.Recipe.of("flexprefill", "streaming").save(tmp_path / "two.yaml")
    with pytest.raises(UnsupportedError, match="at most one sparse-attention method"):
        read_methods(None, two)
    with pytest.raises(OptionError, match="a method or a recipe"):
        read_methods("flexprefill", two)
    with pytest.raises(OptionError, match="did you mean 'gamma'"):
        read_methods("flexprefill:gama=0.9", None)
    with pytest.raises(OptionError, match=r"gamma, tau: an option of flexprefill, cut off at a comma.*'flexprefill,gamma=…'"):
        read_methods("flexprefill", None, beside=["tau", "gamma", "dtype"])


def test_every_call_is_counted_from_zero(capsys: pytest.CaptureFixture[str]) -> None:
    model, told = tiny_model(), list[str]()
    applied = Applied(model, [accel.Streaming(min_seq_len=1, block_size=16, window_blocks=1)], tell=told.append)
    for kind, n in (("one", 1), ("two", 2), ("one", 3)):
        with applied.counting(kind, n), torch.no_grad():
            for _ in range(n):
                model(torch.ones(1, 100, dtype=torch.long))
    assert [(call["kind"], call["requests"], call["sparse_calls"]) for call in applied.calls] == [("one", 1, 3), ("two", 2, 6), ("one", 3, 9)]
    assert [line.split(":")[0] for line in told] == ["1 requests of one", "2 requests of two", "3 requests of one"]
    assert "9 sparse" in told[2]
    applied.undo()
    assert applied.info()["calls"] == applied.calls


def test_without_methods_nothing_is_put_on_the_model() -> None:
    model = tiny_model()
    before = dict(vars(model))
    applied = Applied(model, [])
    with applied.counting("one", 1):
        assert dict(vars(model)) == before
    assert applied.info() == {"methods": []}


def test_an_error_inside_is_not_hidden_by_one_about_effects() -> None:
    applied = Applied(tiny_model(), [accel.Streaming()], require_effect=True)
    with pytest.raises(KeyError), applied.counting("one", 1):
        raise KeyError
    with pytest.raises(AccelError, match="streaming had no effect in 1 requests of one"), applied.counting("one", 1):
        pass


def test_an_effect_is_a_sparse_call_a_dropped_token_or_a_dropped_entry() -> None:
    methods = [accel.FlexPrefill(), accel.FasterVLM(), accel.SnapKV()]
    names = ["flexprefill", "fastervlm", "snapkv"]
    stats = Stats()
    assert without_effect(methods, stats) == names
    # everything kept, everything held
    stats.layer(0).dense_calls["decode"] += 1
    stats.tokens.layer_tokens = stats.tokens.all_layer_tokens = 8
    stats.cache.add_layer(0, held=100, whole=100)
    assert without_effect(methods, stats) == names
    stats.layer(0).sparse_calls += 1
    assert without_effect(methods, stats) == names[1:]
    stats.tokens.all_layer_tokens = 16
    assert without_effect(methods, stats) == names[2:]
    stats.cache.add_layer(0, held=90, whole=200)
    assert without_effect(methods, stats) == []


@pytest.mark.parametrize(("attended", "idle"), [(10, ["snapkv"]), (6, [])])
def test_in_models_that_draw_entries_are_counted(attended: int, idle: list[str]) -> None:
    stats = Stats()
    stats.cache.add_entries(0, total=10, attended=attended, cached=attended)
    assert without_effect([accel.SnapKV()], stats) == idle
