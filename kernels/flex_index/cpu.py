"""The selection of one sequence, streaming: one head of the probe at a time, then everything batched over heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.kernels.block_sparse import Rows, cpu_native
from accel.kernels.block_sparse.cpu_probe import fp32_products_routed, route_for
from accel.kernels.flex_index.probe import Probe, run_native_probe, run_probe, sum_blocks
from accel.kernels.flex_index.result import HeadDiagnostics, SequenceSelection
from accel.kernels.flex_index.rule import SelectionRule
from accel.kernels.flex_index.select import estimate_probe, js_distance, query_aware_tiles, select_lines, slash_block_mass


def select_sequence(
    q: Tensor, k: Tensor, rows: Rows, rule: SelectionRule, *, scale: float, softcap: float | None, mean_keys: Tensor | None = None
) -> SequenceSelection:
    """Blocks of one sequence. q: (L, Hq, D), k: (Hkv, N, D), views in any floating dtype; the arithmetic is fp32.

    mean_keys: (Hkv, nk, D) fp32, the mean key of each block, where it is known already.
    """
    scale = rule.scale_of(scale, q.shape[-1])
    probe = probe_by_best_kernel(q, k, rows, block_size=rule.block_size, scale=scale, softcap=softcap, mean_keys=mean_keys)
    vertical_mass = sum_blocks(probe.column_mass, rule.block_size)
    slash_mass = slash_block_mass(probe.distance_mass, rule)
    estimate = estimate_probe(probe.mean_query, probe.mean_keys, rows, rule, scale=scale, softcap=softcap)
    distance = js_distance(estimate, vertical_mass, is_guarded=not rule.is_published)
    is_query_aware = distance < rule.tau
    is_finite = probe.column_mass.sum(-1).isfinite()

    vertical, vertical_tokens, vertical_blocks = select_lines(probe.column_mass, vertical_mass, is_query_aware, rule.sink_blocks, rule)
    slash, slash_tokens, slash_blocks = select_lines(probe.distance_mass, slash_mass, is_query_aware, rule.local_blocks, rule)
    heads, extra = is_query_aware.nonzero()[:, 0], None
    if heads.numel():
        extra, is_finite[heads] = query_aware_tiles(q, probe.mean_keys, heads, rows, rule, scale=scale, softcap=softcap)
    diagnostics = HeadDiagnostics(
        is_query_aware=is_query_aware,
        distance=distance,
        vertical_tokens=vertical_tokens,
        slash_tokens=slash_tokens,
        vertical_blocks=vertical_blocks,
        slash_blocks=slash_blocks,
        vertical_mass=vertical_mass,
        slash_mass=slash_mass,
        tile_mass=probe.tile_mass,
    )
    return SequenceSelection(vertical, slash, heads, extra, is_finite, diagnostics)


def probe_by_best_kernel(
    q: Tensor, k: Tensor, rows: Rows, *, block_size: int, scale: float, softcap: float | None, mean_keys: Tensor | None = None
) -> Probe:
    """The probe by the compiled kernel where attention itself runs on it, and by torch elsewhere."""
    options: dict[str, Any] = {"block_size": block_size, "scale": scale, "softcap": softcap, "mean_keys": mean_keys}
    if q.device.type != "cpu":
        return run_probe(q, k, rows, **options)
    if cpu_native.takes(q.dtype, q.shape[2]) and q.dtype == k.dtype and q.stride(-1) == 1 and route_for(q.dtype, "accurate").kernel == "native":
        return run_native_probe(q, k, rows, **options)
    with fp32_products_routed(route_for(torch.float32, "accurate").is_routed):
        return run_probe(q, k, rows, **options)
