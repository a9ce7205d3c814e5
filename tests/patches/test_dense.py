"""The dense control never plans a block, and lets gradients through."""

from __future__ import annotations

import pytest
import torch
from support import tiny_llama

import accel
from accel.patches.dense import Dense
from accel.protocols import AttentionStep, RunDense


@pytest.mark.parametrize("q_len", [1, 4, 100_000], ids=["decode", "speculative", "prefill"])
def test_every_call_stays_dense_for_the_same_reason(q_len: int) -> None:
    here = AttentionStep(
        layer=3, n_layers=9, batch=2, q_len=q_len, kv_len=100_000, n_heads=4, n_kv_heads=2, head_dim=8, device="cpu", dtype="float32"
    )
    method = Dense(min_seq_len=0, dense_layers=(3,))
    assert method.dense_reason(here) == "dense control"
    assert method.plan(None, None, None) == RunDense("dense control")  # type: ignore[arg-type]
    assert method.static_pattern(here) is None


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["original", "accel"])
def test_it_counts_every_call_and_changes_no_output(kernel: str) -> None:
    model = tiny_llama()
    ids = torch.randint(2, 64, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    dense = model(ids, attention_mask=mask).logits
    text = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with accel.apply(model, Dense(dense_kernel=kernel)) as handle:  # type: ignore[arg-type]
        logits = model(ids, attention_mask=mask).logits
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), text)
        # three layers: one forward, then a prefill and three steps
        assert handle.stats.total.dense_calls == {"dense control": 15}
        assert handle.stats.total.sparse_calls == 0
    if kernel == "original":
        assert torch.equal(logits, dense)
    else:
        torch.testing.assert_close(logits[mask.bool()], dense[mask.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["original", "accel"])
def test_gradients_are_those_of_the_model(kernel: str) -> None:
    model = tiny_llama()
    ids = torch.randint(2, 64, (1, 70), generator=torch.Generator().manual_seed(0))
    weight = model.model.layers[0].self_attn.q_proj.weight
    model(ids, labels=ids).loss.backward()
    want, weight.grad = weight.grad, None
    with accel.apply(model, Dense(dense_kernel=kernel)):  # type: ignore[arg-type]
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-7)
