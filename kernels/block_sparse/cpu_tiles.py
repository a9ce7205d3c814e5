"""Prefill on a CPU, tile by tile of query rows: keys gathered once per step, then two batched products around a softmax (kernels.md §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse.cpu_common import Problem, finish_scores, softmax_with_lse, workspace
from accel.kernels.block_sparse.cpu_steps import Step, schedule

# (tile, key block) products per step and thread: fewer leave threads idle, more fall out of the caches (kernels.md §2.2)
BLOCKS_PER_THREAD = 32
# and never more, whatever the number of threads: buffers of 128-token blocks then stay below 64 MB at 16K
MAX_BLOCKS = 128
# several KV heads are packed together up to this size, so that short sequences still fill a step
PACK_BYTES = 8 << 20
# query heads that read the same keys are stacked up to this many rows: a product packs its right operand once for all of them
MAX_STACKED_ROWS = 512


@dataclass(frozen=True, slots=True)
class Tile:
    """The rows of one query block, all heads: q (Hq, rows, D), out (Hq, rows, Dv), lse (Hq, rows) or None, all views of the call's tensors.

    at: place of the first row inside the tile; only the first tile of a call, which may begin in the middle of a block, has one.
    """

    q: Tensor
    out: Tensor
    lse: Tensor | None
    at: int

    @classmethod
    def of(cls, problem: Problem, first: int, height: int) -> Tile:
        """The tile of `height` rows that begins at row `first` of the sequence, which may lie before its first query row."""
        rows = problem.rows
        lo, hi = max(first, 0), min(first + height, rows.q_len)
        here = slice(rows.q_start + lo, rows.q_start + hi)
        lse = problem.lse[:, here] if problem.lse is not None else None
        return cls(problem.q[here].transpose(0, 1), problem.out[here].transpose(0, 1), lse, lo - first)


@dataclass(frozen=True, slots=True)
class Grid:
    """The query rows of one sequence, cut at the block grid: tiles of `height` rows that begin `lead` rows into their block.

    hidden: (height, b) bool, what the rows of a tile must not see of their own block.
    """

    tiles: list[Tile]
    height: int
    hidden: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Grid:
        rows, b = problem.rows, problem.block_size
        n, first_row = rows.query_blocks(b), rows.first_block(b) * b - rows.offset
        # the only tile of a short call is no taller than its rows
        height, lead = (rows.q_len, -first_row) if n == 1 else (b, 0)
        hidden = torch.ones(height, b, dtype=torch.bool, device="cpu").triu(lead + 1)
        return cls([Tile.of(problem, first_row + lead + i * b, height) for i in range(n)], height, hidden)


@dataclass(frozen=True, slots=True)
class Pack:
    """Keys and values of the KV heads `heads` by block: k (heads · nk, b · D), v (heads · nk, b · Dv); rows past the end are zero."""

    heads: range
    k: Tensor
    v: Tensor


def attend_prefill(problem: Problem) -> None:
    """Writes the rows of one sequence, a pack of KV heads at a time."""
    grid = Grid.of(problem)
    mask = causal_mask(problem) if problem.mask is None else problem.mask
    head_bytes = mask.shape[2] * problem.block_size * problem.keys.head_dim * problem.route.score_dtype.itemsize
    per_pack = max(1, PACK_BYTES // head_bytes)
    first_block, max_blocks = problem.rows.first_block(problem.block_size), step_blocks()
    for first in range(0, problem.keys.n_kv_heads, per_pack):
        heads = range(first, min(first + per_pack, problem.keys.n_kv_heads))
        todo = schedule(mask, heads, problem.group, first_block, max_blocks)
        for place in todo.empty:
            clear_tile(problem, grid, heads, place, todo.heads_per_tile)
        if todo.steps:
            pack = pack_heads(problem, heads)
            for step in todo.steps:
                attend_step(problem, grid, pack, step, todo.heads_per_tile, max_blocks)


def step_blocks() -> int:
    """Most (query head, query block, key block) products in one step."""
    return min(BLOCKS_PER_THREAD * torch.get_num_threads(), MAX_BLOCKS)


def causal_mask(problem: Problem) -> Tensor:
    """Every tile at or below the diagonal, (1, nq, nk) bool."""
    nq, nk = problem.rows.query_blocks(problem.block_size), problem.rows.key_blocks(problem.block_size)
    return torch.ones(1, nq, nk, dtype=torch.bool, device="cpu").tril(problem.rows.first_block(problem.block_size))


def pack_heads(problem: Problem, heads: range) -> Pack:
    """Copies K and V of some heads into block rows, in the precision that the products want: one copy for all query tiles."""
    packed = []
    nk = problem.rows.key_blocks(problem.block_size)
    dtypes = (problem.route.score_dtype, problem.route.value_dtype)
    for name, source, dtype in zip(("k", "v"), problem.keys.head_tokens(problem.rows.index, heads), dtypes, strict=True):
        n_heads, n, dim = source.shape
        whole = workspace.take(f"pack {name}", (n_heads, nk * problem.block_size, dim), dtype)
        whole[:, :n] = source
        # zero, not what was there before: NaN times probability 0 is NaN
        whole[:, n:] = 0
        packed.append(whole.view(n_heads * nk, problem.block_size * dim))
    return Pack(heads, *packed)


def attend_step(problem: Problem, grid: Grid, pack: Pack, step: Step, heads_per_tile: int, max_blocks: int) -> None:
    """Writes the tiles of one step: some query heads at a time, and of one long list some key blocks at a time."""
    stacked = min(heads_per_tile, max(1, MAX_STACKED_ROWS // grid.height))
    keys_at_once = step.n_blocks
    if problem.route.kernel == "gemm" and step.n_blocks * stacked > max_blocks:
        keys_at_once = max(1, max_blocks // stacked)
    for head in range(0, heads_per_tile, stacked):
        n_heads = min(stacked, heads_per_tile - head)
        q = workspace.take("q", (len(step.tiles), n_heads, grid.height, problem.keys.head_dim), problem.route.score_dtype)
        places = []
        for (kv, first, i), b_q in zip(step.tiles, q.unbind(0), strict=True):
            begin = (pack.heads.start + kv) * problem.group + first + head
            places.append((grid.tiles[i], begin, begin + n_heads))
            load_tile(b_q, *places[-1])
        result, lse = attend_keys(problem, grid, q, pack, step, keys_at_once)
        for t, (tile, begin, end) in enumerate(places):
            store_tile(result[t], None if lse is None else lse[t], tile, begin, end)


def attend_keys(problem: Problem, grid: Grid, q: Tensor, pack: Pack, step: Step, keys_at_once: int) -> tuple[Tensor, Tensor | None]:
    """Attention of q (tiles, heads, rows, D) over the blocks of a step, `keys_at_once` of them at a time, parts merged by their LSE."""
    in_parts = keys_at_once < step.n_blocks
    merged = Merged()
    for lo in range(0, step.n_blocks, keys_at_once):
        hi = min(lo + keys_at_once, step.n_blocks)
        k, v = gather(problem, pack, step, lo, hi)
        hidden = grid.hidden if step.has_diagonal and hi == step.n_blocks else None
        if problem.route.kernel == "sdpa":
            return torch_attention(problem, q, k, v, hidden), None
        part, lse = two_products(problem, q, k, v, hidden, wants_lse=in_parts or problem.lse is not None)
        if lse is None or not in_parts:
            return part, lse
        merged.add(part, lse)
    return merged.out, merged.lse


class Merged:
    """Attention over parts of the keys, put together: each part weighs exp(its LSE)."""

    out: Tensor     # (..., Dv) fp32
    lse: Tensor     # (...) fp32

    def __init__(self) -> None:
        self.is_empty = True

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.is_empty:
            # a copy: the next part is computed in the same buffer
            self.out, self.lse, self.is_empty = out.to(torch.float32, copy=True), lse, False
            return
        lse_of_both = torch.logaddexp(self.lse, lse)
        self.out.mul_((self.lse - lse_of_both).exp_()[..., None]).addcmul_(out, (lse - lse_of_both).exp_()[..., None])
        self.lse = lse_of_both


def gather(problem: Problem, pack: Pack, step: Step, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """K and V of blocks lo..hi − 1 of each tile's list, (tiles, keys, D): a slice of the pack where there are no gaps, a copy otherwise."""
    sides = []
    for name, packed, dim in (("k", pack.k, problem.keys.head_dim), ("v", pack.v, problem.keys.value_dim)):
        if step.run is not None:
            chosen = packed[step.run + lo : step.run + hi]
        else:
            chosen = workspace.take(f"gathered {name}", (len(step.tiles) * (hi - lo), packed.shape[1]), packed.dtype)
            torch.index_select(packed, 0, step.blocks[:, lo:hi].flatten(), out=chosen)
        sides.append(chosen.view(len(step.tiles), (hi - lo) * problem.block_size, dim))
    return sides[0], sides[1]


def two_products(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, *, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (tiles, heads, rows, D) over k, v (tiles, keys, D): (tiles, heads, rows, Dv), and the LSE (tiles, heads, rows) fp32.

    hidden: (rows, b), what is masked of the last b keys.
    """
    n, n_heads, height, dim = q.shape
    scores = workspace.take("scores", (n, n_heads * height, k.shape[1]), k.dtype)
    # oneDNN leaves the scores as they were where alpha is 0
    alpha = problem.scale or 1e-30
    torch.baddbmm(scores, q.view(n, n_heads * height, dim), k.transpose(1, 2), beta=0, alpha=alpha, out=scores)
    finish_scores(scores, problem.softcap)
    by_head = scores.view(n, n_heads, height, -1)
    if hidden is not None:
        by_head[..., -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
    lse = softmax_with_lse(by_head, wants_lse=wants_lse)
    probs = scores
    if v.dtype != k.dtype:
        probs = workspace.take("probs", tuple(scores.shape), v.dtype)
        probs.copy_(scores)
    result = workspace.take("result", (n, n_heads * height, v.shape[2]), v.dtype)
    torch.bmm(probs, v, out=result)
    return result.view(n, n_heads, height, -1), lse


def torch_attention(problem: Problem, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """The same through torch's own kernel, for machines whose batched products are slow (kernels.md §2.4 b). No soft-cap, no LSE."""
    visible = None
    if hidden is not None:
        visible = torch.ones(q.shape[2], k.shape[1], dtype=torch.bool, device="cpu")
        visible[:, -hidden.shape[1] :] = ~hidden
    shared_k, shared_v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, shared_k, shared_v, attn_mask=visible, scale=problem.scale)


def load_tile(b_q: Tensor, tile: Tile, begin: int, end: int) -> None:
    """Fills b_q (heads, height, D) with query heads begin..end − 1 of a tile; rows that do not exist become zero."""
    n_rows = tile.q.shape[1]
    if n_rows == b_q.shape[1]:
        b_q.copy_(tile.q[begin:end])
        return
    b_q.zero_()
    b_q[:, tile.at : tile.at + n_rows] = tile.q[begin:end]


def store_tile(result: Tensor, lse: Tensor | None, tile: Tile, begin: int, end: int) -> None:
    """Writes result (heads, height, Dv) and lse (heads, height) to query heads begin..end − 1 of a tile."""
    n_rows = tile.q.shape[1]
    there = slice(tile.at, tile.at + n_rows)
    tile.out[begin:end] = result if n_rows == result.shape[1] else result[:, there]
    if tile.lse is not None and lse is not None:
        tile.lse[begin:end] = lse[:, there]


def clear_tile(problem: Problem, grid: Grid, kv_heads: range, place: tuple[int, int, int], n_heads: int) -> None:
    """Sets a tile without keys to 0, its LSE to −inf."""
    kv, first, i = place
    begin = (kv_heads.start + kv) * problem.group + first
    grid.tiles[i].out[begin : begin + n_heads] = 0
    lse = grid.tiles[i].lse
    if lse is not None:
        lse[begin : begin + n_heads] = -torch.inf
