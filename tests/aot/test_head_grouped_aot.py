"""Machine code of the head-group kernels for the tiles that the launcher chooses: tensor cores, asynchronous copies, no spills in a loop."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from aot.aot_support import SHARED_BYTES, Code, compile_kernel

from accel.kernels.block_sparse.triton_decode import DecodeConfig
from accel.kernels.block_sparse.triton_launch import choose_config, fit
from accel.kernels.head_grouped import triton_kernels as kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES = pytest.mark.parametrize("sm", [80, 90, 100], ids=lambda sm: f"sm{sm}")


def _compiled(kernel: Any, constants: dict[str, Any], dtype: str, *, has_lengths: bool, has_lse: bool, **options: Any) -> Code:
    absent = [] if has_lengths else ["len0_ptr", "len1_ptr"]
    absent += [] if has_lse else ["lse_ptr"]
    constants = {**constants, **dict.fromkeys(absent)}
    signature = {name: "i32" for name in kernel.arg_names if name not in constants}
    for name in signature:
        if name.endswith("_ptr"):
            signature[name] = {"lse_ptr": "*fp32", "part_ptr": "*fp32"}.get(name, "*i32" if name[0] in "lhc" else f"*{dtype}")
        elif name in ("scale_log2", "cap_log2", "cap_scale"):
            signature[name] = "fp32"
    return compile_kernel(kernel, signature, constants, **options)


def _sizes(head_dim: int, group: int, softcap: bool) -> dict[str, Any]:
    padded = max(16, 1 << (head_dim - 1).bit_length())
    return {"HQ": 8 * group, "G": group, "D": head_dim, "BLOCK_D": padded, "SOFTCAP": softcap, "UPCAST": False}


def prefill(
    sm: int, head_dim: int, dtype: str = "bf16", *, group: int = 1, n_rows: int = 4096, softcap: bool = False,
    has_lengths: bool = False, has_lse: bool = False,
) -> Code:
    sizes = _sizes(head_dim, group, softcap)
    tile = fit(choose_config(sizes["BLOCK_D"], DTYPES[dtype], shared_bytes=SHARED_BYTES[sm], major=sm // 10), n_rows)
    return _compiled(
        kernels.head_grouped_fwd_kernel, {**sizes, "ROWS": tile.rows, "COLS": tile.cols, "PRECISION": tile.precision}, dtype,
        has_lengths=has_lengths, has_lse=has_lse, sm=sm, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip


def decode(
    sm: int, head_dim: int, dtype: str = "bf16", *, group: int = 4, n_rows: int = 1, softcap: bool = False,
    has_lengths: bool = True, has_lse: bool = False,
) -> Code:
    tile = DecodeConfig.of_shape(group * n_rows, head_dim, DTYPES[dtype].itemsize, 128)
    shape = {"N_M": -(-group * n_rows // tile.block_m), "ROWS": tile.block_m, "COLS": tile.block_n, "PRECISION": "ieee"}
    return _compiled(
        kernels.head_grouped_decode_kernel, {**_sizes(head_dim, group, softcap), **shape}, dtype,
        has_lengths=has_lengths, has_lse=has_lse, sm=sm, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip


def _check(code: Code) -> None:
    assert code.loop_spills == 0, code
    # what is put aside before the loops and fetched behind them
    assert code.spills <= 32, code
    assert code.shared <= SHARED_BYTES[code.sm], code
    # keys and values arrive ahead of time, in 16-byte pieces that pass no register
    assert code.ldgsts > 0, code
    assert len(re.findall(r"LDGSTS\S*\.128", code.sass)) == code.ldgsts
    assert "ttg.async_wait" in code.ttgir


PREFILLS: dict[str, dict[str, Any]] = {
    "D64": {"head_dim": 64, "has_lse": True},
    "D80": {"head_dim": 80},
    "D96-fp16": {"head_dim": 96, "dtype": "fp16", "has_lengths": True},
    "D128": {"head_dim": 128},
    "D128-everything": {"head_dim": 128, "group": 4, "softcap": True, "has_lengths": True, "has_lse": True},
    "D256": {"head_dim": 256, "group": 4},
}


@pytest.mark.parametrize("shape", PREFILLS.values(), ids=PREFILLS.keys())
def test_prefill_on_hopper(shape):
    code = prefill(90, **shape)
    _check(code)
    assert code.hgmma > 0, code
    assert code.hmma == 0, code
    assert not code.is_serialized, code
    if shape["head_dim"] == 64:
        assert code.blocks_per_sm >= 2, code


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sm", [80, pytest.param(100, marks=pytest.mark.slow)], ids=lambda sm: f"sm{sm}")
def test_prefill_elsewhere(sm, head_dim):
    code = prefill(sm, head_dim)
    _check(code)
    assert (code.hmma if sm == 80 else code.utcmma) > 0, code


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@ARCHITECTURES
def test_fp32_prefill(sm, head_dim):
    _check(prefill(sm, head_dim, "fp32"))


def test_a_small_scale_takes_a_small_tile():
    code = prefill(90, 128, n_rows=25)
    _check(code)
    assert code.blocks_per_sm >= 2, code


DECODES: dict[str, dict[str, Any]] = {
    "D64": {"head_dim": 64},
    "D80": {"head_dim": 80, "group": 1},
    "D96-fp16": {"head_dim": 96, "dtype": "fp16", "has_lengths": False},
    "D128": {"head_dim": 128},
    "D128-everything": {"head_dim": 128, "group": 8, "n_rows": 4, "softcap": True, "has_lse": True},
    "D256": {"head_dim": 256, "group": 8},
    "D256-fp32": {"head_dim": 256, "dtype": "fp32"},
}
ELSEWHERE = ("D128", "D256", "D256-fp32")


@pytest.mark.parametrize(("shape", "sm"), [(shape, 90) for shape in DECODES] + [(shape, sm) for sm in (80, 100) for shape in ELSEWHERE])
def test_decode_leaves_room_for_two_programs(shape, sm):
    code = decode(sm, **DECODES[shape])
    _check(code)
    assert code.spills == 0, code
    assert code.blocks_per_sm >= 2, code
    assert code.hmma > 0 or DECODES[shape].get("dtype") == "fp32", code


def test_the_last_arrival_sees_every_part():
    before, _, after = decode(90, 128).sass.partition("ATOMG")
    assert after, "no arrival counter"
    # all threads' stores, then a barrier, a fence, the arrival; its acquire drops the L1, a barrier hands the count on
    assert re.search(r"STG.*BAR\.SYNC.*MEMBAR\S*GPU", before, re.DOTALL)
    assert re.search(r"CCTL\.IVALL.*BAR\.SYNC.*LDG", after, re.DOTALL)
