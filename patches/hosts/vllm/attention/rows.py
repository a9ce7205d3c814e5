"""Which requests of a step run sparse in a layer, and why the others stay dense: decided on the host, from lengths alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from accel.kernels.block_sparse import Ragged, Rows
from accel.patches.hosts.vllm.attention.pages import PagePattern
from accel.protocols import AttentionStep, SparseAttention


@dataclass(frozen=True)
class StepRows:
    """The requests of one step. q_start, q_len, kv_len: (R,) int64 on the CPU; requests without queries are padding.

    why_dense: by request, what keeps it from every method, whatever the layer.
    """

    q_start: Tensor
    q_len: Tensor
    kv_len: Tensor
    why_dense: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def several(self) -> tuple[Rows, ...]:
        """Requests with more than one query: prompts, chunks of them, and drafts to be verified."""
        return self._rows(self.q_len > 1)

    @cached_property
    def single(self) -> tuple[Rows, ...]:
        """Requests with one query: those that decode, and last tokens of a prompt in chunks."""
        return self._rows(self.q_len == 1)

    @cached_property
    def single_kv_len(self) -> Tensor:
        """The keys of `single`, (n,) int64."""
        return self.kv_len[self.q_len == 1]

    @property
    def n_single(self) -> int:
        """How many `single` are."""
        return len(self.single_kv_len)

    def _rows(self, mask: Tensor) -> tuple[Rows, ...]:
        index = mask.nonzero()[:, 0]
        columns = (index, self.q_start[index], self.q_len[index], self.kv_len[index])
        return tuple(Rows(*row) for row in zip(*(t.tolist() for t in columns), strict=True))

    def rest(self, taken: tuple[Rows, ...]) -> tuple[int, ...]:
        """The requests with queries that are not among `taken`."""
        is_taken = {rows.index for rows in taken}
        return tuple(i for i, n in enumerate(self.q_len.tolist()) if n and i not in is_taken)


class Decoding(NamedTuple):
    """How a layer decodes. pages: by a shorter block table; reason: densely, and why; neither: like prompts, through our kernels."""

    pages: PagePattern | None = None
    reason: str | None = None


@dataclass(frozen=True)
class LayerRule:
    """What is known of a layer before it runs. n_heads, n_kv_heads: of this rank. reason: why it never runs sparse, whatever the request.

    runs_dense_itself: requests that the method leaves dense go through our dense kernel, not through vLLM's.
    """

    method: SparseAttention
    layer: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    device: str
    dtype: str
    max_positions: int | None
    reason: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    runs_dense_itself: bool = False

    def step(self, q_len: int, kv_len: int, batch: int = 1) -> AttentionStep:
        """The shapes of a call of this layer, with the longest lengths of its requests."""
        return AttentionStep(
            layer=self.layer, n_layers=self.n_layers, batch=batch, q_len=q_len, kv_len=kv_len, n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads, head_dim=self.head_dim, device=self.device, dtype=self.dtype,
        )  # fmt: skip

    def why_dense(self, q_len: int, kv_len: int) -> str | None:
        """Why a request of these lengths runs dense, were it alone in its step; or None."""
        if self.max_positions is not None and kv_len > self.max_positions:
            return f"longer than the model's {self.max_positions} positions"
        return self.method.dense_reason(self.step(q_len, kv_len))


class Split(NamedTuple):
    """What becomes of a step in one layer.

    sparse, dense: requests that our kernels compute, by a plan of the method or with every key. reasons: requests that stay dense, by reason.
    """

    sparse: tuple[Rows, ...]
    dense: tuple[Rows, ...]
    reasons: Counter[str]


def split(rule: LayerRule, step: StepRows) -> Split:
    """The requests of a step by what computes them. Those in neither tuple are vLLM's: dense ones, and those that decode by a shorter table."""
    sparse: list[Rows] = []
    dense: list[Rows] = []
    reasons: Counter[str] = Counter()
    if rule.reason is not None:
        return Split((), (), Counter({rule.reason: len(step.several) + step.n_single}))
    candidates = step.several
    if rule.decoding.reason is not None:
        reasons[rule.decoding.reason] += step.n_single
    elif rule.decoding.pages is None:
        candidates = tuple(sorted((*step.several, *step.single), key=lambda rows: rows.q_start))
    for rows in candidates:
        reason = step.why_dense.get(rows.index)
        takes_all = reason is None and rule.runs_dense_itself
        reason = reason or rule.why_dense(rows.q_len, rows.kv_len)
        if reason is None:
            sparse.append(rows)
            continue
        reasons[reason] += 1
        if takes_all:
            dense.append(rows)
    return Split(tuple(sparse), tuple(dense), +reasons)


def count_decoding(rule: LayerRule, step: StepRows) -> tuple[int, Tensor | None, Counter[str]]:
    """Requests that decode by a shorter table in this layer: their number, their tiles (2,) int64, and those that keep the table, by reason."""
    pages = rule.decoding.pages
    if rule.reason is not None or pages is None or not step.n_single:
        return 0, None, Counter()
    kv_len = step.single_kv_len
    follows = pages.shortens(kv_len)
    sparse = kv_len[follows]
    reasons: Counter[str] = Counter()
    for length, n in Counter(kv_len[~follows].tolist()).items():
        reasons[rule.why_dense(1, length) or "decode"] += n
    if not len(sparse):
        return 0, None, reasons
    n = len(sparse)
    lens = Ragged(sparse.new_zeros(n), sparse.new_ones(n), sparse, max_q=1, max_kv=int(sparse.max()))
    return n, pages.plan.tile_counts(lens, rule.n_heads), reasons


def decoding_of(rule: LayerRule, *, longest: int, page_size: int, has_graphs: bool) -> Decoding:
    """How a layer decodes, from what its method answers for every length up to `longest`.

    A static pattern in blocks of whole pages shortens the block table. Another method runs through our kernels where the forward pass is
    called for every step; where decoding is replayed from a graph (`has_graphs`) it stays dense.
    """
    first = _first_sparse(rule, longest)
    if isinstance(first, str):
        return Decoding(reason=first)
    plan = rule.method.static_pattern(rule.step(1, longest))
    if plan is not None and plan == rule.method.static_pattern(rule.step(1, first)):
        pages = PagePattern.of(plan, page_size, first=first, last=rule.max_positions)
        if isinstance(pages, PagePattern):
            return Decoding(pages=pages)
        why = pages
    else:
        why = "decoding follows no static pattern"
    return Decoding(reason=f"{why}, and decoding is replayed from a graph") if has_graphs else Decoding()


def _first_sparse(rule: LayerRule, longest: int) -> int | str:
    """The length from which on decoding is sparse, or why there is none up to `longest`."""
    longest = min(longest, rule.max_positions or longest)
    reason = rule.why_dense(1, longest)
    if reason is not None:
        return reason
    low, high = 0, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rule.why_dense(1, middle) is None else (middle, high)
    probes = {1, *(2**m for m in range(longest.bit_length())), high - 1} - {0}
    if any((rule.why_dense(1, n) is None) != (n >= high) for n in probes):
        return "no single length from which decoding is sparse"
    return high
