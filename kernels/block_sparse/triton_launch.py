"""Host side of the Triton prefill: what it asks of its tensors, tile sizes, index memory, launches. Reads no value from the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels.block_sparse import triton_kernels as kernels
from accel.kernels.block_sparse.executors import TRITON_MAX_HEAD_DIM, dispatches
from accel.kernels.block_sparse.keys import ContiguousKeys, KeyView, PagedKeys
from accel.kernels.block_sparse.plan import BlockPlan, ImplicitPlan, ListPlan, VerticalSlashPlan
from accel.kernels.block_sparse.ragged import Ragged

LOG2_E = 1.4426950408889634

# Most memory for the lists that a vertical-slash plan is turned into; longer inputs take several launches, each with its share of the query
# blocks. 128K tokens with 32 heads need half of it, one million tokens 32 launches. One row of query blocks is always taken: B · Hq · nk indices.
INDEX_BYTES = 128 << 20


@dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes of the prefill kernel and how it is compiled. A tile is never larger than the plan's block."""

    rows: int = 128                 # query rows per program, a power of two ≥ 16
    cols: int = 64                  # keys per step, a power of two ≥ 16
    num_warps: int = 8
    num_stages: int = 3
    maxnreg: int | None = None      # registers per thread; 128 lets two programs of 8 warps share an SM
    precision: str = "ieee"         # of products of fp32 tensors: "ieee", or "tf32x3" on the tensor cores


@dataclass(frozen=True)
class Tuned:
    """A configuration and what it was found for, by compiling ahead of time: no spills in the loops, wgmma not serialized (tests/aot)."""

    block_d: int                    # largest padded head_dim
    config: PrefillConfig
    shared_bytes: int               # of one program
    tensor_core: str = "mma"        # the instructions it was compiled to: "wgmma" (Hopper), "tcgen05" (Blackwell), "mma" (all others)


# The first entry that suits runs. At head_dim 128 a limit of 128 registers makes ptxas run one wgmma after the other, even without spills:
# one program per SM is what is left there. Ampere keeps Q in registers, hence its narrower steps; so does Blackwell the scores.
HALF = (
    Tuned(64, PrefillConfig(maxnreg=128), 65_536, "wgmma"),
    Tuned(128, PrefillConfig(), 131_072, "wgmma"),
    Tuned(256, PrefillConfig(cols=32, num_stages=2), 131_072, "wgmma"),
    Tuned(64, PrefillConfig(), 69_664, "tcgen05"),
    Tuned(128, PrefillConfig(cols=32), 90_144, "tcgen05"),
    Tuned(256, PrefillConfig(rows=64, cols=32, num_stages=2), 114_720, "tcgen05"),
    Tuned(64, PrefillConfig(), 49_152),
    Tuned(128, PrefillConfig(cols=32), 65_536),
    Tuned(256, PrefillConfig(rows=64, cols=32, num_stages=2), 69_632),
)
FULL = (
    Tuned(64, PrefillConfig(rows=32, cols=32, num_warps=4, num_stages=2, precision="tf32x3"), 40_960),
    Tuned(128, PrefillConfig(rows=32, cols=32, num_stages=2, precision="tf32x3"), 73_728),
    Tuned(256, PrefillConfig(rows=16, cols=16, num_warps=4, num_stages=2), 50_240),
)


def choose_config(block_d: int, dtype: torch.dtype, *, shared_bytes: int, major: int) -> PrefillConfig:
    """Tile sizes for a padded head_dim on a device of compute capability `major`.x with this much shared memory per program."""
    # the consumer cards of 12.x have the instructions of Ampere
    tensor_core = {9: "wgmma", 10: "tcgen05"}.get(major, "mma")
    for tuned in FULL if dtype == torch.float32 else HALF:
        if block_d <= tuned.block_d and tuned.shared_bytes <= shared_bytes and tuned.tensor_core in (tensor_core, "mma"):
            return tuned.config
    return PrefillConfig(rows=16, cols=16, num_warps=4, num_stages=1)


def fit(config: PrefillConfig, block_size: int) -> PrefillConfig:
    """`config` with tiles no larger than the plan's block needs, and the warps that suit them."""
    needed = max(16, _power_of_two(block_size))
    if needed >= max(config.rows, config.cols):
        return config
    rows = min(config.rows, needed)
    warps = min(config.num_warps, 4 if rows < 128 else 8)
    return replace(config, rows=rows, cols=min(config.cols, needed), num_warps=warps, maxnreg=config.maxnreg if rows == config.rows else None)


@torch.no_grad()
def triton_attention(
    q: Tensor,
    keys: KeyView,
    plan: BlockPlan,
    lens: Ragged,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
    config: PrefillConfig | None = None,
    index_bytes: int = INDEX_BYTES,
) -> None:
    """Writes the attention of every query row into `out` (T, Hq, Dv) and, where given, `lse` (Hq, T) fp32 with last stride 1.

    Nothing waits for the device and no allocation depends on values, so that a CUDA graph can record it. Memory beyond the output: none for
    implicit and list plans; for vertical-slash plans lists of at most `index_bytes` (or one row of query blocks, if that is more).
    Where q, k or v has strides or an address that are no multiple of 16 elements, it is copied, counted in `dispatches`; paged keys raise.
    config: tile sizes, by default those found for this head_dim and device.
    """
    _check(q, keys, plan, lens, scale=scale, lse=lse)
    n_tokens, n_heads, _ = q.shape
    if n_tokens == 0:
        return
    clear_gaps(lens, out, lse)
    n_blocks = query_blocks(plan.block_size, lens)
    if n_blocks == 0 or lens.batch == 0:
        return
    chosen = fit(config or _config_for(q, keys), plan.block_size)
    memory = _memory(q, keys, out, lse)
    if isinstance(plan, ImplicitPlan):
        _launch(chosen, memory, lens, _implicit(plan), plan.block_size, n_heads, n_blocks=n_blocks, scale=scale, softcap=softcap)
    elif isinstance(plan, ListPlan):
        _launch(chosen, memory, lens, _listed(plan), plan.block_size, n_heads, n_blocks=n_blocks, scale=scale, softcap=softcap)
    elif isinstance(plan, VerticalSlashPlan):
        lists = Lists.empty(plan, n_heads, n_blocks, index_bytes)
        # one turn, but for inputs so long that their lists would not fit
        for first in range(0, n_blocks, lists.n_rows):
            lists.fill(plan, lens, first)
            n = min(lists.n_rows, n_blocks - first)
            _launch(chosen, memory, lens, lists.arguments(), plan.block_size, n_heads, n_blocks=n, first=first, scale=scale, softcap=softcap)
    else:
        raise TypeError(f"no kernel for a {type(plan).__name__}")


def query_blocks(block_size: int, lens: Ragged) -> int:
    """Most query blocks that a sequence of the batch can have. The first one may be partial: L rows touch up to one block more than ⌈L/b⌉."""
    if lens.max_q <= 0:
        return 0
    return min((lens.max_q + block_size - 2) // block_size + 1, -(-lens.max_kv // block_size))


def clear_gaps(lens: Ragged, out: Tensor, lse: Tensor | None) -> None:
    """Sets the rows that belong to no sequence to 0, their LSE to −inf. Writes nothing else."""
    n_tokens, n_heads, value_dim = out.shape
    kernels.clear_gaps_kernel[(-(-n_tokens // 64),)](
        out, lse, lens.q_start.contiguous(), lens.q_len.contiguous(), *_strides(out), 0 if lse is None else lse.stride(0),
        n_tokens, lens.batch, n_heads,
        DV=value_dim, BLOCK_DV=_power_of_two(value_dim), ROWS=64, SEQUENCES=16, WANTS_LSE=lse is not None, enable_fp_fusion=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Lists:
    """Room for the lists of `n_rows` query blocks of every sequence and head, filled from a vertical-slash plan, last blocks first."""

    count: Tensor       # (2, B, Hq, n_rows) int32: full blocks, masked blocks
    index: Tensor       # (B, Hq, n_rows, nk) int16, or int32 beyond 2^15 key blocks

    @property
    def n_rows(self) -> int:
        return self.index.shape[2]

    @classmethod
    def empty(cls, plan: VerticalSlashPlan, n_heads: int, n_blocks: int, index_bytes: int) -> Lists:
        batch, nk = plan.vertical.shape[0], plan.vertical.shape[2]
        dtype = torch.int16 if nk <= 2**15 else torch.int32
        n_rows = min(n_blocks, max(1, index_bytes // (batch * n_heads * nk * dtype.itemsize)))
        device = plan.vertical.device
        count = torch.empty(2, batch, n_heads, n_rows, dtype=torch.int32, device=device)
        return cls(count, torch.empty(batch, n_heads, n_rows, nk, dtype=dtype, device=device))

    def fill(self, plan: VerticalSlashPlan, lens: Ragged, first: int) -> None:
        """Writes the lists of the query blocks first … first + n_rows − 1, counted from the end of each sequence."""
        _, batch, n_heads, n_rows = self.count.shape
        nk = self.index.shape[3]
        # a bool is a byte
        vertical, slash = (t.view(torch.uint8) for t in (plan.vertical, plan.slash))
        extra = None if plan.extra is None else plan.extra.view(torch.uint8)
        kernels.vertical_slash_lists_kernel[(n_rows * batch * n_heads,)](
            vertical, slash, extra, lens.q_len.contiguous(), lens.kv_len.contiguous(), self.count[0], self.count[1], self.index,
            vertical.stride(0), _head_stride(vertical), slash.stride(0), _head_stride(slash),
            *((0, 0, 0) if extra is None else (extra.stride(0), _head_stride(extra), extra.stride(2))),
            n_heads, first, n_rows, nk,
            BLOCK=plan.block_size, CHUNK=min(1024, max(16, _power_of_two(nk))), HAS_EXTRA=extra is not None, enable_fp_fusion=True,
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        count, index = self.count[0], self.index
        return {
            "full_count_ptr": count, "full_index_ptr": index, "mask_count_ptr": self.count[1], "mask_index_ptr": None,
            **dict(zip(("stride_cb", "stride_ch", "stride_cr"), count.stride(), strict=True)),
            **dict(zip(("stride_fb", "stride_fh", "stride_fr"), index.stride()[:3], strict=True)),
            "PLAN": kernels.SCRATCH.value,
        }  # fmt: skip


def _launch(
    config: PrefillConfig, memory: dict[str, Any], lens: Ragged, blocks: dict[str, Any], block_size: int, n_heads: int, *,
    n_blocks: int, scale: float, softcap: float | None, first: int = 0,
) -> None:
    parts = -(-block_size // config.rows)
    kernels.block_sparse_fwd_kernel[(n_blocks * parts * lens.batch * n_heads,)](
        **{
            **NO_BLOCKS,
            **memory,
            **blocks,
            "q_start_ptr": lens.q_start.contiguous(), "q_len_ptr": lens.q_len.contiguous(), "kv_len_ptr": lens.kv_len.contiguous(),
            "batch": lens.batch, "n_heads": n_heads, "i_row0": first,
            "scale_log2": scale * LOG2_E,
            "cap_log2": 0.0 if softcap is None else softcap * LOG2_E,
            "cap_scale": 0.0 if softcap is None else 2 * LOG2_E * scale / softcap,
            "BLOCK": block_size, "ROWS": config.rows, "COLS": config.cols, "PRECISION": config.precision, "SOFTCAP": softcap is not None,
        },
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


# what a plan that needs no such argument leaves
NO_BLOCKS: dict[str, Any] = {
    **dict.fromkeys(("full_count_ptr", "full_index_ptr", "mask_count_ptr", "mask_index_ptr")),
    **dict.fromkeys(("stride_cb", "stride_ch", "stride_cr", "stride_fb", "stride_fh", "stride_fr", "stride_mb", "stride_mh", "stride_mr"), 0),
    **dict.fromkeys(("window", "n_sink", "power_lo", "power_hi"), 0),
}


def _implicit(plan: ImplicitPlan) -> dict[str, Any]:
    # no sequence has 2^30 blocks
    window = max(0, min(plan.window_blocks, 2**30))
    highest = 30 if plan.max_power is None else min(plan.max_power, 30)
    return {
        "PLAN": kernels.IMPLICIT.value, "window": window, "n_sink": max(0, min(plan.sink_blocks, 2**30)),
        # the first power of two past the window
        "power_lo": max(window - 1, 0).bit_length(), "power_hi": highest if plan.powers else -1,
    }  # fmt: skip


def _listed(plan: ListPlan) -> dict[str, Any]:
    counts, full, masked = plan.full_count, plan.full_index, plan.mask_index
    if plan.mask_count.stride() != counts.stride():
        raise ValueError(f"mask_count and full_count must have the same strides, got {plan.mask_count.stride()} and {counts.stride()}")
    return {
        "PLAN": kernels.LISTED.value,
        "full_count_ptr": counts, "full_index_ptr": full, "mask_count_ptr": plan.mask_count, "mask_index_ptr": masked,
        "stride_cb": counts.stride(0), "stride_ch": _head_stride(counts), "stride_cr": counts.stride(2),
        "stride_fb": full.stride(0), "stride_fh": _head_stride(full), "stride_fr": full.stride(2),
        "stride_mb": masked.stride(0), "stride_mh": _head_stride(masked), "stride_mr": masked.stride(2),
    }  # fmt: skip


def _head_stride(t: Tensor) -> int:
    """0 where all heads share the plan of one."""
    return t.stride(1) if t.shape[1] > 1 else 0


def _memory(q: Tensor, keys: KeyView, out: Tensor, lse: Tensor | None) -> dict[str, Any]:
    """The arguments that say where q, keys and results lie, and what follows from their shapes and dtype."""
    q = _aligned("q", q)
    if isinstance(keys, ContiguousKeys):
        k, v, place, page_size = _aligned("k", keys.k), _aligned("v", keys.v), keys.start.contiguous(), 0
    elif isinstance(keys, PagedKeys):
        k, v, place, page_size = keys.k_pages, keys.v_pages, keys.page_table, keys.page_size
    else:
        raise TypeError(f"no kernel for {type(keys).__name__}")
    strides = {
        "q": ("th", _strides(q)), "out": ("th", _strides(out)),
        "k": ("pth", (0, 0, *_strides(k))[-3:]), "v": ("pth", (0, 0, *_strides(v))[-3:]),
    }  # fmt: skip
    head_dim, value_dim = keys.head_dim, keys.value_dim
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse, "kv_place_ptr": place,
        **{f"stride_{name[0]}{axis}": step for name, (axes, steps) in strides.items() for axis, step in zip(axes, steps, strict=True)},
        "stride_lh": 0 if lse is None else lse.stride(0), "stride_place": place.stride(0),
        "GROUP": q.shape[1] // keys.n_kv_heads, "D": head_dim, "DV": value_dim, "BLOCK_D": _padded(head_dim), "BLOCK_DV": _padded(value_dim),
        "PAGE": page_size, "WANTS_LSE": lse is not None,
        # the interpreter multiplies the bits of bf16 numbers
        "UPCAST": q.device.type == "cpu" and q.dtype == torch.bfloat16,
    }  # fmt: skip


def _strides(t: Tensor) -> tuple[int, ...]:
    """All but the last; 0 where there is one entry: the value is never used, but an odd one would cost the kernel its aligned loads."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True))


def _aligned(name: str, t: Tensor) -> Tensor:
    """`t`, or a copy whose rows start at multiples of 16 elements: without that the compiler loads single elements, and nothing ahead of time."""
    if why_unaligned(t) is None:
        return t
    dispatches[f"copied-{name}"] += 1
    roomy = t.new_empty(t.shape[0], t.shape[1], -(-t.shape[2] // 16) * 16)[..., : t.shape[2]]
    return roomy.copy_(t)


def why_unaligned(t: Tensor) -> str | None:
    """What keeps a (…, tokens, heads, head_dim) tensor from being read in whole vectors, or None. Strides of single entries are never used."""
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    if t.stride(-1) != 1 or any(stride % 16 for stride in strides):
        return f"its last stride must be 1 and the others multiples of 16 elements, got {t.stride()}"
    return "its first element must lie at a multiple of 16 bytes" if t.data_ptr() % 16 else None


def _check(q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, lse: Tensor | None) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if max(keys.head_dim, keys.value_dim) > TRITON_MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {TRITON_MAX_HEAD_DIM}, got {keys.head_dim} and {keys.value_dim} of the values")
    if lse is not None and (lse.dtype != torch.float32 or lse.stride(-1) != 1):
        raise ValueError(f"lse must be fp32 with last stride 1, got {lse.dtype}, strides {lse.stride()}")
    if isinstance(keys, PagedKeys):
        for name, pages in (("k_pages", keys.k_pages), ("v_pages", keys.v_pages)):
            reason = why_unaligned(pages)
            if reason is not None:
                raise ValueError(f"{name} cannot be read as it is, and a cache is not copied: {reason}")
        if keys.page_table.stride(-1) != 1:
            raise ValueError(f"page_table must have last stride 1, got {keys.page_table.stride()}")
    check_tensors(q, keys, plan, lens)
    for name, t in _tensors_of(plan).items():
        # counts (B, Hq, nq) int32 are read one by one
        if t.shape[-1] > 1 and t.stride(-1) != 1 and (t.dim() == 4 or t.dtype == torch.bool):
            raise ValueError(f"the plan's {name} must have last stride 1, got {t.stride()}")


def check_tensors(q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged) -> None:
    """Raises ValueError where a plan is of other heads or sequences, or a tensor on another device: a kernel would read past its end."""
    tensors = {"q_start": lens.q_start, "q_len": lens.q_len, "kv_len": lens.kv_len}
    if isinstance(keys, (ContiguousKeys, PagedKeys)):
        sides = (keys.k, keys.v) if isinstance(keys, ContiguousKeys) else (keys.k_pages, keys.v_pages)
        tensors |= {"k": sides[0], "v": sides[1], "place": keys.start if isinstance(keys, ContiguousKeys) else keys.page_table}
    lists = _tensors_of(plan)
    for name, t in lists.items():
        if t.shape[0] != lens.batch or t.shape[1] not in (1, q.shape[1]):
            raise ValueError(f"the plan describes {t.shape[1]} heads of {t.shape[0]} sequences, q has {q.shape[1]} of {lens.batch} ({name})")
    for name, t in {**tensors, **lists}.items():
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}, q is on {q.device}")


def _tensors_of(plan: BlockPlan) -> dict[str, Tensor]:
    return {name: value for name, value in vars(plan).items() if isinstance(value, Tensor)}


def _config_for(q: Tensor, keys: KeyView) -> PrefillConfig:
    block_d = max(_padded(keys.head_dim), _padded(keys.value_dim))
    if q.device.type != "cuda":
        return replace(choose_config(block_d, torch.float32, shared_bytes=1 << 20, major=8), precision="ieee")
    return _device_config(q.device.index or 0, block_d, q.dtype)


@cache
def _device_config(device: int, block_d: int, dtype: torch.dtype) -> PrefillConfig:
    major, _ = torch.cuda.get_device_capability(device)
    # the limit that Triton itself holds a kernel to
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return choose_config(block_d, dtype, shared_bytes=shared_bytes, major=major)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _padded(head_dim: int) -> int:
    """The power of two that the kernel works with; a product needs at least 16."""
    return max(16, _power_of_two(head_dim))
