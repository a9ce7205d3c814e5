"""The three protocols between methods and hosts (design.md §3), and what is handed over. Neither side knows the other by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
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
    has_cls: bool = False                   # the vision encoder has a [CLS] token at the layer that scores
    has_multimodal_rope: bool = False       # positions have several axes, so they cannot be made compact
    hidden_size: int | None = None
    scale_shapes: tuple[tuple[int, int], ...] | None = None     # height and width of every scale; next-scale models only
    fingerprint: Callable[[], str] | None = None    # identifies the weights; for calibration files made for one model


@dataclass(frozen=True)
class Uniform:
    """A number to be tuned, between `low` and `high`.

    floor: raises `low` where options depend on each other: floor(all options of the method, those to be searched before this one as they
    were chosen) → the lowest value that makes sense beside them. Searches stretch what is left over the whole range, so that no trial is lost.
    """

    low: float
    high: float
    is_log: bool = False
    is_integer: bool = False
    floor: Callable[[Mapping[str, Any]], float] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Choice:
    """One of several values to be tuned."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Objective:
    """What `accel tune` optimises: `score(method, model, data)` → the value, larger is better unless `minimize`.

    prepare: `prepare(loaded, data, seed)` → what `score` is given as `data`, made once per search from an `accel.evals.models.LoadedModel` and what
    the user named as data; its `str` tells different data apart. None: `score` is given what the user named.
    """

    name: str
    score: Callable[[Method, Any, Any], float]
    minimize: bool = False
    prepare: Callable[[Any, Any, int], Any] | None = None


@dataclass(frozen=True)
class Calibration:
    """What `accel tune` makes for a method beyond its options, from data: trained routers, profiles.

    name: what is made, in a word. about: one line for people: what it reads and how long it takes.
    run: `run(loaded, data, folder, fixed=…, seed=…, show_progress=…)` → the method with what was made, whose files it has left in `folder`, a
    recipe among them. loaded: an `accel.evals.models.LoadedModel`; data: what the user named; fixed: the options given with the method's name.
    The same call after a kill goes on.
    """

    name: str
    about: str
    run: Callable[..., Method]


@dataclass(frozen=True)
class HeadNumbers:
    """A number that a method has of every attention head, for reports.

    title, caption: for people. values: by layer and head. kinds: a word per layer and head where the method tells kinds apart. is_log: whether
    ratios of these numbers mean something, not differences.
    """

    title: str
    caption: str
    values: tuple[tuple[float, ...], ...]
    kinds: tuple[tuple[str, ...], ...] | None = None
    is_log: bool = False


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
        """Every option with its value, ready for a recipe. What `bind` loaded (fields with `init=False`) is no option."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and getattr(self, f.name) != f.default}

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

    def head_numbers(self, model: ModelInfo) -> Sequence[HeadNumbers]:
        """What the bound method knows of the model's heads and a report should show; nothing for most."""
        return ()

    @classmethod
    def search_space(cls) -> Mapping[str, Uniform | Choice]:
        """The options worth tuning. Empty: nothing to tune."""
        return {}

    @classmethod
    def objectives(cls) -> Mapping[str, Objective]:
        """What `accel tune` may optimise for this method, beyond accuracy and latency."""
        return {}

    @classmethod
    def calibration(cls) -> Calibration | None:
        """What `accel tune` makes for this method beyond its options; None where it needs nothing of the kind."""
        return None


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

    min_seq_len: dense below this many keys. None means the measured crossover of these options (`accel tune crossover`), or else a cautious default.
    dense_layers: layer indices kept dense.
    dense_kernel: what runs the calls left dense: the model's own attention, or, on a CPU, ours.
    precision: "accurate" computes scores in fp32; "fast" computes bf16 scores in bf16 on a CPU (as eager attention does).
    """

    kind: ClassVar[str] = "sparse_attention"
    trainable: ClassVar[bool] = False               # whether gradients flow through the attention it plans
    # options that say which calls run sparse, not what such a call costs: a measured crossover holds for all their values
    reach_options: ClassVar[frozenset[str]] = frozenset({"min_seq_len", "dense_layers", "dense_kernel"})

    min_seq_len: int | None = None
    dense_layers: tuple[int, ...] = ()
    dense_kernel: Literal["original", "accel"] = "original"
    precision: Literal["accurate", "fast"] = "accurate"

    def __post_init__(self) -> None:
        name = self.method_name()
        layers = self.dense_layers
        if not isinstance(layers, list | tuple) or not all(_is_whole(layer) and layer >= 0 for layer in layers):
            raise OptionError(f"{name}: dense_layers must be a list of layer indices from 0 on, got {layers!r}")
        object.__setattr__(self, "dense_layers", tuple(layers))
        if self.min_seq_len is not None and not (_is_whole(self.min_seq_len) and self.min_seq_len >= 0):
            raise OptionError(f"{name}: min_seq_len must be None or a whole number of tokens, 0 or more, got {self.min_seq_len!r}")
        for option, allowed in (("dense_kernel", ("original", "accel")), ("precision", ("accurate", "fast"))):
            if getattr(self, option) not in allowed:
                raise OptionError(f"{name}: {option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}")

    @property
    def min_useful_len(self) -> int:
        """Keys below which the method's own pattern is dense anyway."""
        return 0

    def dense_reason(self, step: AttentionStep) -> str | None:
        """Why this call runs dense, or None. Shapes and options only, so that the answer is the same while a graph is traced."""
        if step.layer in self.dense_layers:
            return "dense layer"
        if step.phase == "decode":
            return "decode"
        return self.why_short(step)

    def why_always_dense(self, model: ModelInfo, tokens: int) -> str | None:
        """Why a prompt of so many tokens runs dense in every layer, or None."""
        steps = [
            AttentionStep(i, model.n_layers, 1, tokens, tokens, model.n_heads, model.n_kv_heads, model.head_dim, model.device, model.dtype)
            for i in range(model.n_layers)
        ]
        reasons = [self.dense_reason(step) for step in steps]
        # layers that are always dense say nothing about the others
        return None if None in reasons else max((r for r in reasons if r is not None), key=lambda r: r != "dense layer", default=None)

    def why_short(self, step: AttentionStep) -> str | None:
        """Why a call with so few keys runs dense, or None."""
        shortest = max(self.pays_from(step), self.min_useful_len)
        return f"shorter than {shortest} tokens" if step.kv_len < shortest else None

    def pays_from(self, step: AttentionStep) -> int:
        """Keys from which the method is to run: `min_seq_len`, or the measured crossover."""
        from accel.crossover import crossover_tokens

        return crossover_tokens(self, step) if self.min_seq_len is None else self.min_seq_len

    @abstractmethod
    def plan(self, q: Tensor, keys: KeyView, ctx: AttentionContext) -> BlockPlan | RunDense:
        """Key blocks for every query block of this call.

        q: (tokens, Hq, D) view, the rows of sequence b given by `ctx.lens`; keys: the same sequences, cached prefix included.
        """

    def static_pattern(self, step: AttentionStep) -> BlockPlan | None:
        """The plan where it depends on neither q nor k: planned once per step, before any graph replays. None: ask `plan`."""
        return None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- token pruning ------------------------------------------------------------------------------------------------------------

Boundary = Literal["encoder", "projector", "layer"]


@dataclass(frozen=True)
class Stage:
    """A place at which a pruning method is asked: behind the encoder, behind the projector, or before decoder layer `layer`.

    needs_learned_choice: the count is known only at run time, so hosts that fix counts refuse.
    is_known_ahead: `select` reads what was observed in the encoder and earlier scores, no hidden states: hosts may ask before the language model
    runs, and then hand over features of width 0. Stages in front of the language model always are.
    """

    boundary: Boundary
    layer: int | None = None
    needs_learned_choice: bool = False
    is_known_ahead: bool = False


@dataclass(frozen=True)
class Unit:
    """One image, tile or frame of one sequence: its tokens and their grid.

    n_tokens: patch tokens, height · width · frames. n_structural: tokens of the same span that carry no patch (row-end newlines, the CLS
    row of a frame); they are counted apart and never ranked. picture: number of the image or video in its sequence that the unit is part of.
    """

    sequence: int
    n_tokens: int
    height: int
    width: int
    frames: int = 1
    modality: Literal["image", "video"] = "image"
    n_structural: int = 0
    picture: int = 0


@dataclass(frozen=True)
class Observation:
    """What a host records while the model runs, handed over in `PruningContext.observed` under `what`.

    From the vision encoder, with U units and n the most patch tokens of one (zeros behind shorter ones), (U, n) fp32; maps of patches are
    pooled to tokens as the features are:
    cls_row, mean_received: the attention of the [CLS] query, or the mean over the patches of a segment (tile, image or frame).
    mean_selected_rows: the mean over the rows that `TokenPruning.select_rows` picks.
    pixel_map: what `TokenPruning.map_pixels` makes of the patches' pixels.
    From the language model: last_row, (B, tokens) fp32, the attention of the newest token in decoder layer `layer`; for stages behind it.
    layer: the layer that scores; None for the encoder layer whose output is the feature. head_reduce: how heads are joined.
    max_queries: upper bound of the rows that a mean is taken over; evenly spread.
    pixel_mean, pixel_std: of the processor's normalisation, one number or one per colour; None for that of the family's released processors.
    """

    what: Literal["cls_row", "mean_received", "mean_selected_rows", "pixel_map", "last_row"]
    layer: int | None = None
    head_reduce: Literal["mean", "max"] = "mean"
    max_queries: int | None = None
    pixel_mean: float | tuple[float, ...] | None = None
    pixel_std: float | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Merge:
    """Recycled rows. The row at `anchor` becomes Σ weight · row[source] over all entries that name it, and keeps its index and score.

    An anchor's old value counts only where it is among its own sources. Leading dimensions are those of the index beside it: (B, m) for
    tokens, (B, heads, m) for cache entries. Anchors are kept entries; sources are counted before anything is dropped.
    """

    anchor: Tensor          # (..., m) int64
    source: Tensor          # (..., m) int64
    weight: Tensor          # (..., m) fp32; 0 pads


@dataclass(frozen=True)
class Keep:
    """Answer of a pruning stage: the tokens that stay.

    index: (B, n) int64 ascending, places in `PruningContext.features` of the visual and structural tokens that stay; text stays without
    being listed. ok: (B, n) bool, False pads rows that keep fewer.
    hidden: (B, tokens) bool, columns masked from every other token though not dropped (ragged exits), in this and all later layers.
    scores: (B, n) fp32; the host hands those of the survivors to the next stage.
    """

    index: Tensor
    ok: Tensor
    merge: Merge | None = None
    hidden: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class PruningContext:
    """What a pruning stage sees, once per prompt; decoding steps are never asked. B sequences, padding is in none of the three masks.

    features: the hidden states before a decoder layer; in front of the language model the visual features of each sequence, without its text.
    unit: the `units` entry of each token. place: (map, row, column); maps are numbered per sequence, so that an overview tile and the
    mosaic of local tiles of one image are two maps, and frames are maps of their own. Both −1 for text and padding; −1 in column for
    structural tokens that end no row.
    observed: of the units, in the order of their patch tokens in the prompt, whatever earlier stages dropped.
    state: one dict per batch of sequences, from the encoder to the last layer of one prompt; tensors in it have the sequences first.
    """

    stage: Stage
    units: Sequence[Unit]
    features: Tensor                        # (B, tokens, D) at this boundary
    is_visual: Tensor                       # (B, tokens) bool, patch tokens
    is_structural: Tensor                   # (B, tokens) bool
    is_text: Tensor                         # (B, tokens) bool
    unit: Tensor                            # (B, tokens) int64
    place: Tensor                           # (B, tokens, 3) int64
    observed: Mapping[str, Tensor]          # by `Observation.what`
    state: MutableMapping[str, Any]
    scores: Tensor | None = None            # (B, tokens) fp32, from the last stage that gave any
    position_ids: Tensor | None = None      # what RoPE was given; never the grid index


@dataclass(frozen=True, kw_only=True)
class TokenPruning(Method):
    """Drops visual tokens behind the encoder or inside the language model.

    position_mode: "keep" leaves each surviving token the position it has in the whole prompt; "compact" numbers the survivors of the stages in
    front of the language model without gaps, as the published FasterVLM and VisPruner code does.
    """

    kind: ClassVar[str] = "token_pruning"

    position_mode: Literal["keep", "compact"] = "keep"

    def __post_init__(self) -> None:
        if self.position_mode not in ("keep", "compact"):
            raise OptionError(f"{self.method_name()}: position_mode must be one of keep, compact, got {self.position_mode!r}")

    @abstractmethod
    def stages(self, model: ModelInfo) -> list[Stage]:
        """The boundaries at which `select` is asked, in order; empty where the options keep everything, and hosts then change nothing."""

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Tokens of each unit left after `stage`, structural ones included, from shapes alone: for hosts that fix counts before anything runs.

        `units` are those of the prompt, whatever earlier stages dropped. None: only `select` knows.
        """
        return None

    def picture_count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Like `count`, of each image or video in order: known also where its tiles or frames compete, as long as pictures do not."""
        counts = self.count(stage, units)
        if counts is None:
            return None
        found: dict[tuple[Any, ...], int] = {}
        for unit, n in zip(units, counts, strict=True):
            picture = (unit.sequence, unit.modality, unit.picture)
            found[picture] = found.get(picture, 0) + n
        return list(found.values())

    def observe(self) -> Sequence[Observation]:
        """What the host must record for `select`."""
        return ()

    def select_rows(self, mean_received: Tensor) -> Tensor:
        """The rows whose mean becomes `mean_selected_rows`: (segments, P) fp32 -> (segments, P) bool, at least one row per segment."""
        raise NotImplementedError(f"{self.method_name()} observes mean_selected_rows without saying which rows")

    def map_pixels(self, pixels: Tensor) -> Tensor:
        """`pixel_map` of one segment: (P, pixels of a patch) uint8, grey as before normalisation -> (P,) fp32."""
        raise NotImplementedError(f"{self.method_name()} observes pixel_map without saying what it makes of the pixels")

    @abstractmethod
    def select(self, ctx: PruningContext) -> Keep | None:
        """The tokens that stay at this stage; None keeps all."""

    @classmethod
    def objectives(cls) -> Mapping[str, Objective]:
        """How much of what the last token of a prompt knows survives (visual-token-pruning.md §4.7); it needs no answers."""
        from accel.evals.pictures.information_flow import OBJECTIVE

        return {OBJECTIVE.name: OBJECTIVE}


# --- KV compression -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class When:
    """When a cache is compressed: before attention, after prefill, or every `every` decoding steps.

    Hosts that can ask before attention, those of next-scale models, do only that where a method lists it among others.
    """

    moment: Literal["before_attention", "after_prefill", "every_n_steps"]
    every: int | None = None


# the budget of heads that keep everything, however long a sequence becomes
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that share a budget and are stored together."""

    heads: tuple[int, ...]
    budget: int             # entries kept per head
    label: str = ""         # e.g. "contextual", "structural"


@dataclass(frozen=True)
class CacheNeeds:
    """What a host keeps for `select` beside the cache itself.

    n_queries: how many of the newest queries `CompressionContext.q` holds of a decoder, which keeps them from step to step until entries are
        dropped; fewer where fewer have come since. 0: those of this pass.
    every_step: whether `observe` is called at the steps that leave nothing to select.
    """

    n_queries: int = 0
    attention_mass: bool = False
    every_step: bool = False


@dataclass(frozen=True)
class CompressionContext:
    """What a cache method sees of one head group at one layer. Optional entries are filled where the host has them.

    Tensors hold the H heads of the group in its order, because groups keep different numbers of entries; N entries, G query heads per head.
    q: (B, H·G, L, D), those of this scale, or a decoder's newest, as many as `CacheNeeds.n_queries` asks for; q_position: (B, L) int64. k, v:
    (B, H, N, D), of which the newest are this step's. A query sees the entries up to its own position, in a next-scale model all.
    position: (B, H, N) int64, the logical position of each entry; heads differ after the first eviction.
    valid: (B, H, N) bool, False for padding.
    scale_shapes: height and width of every scale of a next-scale model; `step` counts scales there, decoding steps elsewhere.
    state: one dict per (sequence batch, layer), repeated and reordered with the cache; shared by the groups of the layer.
    shared: one dict per sequence batch for all layers, for plain values: what `groups` may read of other layers and earlier steps.
    """

    layer: int
    step: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float                            # the layer's own softmax scale
    position: Tensor
    valid: Tensor
    q_position: Tensor
    softcap: float | None = None
    attention_mass: Tensor | None = None    # (B, H, N) fp32, received so far
    scale_shapes: tuple[tuple[int, int], ...] | None = None
    entry_scale: Tensor | None = None       # (B, H, N) int64, the scale of each entry
    protected: Tensor | None = None         # (B, N_prompt) bool by position: text beside visual tokens, marked prefixes
    has_guidance_pairs: bool = False        # rows b and b + B/2 are the conditional and the unconditional half of one image
    state: MutableMapping[str, Any] = field(default_factory=dict)
    shared: MutableMapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retain:
    """Entries that stay: `cache_index` (B, H, n) int64 ascending, places among the N entries.

    ok: (B, H, n) bool, False pads sequences that have fewer. attend_index: (B, H, m), what this step's attention reads where that is not
    what stays. renorm_keys: whether merged keys are brought back to unit length.
    """

    cache_index: Tensor
    ok: Tensor | None = None
    attend_index: Tensor | None = None
    merge: Merge | None = None
    renorm_keys: bool = False


@dataclass(frozen=True, kw_only=True)
class KVCompression(Method):
    """Removes entries from the key-value cache, per head."""

    kind: ClassVar[str] = "kv_compression"

    @property
    @abstractmethod
    def when(self) -> tuple[When, ...]:
        """The moments at which `select` is asked."""

    def needs(self) -> CacheNeeds:
        """What the host must record for `select`."""
        return CacheNeeds()

    @abstractmethod
    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        """Integer budgets of one layer that holds `n_entries` tokens of the prompt or the scales so far, every KV head in exactly one group.

        shared: `CompressionContext.shared` as it is before this layer's step; None where nothing has run, and hosts want to know what to expect.
        The heads of the groups never change during a request, the budgets may.
        """

    @abstractmethod
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The entries of this group that stay; as many as its budget. Asked only where there are more."""

    def observe(self, ctx: CompressionContext, group: HeadGroup) -> None:
        """Looks at a group that fits its budget, where `CacheNeeds.every_step` asks for it; `select` sees the others."""

    def release(self, model: ModelInfo, layer: int, *, step: int) -> bool:
        """Whether the layer's cache can be freed after this step (last scale)."""
        return False
