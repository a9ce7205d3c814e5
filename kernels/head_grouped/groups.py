"""KV heads of one layer that lie in memory together, and which of their entries a query sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KVGroup:
    """Entries of some KV heads, in one dense tensor of keys and one of values.

    heads: their numbers in the layer, in the order in which they are stored here.
    k, v: (B, H_g, N_g, D), last stride 1 and any others: a buffer with spare room is handed over as a view.
    length: (B, H_g) int32, entries that count, from the front; None where all N_g do. What lies behind them is never read.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    length: Tensor | None = None

    @property
    def n_entries(self) -> int:
        """N_g, of which a head may use fewer."""
        return self.k.shape[2]

    @property
    def span(self) -> slice | None:
        """The heads as a slice of the layer's, None where they are not neighbours in ascending order."""
        first = self.heads[0] if self.heads else 0
        return slice(first, first + len(self.heads)) if self.heads == tuple(range(first, first + len(self.heads))) else None


def n_visible(n: int, row: int, *, n_rows: int, n_causal: int) -> int:
    """How many of a head's n entries a query row sees: all of them, without the causal ones that belong to later rows."""
    return max(n - min(n_causal, n_rows - 1 - row), 0)
