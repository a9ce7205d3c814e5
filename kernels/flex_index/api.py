"""`flex_index`: checks, and one plan for the batch: by kernels for all sequences together, or sequence by sequence."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse import KeyView, Ragged, Rows, VerticalSlashPlan
from accel.kernels.flex_index import cpu, naive, triton_select
from accel.kernels.flex_index.result import FlexIndex, HeadDiagnostics, SequenceSelection
from accel.kernels.flex_index.rule import SelectionRule

Impl = Literal["auto", "triton", "cpu", "naive"]

# "cpu" is plain torch and runs on any device; "naive" is the definition, in fp64 and with loops.
_SELECTORS = {"cpu": cpu.select_sequence, "naive": naive.select_sequence}

# Calls of this process by executor: "triton", "cpu", "naive"; where "auto" could not use the kernels on CUDA tensors also under "auto->cpu".
dispatches: Counter[str] = Counter()

_log = logging.getLogger(__name__)


@torch.no_grad()
def flex_index(
    q: Tensor,
    keys: KeyView,
    lens: Ragged,
    *,
    rule: SelectionRule,
    scale: float,
    softcap: float | None = None,
    impl: Impl = "auto",
    diagnostics: bool = False,
) -> FlexIndex:
    """FlexPrefill's plan of a batch, found from the attention of each sequence's last queries (sparse-attention.md §2.3–2.7).

    q: (tokens, Hq, D) view, post-RoPE, the rows of sequence b given by `lens`; rows in gaps are never read. keys: the same sequences,
    cached prefix included; Hq a multiple of Hkv, query head h reads KV head h // (Hq / Hkv). scale, softcap: the layer's.
    A sequence that the rule keeps whole (`gamma` 1, or too short) and a head whose attention is not finite keep every tile.
    impl: "auto" takes the kernels for CUDA tensors and torch elsewhere; where the kernels cannot run (the published fidelity, fp64, maps of
    query-aware heads beyond `triton_select.MAP_TILES`, …) torch does, logged once and counted in `dispatches`. "triton" runs or raises
    UnsupportedError with the reasons; its plan holds `extra` wherever `tau` > 0, and without `diagnostics` nothing waits for the device.
    Raises ValueError where shapes disagree, UnsupportedError for other than floating 16-, 32- or 64-bit tensors.
    """
    _check(q, keys, lens)
    chosen = _choose(impl, q, keys, lens, rule)
    dispatches[chosen] += 1
    if chosen == "triton":
        return _by_kernels(q, keys, lens, rule, scale=scale, softcap=softcap, diagnostics=diagnostics)
    select_sequence = _SELECTORS[chosen]
    all_rows = list(lens.rows())
    draft = _Draft.empty(all_rows, q, rule)
    details: list[HeadDiagnostics | None] = []
    for rows in all_rows:
        _check_lengths(rows, keys)
        if rows.q_len == 0 or rule.keeps_everything(rows.q_len, rows.kv_len):
            draft.keep_all(rows)
            details.append(None)
            continue
        k, _ = keys.tokens(rows.index)
        known: dict[str, Tensor] = {}
        if chosen == "cpu" and keys.keeps_means(rule.block_size):
            known["mean_keys"] = keys.block_mean(rows.index, rule.block_size)
        found = select_sequence(q[rows.q_start : rows.q_start + rows.q_len], k, rows, rule, scale=scale, softcap=softcap, **known)
        draft.add(rows, found)
        details.append(found.diagnostics)
    if rule.gqa_mode == "group_union":
        draft.unite_groups(keys.n_kv_heads)
    plan = VerticalSlashPlan(rule.block_size, draft.vertical, draft.slash, draft.extra)
    if not diagnostics:
        return FlexIndex(plan, draft.is_finite)
    covered = (d and replace(d, probe_coverage=_coverage(d.tile_mass, plan, rows)) for d, rows in zip(details, all_rows, strict=True))
    return FlexIndex(plan, draft.is_finite, tuple(covered))


def _choose(impl: Impl, q: Tensor, keys: KeyView, lens: Ragged, rule: SelectionRule) -> str:
    """Name of the executor that runs; raises where the asked one cannot."""
    if impl in _SELECTORS:
        return impl
    if impl not in ("auto", "triton"):
        raise OptionError(f"flex_index: impl must be one of triton, auto, {', '.join(_SELECTORS)}, got {impl!r}")
    if impl == "auto" and q.device.type != "cuda":
        return "cpu"
    obstacles = triton_select.obstacles(q, keys, lens, rule)
    if not obstacles:
        return "triton"
    if impl == "triton":
        raise UnsupportedError("flex_index cannot run impl='triton'", obstacles)
    dispatches["auto->cpu"] += 1
    _log_fallback("; ".join(obstacles))
    return "cpu"


@cache
def _log_fallback(reasons: str) -> None:
    # cached: a reason is logged once
    _log.warning("flex_index selects by torch, sequence by sequence: %s", reasons)


def _by_kernels(
    q: Tensor, keys: KeyView, lens: Ragged, rule: SelectionRule, *, scale: float, softcap: float | None, diagnostics: bool
) -> FlexIndex:
    if q.device.type == "cpu":
        # lengths that disagree would be read out of bounds; on a GPU looking at them would wait for it
        for rows in lens.rows():
            _check_lengths(rows, keys)
    found = triton_select.select(q, keys, lens, rule=rule, scale=scale, softcap=softcap, exact=diagnostics)
    if not diagnostics:
        return FlexIndex(found.plan, found.is_finite)
    details: list[HeadDiagnostics | None] = []
    for rows in lens.rows():
        if rows.q_len == 0 or rule.keeps_everything(rows.q_len, rows.kv_len):
            details.append(None)
            continue
        heads = found.diagnostics(rows)
        details.append(replace(heads, probe_coverage=_coverage(heads.tile_mass, found.plan, rows)))
    return FlexIndex(found.plan, found.is_finite, tuple(details))


class _Draft:
    """The bitmaps of the batch while sequences are added. `extra` exists from the first query-aware head on."""

    def __init__(self, vertical: Tensor, n_query_blocks: int, rule: SelectionRule) -> None:
        self.vertical, self.slash = vertical, torch.zeros_like(vertical)
        self.extra: Tensor | None = None
        self.is_finite = torch.ones(vertical.shape[:2], dtype=torch.bool, device=vertical.device)
        self._n_query_blocks, self._rule = n_query_blocks, rule

    @classmethod
    def empty(cls, all_rows: list[Rows], q: Tensor, rule: SelectionRule) -> _Draft:
        nk = max((rows.key_blocks(rule.block_size) for rows in all_rows), default=0)
        nq = max((rows.query_blocks(rule.block_size) for rows in all_rows), default=0)
        return cls(torch.zeros(len(all_rows), q.shape[1], nk, dtype=torch.bool, device=q.device), nq, rule)

    def keep_all(self, rows: Rows) -> None:
        self.vertical[rows.index, :, : rows.key_blocks(self._rule.block_size)] = True

    def add(self, rows: Rows, found: SequenceSelection) -> None:
        nk = found.vertical.shape[-1]
        self.is_finite[rows.index] = found.is_finite
        self.vertical[rows.index, :, :nk] = found.vertical | ~found.is_finite[:, None]
        self.slash[rows.index, :, :nk] = found.slash
        if found.extra is not None:
            if self.extra is None:
                batch, n_heads, widest = self.vertical.shape
                self.extra = self.vertical.new_zeros(batch, n_heads, self._n_query_blocks, widest)
            self.extra[rows.index, found.heads, : found.extra.shape[1], :nk] = found.extra

    def unite_groups(self, n_kv_heads: int) -> None:
        """Gives every head the tiles of its whole KV group."""

        def united(mask: Tensor) -> Tensor:
            grouped = mask.reshape(mask.shape[0], n_kv_heads, -1, *mask.shape[2:])
            return grouped.any(2, keepdim=True).expand_as(grouped).reshape(mask.shape)

        self.vertical, self.slash = united(self.vertical), united(self.slash)
        self.extra = None if self.extra is None else united(self.extra)


def _coverage(tile_mass: Tensor, plan: VerticalSlashPlan, rows: Rows) -> Tensor:
    """Dense attention mass of the probe rows inside the plan, (Hq,)."""
    mask = plan.block_mask(rows)[:, -tile_mass.shape[1] :]
    return (tile_mass * mask).sum((-1, -2))


def _check(q: Tensor, keys: KeyView, lens: Ragged) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be (tokens, heads, head_dim), got shape {tuple(q.shape)}")
    if q.shape[1] % keys.n_kv_heads or q.shape[2] != keys.head_dim:
        raise ValueError(f"q has {q.shape[1]} heads of {q.shape[2]}, which does not fit {keys.n_kv_heads} key heads of {keys.head_dim}")
    if lens.batch != keys.kv_len.shape[0]:
        raise ValueError(f"lens describes {lens.batch} sequences, keys holds {keys.kv_len.shape[0]}")
    for name, dtype in (("q", q.dtype), ("keys", keys.dtype)):
        if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise UnsupportedError(f"flex_index needs floating tensors of at least 16 bits, but {name} is {dtype}: dequantise first")


def _check_lengths(rows: Rows, keys: KeyView) -> None:
    held = int(keys.kv_len[rows.index])
    if rows.kv_len != held or rows.q_len > rows.kv_len:
        raise ValueError(f"sequence {rows.index}: {rows.q_len} queries and {rows.kv_len} keys asked for, {held} keys held")
