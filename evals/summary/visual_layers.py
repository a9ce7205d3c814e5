"""How deep visual tokens reach: how many each decoder layer saw, behind which layer the last of them left, and what that saves by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accel.evals.results import SampleRecord
from accel.evals.visual_bench.cost import DecoderShape, prefill_flops, token_kv_bytes
from accel.stats import PruningEvent


@dataclass(frozen=True)
class Prices:
    """What a token costs in one model. number_bytes: of an entry of its KV cache."""

    shape: DecoderShape
    number_bytes: int


def layer_tokens(events: Sequence[PruningEvent], n_visual: int, n_layers: int) -> list[int]:
    """Visual tokens that reach each decoder layer in a prompt of one sequence, which brought `n_visual`. events: its stages, in order."""
    found: list[int] = []
    left = n_visual
    for event in events:
        # what leaves behind the encoder or the projector reaches no layer
        found += [left] * ((event.stage.layer or 0) - len(found))
        left = int(event.is_kept[0].sum())
    return found + [left] * (n_layers - len(found))


def mean_last_layer(records: Sequence[SampleRecord]) -> float | None:
    """The last layer with visual tokens, as a mean; None where no sample knows it."""
    known = [layer for r in records if (layer := r.last_visual_layer) is not None]
    return math.fsum(known) / len(known) if known else None


def exit_row(records: Sequence[SampleRecord]) -> dict[str, Any] | None:
    """How many samples of one label had which layer as the last with visual tokens: `counts` by task, a number per layer.

    None unless all visual tokens of some sample left between two layers: what leaves in front of the decoder has no exit, nor does what stays.
    """
    known = [(r.task, layer, len(r.layer_tokens)) for r in records if r.layer_tokens and (layer := r.last_visual_layer) is not None]
    if not any(0 <= layer < n_layers - 1 for _, layer, n_layers in known):
        return None
    n_layers = known[0][2]
    counts = {task: [0] * n_layers for task in dict.fromkeys(task for task, _, _ in known)}
    for task, layer, _ in known:
        if layer >= 0:
            counts[task][layer] += 1
    return {"label": records[0].label, "n_layers": n_layers, "counts": counts, "mean": mean_last_layer(records)}


def savings(records: Sequence[SampleRecord], prices: Prices | None) -> dict[str, float | None]:
    """`flops_saved`: the share of those prefill FLOPs of the decoder that visual tokens cost; `kv_bytes_saved`: a mean per prompt.

    Both None where no sample knows what its layers saw, and without prices.
    """
    known = [r for r in records if r.layer_tokens]
    if prices is None or not known:
        return {"flops_saved": None, "kv_bytes_saved": None}
    shape = prices.shape
    full = spent = text = n_all = n_reached = 0
    for r in known:
        assert r.layer_tokens is not None
        n_visual = r.visual_tokens + r.structural_tokens
        n_text = r.n_tokens - n_visual
        full += prefill_flops(shape, [r.n_tokens] * shape.n_layers)
        text += prefill_flops(shape, [n_text] * shape.n_layers)
        spent += prefill_flops(shape, [n_text + n for n in r.layer_tokens])
        n_all, n_reached = n_all + n_visual * shape.n_layers, n_reached + sum(r.layer_tokens)
    return {
        "flops_saved": (full - spent) / (full - text) if full > text else None,
        "kv_bytes_saved": (n_all - n_reached) * token_kv_bytes(shape, prices.number_bytes) / len(known),
    }
