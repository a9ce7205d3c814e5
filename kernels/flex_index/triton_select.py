"""The host side of the selection on a GPU: what it can run, its buffers and its launches. Reads no tensor, so nothing waits for the device."""

from __future__ import annotations

import math
import os
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from accel.kernels.block_sparse import ContiguousKeys, KeyView, PagedKeys, Ragged, Rows, VerticalSlashPlan
from accel.kernels.flex_index.result import HeadDiagnostics
from accel.kernels.flex_index.rule import SelectionRule

# Tiles of all query-aware maps together: one byte each in the plan, four more while it is made. 2**28 are 1.25 GiB.
MAP_TILES = 2**28
_BLOCK_SIZES = (16, 32, 64, 128)
# fp32 is for the interpreter: its products have no tensor cores, and then a tile does not fit the registers
_DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float16, torch.float32)}
# Programs of the two passes over the keys: a few waves on any GPU, and long enough each to be worth the queries they load.
_PROBE_PROGRAMS = 1024
_FEWEST_TILES = 4
_LOG2_E = math.log2(math.e)

# What the launches pass to the compiler, chosen so that these kernels spill no registers on sm_80, sm_90 and sm_100 (tests/aot).
SEARCH_CHUNK, MAP_KEYS = 2048, 32
SEARCH_WARPS, MAP_WARPS = 16, 8


def probe_options(block_size: int, block_d: int, element_size: int, *, shared_bytes: int, major: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the two passes over the keys, on a device of compute capability `major`.x with this much shared memory per program."""
    stats, masses = {128: (8, 8), 64: (4, 8)}.get(block_size, (4, 4))
    if major == 9 and block_size == 128:
        # Fewer warps, two programs beside each other: 208 and 430 µs on an H200, where 8 warps take 270 and 527, although a few values of the
        # second pass then lie in local memory
        stats, masses = 4, 4
    cols = min(block_size, 64)
    row = block_d * element_size
    shared = {"COLS": cols, "enable_fp_fusion": True}

    def stages(scratch: int) -> int:
        """Three key tiles in flight, the last one beside the arithmetic, where they fit beside the queries; fewer where not."""
        room = shared_bytes - scratch - block_size * row
        return max(1, min(3, room // (cols * row)))

    # the second pass turns its tile through shared memory
    n_stages = stages(2048), stages(2048 + 4 * block_size * cols)
    return {"num_warps": stats, "num_stages": n_stages[0], **shared}, {"num_warps": masses, "num_stages": n_stages[1], **shared}


@cache
def _limits(device: torch.device) -> dict[str, int]:
    """What `probe_options` asks of a device."""
    if device.type != "cuda":
        return {"shared_bytes": 1 << 20, "major": 0}
    import triton

    index = torch.cuda.current_device() if device.index is None else device.index
    # the limit that Triton itself holds a kernel to
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return {"shared_bytes": shared_bytes, "major": torch.cuda.get_device_capability(index)[0]}


def line_warps(block_nk: int) -> int:
    """Warps of `select_lines`: 8 blocks a thread; up to 2048 blocks no register spills, beyond a few do outside the loops."""
    return max(4, min(block_nk // 256, 16))


def obstacles(q: Tensor, keys: KeyView, lens: Ragged, rule: SelectionRule) -> list[str]:
    """Every reason why the kernels cannot select for these tensors; empty where they can."""
    found = []
    if q.device.type != "cuda" and not (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        found.append(f"q is on {q.device}: Triton needs a CUDA device")
    read = {"keys": keys.storage, "q_start": lens.q_start, "q_len": lens.q_len, "kv_len": lens.kv_len}
    if isinstance(keys, (ContiguousKeys, PagedKeys)):
        read["place of the keys"] = keys.start if isinstance(keys, ContiguousKeys) else keys.page_table
    found += [f"q is on {q.device}, {name} on {t.device}" for name, t in read.items() if t.device != q.device]
    if isinstance(keys, PagedKeys) and keys.page_table.stride(-1) != 1:
        found.append(f"page_table must have last stride 1, got {keys.page_table.stride()}")
    if rule.is_published:
        found.append("fidelity='published' is run by torch only")
    if rule.block_size not in _BLOCK_SIZES:
        found.append(f"block_size must be one of {', '.join(map(str, _BLOCK_SIZES))}, got {rule.block_size}")
    dtypes = _DTYPES.get(q.device.type, _DTYPES["cuda"])
    if q.dtype not in dtypes or keys.dtype != q.dtype:
        found.append(f"q and keys must both be {' or '.join(map(str, dtypes))} on {q.device.type}, got {q.dtype} and {keys.dtype}")
    if q.shape[-1] > 256:
        found.append(f"head_dim must be at most 256, got {q.shape[-1]}")
    if not isinstance(keys, (ContiguousKeys, PagedKeys)):
        found.append(f"no kernel reads {type(keys).__name__}")
    tiles = q.shape[1] * lens.batch * math.prod(map_shape(lens, rule.block_size))
    if rule.tau > 0 and tiles > MAP_TILES:
        found.append(f"the maps of query-aware heads would take {tiles} tiles, above the limit of {MAP_TILES}; tau=0 needs none")
    if not found:
        try:
            import triton  # noqa: F401
        except ImportError:
            found.append("triton is not installed")
    return found


def map_shape(lens: Ragged, block_size: int) -> tuple[int, int]:
    """Most query blocks and most key blocks that a sequence of the batch can have."""
    nk = -(-lens.max_kv // block_size)
    # rows of one call that start anywhere in a block
    return min(nk, (lens.max_q + 2 * block_size - 2) // block_size if lens.max_q else 0), nk


@dataclass(frozen=True)
class Selected:
    """The plan of the batch, and the numbers behind it where they were asked for."""

    plan: VerticalSlashPlan
    is_finite: Tensor               # (B, Hq) bool
    buffers: _Buffers | None        # None where every sequence is kept whole

    def diagnostics(self, rows: Rows) -> HeadDiagnostics:
        """Of one sequence that was looked at. Exact only after `select(..., exact=True)`."""
        assert self.buffers is not None
        found, b, at = self.buffers, self.plan.block_size, rows.index
        nk = rows.key_blocks(b)
        masses = found.block_mass[:, at, :, :nk]
        early = found.tile_mass[at, :, :nk]
        length = min(b, rows.q_len)
        straddles = (rows.kv_len - length) // b != (rows.kv_len - 1) // b
        return HeadDiagnostics(
            is_query_aware=found.is_aware[at],
            distance=found.distance[at],
            vertical_tokens=found.tokens[0, at].long(),
            slash_tokens=found.tokens[1, at].long(),
            vertical_blocks=found.blocks[0, at].long(),
            slash_blocks=found.blocks[1, at].long(),
            vertical_mass=masses[0],
            slash_mass=masses[1],
            tile_mass=torch.stack([early, masses[0] - early], 1) if straddles else masses[0][:, None],
        )


@dataclass(frozen=True)
class _Buffers:
    """Everything the kernels write, sized by upper bounds alone."""

    row_max: Tensor         # (B, Hq, S, b) fp32
    row_sum: Tensor         # (B, Hq, S, b) fp32
    mean_keys: Tensor       # (B, Hkv, nk, D) fp32
    token_mass: Tensor      # (2, B, Hq, nk·b) fp32: a_v, a_s
    block_mass: Tensor      # (2, B, Hq, nk) fp32: u_v, u_s
    estimate: Tensor        # (B, Hq, nk) fp32
    tile_mass: Tensor       # (B, Hq, nk) fp32; empty unless asked for
    tokens: Tensor          # (2, B, Hq) int32: K_v, K_s
    blocks: Tensor          # (2, B, Hq) int32: n_v, n_s
    distance: Tensor        # (B, Hq) fp32
    lines: Tensor           # (2, B, Hq, nk) bool
    is_aware: Tensor        # (B, Hq) bool
    is_finite: Tensor       # (B, Hq) bool
    map: Tensor             # (B, Hq, nq, nk) fp32; empty without query-aware heads
    extra: Tensor           # (B, Hq, nq, nk) bool; empty without query-aware heads

    @classmethod
    def empty(cls, q: Tensor, keys: KeyView, lens: Ragged, rule: SelectionRule, *, n_splits: int, with_tiles: bool) -> _Buffers:
        (nq, nk), b = map_shape(lens, rule.block_size), rule.block_size
        heads, maps = (lens.batch, q.shape[1]), nq if rule.tau > 0 else 0

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=q.device)

        return cls(
            row_max=new(*heads, n_splits, b),
            row_sum=new(*heads, n_splits, b),
            mean_keys=new(lens.batch, keys.n_kv_heads, nk, q.shape[2]),
            token_mass=new(2, *heads, nk * b),
            block_mass=new(2, *heads, nk),
            estimate=new(*heads, nk),
            tile_mass=new(*heads, nk if with_tiles else 0),
            tokens=new(2, *heads, dtype=torch.int32),
            blocks=new(2, *heads, dtype=torch.int32),
            distance=new(*heads),
            lines=new(2, *heads, nk, dtype=torch.bool),
            is_aware=new(*heads, dtype=torch.bool),
            is_finite=new(*heads, dtype=torch.bool),
            map=new(*heads, maps, nk),
            extra=new(*heads, maps, nk, dtype=torch.bool),
        )


@torch.no_grad()
def select(
    q: Tensor, keys: KeyView, lens: Ragged, *, rule: SelectionRule, scale: float, softcap: float | None, exact: bool = False
) -> Selected:
    """The plan of a batch by at most six launches. `obstacles` must be empty.

    q: (tokens, Hq, D) view, any strides. Lengths are read on the device; wrong ones are not noticed. `extra` of the plan exists wherever
    `tau` > 0, at B·Hq·nq·nk bytes, because which heads are query-aware is known on the device only.
    exact: also finishes the searches that only diagnostics need, and splits the probe's mass by query block.
    """
    nk = map_shape(lens, rule.block_size)[1]
    if rule.gamma >= 1.0 or not nk or not q.shape[1]:
        return _whole(q, lens, rule)
    tiles_each = max(_FEWEST_TILES, -(-nk * lens.batch * q.shape[1] // _PROBE_PROGRAMS))
    found = _Buffers.empty(q, keys, lens, rule, n_splits=-(-nk // tiles_each), with_tiles=exact)
    with _on_device_of(q):
        _launch(q, keys, lens, found, rule, _scales(scale, softcap), tiles_each=tiles_each, exact=exact)
    vertical, slash, extra = found.lines[0], found.lines[1], found.extra if found.extra.numel() else None
    if rule.gqa_mode == "group_union":
        vertical, slash = (_united(mask, keys.n_kv_heads) for mask in (vertical, slash))
        extra = None if extra is None else _united(extra, keys.n_kv_heads)
    return Selected(VerticalSlashPlan(rule.block_size, vertical, slash, extra), found.is_finite, found)


def _launch(
    q: Tensor, keys: KeyView, lens: Ragged, found: _Buffers, rule: SelectionRule, scales: tuple[float, float, bool], *, tiles_each: int, exact: bool
) -> None:
    import triton

    from accel.kernels.flex_index import triton_kernels as kernels

    (nq, nk), b, heads, head_dim = map_shape(lens, rule.block_size), rule.block_size, q.shape[1], q.shape[2]
    batch, n_splits = lens.batch, found.row_max.shape[2]
    scale, cap, has_cap = scales
    k, place, page, key_strides = _key_layout(keys)
    q_start, *lengths = (t.contiguous() for t in (lens.q_start, lens.q_len, lens.kv_len))
    short = (rule.min_q, rule.min_kv)
    gamma = _two_floats(rule.gamma)
    group = heads // keys.n_kv_heads
    block_d, block_nk = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(nk)
    sizes = {"D": head_dim, "BLOCK": b, "BLOCK_D": block_d, "PAGE": page, "HAS_CAP": has_cap, "UPCAST": q.device.type == "cpu"}
    probe = (q, k, place, q_start, *lengths)
    strides = (*q.stride(), *key_strides)
    numbers = (scale, cap, *short, tiles_each, nk, group)
    for_stats, for_masses = probe_options(b, block_d, q.element_size(), **_limits(q.device))

    kernels.probe_stats_fwd_kernel[(heads, n_splits, batch)](
        *probe, found.row_max, found.row_sum, found.mean_keys, *strides, *numbers, **sizes, **for_stats
    )
    kernels.probe_masses_fwd_kernel[(heads, n_splits, batch)](
        *probe, found.row_max, found.row_sum, found.mean_keys, found.token_mass, found.estimate, found.tile_mass,
        *strides, *numbers, **sizes, TILES=exact, **for_masses,
    )
    kernels.token_counts_fwd_kernel[(heads, 2, batch)](
        *lengths, found.token_mass, found.tokens, found.block_mass, *gamma, *short, nk,
        BLOCK=b, CHUNK=max(SEARCH_CHUNK, b), SPLIT=rule.slash_pooling == "split", EXACT=exact, num_warps=SEARCH_WARPS,
        enable_fp_fusion=True,
    )
    budgets = (rule.blocks(rule.min_budget), 2**30 if rule.max_budget is None else rule.blocks(rule.max_budget))
    kernels.select_lines_fwd_kernel[(heads, 2, batch)](
        *lengths, found.tokens, found.block_mass, found.estimate, _bytes(found.lines), _bytes(found.is_aware), _bytes(found.is_finite),
        found.distance, found.blocks, *gamma, float(rule.tau), *short, *budgets, rule.sink_blocks, rule.local_blocks, nk,
        BLOCK=b, BLOCK_NK=block_nk, COVER=rule.coverage == "block", SIZED=rule.size_corrected_estimate, num_warps=line_warps(block_nk),
        enable_fp_fusion=True,
    )
    if not found.extra.numel():
        return
    by_row = rule.qa_scope == "row"
    kernels.pooled_map_fwd_kernel[(nq, heads, batch)](
        q, q_start, *lengths, found.mean_keys, _bytes(found.is_aware), _bytes(found.lines), _bytes(found.is_finite), found.map,
        _bytes(found.extra), *q.stride(), scale, cap, *gamma, nk, group,
        D=head_dim, BLOCK=b, BLOCK_D=block_d, BLOCK_J=MAP_KEYS, BLOCK_NK=block_nk, HAS_CAP=has_cap, BY_ROW=by_row,
        num_warps=MAP_WARPS, enable_fp_fusion=True,
    )
    if not by_row:
        kernels.map_cover_fwd_kernel[(heads, batch)](
            *lengths, _bytes(found.is_aware), found.map, _bytes(found.extra), *gamma, nq, nk,
            BLOCK=b, BLOCK_NK=block_nk, CHUNK=SEARCH_CHUNK, num_warps=SEARCH_WARPS,
            enable_fp_fusion=True,
        )


def _whole(q: Tensor, lens: Ragged, rule: SelectionRule) -> Selected:
    """Every tile of every sequence, by columns."""
    nk = map_shape(lens, rule.block_size)[1]
    blocks = (lens.kv_len + rule.block_size - 1) // rule.block_size
    is_held = torch.arange(nk, device=q.device) < blocks[:, None]
    vertical = is_held[:, None].repeat(1, q.shape[1], 1)
    is_finite = torch.ones(vertical.shape[:2], dtype=torch.bool, device=q.device)
    return Selected(VerticalSlashPlan(rule.block_size, vertical, torch.zeros_like(vertical)), is_finite, None)


def _key_layout(keys: KeyView) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
    """K, where its rows lie, tokens of a page (0 without pages), and the strides of pages, rows, heads, columns and the page table."""
    if isinstance(keys, PagedKeys):
        return keys.k_pages, keys.page_table, keys.page_size, (*keys.k_pages.stride(), keys.page_table.stride(0))
    assert isinstance(keys, ContiguousKeys)
    return keys.k, keys.start.contiguous(), 0, (0, *keys.k.stride(), 0)


def _scales(scale: float, softcap: float | None) -> tuple[float, float, bool]:
    """Arguments of `scaled_logits`: log2(e) sits in the first without a soft-cap, in the second with one."""
    return (scale * _LOG2_E, 0.0, False) if softcap is None else (scale / softcap, softcap * _LOG2_E, True)


def _two_floats(x: float) -> tuple[float, float]:
    """x as a sum of two fp32 numbers: a launch would round a single one."""
    (high,) = struct.unpack("f", struct.pack("f", x))
    return high, x - high


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8)


def _united(mask: Tensor, n_kv_heads: int) -> Tensor:
    """Every head with the tiles of its whole KV group. mask: (B, Hq, …)."""
    grouped = mask.reshape(mask.shape[0], n_kv_heads, -1, *mask.shape[2:])
    return grouped.any(2, keepdim=True).expand_as(grouped).reshape(mask.shape)


def _on_device_of(q: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever the tensors' own
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()
