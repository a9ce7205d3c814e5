"""The fine-tuning example: its steps lower the loss, and its gradients are those of dense attention under the same mask."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import accel
from accel.kernels.block_sparse import Rows
from accel.kernels.block_sparse.differentiable import token_mask

METHOD = accel.PowerAttention(block_size=16, is_adapted=True, min_seq_len=0)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "finetune_powerattention.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_passkeys_are_learnt_at_the_last_token_only(example: ModuleType) -> None:
    data = example.Passkeys(20, 50, vocab_size=64, seed=0)
    for row in data:
        ids, labels = row["input_ids"], row["labels"]
        assert labels[-1] == ids[-1]
        assert (labels[:-1] == example.IGNORED).all()
        assert ids[-2] == example.QUESTION
        # the answer stands in the text once, and nothing else looks like one
        is_key = (ids[:-1] >= example.PASSKEYS.start) & (ids[:-1] < example.PASSKEYS.stop)
        assert ids[:-1][is_key].tolist() == [ids[-1]]


def test_four_steps_on_the_same_rows_lower_the_loss(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = example.tiny_llama()
    data = example.Passkeys(8, 160, vocab_size=64, seed=0)
    with accel.apply(model, METHOD) as handle:
        losses = example.finetune(model, data, steps=4, batch_size=8, learning_rate=4e-3)
        # the Trainer counts nothing but our sparse calls: three layers, four steps
        assert handle.stats.total.dense_calls == {}
        assert handle.stats.total.sparse_calls == 12
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1


def test_gradients_are_those_of_dense_attention_with_the_mask(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = example.tiny_llama()
    ids = example.Passkeys(2, 150, vocab_size=64, seed=0).ids
    step = None  # the pattern asks nothing of a step
    mask = token_mask(METHOD.static_pattern(step), Rows(0, 0, 150, 150))[None]
    model(ids, labels=ids, attention_mask=mask).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with accel.apply(model, METHOD):
        model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    first = "model.layers.0.self_attn.v_proj.weight"
    assert (dense[first] - want[first]).abs().max() > 100 * (model.get_parameter(first).grad - want[first]).abs().max()
