"""The probe in torch: some rows of some heads at a time, softmax over all their keys, reduced before the next rows take the same memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse import Rows
from accel.kernels.block_sparse.cpu_common import finish_scores
from accel.kernels.block_sparse.cpu_probe import fp32_products_routed, route_for
from accel.kernels.probe.request import Columns, Request

# fp32 scores held at once, 4 MB: larger ones leave the caches. A single row of more keys than this is still taken whole
TILE_SCORES = 1 << 20
# rows that make a product efficient; with fewer the heads are taken in turn
_GOOD_ROWS = 64


def probe(request: Request) -> Columns:
    """Reductions of every sequence, fp32. Beside them it holds one tile of scores and, of 16-bit keys, the fp32 copy of the heads in work."""
    found = Columns.zeros(request)
    is_routed = request.q.device.type == "cpu" and route_for(torch.float32, "accurate").is_routed
    with fp32_products_routed(is_routed):
        for rows in request.lens.rows():
            chosen = request.rows.of(rows)
            if len(chosen) and rows.kv_len:
                _probe_sequence(request, rows, chosen, found)
    return found


def _probe_sequence(request: Request, rows: Rows, chosen: Tensor, found: Columns) -> None:
    """Writes the reductions of one sequence. chosen: (n,) int64 ascending, its rows that count."""
    n_kv, group, n = request.keys.n_kv_heads, request.group, rows.kv_len
    n_heads = max(1, min(n_kv, TILE_SCORES // (group * min(_GOOD_ROWS, len(chosen)) * n)))
    n_rows = max(1, min(len(chosen), TILE_SCORES // (n_heads * group * n)))
    buffer = torch.empty(n_heads * group * n_rows * n, dtype=torch.float32, device=request.q.device)
    # read once for all tiles: in a causal one keys end where its last row stands
    ends = (chosen + rows.offset + 1).tolist() if request.is_causal else [n] * len(chosen)
    for i_kv in range(0, n_kv, n_heads):
        heads = range(i_kv, min(i_kv + n_heads, n_kv))
        k = request.keys.head_tokens(rows.index, heads)[0].float()
        columns = _Running.zeros(len(heads) * group, n, request)
        for first in range(0, len(chosen), n_rows):
            part = chosen[first : first + n_rows]
            end = ends[first + len(part) - 1]
            scores = buffer[: len(heads) * group * len(part) * end].view(len(heads), group * len(part), end)
            q = request.q[rows.q_start + part, heads.start * group : heads.stop * group].float() * request.scale
            # (rows, heads · G, D) -> (heads, G · rows, D): the heads of a group share one product
            q = q.transpose(0, 1).reshape(len(heads), group * len(part), -1)
            torch.bmm(q, k[:, :end].transpose(1, 2), out=scores)
            finish_scores(scores, request.softcap)
            by_head = scores.view(len(heads) * group, len(part), end)
            _softmax(by_head, request, rows, part + rows.offset, first_end=ends[first])
            columns.add(by_head)
        columns.write(found, rows.index, heads.start * group)


def _softmax(scores: Tensor, request: Request, rows: Rows, position: Tensor, *, first_end: int) -> None:
    """Attention from scores (heads, rows, keys), in place. first_end: keys that even the first row sees."""
    keys = scores.shape[-1]
    lead = 0 if request.key_mask is not None else first_end
    if lead == keys:
        torch.softmax(scores, -1, out=scores)
        return
    hidden = request.hidden(rows, position, keys)[:, lead:]
    corner = scores[..., lead:]
    corner.masked_fill_(hidden, -torch.inf)
    torch.softmax(scores, -1, out=scores)
    # a row that sees nothing becomes 0, and a NaN stays with the keys that its row sees
    corner.masked_fill_(hidden, 0)


@dataclass
class _Running:
    """Column sums, or means and sums of squared deviations, of the rows so far; the latter by pairwise updates, so that nothing cancels."""

    n: int
    total: Tensor               # (heads, N)
    mean: Tensor | None         # (heads, N)
    deviation: Tensor | None    # (heads, N), Σ (a − mean)²
    entropy: Tensor             # (heads,)

    @classmethod
    def zeros(cls, n_heads: int, n_keys: int, request: Request) -> _Running:
        total = torch.zeros(n_heads, n_keys, dtype=torch.float32, device=request.q.device)
        mean, deviation = (torch.zeros_like(total), torch.zeros_like(total)) if request.wants_spread else (None, None)
        return cls(0, total, mean, deviation, total.new_zeros(n_heads))

    def add(self, attention: Tensor) -> None:
        """One more tile, (heads, rows, keys), overwritten. Keys behind it have no attention from its rows."""
        n_rows, end = attention.shape[1:]
        part = attention.sum(1)
        self.total[:, :end] += part
        if self.mean is not None and self.deviation is not None:
            self.entropy += _entropy(attention)
            mean = part / n_rows
            delta = -self.mean
            delta[:, :end] += mean
            n = self.n + n_rows
            self.mean += delta * (n_rows / n)
            self.deviation += delta.square_() * (self.n * n_rows / n)
            self.deviation[:, :end] += attention.sub_(mean[:, None]).square_().sum(1)
        self.n += n_rows

    def write(self, found: Columns, b: int, first_head: int) -> None:
        at = (b, slice(first_head, first_head + len(self.total)))
        n_keys = self.total.shape[1]
        found.mean[at][:, :n_keys] = self.total / self.n
        if found.variance is not None and found.row_entropy is not None and self.deviation is not None:
            found.variance[at][:, :n_keys] = self.deviation / self.n
            found.row_entropy[at] = self.entropy / self.n


def _entropy(attention: Tensor) -> Tensor:
    """Sum of the entropies of the rows, (heads,). One head at a time: the intermediate is as large as what it reads."""
    return torch.stack([torch.special.entr(head).sum() for head in attention])
