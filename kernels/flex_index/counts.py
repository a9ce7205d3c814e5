"""How many of the largest entries hold a share of the mass, without sorting them (sparse-attention.md §2.5.1)."""

from __future__ import annotations

import torch
from torch import Tensor

# The 31 bits of a non-negative fp32 number order it like an integer; they are searched from the top in three digits.
_DIGIT_BITS = (11, 10, 10)


def count_to_reach(mass: Tensor, share: float, *, is_published: bool = False) -> Tensor:
    """The smallest k whose k largest entries sum to at least `share`, row by row: (R, N) fp32, non-negative → (R,) int64.

    Without such a k, or with NaN in the row: N. Exact: sums run in fp64, entries of equal size count one by one.
    is_published: the number of prefixes with a sum ≤ share, plus one: larger by one where a prefix hits `share` exactly or none passes it.
    """
    bits, weight = mass.view(torch.int32), mass.double()
    rows, n = mass.shape
    prefix = torch.zeros(rows, 1, dtype=torch.int32, device=mass.device)
    # mass of the entries larger than any whose leading digits are `prefix`
    above = torch.zeros(rows, 1, dtype=torch.float64, device=mass.device)
    shift = sum(_DIGIT_BITS)
    for width in _DIGIT_BITS:
        candidate = bits >> shift == prefix
        shift -= width
        digit = (bits >> shift & 2**width - 1).long()
        by_digit = above.new_zeros(rows, 2**width).scatter_add_(1, digit, weight.where(candidate, 0.0))
        # mass of all entries from each digit upwards, falling with the digit
        reached = above + by_digit.flip(-1).cumsum(-1).flip(-1)
        chosen = ((reached >= share).sum(-1, keepdim=True) - 1).clamp_min(0)
        above = (reached - by_digit).gather(-1, chosen)
        prefix = prefix << width | chosen.to(torch.int32)
    larger = (bits > prefix).sum(-1)
    # entries as large as the threshold that are still needed
    missing = (share - above[:, 0]) / prefix.view(torch.float32)[:, 0].double()
    missing = missing.floor() + 1 if is_published else missing.ceil()
    is_reachable = weight.sum(-1) >= share
    return torch.where(is_reachable, larger + missing, n + is_published).long()
