"""The prefill kernel's machine code at the tile sizes that GPUs get: tensor cores in use, no spills in a loop, shared memory and registers fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from aot.aot_support import SHARED_BYTES, Code, compile_kernel

from accel.kernels.block_sparse import triton_kernels as kernels
from accel.kernels.block_sparse.triton_launch import FULL, HALF, choose_config, fit

IMPLICIT, LISTED, SCRATCH = (kind.value for kind in (kernels.IMPLICIT, kernels.LISTED, kernels.SCRATCH))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    "lse_ptr": "*fp32", "q_start_ptr": "*i64", "q_len_ptr": "*i64", "kv_len_ptr": "*i64",
    "full_count_ptr": "*i32", "full_index_ptr": "*i32", "mask_count_ptr": "*i32", "mask_index_ptr": "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """One specialisation of the kernel, as the launcher would ask for it on a GPU of this generation."""

    sm: int
    head_dim: int
    plan: int = LISTED
    page: int = 0
    dtype: str = "bf16"
    block: int = 128
    softcap: bool = False
    lse: bool = False
    blocks_per_sm: int = 1
    spills: int = 32            # what is put aside before the loops and fetched behind them
    loop_spills: int = 0

    def __str__(self) -> str:
        plan = ("implicit", "lists", "lines")[self.plan]
        extras = f"{'-cap' * self.softcap}{'-lse' * self.lse}"
        return f"sm{self.sm}-{self.dtype}-d{self.head_dim}-{plan}-page{self.page}-block{self.block}{extras}"

    def compiled(self) -> Code:
        padded = max(16, 1 << (self.head_dim - 1).bit_length())
        chosen = choose_config(padded, DTYPES[self.dtype], shared_bytes=SHARED_BYTES[self.sm], major=self.sm // 10)
        tile = fit(chosen, self.block)
        constants = {
            "GROUP": 4, "D": self.head_dim, "DV": self.head_dim, "BLOCK_D": padded, "BLOCK_DV": padded, "BLOCK": self.block, "ROWS": tile.rows,
            "COLS": tile.cols, "PLAN": self.plan, "PAGE": self.page, "SOFTCAP": self.softcap, "WANTS_LSE": self.lse, "UPCAST": False,
            "PRECISION": tile.precision,
        }  # fmt: skip
        if not self.lse:
            constants["lse_ptr"] = None
        if self.plan == IMPLICIT:
            constants |= dict.fromkeys(("full_count_ptr", "full_index_ptr", "mask_count_ptr"))
        if self.plan != LISTED:
            constants["mask_index_ptr"] = None
        kinds = {name: self.kind(name) for name in kernels.block_sparse_fwd_kernel.arg_names if name not in constants}
        # the plan's tensors may lie anywhere
        loose = [*kernels.VARYING, *kernels.LISTS]
        aligned = [name for name in kinds if name.startswith("stride") or name.endswith("_ptr") if name not in loose]
        return compile_kernel(
            kernels.block_sparse_fwd_kernel, kinds, constants, sm=self.sm, num_warps=tile.num_warps, num_stages=tile.num_stages,
            maxnreg=tile.maxnreg, aligned=aligned,
        )  # fmt: skip

    def kind(self, name: str) -> str:
        if name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
            return f"*{self.dtype}"
        if name == "kv_place_ptr":
            return "*i32" if self.page else "*i64"
        if name == "full_index_ptr" and self.plan == SCRATCH:
            return "*i16"
        return POINTERS.get(name, "fp32" if name in ("scale_log2", "cap_log2", "cap_scale") else "i32")


HOPPER = [
    Build(90, 64, IMPLICIT, blocks_per_sm=2),
    Build(90, 64, SCRATCH, lse=True, blocks_per_sm=2),
    Build(90, 64, LISTED, page=16, blocks_per_sm=2),
    Build(90, 80, SCRATCH),
    Build(90, 96, LISTED),
    Build(90, 128, IMPLICIT),
    Build(90, 128, LISTED, lse=True),
    Build(90, 128, SCRATCH, page=64),
    Build(90, 128, IMPLICIT, page=16, dtype="fp16"),
    Build(90, 128, SCRATCH, softcap=True),
    Build(90, 128, SCRATCH, block=64),
    Build(90, 128, IMPLICIT, block=256),
    Build(90, 256, SCRATCH, spills=96),
    # the loops of Triton 3.9 hold ten values too many with a soft-cap
    Build(90, 256, LISTED, page=128, softcap=True, spills=96, loop_spills=10),
]
AMPERE = [Build(80, 64, SCRATCH), Build(80, 128, IMPLICIT), Build(80, 128, SCRATCH, page=16), Build(80, 256, LISTED)]
BLACKWELL = [Build(100, 64, SCRATCH), Build(100, 128, LISTED, page=64), Build(100, 256, IMPLICIT)]
FLOATS = [Build(90, 64, LISTED, dtype="fp32"), Build(90, 128, SCRATCH, dtype="fp32"), Build(80, 128, IMPLICIT, dtype="fp32")]


def check(build: Build) -> Code:
    code = build.compiled()
    assert code.loop_spills <= build.loop_spills, code
    assert code.spills <= build.spills, code
    assert code.shared <= SHARED_BYTES[build.sm], code
    assert code.blocks_per_sm >= build.blocks_per_sm, code
    # keys and values come ahead of time
    assert code.ldgsts > 0, code
    return code


@pytest.mark.parametrize("build", HOPPER, ids=str)
def test_hopper(build):
    code = check(build)
    assert code.hgmma > 0, code
    assert code.hmma == 0, code
    assert not code.is_serialized, code


@pytest.mark.parametrize("build", AMPERE, ids=str)
def test_ampere(build):
    assert check(build).hmma > 0


@pytest.mark.slow
@pytest.mark.parametrize("build", BLACKWELL, ids=str)
def test_blackwell(build):
    assert check(build).utcmma > 0


@pytest.mark.slow
@pytest.mark.parametrize("build", FLOATS, ids=str)
def test_fp32(build):
    code = check(build)
    assert code.hmma + code.hgmma > 0, code


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuned, dtype", [*((tuned, "bf16") for tuned in HALF), *((tuned, "fp32") for tuned in FULL)], ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_stated_shared_memory_is_what_the_compiler_asks_for(tuned, dtype):
    sm = {"wgmma": 90, "tcgen05": 100, "mma": 80}[tuned.tensor_core]
    assert Build(sm, tuned.block_d, IMPLICIT, dtype=dtype).compiled().shared == tuned.shared_bytes


def test_consumer_cards_get_tiles_that_fit():
    for head_dim in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            chosen = choose_config(head_dim, dtype, shared_bytes=SHARED_BYTES[89], major=8)
            assert any(tuned.config == chosen and tuned.shared_bytes <= SHARED_BYTES[89] for tuned in HALF + FULL)


def test_the_small_kernels_compile():
    lines = compile_kernel(
        kernels.vertical_slash_lists_kernel,
        {
            **dict.fromkeys(("vertical_ptr", "slash_ptr", "extra_ptr"), "*u8"),
            **dict.fromkeys(("q_len_ptr", "kv_len_ptr"), "*i64"),
            **dict.fromkeys(("full_count_ptr", "mask_count_ptr"), "*i32"),
            "full_index_ptr": "*i16",
            **{f"stride_{name}": "i32" for name in ("vb", "vh", "sb", "sh", "eb", "eh", "er")},
            **dict.fromkeys(("n_heads", "i_row0", "n_rows", "width"), "i32"),
        },
        {"BLOCK": 128, "CHUNK": 1024, "HAS_EXTRA": True},
        aligned=["q_len_ptr", "kv_len_ptr"],
    )
    gaps = compile_kernel(
        kernels.clear_gaps_kernel,
        {
            "out_ptr": "*bf16", "lse_ptr": "*fp32", "q_start_ptr": "*i64", "q_len_ptr": "*i64",
            **dict.fromkeys(("stride_ot", "stride_oh", "stride_lh", "n_tokens", "batch", "n_heads"), "i32"),
        },
        {"DV": 128, "BLOCK_DV": 128, "ROWS": 64, "SEQUENCES": 16, "WANTS_LSE": True},
    )  # fmt: skip
    assert lines.spills == gaps.spills == 0
