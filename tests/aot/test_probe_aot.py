"""Machine code of the probe: tensor cores and asynchronous copies in both passes, no spilled registers, shared memory that fits."""

from __future__ import annotations

import pytest
import torch
from aot.aot_support import SHARED_BYTES, Code, compile_kernel

from accel.kernels.probe import triton_kernels as kernels
from accel.kernels.probe import triton_launch as launch

ARCHITECTURES = pytest.mark.parametrize("sm", [80, 90, 100], ids=lambda sm: f"sm{sm}")
PARTS = pytest.mark.parametrize("part", ["stats", "columns"])
# everything at once: pages, a list of rows, a mask, a soft-cap
FULL = {"page": 16, "has_cap": True, "is_listed": True, "is_masked": True, "dtype": "fp16"}


def _probe(
    part: str, *, sm: int, D: int, dtype: str = "bf16", page: int = 0, has_cap: bool = False, is_causal: bool = True,
    is_listed: bool = False, is_masked: bool = False, spread: bool = True, most_rows: int = 4096,
) -> Code:
    lengths = dict.fromkeys(["q_start_ptr", "q_len_ptr", "kv_len_ptr", "count_ptr"], "*i64")
    signature = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "place_ptr": "*i32" if page else "*i64", **lengths}
    signature |= {"max_ptr": "*fp32", "sum_ptr": "*fp32"}
    signature |= dict.fromkeys(["stride_qn", "stride_qh", "stride_kp", "stride_kn", "stride_kh", "stride_pb"], "i64")
    signature |= {"scale": "fp32", "cap": "fp32", **dict.fromkeys(["n_slots", "N", "GROUP"], "i32")}
    optional = {"rows_ptr": is_listed and "*i64", "mask_ptr": is_masked and "*u8"}
    block_d = max(16, 1 << (D - 1).bit_length())
    of_stats, of_columns = launch.choose_tiles(block_d, torch.float32 if dtype == "fp32" else torch.bfloat16)
    constants = {"stride_qd": 1, "stride_kd": 1, "D": D, "BLOCK_D": block_d, "PAGE": page, "HAS_CAP": has_cap, "IS_CAUSAL": is_causal}
    constants |= {"UPCAST": False}
    if part == "stats":
        tiles, kernel = of_stats, kernels.probe_fwd_kernel_stats
        signature |= {"tiles_each": "i32", "S": "i32"}
    else:
        tiles, kernel = of_columns, kernels.probe_fwd_kernel_columns
        signature |= {"mean_ptr": "*fp32"}
        optional |= dict.fromkeys(["variance_ptr", "entropy_ptr"], spread and "*fp32")
        constants |= {"SPREAD": spread}
    signature |= {name: kind for name, kind in optional.items() if kind}
    constants |= {name: None for name, kind in optional.items() if not kind}
    tiles = launch.fit(tiles, most_rows)
    constants |= {"ROWS": tiles.rows, "COLS": tiles.cols}
    return compile_kernel(kernel, signature, constants, sm=sm, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def _assert_clean(code: Code) -> None:
    assert code.spills == 0, code
    assert code.shared <= min(SHARED_BYTES.values()), code


@PARTS
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"D": 128}, id="D128"),
        pytest.param({"D": 128, **FULL}, id="D128-full"),
        pytest.param({"D": 64, "is_causal": False, "spread": False}, id="D64-vision-mean"),
        pytest.param({"D": 80, "is_causal": False}, id="D80-vision"),
        pytest.param({"D": 256}, id="D256"),
    ],
)
@ARCHITECTURES
def test_both_passes_use_tensor_cores_and_asynchronous_copies(sm, options, part):
    code = _probe(part, sm=sm, **options)
    _assert_clean(code)
    if sm == 90:
        assert code.hgmma > 0
        assert code.hmma == 0
        assert not code.is_serialized
    else:
        assert code.hmma + code.utcmma > 0
    assert code.ldgsts > 0


@PARTS
@ARCHITECTURES
def test_a_single_row_takes_small_tiles(sm, part):
    code = _probe(part, sm=sm, D=128, is_listed=True, spread=False, most_rows=1)
    _assert_clean(code)
    assert code.hgmma + code.hmma + code.utcmma > 0
    assert code.blocks_per_sm >= 3


@PARTS
@pytest.mark.parametrize("D", [64, 256])
@ARCHITECTURES
def test_fp32_does_not_spill(sm, D, part):
    _assert_clean(_probe(part, sm=sm, D=D, dtype="fp32"))


def test_the_second_pass_keeps_sixteen_warps_on_an_sm_of_hopper():
    code = _probe("columns", sm=90, D=128)
    assert code.blocks_per_sm * code.num_warps >= 16
