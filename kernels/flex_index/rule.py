"""The options of the selection, and the small arithmetic that follows from them (sparse-attention.md §2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Coverage = Literal["block", "token"]
SlashPooling = Literal["split", "reference"]
QaScope = Literal["global", "row"]
GqaMode = Literal["per_head", "group_union"]
Fidelity = Literal["corrected", "published"]

# The published code divides token counts by this, whatever the block size (§2.9, trap 3).
PUBLISHED_DIVISOR = 128


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """How blocks are chosen. Ranges are checked by the method that users build; here any positive block size will do.

    coverage: "block" counts blocks until the kept columns hold `gamma` of the probe; "token" only divides token counts, without guarantee.
    slash_pooling: "split" shares a distance between the two block diagonals it touches; "reference" is the published floor rule.
    fidelity: "published" brings back the slips of the published code: constant 128, one block too many, query-aware sets that stop short
    of `gamma`, undefined distances filed as vertical-slash, 1/√D in place of the layer's scale.
    min_q, min_kv: sequences with fewer query rows or keys keep every tile.
    """

    block_size: int = 128           # tokens
    gamma: float = 0.95             # attention mass to keep
    tau: float = 0.1                # a head is query-aware iff its distance is below
    min_budget: int = 1024          # tokens, of the columns and of the diagonals
    max_budget: int | None = None   # tokens
    sink_blocks: int = 1            # first key blocks that are always kept
    local_blocks: int = 1           # block diagonals that are always kept, own block included
    coverage: Coverage = "block"
    slash_pooling: SlashPooling = "split"
    qa_scope: QaScope = "global"
    gqa_mode: GqaMode = "per_head"
    size_corrected_estimate: bool = False
    fidelity: Fidelity = "corrected"
    min_q: int = 0
    min_kv: int = 0

    @property
    def is_published(self) -> bool:
        return self.fidelity == "published"

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens, the last perhaps partly."""
        return -(-tokens // self.block_size)

    def budget(self, nk: int, forced: int) -> tuple[int, int]:
        """Fewest and most blocks of the columns (or diagonals) of a sequence with `nk` key blocks; the forced ones always fit."""
        low = min(nk, max(self.blocks(self.min_budget), forced, 1))
        high = nk if self.max_budget is None else min(nk, max(low, self.blocks(self.max_budget)))
        return low, high

    def scale_of(self, layer_scale: float, head_dim: int) -> float:
        """The softmax scale of the selection: the layer's, or 1/√D where the published code is reproduced (§2.9, trap 8)."""
        return head_dim**-0.5 if self.is_published else layer_scale

    def keeps_everything(self, q_len: int, kv_len: int) -> bool:
        """Whether a sequence of these lengths runs dense without a look at its attention."""
        return self.gamma >= 1.0 or q_len < self.min_q or kv_len < self.min_kv
