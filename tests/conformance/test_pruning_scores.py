"""What a pruning method is shown: scores of the encoder against eager attention, pixels, hidden states, and the last row of the decoder."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conformance import hidden_columns
from conformance.hidden_columns import hiding
from conformance.picture_cases import CASES, Case
from conformance.pruning_methods import Chosen
from conformance.pruning_runs import (
    N_NEW,
    assert_equals_hiding,
    batch_of,
    dropped,
    every_family,
    hidden_run,
    inputs_of,
    kept_by,
    pruned_run,
    row_of,
    run_generate,
)
from conformance.subjects import subject
from torch import Tensor
from transformers import AttentionInterface, LogitsProcessorList

import accel
from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.vision import Tower, family_of
from accel.protocols import Keep, ModelInfo, Observation, PruningContext, Stage, TokenPruning

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Onlooker(TokenPruning):
    """Looks, and keeps all."""

    looks: tuple[Observation, ...] = ()
    where: Stage = Stage("projector")       # noqa: RUF009 - frozen
    seen: list[PruningContext] = field(default_factory=list, compare=False)

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [self.where]

    def observe(self) -> Sequence[Observation]:
        return self.looks

    def select_rows(self, mean_received: Tensor) -> Tensor:
        return mean_received >= mean_received.topk(2, -1).values[:, 1:]

    def map_pixels(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        return pixels.float().mean(-1)

    def select(self, ctx: PruningContext) -> Keep | None:
        self.seen.append(ctx)
        return None


@torch.no_grad()
def look(model: Any, inputs: dict[str, Tensor], *looks: Observation, where: Stage | None = None) -> PruningContext:
    """What a method sees of one forward."""
    method = Onlooker(looks=looks) if where is None else Onlooker(looks=looks, where=where)
    with accel.apply(model, method):
        model(**inputs)
    [ctx] = method.seen
    return ctx


def eager_weights(model: Any, inputs: dict[str, Tensor], layer: int | None = None) -> tuple[Tower, list[Tensor]]:
    """Attention (segments, H, n, n) of the scoring layer of the image encoder, call by call, by eager attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation({"vision_config": "eager"})
    tower = family_of(twin.config).towers(twin.model)["image"]
    found: list[Tensor] = []
    module = tower.attentions[tower.scoring_layer if layer is None else layer]

    implementation = "conformance_watch"

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        weights = (query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)).softmax(-1)
        found.append(weights)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register(implementation, attention)
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = implementation
    with torch.no_grad():
        twin(**inputs)
    return tower, found


def by_unit(model: Any, inputs: dict[str, Tensor], tower: Tower, maps: list[Tensor]) -> list[Tensor]:
    """Maps of segments (patches,) as maps of units, through the adapter's pictures."""
    family = family_of(model.config)
    call = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")}
    wanted = inspect.signature(model.model.get_image_features).parameters
    call = {key if key in wanted else "pixel_values": value for key, value in call.items()}
    with torch.no_grad():
        features = model.model.get_image_features(**call, return_dict=True)
    bound = inspect.signature(model.model.get_image_features).bind(**call)
    bound.apply_defaults()
    found, first = [], 0
    for picture in family.pictures(model.model, "image", dict(bound.arguments), features):
        own = maps[first : first + len(picture.segments)]
        first += len(picture.segments)
        tokens = picture.pooled(torch.cat(own))
        found += [tokens[(picture.unit == u) & ~picture.is_structural] for u in range(len(picture.units))]
    return found


# --- T-CLS, T-SUM, T-SEG -------------------------------------------------------------------------------------------------------


@every_family
def test_scores_are_those_of_eager_attention(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    tower, weights = eager_weights(model, inputs)
    looks = [Observation("mean_received"), Observation("mean_selected_rows")] + ([Observation("cls_row")] if tower.prefix else [])
    ctx = look(model, inputs, *looks)
    rows = [w.mean(0) for call in weights for w in call]
    received = [w[tower.prefix :, tower.prefix :].mean(0) for w in rows]
    hubs = [w[tower.prefix :, tower.prefix :][r >= r.topk(2).values[1]].mean(0) for w, r in zip(rows, received, strict=True)]
    expected = {"mean_received": received, "mean_selected_rows": hubs, "cls_row": [w[0, tower.prefix :] for w in rows]}
    for what, found in ctx.observed.items():
        for got, want in zip(found, by_unit(model, inputs, tower, expected[what]), strict=True):
            torch.testing.assert_close(got[: len(want)], want, **CLOSE)
    if not tower.prefix:
        for one in received:
            torch.testing.assert_close(one.sum(), torch.tensor(1.0), **CLOSE)


@pytest.mark.parametrize("name", ["llava", "internvl", "llava next"])
def test_the_scoring_layer_can_be_chosen_and_matters(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    by_layer = [look(model, inputs, Observation("cls_row", layer=i)).observed["cls_row"] for i in (0, 1)]
    assert (by_layer[0] - by_layer[1]).abs().max() > 1e-4
    tower, weights = eager_weights(model, inputs, layer=0)
    want = by_unit(model, inputs, tower, [w.mean(0)[0, tower.prefix :] for call in weights for w in call])
    torch.testing.assert_close(by_layer[0][0, : len(want[0])], want[0], **CLOSE)
    with pytest.raises(UnsupportedError, match="3 layers, asked to score by layer 3"):
        look(model, inputs, Observation("cls_row", layer=3))


def test_heads_can_be_joined_by_the_largest() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    _, [weights] = eager_weights(model, inputs)
    found = look(model, inputs, Observation("cls_row", head_reduce="max")).observed["cls_row"]
    torch.testing.assert_close(found, weights[:, :, 0, 1:].amax(1), **CLOSE)


def test_a_bound_on_queries_takes_evenly_spread_rows() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    _, [weights] = eager_weights(model, inputs)
    found = look(model, inputs, Observation("mean_received", max_queries=4)).observed["mean_received"]
    torch.testing.assert_close(found, weights[:, :, [3, 7, 11, 15], 1:].mean((1, 2)), **CLOSE)


@every_family
def test_scores_of_a_picture_do_not_depend_on_another(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    together = look(model, inputs, Observation("mean_received")).observed["mean_received"]
    n = len(together) // 2
    for b in range(2):
        alone = look(model, row_of(inputs, b), Observation("mean_received")).observed["mean_received"]
        torch.testing.assert_close(together[b * n : (b + 1) * n], alone, **CLOSE)


@every_family
def test_watching_does_not_change_the_features(name: str) -> None:
    it = subject(name)
    method = Onlooker(looks=(Observation("mean_received"), Observation("mean_selected_rows")))
    with accel.apply(it.model, method), torch.no_grad():
        assert torch.equal(it.model(**it.inputs).logits, it.dense.logits)


# --- pixels, features, places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "siglip-like", "qwen2.5 vl"])
def test_pixels_are_grey_as_before_normalisation(name: str) -> None:
    name = "paligemma" if name == "siglip-like" else name
    model, inputs = subject(name).model, dict(inputs_of(name))
    raw = torch.linspace(0, 255, inputs["pixel_values"].numel()).view(inputs["pixel_values"].shape).round()
    inputs["pixel_values"] = (raw / 255 - 0.4) / 0.3
    found = look(model, inputs, Observation("pixel_map", pixel_mean=0.4, pixel_std=(0.3, 0.3, 0.3))).observed["pixel_map"][0]
    if name == "qwen2.5 vl":
        # rows of (3 colours, 2 frames, 16 pixels), four of them behind a token
        want = raw.view(-1, 4, 3, 2, 16)[:, :, :, 0].mean((1, 2, 3))
    else:
        want = raw[0].unfold(1, 4, 4).unfold(2, 4, 4).mean((0, 3, 4)).flatten()
    assert (found[: len(want)] - want).abs().max() <= 1


@every_family
def test_a_stage_sees_features_and_places(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    front = look(model, inputs)
    assert front.features.shape[:2] == front.is_visual.shape
    assert not front.is_text.any()
    assert (front.unit[front.is_visual] >= 0).all()
    inside = look(model, inputs, where=Stage("layer", 0))
    is_token = inside.is_visual | inside.is_structural
    is_image = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(is_token, is_image)
    assert torch.equal(inside.is_text, inputs["attention_mask"].bool() & ~is_image)
    # tokens are the same in front of the model and at its first layer
    for b in range(2):
        n = int(is_token[b].sum())
        assert torch.equal(inside.place[b, is_token[b]], front.place[b, :n])
        assert torch.equal(inside.unit[b, is_token[b]], front.unit[b, :n])
        scale = (inside.features[b, is_token[b]] / front.features[b, :n]).median()
        torch.testing.assert_close(inside.features[b, is_token[b]], front.features[b, :n] * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl", "internvl", "gemma3 vlm"])
def test_the_last_row_is_that_of_the_decoder(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    layer = 1
    found = look(model, inputs, Observation("last_row", layer=layer), where=Stage("layer", layer + 1)).observed["last_row"]
    weights: list[Tensor] = []
    with hiding(model, {}):
        plain = hidden_columns._attention

        def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
            if module.layer_idx == layer:
                scores = query[:, :, -1:] @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * kwargs["scaling"]
                weights.append(scores.masked_fill(~attention_mask[:, :, -1:], -torch.inf).softmax(-1)[:, :, 0].mean(1))
            return plain(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(hidden_columns.NAME, watched)
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            AttentionInterface.register(hidden_columns.NAME, plain)
    torch.testing.assert_close(found, weights[0], **CLOSE)


def test_a_row_is_still_that_of_its_tokens_where_another_method_has_just_dropped_some() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    row = look(model, inputs, Observation("last_row", layer=1), where=Stage("layer", 2)).observed["last_row"][0, columns]
    with accel.apply(model, Chosen(at=((2, 0.5),)), accel.FastV(keep=0.5, layer=2)) as handle:
        first, second = kept_by(handle, lambda: model(**inputs))
    assert second == sorted(sorted(first, key=lambda token: -float(row[token]))[:4])


# --- pictures of other shapes, videos -------------------------------------------------------------------------------------------


def prompt_of(case: Case, model: Any) -> dict[str, Tensor]:
    """A prompt that takes up all pictures of a case, words between them."""
    token = getattr(model.config, f"{case.modality}_token_id")
    ids, types, words = [11, 12], [0, 0], 20
    for n in case.tokens:
        ids += [token] * n + [words, words + 1]
        types += [1 if case.modality == "image" else 2] * n + [0, 0]
        words += 2
    found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **case.call}
    if "qwen" in model.config.model_type:
        found["mm_token_type_ids"] = torch.tensor([types])
    elif model.config.model_type in ("gemma3", "paligemma"):
        found["token_type_ids"] = torch.tensor([types]) if model.config.model_type == "gemma3" else torch.zeros(1, len(ids), dtype=torch.int64)
    if model.config.model_type == "video_llava" and "pixel_values" in found:
        found["pixel_values_images"] = found.pop("pixel_values")
    return found


# Qwen3-VL wants a span of its own for every frame of a video; not every forward can ask for interpolated positions
NO_PROMPT = {"qwen3 vl video", "llava, wide", "paligemma, wide"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_PROMPT and "idefics" not in name and "smolvlm" not in name])
def test_dropping_equals_hiding_for_pictures_of_any_shape(name: str) -> None:
    case = CASES[name]
    model = case.build()
    inputs = prompt_of(case, model)
    token = getattr(model.config, f"{case.modality}_token_id")
    events: list[Any] = []
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))) as handle, handle.observe_pruning(events.append), torch.no_grad():
        got = model(**inputs).logits
    assert sum(len(picture) for picture in case.units) == len(events[0].units)
    columns = (inputs["input_ids"][0] == token).nonzero().flatten()
    hidden = {}
    for layer in range(3):
        gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        gone[0, columns] = ~events[min(layer, 1)].is_kept[0]
        hidden[layer] = gone
    with hiding(model, hidden), torch.no_grad():
        want = model(**inputs).logits
    left = ~hidden[2][0]
    assert got.shape[1] == int(left.sum()) < want.shape[1]
    torch.testing.assert_close(got[0], want[0, left], rtol=1e-4, atol=1e-4)


def test_the_same_picture_twice_keeps_the_same_tokens() -> None:
    model = subject("llava").model
    case = CASES["llava"]
    inputs = prompt_of(case, model)
    inputs["pixel_values"] = inputs["pixel_values"][:1].repeat(2, 1, 1, 1)
    events: list[Any] = []
    with accel.apply(model, accel.FasterVLM(keep=0.25)) as handle, handle.observe_pruning(events.append), torch.no_grad():
        model(**inputs)
    first, second = events[0].is_kept[0].view(2, 16)
    assert first.sum() == 4
    assert torch.equal(first, second)


# --- merged tokens, compact positions, masks, placeholders in answers -----------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "internvl", "smolvlm", "qwen2.5 vl", "qwen3 vl", "gemma3 vlm"])
def test_merged_rows_equal_merged_features(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    method = Chosen(merges=True)
    got, gone = pruned_run(model, inputs, method)
    plain, _ = pruned_run(model, inputs, Chosen())
    assert (got.logits - plain.logits).abs().max() > 1e-4
    twin = copy.deepcopy(model)
    decoder, is_image = twin.get_decoder(), inputs["input_ids"] == model.config.image_token_id

    def merge(values: Tensor) -> Tensor:
        """The same average in the place of the first kept token of each row. values: (B, S, D)."""
        values = values.clone()
        for b in range(len(values)):
            columns = is_image[b].nonzero().flatten()
            left = gone.left[b, columns]
            anchor = columns[left][0]
            values[b, anchor] = torch.cat([values[b, anchor][None], values[b, columns[~left]]]).mean(0)
        return values

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if kwargs["inputs_embeds"].shape[1] == is_image.shape[1]:
            kwargs = {**kwargs, "inputs_embeds": merge(kwargs["inputs_embeds"])}
            if kwargs.get("deepstack_visual_embeds") is not None:
                deep = []
                for level in kwargs["deepstack_visual_embeds"]:
                    whole = torch.zeros(*is_image.shape, level.shape[-1])
                    whole[is_image] = level
                    deep.append(merge(whole)[is_image])
                kwargs["deepstack_visual_embeds"] = deep
        return args, kwargs

    decoder.register_forward_pre_hook(before, with_kwargs=True)
    assert_equals_hiding(got, hidden_run(twin, inputs, gone), gone)


@pytest.mark.parametrize("cache", [None, "static"])
def test_compact_positions_equal_a_prompt_without_the_dropped_tokens(cache: str | None) -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    embeds: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: embeds.append(k["inputs_embeds"]), with_kwargs=True)
    model(**inputs)
    hook.remove()
    events: list[Any] = []
    with accel.apply(model, Chosen(position_mode="compact")) as handle, handle.observe_pruning(events.append):
        got = run_generate(model, inputs, **({"cache_implementation": cache} if cache else {}))
    left = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    left[0, (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()] = events[0].is_kept[0]
    short = {"inputs_embeds": embeds[0][left][None], "attention_mask": torch.ones(1, int(left.sum()), dtype=torch.int64)}
    want = run_generate(model, short)
    assert torch.equal(got.sequences[:, -N_NEW:], want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    kept = run_generate(model, inputs)
    assert (torch.stack(kept.logits) - torch.stack(got.logits)).abs().max() > 1e-3


def test_compact_positions_are_refused_where_positions_have_axes() -> None:
    with pytest.raises(UnsupportedError, match="axes"):
        accel.apply(subject("qwen2.5 vl").model, Chosen(position_mode="compact"))


@every_family
def test_no_mask_equals_a_mask_of_ones(name: str) -> None:
    model, inputs = subject(name).model, dict(inputs_of(name))
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))), torch.no_grad():
        with_mask = model(**inputs, use_cache=False).logits
        del inputs["attention_mask"]
        without = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(without, with_mask, **CLOSE)


@pytest.mark.parametrize("name", ["qwen2 vl", "qwen2.5 vl", "qwen3 vl"])
def test_three_and_four_rows_of_positions_are_the_same(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    text = torch.arange(inputs["input_ids"].shape[1])[None, None]
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))), torch.no_grad():
        three = model(**inputs, position_ids=positions).logits
        four = model(**inputs, position_ids=torch.cat([text, positions])).logits
        own = model(**inputs).logits
    torch.testing.assert_close(three, four, **CLOSE)
    torch.testing.assert_close(three, own, **CLOSE)


def test_placeholders_in_an_answer_are_ordinary_tokens() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    token = model.config.image_token_id

    def say_image(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == inputs["input_ids"].shape[1] + 1:
            scores = scores.clone()
            scores[:, token] = 1e9
        return scores

    say: Any = LogitsProcessorList([say_image])
    events: list[Any] = []
    with accel.apply(model, Chosen()) as handle, handle.observe_pruning(events.append):
        got = run_generate(model, inputs, logits_processor=say)
    assert got.sequences[0, inputs["input_ids"].shape[1] + 1] == token
    gone = dropped(events, inputs, model)
    want = hidden_run(model, inputs, gone, logits_processor=say)
    assert torch.equal(got.sequences, want.tokens)


def test_counters_hold_what_several_threads_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    real = Tensor.sum

    def slow(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # as on a busy machine: another thread's turn
        time.sleep(1e-3)
        return real(self, *args, **kwargs)

    with accel.apply(model, accel.FasterVLM(keep=0.25)) as handle, torch.no_grad():
        monkeypatch.setattr(Tensor, "sum", slow)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: torch.no_grad()(model)(**inputs), range(24)))
        tokens = handle.stats.tokens
        assert (tokens.prompts, tokens.patches, tokens.kept_patches, tokens.layer_tokens) == (24, 24 * 16, 24 * 4, 24 * 12)


def test_two_threads_do_not_see_each_others_pictures() -> None:
    model, inputs = subject("llava").model, batch_of("llava")
    rows = [row_of(inputs, b) for b in range(2)]

    def forward(b: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**rows[b]).logits
        return found

    with accel.apply(model, accel.FasterVLM(keep=0.5)):
        alone = [forward(b) for b in range(2)]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(forward, [0, 1] * 8))
    for i, found in enumerate(together):
        assert torch.equal(found, alone[i % 2])

