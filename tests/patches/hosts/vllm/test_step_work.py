"""A whole step, divided and computed on permuted pages: every request gets what it would get alone, whoever computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, ImplicitPlan, PagedKeys, Ragged, Rows
from accel.kernels.block_sparse.naive import naive_attention
from accel.patches.hosts.vllm.attention.group import Group
from accel.patches.hosts.vllm.attention.layer import RowBatch, SparseLayer
from accel.patches.hosts.vllm.attention.rows import Decoding, LayerRule, decoding_of
from accel.protocols import AttentionContext, RunDense, SparseAttention
from accel.stats import Stats

PAGE, HQ, HKV, D = 16, 4, 2, 32
POWER = accel.PowerAttention(block_size=16, window_blocks=2, is_adapted=True, min_seq_len=0, dense_layers=(1,))
FLEX = accel.FlexPrefill(block_size=16, min_budget=32, gamma=0.6, tau=0.2, min_seq_len=0)
# queries and keys: decoding beside a prompt, a chunk behind a prefix, a short prompt, padding, and decoding below the first hidden key
MIXED = [(1, 170), (90, 90), (40, 200), (5, 5), (0, 0), (1, 30)]


@dataclass
class Common:
    """vLLM's `CommonAttentionMetadata`, as far as it is read."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    causal: Any = True
    positions: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    req_idx: Any = None
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None
    _num_computed_tokens_cache: Tensor | None = None
    _token_to_req_indices_cache: Tensor | None = None

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


@dataclass
class Step:
    """A random step on pages in any order, NaN in all places that hold no key."""

    lengths: Sequence[tuple[int, int]]
    q: Tensor = field(init=False)
    pages: tuple[Tensor, Tensor] = field(init=False)
    common: Common = field(init=False)
    calls: list[Common] = field(default_factory=list)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        q_len, kv_len = (torch.tensor(side) for side in zip(*self.lengths, strict=True))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), q_len.cumsum(0)]).to(torch.int32)
        width = 16
        order = torch.randperm(len(self.lengths) * width, generator=g).view(-1, width).to(torch.int32)
        self.q = torch.randn(int(starts[-1]), HQ, D, generator=g)
        sides = [torch.full((order.numel(), PAGE, HKV, D), torch.nan) for _ in range(2)]
        for side in sides:
            for row, n in enumerate(kv_len.tolist()):
                for at in range(n):
                    side[order[row, at // PAGE], at % PAGE] = torch.randn(HKV, D, generator=g)
        self.pages = sides[0], sides[1]
        self.common = Common(
            starts, starts.clone(), kv_len.to(torch.int32), len(self.lengths), int(starts[-1]), int(q_len.max()), int(kv_len.max()),
            order, is_prefilling=q_len > 1, seq_lens_cpu_upper_bound=kv_len.to(torch.int32),
        )  # fmt: skip

    def stock(self, q: Tensor, common: Common, out: Tensor) -> None:
        """vLLM's attention: dense, over what the table and the lengths of the metadata name."""
        self.calls.append(common)
        lens = Ragged.of(common.query_start_loc.diff().tolist(), common.seq_lens.tolist())
        keys = PagedKeys(*self.pages, common.block_table_tensor, lens.kv_len)
        result, _ = naive_attention(q[: common.num_actual_tokens], keys, ImplicitPlan.dense(16), lens, scale=D**-0.5, softcap=None)
        out[: common.num_actual_tokens] = result

    def run(self, *layers: SparseLayer, counts: bool = True, **options: Any) -> list[Tensor]:
        """The output of every layer, in memory full of NaN."""
        group = Group(layers, torch.device("cpu"), most_rows=len(self.lengths), **options)
        whole = self.common
        work = group.work(self.common, whole, lambda key, common: common, counts=counts)
        outputs = []
        for layer in layers:
            out = torch.full_like(self.q, torch.nan)
            mine = work.get(layer.rule.layer)
            if mine is None:
                self.stock(self.q, whole, out)
            else:
                layer.attend(self.q, lambda table, lens: PagedKeys(*self.pages, table, lens), mine, out, stock=self.stock)
            outputs.append(out)
        return outputs

    def alone(self, method: SparseAttention, layer: int, *, decodes: bool = True) -> Tensor:
        """What each request gets alone, from contiguous keys."""
        out = torch.full_like(self.q, torch.nan)
        for row, (n, kv) in enumerate(self.lengths):
            if not n:
                continue
            here = slice(int(self.common.query_start_loc[row]), int(self.common.query_start_loc[row]) + n)
            paged = PagedKeys(*self.pages, self.common.block_table_tensor[row : row + 1], torch.tensor([kv]))
            k, v = (t.transpose(0, 1).contiguous() for t in paged.tokens(0))
            keys, lens = ContiguousKeys(k, v, torch.tensor([0]), torch.tensor([kv])), Ragged.of([n], [kv])
            shape = rule(method, layer).step(n, kv)
            plan: BlockPlan | RunDense = ImplicitPlan.dense(16)
            if method.dense_reason(shape) is None and (n > 1 or decodes):
                plan = method.plan(self.q[here], keys, AttentionContext(step=shape, lens=lens, scale=D**-0.5))
            assert isinstance(plan, BlockPlan)
            out[here], _ = naive_attention(self.q[here], keys, plan, lens, scale=D**-0.5, softcap=None)
        return out


def rule(method: SparseAttention, layer: int, **changes: Any) -> LayerRule:
    plain = LayerRule(method, layer, 4, n_heads=HQ, n_kv_heads=HKV, head_dim=D, device="cpu", dtype="float32", max_positions=None)
    return replace(plain, **changes)


def sparse_layer(method: SparseAttention, layer: int, stats: Stats, *, page_size: int = PAGE, **changes: Any) -> SparseLayer:
    found = rule(method, layer, **changes)
    if "decoding" not in changes and found.reason is None:
        found = replace(found, decoding=decoding_of(found, longest=256, page_size=page_size, has_graphs=False))
    return SparseLayer(found, D**-0.5, stats)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def order(lengths: Sequence[tuple[int, int]], name: str) -> list[tuple[int, int]]:
    """The requests as vLLM may sort them: decoding first, or in any order, which leaves gaps between those of one kind."""
    return sorted(lengths, key=lambda pair: pair[0] != 1) if name == "decoding first" else list(lengths)


@pytest.mark.parametrize("sorting", ["decoding first", "as they come"])
@pytest.mark.parametrize("method", [POWER, FLEX, accel.RandomBlocks(block_size=16, density=0.5, min_seq_len=0)], ids=lambda m: m.method_name())
def test_every_request_gets_what_it_gets_alone(method: SparseAttention, sorting: str) -> None:
    stats, step = Stats(), Step(order(MIXED, sorting))
    layers = [sparse_layer(method, i, stats) for i in (0, 1)]
    for layer, out in zip(layers, step.run(*layers), strict=True):
        assert_same(out, step.alone(method, layer.rule.layer))
    assert stats.layers[0].sparse_calls
    assert sum(stats.layers[0].dense_calls.values()) + stats.layers[0].sparse_calls == 5


def test_dense_layers_keep_whole_tables_beside_shortened_ones() -> None:
    stats, step = Stats(), Step([(1, 170), (1, 200), (1, 30)])
    layers = [sparse_layer(POWER, i, stats) for i in (0, 1, 2)]
    outputs = step.run(*layers)
    for layer, out in zip(layers, outputs, strict=True):
        assert_same(out, step.alone(POWER, layer.rule.layer))
    assert not torch.equal(outputs[0], outputs[1])
    # one shorter set serves both layers, and the dense one has the step's own
    assert step.calls[0] is step.calls[2]
    assert step.calls[1] is step.common
    assert step.calls[0].seq_lens.tolist() < [170, 200, 30]
    assert step.calls[0].max_seq_len < 200
    assert stats.layers[1].dense_calls == Counter({"dense layer": 3})
    assert (stats.layers[0].sparse_calls, stats.layers[0].dense_calls) == (2, Counter({f"shorter than {POWER.min_useful_len} tokens": 1}))


def test_vllm_computes_only_what_stays_dense() -> None:
    step = Step(MIXED)
    step.run(sparse_layer(FLEX, 0, Stats()))
    [rest] = step.calls
    # of 137 tokens those of the two decoding requests and of the short prompt
    assert rest.num_actual_tokens == 7
    assert rest.seq_lens.tolist() == [170, 5, 30]
    assert (rest.num_reqs, rest.max_query_len, rest.max_seq_len) == (3, 5, 170)
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 1, 6, 7]
    assert rest.is_prefilling is not None
    assert rest.is_prefilling.tolist() == [False, True, False]


def test_a_step_of_sparse_prompts_leaves_vllm_nothing() -> None:
    step = Step([(90, 90), (40, 200)])
    [out] = step.run(sparse_layer(FLEX, 0, Stats()))
    assert step.calls == []
    assert_same(out, step.alone(FLEX, 0))


def test_pages_that_do_not_fit_the_pattern_go_through_our_kernel() -> None:
    stats, step = Stats(), Step(MIXED)
    [out] = step.run(sparse_layer(POWER, 0, stats, page_size=64))
    assert_same(out, step.alone(POWER, 0))
    assert [call.seq_lens.tolist() for call in step.calls] == [[5, 30]]
    assert stats.layers[0].sparse_calls == 3


def test_tiles_are_those_of_each_request_alone() -> None:
    together, apart = Stats(), Stats()
    Step(MIXED).run(sparse_layer(POWER, 0, together))
    for pair in MIXED:
        Step([pair]).run(sparse_layer(POWER, 0, apart))
    assert together.total.sparse_calls == apart.total.sparse_calls == 3
    assert (together.total.active_tiles, together.total.causal_tiles) == (apart.total.active_tiles, apart.total.causal_tiles)
    assert together.total.active_tiles < together.total.causal_tiles


def test_dense_kernel_of_ours_computes_what_the_method_leaves() -> None:
    stats, step = Stats(), Step(MIXED)
    [out] = step.run(sparse_layer(FLEX, 0, stats, runs_dense_itself=True, decoding=Decoding()))
    assert_same(out, step.alone(FLEX, 0))
    assert step.calls == []
    assert stats.layers[0].dense_calls == Counter({"decode": 2, "shorter than 33 tokens": 1})


def test_a_step_that_cannot_be_cut_is_computed_whole_and_overwritten() -> None:
    stats, step = Stats(), Step(MIXED)
    step.common.mm_req_doc_ranges = {1: [(3, 9)], 2: []}
    [out] = step.run(sparse_layer(FLEX, 0, stats))
    assert [call.num_actual_tokens for call in step.calls] == [137]
    assert stats.layers[0].dense_calls["bidirectional spans"] == 1
    wanted = step.alone(FLEX, 0)
    dense = step.alone(accel.Dense(), 0)
    wanted[1:91] = dense[1:91]
    assert_same(out, wanted)


def test_bounds_of_shortened_tables_leave_room_for_whole_ones() -> None:
    step = Step(MIXED)
    step.common.mm_req_doc_ranges = {}
    [out] = step.run(sparse_layer(POWER, 0, Stats()))
    assert_same(out, step.alone(POWER, 0))
    assert [call.max_seq_len for call in step.calls] == [200]


def test_drafts_are_verified_densely_and_prompts_stay_sparse() -> None:
    stats, step = Stats(), Step([(40, 200), (40, 200)])
    step.common.is_prefilling = torch.tensor([True, False])
    [out] = step.run(sparse_layer(FLEX, 0, stats, decoding=Decoding(reason="speculative decoding")), is_speculative=True)
    wanted = step.alone(FLEX, 0)
    wanted[40:] = step.alone(accel.Dense(), 0)[40:]
    assert_same(out, wanted)
    assert (stats.layers[0].sparse_calls, stats.layers[0].dense_calls) == (1, Counter({"speculative decoding": 1}))


@pytest.mark.parametrize(("change", "reason"), [({"causal": False}, "not causal"), ({"causal": torch.ones(6)}, "not causal")])
def test_a_step_that_no_method_can_look_at_is_vllms_and_counted(change: dict[str, Any], reason: str) -> None:
    stats, step = Stats(), Step(MIXED)
    step.common = step.common.replace(**change)
    step.run(sparse_layer(FLEX, 0, stats), sparse_layer(FLEX, 1, stats, reason="soft cap"))
    assert step.calls == [step.common, step.common]
    assert stats.layers[0].dense_calls == Counter({reason: 5})
    assert stats.layers[1].dense_calls == Counter({"soft cap": 5})


def test_lengths_of_the_host_are_not_needed_on_a_cpu() -> None:
    step = Step(MIXED)
    step.common.seq_lens_cpu_upper_bound = None
    [out] = step.run(sparse_layer(FLEX, 0, Stats()))
    assert_same(out, step.alone(FLEX, 0))


def test_a_step_that_is_not_real_is_not_counted() -> None:
    stats, step = Stats(), Step([(1, 170), (1, 30)])
    [out] = step.run(sparse_layer(POWER, 0, stats), counts=False)
    assert_same(out, step.alone(POWER, 0))
    assert stats.total.sparse_calls == 0
    assert not stats.total.dense_calls


def test_a_nan_in_one_prompt_leaves_the_others_sparse() -> None:
    stats, step = Stats(), Step([(90, 90), (80, 80)])
    # among the last block of queries, which are looked at
    step.q[85] = torch.nan
    [out] = step.run(sparse_layer(FLEX, 0, stats))
    assert (stats.layers[0].sparse_calls, stats.layers[0].dense_calls) == (1, Counter({"NaN in the probe": 1}))
    clean = Step([(90, 90), (80, 80)])
    assert_same(out[90:], clean.alone(FLEX, 0)[90:])


def test_memory_of_shorter_tables_stays_from_step_to_step() -> None:
    step = Step([(1, 170), (1, 200), (1, 30)])
    group = Group([sparse_layer(POWER, 0, Stats())], torch.device("cpu"), most_rows=3)
    found = [group.work(step.common, step.common, lambda key, common: common, counts=True)[0].rest for _ in range(2)]
    assert found[0] is not found[1]
    assert found[0].block_table_tensor.data_ptr() == found[1].block_table_tensor.data_ptr() != step.common.block_table_tensor.data_ptr()
    assert found[0].seq_lens.data_ptr() == found[1].seq_lens.data_ptr() != step.common.seq_lens.data_ptr()


def test_sets_of_one_step_are_built_in_memory_of_their_own() -> None:
    step, keys = Step(MIXED), []

    def build(key: object, common: Common) -> Common:
        keys.append(key)
        return common

    layers = [sparse_layer(POWER, i, Stats()) for i in (0, 1)]
    Group(layers, torch.device("cpu"), most_rows=6).work(step.common, step.common, build, counts=True)
    decoding = Step([(1, 170)])
    Group(layers, torch.device("cpu"), most_rows=6).work(decoding.common, decoding.common, build, counts=True)
    assert len(set(keys)) == len(keys) == 2
    assert keys[1] == layers[0].rule.decoding.pages




def test_a_plan_drawn_on_the_host_reaches_the_kernel_on_the_device_of_the_queries() -> None:
    layer = sparse_layer(accel.RandomBlocks(block_size=16, density=0.5, min_seq_len=0), 0, Stats())
    k = torch.zeros(90, HKV, D)
    keys, lens = ContiguousKeys(k, k, torch.tensor([0]), torch.tensor([90])), Ragged.of([90], [90])
    # a device whose tensors mix with the host's as little as a GPU's do
    plan = layer._plan(torch.empty(90, HQ, D, device="meta"), keys, lens)
    assert {t.device.type for t in vars(plan).values() if isinstance(t, Tensor)} == {"meta"}


@pytest.mark.parametrize("between", [0, 4], ids=["neighbours", "another request between"])
def test_a_batch_knows_the_rows_that_belong_to_other_requests(between: int) -> None:
    rows = (Rows(0, 3, 5, 9), Rows(2, 8 + between, 2, 2))
    batch = RowBatch.of(rows, torch.zeros(3, 4, dtype=torch.int32))
    assert batch.has_gaps == (between > 0)
    assert batch.lens.n_gapless == (5 if between else batch.end_token - batch.first_token)
