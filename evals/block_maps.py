"""Which key blocks each head read, seen through a handle while a prompt runs: densities of all heads, and full maps of a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import accel
from accel.evals.latency import quiet_notices
from accel.evals.prompt_cache import last_logits_only
from accel.kernels.block_sparse.plan import BlockPlan
from accel.kernels.block_sparse.ragged import Ragged
from accel.protocols import AttentionStep, Method


@dataclass
class HeadMaps:
    """Tiles that the first sequence of one prefill read, by layer. Pass `record` to `Handle.observe`.

    Recording only keeps references, so that it may go on inside a timed pass; the maps are drawn when they are first asked for.
    """

    calls: dict[int, tuple[AttentionStep, BlockPlan, Ragged]] = field(default_factory=dict)
    dense_calls: dict[str, int] = field(default_factory=dict)       # by reason, where `record_block_maps` ran the prompt

    def record(self, *, step: AttentionStep, plan: BlockPlan, lens: Ragged) -> None:
        """Observer of one sparse call; keeps prefill calls."""
        if step.phase == "prefill":
            self.calls[step.layer] = (step, plan, lens)

    @cached_property
    def masks(self) -> dict[int, Tensor]:
        """Layer → (Hq, nq, nk) bool; layers that ran dense are absent."""
        found = {}
        for layer, (step, plan, lens) in sorted(self.calls.items()):
            mask = plan.block_mask(next(iter(lens.rows()))).cpu()
            found[layer] = mask.expand(step.n_heads, -1, -1) if mask.shape[0] == 1 else mask
        return found

    def head_density(self) -> dict[int, list[float]]:
        """Share of the causal tiles that each head read, by layer."""
        return {layer: (mask.sum((1, 2)) / _causal(mask).sum()).tolist() for layer, mask in self.masks.items()}

    def typical_heads(self, n: int = 3) -> list[tuple[int, int]]:
        """(layer, head) of the sparsest, the median and the densest head, and evenly between for larger `n`; equal maps only once."""
        order = sorted((density, layer, head) for layer, heads in self.head_density().items() for head, density in enumerate(heads))
        picks = [order[round(i * (len(order) - 1) / max(n - 1, 1))][1:] for i in range(n)] if order else []
        seen: dict[bytes, tuple[int, int]] = {}
        for layer, head in picks:
            seen.setdefault(self.masks[layer][head].numpy().tobytes(), (layer, head))
        return list(seen.values())

    def as_dict(self, label: str, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Plain values for result.json. A map is a list of rows; row i holds "1" or "0" for each of its causal tiles, own block last.

        Only where some layer ran sparse: there is nothing to draw otherwise.
        """
        density = self.head_density()
        step, plan, _ = next(iter(self.calls.values()))
        return {
            "label": label,
            "block_size": plan.block_size,
            "tokens": step.kv_len,
            "n_layers": step.n_layers,
            "density": {str(layer): [round(d, 4) for d in of_heads] for layer, of_heads in density.items()},
            "maps": [
                {"layer": layer, "head": head, "density": density[layer][head], "rows": _as_rows(self.masks[layer][head])}
                for layer, head in heads
                if layer in self.masks
            ],
        }


def record_block_maps(model: Any, methods: Sequence[Method], input_ids: Tensor) -> HeadMaps:
    """The tiles that `methods` read in one prefill of `input_ids` (1, L). Empty where every layer ran dense."""
    maps = HeadMaps()
    with quiet_notices(), accel.apply(model, *methods) as handle, handle.observe(maps.record), torch.no_grad():
        model(input_ids=input_ids, use_cache=False, **last_logits_only(model))
        maps.dense_calls = dict(handle.stats.total.dense_calls)
    return maps


def _causal(mask: Tensor) -> Tensor:
    """Causal tiles of one head, (nq, nk) bool; with a cached prefix the query blocks are the last ones."""
    nq, nk = mask.shape[-2:]
    return torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq)


def _as_rows(mask: Tensor) -> list[str]:
    nq, nk = mask.shape
    return ["".join("1" if tile else "0" for tile in row[: nk - nq + i + 1]) for i, row in enumerate(mask.tolist())]
