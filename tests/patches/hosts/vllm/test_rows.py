"""Which requests of a step run sparse: as the method answers for each of them alone, and with every reason counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import accel
from accel.kernels.block_sparse import BlockPlan, ImplicitPlan
from accel.patches.hosts.vllm.attention.eligible import note_never_sparse
from accel.patches.hosts.vllm.attention.pages import PagePattern
from accel.patches.hosts.vllm.attention.rows import Decoding, LayerRule, StepRows, count_decoding, decoding_of, split
from accel.protocols import AttentionContext, AttentionStep, RunDense, SparseAttention

POWER = accel.PowerAttention(block_size=16, window_blocks=2, is_adapted=True, min_seq_len=0)
FLEX = accel.FlexPrefill(block_size=16, min_budget=32, min_seq_len=0)
# the shortest sequence with a hidden key
FIRST = POWER.min_useful_len


def rule(method: SparseAttention, **changes: object) -> LayerRule:
    plain = LayerRule(method, 1, 4, n_heads=4, n_kv_heads=2, head_dim=32, device="cpu", dtype="float32", max_positions=4096)
    return replace(plain, **changes)


def step(*lengths: tuple[int, int], why: dict[int, str] | None = None) -> StepRows:
    """Requests of (queries, keys), one behind the other."""
    q_len, kv_len = (torch.tensor(side) for side in zip(*lengths, strict=True))
    return StepRows(q_len.cumsum(0) - q_len, q_len, kv_len, why or {})


def indices(rows: tuple[object, ...]) -> list[int]:
    return [r.index for r in rows]      # type: ignore[attr-defined]


def test_each_request_is_judged_alone() -> None:
    # a decoding request, a long prompt, padding, a short prompt, a chunk with too few queries for the method
    found = split(rule(FLEX, decoding=Decoding(reason="decode")), step((1, 300), (200, 200), (0, 0), (20, 20), (31, 500)))
    assert indices(found.sparse) == [1]
    assert found.dense == ()
    assert found.reasons == Counter({"decode": 1, "shorter than 33 tokens": 1, "fewer than 32 queries": 1})


def test_a_request_starts_where_its_queries_are() -> None:
    [rows] = split(rule(FLEX), step((1, 300), (0, 0), (200, 260))).sparse
    assert (rows.index, rows.q_start, rows.q_len, rows.kv_len) == (2, 1, 200, 260)


def test_a_reason_of_the_layer_or_the_request_goes_first() -> None:
    both = step((200, 200), (1, 300), (200, 200), why={2: "bidirectional spans"})
    assert split(rule(POWER, reason="soft cap"), both) == ((), (), Counter({"soft cap": 3}))
    found = split(rule(POWER), both)
    assert indices(found.sparse) == [0, 1]
    assert found.reasons == Counter({"bidirectional spans": 1})


def test_past_the_models_positions_nothing_is_sparse() -> None:
    assert rule(POWER, max_positions=250).why_dense(200, 251) == "longer than the model's 250 positions"
    assert rule(POWER, max_positions=250).why_dense(200, 250) is None


def test_what_the_method_leaves_dense_can_run_through_our_kernels() -> None:
    mixed = step((200, 200), (20, 20), (200, 200), why={2: "not ours"})
    found = split(rule(POWER, runs_dense_itself=True), mixed)
    assert (indices(found.sparse), indices(found.dense)) == ([0], [1])
    assert found.reasons == Counter({f"shorter than {FIRST} tokens": 1, "not ours": 1})


def test_the_rest_is_all_that_is_not_taken_and_no_padding() -> None:
    found = step((1, 9), (200, 200), (0, 0), (3, 30))
    assert found.rest(split(rule(FLEX), found).sparse) == (0, 3)


def test_a_static_pattern_decodes_by_pages_from_its_first_hidden_key_on() -> None:
    found = decoding_of(rule(POWER), longest=4096, page_size=16, has_graphs=True)
    plan = POWER.static_pattern(rule(POWER).step(1, 1))
    assert found == Decoding(pages=PagePattern(plan, 16, first=FIRST, last=4096))
    longer = replace(POWER, min_seq_len=777)
    pages = decoding_of(rule(longer), longest=4096, page_size=16, has_graphs=True).pages
    assert pages is not None
    assert pages.first == 777


@pytest.mark.parametrize(
    ("method", "longest", "reason"),
    [
        (FLEX, 4096, "decode"),
        (accel.Dense(), 4096, "dense control"),
        (replace(POWER, dense_layers=(1,)), 4096, "dense layer"),
        (replace(POWER, is_adapted=False, full_layers="none"), 4096, "decode"),
        (POWER, FIRST - 1, f"shorter than {FIRST} tokens"),
    ],
    ids=["prefill only", "control", "dense layer", "not adapted", "short engine"],
)
def test_a_layer_that_never_decodes_sparsely_says_why(method: SparseAttention, longest: int, reason: str) -> None:
    assert decoding_of(rule(method), longest=longest, page_size=16, has_graphs=True) == Decoding(reason=reason)


def test_pages_that_do_not_fit_are_read_by_our_kernel_unless_a_graph_replays() -> None:
    assert decoding_of(rule(POWER), longest=4096, page_size=32, has_graphs=False) == Decoding()
    found = decoding_of(rule(POWER), longest=4096, page_size=32, has_graphs=True)
    assert found.reason == "blocks of 16 tokens are not whole pages of 32, and decoding is replayed from a graph"


@dataclass(frozen=True, kw_only=True)
class Odd(SparseAttention):
    """Decodes sparsely between 100 and 200 keys, by a pattern that follows the length where `follows` says so."""

    follows: bool = False
    last: int = 200

    def dense_reason(self, step: AttentionStep) -> str | None:
        return None if 100 <= step.kv_len < self.last else "odd"

    def static_pattern(self, step: AttentionStep) -> ImplicitPlan:
        return ImplicitPlan(16, 1 + step.kv_len // 64 if self.follows else 1)

    def plan(self, q: object, keys: object, ctx: AttentionContext) -> BlockPlan | RunDense:
        raise NotImplementedError


def test_a_method_without_one_threshold_is_not_compacted() -> None:
    assert decoding_of(rule(Odd()), longest=150, page_size=16, has_graphs=True).pages is not None
    # at 180 keys still sparse, at 128 no longer: no length divides the two
    @dataclass(frozen=True, kw_only=True)
    class Gap(Odd):
        def dense_reason(self, step: AttentionStep) -> str | None:
            return "gap" if step.kv_len == 128 else super().dense_reason(step)

    found = decoding_of(rule(Gap()), longest=180, page_size=16, has_graphs=True)
    assert found == Decoding(reason="no single length from which decoding is sparse")


def test_a_pattern_that_follows_the_length_is_not_compacted() -> None:
    found = decoding_of(rule(Odd(follows=True)), longest=199, page_size=16, has_graphs=True)
    assert found.reason == "decoding follows no static pattern, and decoding is replayed from a graph"


def test_decoding_counts_tiles_as_each_request_alone_would() -> None:
    layer = rule(POWER)
    layer = replace(layer, decoding=decoding_of(layer, longest=4096, page_size=16, has_graphs=True))
    mixed = step((1, 300), (200, 200), (1, 40), (1, 41), (1, 500), (0, 0))
    n, tiles, reasons = count_decoding(layer, mixed)
    plan = POWER.static_pattern(layer.step(1, 1))
    alone = [len(plan.row_blocks((kv - 1) // 16)) for kv in (300, 500)]
    assert n == 2
    assert tiles is not None
    assert tiles.tolist() == [4 * sum(alone), 4 * (19 + 32)]
    assert reasons == Counter({f"shorter than {FIRST} tokens": 2})
    # the prompt is counted where it is computed
    assert split(layer, mixed).reasons == Counter()
    assert count_decoding(replace(layer, reason="soft cap"), mixed) == (0, None, Counter())


@pytest.mark.parametrize(
    ("method", "longest", "is_told"),
    [(FLEX, 4096, False), (FLEX, 32, True), (replace(FLEX, min_seq_len=4096), 2048, True), (POWER, FIRST, False), (accel.Dense(), 4096, True)],
    ids=["sparse", "shorter than its own pattern", "below min_seq_len", "just long enough", "never"],
)
def test_an_engine_in_which_no_request_can_run_sparse_says_so(method: SparseAttention, longest: int, is_told: bool) -> None:
    engine = SimpleNamespace(notices=set())
    note_never_sparse(engine, [rule(method)], longest)
    assert [f"{longest} tokens, stays dense" in notice for notice in engine.notices] == [True] * is_told
    note_never_sparse(engine, [], longest)
    assert len(engine.notices) == is_told
