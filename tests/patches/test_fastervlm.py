"""FasterVLM and VisPruner: which tokens win, and what is observed of which encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_contexts import INFO, PROJECTOR, Grid, assert_well_formed, context, kept_of, maps, places, random_maps
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches.fastervlm import FasterVLM, diverse
from accel.protocols import Observation, PruningContext
from accel.recipe import Recipe


def kept(method: FasterVLM, ctx: PruningContext) -> list[list[int]]:
    keep = method.select(ctx)
    assert keep is not None
    assert_well_formed(keep, ctx)
    return kept_of(keep, ctx)


# --- what is observed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "has_cls", "what"),
    [("auto", True, "cls_row"), ("auto", False, "mean_received"), ("received", True, "mean_received"), ("cls", True, "cls_row")],
)
def test_the_score_is_settled_when_bound(score: str, has_cls: bool, what: str) -> None:
    info = replace(INFO, has_cls=has_cls)
    method = FasterVLM(**{"score": score, "head_reduce": "max", "scoring_layer": 5})
    assert method.supports(info, "transformers", []) == []
    bound = method.bind(info)
    assert bound == method
    assert bound.options() == method.options()
    max_queries = 2048 if what == "mean_received" else None
    assert bound.observe() == (Observation(what, layer=5, head_reduce="max", max_queries=max_queries),)  # type: ignore[arg-type]
    # and read from there
    rows = random_maps(16)
    assert kept(bound, context([Grid(4, 4)], observed={what: rows})) == [sorted(rows[0].topk(4).indices.tolist())]


def test_cls_attention_is_refused_where_the_encoder_has_none() -> None:
    [reason] = FasterVLM(score="cls").supports(replace(INFO, has_cls=False), "transformers", [])
    assert "[CLS]" in reason
    assert "received" in reason


# --- selection ----------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), n=st.sampled_from([1, 5, 48]), shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_a_smaller_budget_keeps_a_subset(seed: int, n: int, shares: tuple[float, float]) -> None:
    rows = {"mean_received": random_maps(n, seed=seed)}
    [small], [large] = (kept(FasterVLM(keep=share), context([Grid(1, n)], observed=rows)) for share in sorted(shares))
    assert set(small) <= set(large)


def test_one_token_is_never_lost() -> None:
    assert kept(FasterVLM(keep=0.001), context([Grid(1, 1)], observed={"mean_received": maps([0.5])})) == [[0]]
    assert kept(FasterVLM(keep=0.001), context([Grid(4, 4)], observed={"mean_received": random_maps(16)})) == [[int(random_maps(16).argmax())]]
    assert kept(FasterVLM(keep=0.001, min_tokens=0), context([Grid(4, 4)], observed={"mean_received": random_maps(16)})) == [[]]


def test_counts_are_as_promised_and_two_runs_agree() -> None:
    ctx = context([Grid(24, 24), Grid(5, 7, picture=1)], [], [Grid(16, 16)], observed={"mean_received": random_maps(576, 35, 256)})
    for share in (0.75, 0.1, 0.01):
        method = FasterVLM(keep=share)
        keep, again = method.select(ctx), method.select(ctx)
        assert keep is not None
        assert again is not None
        assert torch.equal(keep.index, again.index)
        assert [len(found) for found in kept_of(keep, ctx)] == method.count(PROJECTOR, ctx.units)
        assert places(keep, 1) == []


def test_the_same_image_twice_keeps_the_same_tokens() -> None:
    rows = random_maps(16)
    ctx = context([Grid(4, 4), Grid(4, 4, picture=1)], observed={"mean_received": maps(rows[0], rows[0])})
    first, second = kept(FasterVLM(), ctx)
    assert first == second


def test_without_an_image_nothing_is_done() -> None:
    assert FasterVLM().select(context([], [])) is None


def test_selection_tracks_no_gradient() -> None:
    rows = random_maps(16).requires_grad_()
    assert kept(FasterVLM(keep=3), context([Grid(4, 4)], observed={"mean_received": rows})) == [sorted(rows[0].topk(3).indices.tolist())]


# --- VisPruner ----------------------------------------------------------------------------------------------------------------


def published_rounds(features: Tensor, rest: list[int], n: int) -> list[int]:
    """§2.9 step 3 written out, for any number of tokens left."""
    rows = torch.nn.functional.normalize(features.double(), dim=-1)
    while len(rest) > n:
        a, b = rest[::2], rest[1::2]
        m = min(8, len(rest) - n)
        highest = {i: max(float(rows[i] @ rows[j]) for j in b) for i in a}
        for i in sorted(a, key=lambda i: -highest[i])[:m]:
            a.remove(i)
        rest = a + b
    return rest


@pytest.mark.parametrize("n_rest", [2, 3, 9, 20, 33, 48], ids=lambda n: f"{n} left")
@pytest.mark.parametrize("n", [1, 2, 7])
def test_diverse_tokens_are_those_of_the_published_rounds(n_rest: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n_rest)
    features = torch.randn(50, 6, generator=generator)
    rest = torch.randperm(50, generator=generator)[:n_rest]
    assert diverse(features, rest, n).tolist() == published_rounds(features, rest.tolist(), n)


def test_large_units_take_larger_steps_and_still_meet_the_budget() -> None:
    features = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    found = diverse(features, torch.arange(2900), 37)
    assert len(set(found.tolist())) == 37


def test_duplicates_are_the_first_to_go() -> None:
    # every even token equals its odd neighbour: of each pair one is left
    features = torch.eye(8).repeat_interleave(2, 0)
    assert sorted(int(i) // 2 for i in diverse(features, torch.arange(16), 8)) == list(range(8))


@given(n=st.integers(2, 16), ratio=st.sampled_from([0.0, 0.3, 0.5, 0.99]), seed=st.integers(0, 50))
def test_vispruner_keeps_the_important_and_as_many_as_asked(n: int, ratio: float, seed: int) -> None:
    rows = random_maps(16, seed=seed)
    ctx = context([Grid(4, 4)], observed={"mean_received": rows})
    [found] = kept(FasterVLM(keep=n, important_ratio=ratio), ctx)
    assert len(found) == n
    assert set(rows[0].topk(int(n * ratio + 1e-9)).indices.tolist()) <= set(found)


def test_vispruner_is_a_preset_and_differs() -> None:
    rows = {"mean_received": random_maps(64)}
    ctx = context([Grid(8, 8)], observed=rows)
    method = FasterVLM.vispruner(0.25, newline="all")
    assert (method.important_ratio, method.keep, method.newline) == (0.5, 0.25, "all")
    assert FasterVLM.vispruner(64).keep == 64
    assert kept(method, ctx) != kept(FasterVLM(), ctx)


def test_vispruner_reads_the_features_of_the_unit_it_prunes() -> None:
    rows = random_maps(64, 64)
    ctx = context([Grid(8, 8)], [Grid(8, 8)], observed={"mean_received": rows})
    alone = context([Grid(8, 8)], observed={"mean_received": rows[1:]})
    alone = replace(alone, features=ctx.features[1:])
    assert kept(FasterVLM.vispruner(), ctx)[1] == kept(FasterVLM.vispruner(), alone)[0]


def test_vispruner_without_features_is_refused() -> None:
    ctx = context([Grid(4, 4)], observed={"mean_received": random_maps(16)})
    with pytest.raises(UnsupportedError, match="compares features"):
        FasterVLM.vispruner().select(replace(ctx, features=ctx.features[..., :0]))


# --- options ------------------------------------------------------------------------------------------------------------------


def test_reference_is_the_published_code_and_can_be_changed() -> None:
    assert FasterVLM.reference().changed_options() == {"position_mode": "compact", "newline": "all"}
    assert FasterVLM.reference(newline="none", keep=58).changed_options() == {"position_mode": "compact", "newline": "none", "keep": 58}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("score", "probe"), ("head_reduce", "min"), ("scoring_layer", -2), ("scoring_layer", 1.5), ("max_queries", 0), ("max_queries", True),
        ("important_ratio", 1.1), ("important_ratio", -0.1), ("important_ratio", float("nan")), ("important_ratio", True),
    ],
)  # fmt: skip
def test_option_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"fastervlm: {option} must .*{value}"):
        FasterVLM(**{option: value})


def test_recipe_holds_every_option() -> None:
    method = FasterVLM.vispruner(64, score="cls", budget_scope="sample", scoring_layer=22)
    assert Recipe.from_dict(Recipe.of(method).as_dict()).methods == (method,)
