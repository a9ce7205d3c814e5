"""PowerAttention: a static mask of sink, window and power-of-two block distances (arXiv 2503.03588; sparse-attention.md §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from accel.errors import OptionError
from accel.patches._static import has_few_rows, is_whole, require_whole
from accel.protocols import AttentionContext, AttentionStep, Choice, Method, ModelInfo, Phase, SparseAttention, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import ImplicitPlan, KeyView

Phases = Literal["prefill", "decode", "both"]


@dataclass(frozen=True, kw_only=True)
class PowerAttention(SparseAttention):
    """Each block of queries reads the first blocks, a window, and the blocks at distances 1, 2, 4, 8, … blocks. Gradients flow.

    is_adapted: whether the model was trained with this mask. False keeps 2 layers of 7 dense and decodes densely, and quality still
        suffers; True makes every layer sparse, in prefill and decode.
    full_layers, apply_to: override those two consequences. "2/7", "none" or layer indices; "prefill", "decode" or "both".
    block_size: tokens. sink_blocks: first blocks that are read. window_blocks: own block included. max_power: no distance beyond 2^max_power
        blocks; None for no bound.
    min_seq_len: from so many keys on, prefill and decode are sparse. 0 gives an adapted model its own mask at every length.
    The cache cannot shrink: every old block becomes a power-of-two neighbour again.
    """

    trainable: ClassVar[bool] = True
    needs_training: ClassVar[str | None] = "quality depends on adapting the model to this mask; unmodified models lose much in retrieval"
    reach_options: ClassVar[frozenset[str]] = SparseAttention.reach_options | {"is_adapted", "apply_to", "full_layers"}

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
            require_whole(self, option, low=low)
        if self.max_power is not None:
            require_whole(self, "max_power", low=0)
        if not isinstance(self.is_adapted, bool):
            raise OptionError(f"powerattention: is_adapted must be True or False, got {self.is_adapted!r}")
        if self.apply_to not in (None, "prefill", "decode", "both"):
            raise OptionError(f"powerattention: apply_to must be prefill, decode, both or None, got {self.apply_to!r}")
        if self.full_layers not in (None, "2/7", "none"):
            # recipes bring lists
            layers = tuple(self.full_layers) if isinstance(self.full_layers, (list, tuple)) else None
            if layers is None or not all(is_whole(layer) and layer >= 0 for layer in layers):
                raise OptionError(f"powerattention: full_layers must be '2/7', 'none', layer indices or None, got {self.full_layers!r}")
            object.__setattr__(self, "full_layers", layers)

    @property
    def phases(self) -> Phases:
        """The phases that run sparse."""
        return self.apply_to or ("both" if self.is_adapted else "prefill")

    def is_full_layer(self, layer: int) -> bool:
        """Whether a layer stays dense; "2/7" means layers 0, 1, 7, 8, 14, 15, … (sparse-attention.md §3.2)."""
        full = self.full_layers if self.full_layers is not None else ("none" if self.is_adapted else "2/7")
        is_full = layer in full if isinstance(full, tuple) else full == "2/7" and layer % 7 < 2
        return is_full or layer in self.dense_layers

    @property
    def longest_dense_blocks(self) -> int:
        """The mask is dense exactly up to this many blocks, 6 with the defaults (sparse-attention.md §3.3).

        The shortest distance that neither window nor powers cover is first needed by the query block that far behind the last sink.
        """
        gap = self.window_blocks
        while gap.bit_count() == 1 and (self.max_power is None or gap <= 2**self.max_power):
            gap += 1
        return gap + self.sink_blocks

    @property
    def min_useful_len(self) -> int:
        """The shortest sequence with a hidden key: one token more than the mask leaves dense."""
        return self.longest_dense_blocks * self.block_size + 1

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Why this call runs dense, or None. Few queries behind a cached prefix count as decoding."""
        if self.is_full_layer(step.layer):
            return "dense layer"
        is_decode = step.phase == "decode" or has_few_rows(step, self.block_size)
        phase: Phase = "decode" if is_decode else "prefill"
        if self.phases not in ("both", phase):
            return phase if phase == step.phase else "few query rows"
        return self.why_short(step)

    def static_pattern(self, step: AttentionStep) -> ImplicitPlan:
        """The mask, the same for every input, head, layer and length."""
        from accel.kernels.block_sparse import ImplicitPlan

        return ImplicitPlan(self.block_size, self.window_blocks, self.sink_blocks, powers=True, max_power=self.max_power)

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> ImplicitPlan:
        """`static_pattern`: queries and keys decide nothing."""
        return self.static_pattern(ctx.step)

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: `full_layers` names layers that are not there."""
        missing = [i for i in self.full_layers if i >= model.n_layers] if isinstance(self.full_layers, tuple) else []
        return [f"full_layers names {', '.join(map(str, missing))}, the last layer is {model.n_layers - 1}"] if missing else []

    def notice(self, model: ModelInfo) -> str | None:
        """One line: that the model wants adapting, or that no layer is left to be sparse."""
        if model.n_layers and all(self.is_full_layer(layer) for layer in range(model.n_layers)):
            return f"all {model.n_layers} layers stay dense; full_layers='none' makes them sparse"
        return None if self.is_adapted else super().notice(model)

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        """Width of the pattern and its grain."""
        return {
            "block_size": Choice((64, 128, 256)),
            "window_blocks": Uniform(1, 16, is_integer=True),
            "sink_blocks": Uniform(0, 4, is_integer=True),
        }
