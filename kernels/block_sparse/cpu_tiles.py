"""Prefill on a CPU, tile by tile of query rows: keys gathered once per step, then two batched products around a softmax (kernels.md §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse.cpu_common import Problem, finish_scores, softmax_with_lse, workspace
from accel.kernels.block_sparse.cpu_steps import Schedule, Step, Tiles, schedule

# (tile, key block) products per step and thread: fewer leave threads idle, more fall out of the caches (kernels.md §2.2)
BLOCKS_PER_THREAD = 32
# several KV heads are packed together up to this size, so that short sequences still fill a step
PACK_BYTES = 8 << 20


@dataclass(frozen=True)
class Pack:
    """Keys and values of the KV heads `heads` by block: k (heads · nk, b · D), v (heads · nk, b · Dv); rows past the end are zero."""

    heads: range
    k: Tensor
    v: Tensor


def attend_prefill(problem: Problem) -> None:
    """Writes the rows of one sequence, a pack of KV heads at a time."""
    tiles = Tiles.of(problem.rows, problem.block_size)
    mask = causal_mask(problem) if problem.mask is None else problem.mask
    head_bytes = mask.shape[2] * problem.block_size * problem.keys.head_dim * problem.route.score_dtype.itemsize
    per_pack = max(1, PACK_BYTES // head_bytes)
    for first in range(0, problem.keys.n_kv_heads, per_pack):
        heads = range(first, min(first + per_pack, problem.keys.n_kv_heads))
        todo = schedule(mask, heads, problem.group, problem.rows.first_block(problem.block_size), BLOCKS_PER_THREAD * torch.get_num_threads())
        for place in todo.empty:
            clear_tile(problem, tiles, todo, heads, place)
        if not todo.steps:
            continue
        pack = pack_heads(problem, heads)
        for step in todo.steps:
            attend_step(problem, tiles, todo, pack, step)


def causal_mask(problem: Problem) -> Tensor:
    """Every tile at or below the diagonal, (1, nq, nk) bool."""
    nq, nk = problem.rows.query_blocks(problem.block_size), problem.rows.key_blocks(problem.block_size)
    return torch.ones(1, nq, nk, dtype=torch.bool).tril(problem.rows.first_block(problem.block_size))


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


def attend_step(problem: Problem, tiles: Tiles, todo: Schedule, pack: Pack, step: Step) -> None:
    """Writes the tiles of one step, as many query heads at a time as fill it."""
    k, v = gather_step(problem, pack, step)
    n = len(step.tiles)
    at_once = max(1, BLOCKS_PER_THREAD * torch.get_num_threads() // (n * step.n_blocks))
    for head in range(0, todo.heads_per_tile, at_once):
        n_heads = min(at_once, todo.heads_per_tile - head)
        places = [tile_place(problem, tiles, pack.heads, place, head, n_heads) for place in step.tiles]
        attend_heads(problem, tiles, places, n_heads, k, v, has_diagonal=step.has_diagonal)


def gather_step(problem: Problem, pack: Pack, step: Step) -> tuple[Tensor, Tensor]:
    """K and V of a step's tiles, (tiles, n_blocks · b, D): a slice of the pack where there is one tile without gaps, a copy otherwise."""
    sides = []
    for name, packed, dim in (("k", pack.k, problem.keys.head_dim), ("v", pack.v, problem.keys.value_dim)):
        if step.run is not None:
            chosen = packed[step.run[0] : step.run[1]]
        else:
            chosen = workspace.take(f"gathered {name}", (step.blocks.shape[0], packed.shape[1]), packed.dtype)
            torch.index_select(packed, 0, step.blocks, out=chosen)
        sides.append(chosen.view(len(step.tiles), step.n_blocks * problem.block_size, dim))
    return sides[0], sides[1]


@dataclass(frozen=True, slots=True)
class TilePlace:
    """Where a tile lies: rows `first`..`last` − 1 of q, from row `at` of the tile on, query heads `head`..`end_head` − 1."""

    first: int
    last: int
    at: int
    head: int
    end_head: int


def tile_place(problem: Problem, tiles: Tiles, kv_heads: range, place: tuple[int, int, int], head: int, n_heads: int) -> TilePlace:
    kv, first_head, i = place
    begin = (kv_heads.start + kv) * problem.group + first_head + head
    return TilePlace(*tiles.span(i), begin, begin + n_heads)


def attend_heads(
    problem: Problem, tiles: Tiles, places: list[TilePlace], n_heads: int, k: Tensor, v: Tensor, *, has_diagonal: bool
) -> None:
    """Writes tiles of `n_heads` query heads each. k: (tiles, keys, D), v: (tiles, keys, Dv)."""
    n, n_keys, height = len(places), k.shape[1], tiles.height
    q = workspace.take("q", (n, n_heads, height, k.shape[2]), k.dtype)
    for tile, place in zip(q.unbind(0), places, strict=True):
        load_tile(tile, problem.q, place)

    scores = workspace.take("scores", (n, n_heads * height, n_keys), k.dtype)
    torch.baddbmm(scores, q.view(n, n_heads * height, -1), k.transpose(1, 2), beta=0, alpha=problem.scale, out=scores)
    finish_scores(scores, problem.softcap)
    by_head = scores.view(n, n_heads, height, n_keys)
    if has_diagonal:
        own = by_head[..., n_keys - problem.block_size :]
        own.masked_fill_(hidden_corner(height, tiles.lead, problem.block_size), -torch.inf)
    lse = softmax_with_lse(by_head, wants_lse=problem.lse is not None)

    probs = scores
    if v.dtype != k.dtype:
        probs = workspace.take("probs", tuple(scores.shape), v.dtype)
        probs.copy_(scores)
    result = workspace.take("result", (n, n_heads * height, v.shape[2]), v.dtype)
    torch.bmm(probs, v, out=result)
    for t, (tile, place) in enumerate(zip(result.view(n, n_heads, height, -1).unbind(0), places, strict=True)):
        store_tile(tile, problem.out, place)
        if problem.lse is not None and lse is not None:
            problem.lse[place.head : place.end_head, place.first : place.last] = lse[t, :, place.at : place.at + place.last - place.first]


def hidden_corner(height: int, lead: int, block_size: int) -> Tensor:
    """Keys of its own block that a tile's rows must not see, (height, b) bool."""
    return torch.ones(height, block_size, dtype=torch.bool).triu(lead + 1)


def load_tile(tile: Tensor, q: Tensor, place: TilePlace) -> None:
    """Fills a (heads, height, D) tile from q (T, Hq, D); rows that do not exist become zero."""
    n_rows = place.last - place.first
    if n_rows < tile.shape[1]:
        tile.zero_()
    tile[:, place.at : place.at + n_rows] = q[place.first : place.last, place.head : place.end_head].transpose(0, 1)


def store_tile(tile: Tensor, out: Tensor, place: TilePlace) -> None:
    """Writes the existing rows of a (heads, height, Dv) tile into out (T, Hq, Dv)."""
    out[place.first : place.last, place.head : place.end_head] = tile[:, place.at : place.at + place.last - place.first].transpose(0, 1)


def clear_tile(problem: Problem, tiles: Tiles, todo: Schedule, kv_heads: range, where: tuple[int, int, int]) -> None:
    """Sets a tile without keys to 0, its LSE to −inf."""
    place = tile_place(problem, tiles, kv_heads, where, 0, todo.heads_per_tile)
    problem.out[place.first : place.last, place.head : place.end_head] = 0
    if problem.lse is not None:
        problem.lse[place.head : place.end_head, place.first : place.last] = -torch.inf
