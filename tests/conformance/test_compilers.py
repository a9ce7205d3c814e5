"""torch.compile around every method: one graph, the same numbers, the same counters as without."""

from __future__ import annotations

import pytest
import torch
from conformance.families import FAMILIES
from conformance.methods import METHODS, SPARSE_METHODS, MethodCase
from conformance.reference import ROUNDING
from conformance.subjects import subject
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

import accel
from accel.handle import Handle

every_method = pytest.mark.parametrize("case", [case for case in METHODS if case.variant in ({}, {"is_adapted": True})], ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def calls(handle: Handle) -> dict[int, tuple[int, dict[str, int], int]]:
    return {layer: (s.sparse_calls, dict(s.dense_calls), s.active_tiles) for layer, s in sorted(handle.stats.layers.items())}


# tracing takes seconds: every method on one family, one method on the others
FORWARDS = [*(("llama", case) for case in METHODS), ("gemma3", SPARSE_METHODS[0]), ("mistral sliding", METHODS[0])]


@pytest.mark.parametrize(("name", "case"), FORWARDS, ids=lambda value: str(value))
@torch.no_grad()
def test_a_compiled_forward_is_one_graph_with_the_same_counts(name: str, case: MethodCase) -> None:
    it = subject(name)
    graphs = CompileCounter()
    with accel.apply(it.model, case.sparse()) as handle:
        plain = it.model(**it.inputs).logits
        wanted = calls(handle)
        handle.stats.reset()
        compiled = torch.compile(it.model, backend=graphs, fullgraph=True)
        got = compiled(**it.inputs).logits
        assert calls(handle) == wanted
        compiled(**it.inputs)
        assert handle.stats.total.sparse_calls == 2 * sum(n for n, _, _ in wanted.values())
    assert (got - plain).abs().max() <= ROUNDING * plain.abs().max()
    assert graphs.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_undo_and_pause_reach_a_compiled_model() -> None:
    it = subject("llama")
    compiled = torch.compile(it.model, backend="aot_eager", fullgraph=True)
    dense = compiled(**it.inputs).logits
    with accel.apply(it.model, SPARSE_METHODS[0].sparse()) as handle:
        patched = compiled(**it.inputs).logits
        with handle.paused():
            assert torch.equal(compiled(**it.inputs).logits, dense)
        assert torch.equal(compiled(**it.inputs).logits, patched)
    assert torch.equal(compiled(**it.inputs).logits, dense)
    assert not torch.equal(patched, dense)


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "left padded"])
@every_method
@torch.no_grad()
def test_compiled_generation_on_a_static_cache_equals_the_uncompiled(case: MethodCase, is_padded: bool) -> None:
    # generate leaves its compiled call on the model: not on the shared one
    model, inputs = FAMILIES["llama"].build()
    if is_padded:
        inputs["attention_mask"][:, :20] = 0
    compile_config = CompileConfig(fullgraph=True, backend="eager")
    compile_config._compile_all_devices = True
    greedy = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with accel.apply(model, case.sparse()) as handle:
        want = model.generate(**inputs, **greedy)
        wanted = calls(handle)
        handle.stats.reset()
        got = model.generate(**inputs, **greedy, compile_config=compile_config)
        assert calls(handle) == wanted
    assert torch.equal(got, want)


def test_compilers_leave_the_operators_out_of_cuda_graphs() -> None:
    from accel.patches.hosts.transformers import op

    # a replayed graph would run none of their Python: no plan, no counter, and workspaces that others use by then
    for operator in (op.attention, op.count_dense):
        assert torch.Tag.cudagraph_unsafe in operator._opoverload.tags
