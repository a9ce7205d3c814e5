"""The three protocols between methods and hosts (design.md §3), and what is handed over. Neither side knows the other by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from accel.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from accel.kernels.block_sparse import BlockPlan, KeyView, Ragged

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of a model before it runs. Hosts fill it in."""

    family: str                             # config.model_type
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]            # "full_attention", "sliding_attention", … one per layer
    device: str                             # "cpu", "cuda"
    dtype: str                              # "float32", "bfloat16", …
    max_positions: int | None = None
    has_vision: bool = False
    fingerprint: Callable[[], str] | None = None    # identifies the weights; for calibration files made for one model


@dataclass(frozen=True)
class Uniform:
    """A number to be tuned, between `low` and `high`."""

    low: float
    high: float
    is_log: bool = False
    is_integer: bool = False


@dataclass(frozen=True)
class Choice:
    """One of several values to be tuned."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Objective:
    """What `accel tune` optimises: `score(method, model, data)` → the value, larger is better unless `minimize`."""

    name: str
    score: Callable[[Method, Any, Any], float]
    minimize: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of every method: a frozen dataclass whose fields are its options, checked when it is built and written to recipes.

    Derive from one of the three protocols below, not from this class.
    """

    kind: ClassVar[str]
    needs_training: ClassVar[str | None] = None     # one line, shown by `accel ls` and `report()`

    @classmethod
    def method_name(cls) -> str:
        """The registry name: the file name, which is the class name in lower case."""
        return cls.__module__.rsplit(".", 1)[-1]

    def options(self) -> dict[str, Any]:
        """Every option with its value, ready for a recipe."""
        return asdict(self)

    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why this method cannot work on `model` in `host` next to `others`; empty when it can."""
        return []

    def notice(self, model: ModelInfo) -> str | None:
        """One line a user must know before trusting the results, or None."""
        return self.needs_training

    def bind(self, model: ModelInfo) -> Self:
        """The method with whatever it needs beyond its options (routers, profiles) loaded and checked against the model.

        Hosts call the result, never the method itself. Options suffice for most methods: the default returns `self`.
        """
        return self

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        """The options worth tuning. Empty: nothing to tune."""
        return {}

    @classmethod
    def objectives(cls) -> Mapping[str, Objective]:
        """What `accel tune` may optimise for this method, beyond accuracy and latency."""
        return {}


# --- sparse attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDense:
    """Answer of a planner: compute this call densely, and count it under `reason`."""

    reason: str


@dataclass(frozen=True)
class AttentionStep:
    """Shapes of one attention call, known before any tensor is read. Lengths are the longest of the batch."""

    layer: int
    n_layers: int
    batch: int
    q_len: int              # L
    kv_len: int             # N
    n_heads: int
    n_kv_heads: int
    head_dim: int
    device: str
    dtype: str

    @property
    def phase(self) -> Phase:
        return "decode" if self.q_len == 1 else "prefill"


@dataclass(frozen=True)
class AttentionContext:
    """Everything about one attention call but its queries and keys."""

    step: AttentionStep
    lens: Ragged
    scale: float                                        # the layer's own softmax scale
    softcap: float | None = None
    # per (sequence batch, layer), lives and dies with the cache; None where the host keeps none
    state: MutableMapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Method):
    """Chooses the key blocks that each block of queries reads.

    min_seq_len: dense below this many keys. None means this machine's measured crossover (`accel tune crossover`).
    dense_layers: layer indices kept dense.
    dense_kernel: what runs the calls left dense: the model's own attention, or our matrix-product path on a CPU.
    precision: "accurate" computes scores in fp32; "fast" computes bf16 scores in bf16 on a CPU (as eager attention does).
    """

    kind: ClassVar[str] = "sparse_attention"
    trainable: ClassVar[bool] = False               # whether gradients flow through the attention it plans

    min_seq_len: int | None = None
    dense_layers: tuple[int, ...] = ()
    dense_kernel: Literal["original", "gemm"] = "original"
    precision: Literal["accurate", "fast"] = "accurate"

    def __post_init__(self) -> None:
        name = self.method_name()
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.min_seq_len is not None and self.min_seq_len < 0:
            raise OptionError(f"{name}: min_seq_len must be None or at least 0, got {self.min_seq_len}")
        for option, allowed in (("dense_kernel", ("original", "gemm")), ("precision", ("accurate", "fast"))):
            if getattr(self, option) not in allowed:
                raise OptionError(f"{name}: {option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}")

    @property
    def min_useful_len(self) -> int:
        """Keys below which the method's own pattern is dense anyway."""
        return 0

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Why this call runs dense, or None. Shapes and options only, so that the answer is the same while a graph is traced."""
        from accel.crossover import crossover_tokens

        if step.layer in self.dense_layers:
            return "dense layer"
        if step.phase == "decode":
            return "decode"
        shortest = max(crossover_tokens(self, step) if self.min_seq_len is None else self.min_seq_len, self.min_useful_len)
        return f"shorter than {shortest} tokens" if step.kv_len < shortest else None

    @abstractmethod
    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan | RunDense:
        """Key blocks for every query block of this call.

        q: (tokens, Hq, D) view, the rows of sequence b given by `ctx.lens`; keys: the same sequences, cached prefix included.
        """

    def static_pattern(self, step: AttentionStep) -> BlockPlan | None:
        """The plan where it depends on neither q nor k: planned once per step, before any graph replays. None: ask `plan`."""
        return None


# --- token pruning ------------------------------------------------------------------------------------------------------------

Boundary = Literal["encoder", "projector", "layer"]
Observation = Literal["cls_row", "mean_received", "mean_selected_rows", "raw_pixels", "text_hidden"]


@dataclass(frozen=True)
class Stage:
    """A place at which a pruning method is asked: behind the encoder, behind the projector, or before decoder layer `layer`."""

    boundary: Boundary
    layer: int | None = None
    needs_learned_choice: bool = False      # the count is known only at run time: hosts that fix counts refuse


@dataclass(frozen=True)
class Unit:
    """One image, tile, frame or video of one sequence: its tokens and their grid."""

    sequence: int
    n_tokens: int
    height: int
    width: int
    frames: int = 1
    modality: Literal["image", "video"] = "image"


@dataclass(frozen=True)
class Merge:
    """Recycled rows: row `source` is added to row `anchor` with `weight`, and the sum takes the anchor's place, index and score."""

    anchor: Tensor          # (B, m) int64
    source: Tensor          # (B, m) int64
    weight: Tensor          # (B, m) fp32


@dataclass(frozen=True)
class Keep:
    """Answer of a pruning stage: the tokens that stay.

    index: (B, n) int64 ascending, the grid index of the kept tokens; ok: (B, n) bool, False pads rows that keep fewer.
    hidden: (B, tokens) bool, columns masked though not dropped (ragged exits). scores: (B, n) fp32, kept for later stages.
    """

    index: Tensor
    ok: Tensor
    merge: Merge | None = None
    hidden: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class PruningContext:
    """What a pruning stage sees. `observed` holds what `observe()` asked for, by name; `state` is one dict per batch of sequences."""

    stage: Stage
    units: Sequence[Unit]
    features: Tensor                        # (B, tokens, D) at this boundary
    is_visual: Tensor                       # (B, tokens) bool
    observed: Mapping[str, Tensor]
    state: MutableMapping[str, Any]
    position_ids: Tensor | None = None      # what RoPE was given; never the grid index


@dataclass(frozen=True, kw_only=True)
class TokenPruning(Method):
    """Drops visual tokens behind the encoder or inside the language model."""

    kind: ClassVar[str] = "token_pruning"

    @abstractmethod
    def stages(self, model: ModelInfo) -> list[Stage]:
        """The boundaries at which `keep` is asked, in order."""

    def count(self, units: Sequence[Unit]) -> list[int] | None:
        """Tokens kept of each unit, from shapes alone, for hosts that fix counts before the encoder runs. None: only `keep` knows."""
        return None

    def observe(self) -> frozenset[Observation]:
        """What the host must record for `keep`."""
        return frozenset()

    @abstractmethod
    def keep(self, ctx: PruningContext) -> Keep | None:
        """The tokens that stay at this stage; None keeps all."""


# --- KV compression -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class When:
    """When a cache is compressed: before attention, after prefill, or every `every` decoding steps."""

    moment: Literal["before_attention", "after_prefill", "every_n_steps"]
    every: int | None = None


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that share a budget and are stored together."""

    heads: tuple[int, ...]
    budget: int             # entries kept per head
    label: str = ""         # e.g. "contextual", "structural"


@dataclass(frozen=True)
class CompressionContext:
    """What a cache method sees at one layer. Optional entries are filled where the host has them.

    q: (B, Hq, L, D) of this step or scale; k, v: (B, Hkv, N, D). attention_mass: (B, Hkv, N) fp32, received so far.
    scale_sizes: tokens per scale so far (next-scale models); entry_scale: (B, N) int64, the scale of each cache entry.
    position: (B, N) int64, the logical position of each entry.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    step: int
    position: Tensor
    attention_mass: Tensor | None = None
    scale_sizes: tuple[int, ...] | None = None
    entry_scale: Tensor | None = None
    protected: Tensor | None = None         # (B, N) bool, entries that must stay (text beside visual tokens)
    state: MutableMapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retain:
    """Entries that stay: `cache_index` (B, heads, n) int64 ascending. `attend_index`, where attention may read fewer or more."""

    cache_index: Tensor
    attend_index: Tensor | None = None
    merge: Merge | None = None


@dataclass(frozen=True, kw_only=True)
class KVCompression(Method):
    """Removes entries from the key-value cache, per head."""

    kind: ClassVar[str] = "kv_compression"

    @property
    @abstractmethod
    def when(self) -> When:
        """When `select` is asked."""

    @abstractmethod
    def groups(self, model: ModelInfo, layer: int, n_entries: int) -> list[HeadGroup]:
        """Integer budgets of one layer that holds `n_entries`, every KV head in exactly one group."""

    @abstractmethod
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The entries of this group that stay; as many as its budget."""

    def release(self, layer: int) -> bool:
        """Whether the layer's cache can be freed after the present step (last scale)."""
        return False
