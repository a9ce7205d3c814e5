"""Pruning on and off: undo, copies, what is refused, labels, and which pictures belong to which prompt."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.families import FAMILIES
from conformance.methods import EveryBlock
from conformance.pruning_methods import Chosen
from conformance.pruning_runs import CACHE, FRONT, PAD, batch_of, dropped, every_family, hidden_run, inputs_of, kept_by, run_generate
from conformance.reference import N_NEW, ROUNDING, assert_bit_equal, run
from conformance.subjects import snapshot, subject
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

import accel
from accel.errors import AccelError, UnsupportedError
from accel.stats import PruningEvent

# --- off, copied, paused -------------------------------------------------------------------------------------------------------


@every_family
def test_undo_gives_back_the_same_objects_and_logits(name: str) -> None:
    it = subject(name)
    before = snapshot(it.model)
    handle = accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5))))
    run(it.model, it.inputs)
    with handle.paused():
        assert_bit_equal(run(it.model, it.inputs), it.dense)
    handle.undo()
    assert snapshot(it.model) == before
    assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_family
def test_a_method_that_keeps_everything_changes_nothing(name: str) -> None:
    it = subject(name)
    before = snapshot(it.model)
    with accel.apply(it.model, Chosen(at=())):
        assert snapshot(it.model) == before
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@every_family
def test_keeping_every_token_after_all_equals_dense(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, Chosen(at=((None, 1.0), (1, 1.0)))):
        assert_bit_equal(run(it.model, it.inputs), it.dense)


@pytest.mark.parametrize("name", ["llava", "qwen3 vl"])
def test_a_copy_is_not_pruned(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, FRONT) as handle:
        twin = copy.deepcopy(it.model)
        assert_bit_equal(run(twin, it.inputs), it.dense)
        assert handle.stats.tokens.prompts == 0
        assert twin.model.get_image_features.__self__ is twin.model


def test_a_saved_model_is_not_pruned() -> None:
    # of a model that has run, transformers itself leaves hooks behind that cannot be saved
    model, inputs = FAMILIES["llava"].build()
    try:
        torch.save(model, io.BytesIO())
    except AttributeError as error:
        pytest.skip(f"this release cannot save the plain model: {error}")
    stored = io.BytesIO()
    with accel.apply(model, FRONT):
        torch.save(model, stored)
    stored.seek(0)
    assert_bit_equal(run(torch.load(stored, weights_only=False), inputs), run(model, inputs))


def test_a_saved_model_runs_in_a_process_that_has_patched_nothing(tmp_path: Path) -> None:
    model, inputs = FAMILIES["gemma3 vlm"].build()
    want = FAMILIES["gemma3 vlm"].build()[0](**inputs).logits.detach()
    try:
        torch.save(model, io.BytesIO())
    except AttributeError as error:
        pytest.skip(f"this release cannot save the plain model: {error}")
    with accel.apply(model, accel.FasterVLM(keep=0.5), accel.FastV(keep=0.5, layer=2), EveryBlock()):
        torch.save((model, inputs, want), tmp_path / "patched")
    load = "import sys, torch; model, inputs, want = torch.load(sys.argv[1], weights_only=False); assert torch.equal(model(**inputs).logits, want)"
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "patched")], check=True, timeout=120)


def test_a_pruned_cache_is_refused_by_the_model_as_it_was() -> None:
    it = subject("llava")
    with accel.apply(it.model, FRONT):
        first = run_generate(it.model, it.inputs)
    cache = getattr(first, "cache", None) or first.past_key_values
    longer = torch.cat([first.sequences, torch.tensor([[31]])], 1)
    with pytest.raises(UnsupportedError, match="not patched now"):
        it.model(input_ids=longer[:, -2:], **{CACHE: cache})


# --- text, pictures that do not fit, what is refused ---------------------------------------------------------------------------


@every_family
def test_a_prompt_without_a_picture_is_left_alone(name: str) -> None:
    it = subject(name)
    ids = it.inputs["input_ids"].clone()
    ids[ids < 10] = 10
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "paligemma":
        text["token_type_ids"] = torch.zeros_like(ids)
    dense = run(it.model, text)
    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))):
        assert_bit_equal(run(it.model, text), dense)


@every_family
def test_a_row_without_a_picture_equals_the_row_alone(name: str) -> None:
    it = subject(name)
    inputs = dict(inputs_of(name))
    ids = inputs["input_ids"]
    text = ids.clone()
    text[text < 10] = 10
    both = {**inputs, "input_ids": torch.cat([text, ids]), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.int64)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            both[key] = torch.cat([torch.zeros_like(inputs[key]), inputs[key]])
    try:
        run_generate(it.model, both)
    except (ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"the plain model cannot do this either: {error}")
    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))) as handle:
        got = run_generate(it.model, both)
        assert handle.stats.tokens.skipped["no picture"] == 1
        alone = run_generate(it.model, inputs)
    assert torch.equal(got.sequences[1, -N_NEW:], alone.sequences[0, -N_NEW:])
    plain = {key: value[:1] for key, value in both.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
    assert torch.equal(got.sequences[0, -N_NEW:], run_generate(it.model, plain).sequences[0, -N_NEW:])


@every_family
def test_placeholders_that_do_not_fit_are_refused(name: str) -> None:
    it = subject(name)
    inputs = {key: value.clone() for key, value in it.inputs.items()}
    place = int((inputs["input_ids"][0] == it.model.config.image_token_id).nonzero()[0])
    inputs["input_ids"][0, place] = 20
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key][0, place] = 0
    with accel.apply(it.model, FRONT), pytest.raises((AccelError, ValueError, RuntimeError), match=r"placeholder|match|tokens"):
        it.model(**inputs)


def test_pixels_beside_embeddings_without_ids_are_refused() -> None:
    it = subject("llava")
    embeds = it.model.get_input_embeddings()(it.inputs["input_ids"])
    with accel.apply(it.model, FRONT), pytest.raises(UnsupportedError, match="input_ids"):
        it.model(inputs_embeds=embeds, attention_mask=it.inputs["attention_mask"], pixel_values=it.inputs["pixel_values"])


def test_embeddings_alone_are_left_whole_and_counted() -> None:
    it = subject("llava")
    embeds = it.model.get_input_embeddings()(it.inputs["input_ids"])
    plain = it.model(inputs_embeds=embeds).logits
    with accel.apply(it.model, FRONT) as handle:
        assert torch.equal(it.model(inputs_embeds=embeds).logits, plain)
        assert handle.stats.tokens.skipped["embeddings without input_ids"] == 1
        assert "embeddings without input_ids" in handle.report()


def test_placeholders_whose_pictures_nobody_saw_are_counted() -> None:
    it = subject("llava")
    with accel.apply(it.model, FRONT) as handle:
        assert torch.equal(it.model(input_ids=it.inputs["input_ids"]).logits, it.model(input_ids=it.inputs["input_ids"]).logits)
        assert "2 left whole (placeholders without pictures)" in handle.report()


def test_an_offloaded_cache_is_refused() -> None:
    it = subject("llava")
    cache = DynamicCache(config=it.model.config.text_config)
    cache.offloading = True
    with accel.apply(it.model, FRONT), pytest.raises(UnsupportedError, match="offloaded"):
        it.model(**it.inputs, **{CACHE: cache}, use_cache=True)


def test_a_text_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="sees no pictures"):
        accel.apply(subject("llama").model, FRONT)


# --- training ------------------------------------------------------------------------------------------------------------------


@every_family
def test_the_loss_is_that_of_the_text_in_the_hidden_run(name: str) -> None:
    model, inputs = subject(name).model, batch_of(name)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] < 10) | (inputs["attention_mask"] == 0), -100)
    events: list[PruningEvent] = []
    with accel.apply(model, Chosen(ragged=1)) as handle, handle.observe_pruning(events.append), torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    gone = dropped(events, inputs, model)
    logits = hidden_run(model, inputs, gone).logits
    kept = [(row[left][:-1], own[left][1:]) for row, own, left in zip(logits, labels, gone.left, strict=True)]
    want = torch.nn.functional.cross_entropy(torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept]), ignore_index=-100)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    plain = model(**inputs, labels=labels).loss
    assert (plain - want).abs() > 1e-4


def test_labels_with_a_stage_inside_the_model_are_refused() -> None:
    it = subject("llava")
    with accel.apply(it.model, Chosen(at=((1, 0.5),))), pytest.raises(UnsupportedError, match="labels"):
        it.model(**it.inputs, labels=it.inputs["input_ids"])


def test_gradients_reach_the_projector() -> None:
    model, inputs = FAMILIES["llava"].build()
    model.requires_grad_(True)
    with accel.apply(model, FRONT):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


# --- whose pictures, whose prompt ----------------------------------------------------------------------------------------------


def test_an_error_inside_the_decoder_leaves_nothing_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    it = subject("llava")
    text = torch.arange(20, 80)[None]
    plain = it.model(input_ids=text).logits
    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))):
        with monkeypatch.context() as patch:
            patch.setattr(it.model.get_decoder().layers[1].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                it.model(**it.inputs)
        assert torch.equal(it.model(input_ids=text).logits, plain)


def test_an_interrupt_inside_the_decoder_leaves_nothing_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch runs no hook behind an interrupted module, so that nobody can clear up
    it = subject("llava")
    text, embeds = torch.arange(20, 80)[None], it.model.get_input_embeddings()(it.inputs["input_ids"])
    plain, alone = it.model(input_ids=text).logits, it.model.get_decoder()(inputs_embeds=embeds).last_hidden_state

    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))):
        for call in (lambda: it.model(**it.inputs), lambda: run_generate(it.model, it.inputs)):
            with monkeypatch.context() as patch:
                patch.setattr(it.model.get_decoder().layers[1].mlp, "forward", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    call()
            assert torch.equal(it.model.get_decoder()(inputs_embeds=embeds).last_hidden_state, alone)
            assert torch.equal(it.model(input_ids=text).logits, plain)


@every_family
def test_generation_without_a_cache_equals_that_with_one(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    # without a cache, a placeholder in the answer would ask for features
    how = {"suppress_tokens": [model.config.image_token_id]}
    dense = run_generate(model, inputs, use_cache=False, **how)
    if not torch.equal(dense.sequences, run_generate(model, inputs, **how).sequences):
        pytest.skip("the plain model does not do this either")
    with accel.apply(model, Chosen(at=((None, 0.5), (1, 0.5)))) as handle:
        cached = run_generate(model, inputs, **how)
        without = run_generate(model, inputs, use_cache=False, **how)
        assert handle.stats.tokens.prompts == 2
    assert torch.equal(without.sequences, cached.sequences)
    scale = cached.logits[0].abs().max()
    assert (torch.stack(without.logits) - torch.stack(cached.logits)).abs().max() / scale <= ROUNDING


def test_features_encoded_earlier_bring_their_own_scores() -> None:
    it = subject("llava")
    text = {key: it.inputs[key] for key in ("input_ids", "attention_mask")}
    pixels = [it.inputs["pixel_values"], it.inputs["pixel_values"].flip(-1)]
    how = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "return_dict": True}
    before = it.model.model.get_image_features(pixels[0], **how)
    with accel.apply(it.model, accel.FasterVLM(keep=0.25)) as handle:
        want = [kept_by(handle, lambda p=p: it.model(**text, pixel_values=p)) for p in pixels]
        assert want[0] != want[1]
        features = [it.model.model.get_image_features(p, **how) for p in pixels]
        for made, kept in zip(features, want, strict=True):
            assert kept_by(handle, lambda made=made: it.model(**text, mm_encoder_outputs={"image": made})) == kept
            generate = lambda made=made: it.model.generate(**text, mm_encoder_outputs={"image": made}, max_new_tokens=2)    # noqa: E731
            assert kept_by(handle, generate) == kept
        with pytest.raises(UnsupportedError, match="before accel was applied"):
            it.model(**text, mm_encoder_outputs={"image": before})


def test_a_forward_of_its_own_inside_generate_is_its_own_prompt() -> None:
    it = subject("llava")
    other = {**it.inputs, "input_ids": torch.cat([it.inputs["input_ids"][:, :2], it.inputs["input_ids"][:, 4:30]], 1)}
    del other["attention_mask"]
    found: list[Tensor] = []

    def judge(ids: Tensor, scores: Tensor) -> Tensor:
        found.append(it.model(**other).logits)
        return scores

    with accel.apply(it.model, Chosen(at=((None, 0.5), (1, 0.5)))), torch.no_grad():
        alone = it.model(**other).logits
        plain = run_generate(it.model, it.inputs).sequences
        judged = run_generate(it.model, it.inputs, logits_processor=LogitsProcessorList([judge])).sequences
    assert torch.equal(plain, judged)
    assert len(found) == N_NEW
    assert all(torch.equal(one, alone) for one in found)


@pytest.mark.parametrize("method", [accel.FastV(keep=0.5, layer=2), accel.FasterVLM(keep=0.5)], ids=["fastv", "fastervlm"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl"])
def test_padding_behind_changes_nothing(name: str, method: Any) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    behind = {}
    for key, value in inputs.items():
        is_tokens = value.dim() == 2 and value.shape[1] == inputs["input_ids"].shape[1]
        behind[key] = torch.cat([value, torch.full((1, 5), PAD, dtype=value.dtype)], 1) if is_tokens else value
    with accel.apply(model, method) as handle:
        assert kept_by(handle, lambda: model(**behind)) == kept_by(handle, lambda: model(**inputs))


@pytest.mark.parametrize("name", ["llava", "gemma3 vlm"])
def test_candidates_of_assisted_decoding_have_no_say(name: str) -> None:
    model, inputs = subject(name).model, inputs_of(name)
    with accel.apply(model, accel.FastV(keep=0.25, layer=2)):
        plain = run_generate(model, inputs, max_new_tokens=12).sequences
        assert torch.equal(run_generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3).sequences, plain)


def test_merges_in_front_follow_each_other() -> None:
    model, inputs = subject("llava").model, inputs_of("llava")
    embeds: list[Tensor] = []
    with accel.apply(model, accel.Downsample(keep=8), accel.Downsample(keep=4)), torch.no_grad():
        hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda m, a, k: embeds.append(a[0]), with_kwargs=True)
        model(**inputs)
        hook.remove()
    # the mean of means of equal cells is the mean of all
    features = model.model.get_image_features(
        inputs["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
    ).pooler_output[0]
    place = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    torch.testing.assert_close(embeds[0][0, place : place + 4].mean(0), features.mean(0), rtol=1e-5, atol=1e-5)


def test_a_second_pruning_method_is_refused_whichever_comes_first() -> None:
    it = subject("llava")
    before = snapshot(it.model)
    for first, second in ((FRONT, FRONT), (FRONT, EveryBlock()), (EveryBlock(), FRONT)):
        with accel.apply(it.model, first), pytest.raises(accel.PatchError, match="patched already"):
            accel.apply(it.model, second)
        assert snapshot(it.model) == before


def test_a_loss_that_is_set_while_patched_stays() -> None:
    model, _ = FAMILIES["llava"].build()

    def mine(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return logits.sum() * 0

    with accel.apply(model, FRONT):
        model.loss_function = mine
    assert model.loss_function is mine


# padding inside the picture, or causal attention: masks that only the attention they are made for can read
@pytest.mark.parametrize(("name", "method"), [("llava", accel.FastV(keep=0.5, layer=2)), ("smolvlm", accel.FasterVLM(keep=0.5))])
@pytest.mark.parametrize("order", [("eager", "sdpa"), ("sdpa", "eager")], ids=["sdpa last", "eager last"])
@torch.no_grad()
def test_an_attention_that_is_set_while_patched_runs_in_every_layer(name: str, method: Any, order: tuple[str, str]) -> None:
    model, inputs = FAMILIES[name].build()
    if name == "smolvlm":
        inputs["pixel_attention_mask"] = (torch.arange(16) < 10).long().expand(1, 1, 16, 16)
    first, last = order
    model.set_attn_implementation(last)
    with accel.apply(model, method):
        want = model(**inputs).logits
    model.set_attn_implementation(first)
    with accel.apply(model, method) as handle:
        twin = copy.deepcopy(model)
        for patched in (model, twin):
            patched.set_attn_implementation(last)
        torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-4)
        assert "not in use" not in handle.report()
        got = twin(**inputs).logits
    torch.testing.assert_close(got, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {last}


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
@pytest.mark.parametrize("mode", ["keep", "compact"])
def test_a_cache_whose_rows_move_keeps_their_tokens_and_positions(how: str, mode: str) -> None:
    model, inputs = subject("llava").model, batch_of("llava")
    move = {"reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])), "select": lambda c: c.batch_select_indices(torch.tensor([1])),
            "repeat": lambda c: c.batch_repeat_interleave(2)}[how]  # fmt: skip
    rows = {"reorder": [1, 0], "select": [1], "repeat": [0, 0, 1, 1]}[how]
    with accel.apply(model, Chosen(ragged=2, position_mode=mode)), torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        twin = copy.deepcopy(cache)
        new, mask = torch.tensor([[30], [31]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        want = model(input_ids=new, attention_mask=mask, position_ids=positions, **{CACHE: twin}).logits[rows]
        move(cache)
        got = model(input_ids=new[rows], attention_mask=mask[rows], position_ids=positions[rows], **{CACHE: cache}).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# behind the pictures; into one of them and to nothing, from where only the lengths can be told
@pytest.mark.parametrize(("n", "goes_on"), [(1, True), (30, True), (88, True), (100, False), (113, False)])
def test_a_cropped_cache_goes_on_as_from_the_shorter_prompt(n: int, goes_on: bool) -> None:
    model, inputs = subject("llava").model, batch_of("llava")
    size = inputs["input_ids"].shape[1]
    with accel.apply(model, Chosen(at=((1, 0.5),), ragged=1)) as handle, torch.no_grad():
        events: list[PruningEvent] = []
        with handle.observe_pruning(events.append):
            out = model(**inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        cache.crop(-n)
        left = max(0, size - n)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [left] * 3
        if not goes_on:
            return
        again, mask = inputs["input_ids"][:, left:], inputs["attention_mask"]
        assert not (again == model.config.image_token_id).any()
        got = model(input_ids=again, attention_mask=mask, **{CACHE: cache}).logits
    torch.testing.assert_close(got, out.logits[:, -n:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_model_prunes_outside_the_graph() -> None:
    model, inputs = FAMILIES["llava"].build()
    with accel.apply(model, accel.FasterVLM(keep=0.5), accel.FastV(keep=0.5, layer=1)) as handle:
        want = model(**inputs).logits
        got = torch.compile(model, backend="eager")(**inputs).logits
        assert handle.stats.tokens.prompts == 2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_checkpoints_give_the_same_gradients_or_an_error() -> None:
    model, inputs = FAMILIES["llava"].build()
    model.requires_grad_(True)
    with accel.apply(model, FRONT):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        weight = model.model.multi_modal_projector.linear_1.weight
        want, weight.grad = weight.grad, None
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        except UnsupportedError as error:
            assert "checkpoints" in str(error)     # noqa: PT017 - which of the two depends on the release
            return
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-6)


def test_options_that_keep_everything_are_said_to_change_nothing() -> None:
    it = subject("llava")
    with accel.apply(it.model, accel.FasterVLM(keep=1.0)) as handle:
        it.model(**it.inputs)
        assert "nothing was changed" in handle.report()
        assert "no prompt with a picture" not in handle.report()


def test_an_inner_model_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="LlavaModel does not generate"):
        accel.apply(subject("llava").model.model, FRONT)
