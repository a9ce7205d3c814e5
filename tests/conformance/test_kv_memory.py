"""What a compressed cache takes: memory that is really freed, the types of the model, and compilers that cope."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from conformance.families import FAMILIES, instance, text_config, words
from conformance.kv_runs import CACHE, METHODS, Uneven, cache_in, recorded, showing, small
from conformance.reference import ROUNDING, run
from conformance.test_generation import padded
from conformance.test_kv_generation import fresh, plain, wide
from torch import Tensor

import accel
from accel.errors import UnsupportedError

every_method = pytest.mark.parametrize("method", METHODS)


# --- memory --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_was_dropped_is_freed() -> None:
    model, held = wide(), fresh(wide())
    brought: list[Any] = []
    update = held.update

    def noted(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = update(keys, values, *args, **kwargs)
        # a tensor's memory lives as long as any view of it
        brought.extend(weakref.ref(t.untyped_storage()) for t in (keys, values, *found))
        return found

    held.update = noted     # type: ignore[method-assign]
    with accel.apply(model, Uneven()):
        model(words(length=400), **{CACHE: held})
    gc.collect()
    assert len(brought) == 12
    assert [storage() for storage in brought] == [None] * 12
    for layer in held.layers:
        assert layer.held_bytes() == sum(t.untyped_storage().nbytes() for t in layer.tensors()) == 2 * (20 + 45) * (2 * 8 * 4 + 4)


@every_method
@pytest.mark.parametrize("keep", [0.1, 0.5])
@torch.no_grad()
def test_held_bytes_fall_by_nine_tenths_of_what_is_predicted(method: str, keep: float) -> None:
    model = instance("LlamaForCausalLM", text_config("LlamaConfig", head_dim=64, max_position_embeddings=4096))
    ids = words(length=2000)
    with accel.apply(model, small(method, keep=keep, every=32)) as handle:
        model.generate(ids, max_new_tokens=40, do_sample=False)
        stats = handle.stats.cache
        whole = 3 * 2 * 2 * 64 * 4 * 2039
        assert stats.whole_bytes == whole
        assert whole - stats.peak_bytes >= 0.9 * (1 - keep) * whole
        assert stats.peak_bytes <= (keep + 0.1) * whole


@torch.no_grad()
def test_chunks_lower_the_peak_of_what_a_layer_holds() -> None:
    model, read = wide(), []
    with accel.apply(model, small("snapkv", keep=0.2)):
        for how in ({}, {"prefill_chunk_size": 50}):
            read.append(0)

            def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                layers, number = cache_in(kwargs).layers, module.layer_idx
                groups = getattr(layers[number], "groups", []) if number < len(layers) else []
                before = max(map(len, groups)) if groups else 0
                read[-1] = max(read[-1], before + kwargs["hidden_states"].shape[1])

            hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]
            model.generate(words(length=400), max_new_tokens=2, do_sample=False, **how)
            for hook in hooks:
                hook.remove()
    assert read[0] == 400
    # what is left of seven chunks, and the eighth
    assert read[1] == 0.2 * 350 + 50


# --- precision and compilers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "left padding"])
@torch.no_grad()
def test_autocast_runs_in_the_types_of_the_whole_cache(kind: str) -> None:
    model, inputs = wide(), plain() if kind == "plain" else padded("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with accel.apply(model, Uneven()), recorded(model) as passes:
            got = run(model, inputs, max_new_tokens=2)
        with showing(model, passes):
            want = run(model, inputs, max_new_tokens=2)
    with accel.apply(model, Uneven()):
        exact = run(model, inputs, max_new_tokens=2)
    # bfloat16 rounds both in its own way: no further apart than each is from fp32
    for got_step, want_step, exact_step in zip(*(r.scores.unbind(1) for r in (got, want, exact)), strict=True):
        assert (got_step - want_step).abs().max() <= 2 * (want_step - exact_step).abs().max() + ROUNDING


@every_method
def test_half_precision_models_run(method: str) -> None:
    model = instance("LlamaForCausalLM", text_config("LlamaConfig")).to(torch.bfloat16)
    with accel.apply(model, small(method)):
        assert run(model, padded("left")).scores.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_says_the_same() -> None:
    model = FAMILIES["llama"].build()[0]
    torch.compiler.reset()

    def tokens(call: Any) -> list[int]:
        held, found = fresh(model), []
        out = call(words(), **{CACHE: held})
        for _ in range(8):
            new = out.logits[:, -1:].argmax(-1)
            found.append(int(new))
            out = call(new, **{CACHE: held})
        return found

    with accel.apply(model, small("snapkv")) as handle:
        want = tokens(model)
        assert tokens(torch.compile(model, backend="eager")) == want
        assert handle.stats.cache.generations == 2


def test_gradients_through_what_is_left_are_refused() -> None:
    model = FAMILIES["llama"].build()[0]
    with accel.apply(model, small("snapkv")):
        for inputs in (plain(), padded("left")):
            held = fresh(model)
            model(**inputs, **{CACHE: held})
            with pytest.raises(UnsupportedError, match=r"torch\.no_grad"):
                model(words(len(inputs["input_ids"]), 2), **{CACHE: held})
