"""The layers that share one set of vLLM's metadata: for every step, what each of them hands to which kernels. Built before the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.kernels.block_sparse import Rows
from accel.patches.hosts.vllm.attention.layer import LayerWork, RowBatch, SparseLayer
from accel.patches.hosts.vllm.attention.pages import PagePattern, TableBuffers
from accel.patches.hosts.vllm.attention.rows import Split, StepRows, count_decoding, split

# (key of the set, vLLM's common metadata) -> its metadata; sets with different keys live in different memory
Build = Callable[[Any, Any], Any]


@dataclass
class Group:
    """The attention layers of one of vLLM's metadata builders.

    most_rows: the most requests of a step, as far as known. is_speculative: drafts are verified, and what the host knows of their lengths
    may be too much.
    """

    layers: Sequence[SparseLayer]
    device: torch.device
    most_rows: int = 0
    is_speculative: bool = False
    _tables: dict[PagePattern, TableBuffers] = field(default_factory=dict, repr=False)

    def work(self, common: Any, whole: Any, build: Build, *, counts: bool) -> dict[int, LayerWork]:
        """What the layers do in this step, by layer index; a layer that is left out runs vLLM's attention on everything.

        common: vLLM's `CommonAttentionMetadata`; whole: its metadata for all requests and whole tables. counts: whether the step is a real one.
        """
        found = step_rows(common, is_speculative=self.is_speculative)
        if isinstance(found, str):
            if counts:
                n = int((common.query_start_loc_cpu.diff() > 0).sum())
                for layer in self.layers:
                    layer.stats.dense_calls[layer.rule.reason or found] += n
            return {}
        parts = _Parts(self, common, found, whole, build)
        work = {}
        for layer in self.layers:
            share = split(layer.rule, found)
            if counts:
                parts.count(layer, share)
            if (mine := parts.of(layer, share)) is not None:
                work[layer.rule.layer] = mine
        return work

    def compacted(self, common: Any, pages: PagePattern, *, has_several: bool) -> Any:
        """The common metadata with the shorter tables of requests that decode. has_several: whether others are there, which keep theirs."""
        table, lens = common.block_table_tensor, common.seq_lens
        buffers = self._tables.setdefault(pages, TableBuffers())
        out_table, out_lens = buffers.take(table, lens, rows=self.most_rows)
        width = min(table.shape[1], -(-common.max_seq_len // pages.page_size))
        is_single = common.query_start_loc.diff() == 1
        pages.compact(table[:, :width], lens, is_single, out_table=out_table[:, :width], out_lens=out_lens)
        longest = common.max_seq_len if has_several else pages.most_keys(common.max_seq_len)
        return replaced(common, block_table_tensor=out_table, seq_lens=out_lens, max_seq_len=longest)


class _Parts:
    """One step while it is divided: layers that divide it alike share tensors and metadata."""

    def __init__(self, group: Group, common: Any, step: StepRows, whole: Any, build: Build) -> None:
        self._group, self._common, self._step, self._build = group, common, step, build
        self._commons: dict[PagePattern | None, Any] = {None: common}
        self._metadata: dict[tuple[PagePattern | None, tuple[int, ...]], Any] = {(None, ()): whole}
        self._batches: dict[tuple[Rows, ...], RowBatch] = {}
        self._decoded: dict[tuple[PagePattern | None, int], tuple[int, Tensor | None, Counter[str]]] = {}
        # what only vLLM's kernels understand of a step is not cut into pieces: they compute all of it, and ours overwrite their part
        self._is_divisible = not group.is_speculative and common.mm_req_doc_ranges is None

    def count(self, layer: SparseLayer, share: Split) -> None:
        """What is decided before the layer runs: requests that stay dense, and those that decode by a shorter table."""
        stats = layer.stats
        stats.dense_calls.update(share.reasons)
        key = (layer.rule.decoding.pages, layer.rule.n_heads)
        if layer.rule.reason is not None or key[0] is None:
            return
        if key not in self._decoded:
            self._decoded[key] = count_decoding(layer.rule, self._step)
        n, tiles, reasons = self._decoded[key]
        stats.dense_calls.update(reasons)
        if tiles is not None:
            stats.count_sparse(tiles, is_deferred=False, calls=n)

    def of(self, layer: SparseLayer, parts: Split) -> LayerWork | None:
        """The work of a layer; None where vLLM's attention does all of it with whole tables."""
        pages = layer.rule.decoding.pages if layer.rule.reason is None and self._step.n_single else None
        taken = (*parts.sparse, *parts.dense)
        if not taken and pages is None:
            return None
        rest = self._step.rest(taken) if taken and self._is_divisible else ()
        tokens = self._tokens(rest) if rest else None
        has_rest = not taken or not self._is_divisible or bool(rest)
        return LayerWork(
            rest=self._stock(pages, rest) if has_rest else None, tokens=tokens,
            sparse=self._batch(parts.sparse), dense=self._batch(parts.dense),
        )  # fmt: skip

    def _stock(self, pages: PagePattern | None, rows: tuple[int, ...]) -> Any:
        """vLLM's metadata for some requests; for none named, all of them."""
        key = (pages, rows)
        if key not in self._metadata:
            if pages not in self._commons:
                assert pages is not None
                self._commons[pages] = self._group.compacted(self._common, pages, has_several=bool(self._step.several))
            common = self._commons[pages]
            if rows:
                common = chosen(common, self._step, rows)
            # memory of one kind of set is the same in every step; the pieces of a step lie apart
            self._metadata[key] = self._build(len(self._metadata) if rows else pages, common)
        return self._metadata[key]

    def _batch(self, rows: tuple[Rows, ...]) -> RowBatch | None:
        if not rows:
            return None
        if rows not in self._batches:
            self._batches[rows] = RowBatch.of(rows, self._common.block_table_tensor)
        return self._batches[rows]

    def _tokens(self, rows: tuple[int, ...]) -> slice | Tensor:
        """The places of these requests' queries: a slice where they lie side by side."""
        starts, ends = self._step.q_start[list(rows)], (self._step.q_start + self._step.q_len)[list(rows)]
        if bool((starts[1:] == ends[:-1]).all()):
            return slice(int(starts[0]), int(ends[-1]))
        places = [torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        return to_device(torch.cat(places), self._group.device)


def step_rows(common: Any, *, is_speculative: bool) -> StepRows | str:
    """The requests of vLLM's common metadata, or why a method cannot look at them."""
    if common.causal is not True:
        return "not causal"
    lens = common.seq_lens_cpu_upper_bound
    if lens is None:
        if common.seq_lens.device.type != "cpu":
            return "lengths are known to the device alone"
        lens = common.seq_lens
    starts = common.query_start_loc_cpu.long()
    q_len = starts.diff()
    reasons = {i: "bidirectional spans" for i, spans in (common.mm_req_doc_ranges or {}).items() if spans}
    if is_speculative:
        is_prompt = common.is_prefilling.tolist() if common.is_prefilling is not None else [False] * len(q_len)
        reasons |= {i: "speculative decoding" for i, known in enumerate(is_prompt) if not known}
    return StepRows(starts[:-1], q_len, lens.long(), reasons)


def replaced(common: Any, **changes: Any) -> Any:
    """vLLM's common metadata with other values, and nothing remembered of the old ones."""
    return common.replace(**changes, _num_computed_tokens_cache=None, _token_to_req_indices_cache=None)


def chosen(common: Any, step: StepRows, rows: tuple[int, ...]) -> Any:
    """The common metadata of some requests alone, their queries side by side."""
    on_host = torch.tensor(rows)
    index = to_device(on_host, common.seq_lens.device)
    q_len = step.q_len[on_host]
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(q_len, 0, out=starts[1:])
    bounds, is_prefilling = common.seq_lens_cpu_upper_bound, common.is_prefilling
    return replaced(
        common, query_start_loc=to_device(starts, index.device), query_start_loc_cpu=starts, num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]), max_query_len=int(q_len.max()), max_seq_len=int(step.kv_len[on_host].max()),
        seq_lens=common.seq_lens.index_select(0, index), block_table_tensor=common.block_table_tensor.index_select(0, index),
        seq_lens_cpu_upper_bound=None if bounds is None else bounds[on_host],
        is_prefilling=None if is_prefilling is None else is_prefilling[on_host], positions=None, req_idx=None,
    )  # fmt: skip


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host that the host does not wait for."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


