"""The compiled probe sums the same attention as the definition, and the selection made from it is the same."""

from __future__ import annotations

import pytest
import torch

from accel.kernels.block_sparse import ContiguousKeys, Ragged, Rows, cpu_native
from accel.kernels.block_sparse.cpu_native import why_unavailable
from accel.kernels.block_sparse.cpu_probe import NATIVE
from accel.kernels.flex_index import SelectionRule, cpu, flex_index, naive
from accel.kernels.flex_index.probe import run_native_probe, run_probe

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no compiled kernel: {why_unavailable()}")


def inputs(L, N, Hq=4, Hkv=2, D=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(L, Hq, D, generator=g).bfloat16() * 2, torch.randn(Hkv, N, D, generator=g).bfloat16(), Rows(0, 0, L, N)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(
    "L, N, block, Hq, Hkv, D",
    [
        (300, 300, 32, 4, 2, 64), (17, 100, 32, 2, 1, 16), (129, 1009, 64, 3, 1, 80),
        (5, 1000, 128, 2, 2, 128), (70, 170, 24, 4, 2, 2), (1, 1, 16, 1, 1, 8),
    ],
)
def test_sums_equal_the_definition(L, N, block, Hq, Hkv, D, softcap):
    q, k, rows = inputs(L, N, Hq, Hkv, D)
    got = run_native_probe(q, k, rows, block_size=block, scale=D**-0.5, softcap=softcap)
    for h in range(Hq):
        attention = naive.probe_attention(q[:, h].double(), k[h // (Hq // Hkv)].double(), rows, block, D**-0.5, softcap)
        assert (got.column_mass[h] - attention.mean(0)).abs().max() <= 1e-6
        assert (got.distance_mass[h] - naive.distance_mass(attention)).abs().max() <= 1e-6
    by_torch = run_probe(q.float(), k.float(), rows, block_size=block, scale=D**-0.5, softcap=softcap)
    assert got.tile_mass.shape == by_torch.tile_mass.shape
    assert (got.tile_mass - by_torch.tile_mass).abs().max() <= 1e-6
    assert torch.equal(got.mean_query, by_torch.mean_query)
    assert torch.equal(got.mean_keys, by_torch.mean_keys)


def test_many_kv_heads_are_packed_in_turn(monkeypatch):
    q, k, rows = inputs(100, 300, Hq=10, Hkv=5)
    whole = run_native_probe(q, k, rows, block_size=32, scale=0.2, softcap=None)
    monkeypatch.setattr(cpu_native, "PACK_BYTES", 2 * 2 * 320 * 32)
    parts = run_native_probe(q, k, rows, block_size=32, scale=0.2, softcap=None)
    assert torch.equal(parts.column_mass, whole.column_mass)
    assert torch.equal(parts.distance_mass, whole.distance_mass)


@pytest.mark.parametrize("at", ["q", "k"])
def test_a_nan_spoils_its_own_head_only(at):
    q, k, rows = inputs(64, 200)
    if at == "q":
        q[-3, 1] = torch.nan
    else:
        k[0, 20] = torch.nan
    probe = run_native_probe(q, k, rows, block_size=32, scale=0.2, softcap=None)
    spoilt = [False, True, False, False] if at == "q" else [True, True, False, False]
    assert probe.column_mass.sum(-1).isnan().tolist() == spoilt


def test_the_selection_takes_it_and_chooses_what_the_definition_chooses(monkeypatch):
    q, k, _ = inputs(300, 400, seed=3)
    # logits of spread 12, so that few blocks matter
    q = q * 3
    keys = ContiguousKeys.from_cache(k[None], k[None])
    taken = []
    monkeypatch.setattr(cpu, "route_for", lambda *_, **__: NATIVE)
    monkeypatch.setattr(cpu, "run_native_probe", lambda *a, **o: taken.append(1) or run_native_probe(*a, **o))
    rule = SelectionRule(block_size=16, gamma=0.9, min_budget=32)
    found, want = (flex_index(q, keys, Ragged.of([300], [400]), rule=rule, scale=0.2, impl=impl).plan for impl in ("cpu", "naive"))
    assert taken
    assert torch.equal(found.vertical, want.vertical)
    assert torch.equal(found.slash, want.slash)
    assert 0 < found.vertical.float().mean() < 0.9


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_the_default_dtype_of_torch_changes_nothing(default_dtype, dtype):
    # the kernel wrote fp32 into buffers of the default dtype: with bf16 past their end
    q, k, rows = inputs(100, 300)
    want = run_native_probe(q, k, rows, block_size=32, scale=0.2, softcap=None)
    default_dtype(dtype)
    got = run_native_probe(q, k, rows, block_size=32, scale=0.2, softcap=None)
    assert got.column_mass.dtype == torch.float32
    assert torch.equal(got.column_mass, want.column_mass)
    assert torch.equal(got.distance_mass, want.distance_mass)
