"""On and off, copies and files: the patch belongs to one model object, and leaves no trace in anything made from it."""

from __future__ import annotations

import copy
import copyreg
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from conformance.families import FAMILIES, instance, text_config, words
from conformance.methods import METHODS, SPARSE_METHODS, MethodCase
from conformance.reference import assert_bit_equal, run
from conformance.subjects import snapshot, subject
from support import tiny_llama
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import accel
from accel.patches.hosts.transformers import host
from accel.patches.hosts.transformers.layers import LAYERS

every_method = pytest.mark.parametrize("case", METHODS, ids=str)
sparse_methods = pytest.mark.parametrize("case", SPARSE_METHODS, ids=str)
METHOD = SPARSE_METHODS[0]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(words()).logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "llava"])
@every_method
def test_paused_is_bit_equal_to_dense_and_counts_nothing(name: str, case: MethodCase) -> None:
    it = subject(name)
    with accel.apply(it.model, case.sparse()) as handle:
        with handle.paused():
            assert_bit_equal(run(it.model, it.inputs), it.dense)
            assert handle.stats.layers == {}
        run(it.model, it.inputs)
        assert (handle.stats.total.sparse_calls > 0) == case.is_ever_sparse


@every_method
def test_a_second_apply_raises_and_names_the_method(case: MethodCase) -> None:
    model = subject("llama").model
    with accel.apply(model, case.sparse()) as handle:
        before, patched = snapshot(model), logits(model)
        with pytest.raises(accel.PatchError, match=case.cls.method_name()):
            accel.apply(model, "dense")
        assert snapshot(model) == before
        assert torch.equal(logits(model), patched)
        assert handle.is_active


@pytest.mark.parametrize("name", ["llama", "gemma3", "llava"])
@pytest.mark.parametrize("at", [0, 2], ids=["first layer", "last layer"])
def test_an_error_half_way_leaves_the_model_untouched(name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    it = subject(name)
    before = snapshot(it.model)
    ask = host._why_skipped

    def fail(module: nn.Module, info: object, layer: int) -> str | None:
        if layer == at:
            raise RuntimeError("in the middle")
        return ask(module, info, layer)

    monkeypatch.setattr(host, "_why_skipped", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        accel.apply(it.model, METHOD.sparse())
    assert snapshot(it.model) == before
    assert torch.equal(it.model(**it.inputs).logits, it.dense.logits)


@sparse_methods
def test_a_deep_copy_runs_dense_while_the_original_stays_patched(case: MethodCase) -> None:
    model = subject("llama").model
    dense = logits(model)
    with accel.apply(model, case.sparse()) as handle:
        sparse = logits(model)
        twin = copy.deepcopy(model)
        handle.stats.reset()
        assert torch.equal(logits(twin), dense)
        assert handle.stats.layers == {}
        assert torch.equal(logits(model), sparse)
    assert torch.equal(logits(twin), dense)
    # the copy is free: it can be patched and given back itself
    with accel.apply(twin, case.sparse()):
        assert torch.equal(logits(twin), sparse)
    assert torch.equal(logits(twin), dense)


@sparse_methods
def test_a_pickled_model_comes_back_dense(case: MethodCase) -> None:
    model = subject("llama").model
    try:
        pickle.dumps(model)
    except AttributeError as error:
        # seen with the PyPI package `kernels` installed: transformers then puts classes of its own making into every model
        pytest.skip(f"this transformers cannot pickle an unpatched model: {error}")
    dense = logits(model)
    with accel.apply(model, case.sparse()):
        loaded = pickle.loads(pickle.dumps(model))
    # another process has registered none of accel's names
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded), dense)
    with accel.apply(loaded, case.sparse()) as handle:
        assert not torch.equal(logits(loaded), dense)
        assert handle.stats.total.sparse_calls > 0
    assert torch.equal(logits(loaded), dense)


@pytest.mark.parametrize("method", ["powerattention", "h2o", "fastv"])
def test_a_patched_config_names_a_plain_string_and_its_copies_the_original(method: str) -> None:
    model = subject("llava").model
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = dict(copyreg.dispatch_table)
    with accel.apply(model, method):
        names = [config._attn_implementation for config in configs]
        # Dynamo of torch 2.11 traces no methods of a subclass, and transformers asks names how they start
        assert {type(name) for name in names} == {str}
        patched = [config for config, name in zip(configs, names, strict=True) if name != "sdpa"]
        assert patched
        for config in patched:
            for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
                assert type(twin) is type(config)
                assert twin._attn_implementation == "sdpa"
                assert twin.to_dict() == config.to_dict()
        assert [config._attn_implementation for config in configs] == names
    assert copyreg.dispatch_table == before


def test_a_config_with_copies_of_its_own_is_copied_while_patched() -> None:
    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

        def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
            return OwnConfig.from_dict, (self.to_dict(),)

    model = tiny_llama(attn_implementation="sdpa")
    model.config = model.model.config = OwnConfig.from_dict(model.config.to_dict())
    model.config._attn_implementation = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.config = model.config
    with accel.apply(model, METHOD.sparse()):
        assert type(copy.deepcopy(model.config)) is OwnConfig
        assert type(copy.copy(model.config)) is OwnConfig


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_saving_a_patched_model_saves_the_plain_one(name: str, tmp_path: Path) -> None:
    it = subject(name)
    it.model.save_pretrained(tmp_path / "plain")
    with accel.apply(it.model, METHOD.sparse()):
        it.model.save_pretrained(tmp_path / "patched")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = type(it.model).from_pretrained(tmp_path / "patched").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**it.inputs).logits, it.dense.logits)


def test_weights_loaded_while_patched_take_effect() -> None:
    model, other = FAMILIES["llama"].build()[0], FAMILIES["llama"].build()[0]
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    with accel.apply(other, METHOD.sparse()):
        want = logits(other)
    with accel.apply(model, METHOD.sparse()):
        model.load_state_dict(other.state_dict())
        assert torch.equal(logits(model), want)


def test_of_two_models_with_one_config_only_the_patched_one_changes() -> None:
    config = text_config("LlamaConfig")
    first = instance("LlamaForCausalLM", config)
    torch.manual_seed(1)
    second = LlamaForCausalLM(config).eval()
    assert first.config is second.config
    dense = logits(first), logits(second)
    a = accel.apply(first, METHOD.sparse())
    assert torch.equal(logits(second), dense[1])
    b = accel.apply(second, METHOD.sparse())
    a.undo()
    assert torch.equal(logits(first), dense[0])
    assert not torch.equal(logits(second), dense[1])
    assert b.stats.total.sparse_calls > 0
    b.undo()
    assert torch.equal(logits(second), dense[1])
    assert config._attn_implementation == "sdpa"


def test_two_models_carry_different_methods() -> None:
    first, second = FAMILIES["llama"].build()[0], FAMILIES["qwen3"].build()[0]
    cases = [case for case in SPARSE_METHODS if not case.variant]
    alone = []
    for model, case in ((first, cases[0]), (second, cases[-1])):
        with accel.apply(model, case.sparse()):
            alone.append(logits(model))
    with accel.apply(first, cases[0].sparse()), accel.apply(second, cases[-1].sparse()):
        assert torch.equal(logits(first), alone[0])
        assert torch.equal(logits(second), alone[1])


def test_a_model_thrown_away_while_patched_frees_its_state() -> None:
    model = FAMILIES["llama"].build()[0]
    handle = accel.apply(model, METHOD.sparse())
    assert len(LAYERS) == 3
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
    assert LAYERS == {}


def test_nothing_piles_up_where_a_model_is_patched_again_and_again() -> None:
    model = FAMILIES["llama"].build()[0]
    before = len(weakref.finalize._registry)    # type: ignore[attr-defined]
    for _ in range(3):
        with accel.apply(model, METHOD.sparse()):
            pass
    gc.collect()
    assert len(weakref.finalize._registry) == before    # type: ignore[attr-defined]
    assert LAYERS == {}


@torch.no_grad()
def test_another_implementation_set_while_patched_is_what_runs() -> None:
    model = FAMILIES["llama"].build()[0]
    with accel.apply(model, METHOD.sparse()) as handle:
        model.set_attn_implementation("eager")
        got = logits(model)
        # the user's last word is dense, and nothing of it passes through the patch
        assert handle.stats.layers == {}
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model), got)
