"""PowerAttention: a static mask of sink, window and power-of-two block distances (arXiv 2503.03588; sparse-attention.md §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from accel.errors import OptionError
from accel.protocols import AttentionContext, AttentionStep, Choice, ModelInfo, SparseAttention, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import BlockPlan, ImplicitPlan, KeyView

Phases = Literal["prefill", "decode", "both"]


@dataclass(frozen=True, kw_only=True)
class PowerAttention(SparseAttention):
    """Every block of queries reads the first block, a window, and the blocks at distances 1, 2, 4, 8, … blocks.

    is_adapted: whether the model was trained with this mask. False, the default, keeps 2 layers of 7 dense and decodes densely; quality
        still suffers (sparse-attention.md §3.1). True makes every layer sparse in prefill and decode.
    full_layers, apply_to: override those two defaults: "2/7", "none", or layer indices; "prefill", "decode" or "both".
    max_power: longest distance 2^max_power blocks; None for no bound.
    The cache cannot shrink: every old block becomes a power-of-two neighbour again.
    """

    trainable: ClassVar[bool] = True
    needs_training: ClassVar[str | None] = (
        "its published quality needs a model trained with this mask; on an unmodified model expect losses, above all in retrieval"
    )

    block_size: int = 256
    window_blocks: int = 5
    sink_blocks: int = 1
    max_power: int | None = None
    is_adapted: bool = False
    full_layers: Literal["2/7", "none"] | tuple[int, ...] | None = None
    apply_to: Phases | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low in (("block_size", 1), ("window_blocks", 1), ("sink_blocks", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or value < low:
                raise OptionError(f"powerattention: {option} must be a whole number of at least {low}, got {value!r}")
        if self.max_power is not None and (not isinstance(self.max_power, int) or self.max_power < 0):
            raise OptionError(f"powerattention: max_power must be None or a whole number of at least 0, got {self.max_power!r}")
        if self.apply_to not in (None, "prefill", "decode", "both"):
            raise OptionError(f"powerattention: apply_to must be prefill, decode, both or None, got {self.apply_to!r}")
        if isinstance(self.full_layers, str) and self.full_layers not in ("2/7", "none"):
            raise OptionError(f"powerattention: full_layers must be '2/7', 'none', layer indices or None, got {self.full_layers!r}")
        if isinstance(self.full_layers, list):
            object.__setattr__(self, "full_layers", tuple(self.full_layers))

    @property
    def phases(self) -> Phases:
        """The phases that run sparse."""
        return self.apply_to or ("both" if self.is_adapted else "prefill")

    def is_full_layer(self, layer: int) -> bool:
        """Whether a layer stays dense: two of every seven unless told otherwise (sparse-attention.md §3.2)."""
        layers = self.full_layers if self.full_layers is not None else ("none" if self.is_adapted else "2/7")
        if isinstance(layers, tuple):
            return layer in layers
        return layers == "2/7" and layer % 7 < 2

    @property
    def min_useful_len(self) -> int:
        """The longest sequence that the mask leaves dense, plus one token."""
        return self.longest_dense_blocks() * self.block_size + 1

    def longest_dense_blocks(self) -> int:
        """Number of leading blocks whose rows are all dense; 6 for the defaults (sparse-attention.md §3.3)."""
        pattern = self.pattern()
        i = 0
        while len(pattern.row_blocks(i)) == i + 1:
            i += 1
            if i >= self.window_blocks + self.sink_blocks + 2:
                break
        return i

    def dense_reason(self, step: AttentionStep) -> str | None:
        if self.is_full_layer(step.layer):
            return "dense layer"
        if step.phase == "prefill" and self.phases == "decode":
            return "prefill"
        if step.phase == "prefill" and self.phases == "prefill" and step.q_len < min(2 * self.block_size, step.kv_len):
            return "few query rows"
        if step.phase == "decode" and self.phases != "prefill":
            return self._too_short(step)
        return super().dense_reason(step)

    def _too_short(self, step: AttentionStep) -> str | None:
        shortest = max(self.min_seq_len or 0, self.min_useful_len)
        if step.layer in self.dense_layers:
            return "dense layer"
        return f"shorter than {shortest} tokens" if step.kv_len < shortest else None

    def static_pattern(self, step: AttentionStep) -> BlockPlan:
        return self.pattern()

    def pattern(self) -> ImplicitPlan:
        """The mask, for any length."""
        from accel.kernels.block_sparse import ImplicitPlan

        return ImplicitPlan(self.block_size, self.window_blocks, self.sink_blocks, powers=True, max_power=self.max_power)

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan:
        return self.pattern()

    def notice(self, model: ModelInfo) -> str | None:
        return None if self.is_adapted else self.needs_training

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        return {"window_blocks": Uniform(1, 16, is_integer=True), "block_size": Choice((64, 128, 256))}
