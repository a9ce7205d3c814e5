"""The definition of the selection in fp64, head by head and without cleverness (sparse-attention.md §2.3–2.7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accel.kernels.block_sparse import Rows
from accel.kernels.flex_index.result import HeadDiagnostics, SequenceSelection
from accel.kernels.flex_index.rule import SelectionRule


def select_sequence(q: Tensor, k: Tensor, rows: Rows, rule: SelectionRule, *, scale: float, softcap: float | None) -> SequenceSelection:
    """Blocks of one sequence. q: (L, Hq, D), k: (Hkv, N, D); everything is computed in fp64."""
    q, k = q.double(), k.double()
    group = q.shape[1] // k.shape[0]
    scale = rule.scale_of(scale, q.shape[-1])
    heads = [_select_head(q[:, h], k[h // group], rows, rule, scale, softcap) for h in range(q.shape[1])]
    vertical, slash, extra, is_finite = (torch.stack(part) for part in zip(*(h[:4] for h in heads), strict=True))
    details = [h[4] for h in heads]
    is_query_aware = torch.tensor([d["is_query_aware"] for d in details], device="cpu")
    aware = is_query_aware.nonzero()[:, 0]
    diagnostics = HeadDiagnostics(**{name: torch.stack([torch.as_tensor(d[name], device="cpu") for d in details]) for name in details[0]})
    return SequenceSelection(vertical, slash, aware, extra[aware] if aware.numel() else None, is_finite, diagnostics)


def probe_attention(q: Tensor, k: Tensor, rows: Rows, block_size: int, scale: float, softcap: float | None) -> Tensor:
    """Â, the dense attention of the probe rows of one head, (ℓ, N). q: (L, D), k: (N, D). §2.3"""
    length = min(block_size, rows.q_len)
    logits = _capped(q[-length:] @ k.T * scale, softcap)
    position = torch.arange(rows.kv_len - length, rows.kv_len, device="cpu")
    return logits.masked_fill(torch.arange(rows.kv_len, device="cpu") > position[:, None], -math.inf).softmax(-1)


def distance_mass(attention: Tensor) -> Tensor:
    """a_s, the mean attention at each token distance, (N,). attention: (ℓ, N), its last row at position N − 1. §2.4"""
    length, n = attention.shape
    mass = attention.new_zeros(n)
    for r in range(length):
        position = n - length + r
        mass[: position + 1] += attention[r, : position + 1].flip(0) / length
    return mass


def slash_block_mass(mass: Tensor, n_blocks: int, rule: SelectionRule) -> Tensor:
    """u_s, the mass of each block diagonal, (nk,). mass: (N,), a_s. §2.5.4"""
    b, n = rule.block_size, mass.shape[0]
    by_block = mass.new_zeros(n_blocks)
    for distance in range(n):
        if rule.slash_pooling == "reference":
            by_block[n_blocks - 1 - (n - 1 - distance) // b] += mass[distance]
            continue
        near, beyond = divmod(distance, b)
        by_block[near] += mass[distance] * (b - beyond) / b
        by_block[min(near + 1, n_blocks - 1)] += mass[distance] * beyond / b
    return by_block


def tokens_needed(mass: Tensor, rule: SelectionRule) -> int:
    """K_v or K_s: how many of the largest entries hold gamma. §2.5.1"""
    total, count = 0.0, 0
    for value in sorted(mass.tolist(), reverse=True):
        if rule.is_published and total + value > rule.gamma:
            return count + 1
        total, count = total + value, count + 1
        if not rule.is_published and total >= rule.gamma:
            return count
    return count + 1 if rule.is_published else count


def ranked_blocks(mass: Tensor, n_forced: int) -> list[int]:
    """Block indices, the forced ones first, then by falling mass and rising index. §2.5.7"""
    values = mass.tolist()
    return sorted(range(len(values)), key=lambda j: (j >= n_forced, -values[j] if j >= n_forced else 0.0, j))


def lines(tokens: int, block_mass: Tensor, n_forced: int, is_query_aware: bool, rule: SelectionRule) -> tuple[Tensor, int]:
    """Columns (or diagonals) to keep, (nk,) bool, and their number. §2.5"""
    nk = block_mass.shape[0]
    order = ranked_blocks(block_mass, n_forced)
    count = tokens // 128 + 1 if rule.is_published else math.ceil(tokens / rule.block_size)
    if rule.coverage == "block":
        while count < nk and float(block_mass[order[:count]].sum()) < rule.gamma:
            count += 1
    low, high = rule.budget(nk, n_forced)
    count = low if is_query_aware else min(max(count, low), high)
    kept = torch.zeros(nk, dtype=torch.bool, device="cpu")
    kept[order[:count]] = True
    return kept, count


def js_distance(p: Tensor, q: Tensor, *, is_guarded: bool) -> float:
    """Jensen–Shannon distance of two distributions. Without the guards a zero or a rounding error gives NaN. §2.6"""
    total = 0.0
    for x, y in zip(p.tolist(), q.tolist(), strict=True):
        for value in (x, y):
            if value == 0 and not is_guarded:
                return math.nan
            if value > 0 or math.isnan(value):
                total += value * math.log(value / ((x + y) / 2)) / 2
    if math.isnan(total) or (total < 0 and not is_guarded):
        return math.nan
    return math.sqrt(max(total, 0.0))


def _select_head(
    q: Tensor, k: Tensor, rows: Rows, rule: SelectionRule, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor | float | int | bool]]:
    """Columns, diagonals, query-aware tiles, whether all was finite, and the diagnostics of one head. q: (L, D), k: (N, D)."""
    b, nk = rule.block_size, rows.key_blocks(rule.block_size)
    attention = probe_attention(q, k, rows, b, scale, softcap)
    length = attention.shape[0]
    by_key, by_distance = attention.mean(0), distance_mass(attention)
    vertical_mass = torch.stack([by_key[j * b : (j + 1) * b].sum() for j in range(nk)])
    slash_mass = slash_block_mass(by_distance, nk, rule)
    mean_keys = torch.stack([k[j * b : (j + 1) * b].mean(0) for j in range(nk)])

    logits = _capped(mean_keys @ q[-length:].mean(0) * scale, softcap)
    if rule.size_corrected_estimate:
        for j in range(nk):
            visible = [min(max(position + 1 - j * b, 0), b) for position in range(rows.kv_len - length, rows.kv_len)]
            logits[j] += math.log(sum(visible) / length)
    estimate = logits.softmax(0)
    distance = js_distance(estimate, vertical_mass, is_guarded=not rule.is_published)
    is_query_aware = distance < rule.tau

    vertical_tokens, slash_tokens = tokens_needed(by_key, rule), tokens_needed(by_distance, rule)
    vertical, n_vertical = lines(vertical_tokens, vertical_mass, rule.sink_blocks, is_query_aware, rule)
    slash, n_slash = lines(slash_tokens, slash_mass, rule.local_blocks, is_query_aware, rule)
    pooled = pooled_map(q, mean_keys, rows, b, scale, softcap)
    is_finite = attention.isfinite().all() & (pooled.isfinite().all() | (not is_query_aware))
    details: dict[str, Tensor | float | int | bool] = {
        "is_query_aware": is_query_aware,
        "distance": torch.tensor(distance, dtype=torch.float64, device="cpu"),
        "vertical_tokens": vertical_tokens,
        "slash_tokens": slash_tokens,
        "vertical_blocks": n_vertical,
        "slash_blocks": n_slash,
        "vertical_mass": vertical_mass,
        "slash_mass": slash_mass,
        "tile_mass": _tile_mass(attention, rows, b),
    }
    return vertical, slash, query_aware_tiles(pooled, rows, rule), is_finite, details


def pooled_map(q: Tensor, mean_keys: Tensor, rows: Rows, b: int, scale: float, softcap: float | None) -> Tensor:
    """Ā, the block map that mean vectors predict, (nq, nk): zero above the diagonal, each row sums to 1. §2.7"""
    maps = []
    for i in range(rows.first_block(b), rows.first_block(b) + rows.query_blocks(b)):
        mean_query = q[max(i * b - rows.offset, 0) : (i + 1) * b - rows.offset].mean(0)
        logits = _capped(mean_keys @ mean_query * scale, softcap)
        logits[i + 1 :] = -math.inf
        maps.append(logits.softmax(0))
    return torch.stack(maps)


def query_aware_tiles(pooled: Tensor, rows: Rows, rule: SelectionRule) -> Tensor:
    """The fewest tiles that hold gamma of the map, or of each row, (nq, nk) bool. §2.7"""
    nq, nk = pooled.shape
    kept = torch.zeros(nq, nk, dtype=torch.bool, device="cpu")
    whole = [(i, j) for i in range(nq) for j in range(nk)]
    scopes = [whole] if rule.qa_scope == "global" else [[(i, j) for j in range(nk)] for i in range(nq)]
    for tiles in scopes:
        threshold = rule.gamma * len({i for i, _ in tiles})
        total = 0.0
        # Python's sort is stable: ties stay in order of index
        for tile in sorted(tiles, key=lambda tile: -float(pooled[tile])):
            if rule.is_published and total + float(pooled[tile]) > threshold:
                break
            total += float(pooled[tile])
            kept[tile] = True
            if not rule.is_published and total >= threshold:
                break
    first = rows.first_block(rule.block_size)
    return kept & (torch.arange(nk, device="cpu") <= torch.arange(first, first + nq, device="cpu")[:, None])


def _tile_mass(attention: Tensor, rows: Rows, b: int) -> Tensor:
    """Probe mass by query block and key block, (p, nk)."""
    length = attention.shape[0]
    by_row = torch.stack([attention[:, j * b : (j + 1) * b].sum(-1) for j in range(rows.key_blocks(b))], 1)
    block_of_row = [(rows.kv_len - length + r) // b for r in range(length)]
    blocks = sorted(set(block_of_row))
    return torch.stack([sum((by_row[r] for r in range(length) if block_of_row[r] == i), by_row.new_zeros(())) / length for i in blocks])


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
