"""Users set torch's default dtype while they load weights, and forget it: every method counts and sums as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conformance.kv_runs import METHODS as CACHE_METHODS
from conformance.kv_runs import small
from conformance.methods import METHODS
from conformance.pruning_runs import inputs_of
from conformance.subjects import subject
from torch import Tensor

import accel
from accel.evals.models import load_model
from accel.protocols import KVCompression, Method, TokenPruning
from accel.registry import build, method_class, method_names

# of those that need one
OPTIONS = {"exit_layer": 2}


def with_option(name: str) -> Method:
    known = method_class(name).__dataclass_fields__
    return build(name, {option: value for option, value in OPTIONS.items() if option in known})


PRUNING = [name for name in method_names() if issubclass(method_class(name), TokenPruning)]
SCALES = [name for name in method_names() if issubclass(method_class(name), KVCompression)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_default_dtype_is_no_matter(model: object, method: Method, call: Callable[[], Tensor]) -> None:
    with accel.apply(model, method), torch.no_grad():
        wanted = call()
        for dtype in (torch.bfloat16, torch.float64):
            with default_dtype(dtype):
                assert torch.equal(call(), wanted)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_sparse_attention(case) -> None:
    it = subject("llama")
    assert_default_dtype_is_no_matter(it.model, case.sparse(), lambda: it.model(**it.inputs).logits)


@pytest.mark.parametrize("name", PRUNING)
def test_visual_tokens(name: str) -> None:
    model = subject("llava").model
    assert_default_dtype_is_no_matter(model, with_option(name), lambda: model(**inputs_of("llava")).logits)


@pytest.mark.parametrize("name", CACHE_METHODS)
def test_caches_of_language_models(name: str) -> None:
    it = subject("llama")

    def call() -> Tensor:
        out = it.model.generate(**it.inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
        return torch.cat(out.logits)

    assert_default_dtype_is_no_matter(it.model, small(name), call)


@pytest.mark.parametrize("name", SCALES)
def test_caches_of_image_models(name: str) -> None:
    model = load_model("small-var").model
    assert_default_dtype_is_no_matter(model, build(name, {}), lambda: model.generate([1, 2], seed=[0, 1], output="tensor"))
