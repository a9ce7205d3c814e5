"""Random cache entries: the control that shows whether a ranking is worth more than its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.patches._cache import newest
from accel.patches._head_budgets import HeadBudgets
from accel.patches._options import is_whole, require, require_whole
from accel.protocols import CompressionContext, HeadGroup, Retain

# SplitMix64 counts in steps of 2⁶⁴ / φ; written as the int64 of the same bits
STEP = -7046029254386353131


@dataclass(frozen=True, kw_only=True)
class RandomKV(HeadBudgets):
    """Keeps random entries of each head, so many of all scales so far: the control for every cache method.

    seed: with the layer and the head it gives every position its rank, for all rows alike.
    window: of a decoder, how many of the newest entries stay, as with all methods that it is compared to; small budgets give these at most half.
    """

    seed: int = 0
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, is_whole(self.seed), f"seed must be a whole number, got {self.seed!r}")
        require_whole(self, "window", 0)

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The entries whose positions rank highest; one rank for ever makes the survivors of every scale a fair draw of all before."""
        keys = torch.tensor([self._key(ctx.layer, head) for head in group.heads], device=ctx.k.device)
        ranks = mixed(keys[:, None] + (ctx.position - _n_padding(ctx)) * STEP)
        recent = newest(ctx, min(self.window, group.budget // 2)) if ctx.scale_shapes is None else None
        return Retain(self.best(ctx, ranks, group.budget, forced=recent))

    def _key(self, layer: int, head: int) -> int:
        """Where the numbers of a head start: 64 bits that differ in seed, layer and head."""
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {layer} {head}".encode(), digest_size=8).digest(), "little", signed=True)


def _n_padding(ctx: CompressionContext) -> Tensor | int:
    """(B, 1, 1) int64: how much padding stands in front of each row's tokens, so that a row keeps what it keeps alone."""
    if ctx.scale_shapes is not None:
        return 0
    known = ctx.state.get("random_kv first")
    if known is None:
        known = ctx.position.new_full((len(ctx.position),), -1)
    # alike for all heads until something was dropped; the first chunk of a prompt may be padding alone
    first = ctx.position[:, 0].gather(1, ctx.valid[:, 0].int().argmax(1, keepdim=True))[:, 0]
    known = ctx.state["random_kv first"] = torch.where((known < 0) & ctx.valid[:, 0].any(1), first, known)
    return known.clamp_min(0)[:, None, None]


def mixed(x: Tensor) -> Tensor:
    """Every int64 as another that looks random: the finaliser of SplitMix64. No generator, so nothing is stored and all devices agree."""
    # >> of an int64 repeats the sign, which must not spread: the mask leaves the bits that were there
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)
