"""The decode kernel in Triton's interpreter against the definition: every plan, both layouts of keys, and the merge of the splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support import assert_error_bounded
from torch import Tensor

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import (
    BlockPlan,
    ContiguousKeys,
    ImplicitPlan,
    KeyView,
    ListPlan,
    PagedKeys,
    Ragged,
    VerticalSlashPlan,
)
from accel.kernels.block_sparse import triton_decode as triton_decode_module
from accel.kernels.block_sparse.naive import naive_attention
from accel.kernels.block_sparse.triton_decode import DecodeConfig, takes_decode, triton_decode
from accel.kernels.block_sparse.triton_workspace import workspace

BLOCK = 16
FP32, FP16 = torch.float32, torch.float16
SINK_WINDOW = ImplicitPlan(block_size=BLOCK, window_blocks=2, sink_blocks=1, powers=False)
POWERS = ImplicitPlan(block_size=BLOCK, window_blocks=2)


@dataclass(frozen=True)
class Call:
    """A decoding batch: rows of q in and between sequences (those hold NaN), keys of either layout, NaN behind every sequence."""

    q: Tensor
    keys: KeyView
    lens: Ragged
    scale: float

    @classmethod
    def random(
        cls, q_len: Sequence[int], kv_len: Sequence[int], *, Hq: int = 2, Hkv: int = 1, D: int = 16, Dv: int | None = None,
        gap: int = 0, page_size: int = 0, dtype: torch.dtype = FP32, seed: int = 0,
    ) -> Call:
        g = torch.Generator().manual_seed(seed)
        q = torch.full((sum(q_len) + gap * len(q_len), Hq, D), torch.nan)
        starts, at = [], 0
        for n in q_len:
            starts.append(at + gap)
            q[at + gap : at + gap + n] = 2 * torch.randn(n, Hq, D, generator=g)
            at += gap + n
        lens = Ragged.of(list(q_len), list(kv_len), q_start=starts)
        sides = [[torch.randn(n, Hkv, dim, generator=g).to(dtype) for n in kv_len] for dim in (D, Dv or D)]
        return cls(q.to(dtype), paged(sides, lens, page_size, g) if page_size else contiguous(sides, lens), lens, D**-0.5)

    def run(
        self, plan: BlockPlan, *, splits: int | None = None, block_n: int = 16, softcap: float | None = None, wants_lse: bool = True,
        min_blocks: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Into buffers full of NaN."""
        out = torch.full((*self.q.shape[:2], self.keys.value_dim), torch.nan, dtype=self.q.dtype)
        lse = torch.full((self.q.shape[1], self.q.shape[0]), torch.nan)
        config = DecodeConfig(block_n=block_n, splits=splits, min_tokens=0, min_blocks=min_blocks)
        triton_decode(
            self.q, self.keys, plan, self.lens, scale=self.scale, softcap=softcap, out=out, lse=lse if wants_lse else None, config=config
        )
        return out, lse

    def check(self, plan: BlockPlan, *, softcap: float | None = None, **options: object) -> tuple[Tensor, Tensor]:
        """Runs and compares, row by row, with the definition in fp64; returns the output and LSE."""
        out, lse = self.run(plan, softcap=softcap, **options)  # type: ignore[arg-type]
        double = self.converted(torch.float64)
        exact, exact_lse = naive_attention(double.q, double.keys, plan, self.lens, scale=self.scale, softcap=softcap)
        naive, _ = naive_attention(self.q, self.keys, plan, self.lens, scale=self.scale, softcap=softcap)
        assert_error_bounded(out, exact, naive, block=1, floor=2e-6 if self.q.dtype == FP32 else 1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5 if self.q.dtype == FP32 else 2e-3, rtol=1e-5)
        return out, lse

    def converted(self, dtype: torch.dtype) -> Call:
        keys = self.keys
        if isinstance(keys, PagedKeys):
            keys = replace(keys, k_pages=keys.k_pages.to(dtype), v_pages=keys.v_pages.to(dtype))
        elif isinstance(keys, ContiguousKeys):
            keys = replace(keys, k=keys.k.to(dtype), v=keys.v.to(dtype))
        return replace(self, q=self.q.to(dtype), keys=keys)

    def poisoned(self, plan: BlockPlan) -> Call:
        """The same with NaN in the keys and values of every block that no row of its sequence lists."""
        keys = self.keys
        assert isinstance(keys, ContiguousKeys)
        k, v = keys.k.clone(), keys.v.clone()
        for rows in self.lens.rows():
            start = int(keys.start[rows.index])
            unlisted = ~plan.block_mask(rows).any(0).any(0)
            for j in unlisted.nonzero()[:, 0].tolist():
                at = slice(start + j * plan.block_size, start + min((j + 1) * plan.block_size, rows.kv_len))
                k[at], v[at] = torch.nan, torch.nan
        return replace(self, keys=replace(keys, k=k, v=v))

    def random_lists(self, *, heads: int | None = None, density: float = 0.4, seed: int = 1) -> ListPlan:
        """Lists that may be empty and may lack the diagonal."""
        g = torch.Generator().manual_seed(seed)
        masks = []
        for rows in self.lens.rows():
            nq, nk = rows.query_blocks(BLOCK), rows.key_blocks(BLOCK)
            below = torch.ones(nq, nk, dtype=torch.bool).tril(rows.first_block(BLOCK))
            masks.append((torch.rand(heads or self.q.shape[1], nq, nk, generator=g) < density) & below)
        return ListPlan.from_mask(masks, self.lens, BLOCK)

    def random_lines(self, *, heads: int | None = None, has_extra: bool = False, seed: int = 1) -> VerticalSlashPlan:
        g = torch.Generator().manual_seed(seed)
        every = list(self.lens.rows())
        nk, nq = max(r.key_blocks(BLOCK) for r in every), max(r.query_blocks(BLOCK) for r in every)
        shape = (len(every), heads or self.q.shape[1], nk)
        vertical, slash = (torch.rand(shape, generator=g) < 0.25 for _ in range(2))
        extra = torch.rand(*shape[:2], nq, nk, generator=g) < 0.2 if has_extra else None
        return VerticalSlashPlan(BLOCK, vertical, slash, extra)


def contiguous(sides: list[list[Tensor]], lens: Ragged) -> ContiguousKeys:
    """Sequences with five rows of NaN before, between and behind them."""
    wholes, starts = [], []
    for side in sides:
        hole = torch.full((5, *side[0].shape[1:]), torch.nan, dtype=side[0].dtype)
        pieces, starts, at = [hole], [], 5
        for x in side:
            starts.append(at)
            pieces += [x, hole]
            at += x.shape[0] + 5
        wholes.append(torch.cat(pieces))
    return ContiguousKeys(wholes[0], wholes[1], torch.tensor(starts), lens.kv_len)


def paged(sides: list[list[Tensor]], lens: Ragged, page_size: int, g: torch.Generator) -> PagedKeys:
    """Shuffled pages, NaN in the unused ones and behind the sequences; the table's unused entries would be out of bounds."""
    counts = [-(-n // page_size) for n in lens.kv_len.tolist()]
    order = torch.randperm(sum(counts) + 3, generator=g).int()
    table = torch.full((len(counts), max(max(counts), 1) + 2), 10**9, dtype=torch.int32)
    pools, at = [], 0
    for b, count in enumerate(counts):
        table[b, :count] = order[at : at + count]
        at += count
    for side in sides:
        pool = torch.full((order.shape[0], page_size, *side[0].shape[1:]), torch.nan, dtype=side[0].dtype)
        for b, x in enumerate(side):
            for p in range(counts[b]):
                piece = x[p * page_size : (p + 1) * page_size]
                pool[int(table[b, p]), : piece.shape[0]] = piece
        pools.append(pool)
    return PagedKeys(pools[0], pools[1], table, lens.kv_len)


def arrivals() -> list[Tensor]:
    return [t for kept in workspace._kept.values() for (name, *_), t in kept.items() if name == "arrivals"]


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
@pytest.mark.parametrize("plan", [SINK_WINDOW, POWERS, ImplicitPlan.dense(BLOCK)], ids=["sink+window", "powers", "dense"])
def test_ragged_batch_is_right_with_any_number_of_splits(plan: ImplicitPlan, splits: int) -> None:
    call = Call.random([1, 1, 0, 1, 0], [251, 1, 40, 16, 0], Hq=4, Hkv=2, gap=1)
    out, lse = call.check(plan, splits=splits)
    assert out[0].eq(0).all(), "a row of no sequence"
    assert lse[:, 0].eq(-torch.inf).all()
    assert len(arrivals()) > 0
    assert all(kept.eq(0).all() for kept in arrivals()), "arrivals are not back at zero"
    again, again_lse = call.run(plan, splits=splits)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("splits", [2, 64])
@pytest.mark.parametrize("plan", [
    SINK_WINDOW, POWERS,
    ImplicitPlan(block_size=BLOCK, window_blocks=1, sink_blocks=0),
    ImplicitPlan(block_size=BLOCK, window_blocks=1, sink_blocks=3, max_power=2),
    ImplicitPlan(block_size=BLOCK, window_blocks=1, sink_blocks=1, max_power=0),
    ImplicitPlan(block_size=BLOCK, window_blocks=5, sink_blocks=1),
    ImplicitPlan.dense(BLOCK),
], ids=["sink+window", "powers", "powers only", "to 4", "to 1", "paper", "dense"])
def test_rows_in_two_query_blocks_read_each_its_own_list(plan: ImplicitPlan, splits: int) -> None:
    # the rows end before, at and behind a block boundary, near the sink and far from it
    call = Call.random([4, 4, 4, 4, 1, 3], [4, 17, 16 * 8 + 1, 16 * 9 + 2, 16 * 11, 16 * 16 + 2]).poisoned(plan)
    call.check(plan, splits=splits)


@pytest.mark.parametrize("window", [1, 2, 3, 6])
@pytest.mark.parametrize("max_power", [None, 0, 1, 3])
def test_rows_in_many_small_blocks_read_the_union_once(window: int, max_power: int | None) -> None:
    # blocks of 4 tokens: 13 rows lie in four or five of them, and the spans of small powers overlap
    plan = ImplicitPlan(block_size=4, window_blocks=window, sink_blocks=1, max_power=max_power)
    Call.random([13, 13, 16], [61, 64, 150]).poisoned(plan).check(plan, splits=4)


def test_unlisted_blocks_are_not_read() -> None:
    for plan in (SINK_WINDOW, POWERS):
        Call.random([1, 1], [251, 139], Hq=4, Hkv=2).poisoned(plan).check(plan, splits=2)


@pytest.mark.parametrize("splits", [1, 64])
@pytest.mark.parametrize("heads", [1, 6], ids=["shared", "per head"])
@pytest.mark.parametrize("q_len", [[1, 1, 1, 0], [4, 4, 4, 4]], ids=["one row", "four rows"])
def test_lists_of_every_head(q_len: list[int], heads: int, splits: int) -> None:
    call = Call.random(q_len, [200, 17, 130, 48], Hq=6, Hkv=2, gap=1)
    call.poisoned(plan := call.random_lists(heads=heads)).check(plan, splits=splits)


def test_a_row_that_lists_nothing_is_zero() -> None:
    call = Call.random([2, 1], [33, 50])
    out, lse = call.check(call.random_lists(density=0.0))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("has_extra", [False, True], ids=["lines", "lines and tiles"])
@pytest.mark.parametrize("heads", [1, 4], ids=["shared", "per head"])
@pytest.mark.parametrize("q_len", [[1, 1, 1, 0], [4, 4, 4, 4]], ids=["one row", "four rows"])
def test_vertical_and_slash_lines(q_len: list[int], heads: int, has_extra: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # 18 blocks are two chunks of the list kernel
    monkeypatch.setattr(triton_decode_module, "LIST_CHUNK", 16)
    call = Call.random(q_len, [288, 17, 130, 48], Hq=4, Hkv=2)
    call.poisoned(plan := call.random_lines(heads=heads, has_extra=has_extra)).check(plan, splits=3)
    assert all(kept.eq(0).all() for kept in arrivals())


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("kind", ["powers", "lists", "lines"])
def test_pages(kind: str, page_size: int) -> None:
    call = Call.random([1, 3, 0, 2], [200, 131, 20, 33], Hq=4, Hkv=2, page_size=page_size)
    plan = {"powers": lambda: POWERS, "lists": call.random_lists, "lines": call.random_lines}[kind]()
    call.check(plan, splits=2)


@pytest.mark.parametrize(("block_size", "block_n"), [(64, 32), (64, 16), (24, 16), (20, 32)])
@pytest.mark.parametrize("page_size", [0, 16, 64])
def test_tiles_smaller_and_larger_than_blocks(block_size: int, block_n: int, page_size: int) -> None:
    call = Call.random([1, 3], [300, 130], page_size=page_size)
    call.check(ImplicitPlan(block_size=block_size, window_blocks=1), splits=2, block_n=block_n)


def test_pages_of_any_strides() -> None:
    call = Call.random([1, 2], [70, 33], Hq=4, Hkv=2, page_size=16)
    keys = call.keys
    assert isinstance(keys, PagedKeys)
    # heads outside the tokens, K and V in different layouts
    k_pages = keys.k_pages.transpose(1, 2).contiguous().transpose(1, 2)
    assert k_pages.stride() != keys.v_pages.stride()
    replace(call, keys=replace(keys, k_pages=k_pages)).check(POWERS, splits=2)


def test_static_cache_with_left_padding() -> None:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 64, 16, generator=g) for _ in range(2))
    lens = Ragged.of([1, 1], [50, 33])
    keys = ContiguousKeys.from_cache(k, v, start=torch.tensor([0, 17]), kv_len=lens.kv_len)
    Call(torch.randn(2, 4, 16, generator=g), keys, lens, 0.25).check(POWERS, splits=2)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (4, 96), (8, 128), (2, 256)])
def test_groups_and_head_sizes(group: int, head_dim: int, dtype: torch.dtype) -> None:
    call = Call.random([1, 5], [65, 49], Hq=2 * group, Hkv=2, D=head_dim, dtype=dtype)
    call.check(POWERS, splits=2)
    call.check(call.random_lists(), splits=2)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_softcap_and_values_of_another_size(dtype: torch.dtype) -> None:
    call = Call.random([1, 2], [65, 49], Hq=4, Hkv=2, D=32, Dv=24, dtype=dtype)
    call.check(POWERS, splits=2, softcap=1.5)
    call.check(call.random_lists(), splits=2, softcap=30.0)


def test_bf16_is_computed_in_fp32_by_the_interpreter() -> None:
    # products of bf16 are wrong in the interpreter, and its casts to bf16 truncate: hence fp32 tiles and the floor
    call = Call.random([1, 2], [65, 49], Hq=4, Hkv=2, dtype=torch.bfloat16)
    out = torch.full_like(call.q, torch.nan)
    config = DecodeConfig(block_n=16, splits=2)
    triton_decode(call.q, call.keys, POWERS, call.lens, scale=call.scale, softcap=None, out=out, lse=None, config=config)
    double = call.converted(torch.float64)
    exact, _ = naive_attention(double.q, double.keys, POWERS, call.lens, scale=call.scale)
    assert_error_bounded(out, exact, exact, block=1, floor=1.2e-2)


def test_many_rows_are_cut_into_tiles() -> None:
    # 16 rows of 4 heads are four tiles of 16
    call = Call.random([16, 1, 7], [40, 30, 135], Hq=4, Hkv=1)
    call.check(POWERS, splits=3)
    call.check(call.random_lists(heads=1), splits=3)


@pytest.mark.parametrize("q_len", [1, 6])
def test_own_choice_of_tiles_and_without_lse(q_len: int) -> None:
    call = Call.random([q_len, q_len], [500, 300], Hq=4, Hkv=2, D=64, dtype=FP16)
    plan = ImplicitPlan.dense(64)
    out = torch.full_like(call.q, torch.nan)
    triton_decode(call.q, call.keys, plan, call.lens, scale=call.scale, softcap=None, out=out, lse=None)
    want, _ = naive_attention(call.q.double(), call.converted(torch.float64).keys, plan, call.lens, scale=call.scale)
    assert_error_bounded(out, want, want, block=1, floor=2e-3)


def test_nan_in_a_key_reaches_the_rows_that_see_it() -> None:
    call = Call.random([3, 1], [40, 50], Hq=4, Hkv=2)
    keys = call.keys
    assert isinstance(keys, ContiguousKeys)
    # of the first sequence, the last but one token: its rows 1 and 2 see it
    keys.k[int(keys.start[0]) + 38, 1] = torch.nan
    for splits in (1, 8):
        out, lse = call.run(POWERS, splits=splits)
        is_nan = out.isnan().any(-1)
        assert torch.equal(is_nan, out.isnan().all(-1))
        assert torch.equal(is_nan, lse.T.isnan())
        assert is_nan.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]


def test_offsets_past_two_to_the_31(tmp_path: Path) -> None:
    # a file without content on disk: pages 2**30 elements apart, of which three are written
    apart, page_size, dim = 2**30, 16, 16
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * apart, dtype=FP16)
    pages = flat.as_strided((3, page_size, 1, dim), (apart, dim, dim, 1))
    pages[:] = torch.randn(3, page_size, 1, dim, generator=torch.Generator().manual_seed(0)).to(FP16)
    lens = Ragged.of([1], [40])
    keys = PagedKeys(pages, pages, torch.tensor([[2, 0, 1]], dtype=torch.int32), lens.kv_len)
    q = torch.randn(1, 2, dim, generator=torch.Generator().manual_seed(1)).to(FP16)
    Call(q, keys, lens, 0.25).check(ImplicitPlan.dense(BLOCK), splits=2)
    # the same as rows of one tensor, each 2**27 elements behind the last
    rows = flat.as_strided((20, 1, dim), (2**27, dim, 1))
    rows[:] = torch.randn(20, 1, dim, generator=torch.Generator().manual_seed(2)).to(FP16)
    lens = Ragged.of([1], [18])
    Call(q, ContiguousKeys(rows, rows, torch.tensor([2]), lens.kv_len), lens, 0.25).check(ImplicitPlan.dense(BLOCK), splits=2)


def test_workspace_is_reused() -> None:
    call = Call.random([1, 1], [200, 100], Hq=4, Hkv=2)
    call.run(POWERS, splits=4)
    before = {(stream, key): t.data_ptr() for stream, kept in workspace._kept.items() for key, t in kept.items()}
    call.run(POWERS, splits=4)
    assert {(stream, key): t.data_ptr() for stream, kept in workspace._kept.items() for key, t in kept.items()} == before


def test_only_decoding_is_taken() -> None:
    assert takes_decode(POWERS, Ragged.of([16, 1], [40, 40]))
    assert not takes_decode(POWERS, Ragged.of([17, 1], [40, 40]))
    call = Call.random([17], [40])
    with pytest.raises(ValueError, match="at most 16 query rows"):
        call.run(POWERS)


def test_refusals_name_the_argument() -> None:
    call = Call.random([1], [40], page_size=16)
    keys = call.keys
    assert isinstance(keys, PagedKeys)
    strided = replace(keys, k_pages=keys.k_pages.transpose(1, 3).contiguous().transpose(1, 3))
    with pytest.raises(UnsupportedError) as refusal:
        replace(call, keys=strided).run(POWERS)
    assert "k_pages must have last stride 1" in refusal.value.reasons[0]
    with pytest.raises(UnsupportedError) as refusal:
        Call.random([1], [20], D=257).run(POWERS)
    assert "up to 256" in refusal.value.reasons[0]


def test_what_would_be_read_past_its_end_is_refused() -> None:
    call = Call.random([1, 1], [40, 30], Hq=4, Hkv=2)
    with pytest.raises(ValueError, match="the plan describes 3 heads of 2 sequences, q has 4 of 2"):
        call.run(Call.random([1, 1], [40, 30], Hq=3).random_lists())
    with pytest.raises(ValueError, match="the plan describes 4 heads of 1 sequences, q has 4 of 2"):
        call.run(Call.random([1], [40], Hq=4).random_lists())
    with pytest.raises(ValueError, match="kv_len is on meta, q is on cpu"):
        replace(call, lens=replace(call.lens, kv_len=call.lens.kv_len.to("meta"))).run(POWERS)
