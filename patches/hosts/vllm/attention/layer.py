"""One attention layer of vLLM: the requests of a step that a method thins out, computed from the paged cache by our kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.kernels.block_sparse import BlockPlan, KeyView, Ragged, Rows, block_sparse_attention, dense_attention
from accel.kernels.block_sparse.ragged import gapless_rows
from accel.patches.hosts.vllm.attention.rows import LayerRule
from accel.protocols import AttentionContext, RunDense
from accel.stats import LayerStats, Stats

# (page table, kv_len) -> the keys of these requests
Keys = Callable[[Tensor, Tensor], KeyView]
# vLLM's own attention: writes into `out` what `metadata` describes. (q, metadata, out), both (tokens, Hq, D)
Stock = Callable[[Tensor, Any, Tensor], object]


@dataclass(frozen=True)
class RowBatch:
    """Requests of a step that go through one call of our kernels. lens counts query rows from `first_token` on; table: (R, pages) int32."""

    rows: tuple[Rows, ...]
    lens: Ragged
    table: Tensor
    first_token: int
    end_token: int

    @classmethod
    def of(cls, rows: tuple[Rows, ...], table: Tensor) -> RowBatch:
        """The batch of some rows of a step. table: that of the whole step, on the device that computes."""
        first = min(r.q_start for r in rows)
        numbers = torch.tensor([[r.index, r.q_start - first, r.q_len, r.kv_len] for r in rows]).T.contiguous()
        if table.device.type != "cpu":
            numbers = numbers.pin_memory().to(table.device, non_blocking=True)
        index, q_start, q_len, kv_len = numbers.unbind(0)
        max_q, max_kv = max(r.q_len for r in rows), max(r.kv_len for r in rows)
        gapless = gapless_rows((r.q_start - first for r in rows), (r.q_len for r in rows))
        lens = Ragged(q_start, q_len, kv_len, max_q=max_q, max_kv=max_kv, n_gapless=gapless)
        return cls(rows, lens, table.index_select(0, index), first, max(r.q_start + r.q_len for r in rows))

    @property
    def has_gaps(self) -> bool:
        """Whether tokens of other requests lie between those of these."""
        return sum(r.q_len for r in self.rows) != self.end_token - self.first_token

    def alone(self) -> list[RowBatch]:
        """Every request as a batch of its own."""
        own = [Rows(i, r.q_start, r.q_len, r.kv_len) for i, r in enumerate(self.rows)]
        return [RowBatch.of((rows,), self.table) for rows in own]


@dataclass(frozen=True)
class LayerWork:
    """What a layer does in one step.

    rest: metadata with which vLLM's attention runs first; None where it has nothing to do. tokens: the queries it computes, None for all.
    sparse, dense: what our kernels compute then, by a plan of the method or with every key.
    """

    rest: Any
    tokens: slice | Tensor | None
    sparse: RowBatch | None
    dense: RowBatch | None


@dataclass(frozen=True)
class SparseLayer:
    """A layer that runs a method.

    scale: its softmax scale. keeps_means: whether the mean keys of its pages may be kept: nobody but the layer writes to them, and the method asks.
    """

    rule: LayerRule
    scale: float
    counters: Stats
    keeps_means: bool = False

    @property
    def stats(self) -> LayerStats:
        """The layer's counters, to write to."""
        return self.counters.layer(self.rule.layer)

    def attend(self, q: Tensor, keys: Keys, work: LayerWork, out: Tensor, *, stock: Stock) -> None:
        """Writes the attention of a whole step. q, out: (tokens, Hq, D)."""
        if work.rest is not None:
            if isinstance(work.tokens, Tensor):
                part = out[work.tokens]
                stock(q[work.tokens], work.rest, part)
                out[work.tokens] = part
            else:
                here = slice(None) if work.tokens is None else work.tokens
                stock(q[here], work.rest, out[here])
        if work.sparse is not None:
            self._attend_sparse(q, keys, work.sparse, out)
        if work.dense is not None:
            # counted under its reason when the step was divided
            self._run(q, keys(work.dense.table, work.dense.lens.kv_len), None, work.dense, out)

    def _attend_sparse(self, q: Tensor, keys: Keys, batch: RowBatch, out: Tensor) -> None:
        view = keys(batch.table, batch.lens.kv_len)
        started = time.perf_counter()
        plan = self._plan(q[batch.first_token : batch.end_token], view, batch.lens)
        planned = time.perf_counter()
        if isinstance(plan, RunDense):
            if len(batch.rows) > 1:
                # what keeps one request dense says nothing of the others
                for alone in batch.alone():
                    self._attend_sparse(q, keys, alone, out)
                return
            self.stats.selection_s += planned - started
            self.stats.dense_calls[plan.reason] += 1
            self._run(q, view, None, batch, out)
            return
        self._run(q, view, plan, batch, out)
        tiles = plan.tile_counts(batch.lens, q.shape[1])
        # reading a number from a GPU would wait for all that runs there
        self.stats.count_sparse(tiles, is_deferred=q.device.type != "cpu", calls=len(batch.rows))
        self.stats.selection_s += planned - started
        self.stats.attention_s += time.perf_counter() - planned

    def _plan(self, q: Tensor, keys: KeyView, lens: Ragged) -> BlockPlan | RunDense:
        step = self.rule.step(lens.max_q, lens.max_kv, lens.batch)
        static = self.rule.method.static_pattern(step)
        if static is not None:
            return static
        plan = self.rule.method.plan(q, keys, AttentionContext(step=step, lens=lens, scale=self.scale))
        # some methods draw their plan on the host
        return plan if isinstance(plan, RunDense) else plan.to(q.device)

    def _run(self, q: Tensor, keys: KeyView, plan: BlockPlan | None, batch: RowBatch, out: Tensor) -> None:
        here = slice(batch.first_token, batch.end_token)
        # the kernels clear rows that belong to none of their sequences
        target = torch.empty_like(out[here]) if batch.has_gaps else out[here]
        options: dict[str, Any] = {"scale": self.scale, "precision": self.rule.method.precision, "out": target}
        if plan is None:
            dense_attention(q[here], keys, batch.lens, **options)
        else:
            block_sparse_attention(q[here], keys, plan, batch.lens, **options)
        if batch.has_gaps:
            for rows in batch.rows:
                at = rows.q_start - batch.first_token
                out[rows.q_start : rows.q_start + rows.q_len] = target[at : at + rows.q_len]
