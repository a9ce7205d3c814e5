"""Host side of the Triton prefill: what it asks of its tensors, tile sizes, index memory, launches. Reads no value from the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any, NamedTuple

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
    """A configuration and what it was found for, by compiling ahead of time: hardly a spill in the loops, wgmma not serialized (tests/aot)."""

    block_d: int                    # largest padded head_dim
    config: PrefillConfig
    shared_bytes: int               # of one program
    tensor_core: str = "mma"        # the instructions it was compiled to: "wgmma" (Hopper), "tcgen05" (Blackwell), "mma" (all others)


# The first entry that suits runs. At head_dim 128 a limit of 128 registers makes ptxas run one wgmma after the other, even without spills:
# one program per SM is what is left there. Ampere keeps Q in registers, hence its narrower steps; so does Blackwell the scores.
HALF = (
    Tuned(64, PrefillConfig(maxnreg=128), 65_536, "wgmma"),
    Tuned(128, PrefillConfig(), 131_072, "wgmma"),
    # some values wait in local memory, outside the loops: 9.1 ms on an H200, where steps of 32 keys without any take 12.6 (25 % of 32K tokens)
    Tuned(256, PrefillConfig(num_stages=2), 196_608, "wgmma"),
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
    needed = max(16, power_of_two(block_size))
    if needed >= max(config.rows, config.cols):
        return config
    rows = min(config.rows, needed)
    warps = min(config.num_warps, 4 if rows < 128 else 8)
    return replace(config, rows=rows, cols=min(config.cols, needed), num_warps=warps, maxnreg=config.maxnreg if rows == config.rows else None)


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
    memory = _memory(q, keys, out, lse)
    # this launch would cost the host a third of the call
    if n_tokens > lens.n_gapless:
        clear_gaps(lens, out, lse)
    n_blocks = query_blocks(plan.block_size, lens)
    if n_blocks == 0 or lens.batch == 0:
        return
    chosen = _config_for(q, memory, plan.block_size) if config is None else fit(config, plan.block_size)
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
        DV=value_dim, BLOCK_DV=power_of_two(value_dim), ROWS=64, SEQUENCES=16, WANTS_LSE=lse is not None, enable_fp_fusion=True,
    )  # fmt: skip


class Lists(NamedTuple):
    """Room for the lists of `n_rows` query blocks of every sequence and head, filled from a vertical-slash plan, last blocks first."""

    full_count: Tensor      # (B, Hq, n_rows) int32
    mask_count: Tensor      # (B, Hq, n_rows) int32
    indices: Tensor         # (B, Hq, n_rows, nk) int16, or int32 beyond 2^15 key blocks

    @property
    def n_rows(self) -> int:
        return self.indices.shape[2]

    @classmethod
    def empty(cls, plan: VerticalSlashPlan, n_heads: int, n_blocks: int, index_bytes: int) -> Lists:
        batch, _, nk = plan.vertical.shape
        dtype = torch.int16 if nk <= 2**15 else torch.int32
        n_rows = min(n_blocks, max(1, index_bytes // (batch * n_heads * nk * dtype.itemsize)))
        device = plan.vertical.device
        full_count, mask_count = torch.empty(2, batch, n_heads, n_rows, dtype=torch.int32, device=device).unbind(0)
        return cls(full_count, mask_count, torch.empty(batch, n_heads, n_rows, nk, dtype=dtype, device=device))

    def fill(self, plan: VerticalSlashPlan, lens: Ragged, first: int) -> None:
        """Writes the lists of the query blocks first … first + n_rows − 1, counted from the end of each sequence."""
        batch, n_heads, n_rows, nk = self.indices.shape
        # a bool is a byte
        vertical, slash = plan.vertical.view(torch.uint8), plan.slash.view(torch.uint8)
        extra = None if plan.extra is None else plan.extra.view(torch.uint8)
        kernels.vertical_slash_lists_kernel[(n_rows * batch * n_heads,)](
            vertical, slash, extra, lens.q_len.contiguous(), lens.kv_len.contiguous(), self.full_count, self.mask_count, self.indices,
            *_list_strides(vertical)[:2], *_list_strides(slash)[:2], *((0, 0, 0) if extra is None else _list_strides(extra)),
            n_heads, first, n_rows, nk,
            BLOCK=plan.block_size, CHUNK=min(1024, max(16, power_of_two(nk))), HAS_EXTRA=extra is not None, enable_fp_fusion=True,
        )  # fmt: skip

    def arguments(self) -> Blocks:
        strides = (*self.full_count.stride(), *self.indices.stride()[:3], 0, 0, 0)
        return Blocks(kernels.SCRATCH.value, (self.full_count, self.indices, self.mask_count, None), strides)


def _launch(
    config: PrefillConfig, memory: Memory, lens: Ragged, blocks: Blocks, block_size: int, n_heads: int, *,
    n_blocks: int, scale: float, softcap: float | None, first: int = 0,
) -> None:
    parts, batch = -(-block_size // config.rows), lens.batch
    scores = (scale * LOG2_E, 0.0, 0.0) if softcap is None else (scale * LOG2_E, softcap * LOG2_E, 2 * LOG2_E * scale / softcap)
    # by position, but for constants: forty more names cost the host microseconds
    kernels.block_sparse_fwd_kernel[(n_blocks * parts * batch * n_heads,)](
        *memory.tensors, lens.q_start.contiguous(), lens.q_len.contiguous(), lens.kv_len.contiguous(), memory.place, *blocks.lists,
        *memory.strides, *blocks.strides, *scores, batch, n_heads, first, *blocks.pattern,
        **memory.constants, BLOCK=block_size, ROWS=config.rows, COLS=config.cols, PLAN=blocks.kind, SOFTCAP=softcap is not None,
        PRECISION=config.precision,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


class Blocks(NamedTuple):
    """The kernel's arguments that say which key blocks to read, in its order; the defaults are what a plan that needs none leaves."""

    kind: int
    lists: tuple[Tensor | None, ...] = (None,) * 4              # full count and index, masked count and index
    strides: tuple[int, ...] = (0,) * 9                         # of the counts, of the full and of the masked index
    pattern: tuple[int, int, int, int] = (0, 0, 0, 0)           # window, n_sink, power_lo, power_hi


def _implicit(plan: ImplicitPlan) -> Blocks:
    # no sequence has 2^30 blocks
    window = max(0, min(plan.window_blocks, 2**30))
    highest = 30 if plan.max_power is None else min(plan.max_power, 30)
    # the first power of two past the window
    power_lo = max(window - 1, 0).bit_length()
    pattern = (window, max(0, min(plan.sink_blocks, 2**30)), power_lo, highest if plan.powers else -1)
    return Blocks(kernels.IMPLICIT.value, pattern=pattern)


def _listed(plan: ListPlan) -> Blocks:
    counts, full, masked = plan.full_count, plan.full_index, plan.mask_index
    if plan.mask_count.stride() != counts.stride():
        raise ValueError(f"mask_count and full_count must have the same strides, got {plan.mask_count.stride()} and {counts.stride()}")
    strides = (*_list_strides(counts), *_list_strides(full), *_list_strides(masked))
    return Blocks(kernels.LISTED.value, (counts, full, plan.mask_count, masked), strides)


def _list_strides(t: Tensor) -> tuple[int, int, int]:
    """The first three: of sequences, heads and, in lists, query blocks. 0 for heads where all share the plan of one."""
    batch, head, row = t.stride()[:3]
    return batch, head if t.shape[1] > 1 else 0, row


class Memory(NamedTuple):
    """The kernel's arguments that say where q, keys and results lie, in its order, and what follows from their shapes and dtype."""

    tensors: tuple[Tensor | None, ...]      # q, k, v, out, lse
    place: Tensor
    strides: tuple[int, ...]                # of q, k, v, out, lse and place
    constants: dict[str, Any]


def _memory(q: Tensor, keys: KeyView, out: Tensor, lse: Tensor | None) -> Memory:
    q, q_strides = _readable("q", q)
    if isinstance(keys, ContiguousKeys):
        (k, k_strides), (v, v_strides), place, page_size = _readable("k", keys.k), _readable("v", keys.v), keys.start.contiguous(), 0
        # of pages, which are none
        k_strides, v_strides = (0, *k_strides), (0, *v_strides)
    elif isinstance(keys, PagedKeys):
        k, v, place, page_size = keys.k_pages, keys.v_pages, keys.page_table, keys.page_size
        k_strides, v_strides = _page_strides("k_pages", k), _page_strides("v_pages", v)
        if place.stride(-1) != 1:
            raise ValueError(f"page_table must have last stride 1, got {place.stride()}")
    else:
        raise TypeError(f"no kernel for {type(keys).__name__}")
    *_, n_kv_heads, head_dim = k.shape
    value_dim = v.shape[-1]
    if max(head_dim, value_dim) > TRITON_MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {TRITON_MAX_HEAD_DIM}, got {head_dim} and {value_dim} of the values")
    constants = {
        "GROUP": q.shape[1] // n_kv_heads, "D": head_dim, "DV": value_dim, "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(value_dim),
        "PAGE": page_size, "WANTS_LSE": lse is not None,
        # the interpreter multiplies the bits of bf16 numbers
        "UPCAST": q.dtype == torch.bfloat16 and q.device.type == "cpu",
    }  # fmt: skip
    strides = (*q_strides, *k_strides, *v_strides, *_strides(out), 0 if lse is None else lse.stride(0), place.stride(0))
    return Memory((q, k, v, out, lse), place, strides, constants)


def _strides(t: Tensor) -> tuple[int, ...]:
    """All but the last; 0 where there is one entry: the value is never used, but an odd one would cost the kernel its aligned loads."""
    strides = t.stride()[:-1]
    if 1 not in t.shape:
        return strides
    return tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, strides, strict=False))


def _readable(name: str, t: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`t`, or a copy whose rows start at multiples of 16 elements: else the compiler loads one by one, and not ahead of time. And its strides."""
    strides = _strides(t)
    if _why_unaligned(t, strides) is None:
        return t, strides
    dispatches[f"copied-{name}"] += 1
    roomy = t.new_empty(t.shape[0], t.shape[1], -(-t.shape[2] // 16) * 16)[..., : t.shape[2]]
    return roomy.copy_(t.detach()), _strides(roomy)


def _page_strides(name: str, pages: Tensor) -> tuple[int, ...]:
    strides = _strides(pages)
    reason = _why_unaligned(pages, strides)
    if reason is not None:
        raise ValueError(f"{name} cannot be read as it is, and a cache is not copied: {reason}")
    return strides


def _why_unaligned(t: Tensor, strides: tuple[int, ...]) -> str | None:
    """What keeps a (…, tokens, heads, head_dim) tensor from being read in whole vectors, or None."""
    if t.stride(-1) != 1 or gcd(16, *strides) != 16:
        return f"its last stride must be 1 and the others multiples of 16 elements, got {t.stride()}"
    return "its first element must lie at a multiple of 16 bytes" if t.data_ptr() % 16 else None


def _check(q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged, *, scale: float, lse: Tensor | None) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if lse is not None and (lse.dtype != torch.float32 or lse.stride(-1) != 1):
        raise ValueError(f"lse must be fp32 with last stride 1, got {lse.dtype}, strides {lse.stride()}")
    for name, t in check_tensors(q, keys, plan, lens).items():
        # counts (B, Hq, nq) int32 are read one by one
        if t.stride(-1) != 1 and t.shape[-1] > 1 and (t.dim() == 4 or t.dtype == torch.bool):
            raise ValueError(f"the plan's {name} must have last stride 1, got {t.stride()}")


def check_tensors(q: Tensor, keys: KeyView, plan: BlockPlan, lens: Ragged) -> dict[str, Tensor]:
    """The plan's tensors by name. Raises ValueError where they are of other heads or sequences, or any tensor is on another device than q.

    A kernel would read past their end.
    """
    device, n_heads, n_sequences = q.device, q.shape[1], lens.batch
    lists = {name: value for name, value in vars(plan).items() if isinstance(value, Tensor)}
    for name, t in lists.items():
        batch, heads, *_ = t.shape
        if batch != n_sequences or heads not in (1, n_heads):
            raise ValueError(f"the plan describes {heads} heads of {batch} sequences, q has {n_heads} of {n_sequences} ({name})")
    tensors = {"q_start": lens.q_start, "q_len": lens.q_len, "kv_len": lens.kv_len, **lists}
    if isinstance(keys, ContiguousKeys):
        tensors |= {"k": keys.k, "v": keys.v, "place": keys.start}
    elif isinstance(keys, PagedKeys):
        tensors |= {"k": keys.k_pages, "v": keys.v_pages, "place": keys.page_table}
    for name, t in tensors.items():
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, q is on {device}")
    return lists


def _config_for(q: Tensor, memory: Memory, block_size: int) -> PrefillConfig:
    block_d = max(memory.constants["BLOCK_D"], memory.constants["BLOCK_DV"])
    if q.device.type != "cuda":
        return fit(replace(choose_config(block_d, torch.float32, shared_bytes=1 << 20, major=8), precision="ieee"), block_size)
    return _device_config(q.device.index or 0, block_d, q.dtype, block_size)


@cache
def _device_config(device: int, block_d: int, dtype: torch.dtype, block_size: int) -> PrefillConfig:
    major, _ = torch.cuda.get_device_capability(device)
    # the limit that Triton itself holds a kernel to
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return fit(choose_config(block_d, dtype, shared_bytes=shared_bytes, major=major), block_size)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded(head_dim: int) -> int:
    """The power of two that the kernel works with; a product needs at least 16."""
    return max(16, power_of_two(head_dim))
