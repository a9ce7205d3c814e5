"""FlexPrefill: sparse prefill that measures, head by head, which key blocks carry the attention (ICLR 2025, arXiv 2502.20766)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from accel.errors import OptionError, UnsupportedError
from accel.protocols import AttentionContext, AttentionStep, Choice, Method, ModelInfo, RunDense, SparseAttention, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import BlockPlan, KeyView
    from accel.kernels.flex_index import SelectionRule

# Block size where none is asked for: heads wider than this get half-size blocks, so that their tiles still fit (sparse-attention.md §2.2).
_WIDE_HEAD_DIM = 128

_CHOICES = {
    "coverage": ("block", "token"),
    "slash_pooling": ("split", "reference"),
    "qa_scope": ("global", "row"),
    "gqa_mode": ("per_head", "group_union"),
    "fidelity": ("corrected", "published"),
}


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(SparseAttention):
    """Keeps, per head, the fewest key blocks whose estimated attention reaches `gamma`. Prefill only, without training. No gradients.

    gamma: attention mass to keep, in (0, 1]; 1 runs dense. 0.9 to 0.95 is usual.
    tau: a head whose pooled estimate is closer to its true attention than this follows the estimate ("query-aware"); the others follow
        the columns and diagonals of the last queries. 0 turns query-aware heads off, 0.84 makes every head one.
    min_budget, max_budget: tokens, bounds of the columns and, separately, of the diagonals. 1024 suits prompts from 16K on.
    block_size: tokens. None: 128, or 64 for head_dim above 128.
    sink_blocks, local_blocks: first key blocks and nearest block diagonals (own block included) that are always kept.
    coverage: "block" guarantees `gamma` of the last queries' attention; "token" is the published count, which guarantees nothing.
    slash_pooling: "split" shares a distance between the two block diagonals it touches; "reference" rounds it down.
    qa_scope: query-aware heads reach `gamma` over the whole map ("global") or in every row of blocks ("row").
    gqa_mode: "group_union" gives the heads of a KV group all their tiles together.
    size_corrected_estimate: weighs the estimate of a block by its visible keys.
    min_q: dense below this many queries. None: two blocks.
    fidelity: "published" repeats the slips of the published code; `FlexPrefill.reference()` sets it with everything that belongs to it.
    """

    reach_options: ClassVar[frozenset[str]] = SparseAttention.reach_options | {"min_q"}

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int | None = None
    sink_blocks: int = 1
    local_blocks: int = 1
    coverage: Literal["block", "token"] = "block"
    slash_pooling: Literal["split", "reference"] = "split"
    qa_scope: Literal["global", "row"] = "global"
    gqa_mode: Literal["per_head", "group_union"] = "per_head"
    size_corrected_estimate: bool = False
    min_q: int | None = None
    fidelity: Literal["corrected", "published"] = "corrected"

    @classmethod
    def reference(cls, **overrides: Any) -> Self:
        """The published behaviour, slips included (sparse-attention.md §2.9, §6.2), with the settings of its RULER runs on Llama 3.1.

        Kept out because it only crashes or loses data: gamma 1 runs dense, padding and cached prefixes are honoured.
        """
        published = {
            "coverage": "token", "slash_pooling": "reference", "fidelity": "published",
            "block_size": 128, "min_budget": 1024, "gamma": 0.95, "tau": 0.1, "min_seq_len": 0,
        }  # fmt: skip
        return cls(**{**published, **overrides})

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(_is_number(self.gamma) and 0.0 < self.gamma <= 1.0, f"gamma must lie in (0, 1], got {self.gamma!r}; 0.9 to 0.95 is usual")
        _require(_is_number(self.tau) and 0.0 <= self.tau <= 1.0, f"tau must lie in [0, 1], got {self.tau!r}; 0.1 is usual, 0 turns it off")
        _require(_is_count(self.min_budget, 0), f"min_budget must be a number of tokens, 0 or more, got {self.min_budget!r}")
        _require(
            self.max_budget is None or _is_count(self.max_budget, max(self.min_budget, 1)),
            f"max_budget must be None or a number of tokens, at least min_budget ({self.min_budget}), got {self.max_budget!r}",
        )
        _require(
            self.block_size is None or (_is_count(self.block_size, 16) and self.block_size <= 512 and self.block_size.bit_count() == 1),
            f"block_size must be None or a power of two from 16 to 512 tokens, got {self.block_size!r}; 128 is usual",
        )
        _require(_is_count(self.sink_blocks, 0), f"sink_blocks must be 0 or more, got {self.sink_blocks!r}")
        _require(_is_count(self.local_blocks, 1), f"local_blocks must be 1 or more (a query sees its own block), got {self.local_blocks!r}")
        _require(self.min_q is None or _is_count(self.min_q, 1), f"min_q must be None or 1 query or more, got {self.min_q!r}")
        for option, allowed in _CHOICES.items():
            _require(getattr(self, option) in allowed, f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}")

    @property
    def min_useful_len(self) -> int:
        """The longest sequence of which every block is kept anyway, plus one: two blocks (first and own), or the minimum budget."""
        return self._min_useful_len(self.block_size or 64)

    def _min_useful_len(self, block_size: int) -> int:
        return max(2, -(-self.min_budget // block_size)) * block_size + 1

    def block_size_for(self, head_dim: int) -> int:
        """Tokens per block for heads of this width."""
        return self.block_size or (64 if head_dim > _WIDE_HEAD_DIM else 128)

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Why this call runs dense, or None; also for few queries, and where `gamma` keeps everything."""
        block_size = self.block_size_for(step.head_dim)
        min_q, useful = self._min_q(block_size), self._min_useful_len(block_size)
        if reason := super().dense_reason(step):
            return reason
        if self.gamma >= 1.0:
            return "gamma 1 keeps everything"
        if step.q_len < min_q:
            return f"fewer than {min_q} queries"
        return f"shorter than {useful} tokens" if step.kv_len < useful else None

    def _min_q(self, block_size: int) -> int:
        return 2 * block_size if self.min_q is None else self.min_q

    def rule(self, step: AttentionStep) -> SelectionRule:
        """The options as the kernel takes them, for calls shaped like `step`. Short sequences of a batch stay dense as they would alone."""
        from accel.kernels.flex_index import SelectionRule

        block_size = self.block_size_for(step.head_dim)
        return SelectionRule(
            block_size=block_size,
            gamma=self.gamma,
            tau=self.tau,
            min_budget=self.min_budget,
            max_budget=self.max_budget,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
            coverage=self.coverage,
            slash_pooling=self.slash_pooling,
            qa_scope=self.qa_scope,
            gqa_mode=self.gqa_mode,
            size_corrected_estimate=self.size_corrected_estimate,
            fidelity=self.fidelity,
            min_q=self._min_q(block_size),
            min_kv=max(self.pays_from(step), self._min_useful_len(block_size)),
        )

    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan | RunDense:
        """Columns, diagonals and query-aware tiles per head, or dense where the probe met NaN. q: (tokens, Hq, D) view."""
        import torch

        from accel.kernels.flex_index import flex_index

        if torch.is_grad_enabled() and (q.requires_grad or keys.storage.requires_grad):
            raise UnsupportedError("flexprefill selects blocks without gradients: run it under torch.no_grad(), or undo it before training")
        found = flex_index(q, keys, ctx.lens, rule=self.rule(ctx.step), scale=ctx.scale, softcap=ctx.softcap)
        # elsewhere this read would wait for the device; there the plan itself keeps every tile of such heads
        if q.device.type == "cpu" and not bool(found.is_finite.all()):
            return RunDense("NaN in the probe")
        return found.plan

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: without full-attention layers there is nothing to thin out."""
        reasons = []
        if model.layer_types and "full_attention" not in model.layer_types:
            kinds = ", ".join(sorted(set(model.layer_types)))
            reasons.append(f"flexprefill thins out full causal attention, but the layers of {model.family} are {kinds}")
        if model.n_heads % model.n_kv_heads:
            reasons.append(f"flexprefill needs the {model.n_heads} query heads to be a multiple of the {model.n_kv_heads} key heads")
        return reasons

    def notice(self, model: ModelInfo) -> str | None:
        """A line for models whose positions end before the first sparse call."""
        longest = model.max_positions
        if longest is None:
            return super().notice(model)
        step = AttentionStep(
            layer=-1, n_layers=model.n_layers, batch=1, q_len=longest, kv_len=longest, n_heads=model.n_heads, n_kv_heads=model.n_kv_heads,
            head_dim=model.head_dim, device=model.device, dtype=model.dtype,
        )  # fmt: skip
        reason = self.dense_reason(step)
        if reason is None:
            return super().notice(model)
        return f"flexprefill never runs sparse here: even a full prompt of {longest} tokens stays dense ({reason})"

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        return {
            "gamma": Uniform(0.8, 0.99),
            "min_budget": Uniform(128, 2048, is_log=True, is_integer=True),
            "tau": Uniform(0.0, 0.3),
        }


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OptionError(f"flexprefill: {message}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
