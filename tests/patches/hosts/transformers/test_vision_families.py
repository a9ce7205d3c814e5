"""How patches become tokens, family by family: what an adapter says against what the model does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.picture_cases import CASES, LLAVA, QWENS, Case, internvl, llava, llava_next, model_of, onevision, pixels
from conformance.vision_families import tower
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.vision import Picture, Tower, VisionFamily, family_of

SPY = "accel_test_spy"      # an attention function that writes down its calls


every_case = pytest.mark.parametrize("name", CASES)


class Run:
    """A model of a case with its adapter."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.build()
        self.base: Any = self.model.model
        self.family: VisionFamily = family_of(self.base.config)
        self.tower: Tower = self.family.towers(self.base)[case.modality]    # type: ignore[index]
        self.scoring = self.tower.attentions[self.tower.scoring_layer]
        self.function = getattr(self.base, f"get_{case.modality}_features")
        # Video-LLaVA's images have another name in old versions
        wanted = inspect.signature(self.function).parameters
        self.call = {name if name in wanted or f"{name}_images" not in wanted else f"{name}_images": v for name, v in case.call.items()}
        self.pixel_name = next(name for name in self.call if name.startswith("pixel_values"))

    def arguments(self, call: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(self.function).bind(**call)
        bound.apply_defaults()
        return dict(bound.arguments)

    def features(self, call: dict[str, Any] | None = None) -> Any:
        return self.function(**(self.call if call is None else call), return_dict=True)

    def pictures(self) -> list[Picture]:
        return self.family.pictures(self.base, self.case.modality, self.arguments(self.call), self.features())  # type: ignore[arg-type]

    def observe(self, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the encoder in front of the attention that scores, without [CLS]; the tokens; the patches of `pixel_patches`."""
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        hook = self.scoring.register_forward_pre_hook(look, with_kwargs=True)
        tokens = self.family.flat_features(self.features(call))
        hook.remove()
        (rows,) = seen
        rows = rows[:, self.tower.prefix :].flatten(0, 1) if rows.dim() == 3 else rows
        patches = self.family.pixel_patches(self.base, self.case.modality, self.arguments(call))    # type: ignore[arg-type]
        return rows, tokens, torch.cat([p.flatten(1) for p in patches])


def bypass_encoder(tower: Tower, base: nn.Module) -> None:
    """Makes every layer of the encoder hand on its input: what its attention and MLP add is zero."""
    for layer in base.modules():
        children = list(layer.children())
        if any(child is attention for child in children for attention in tower.attentions):
            for child in children:
                if "Norm" not in type(child).__name__:
                    for parameter in child.parameters():
                        parameter.data.zero_()


def perturbed(values: Tensor, size: int = 4) -> Iterator[Tensor]:
    """Copies of the pixels, each with other ones in one patch."""
    noise = pixels(*values.shape).flip(-1) * 3
    if values.dim() == 2:
        for row in range(len(values)):
            other = values.clone()
            other[row] += noise[row]
            yield other
        return
    for image in range(values[..., 0, 0, 0].numel()):
        for top in range(0, values.shape[-2], size):
            for left in range(0, values.shape[-1], size):
                other = values.clone()
                where = (slice(None), slice(top, top + size), slice(left, left + size))
                other.flatten(0, -4)[image][where] += noise.flatten(0, -4)[image][where]
                yield other


def changed(before: Tensor, after: Tensor) -> list[int]:
    assert before.shape == after.shape
    return (before != after).flatten(1).any(1).nonzero().flatten().tolist()


def tokens_of_patches(pictures: list[Picture]) -> dict[int, list[int]]:
    """The tokens behind which each patch stands, both numbered through the whole call."""
    found: dict[int, list[int]] = {}
    n_tokens = n_patches = 0
    for picture in pictures:
        for token, (sources, weights) in enumerate(zip(picture.source.tolist(), picture.weight.tolist(), strict=True)):
            for source, weight in zip(sources, weights, strict=True):
                if weight:
                    found.setdefault(n_patches + source, []).append(n_tokens + token)
        n_tokens, n_patches = n_tokens + len(picture), n_patches + sum(picture.segments)
    return found


@every_case
@torch.no_grad()
def test_a_picture_has_the_tokens_that_the_prompt_takes_up(name: str) -> None:
    run = Run(CASES[name])
    pictures, features = run.pictures(), run.features()
    assert [len(p) for p in pictures] == run.case.tokens
    flat = run.family.flat_features(features)
    assert flat.shape == (sum(run.case.tokens), run.base.config.text_config.hidden_size)
    placeholder = run.family.token_id(run.base.config, run.case.modality)   # type: ignore[arg-type]
    ids = torch.tensor([[10, 11, *[placeholder] * sum(run.case.tokens), 12]])
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    language_model = run.base.get_decoder() if not hasattr(run.base, "text_model") else run.base.text_model
    hook = language_model.register_forward_pre_hook(look, with_kwargs=True)
    run.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_encoder_outputs={run.case.modality: features})
    hook.remove()
    assert torch.equal(seen[0][0, 2:-1], flat)


@every_case
@torch.no_grad()
def test_the_units_of_a_picture_hold_its_tokens(name: str) -> None:
    run = Run(CASES[name])
    for picture, expected in zip(run.pictures(), run.case.units, strict=True):
        assert [(u.height, u.width, u.n_structural) for u in picture.units] == expected
        for number, unit in enumerate(picture.units):
            mine = picture.unit == number
            assert unit.modality == run.case.modality
            assert unit.n_tokens == unit.height * unit.width == int((mine & ~picture.is_structural).sum())
            assert unit.n_structural == int((mine & picture.is_structural).sum())
            # a rectangle of one map, in rows
            place = picture.place[mine & ~picture.is_structural]
            assert place[:, 0].unique().numel() == 1
            corner = place[0]
            row, column = torch.meshgrid(torch.arange(unit.height), torch.arange(unit.width), indexing="ij")
            assert torch.equal(place[:, 1:], torch.stack([row, column], -1).flatten(0, 1) + corner[1:])
        assert len({tuple(p) for p in picture.place.tolist()}) == len(picture)
        maps = picture.place[:, 0].unique().tolist()
        assert maps == list(range(len(maps)))


@every_case
@torch.no_grad()
def test_weights_of_a_token_add_up_to_one_and_those_of_a_structural_one_to_zero(name: str) -> None:
    for picture in Run(CASES[name]).pictures():
        assert picture.source.shape == picture.weight.shape
        assert picture.source.min() >= 0
        assert picture.source.max() < sum(picture.segments)
        assert picture.weight.min() >= 0
        torch.testing.assert_close(picture.weight.sum(1), (~picture.is_structural).float())


@every_case
@torch.no_grad()
def test_a_patch_changes_the_tokens_that_name_it_and_no_other(name: str) -> None:
    run = Run(CASES[name])
    named = tokens_of_patches(run.pictures())
    bypass_encoder(run.tower, run.base)
    values = run.call[run.pixel_name]
    rows, tokens, patches = run.observe(run.call)
    assert len(rows) == len(patches)
    hit = set()
    for other in perturbed(values):
        real = other.clone()
        if name.startswith(("idefics3", "smolvlm")):
            # a tile that was zero would no longer be left out
            real[values.flatten(2).eq(0).all(-1)] = 0
        new_rows, new_tokens, new_patches = run.observe({**run.call, run.pixel_name: real})
        patch = changed(rows, new_rows)
        assert changed(patches, new_patches) == patch
        if not patch:
            # a tile that pads
            assert changed(tokens, new_tokens) == []
            continue
        (number,) = patch
        hit.add(number)
        assert changed(tokens, new_tokens) == sorted(named.get(number, []))
    assert hit == set(range(len(rows)))


@every_case
@torch.no_grad()
def test_segments_are_the_calls_of_the_attention_that_scores(name: str) -> None:
    run = Run(CASES[name])
    lengths: list[int] = []

    def spy(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is run.scoring:
            lengths.extend([query.shape[2]] * query.shape[0])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, SPY, spy)
        patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, SPY, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        for attention in run.tower.attentions:
            patch.setattr(attention.config, "_attn_implementation", SPY)
        run.features()
    assert lengths == [run.tower.prefix + length for picture in run.pictures() for length in picture.segments]


@every_case
@torch.no_grad()
def test_the_attentions_of_a_tower_are_its_layers_in_order(name: str) -> None:
    run = Run(CASES[name])
    called: list[nn.Module] = []
    hooks = [a.register_forward_pre_hook(lambda module, args: called.append(module)) for a in run.tower.attentions]
    run.features()
    for hook in hooks:
        hook.remove()
    assert called == list(run.tower.attentions)
    vision = run.base.config.vision_config
    assert len(called) == getattr(vision, "num_hidden_layers", None) or vision.depth


@every_case
def test_the_layer_that_scores_is_the_last_one_that_the_feature_needs(name: str) -> None:
    run = Run(CASES[name])
    n_layers = len(run.tower.attentions)
    # CLIP gives the state in front of its last layer; the second layer of Qwen2.5 sees windows only
    below_last = name.startswith(("llava", "video llava", "qwen2.5")) and "onevision" not in name
    assert run.tower.scoring_layer == n_layers - (2 if below_last else 1)
    assert run.tower.prefix == int(name == "internvl" or ("llava" in name and "onevision" not in name))


def places(picture: Picture) -> list[tuple[int, list[int], int]]:
    """Position, place and unit of each structural token."""
    at = picture.is_structural.nonzero().flatten().tolist()
    return [(i, picture.place[i].tolist(), int(picture.unit[i])) for i in at]


@torch.no_grad()
def test_cls_is_a_structural_token_in_front_where_it_is_handed_on() -> None:
    assert [places(p) for p in Run(CASES["llava full"]).pictures()] == [[(0, [0, 0, -1], 0)]] * 2
    assert not any(p.is_structural.any() for p in Run(CASES["llava"]).pictures())


@torch.no_grad()
def test_each_frame_of_video_llava_begins_with_its_cls() -> None:
    run = Run(CASES["video llava video"])
    assert [places(p) for p in run.pictures()] == [[(17 * frame, [frame, 0, -1], frame) for frame in range(3)]] * 2
    # its row does not depend on the pixels where attention is bypassed, hence it is [CLS]
    bypass_encoder(run.tower, run.base)
    flat = run.family.flat_features(run.features()).view(6, 17, -1)
    assert torch.equal(flat[:, 0], flat[:1, 0].expand(6, -1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "newlines"),
    [
        # the base tile has 16 tokens; rows of 8, 12 and 2 tokens, whose newline belongs to the tile that ends them
        ("llava next", [[(24 + 9 * r, [1, r, 8], 2 if r < 4 else 4) for r in range(8)], [(28 + 13 * r, [1, r, 12], 3) for r in range(2)],
                        [(18 + 3 * r, [1, r, 2], 1 + r // 4) for r in range(12)]]),
        ("llava onevision", [[(24 + 9 * r, [1, r, 8], 1) for r in range(8)], [(28 + 13 * r, [1, r, 12], 1) for r in range(2)]]),
        ("llava onevision, shrunk", [[(20 + 5 * r, [1, r, 4], 1) for r in range(3)], [(21 + 6 * r, [1, r, 5], 1) for r in range(2)]]),
        ("llava onevision, several", [[(16, [0, 3, -1], 0)]] * 2),
        ("llava onevision video", [[(27, [2, 2, -1], 2)]] * 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_newlines_are_structural_tokens_behind_their_row(name: str, newlines: list[list[tuple[int, list[int], int]]]) -> None:
    run = Run(CASES[name])
    assert [places(p) for p in run.pictures()] == newlines
    flat = run.family.flat_features(run.features())
    is_structural = torch.cat([p.is_structural for p in run.pictures()])
    is_newline = (flat == run.base.image_newline).all(-1)
    assert torch.equal(is_newline, is_structural)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CASES if "onevision" in name or name == "llava next"])
def test_weights_are_those_of_the_models_own_resizing(name: str) -> None:
    run = Run(CASES[name])
    # without a projector a token is the weighted mean of encoder rows itself
    run.base.multi_modal_projector = nn.Identity()
    run.base.image_newline = nn.Parameter(torch.zeros(32))
    features = run.features()
    layer = run.base.config.vision_feature_layer
    # the tower's normed state is what "−1" gives in the SigLIP of OneVision
    rows = features.hidden_states[layer][:, run.tower.prefix :].flatten(0, 1)
    flat, token, patch = run.family.flat_features(features), 0, 0
    for picture in run.pictures():
        mean = (rows[patch:][picture.source] * picture.weight[..., None]).sum(1)
        torch.testing.assert_close(flat[token : token + len(picture)], mean, rtol=1e-5, atol=1e-5)
        token, patch = token + len(picture), patch + sum(picture.segments)


@torch.no_grad()
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_patches_of_padding_count_for_nothing(name: str) -> None:
    run = Run(CASES[name])
    mask = torch.ones(2, 3, 24, 24, dtype=torch.int64)
    # rows 5 and 6 of the patches of the first tile, and all of the last column but one pixel
    mask[0, 0, 16:] = 0
    mask[0, 0, :, 21:] = 0
    run.call["pixel_attention_mask"] = mask
    first, *others = run.pictures()
    assert all(p.weight.eq(1 / 4).all() for p in others)
    assert first.weight.sum(1).tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    mask[0, 0, :, 20:] = 0
    mask[0, 0, 12:] = 0
    first, *_ = run.pictures()
    # 3 × 5 patches count: tokens of 2 × 2 patches have 4 or 2 in the upper row, 2 or 1 in the lower one
    assert (first.weight > 0).sum(1).tolist() == [4, 4, 2, 2, 2, 1, 0, 0, 0]
    torch.testing.assert_close(first.weight.sum(1), torch.tensor([1.0] * 6 + [0.0] * 3))


@torch.no_grad()
def test_smolvlm_encodes_one_tile_where_all_pad() -> None:
    run = Run(CASES["smolvlm"])
    run.call["pixel_values"] = torch.zeros(2, 3, 3, 24, 24)
    assert len(run.family.flat_features(run.features())) == sum(map(len, run.pictures())) == 9
    assert [p.shape for p in run.family.pixel_patches(run.base, "image", run.arguments(run.call))] == [(36, 3, 16)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2 vl", "qwen2.5 vl video", "qwen3 vl"])
def test_pixels_of_a_patch_are_those_of_its_first_frame(name: str) -> None:
    run = Run(CASES[name])
    values = run.call[run.pixel_name]
    found = run.family.pixel_patches(run.base, run.case.modality, run.arguments(run.call))   # type: ignore[arg-type]
    frames = values.view(len(values), 3, 2, 16)[:, :, 0]
    assert [len(p) for p in found] == [n for picture in run.pictures() for n in picture.segments]
    assert torch.equal(torch.cat(found).flatten(1).sort(0).values, frames.flatten(1).sort(0).values)


def test_pixels_of_a_patch_lie_in_its_rows() -> None:
    run = Run(CASES["llava"])
    first, _ = run.family.pixel_patches(run.base, "image", run.arguments(run.call))
    # the patch in row 1, column 2
    assert torch.equal(first[6], run.call["pixel_values"][0, :, 4:8, 8:12].flatten(1))


def test_qwen3_names_its_deep_features() -> None:
    run = Run(CASES["qwen3 vl"])
    assert len(getattr(run.base.config.vision_config, run.family.deepstack_levels)) == 2    # type: ignore[arg-type]
    assert Run(CASES["qwen2 vl"]).family.deepstack_levels is None


def test_a_text_model_has_nothing_to_prune() -> None:
    with pytest.raises(UnsupportedError, match="of type 'llama' sees no pictures"):
        family_of(LlamaConfig())


def test_towers_that_make_no_grid_of_tokens_are_refused() -> None:
    choice = {**LLAVA, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    pixtral: Any = model_of("Llava", "LlamaConfig", lambda: tower("PixtralVisionConfig"), **choice)()
    with pytest.raises(UnsupportedError, match="pixtral"):
        family_of(pixtral.model.config).towers(pixtral.model)


@pytest.mark.parametrize(
    ("build", "strategy"), [(llava_next, "full"), (internvl, "full"), (onevision("anyres_max_9"), "default")], ids=["next", "internvl", "siglip"]
)
def test_strategies_that_leave_no_grid_are_refused(build: Callable[[], nn.Module], strategy: str) -> None:
    base: Any = build().model
    base.config.vision_feature_select_strategy = strategy
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy"):
        family_of(base.config).towers(base)


def test_qwen_25_without_a_layer_that_sees_all_is_refused() -> None:
    base: Any = QWENS["qwen2.5 vl"]().model
    base.config.vision_config.fullatt_block_indexes = []
    with pytest.raises(UnsupportedError, match="fullatt_block_indexes"):
        family_of(base.config).towers(base)


@pytest.mark.parametrize(
    ("model_type", "tokens"),
    [
        ("llava_next", {(480, 640): 2340, (1617, 1762): 2732, (205, 1100): 1598, (2339, 40): 792, (333, 500): 1464}),
        ("llava_onevision", {(480, 640): 2929, (1617, 1762): 7274, (205, 1100): 1959, (2339, 40): 1377, (333, 500): 1836}),
    ],
    ids=["next", "onevision"],
)
def test_released_sizes_have_the_tokens_that_their_processor_counts(model_type: str, tokens: dict[tuple[int, int], int]) -> None:
    is_next = model_type == "llava_next"
    vision = SimpleNamespace(model_type="clip_vision_model" if is_next else "siglip_vision_model", image_size=336 if is_next else 384, patch_size=14)
    squares = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = SimpleNamespace(
        model_type=model_type, vision_config=vision, vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]] if is_next else squares,
        vision_feature_select_strategy="default" if is_next else "full",
    )  # fmt: skip
    base: Any = SimpleNamespace(config=config)
    # literals out of `_get_number_of_features` of the processors of 5.18 and 5.24
    found = family_of(config).pictures(base, "image", {"image_sizes": torch.tensor(list(tokens))}, None)
    assert [len(picture) for picture in found] == list(tokens.values())


def test_of_several_feature_layers_the_deepest_scores() -> None:
    base: Any = llava().model
    for layers, expected in (([0, 1], 0), ([-2, 1], 1), ([-4, -1], 2)):
        base.config.vision_feature_layer = layers
        assert family_of(base.config).towers(base)["image"].scoring_layer == expected
    base.config.vision_feature_layer = 0
    with pytest.raises(UnsupportedError, match="vision_feature_layer"):
        family_of(base.config).towers(base)
