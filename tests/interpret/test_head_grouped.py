"""The head-group kernels in the interpreter, against their definition in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.evals.gpu.head_groups import GroupCall
from accel.kernels.block_sparse.triton_decode import DecodeConfig
from accel.kernels.block_sparse.triton_launch import PrefillConfig
from accel.kernels.block_sparse.triton_workspace import workspace
from accel.kernels.head_grouped import KVGroup, dispatches, grouped_attention, triton_kernels
from accel.kernels.head_grouped.triton_launch import triton_grouped

FP32, FP16 = torch.float32, torch.float16
FLOORS = {FP32: 2e-6, FP16: 1e-3}
SMALL = PrefillConfig(rows=16, cols=16, num_warps=4, num_stages=1)


def run(call: GroupCall, config: PrefillConfig | DecodeConfig | None = None, *, wants_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Into buffers full of NaN."""
    out, lse = torch.full_like(call.q, torch.nan), torch.full(call.q.shape[:3], torch.nan)
    triton_grouped(
        call.q, call.groups, scale=call.scale, softcap=call.softcap, n_causal=call.n_causal, out=out, lse=lse if wants_lse else None, config=config
    )
    return out, lse


def check(call: GroupCall, config: PrefillConfig | DecodeConfig | None = None) -> None:
    found = run(call, config)
    call.check(found, floor=FLOORS[call.q.dtype])
    without, lse = run(call, config, wants_lse=False)
    assert torch.equal(without, found[0])
    assert lse.isnan().all()


def arrivals() -> list[Tensor]:
    return [t for kept in workspace._kept.values() for (name, *_), t in kept.items() if name == "arrivals"]


def splitting(splits: int | None, **changes: Any) -> DecodeConfig:
    return DecodeConfig(block_n=16, splits=splits, min_tokens=0, **changes)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels that are launched."""
    names: list[str] = []

    class Spy:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in ("head_grouped_fwd_kernel", "head_grouped_decode_kernel"):
        monkeypatch.setattr(triton_kernels, name, Spy(name))
    return names


@pytest.mark.parametrize("has_lengths", [False, True], ids=["dense", "lengths"])
@pytest.mark.parametrize(("each", "n_rows", "n_causal"), [(1, 33, 0), (1, 33, 9), (2, 17, 0), (3, 17, 17)])
def test_tiles_of_rows(each, n_rows, n_causal, has_lengths):
    check(GroupCall.random((50, 16, 9), each=each, n_rows=n_rows, n_causal=n_causal, has_lengths=has_lengths), SMALL)


@pytest.mark.parametrize("splits", [1, 2, 64])
@pytest.mark.parametrize("has_lengths", [False, True], ids=["dense", "lengths"])
@pytest.mark.parametrize(("each", "n_rows", "n_causal"), [(1, 1, 0), (4, 1, 1), (3, 7, 7), (2, 16, 3)])
def test_decoding_with_any_number_of_splits(each, n_rows, n_causal, has_lengths, splits):
    # up to 32 rows in tiles of 16
    call = GroupCall.random((90, 33, 9), each=each, n_rows=n_rows, n_causal=n_causal, has_lengths=has_lengths)
    check(call, splitting(splits))
    assert len(arrivals()) > 0
    assert all(kept.eq(0).all() for kept in arrivals()), "arrivals are not back at zero"


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("n_rows", [1, 18])
def test_head_sizes_with_the_launchers_own_tiles(n_rows, head_dim, dtype):
    check(GroupCall.random((70, 20), heads=((1,), (0,)), batch=1, each=2, n_rows=n_rows, head_dim=head_dim, dtype=dtype, has_lengths=True))


@pytest.mark.parametrize("config", [SMALL, splitting(3)], ids=["rows", "decode"])
def test_softcap(config):
    check(GroupCall.random((50, 16, 9), n_rows=6, softcap=2.0, n_causal=4), config)


@pytest.mark.parametrize("config", [SMALL, splitting(3)], ids=["rows", "decode"])
def test_bf16_is_computed_in_fp32_by_the_interpreter(config):
    # products of bf16 are wrong in the interpreter, and its casts to bf16 truncate: hence fp32 tiles and the floor
    call = GroupCall.random((50, 16, 9), n_rows=5, dtype=torch.bfloat16)
    call.check(run(call, config), floor=1.2e-2)


@pytest.mark.parametrize("is_token_major", [True, False])
@pytest.mark.parametrize("config", [SMALL, splitting(3)], ids=["rows", "decode"])
def test_strides(config, is_token_major):
    call = GroupCall.random((50, 16, 9), n_rows=6, is_token_major=is_token_major)
    check(call, config)
    # K and V in different layouts, every second head of a buffer, a batch that shares one row
    first, second, third = call.groups
    k = first.k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([second.v, second.v], 2).flatten(1, 2)[:, ::2]
    shared = replace(third, k=third.k[:1].expand(2, -1, -1, -1), v=third.v[:1].expand(2, -1, -1, -1))
    check(replace(call, groups=[replace(first, k=k), replace(second, v=wide), shared]), config)


@pytest.mark.parametrize("n_rows", [1, 20])
def test_two_groups_are_one_launch(n_rows, launches):
    name = "head_grouped_decode_kernel" if n_rows == 1 else "head_grouped_fwd_kernel"
    check(GroupCall.random((9, 40), heads=((1, 4, 0), (2, 3)), n_rows=n_rows))
    assert launches == [name] * 2
    launches.clear()
    check(GroupCall.random((9,), heads=((0, 1),), n_rows=n_rows))
    check(GroupCall.random((9, 40, 0), n_rows=n_rows))
    assert launches == [name] * 2 + [name] * 4


@pytest.mark.parametrize("n_rows", [1, 20])
def test_the_order_of_heads_and_groups_does_not_change_the_result(n_rows):
    call = GroupCall.random((40, 12), heads=((0, 1, 2), (3, 4)), n_rows=n_rows, each=2, has_lengths=True)
    want, want_lse = run(call)
    long, short = call.groups
    assert long.length is not None
    order = [2, 0, 1]
    mixed = KVGroup((2, 0, 1), long.k[:, order], long.v[:, order], long.length[:, order])
    for groups in ([mixed, short], [short, mixed]):
        found, lse = run(replace(call, groups=groups))
        assert torch.equal(found, want)
        assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("n_rows", [1, 20])
def test_groups_without_entries_or_heads(n_rows):
    check(GroupCall.random((0, 40), heads=((1,), (0, 2)), n_rows=n_rows))
    check(GroupCall.random((0, 0), heads=((1,), (0, 2)), n_rows=n_rows, n_causal=n_rows))
    call = GroupCall.random((40, 9), heads=((0, 1), ()), n_rows=n_rows)
    found = grouped_attention(call.q, call.groups, scale=call.scale, return_lse=True, impl="triton")
    call.check(found, floor=2e-6)


@pytest.mark.parametrize("config", [SMALL, splitting(2)], ids=["rows", "decode"])
def test_lengths_past_the_tensor_are_clamped(config):
    call = GroupCall.random((40, 9), heads=((0, 1), (2,)), n_rows=5)
    group = replace(call.groups[0], length=torch.tensor([[1000, -5], [40, 3]], dtype=torch.int32))
    within = replace(group, length=torch.tensor([[40, 0], [40, 3]], dtype=torch.int32))
    found, lse = run(replace(call, groups=[group, call.groups[1]]), config)
    replace(call, groups=[within, call.groups[1]]).check((found, lse), floor=2e-6)


def test_the_public_function_counts():
    before = dispatches["triton"]
    call = GroupCall.random((20, 9, 3), n_rows=18)
    call.check(call.run("triton"), floor=2e-6)
    assert dispatches["triton"] == before + 1
