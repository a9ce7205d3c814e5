"""How many tokens vLLM is told a picture will have is how many are left of it, for every method that drops some in front of the language model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

from accel.errors import OptionError, UnsupportedError
from accel.patches.fastervlm import FasterVLM
from accel.patches.hosts.decoder_config import decoder_sizes
from accel.patches.hosts.transformers.pruning.prompt import Seen
from accel.patches.hosts.transformers.pruning.vision import Picture
from accel.patches.hosts.vllm.models.counts import FrontPruning, Whole, example, front_pruning, keep_row, kept_of, why_not
from accel.patches.hosts.vllm.models.pruned import kept_rows
from accel.patches.random_tokens import RandomTokens
from accel.patches.uniform_tokens import UniformTokens
from accel.patches.vflowopt import VFlowOpt
from accel.protocols import ModelInfo, TokenPruning
from accel.registry import build, method_names

CONFIGS: dict[str, Any] = {
    "llava": LlavaConfig(vision_config={"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8}),
    "llava_next": LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8}, image_grid_pinpoints=[[64, 128], [128, 128]],
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}),
}  # fmt: skip


def info(config: Any) -> ModelInfo:
    has_cls = getattr(config.vision_config, "model_type", "") == "clip_vision_model"
    return ModelInfo(**decoder_sizes(config), device="cpu", dtype="float32", has_cls=has_cls)


def pruning(name: str, method: TokenPruning) -> FrontPruning:
    found = front_pruning(CONFIGS[name], info(CONFIGS[name]), [method])
    assert found is not None
    return found


def call(name: str) -> dict[str, Any]:
    """A tall picture: the mosaic has a border, and rows and columns differ."""
    found = example(CONFIGS[name])
    if name == "llava_next":
        found["image_sizes"] = torch.tensor([[100, 64]])
    return found


def seen(picture: Picture, method: TokenPruning) -> Seen:
    """The picture with features and scores as an encoder might give them."""
    rng = torch.Generator().manual_seed(1)
    maps = {(0, o.what): torch.rand(len(picture), generator=rng) for o in method.observe()}
    return Seen(picture, maps, torch.randn(len(picture), 6, generator=rng))


def front_methods() -> list[str]:
    found = []
    for name in method_names():
        method = build(name)
        if isinstance(method, TokenPruning) and not method.needs_training:
            stages = method.bind(info(CONFIGS["llava"])).stages(info(CONFIGS["llava"]))
            if stages and all(stage.layer is None for stage in stages):
                found.append(name)
    return found


def test_there_are_methods_to_try() -> None:
    assert {"fastervlm", "vflowopt", "random_tokens", "uniform_tokens", "downsample"} <= set(front_methods())


@pytest.mark.parametrize("keep", [0.1, 0.37])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", front_methods())
def test_as_many_are_left_as_were_promised(method: str, name: str, keep: float) -> None:
    options = {"keep": keep, **({"newline": "all"} if "newline" in build(method).options() else {})}
    asked: Any = build(method, options)
    reasons = why_not(CONFIGS[name], info(CONFIGS[name]), [asked])
    if reasons:
        # cells of a coarser grid do not fit a mosaic whose tiles are cut
        assert (method, name) == ("downsample", "llava_next"), reasons
        return
    front = pruning(name, asked)
    bound = front.asked()
    assert bound is not None
    [picture] = front.pictures("image", call(name))
    promised = front.count(bound, picture)
    kept = kept_rows(bound, front.info, seen(picture, bound))
    assert len(kept.index) == len(kept.rows) == promised
    assert 0 < promised < len(picture)
    assert kept.index.tolist() == sorted(set(kept.index.tolist()))


@pytest.mark.parametrize("method", [FasterVLM(keep=0.2, newline="all", budget_scope="image", min_tokens=9), VFlowOpt(keep=0.05, min_tokens=7)])
def test_tiles_may_compete_for_the_budget_of_their_picture(method: TokenPruning) -> None:
    front = pruning("llava_next", method)
    bound = front.asked()
    assert bound is not None
    [picture] = front.pictures("image", call("llava_next"))
    assert bound.count(bound.stages(front.info)[-1], picture.units) is None
    assert len(kept_rows(bound, front.info, seen(picture, bound)).index) == front.count(bound, picture)


def test_kept_rows_are_the_best_ones_in_their_order() -> None:
    front = pruning("llava", FasterVLM(keep=5))
    bound = front.asked()
    assert bound is not None
    [picture] = front.pictures("image", call("llava"))
    one = seen(picture, bound)
    best = one.maps[0, "cls_row"].topk(5).indices.sort().values
    kept = kept_rows(bound, front.info, one)
    assert torch.equal(kept.index, best)
    assert torch.equal(kept.rows, one.features[best])


def test_recycled_rows_are_means() -> None:
    front = pruning("llava", VFlowOpt(keep=0.25))
    bound = front.asked()
    assert bound is not None
    [picture] = front.pictures("image", call("llava"))
    one = seen(picture, bound)
    kept = kept_rows(bound, front.info, one)
    is_changed = (kept.rows != one.features[kept.index]).any(1)
    assert 0 < int(is_changed.sum()) < len(kept.index)


# --- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "methods", "reason"),
    [
        ("llava_next", [FasterVLM()], "newline='all'"),
        ("llava_next", [FasterVLM(newline="all", budget_scope="sample")], "depends on the picture"),
        ("llava", [FasterVLM(budget_scope="sample")], "share a budget"),
        ("llava", [VFlowOpt(r1=0.5, r2=0.5, r3=0.5)], "middle of the model"),
        ("llava", [FasterVLM(), UniformTokens()], "fastervlm, uniform_tokens"),
    ],
)  # fmt: skip
def test_what_vllm_cannot_know_beforehand_is_refused(name: str, methods: list[TokenPruning], reason: str) -> None:
    with pytest.raises(UnsupportedError, match="visual tokens cannot leave") as error:
        front_pruning(CONFIGS[name], info(CONFIGS[name]), methods)
    assert reason in str(error.value)


def test_a_tower_that_no_adapter_knows_is_refused() -> None:
    config = LlavaConfig(vision_config={"model_type": "pixtral"})
    assert "pixtral" in " ".join(why_not(config, info(config), [FasterVLM()]))


def test_methods_inside_the_model_are_left_to_others() -> None:
    from accel.patches.fastv import FastV

    assert front_pruning(CONFIGS["llava"], info(CONFIGS["llava"]), [FastV()]) is None
    assert front_pruning(CONFIGS["llava"], info(CONFIGS["llava"]), []) is None


# --- a request's own keep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, 0.3, 1.0, 64, 2, Whole.WHOLE])
def test_a_requests_keep_arrives_as_it_was_sent(keep: float | int | Whole | None) -> None:
    found = kept_of(keep_row(keep))
    assert found == keep
    assert type(found) is type(keep)


def test_a_request_may_ask_for_more_less_or_all() -> None:
    front = pruning("llava", FasterVLM(keep=0.25))
    [picture] = front.pictures("image", call("llava"))
    counts = [None if method is None else front.count(method, picture) for method in map(front.asked, (None, 0.5, 7, 1.0))]
    assert counts == [16, 32, 7, None]


def test_a_recipe_that_keeps_all_lets_a_request_ask_for_less() -> None:
    front = pruning("llava", FasterVLM(keep=1.0))
    less = front.asked(0.5)
    assert front.asked() is None
    assert less is not None
    assert less.options()["keep"] == 0.5
    assert [o.what for o in front.typical.observe()] == ["cls_row"]


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, "some", "whole", True, 1, [0.5]])
def test_a_keep_that_means_nothing_is_refused(keep: Any) -> None:
    with pytest.raises(OptionError, match="keep"):
        pruning("llava", FasterVLM()).asked(keep)


def test_a_keep_without_a_say_is_refused() -> None:
    front = pruning("llava", VFlowOpt(r1=0.25, r2=1.0, r3=1.0))
    assert front.asked() is not None
    with pytest.raises(OptionError, match="has no say"):
        front.asked(0.5)
    # unless it has: the third stage makes up for it, inside the model
    with pytest.raises(OptionError, match="inside the language model"):
        pruning("llava", VFlowOpt(keep=0.5, r1=0.5)).asked(0.4)


@pytest.mark.parametrize(
    "method", [FasterVLM(keep=0.25), VFlowOpt(r1=0.5, r3=1.0), VFlowOpt(r1=0.4, keep=0.4)], ids=["keep", "fixed", "keep_beside_r1"],
)  # fmt: skip
def test_what_we_ask_whole_stays_whole_whatever_say_keep_has(method: TokenPruning) -> None:
    # engines of such recipes did not start: the pictures that memory is measured by asked for keep=1.0
    front = pruning("llava", method)
    assert front.asked() is not None
    assert front.asked(kept_of(keep_row(Whole.WHOLE))) is None


def test_notices_tell_how_vllm_differs() -> None:
    told = " ".join(pruning("llava", RandomTokens()).notices())
    assert "alone in its prompt" in told
    assert "without gaps" in told
    assert "without gaps" not in " ".join(pruning("qwen2_5_vl", RandomTokens()).notices())


def test_pictures_need_no_model() -> None:
    front = pruning("qwen2_5_vl", FasterVLM())
    [picture] = front.family.pictures(SimpleNamespace(config=front.config), "image", {"image_grid_thw": torch.tensor([[1, 8, 12]])}, None)     # type: ignore[arg-type]
    assert len(picture) == 24
