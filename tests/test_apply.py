"""`accel.apply`: what it accepts, and how it refuses without leaving anything behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support import tiny_llama
from torch import Tensor, nn
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import accel
from accel.kernels.block_sparse import BlockPlan, ImplicitPlan, KeyView
from accel.patches.hosts.transformers.layers import LAYERS
from accel.protocols import (
    AttentionContext,
    CompressionContext,
    HeadGroup,
    KVCompression,
    ModelInfo,
    Retain,
    RunDense,
    SparseAttention,
    When,
)


@dataclass(frozen=True, kw_only=True)
class Window(SparseAttention):
    """Sink and window on a grid small enough for tiny models."""

    trainable: ClassVar[bool] = True
    window_blocks: int = 1

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan | RunDense:
        return ImplicitPlan(16, self.window_blocks, 1, powers=False)


@dataclass(frozen=True, kw_only=True)
class Unbindable(Window):
    """Fails after the model was asked about, as a method whose calibration file is missing does."""

    def bind(self, model: ModelInfo) -> Unbindable:
        raise FileNotFoundError("routers.safetensors")


@dataclass(frozen=True, kw_only=True)
class Evictor(KVCompression):
    @property
    def when(self) -> tuple[When, ...]:
        return (When("before_attention"),)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        return []

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        raise AssertionError("never asked")


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (1, 100), generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "implementation": model.config._attn_implementation,
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "state_dict": list(model.state_dict()),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@torch.no_grad()
def test_apply_changes_the_output_and_undo_gives_it_back_bit_for_bit(model: nn.Module, ids: Tensor) -> None:
    before, dense = snapshot(model), model(ids).logits
    handle = accel.apply(model, Window(min_seq_len=0))
    assert (model(ids).logits - dense).abs().max() > 1e-3
    assert handle.stats.total.sparse_calls == 3
    handle.undo()
    handle.undo()
    assert torch.equal(model(ids).logits, dense)
    assert snapshot(model) == before


@torch.no_grad()
def test_paused_is_the_dense_model(model: nn.Module, ids: Tensor) -> None:
    dense = model(ids).logits
    with accel.apply(model, Window(min_seq_len=0)) as handle:
        with handle.paused():
            assert torch.equal(model(ids).logits, dense)
            assert handle.stats.total.sparse_calls == 0
        assert not torch.equal(model(ids).logits, dense)


@torch.no_grad()
def test_the_context_manager_undoes_after_an_error(model: nn.Module, ids: Tensor) -> None:
    dense = model(ids).logits
    with pytest.raises(KeyError), accel.apply(model, Window(min_seq_len=0)):
        raise KeyError
    assert torch.equal(model(ids).logits, dense)


def test_a_second_apply_names_the_method_that_is_on(model: nn.Module) -> None:
    with accel.apply(model, Window()) as handle:
        with pytest.raises(accel.PatchError, match=Window.method_name()):
            accel.apply(model, Window())
        assert handle.is_active
        assert handle.patched_layers == [0, 1, 2]
    accel.apply(model, Window()).undo()


def test_a_failing_bind_leaves_the_model_untouched(model: nn.Module) -> None:
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match="routers"):
        accel.apply(model, Unbindable())
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("flexprefil",), {}, "did you mean 'flexprefill'"),
        (("flexprefill",), {"gama": 0.9}, "did you mean 'gamma'"),
        (("flexprefill",), {"gamma": 1.5}, "gamma"),
        (("flexprefill",), {"gamma": float("nan")}, "gamma"),
        (("flexprefill", "powerattention"), {"gamma": 0.9}, "single method name"),
        ((Window(),), {"gamma": 0.9}, "single method name"),
        ((3,), {}, "a method is a name"),
    ],
    ids=["unknown method", "unknown option", "out of range", "nan", "options for two", "options for an object", "no method"],
)
def test_wrong_methods_and_options_explain_themselves(model: nn.Module, arguments: tuple, options: dict, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(accel.OptionError, match=message):
        accel.apply(model, *arguments, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("methods", "reason"),
    [((Window(), Window(window_blocks=2)), "at most one sparse-attention"), ((Evictor(),), "compresses before attention only")],
    ids=["two sparse methods", "a cache method that a decoder cannot ask"],
)
def test_impossible_combinations_are_refused_with_reasons(model: nn.Module, methods: tuple, reason: str) -> None:
    before = snapshot(model)
    with pytest.raises(accel.UnsupportedError) as caught:
        accel.apply(model, *methods)
    assert any(reason in r for r in caught.value.reasons)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "a path", None], ids=["plain module", "string", "nothing"])
def test_what_is_no_transformers_model_is_refused(thing: object) -> None:
    with pytest.raises(accel.UnsupportedError, match="cannot patch an object of type"):
        accel.apply(thing, Window())


def test_a_recipe_applies_like_its_methods(model: nn.Module) -> None:
    with accel.apply(model, accel.Recipe(methods=(Window(min_seq_len=7),))) as handle:
        assert handle.methods == (Window(min_seq_len=7),)


@torch.no_grad()
def test_calls_below_min_seq_len_run_dense_bit_for_bit_and_are_counted(model: nn.Module, ids: Tensor) -> None:
    dense = model(ids).logits
    with accel.apply(model, Window(min_seq_len=101)) as handle:
        assert torch.equal(model(ids).logits, dense)
        assert handle.stats.total.dense_calls == {"shorter than 101 tokens": 3}


@torch.no_grad()
def test_a_prompt_past_the_models_positions_runs_dense(ids: Tensor) -> None:
    model = tiny_llama(max_position_embeddings=64)
    dense = model(ids).logits
    with accel.apply(model, Window(min_seq_len=0)) as handle:
        assert torch.equal(model(ids).logits, dense)
        assert handle.stats.total.dense_calls == {"longer than the model's 64 positions": 3}


@torch.no_grad()
def test_an_observer_sees_every_sparse_plan(model: nn.Module, ids: Tensor) -> None:
    seen = []
    with accel.apply(model, Window(min_seq_len=0)) as handle, handle.observe(lambda **event: seen.append(event)):
        model(ids)
    assert [event["step"].layer for event in seen] == [0, 1, 2]
    assert all(event["plan"] == ImplicitPlan(16, 1, 1, powers=False) for event in seen)


def test_gradients_flow_through_a_trainable_method(model: nn.Module, ids: Tensor) -> None:
    weight = model.model.layers[0].self_attn.k_proj.weight
    model(ids, labels=ids).loss.backward()
    dense_gradient = weight.grad.clone()
    with accel.apply(model, Window(min_seq_len=0, window_blocks=99)):
        weight.grad = None
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(weight.grad, dense_gradient, rtol=1e-4, atol=1e-7)


def test_a_method_without_gradients_refuses_the_backward_pass(model: nn.Module, ids: Tensor) -> None:
    with accel.apply(model, "random_blocks", min_seq_len=0, block_size=16, density=0.5):
        loss = model(ids, labels=ids).loss
        with pytest.raises(accel.UnsupportedError, match="no gradients"):
            loss.backward()


@torch.no_grad()
def test_stats_survive_a_reset_in_the_middle(model: nn.Module, ids: Tensor) -> None:
    with accel.apply(model, Window(min_seq_len=0)) as handle:
        model(ids)
        handle.stats.reset()
        model(ids)
        assert handle.stats.total.sparse_calls == 3
        # 7 blocks a side: sink and own block in every row, so 1 + 6 · 2 of 28 tiles
        assert handle.stats.density == pytest.approx(13 / 28)


def test_a_model_thrown_away_while_patched_is_freed(ids: Tensor) -> None:
    model = tiny_llama()
    before = len(LAYERS)
    accel.apply(model, Window(min_seq_len=0))
    assert len(LAYERS) == before + 3
    attention = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert attention() is None
    assert len(LAYERS) == before


@torch.no_grad()
def test_the_handle_may_be_dropped_while_the_model_stays_patched(model: nn.Module, ids: Tensor) -> None:
    dense = model(ids).logits
    accel.apply(model, Window(min_seq_len=0))
    gc.collect()
    assert (model(ids).logits - dense).abs().max() > 1e-3


@torch.no_grad()
def test_another_attention_chosen_while_patched_is_reported_and_kept(model: nn.Module, ids: Tensor) -> None:
    handle = accel.apply(model, Window(min_seq_len=0))
    model.set_attn_implementation("eager")
    assert "set to 'eager' since" in handle.report()
    handle.undo()
    assert model.config._attn_implementation == "eager"
    with accel.apply(model, Window(min_seq_len=0)) as again:
        model(ids)
        assert again.stats.total.sparse_calls == 3
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [Window(min_seq_len=0), accel.PowerAttention(is_adapted=True, block_size=16, min_seq_len=0)], ids=["prefill", "decode"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_sparse_in_its_own_type(model: nn.Module, ids: Tensor, method: SparseAttention, dtype: torch.dtype) -> None:
    with accel.apply(model, method) as handle:
        exact = model.generate(ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True).logits[-1]
        handle.stats.reset()
        with torch.autocast("cpu", dtype):
            half = model.generate(ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True).logits[-1]
        assert handle.stats.total.sparse_calls >= 3
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.05)


@torch.no_grad()
def test_a_decoding_step_with_a_mask_of_its_own_is_followed_row_by_row(model: nn.Module) -> None:
    ids = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[0, ..., 35:] = False

    def decode() -> Tensor:
        cache = DynamicCache(config=model.config)
        model(ids[:, :39], past_key_values=cache)
        return model(ids[:, 39:], attention_mask=mask, past_key_values=cache, position_ids=torch.full((2, 1), 39)).logits

    dense = decode()
    for method in (accel.Dense(dense_kernel="accel"), accel.PowerAttention(is_adapted=True, min_seq_len=0)):
        with accel.apply(model, method):
            torch.testing.assert_close(decode(), dense, atol=1e-6, rtol=1e-5)


def test_a_failing_notice_leaves_the_model_untouched(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model)
    monkeypatch.setattr(Window, "notice", lambda self, info: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accel.apply(model, Window())
    assert snapshot(model) == before


def test_a_model_without_attention_is_refused_with_the_reason() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(accel.UnsupportedError, match="attention"):
        accel.apply(mamba, "flexprefill")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_layers": [-1]}, "dense_layers"),
        ({"dense_layers": "01"}, "dense_layers"),
        ({"dense_layers": 3}, "dense_layers"),
        ({"min_seq_len": True}, "min_seq_len"),
        ({"min_seq_len": 0.5}, "min_seq_len"),
        ({"min_seq_len": "4k"}, "min_seq_len"),
    ],
    ids=str,
)
def test_shared_options_out_of_range_raise(options: dict, message: str) -> None:
    with pytest.raises(accel.OptionError, match=message):
        Window(**options)


def test_dense_layers_that_do_not_exist_are_refused(model: nn.Module) -> None:
    with pytest.raises(accel.UnsupportedError, match="names 99"):
        accel.apply(model, Window(dense_layers=(0, 99)))


@torch.no_grad()
def test_scaled_rotary_positions_count(ids: Tensor) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_llama(max_position_embeddings=64, rope_parameters=rope)
    with accel.apply(model, Window(min_seq_len=0)) as handle:
        model(ids)
        assert handle.stats.total.sparse_calls == 3
