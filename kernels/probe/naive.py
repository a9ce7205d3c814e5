"""The definition of the probe's reductions in fp64, head by head, from the whole attention matrix."""

from __future__ import annotations

import torch

from accel.kernels.probe.request import Columns, Request


def probe(request: Request) -> Columns:
    """Mean, variance and entropy of the rows that count, in fp64."""
    found = Columns.zeros(request, torch.float64)
    for rows in request.lens.rows():
        k, _ = request.keys.tokens(rows.index)
        chosen = request.rows.of(rows)
        if not len(chosen) or not rows.kv_len:
            continue
        q = request.q[rows.q_start + chosen].double()
        hidden = request.hidden(rows, rows.offset + chosen, rows.kv_len)
        for h in range(q.shape[1]):
            logits = q[:, h] @ k[h // request.group].double().T * request.scale
            if request.softcap is not None:
                logits = torch.tanh(logits / request.softcap) * request.softcap
            # rows that see nothing become 0, and a NaN stays with the keys that its row sees
            attention = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
            found.mean[rows.index, h, : rows.kv_len] = attention.mean(0)
            if found.variance is not None and found.row_entropy is not None:
                found.variance[rows.index, h, : rows.kv_len] = attention.var(0, correction=0)
                found.row_entropy[rows.index, h] = torch.special.entr(attention).sum(-1).mean()
    return found
