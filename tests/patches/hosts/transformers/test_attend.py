"""A static cache's counter on a GPU is never read by the host; what is computed is the same as if it were."""

from __future__ import annotations

import pytest
import torch
from support import NoHostReads, tiny_llama

import accel
from accel.patches.hosts.transformers import attend as attend_module
from accel.patches.hosts.transformers.attend import Call, attend
from accel.patches.hosts.transformers.layers import LAYERS, SLOT


@pytest.fixture
def state():
    model = tiny_llama()
    with accel.apply(model, "powerattention", block_size=16, window_blocks=1, sink_blocks=0, is_adapted=True, min_seq_len=0) as handle:
        module = model.model.layers[0].self_attn
        yield LAYERS[getattr(module, SLOT).key]
        assert handle.is_active


def call(offset, *, length=80, filled=150, size=192, valid=None):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, length, 16, generator=g)
    k, v = (torch.randn(2, 2, size, 16, generator=g) for _ in range(2))
    # keys that do not exist yet
    k[:, :, filled:], v[:, :, filled:] = torch.nan, torch.nan
    return Call(q, k, v, valid, offset, 0.25, None)


@pytest.mark.parametrize("length", [80, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("left", [None, 7], ids=["no_padding", "left_padding"])
def test_a_counter_in_a_tensor_gives_what_the_number_gives(state, length, left):
    valid = None if left is None else (torch.arange(192) >= torch.tensor([[0], [left]])) & (torch.arange(192) < 150)
    offset = 150 - length
    want = attend(state, call(offset, length=length, valid=valid))
    got = attend(state, call(torch.tensor(offset), length=length, valid=valid))
    assert want.isfinite().all()
    assert torch.equal(got, want)
    assert state.stats.sparse_calls == 2


def test_the_counter_is_not_read(state, monkeypatch):
    seen = []

    def kernel(q, keys, plan, lens, **options):
        seen.append((keys.kv_len, lens.max_kv, plan))
        return torch.zeros_like(q)

    monkeypatch.setattr(attend_module, "block_sparse_attention", kernel)
    monkeypatch.setattr(state.stats, "count_sparse", lambda tiles, **options: None)
    with NoHostReads():
        attend(state, call(torch.tensor(70)))
    [(kv_len, max_kv, plan)] = seen
    assert kv_len.tolist() == [150, 150]
    assert max_kv == 192, "all that shapes tell"
    assert plan.block_size == 16


def test_dense_by_shape_is_decided_before_anything_is_laid_out(monkeypatch):
    model = tiny_llama()
    with accel.apply(model, "flexprefill", block_size=16, min_seq_len=0):
        state = LAYERS[getattr(model.model.layers[0].self_attn, SLOT).key]
        monkeypatch.setattr(attend_module, "as_tokens", lambda call: pytest.fail("padding was looked at"))
        attend(state, call(torch.tensor(149), length=1, valid=torch.arange(192).expand(2, -1) < 150))
        assert sum(state.stats.dense_calls.values()) == 1


@pytest.mark.parametrize("options", [{"method": "streaming", "density": 0.4}, {"method": "random_blocks"}], ids=lambda o: o["method"])
def test_a_plan_drawn_on_the_host_reaches_the_kernel_on_the_device_of_the_queries(options):
    model = tiny_llama()
    with accel.apply(model, **options, block_size=16, min_seq_len=0):
        state = LAYERS[getattr(model.model.layers[0].self_attn, SLOT).key]
        host = call(70)
        _, keys, lens = attend_module.as_tokens(host)
        # a device whose tensors mix with the host's as little as a GPU's do
        plan = attend_module._plan(state, host, torch.empty(160, 4, 16, device="meta"), keys, lens)
    tensors = [value for value in vars(plan).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize("offset", [70, torch.tensor(70)], ids=["number", "tensor"])
def test_batches_without_padding_are_known_to_have_no_gaps(offset):
    q, _, lens = attend_module.as_tokens(call(offset))
    assert lens.n_gapless == q.shape[0] == 160
    assert {row for rows in lens.rows() for row in range(rows.q_start, rows.q_start + rows.q_len)} == set(range(160))
    # the last tokens of the first row are padding: only its tensors say so
    padded = call(offset, valid=torch.arange(192) < torch.tensor([[120], [150]]))
    assert attend_module.as_tokens(padded)[2].n_gapless == 0
