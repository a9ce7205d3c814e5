"""Head groups on a CPU: one attention call per group, on slices that hold valid entries only, so that nothing is masked but causal ones.

Where the lengths inside a group differ there is one call for each run of rows and heads of one length: padding is neither read nor computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel.kernels.block_sparse.cpu_common import finish_scores, softmax_with_lse, without_autocast
from accel.kernels.block_sparse.cpu_decode import in_fp32
from accel.kernels.block_sparse.cpu_probe import route_for
from accel.kernels.head_grouped.groups import KVGroup, n_visible

# scores, or elements of a mask, held at once
TILE_SCORES = 1 << 22
# with more rows than this, or fewer entries, torch's own attention is as fast as two matrix products (kernels.md §2.6)
MAX_ROWS, FEWEST_ENTRIES = 16, 256

T = TypeVar("T")


@torch.no_grad()
def cpu_grouped(
    q: Tensor, groups: Sequence[KVGroup], *, scale: float, softcap: float | None, n_causal: int, out: Tensor, lse: Tensor | None
) -> None:
    """Writes the attention of every row into `out` (B, Hq, L, D), and its LSE (B, Hq, L) fp32 where given.

    Of groups whose heads are neighbours only the result is copied, of others the queries, too. Soft-cap and LSE, which torch's attention does
    not offer, are computed by matrix products, and so is decoding.
    """
    each = q.shape[1] // sum(len(group.heads) for group in groups)
    with without_autocast():
        for group in groups:
            index = None if group.span is not None else _index(group.heads, each)
            first = 0 if group.span is None else group.span.start * each
            queries = q[:, first : first + len(group.heads) * each] if index is None else q.index_select(1, index)
            for rows, heads, n in _parts(group, q.shape[0]):
                own = slice(heads.start * each, heads.stop * each)
                place = slice(first + own.start, first + own.stop) if index is None else index[own]
                if n == 0 or q.shape[2] == 0:
                    out[rows, place] = 0
                    if lse is not None:
                        lse[rows, place] = -torch.inf
                    continue
                k, v = group.k[rows, heads, :n], group.v[rows, heads, :n]
                part = queries[rows, own]
                if lse is None and softcap is None and (each * q.shape[2] > MAX_ROWS or n < FEWEST_ENTRIES):
                    out[rows, place] = _by_torch(part, k, v, scale=scale, n_causal=n_causal)
                    continue
                found, found_lse = _by_products(part, k, v, scale=scale, softcap=softcap, n_causal=n_causal, wants_lse=lse is not None)
                out[rows, place] = found
                if lse is not None:
                    lse[rows, place] = found_lse


def _parts(group: KVGroup, batch: int) -> Iterator[tuple[slice, slice, int]]:
    """Runs of rows and of heads (counted in the group) that have one number of entries, and that number."""
    if not batch:
        return
    if group.length is None:
        yield slice(0, batch), slice(0, len(group.heads)), group.n_entries
        return
    lengths = [tuple(row) for row in group.length.tolist()]
    for rows, of_heads in _runs(lengths):
        for heads, n in _runs(of_heads):
            yield rows, heads, n


def _runs(values: Sequence[T]) -> Iterator[tuple[slice, T]]:
    """Neighbours of one value."""
    at = 0
    for value, run in groupby(values):
        n = len(list(run))
        yield slice(at, at + n), value
        at += n


@cache
def _index(heads: tuple[int, ...], each: int) -> Tensor:
    """Query heads of some KV heads."""
    # a tensor born in inference mode could not be used outside it
    with torch.inference_mode(False):
        return torch.tensor([head * each + i for head in heads for i in range(each)], device="cpu")


def _by_torch(q: Tensor, k: Tensor, v: Tensor, *, scale: float, n_causal: int) -> Tensor:
    """q (B, H · G, L, D), k and v (B, H, n, D): the attention of torch."""
    batch, n_heads, n_rows, dim = q.shape
    each, n = n_heads // k.shape[1], k.shape[2]
    if not min(n_causal, n_rows - 1):
        # (B, H · G, L, D) -> (B, H, G · L, D): the query heads of a KV head are further rows of it
        folded = q if each == 1 else q.reshape(batch, k.shape[1], each * n_rows, dim)
        return scaled_dot_product_attention(folded, k, v, scale=scale).reshape(q.shape)
    step = max(1, TILE_SCORES // n)
    found = []
    for lo in range(0, n_rows, step):
        rows = range(lo, min(lo + step, n_rows))
        most = n_visible(n, rows[-1], n_rows=n_rows, n_causal=n_causal)
        if not most:
            found.append(torch.zeros_like(q[:, :, lo : rows.stop]))
            continue
        seen = _seen(rows, n, n_rows=n_rows, n_causal=n_causal)[:, :most]
        own = (q[:, :, lo : rows.stop], k[:, :, :most], v[:, :, :most])
        found.append(scaled_dot_product_attention(*own, attn_mask=seen, scale=scale, enable_gqa=each > 1))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _seen(rows: range, n: int, *, n_rows: int, n_causal: int) -> Tensor:
    """Which of n entries these rows see, (len(rows), n) bool."""
    limit = torch.tensor([n_visible(n, row, n_rows=n_rows, n_causal=n_causal) for row in rows], device="cpu")
    return torch.arange(n, device="cpu") < limit[:, None]


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, n_causal: int, wants_lse: bool
) -> tuple[Tensor, Tensor]:
    """The same by two matrix products; the LSE (B, H · G, L) means nothing where it is not wanted."""
    batch, n_rows = q.shape[0], q.shape[2]
    folded = q.reshape(batch, k.shape[1], -1, q.shape[3])
    # contiguous whatever the strides of the queries are: written through flattened views
    out, lse = folded.new_empty(folded.shape), folded.new_empty(folded.shape[:3], dtype=torch.float32)
    seen = _seen(range(n_rows), k.shape[2], n_rows=n_rows, n_causal=n_causal) if min(n_causal, n_rows - 1) else None
    # batch and heads are one dimension where memory allows it: a product would copy what is not
    is_flat = _is_flat(k) and _is_flat(v)
    for b in range(1 if is_flat else batch):
        b_q, b_k, b_v, b_out, b_lse = (t.flatten(0, 1) if is_flat else t[b] for t in (folded, k, v, out, lse))
        for heads, rows in _tiles(b_q.shape[0], b_q.shape[1], b_k.shape[1]):
            scores = _scores(b_q[heads, rows], b_k[heads]).mul_(scale)
            finish_scores(scores, softcap)
            hidden = None if seen is None else ~seen[torch.arange(rows.start, rows.stop, device="cpu") % n_rows]
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            found = softmax_with_lse(scores, wants_lse=wants_lse)
            if found is not None:
                b_lse[heads, rows] = found
            if hidden is not None and (is_empty := hidden.all(-1)).any():
                # softmax of nothing is NaN
                scores.masked_fill_(is_empty[:, None], 0)
                b_lse[heads, rows].masked_fill_(is_empty, -torch.inf)
            b_out[heads, rows] = _weighted(scores, b_v[heads])
    return out.view(q.shape), lse.view(q.shape[:3])


def _tiles(n_heads: int, n_rows: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Heads and rows whose scores against n keys are held at once."""
    heads, rows = max(1, TILE_SCORES // (n_rows * n)), max(1, TILE_SCORES // n)
    for h in range(0, n_heads, heads):
        for lo in range(0, n_rows, rows):
            yield slice(h, h + heads), slice(lo, min(lo + rows, n_rows))


def _is_flat(t: Tensor) -> bool:
    return t.shape[0] == 1 or t.shape[1] == 1 or t.stride(0) == t.shape[1] * t.stride(1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q·k of every pair, (heads, rows, n), in fp32 from fewer bits."""
    if q.dtype == torch.bfloat16 and _has_fast_bf16(torch.get_num_threads()):
        # the product rounded to bf16, and then what the rounding lost; twice reading the keys is less than converting them
        rounded = torch.bmm(q, k.mT)
        return torch.baddbmm(rounded, q, k.mT, beta=-1).float().add_(rounded)
    columns = (q if q.dtype == torch.float64 else q.float()).mT
    # keys first: with few rows on the left MKL takes five times as long
    found = [torch.bmm(part, columns) for part in _converted(k)]
    return (found[0] if len(found) == 1 else torch.cat(found, 1)).mT.contiguous()


def _weighted(probs: Tensor, v: Tensor) -> Tensor:
    """probs (heads, rows, n) times v (heads, n, D)."""
    if v.dtype == torch.bfloat16 and _has_fast_bf16(torch.get_num_threads()):
        return torch.bmm(probs.bfloat16(), v)
    parts, at, total = _converted(v), 0, None
    for part in parts:
        own = probs[..., at : at + part.shape[1]]
        total = torch.bmm(own, part) if total is None else total.baddbmm_(own, part)
        at += part.shape[1]
    assert total is not None
    return total


def _converted(x: Tensor) -> Iterator[Tensor]:
    """`in_fp32`, but fp64 as it is."""
    if x.dtype == torch.float64:
        yield x
    else:
        yield from in_fp32(x)


@cache
def _has_fast_bf16(n_threads: int) -> bool:
    """Whether this machine multiplies bf16 numbers faster than it converts them (block_sparse.cpu_probe)."""
    return route_for(torch.bfloat16, "accurate").value_dtype == torch.bfloat16
