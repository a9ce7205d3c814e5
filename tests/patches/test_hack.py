"""HACK's options, and how it comes to the heads of a model: profiles, plans, what is refused, and what a user is told."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import info_of, profile_of, saved
from next_scale import INFO, SHAPES, tiny_infinity, tiny_var

import accel
from accel import Recipe
from accel.errors import OptionError, UnsupportedError
from accel.patches._head_budgets import MOST_PLANS
from accel.patches._head_plan import HeadPlan
from accel.patches.hack import HACK
from accel.protocols import HeadGroup, ModelInfo
from accel.registry import build

ROWS = ["CCSS", "CCCS"]
# 16 heads of which ten are contextual: with other weights than those of the profile
MODEL = replace(INFO, fingerprint=lambda: "abc")
INFINITY = replace(INFO, family="accel_infinity")


def groups(method: HACK, layer: int, *, step: int = 3, model: ModelInfo = INFO) -> list[HeadGroup]:
    return method.bind(model).groups(model, layer, step=step, n_entries=30)


# --- options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.0}, {"keep": 1}, {"keep": 1.5}, {"alpha": -0.1}, {"alpha": 1.1}, {"alpha": "half"}, {"alpha": True}, {"contextual_share": 0},
        {"contextual_share": 1.5}, {"contextual_share": None}, {"n_queries": 0}, {"n_queries": 1.5}, {"n_protected": -1}, {"middle_share": 1.1},
        {"middle_share": float("nan")}, {"recent_policy": "newest"}, {"merge": "mean"}, {"merge": False}, {"renorm_keys": 1}, {"diffuse_guard": None},
        {"share_cfg_selection": 0}, {"selectors": "both"}, {"protect": "yes"}, {"mode": "hack++"}, {"profile": 3}, {"plan": True},
        {"reliance_power": -1}, {"reliance_power": float("inf")}, {"allow_other_model": None}, {"cache_keep": 0.1},
        {"mode": "decoupled", "cache_keep": 0}, {"mode": "decoupled", "cache_keep": 1}, {"mode": "decoupled", "plan": "plan.json"},
        {"mode": "decoupled", "keep": 0.3, "cache_keep": 0.4}, {"mode": "decoupled", "keep": 10, "cache_keep": 11},
        {"reliance_power": 0.5}, {"mode": "decoupled", "selectors": "swapped"}, {"mode": "decoupled", "merge": "normalised"},
        {"mode": "decoupled", "renorm_keys": True}, {"mode": "decoupled", "middle_share": 0.5}, {"mode": "decoupled", "recent_policy": "score"},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_raise_and_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"^hack: ") as caught:
        build("hack", options)
    wrong = [name for name in options if name not in ("mode", "keep")] or list(options)
    assert any(name in str(caught.value) for name in wrong), caught.value


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1.0}, {"keep": 2}, {"alpha": 0}, {"alpha": 1}, {"contextual_share": 1}, {"n_queries": None}, {"n_queries": 1}, {"n_protected": 0},
        {"middle_share": 0}, {"middle_share": 1}, {"merge": None}, {"mode": "decoupled", "keep": 0.3, "cache_keep": 0.3},
        {"mode": "decoupled", "reliance_power": 0, "merge": None},
        {"mode": "decoupled", "keep": 0.3, "cache_keep": 5}, {"plan": "plan.json", "merge": None, "n_queries": 4},
    ],
    ids=str,
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    assert build("hack", options).changed_options().keys() <= options.keys()


def test_unknown_options_are_told_from_the_known() -> None:
    with pytest.raises(OptionError, match="hack has no option 'merges'; did you mean 'merge'"):
        build("hack", {"merges": None})


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"contextual_share": 0.5}, {"n_protected": 3}, {"diffuse_guard": True}], ids=str)
def test_what_a_plan_says_already_cannot_be_said_again(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))} would change nothing"):
        HACK(plan="plan.json", **options)


def test_a_plan_and_a_profile_are_not_given_together() -> None:
    with pytest.raises(OptionError, match=r"both plan='plan.json' and profile='p.safetensors' were given.*give one or the other"):
        HACK(plan="plan.json", profile="p.safetensors")


def test_a_file_of_the_wrong_kind_says_which_kind_it_is(tmp_path: Path) -> None:
    profile = saved(tmp_path, ROWS)
    plan = str(HACK(keep=12).plan_for(INFO).save(tmp_path / "plan.json", about={}))
    (tmp_path / "text").write_text("a text, longer than a header's length")
    for options, message in (
        ({"profile": plan}, "is no head profile: it is a plan, which is given as plan="),
        ({"profile": str(tmp_path)}, "is no head profile: it is a folder"),
        ({"profile": str(tmp_path / "text")}, "is no head profile: it is no safetensors file"),
        ({"profile": str(tmp_path / "gone")}, "is no head profile: there is no such file"),
        ({"plan": profile, "keep": 12}, "is no plan: it is a safetensors file; a head profile is given as profile="),
        ({"plan": str(tmp_path), "keep": 12}, "is no plan: it is a folder"),
        ({"plan": str(tmp_path / "text"), "keep": 12}, "is no plan: it is no JSON"),
        ({"plan": str(tmp_path / "gone"), "keep": 12}, "is no plan: there is no such file"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            accel.apply(tiny_var(), HACK(**options))    # type: ignore[arg-type]


# --- without a profile --------------------------------------------------------------------------------------------------------


def test_without_a_profile_all_heads_are_structural_with_equal_budgets_and_the_user_is_told() -> None:
    method = HACK(keep=0.8)
    assert [groups(method, layer) for layer in (0, 1)] == [[HeadGroup((0, 1, 2, 3), 24, "structural")]] * 2
    assert "no head profile: all heads are treated as structural ones" in str(method.notice(INFO))
    assert method.supports(INFO, "nextscale", []) == []
    with accel.apply(tiny_var(), method) as handle:
        assert "no head profile" in handle.report()
        assert "accel tune hack" in handle.report()


@pytest.mark.parametrize("keep, is_told", [(21, False), (20, True), (0.7, False), (0.69, True)])
def test_a_scale_that_does_not_fit_is_told_once(keep: float, is_told: bool) -> None:
    # 21: the first five and the sixteen of the last scale
    notice = str(HACK(keep=keep).notice(INFO))
    assert notice.count("too few for the first 5 and the 16 of the last scale") == is_told
    for options in ({"protect": False}, {"selectors": "contextual"}):
        assert "too few" not in str(HACK(keep=keep, **options).notice(INFO)), "nothing is promised that could be broken"


# --- profiles -----------------------------------------------------------------------------------------------------------------


def test_a_profile_sorts_the_heads_and_budgets_follow(tmp_path: Path) -> None:
    method = HACK(profile=saved(tmp_path, ROWS), keep=12, contextual_share=0.5)
    # α 5/8: 6, and 12 · (1 − 5/16) / (3/8) = 22
    assert groups(method, 0) == [HeadGroup((0, 1), 6, "contextual"), HeadGroup((2, 3), 22, "structural")]
    assert groups(method, 1) == [HeadGroup((0, 1, 2), 6, "contextual"), HeadGroup((3,), 22, "structural")]
    assert method.notice(INFO) is None
    # the same at every scale
    assert groups(method, 0, step=1) == groups(method, 0)


def test_heads_of_one_kind_in_a_layer_are_one_group(tmp_path: Path) -> None:
    method = HACK(profile=saved(tmp_path, ["CCCC", "SSSS"]), keep=12, contextual_share=0.5)
    assert groups(method, 0) == [HeadGroup((0, 1, 2, 3), 6, "contextual")]
    assert groups(method, 1) == [HeadGroup((0, 1, 2, 3), 18, "structural")]


def test_options_of_the_split(tmp_path: Path) -> None:
    path = saved(tmp_path, ROWS)
    assert [len(groups(HACK(profile=path, keep=20, alpha=alpha), 0)[0].heads) for alpha in (0.125, 0.25, 1)] == [1, 2, 4]
    assert groups(HACK(profile=path, keep=20, alpha=0), 0) == [HeadGroup((0, 1, 2, 3), 20, "structural")]
    assert {group.budget for group in groups(HACK(profile=path, keep=20, contextual_share=1), 0)} == {20}
    # with all entropies above 0.9 the guard leaves no contextual head
    diffuse = profile_of(ROWS)
    diffuse.entropy.fill_(0.95)
    path = str(diffuse.save(tmp_path / "diffuse.safetensors"))
    assert len(groups(HACK(profile=path, keep=20), 0)) == 2
    assert groups(HACK(profile=path, keep=20, diffuse_guard=True), 0) == [HeadGroup((0, 1, 2, 3), 20, "structural")]
    plans = [HACK(profile=path, keep=20, **options).bind(INFO).plan_for(INFO) for options in ({}, {"n_protected": 3}, {"protect": False})]
    assert [plan.n_protected for plan in plans] == [5, 3, 0]


@pytest.mark.parametrize("model, alpha", [(INFO, 4 / 8), (INFINITY, 7 / 8)], ids=["var", "infinity"])
def test_without_a_gap_half_of_the_heads_are_contextual_or_four_fifths_in_infinity(model: ModelInfo, alpha: float, tmp_path: Path) -> None:
    even = profile_of(ROWS, model)
    even.sigma.copy_((0.1 * even.sigma.flatten().argsort().argsort().view(2, 4)).exp())
    path = str(even.save(tmp_path / "even.safetensors"))
    assert HACK(profile=path, keep=20).bind(model).plan_for(model).alpha == alpha


def test_a_profile_of_another_model_is_refused_unless_it_is_wanted(tmp_path: Path) -> None:
    path = saved(tmp_path, ROWS)
    other = replace(MODEL, fingerprint=lambda: "other")
    assert HACK(profile=path).supports(MODEL, "", []) == []
    [reason] = HACK(profile=path).supports(other, "", [])
    assert "measured on toy (weights abc)" in reason
    assert "weights other" in reason
    with pytest.raises(UnsupportedError):
        HACK(profile=path).bind(other)
    wanted = HACK(profile=path, allow_other_model=True, keep=20)
    assert wanted.supports(other, "", []) == []
    assert "measured on toy, not on this model" in str(wanted.notice(other))
    assert wanted.notice(MODEL) is None
    # other sizes never
    for sizes in ({"n_layers": 3}, {"n_kv_heads": 2}):
        [reason] = wanted.supports(replace(MODEL, **sizes), "", [])     # type: ignore[arg-type]
        assert "this accel_var model has" in reason


def test_apply_tells_weights_apart(tmp_path: Path) -> None:
    model = tiny_var()
    path = saved(tmp_path, ROWS, info_of(model))
    accel.apply(model, "hack", profile=path, keep=0.8).undo()
    with pytest.raises(UnsupportedError, match="make a profile of it, or say allow_other_model"):
        accel.apply(tiny_var(num_classes=6), "hack", profile=path)
    with accel.apply(tiny_var(num_classes=6), "hack", profile=path, keep=0.8, allow_other_model=True) as handle:
        assert "measured on toy, not on this model" in handle.report()


def test_what_cannot_work_at_all_is_refused(tmp_path: Path) -> None:
    decoder = replace(INFO, scale_shapes=None)
    assert HACK().supports(decoder, "transformers", []) == []
    for options in ({"mode": "decoupled", "profile": "some.safetensors"}, {"plan": "plan.json"}):
        [reason] = HACK(**options).supports(decoder, "transformers", [])
        assert "next-scale model" in reason
    [reason] = HACK(profile=saved(tmp_path, ROWS)).supports(decoder, "transformers", [])
    assert "the profile is of an image model" in reason
    [reason] = HACK(mode="decoupled").supports(INFO, "nextscale", [])
    assert "accel tune hack" in reason
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("text.safetensors", "gone.safetensors"):
        with pytest.raises(OptionError, match="is no head profile"):
            accel.apply(tiny_var(), "hack", profile=str(tmp_path / name))
    with pytest.raises(OptionError, match="was not bound"):
        HACK(profile=saved(tmp_path, ROWS)).plan_for(INFO)


def test_scales_must_begin_as_the_calibrated_ones_and_other_lengths_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = HACK(profile=saved(tmp_path, ROWS), keep=0.9).bind(INFO)
    method.plan_for(INFO)
    longer = replace(INFO, scale_shapes=(*SHAPES, (6, 6)))
    with caplog.at_level(logging.WARNING, "accel"):
        for _ in range(2):
            assert method.plan_for(longer).total == 66
            assert method.plan_for(replace(INFO, scale_shapes=SHAPES[:3])).total == 14
            assert method.plan_for(INFO).total == 30
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"hack: the heads were measured with the scales 1 2 3 4 and are used with {used}" for used in ("1 2 3 4 6", "1 2 3")]
    assert "used with 1 2 3 4 6" in str(HACK(profile=saved(tmp_path, ROWS), keep=0.9).notice(longer))
    # of the usual scales the notice speaks, once
    caplog.clear()
    assert HACK(profile=saved(tmp_path, ROWS), keep=0.9).bind(longer).plan_for(longer).total == 66
    assert not caplog.records
    with pytest.raises(UnsupportedError, match="does not fit these scales") as caught:
        method.plan_for(replace(INFO, scale_shapes=((1, 1), (2, 2), (3, 4), (4, 4))))
    assert "one list must begin with the other" in caught.value.reasons[0]


def test_a_picture_of_other_scales_is_refused_while_it_is_drawn(tmp_path: Path) -> None:
    model: Any = tiny_infinity()
    info = replace(info_of(model), scale_shapes=SHAPES)
    method = HACK(profile=saved(tmp_path, ROWS, info), keep=0.8, allow_other_model=True)
    # the usual scales of the model are others: pictures of those are refused, and the user is told
    with accel.apply(model, method) as handle:
        assert any("will not draw with the default scales" in notice for notice in handle.notices)
        model.generate_codes([torch.ones(3, 24)], seed=0, schedule=[1, 2, 3, 4])
    usual = info_of(model)
    with accel.apply(model, HACK(profile=saved(tmp_path, ROWS, usual), keep=0.8)) as handle:
        with pytest.raises(UnsupportedError, match="does not fit these scales"):
            model.generate_codes([torch.ones(3, 24)], seed=0, schedule=[1, 3, 4])
        model.generate_codes([torch.ones(3, 24)], seed=0, schedule=[1, 2, 4])
        assert handle.stats.cache.kept_share is not None
        assert handle.stats.cache.kept_share < 1


# --- plans and recipes --------------------------------------------------------------------------------------------------------


def test_a_plan_is_used_as_it_is(tmp_path: Path) -> None:
    planned = HACK(profile=saved(tmp_path, ROWS), keep=12, contextual_share=0.5, n_protected=3).bind(INFO).plan_for(INFO)
    path = str(planned.save(tmp_path / "plan.json", about={"weights": "abc"}))
    method = HACK(plan=path, keep=12)
    assert method.supports(MODEL, "", []) == []
    assert method.bind(MODEL).plan_for(MODEL) == planned
    assert [group.budget for group in groups(method, 1, model=MODEL)] == [6, 22]
    assert method.notice(MODEL) is None
    for model, options, message in (
        (MODEL, {"keep": 13}, "made for keep=12, asked for keep=13"),
        (MODEL, {"keep": 0.4}, "asked for keep=0.4"),
        (replace(MODEL, n_layers=3), {"keep": 12}, "for 2 layers of 4 heads, this model has 3 of 4"),
        (replace(MODEL, fingerprint=lambda: "abd"), {"keep": 12}, "made for the weights abc, this model has abd"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            HACK(plan=path, **options).bind(model)
        assert message in caught.value.reasons[0]
    HACK(plan=path, keep=12, allow_other_model=True).bind(replace(MODEL, fingerprint=lambda: "abd"))


def test_a_plan_is_for_one_list_of_scales(tmp_path: Path) -> None:
    path = HACK(keep=12).plan_for(INFO).save(tmp_path / "plan.json", about={})
    method = HACK(plan=str(path), keep=12).bind(INFO)
    # as many tokens in all, and longer by one scale
    for shapes in (((1, 1), (2, 2), (5, 5)), (*SHAPES, (5, 5))):
        with pytest.raises(UnsupportedError, match="is for the scales 1 2 3 4, this picture has 1 2"):
            method.plan_for(replace(INFO, scale_shapes=shapes))


def test_a_changed_plan_is_refused_when_it_is_applied(tmp_path: Path) -> None:
    path = HACK(keep=12).plan_for(INFO).save(tmp_path / "plan.json", about={})
    path.write_text(path.read_text().replace('"keep": 12', '"keep": 13'))
    with pytest.raises(OptionError, match="was changed after it was made"):
        accel.apply(tiny_var(), HACK(plan=str(path), keep=13))


def test_a_recipe_finds_its_files_beside_it_wherever_they_are_moved(tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    method = HACK(profile=Path(saved(folder, ROWS)), keep=0.8, merge=None)     # type: ignore[arg-type]
    assert isinstance(method.profile, str)
    plan = method.bind(INFO).plan_for(INFO).save(folder / "plan.json", about={})
    Recipe.of(method).save(folder / "recipe.yaml")
    Recipe.of(HACK(plan=str(plan), keep=0.8)).save(folder / "planned.yaml")
    assert "profile: profile.safetensors" in (folder / "recipe.yaml").read_text()
    shutil.move(folder, tmp_path / "moved")
    [found] = Recipe.load(tmp_path / "moved" / "recipe.yaml").methods
    assert isinstance(found, HACK)
    assert found == replace(method, profile=str(tmp_path / "moved" / "profile.safetensors"))
    [planned] = Recipe.load(tmp_path / "moved" / "planned.yaml").methods
    assert isinstance(planned, HACK)
    assert found.bind(INFO).plan_for(INFO) == planned.bind(INFO).plan_for(INFO) == HeadPlan.load(tmp_path / "moved" / "plan.json")[0]


def test_what_binding_loads_is_no_option_and_stays_off_the_method(tmp_path: Path) -> None:
    method = HACK(profile=saved(tmp_path, ROWS), keep=0.8)
    bound = method.bind(INFO)
    bound.plan_for(INFO)
    assert bound is not method
    assert bound == method
    assert bound.options() == method.options()
    assert not any(name.startswith("_") for name in bound.options())
    with pytest.raises(OptionError, match="was not bound"):
        method.plan_for(INFO)


def test_plans_of_ever_new_prompt_lengths_do_not_pile_up() -> None:
    decoder = replace(INFO, scale_shapes=None)
    method = HACK(keep=0.5).bind(decoder)
    first = method.plan_for(decoder, 1000)
    for n in range(1000, 1001 + MOST_PLANS):
        method.plan_for(decoder, n)
    assert len(method._plans) == MOST_PLANS
    assert method.plan_for(decoder, 1000) == first
