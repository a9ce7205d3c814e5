"""The decode kernel's machine code for the tiles that the launcher chooses: no spills, two programs per multiprocessor, keys by cp.async."""

from __future__ import annotations

import re
from typing import Any

import pytest
from aot.aot_support import SHARED_BYTES, Code, compile_kernel

from accel.kernels.block_sparse.triton_decode import GAP_ROWS, DecodeConfig, block_sparse_decode_kernel, decode_lists_kernel

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# of pointers that only some calls have, their types
OPTIONAL = {
    "implicit": {},
    "lists": dict.fromkeys(("mask_count_ptr", "mask_index_ptr", "full_count_ptr", "full_index_ptr"), "*i32"),
    "lines": dict.fromkeys(("full_count_ptr", "full_index_ptr"), "*i32"),
}


def compiled(
    *, sm: int, dim: int = 128, kind: str = "implicit", dtype: str = "bf16", page: int = 0, group: int = 4, max_q: int = 1, block: int = 128,
    softcap: bool = False,
) -> Code:
    """What a call of this shape launches, 8 KV heads; per-head lists have one query head per program."""
    pack = group if kind == "implicit" else 1
    tile = DecodeConfig.of_shape(pack * max_q, dim, ITEMSIZE[dtype], block)
    padded = 1 << (dim - 1).bit_length()
    constants: dict[str, Any] = {
        "HQ": 8 * group, "G": group, "PACK": pack, "N_M": -(-pack * max_q // tile.block_m), "N_T": 2 if max_q > 1 and pack == 1 else 1,
        "D": dim, "DV": dim, "BLOCK": block, "PAGE": page, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": padded,
        "BLOCK_DV": padded, "GAP": GAP_ROWS, "IMPLICIT": kind == "implicit", "MULTI": max_q > 1, "SOFTCAP": softcap, "UPCAST": False,
    }
    signature = {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"), "lse_ptr": "*fp32"}
    signature |= dict.fromkeys(("q_start_ptr", "q_len_ptr", "kv_len_ptr"), "*i64")
    signature |= {"part_ptr": "*fp32", "counter_ptr": "*i32", "scale": "fp32", "softcap": "fp32"}
    signature |= {"page_ptr": "*i32"} if page else {"start_ptr": "*i64"}
    signature |= OPTIONAL[kind]
    for name in block_sparse_decode_kernel.arg_names:
        if name not in signature and name not in constants:
            if name.endswith("_ptr"):
                constants[name] = None
            else:
                signature[name] = "i32"
    return compile_kernel(
        block_sparse_decode_kernel, signature, constants, sm=sm, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg
    )


SHAPES: dict[str, dict[str, Any]] = {
    "D64": {"dim": 64},
    "D80": {"dim": 80},
    "D96": {"dim": 96, "dtype": "fp16"},
    "D128": {},
    "D128 pages of 16": {"page": 16},
    "D128 pages of 128": {"page": 128, "group": 8},
    "D128 rows": {"max_q": 8},
    "D128 lists, pages of 16, rows": {"kind": "lists", "page": 16, "max_q": 4},
    "D128 lines, blocks of 64": {"kind": "lines", "block": 64},
    "D128 softcap": {"softcap": True},
    "D128 fp32 rows": {"dtype": "fp32", "max_q": 8},
    "D256": {"dim": 256},
    "D256 rows, pages of 64": {"dim": 256, "max_q": 8, "page": 64},
    "D256 fp32": {"dim": 256, "dtype": "fp32"},
}


# every shape for Hopper, the largest of each kind for its neighbours
ELSEWHERE = ("D128", "D128 rows", "D128 lists, pages of 16, rows", "D256", "D256 rows, pages of 64", "D256 fp32")
CASES = [(shape, 90) for shape in SHAPES] + [(shape, sm) for sm in (80, 100) for shape in ELSEWHERE]


@pytest.mark.parametrize(("shape", "sm"), CASES)
def test_tiles_leave_room_for_two_programs(shape: str, sm: int) -> None:
    code = compiled(sm=sm, **SHAPES[shape])
    assert code.spills == 0
    assert code.stack == 0
    assert code.shared <= SHARED_BYTES[sm]
    assert code.blocks_per_sm >= 2, f"{code.registers} registers, {code.shared} bytes"
    assert code.hmma > 0 or SHAPES[shape].get("dtype") == "fp32"
    # keys and values arrive in 16-byte pieces without passing through registers, more than one step ahead
    assert code.ldgsts > 0
    assert len(re.findall(r"LDGSTS\S*\.128", code.sass)) == code.ldgsts
    assert "ttg.async_wait" in code.ttgir


def test_the_last_arrival_sees_every_part() -> None:
    code = compiled(sm=90)
    before, _, after = code.sass.partition("ATOMG")
    assert after, "no arrival counter"
    # all threads' stores, then a barrier, a fence, the arrival; its acquire drops the L1, a barrier hands the count on
    assert re.search(r"STG.*BAR\.SYNC.*MEMBAR\S*GPU", before, re.DOTALL)
    assert re.search(r"CCTL\.IVALL.*BAR\.SYNC.*LDG", after, re.DOTALL)


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_list_kernel_compiles_without_spills(sm: int) -> None:
    constants = {"H": 32, "N_T": 2, "BLOCK": 128, "CHUNK": 1024}
    signature = dict.fromkeys(("vertical_ptr", "slash_ptr", "extra_ptr"), "*u8")
    signature |= {"count_ptr": "*i32", "index_ptr": "*i32", "q_len_ptr": "*i64", "kv_len_ptr": "*i64"}
    signature |= {name: "i32" for name in decode_lists_kernel.arg_names if name not in {**constants, **signature}}
    code = compile_kernel(decode_lists_kernel, signature, constants, sm=sm)
    assert code.spills == 0
    assert code.stack == 0
