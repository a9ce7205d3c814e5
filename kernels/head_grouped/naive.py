"""The definition of attention over head groups: plain loops, any precision up to fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.kernels.head_grouped.groups import KVGroup, n_visible


def naive_grouped(
    q: Tensor, groups: Sequence[KVGroup], *, scale: float, softcap: float | None = None, n_causal: int = 0
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, L, D) in q's dtype, and LSE (B, Hq, L), fp32 or fp64 for fp64 inputs.

    Sums and softmax run in fp32 (fp64 for fp64 inputs); probabilities are rounded to V's dtype.
    """
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=precise, device=q.device)
    each = q.shape[1] // max(sum(len(group.heads) for group in groups), 1)
    n_rows = q.shape[2]
    for group in groups:
        for b in range(q.shape[0]):
            for i, head in enumerate(group.heads):
                n = group.n_entries if group.length is None else int(group.length[b, i])
                limit = torch.tensor([n_visible(n, row, n_rows=n_rows, n_causal=n_causal) for row in range(n_rows)], device=q.device)
                # only entries that count are read, so that a NaN behind them stays there
                k, v = (t[b, i, :n].to(precise) for t in (group.k, group.v))
                hidden = torch.arange(n, device=q.device) >= limit[:, None]
                is_empty = limit == 0
                for h in range(head * each, (head + 1) * each):
                    scores = q[b, h].to(precise) @ k.T * scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    scores = scores.masked_fill(hidden, -torch.inf)
                    probs = scores.softmax(-1).masked_fill(is_empty[:, None], 0)
                    out[b, h] = (probs.to(q.dtype).to(precise) @ v).to(q.dtype)
                    lse[b, h] = scores.logsumexp(-1)
    return out, lse
