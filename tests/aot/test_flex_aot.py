"""Machine code of FlexPrefill's selection: tensor cores in both passes over the keys, no spilled registers, shared memory that fits."""

from __future__ import annotations

import pytest
import triton
from aot.aot_support import SHARED_BYTES, Code, compile_kernel

from accel.kernels.flex_index import triton_kernels as kernels
from accel.kernels.flex_index import triton_select as select

ARCHITECTURES = pytest.mark.parametrize("sm", [80, 90, 100], ids=lambda sm: f"sm{sm}")
LENGTHS = {"q_len_ptr": "*i64", "kv_len_ptr": "*i64"}
GAMMA = {"gamma_high": "fp32", "gamma_low": "fp32"}
SHORT = {"min_q": "i32", "min_kv": "i32"}

# pass, architecture and block size: most values in local memory inside the loop. On Hopper measured to be worth it, see `probe_options`
SPILLS = {("masses", 90, 128): 80, ("masses", 100, 64): 4}


def _probe(part: str, *, sm: int, D: int, block: int, page: int = 0, has_cap: bool = False, dtype: str = "bf16", tiles: bool = False) -> Code:
    masses = part == "masses"
    names = ["q_ptr", "k_ptr", "place_ptr", "q_start_ptr", "q_len_ptr", "kv_len_ptr"]
    signature = dict.fromkeys(names, "*i64") | {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "place_ptr": "*i32" if page else "*i64"}
    outputs = ["max_ptr", "sum_ptr", "mean_ptr", *(["token_ptr", "estimate_ptr", "tile_ptr"] if masses else [])]
    signature |= dict.fromkeys(outputs, "*fp32")
    signature |= dict.fromkeys(["stride_qn", "stride_qh", "stride_kp", "stride_kn", "stride_kh", "stride_pb"], "i64")
    signature |= {"scale": "fp32", "cap": "fp32", **SHORT, "tiles_each": "i32", "NK": "i32", "GROUP": "i32"}
    block_d = max(16, 1 << (D - 1).bit_length())
    options = dict(select.probe_options(block, block_d, 2, shared_bytes=SHARED_BYTES[sm], major=sm // 10)[masses])
    constants = {"stride_qd": 1, "stride_kd": 1, "D": D, "BLOCK": block, "BLOCK_D": block_d, "PAGE": page, "HAS_CAP": has_cap, "UPCAST": False}
    constants |= {"COLS": options.pop("COLS")} | ({"TILES": tiles} if masses else {})
    kernel = kernels.probe_masses_fwd_kernel if masses else kernels.probe_stats_fwd_kernel
    return compile_kernel(kernel, signature, constants, sm=sm, num_warps=options["num_warps"], num_stages=options["num_stages"])


def _assert_clean(code: Code, *, loop_spills: int = 0) -> None:
    # Triton 3.6 keeps up to twelve values from before the loops in memory on sm_80; 3.9 none
    assert code.spills <= 3 * loop_spills + (12 if code.sm == 80 and triton.__version__.startswith("3.6.") else 0), code
    assert code.loop_spills <= loop_spills, code
    assert code.shared <= SHARED_BYTES[code.sm], code


@pytest.mark.parametrize("part", ["stats", "masses"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"D": 128, "block": 128}, id="D128"),
        pytest.param({"D": 128, "block": 128, "page": 16, "has_cap": True, "dtype": "fp16"}, id="D128-paged-softcap-fp16"),
        pytest.param({"D": 80, "block": 128}, id="D80"),
        pytest.param({"D": 64, "block": 64}, id="D64-b64"),
        pytest.param({"D": 64, "block": 32, "page": 16}, id="D64-b32-paged"),
        pytest.param({"D": 256, "block": 64}, id="D256-b64"),
    ],
)
@ARCHITECTURES
def test_both_passes_over_the_keys_use_tensor_cores_and_do_not_spill(sm, options, part):
    code = _probe(part, sm=sm, **options)
    _assert_clean(code, loop_spills=SPILLS.get((part, sm, options["block"]), 0))
    # wgmma takes 64 rows at least
    if sm == 90 and options["block"] >= 64:
        assert code.hgmma > 0
        assert code.hmma == 0
    else:
        assert code.hmma + code.utcmma > 0
    # keys arrive by asynchronous copies
    assert code.ldgsts > 0


def test_two_programs_of_each_pass_share_an_sm_of_hopper():
    for part in ("stats", "masses"):
        assert _probe(part, sm=90, D=128, block=128).blocks_per_sm >= 2


def test_splitting_the_mass_by_query_block_fits():
    code = _probe("masses", sm=90, D=128, block=128, tiles=True)
    assert code.loop_spills <= SPILLS["masses", 90, 128], code
    assert code.shared <= SHARED_BYTES[90], code


@pytest.mark.parametrize("split", [True, False], ids=["split", "reference"])
@ARCHITECTURES
def test_token_counts_do_not_spill(sm, split):
    signature = {**LENGTHS, "token_ptr": "*fp32", "count_ptr": "*i32", "block_ptr": "*fp32", **GAMMA, **SHORT, "NK": "i32"}
    constants = {"BLOCK": 128, "CHUNK": select.SEARCH_CHUNK, "SPLIT": split, "EXACT": False}
    _assert_clean(compile_kernel(kernels.token_counts_fwd_kernel, signature, constants, sm=sm, num_warps=select.SEARCH_WARPS))


@pytest.mark.parametrize("block_nk", [256, 1024, 2048], ids=lambda n: f"{n}-blocks")
@ARCHITECTURES
def test_line_selection_does_not_spill(sm, block_nk):
    signature = {**LENGTHS, "count_ptr": "*i32", "block_ptr": "*fp32", "estimate_ptr": "*fp32"}
    signature |= {"line_ptr": "*u8", "aware_ptr": "*u8", "finite_ptr": "*u8", "distance_ptr": "*fp32", "blocks_ptr": "*i32", **GAMMA, "tau": "fp32"}
    signature |= SHORT | dict.fromkeys(["min_blocks", "max_blocks", "sink_blocks", "local_blocks", "NK"], "i32")
    constants = {"BLOCK": 128, "BLOCK_NK": block_nk, "COVER": True, "SIZED": True}
    _assert_clean(compile_kernel(kernels.select_lines_fwd_kernel, signature, constants, sm=sm, num_warps=select.line_warps(block_nk)))


@pytest.mark.parametrize("by_row", [True, False], ids=["row", "global"])
@ARCHITECTURES
def test_the_pooled_map_does_not_spill(sm, by_row):
    signature = {"q_ptr": "*bf16", "q_start_ptr": "*i64", **LENGTHS, "mean_ptr": "*fp32", "aware_ptr": "*u8", "line_ptr": "*u8"}
    signature |= {"finite_ptr": "*u8", "map_ptr": "*fp32", "extra_ptr": "*u8", "stride_qn": "i64", "stride_qh": "i64"}
    signature |= {"scale": "fp32", "cap": "fp32", **GAMMA, "NK": "i32", "GROUP": "i32"}
    constants = {"stride_qd": 1, "D": 128, "BLOCK": 128, "BLOCK_D": 128, "BLOCK_J": select.MAP_KEYS, "BLOCK_NK": 1024}
    constants |= {"HAS_CAP": False, "BY_ROW": by_row}
    _assert_clean(compile_kernel(kernels.pooled_map_fwd_kernel, signature, constants, sm=sm, num_warps=select.MAP_WARPS))


@ARCHITECTURES
def test_covering_the_map_does_not_spill(sm):
    signature = {**LENGTHS, "aware_ptr": "*u8", "map_ptr": "*fp32", "extra_ptr": "*u8", **GAMMA, "NQ": "i32", "NK": "i32"}
    constants = {"BLOCK": 128, "BLOCK_NK": 1024, "CHUNK": select.SEARCH_CHUNK}
    _assert_clean(compile_kernel(kernels.map_cover_fwd_kernel, signature, constants, sm=sm, num_warps=select.SEARCH_WARPS))
