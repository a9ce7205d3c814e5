"""A compressed cache on and off: pauses, copies, files, threads, errors half-way, and nothing that goes from one prompt to the next."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.families import FAMILIES, N_TOKENS, instance, text_config, words
from conformance.kv_runs import CACHE, METHODS, Uneven, groups_of, kept_of, small
from conformance.reference import assert_bit_equal, run
from conformance.subjects import snapshot, subject
from conformance.test_kv_generation import fresh, plain, wide
from torch import Tensor

import accel
from accel.errors import PatchError, UnsupportedError
from accel.patches.hosts.transformers.kv import attach

every_method = pytest.mark.parametrize("method", METHODS)
ANSWER = {"max_new_tokens": 8, "do_sample": False}


def answer(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model.generate(ids, **ANSWER)
    return found


# --- off and on ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["paused", "undone", "another attention"])
@torch.no_grad()
def test_a_model_that_is_not_patched_now_refuses_a_compressed_cache(how: str) -> None:
    model = FAMILIES["llama"].build()[0]
    held = fresh(model)
    handle = accel.apply(model, small("snapkv"))
    model(words(), **{CACHE: held})
    before = kept_of(held)
    if how == "paused":
        with handle.paused(), pytest.raises(UnsupportedError, match="not patched now, or paused"):
            model(words(length=1), **{CACHE: held})
        # nothing was taken: the conversation goes on as if nobody had tried
        assert all(torch.equal(kept, before[layer]) for layer, kept in kept_of(held).items())
        got = model(words(length=1), **{CACHE: held}).logits
        other = fresh(model)
        model(words(), **{CACHE: other})
        assert torch.equal(got, model(words(length=1), **{CACHE: other}).logits)
    elif how == "another attention":
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="not patched now"):
            model(words(length=1), **{CACHE: held})
    handle.undo()
    with pytest.raises(UnsupportedError, match="not patched now"):
        model(words(length=1), **{CACHE: held})


@every_method
@torch.no_grad()
def test_a_pause_on_a_whole_cache_is_exact_and_the_method_goes_on_behind_it(method: str) -> None:
    model, held, stock = wide(), fresh(wide()), fresh(wide())
    model(words(), **{CACHE: stock})
    want = model(words(length=3), **{CACHE: stock}).logits
    with accel.apply(model, small(method, min_entries=200)) as handle:
        model(words(), **{CACHE: held})
        with handle.paused():
            assert torch.equal(model(words(length=3), **{CACHE: held}).logits, want)
        model(words(length=100, seed=3), **{CACHE: held})
        assert sum(map(len, groups_of(held, 0))) == 200


@every_method
@torch.no_grad()
def test_a_cache_filled_before_is_taken_over(method: str) -> None:
    model, held = wide(), fresh(wide())
    model(words(), **{CACHE: held})
    whole = held.layers[0].keys.clone()
    with accel.apply(model, small(method, keep=0.5)) as handle:
        model(words(length=4), **{CACHE: held})
        entries = groups_of(held, 0)[0]
        assert len(entries) == (N_TOKENS + 4) // 2
        for head, places in enumerate(entries.positions()[0]):
            old = places < N_TOKENS
            assert torch.equal(entries.k[0, head, old], whole[0, head, places[old]])
        assert handle.stats.cache.generations == 1


@torch.no_grad()
def test_a_pass_that_the_method_may_not_see_costs_no_entries_later() -> None:
    model = instance("LlamaForCausalLM", text_config("LlamaConfig"), attention="eager")
    held = fresh(model)
    with accel.apply(model, small("h2o", min_entries=64)) as handle:
        model(words(), output_attentions=True, **{CACHE: held})
        assert handle.stats.cache.skipped == {"attention weights were asked for": 3}
        assert "attention weights were asked for" in handle.report()
        model(words(length=1), **{CACHE: held})
    # the budget is that of the whole prompt, not of the one token that was seen
    assert len(groups_of(held, 0)[0]) == 64
    with accel.apply(model, small("h2o", min_entries=64)), pytest.raises(UnsupportedError, match="attention weights"):
        model(words(length=1), output_attentions=True, **{CACHE: held})


@every_method
@pytest.mark.parametrize("other", METHODS)
@torch.no_grad()
def test_another_method_goes_on_with_what_one_has_left(method: str, other: str) -> None:
    model, held = wide(), fresh(wide())
    with accel.apply(model, small(method)):
        model(words(), **{CACHE: held})
    left = kept_of(held)[0]
    with accel.apply(model, small(other, keep=0.1)):
        for length in (1, 1, 9, 1, 1):
            assert model(words(length=length), **{CACHE: held}).logits.isfinite().all()
    assert not (kept_of(held)[0][:, :, :N_TOKENS] & ~left).any()


@torch.no_grad()
def test_dropout_is_refused_once_entries_are_gone() -> None:
    model = instance("LlamaForCausalLM", text_config("LlamaConfig", attention_dropout=0.5))
    held = fresh(model)
    with accel.apply(model, small("snapkv")):
        model(words(), **{CACHE: held})
        model.train()
        with pytest.raises(UnsupportedError, match="attention dropout"):
            model(words(length=1), **{CACHE: held})


def test_a_second_apply_raises_and_names_the_method() -> None:
    model = wide()
    with accel.apply(model, small("snapkv")):
        before = snapshot(model)
        with pytest.raises(PatchError, match="snapkv"):
            accel.apply(model, small("h2o"))
        with pytest.raises(PatchError, match="snapkv"):
            accel.apply(model, "streaming")
        assert snapshot(model) == before
    with pytest.raises(UnsupportedError, match="at most one KV-compression"):
        accel.apply(model, small("snapkv"), small("h2o"))


@pytest.mark.parametrize("at", [0, 2], ids=["first layer", "last layer"])
def test_an_error_while_attaching_leaves_the_model_untouched(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    it = subject("llama")
    before = snapshot(it.model)

    def fail(module: Any) -> None:
        if module.layer_idx == at:
            raise RuntimeError("in the middle")

    monkeypatch.setattr(attach, "_why_shared", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        accel.apply(it.model, Uneven())
    assert snapshot(it.model) == before
    assert_bit_equal(run(it.model, it.inputs), it.dense)


def test_a_handle_that_was_thrown_away_keeps_working() -> None:
    model = FAMILIES["llama"].build()[0]
    with accel.apply(model, Uneven()):
        want = answer(model, words())
    accel.apply(model, Uneven())
    gc.collect()
    assert torch.equal(answer(model, words()), want)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- copies and files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["copy", "pickle"])
def test_a_copy_is_plain_and_free(kind: str) -> None:
    model = FAMILIES["llama"].build()[0]
    try:
        pickle.dumps(model)
    except AttributeError as error:
        pytest.skip(f"this transformers cannot pickle an unpatched model: {error}")
    dense = answer(model, words())
    with accel.apply(model, small("snapkv")) as handle:
        patched = answer(model, words())
        twin = copy.deepcopy(model) if kind == "copy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(answer(twin, words()), dense)
        assert handle.stats.cache.generations == 1
        with accel.apply(twin, small("snapkv")):
            assert torch.equal(answer(twin, words()), patched)
        assert torch.equal(answer(model, words()), patched)
    assert not torch.equal(patched, dense)
    assert torch.equal(answer(twin, words()), dense)


def test_saving_a_patched_model_saves_the_plain_one(tmp_path: Path) -> None:
    it = subject("llama")
    it.model.save_pretrained(tmp_path / "plain")
    with accel.apply(it.model, Uneven()):
        it.model.save_pretrained(tmp_path / "patched")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@every_method
@torch.no_grad()
def test_a_copied_cache_is_a_conversation_of_its_own(method: str) -> None:
    model, held = wide(), fresh(wide())
    with accel.apply(model, small(method)):
        model(words(), **{CACHE: held})
        model(words(length=1), **{CACHE: held})
        twins = [copy.deepcopy(held) for _ in range(3)]
        found = []
        for i, twin in enumerate(twins):
            if i == 1:
                # another branch in between
                model(words(length=9, seed=77), **{CACHE: held})
            found.append([model(words(length=n, seed=n), **{CACHE: twin}).logits for n in (5, 1, 1, 1)])
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_lora_model_is_patched_through_its_wrapper() -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES["llama"].build()[0]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    inputs, keys = plain(), list(wrapped.state_dict())
    dense = wrapped.generate(**inputs, **ANSWER)
    with accel.apply(wrapped, Uneven()) as handle:
        assert list(wrapped.state_dict()) == keys
        assert not torch.equal(wrapped.generate(**inputs, **ANSWER), dense)
        assert handle.stats.cache.generations == 1
    assert torch.equal(wrapped.generate(**inputs, **ANSWER), dense)


# --- one prompt and the next ---------------------------------------------------------------------------------------------------


@every_method
def test_ten_prompts_in_a_row_equal_ten_fresh_models(method: str) -> None:
    prompts = [words(batch=1 + seed % 2, length=60 + 7 * seed, seed=seed) for seed in range(10)]
    want = []
    for ids in prompts:
        model = FAMILIES["llama"].build()[0]
        with accel.apply(model, small(method)):
            want.append(answer(model, ids))
    model = FAMILIES["llama"].build()[0]
    with accel.apply(model, small(method)) as handle:
        for ids, expected in zip(prompts, want, strict=True):
            assert torch.equal(answer(model, ids), expected)
        assert handle.stats.cache.generations == 10


@every_method
@torch.no_grad()
def test_two_conversations_take_turns(method: str) -> None:
    model = wide()

    def steps(seed: int) -> Any:
        held = fresh(model)
        for i, length in enumerate((80, 1, 1, 20, 1, 1, 1)):
            yield model(words(length=length, seed=seed + i), **{CACHE: held}).logits

    with accel.apply(model, small(method)):
        alone = [list(steps(seed)) for seed in (100, 200)]
        for i, pair in enumerate(zip(steps(100), steps(200), strict=True)):
            assert all(torch.equal(got, want[i]) for got, want in zip(pair, alone, strict=True))


@pytest.mark.parametrize("name", ["llama", "llava next"])
def test_threads_do_not_share_a_pass(name: str) -> None:
    it = subject(name)
    text = {"input_ids": words(length=90, seed=4).clamp_min(10)}
    prompts = [it.inputs, text, it.inputs, {"input_ids": words(length=101, seed=6)}]
    with accel.apply(it.model, small("snapkv", keep=24)):
        want = [it.model.generate(**inputs, **ANSWER) for inputs in prompts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: it.model.generate(**inputs, **ANSWER), prompts * 3))
    assert all(torch.equal(got, expected) for got, expected in zip(found, want * 3, strict=True))


@pytest.mark.parametrize("lengths", [(1, 1), (5, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("at", ["q_proj", "o_proj"])
@torch.no_grad()
def test_a_cache_that_a_broken_pass_left_uneven_is_refused(lengths: tuple[int, int], at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = wide(), fresh(wide())
    with accel.apply(model, small("snapkv")):
        model(words(), **{CACHE: held})
        with monkeypatch.context() as patch:
            patch.setattr(getattr(model.model.layers[1].self_attn, at), "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(words(length=lengths[0]), **{CACHE: held})
        with pytest.raises(UnsupportedError, match="broken off"):
            model(words(length=lengths[1]), **{CACHE: held})


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["prompt", "step"])
@torch.no_grad()
def test_an_error_inside_a_pass_leaves_the_model_usable(error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].build()[0]
    inputs = subject("llava").inputs
    handle = accel.apply(model, small("h2o"))
    want, held = model.generate(**inputs, **ANSWER), fresh(model)
    if where == "step":
        model(**inputs, **{CACHE: held})

    def fail(x: Tensor) -> Tensor:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model.get_decoder().layers[0].self_attn.o_proj, "forward", fail)
        with pytest.raises(error):
            model(**(inputs if where == "prompt" else {"input_ids": words(length=1)}), **{CACHE: held})
    if where == "step":
        # an interrupt skips torch's hooks: what they would have cleared must not let this cache pass
        handle.undo()
        with pytest.raises(UnsupportedError, match="not patched now"):
            model(input_ids=words(length=1), **{CACHE: held})
        handle = accel.apply(model, small("h2o"))
    assert torch.equal(model.generate(**inputs, **ANSWER), want)
    handle.undo()
    assert torch.equal(model.generate(**inputs, **ANSWER), subject("llava").model.generate(**inputs, **ANSWER))
