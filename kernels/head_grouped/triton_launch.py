"""Host side of the head-group kernels: pairs of groups, tile sizes, workspace, one launch per pair. Reads no value from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels.block_sparse.triton_decode import LOG2E, MAX_ROWS, WAVES, DecodeConfig, multiprocessors
from accel.kernels.block_sparse.triton_launch import PrefillConfig, choose_config, fit
from accel.kernels.block_sparse.triton_workspace import workspace
from accel.kernels.head_grouped import triton_kernels as kernels
from accel.kernels.head_grouped.groups import KVGroup


@torch.no_grad()
def triton_grouped(
    q: Tensor,
    groups: Sequence[KVGroup],
    *,
    scale: float,
    softcap: float | None,
    n_causal: int,
    out: Tensor,
    lse: Tensor | None,
    config: PrefillConfig | DecodeConfig | None = None,
) -> None:
    """Writes the attention of every row into `out` (B, Hq, L, D), last stride 1, and its LSE into `lse` (B, Hq, L) fp32 where given.

    One launch for each two groups, the longest first. Up to `MAX_ROWS` rows by the decode kernel, more by the prefill kernel, or as `config`
    says. Nothing waits for the device, and no memory depends on values: a CUDA graph may record it after one call of the same head numbers,
    which are sent to the device once. Fastest where all strides are multiples of 16 elements; nothing is copied where they are not.
    """
    batch, n_heads, n_rows, head_dim = q.shape
    if not batch * n_rows:
        return
    each = n_heads // sum(len(group.heads) for group in groups)
    block_d = max(16, triton.next_power_of_2(head_dim))
    ordered = sorted(groups, key=lambda group: -group.n_entries)
    if config is None:
        config = decode_config(q, each) if n_rows <= MAX_ROWS else prefill_config(q)
    for i in range(0, len(ordered), 2):
        pair = ordered[i : i + 2]
        arguments = {
            **_memory(q, pair, out, lse),
            "scale_log2": scale * LOG2E,
            "cap_log2": 0.0 if softcap is None else softcap * LOG2E,
            "cap_scale": 0.0 if softcap is None else 2 * LOG2E * scale / softcap,
            "L": n_rows, "n_causal": n_causal, "HQ": n_heads, "G": each, "D": head_dim, "BLOCK_D": block_d, "SOFTCAP": softcap is not None,
            # the interpreter multiplies the bits of bf16 numbers
            "UPCAST": q.device.type == "cpu" and q.dtype == torch.bfloat16,
        }  # fmt: skip
        if isinstance(config, DecodeConfig):
            _launch_decode(config, arguments, pair, batch=batch, rows=each * n_rows, block_d=block_d, device=q.device)
        else:
            _launch_prefill(fit(config, n_rows), arguments, pair, batch=batch, each=each, n_rows=n_rows)


def _launch_prefill(
    config: PrefillConfig, arguments: dict[str, Any], pair: Sequence[KVGroup], *, batch: int, each: int, n_rows: int
) -> None:
    n_tiles = triton.cdiv(n_rows, config.rows)
    programs = [n_tiles * each * len(group.heads) * batch for group in pair]
    kernels.head_grouped_fwd_kernel[(sum(programs),)](
        **arguments, n_tiles=n_tiles, n_first=programs[0], ROWS=config.rows, COLS=config.cols, PRECISION=config.precision,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_decode(
    config: DecodeConfig, arguments: dict[str, Any], pair: Sequence[KVGroup], *, batch: int, rows: int, block_d: int, device: torch.device
) -> None:
    n_m, tiles = triton.cdiv(rows, config.block_m), [triton.cdiv(group.n_entries, config.block_n) for group in pair]
    heads = [batch * n_m * len(group.heads) for group in pair]
    # as many tiles for every program as fill the device, or as split the longest head in so many parts
    wanted = triton.cdiv(sum(n * t for n, t in zip(heads, tiles, strict=True)), WAVES * multiprocessors(device))
    fewest = triton.cdiv(config.min_tokens, config.block_n)
    tiles_each = max(1, fewest, wanted) if config.splits is None else max(1, triton.cdiv(max(tiles), config.splits))
    splits = [max(1, triton.cdiv(t, tiles_each)) for t in tiles]
    programs = [n * s for n, s in zip(heads, splits, strict=True)]
    # without splits never read, but the kernel is compiled for their types
    n_parts = sum(programs) if max(splits) > 1 else 0
    buffers = workspace.on_stream_of(device)
    kernels.head_grouped_decode_kernel[(sum(programs),)](
        **arguments,
        part_ptr=buffers.take("parts", n_parts * config.block_m * (block_d + 2), torch.float32),
        counter_ptr=buffers.take("arrivals", n_parts, torch.int32, is_zero=True),
        n_first=programs[0], splits0=splits[0], splits1=splits[-1], tiles_each=tiles_each,
        N_M=n_m, ROWS=config.block_m, COLS=config.block_n, PRECISION="ieee",
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


def _memory(q: Tensor, pair: Sequence[KVGroup], out: Tensor, lse: Tensor | None) -> dict[str, Any]:
    """The arguments that say where everything lies. A single group is also its own second one, without heads."""
    first, second = pair[0], pair[-1]
    heads = tuple(head for group in pair for head in group.heads)
    found: dict[str, Any] = {
        "q_ptr": q, "out_ptr": out, "lse_ptr": lse, "heads_ptr": head_numbers(heads, q.device),
        "H0": len(first.heads), "H1": len(heads) - len(first.heads),
    }  # fmt: skip
    found |= _strides("q", "bhl", q) | _strides("o", "bhl", out)
    for i, group in enumerate((first, second)):
        found |= {f"k{i}_ptr": group.k, f"v{i}_ptr": group.v, f"N{i}": group.n_entries}
        found[f"len{i}_ptr"] = None if group.length is None else group.length.contiguous()
        found |= _strides(f"k{i}", "bhn", group.k) | _strides(f"v{i}", "bhn", group.v)
    return found


def _strides(name: str, axes: str, t: Tensor) -> dict[str, int]:
    """0 along single entries: the value is never used, but an odd one would cost the kernel its aligned loads."""
    steps = zip(axes, t.shape[:3], t.stride()[:3], strict=True)
    return {f"stride_{name}{axis}": stride if size > 1 else 0 for axis, size, stride in steps}


@cache
def head_numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on the device. Never freed: a CUDA graph keeps reading where it was captured."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def decode_config(q: Tensor, each: int) -> DecodeConfig:
    """The tile for the rows of one KV head."""
    return DecodeConfig.of_shape(each * q.shape[2], q.shape[3], q.element_size(), 128)


def prefill_config(q: Tensor) -> PrefillConfig:
    """The tiles for this head_dim and device."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    if q.device.type != "cuda":
        return replace(choose_config(block_d, torch.float32, shared_bytes=1 << 20, major=8), precision="ieee")
    return _device_config(q.device, block_d, q.dtype)


@cache
def _device_config(device: torch.device, block_d: int, dtype: torch.dtype) -> PrefillConfig:
    major, _ = torch.cuda.get_device_capability(device)
    # the limit that Triton itself holds a kernel to
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return choose_config(block_d, dtype, shared_bytes=shared_bytes, major=major)
