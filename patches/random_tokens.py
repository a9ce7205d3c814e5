"""Random visual tokens: the control that shows whether a ranking is worth more than its size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.patches._options import is_whole, require
from accel.patches._tokens import ScopedPruning, allotments, largest, unit_tokens
from accel.protocols import Keep, PruningContext, Unit


@dataclass(frozen=True, kw_only=True)
class RandomTokens(ScopedPruning):
    """Keeps random visual tokens, as many as a ranking would, in front of the language model.

    seed: with the sizes of a sequence's images it fixes the draw, whatever else is in the batch.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, is_whole(self.seed), f"seed must be a whole number, got {self.seed!r}")

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """Random tokens of each unit and their newlines; None where no sequence has an image."""
        if not ctx.units:
            return None
        tokens = unit_tokens(ctx)
        draws = self._draws(ctx.units, [len(own) for own in tokens], ctx.unit.device)
        counts = allotments(tokens, draws, ctx.units, self.budget_scope, self.keep, self.min_tokens)
        return self.chosen(ctx, [largest(draw, n) for draw, n in zip(draws, counts, strict=True)], tokens)

    def _draws(self, units: Sequence[Unit], lens: Sequence[int], device: torch.device) -> list[Tensor]:
        """(n,) fp32 in [0, 1) per unit; one generator per sequence, always on the CPU, so that devices agree."""
        of_sequence = {b: [u for u in units if u.sequence == b] for b in {u.sequence for u in units}}
        generators = {b: torch.Generator("cpu").manual_seed(self._seed_of(own)) for b, own in of_sequence.items()}
        draws = [torch.rand(n, dtype=torch.float32, generator=generators[u.sequence], device="cpu") for u, n in zip(units, lens, strict=True)]
        return [draw.to(device) for draw in draws]

    def _seed_of(self, units: Sequence[Unit]) -> int:
        """A seed from the sizes of one sequence. torch's generator reads 32 bits of it, hence the hash."""
        text = f"{self.seed} " + " ".join(f"{unit.n_tokens},{unit.height},{unit.width},{unit.frames}" for unit in units)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
