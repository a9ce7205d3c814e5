"""Every method in every family: equal to dense attention over the same blocks, honest about what stayed dense, gone after undo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conformance.families import FAMILIES
from conformance.methods import METHODS, SPARSE_METHODS, EveryBlock, MethodCase
from conformance.reference import assert_bit_equal, assert_same, deviation, recorded, reference, run
from conformance.subjects import snapshot, subject
from torch import nn

import accel
from accel.handle import Handle
from accel.patches.hosts.transformers.layers import attention_modules

sparse_families = pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.is_sparse])
dense_families = pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if not f.is_sparse])
every_family = pytest.mark.parametrize("name", list(FAMILIES))
sparse_methods = pytest.mark.parametrize("case", SPARSE_METHODS, ids=str)
every_method = pytest.mark.parametrize("case", METHODS, ids=str)


def test_the_matrix_is_as_large_as_promised() -> None:
    assert len(FAMILIES) >= 20
    assert sum(f.has_images for f in FAMILIES.values()) >= 12
    assert {"dense", "flexprefill", "powerattention", "random_blocks", "streaming"} <= {case.cls.method_name() for case in METHODS}


@contextmanager
def calls_per_layer(model: nn.Module) -> Iterator[Counter[int]]:
    """Calls of each attention module of the decoder, counted from outside."""
    calls: Counter[int] = Counter()
    hooks = [
        m.register_forward_hook(lambda module, args, output: calls.update([module.layer_idx])) for m in attention_modules(model.get_decoder())
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def counted(handle: Handle) -> dict[int, int]:
    return {layer: s.sparse_calls + s.dense_calls.total() for layer, s in handle.stats.layers.items()}


@sparse_families
@sparse_methods
def test_a_sparse_run_equals_dense_attention_over_the_same_blocks(name: str, case: MethodCase) -> None:
    it = subject(name)
    with accel.apply(it.model, case.sparse()) as handle, recorded(handle) as plans, calls_per_layer(it.model) as calls:
        got = run(it.model, it.inputs)
    with reference(it.model, plans):
        want = run(it.model, it.inputs)
    assert_same(got, want)
    # otherwise the equality above says nothing
    assert deviation(want, it.dense) > 1e-3
    assert handle.stats.total.sparse_calls == sum(len(c) for c in plans.values()) > 0
    assert 0 < handle.stats.density < 1
    assert counted(handle) == calls
    assert_bit_equal(run(it.model, it.inputs), it.dense)


@sparse_families
def test_the_kernel_over_every_block_equals_the_plain_model(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, EveryBlock()) as handle:
        got = run(it.model, it.inputs)
    assert_same(got, it.dense)
    # forward, prefill and the decoding steps
    assert handle.stats.total.sparse_calls >= 6
    assert handle.stats.density == 1


@sparse_families
@every_method
def test_keeping_everything_equals_dense(name: str, case: MethodCase) -> None:
    it = subject(name)
    with accel.apply(it.model, case.keep_all()):
        assert_same(run(it.model, it.inputs), it.dense)


@dense_families
@every_method
def test_what_cannot_be_sparse_runs_untouched_with_a_reason(name: str, case: MethodCase) -> None:
    it = subject(name)
    before = snapshot(it.model)
    try:
        handle = accel.apply(it.model, case.sparse())
    except accel.UnsupportedError as refusal:
        # a method may refuse a model without a single layer for it
        assert refusal.reasons  # noqa: PT017 - either outcome is right, each with its own check
        assert snapshot(it.model) == before
        return
    with handle, calls_per_layer(it.model) as calls:
        logits = it.model(**it.inputs).logits
    assert torch.equal(logits, it.dense.logits)
    assert handle.stats.total.sparse_calls == 0
    assert any(it.family.dense_reason in reason for reason in handle.stats.total.dense_calls)
    assert counted(handle) == calls


@every_family
def test_our_dense_path_equals_the_models_own(name: str) -> None:
    it = subject(name)
    with accel.apply(it.model, "dense", dense_kernel="accel") as handle:
        assert_same(run(it.model, it.inputs), it.dense)
    if it.family.is_sparse:
        assert handle.stats.total.dense_calls["dense control"] > 0


@every_family
@every_method
@torch.no_grad()
def test_undo_gives_back_the_same_objects(name: str, case: MethodCase) -> None:
    it = subject(name)
    before = snapshot(it.model)
    try:
        handle = accel.apply(it.model, case.sparse())
    except accel.UnsupportedError:
        assert snapshot(it.model) == before
        return
    assert snapshot(it.model) != before
    sparse = it.model(**it.inputs).logits
    handle.undo()
    handle.undo()
    assert snapshot(it.model) == before
    assert torch.equal(it.model(**it.inputs).logits, it.dense.logits)
    assert torch.equal(sparse, it.dense.logits) != (it.family.is_sparse and case.is_ever_sparse)
