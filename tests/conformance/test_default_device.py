"""Users set torch's default device and forget it: nothing of ours lands there. "meta" stands for a GPU, for it mixes with no other device either."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conformance.families import words
from conformance.kv_runs import METHODS as CACHE_METHODS
from conformance.kv_runs import small
from conformance.methods import METHODS, SPARSE_METHODS, MethodCase
from conformance.pruning_runs import VLMS, inputs_of
from conformance.reference import assert_bit_equal, assert_same, recorded, reference, run
from conformance.subjects import subject
from conformance.test_default_dtype import PRUNING, with_option
from next_scale import last_logits, tiny_infinity, tiny_var
from support import tiny_llama
from torch import Tensor

import accel
from accel.patches.hosts.transformers import op
from accel.patches.hosts.transformers.pruning.families.qwen2_5_vl import Qwen25VL
from accel.protocols import Method
from accel.registry import build

pytestmark = pytest.mark.usefixtures("open_operator")
# whose plain models take no other default device than their own
UNABLE = ("gemma3 vlm", "qwen2.5 vl")


@pytest.fixture
def open_operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of operators torch 2.13 forgets the default device, and torch 2.11 does not."""
    if "gradient" not in request.node.name:
        monkeypatch.setattr(torch.ops.accel, "attention", op.attention._init_fn)


def assert_default_device_is_no_matter(model: object, method: Method, inputs: Mapping[str, Tensor]) -> None:
    with accel.apply(model, method):
        wanted = run(model, inputs)
    with torch.device("meta"), accel.apply(model, method):
        got = run(model, inputs)
    assert_bit_equal(got, wanted)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded batch"])
@pytest.mark.parametrize("name", ["llama", "gpt neox"])
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_sparse_attention(name: str, case: MethodCase, is_padded: bool) -> None:
    inputs = dict(subject(name).inputs)
    if is_padded:
        inputs = {"input_ids": words().repeat(2, 1), "attention_mask": torch.ones(2, words().shape[1], dtype=torch.int64)}
        inputs["attention_mask"][1, :37] = 0
    assert_default_device_is_no_matter(subject(name).model, case.sparse(), inputs)


@pytest.mark.parametrize("case", SPARSE_METHODS, ids=str)
def test_a_sparse_run_equals_dense_attention_over_the_same_blocks(case: MethodCase) -> None:
    it = subject("llama")
    with torch.device("meta"):
        with accel.apply(it.model, case.sparse()) as handle, recorded(handle) as plans:
            got = run(it.model, it.inputs)
        with reference(it.model, plans):
            want = run(it.model, it.inputs)
    assert_same(got, want)
    assert not torch.equal(want.logits, it.dense.logits)


@pytest.mark.parametrize("case", [case for case in SPARSE_METHODS if case.cls.trainable], ids=str)
def test_gradients(case: MethodCase) -> None:
    model, ids = tiny_llama(), words() % 64

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    with accel.apply(model, case.sparse()):
        wanted = gradient()
        with torch.device("meta"):
            assert torch.equal(gradient(), wanted)


@pytest.mark.parametrize("name", PRUNING)
def test_visual_tokens(name: str) -> None:
    assert_default_device_is_no_matter(subject("llava").model, with_option(name), inputs_of("llava"))


@pytest.mark.parametrize("method", ["fastervlm", "fastv"])
@pytest.mark.parametrize("name", [name for name in VLMS if name not in ("llava", *UNABLE)])
def test_families_of_vision_language_models(name: str, method: str) -> None:
    assert_default_device_is_no_matter(subject(name).model, build(method, {}), inputs_of(name))


def test_the_windows_of_qwen2_5_vl() -> None:
    vision = SimpleNamespace(spatial_merge_size=2, window_size=32, patch_size=4)
    wanted = Qwen25VL().order(vision, 6, 7)
    with torch.device("meta"):
        assert torch.equal(Qwen25VL().order(vision, 6, 7), wanted)


@pytest.mark.parametrize("name", CACHE_METHODS)
def test_caches_of_language_models(name: str) -> None:
    assert_default_device_is_no_matter(subject("llama").model, small(name), subject("llama").inputs)


@pytest.mark.parametrize("method", [None, "h2o", "snapkv", "streaming_kv", "random_kv", "cake"])
@pytest.mark.parametrize("kind", ["var", "infinity"])
def test_image_models_and_their_caches(kind: str, method: str | None) -> None:
    model = tiny_var() if kind == "var" else tiny_infinity()
    torch.manual_seed(0)
    prompt, options = ([1, 2], {}) if kind == "var" else ([torch.randn(3, 24)], {"schedule": [1, 2, 3]})
    with nullcontext() if method is None else accel.apply(model, method, keep=0.5):
        wanted = last_logits(model, prompt, guidance_scale=2.0, **options)
        with torch.device("meta"):
            assert torch.equal(last_logits(model, prompt, guidance_scale=2.0, **options), wanted)
