"""The prefill kernel in Triton's interpreter against the definition: every encoding, shape and layout, block of rows by block of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from support import assert_error_bounded
from torch import Tensor

from accel.kernels.block_sparse import (
    BlockPlan,
    ContiguousKeys,
    ImplicitPlan,
    KeyView,
    ListPlan,
    PagedKeys,
    Ragged,
    VerticalSlashPlan,
    block_sparse_attention,
    dense_attention,
    dispatches,
)
from accel.kernels.block_sparse.naive import naive_attention
from accel.kernels.block_sparse.triton_launch import Lists, PrefillConfig, query_blocks, triton_attention

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BLOCK = 16
SMALL = PrefillConfig(rows=16, cols=16, num_warps=4, num_stages=2)
LIMITS = {FP32: (2e-6, 1e-5), FP16: (1e-3, 2e-3), BF16: (1e-2, 1e-2)}


@dataclass(frozen=True)
class Call:
    """Sequences of a batch. Rows of q and of the keys that belong to none hold NaN; page tables end in entries that are out of bounds."""

    q: Tensor
    keys: KeyView
    lens: Ragged
    softcap: float | None = None
    scale: float = 0.2

    @classmethod
    def random(
        cls, q_len: Sequence[int], kv_len: Sequence[int] | None = None, *, Hq: int = 2, Hkv: int = 1, D: int = 16, Dv: int | None = None,
        gap: int = 3, page_size: int = 0, dtype: torch.dtype = FP32, softcap: float | None = None, seed: int = 0,
    ) -> Call:
        g = torch.Generator().manual_seed(seed)
        kv_len = q_len if kv_len is None else kv_len
        q, q_start = spread([2 * torch.randn(n, Hq, D, generator=g) for n in q_len], gap)
        lens = Ragged.of(list(q_len), list(kv_len), q_start=q_start)
        sides = [[torch.randn(n, Hkv, dim, generator=g).to(dtype) for n in kv_len] for dim in (D, Dv or D)]
        if page_size:
            return cls(q.to(dtype), paged(sides, lens, page_size, g), lens, softcap)
        (k, start), (v, _) = (spread(side, gap) for side in sides)
        return cls(q.to(dtype), ContiguousKeys(k, v, torch.tensor(start), lens.kv_len), lens, softcap)

    def run(self, plan: BlockPlan, config: PrefillConfig = SMALL, **options: int) -> tuple[Tensor, Tensor]:
        """Into buffers full of NaN."""
        out = torch.full((*self.q.shape[:2], self.keys.value_dim), torch.nan, dtype=self.q.dtype)
        lse = torch.full((self.q.shape[1], self.q.shape[0]), torch.nan)
        triton_attention(
            self.q, self.keys, plan, self.lens, scale=self.scale, softcap=self.softcap, out=out, lse=lse, config=config, **options
        )
        return out, lse

    def check(self, plan: BlockPlan, config: PrefillConfig = SMALL, *, reference: Call | None = None, **options: int) -> tuple[Tensor, Tensor]:
        """Runs and compares with the definition in fp64. reference: the same call in numbers and memory that the definition reads."""
        out, lse = self.run(plan, config, **options)
        other = reference or self
        naive, _ = naive_attention(other.q, other.keys, plan, other.lens, scale=self.scale, softcap=self.softcap)
        double = other.converted(torch.float64)
        exact, exact_lse = naive_attention(double.q, double.keys, plan, self.lens, scale=self.scale, softcap=self.softcap)
        floor, lse_error = LIMITS[self.q.dtype]
        for rows in self.lens.rows():
            here = slice(rows.q_start, rows.q_start + rows.q_len)
            assert_error_bounded(out[here], exact[here], naive[here], block=BLOCK, floor=floor)
        torch.testing.assert_close(lse.double(), exact_lse, atol=lse_error, rtol=1e-5)
        gaps = exact_lse.isneginf().T
        assert (out[gaps] == 0).all()
        return out, lse

    def converted(self, dtype: torch.dtype) -> Call:
        names = ("k", "v") if isinstance(self.keys, ContiguousKeys) else ("k_pages", "v_pages")
        keys = replace(self.keys, **{name: getattr(self.keys, name).to(dtype) for name in names})  # type: ignore[type-var]
        return replace(self, q=self.q.to(dtype), keys=keys)

    def random_lists(self, *, block: int = BLOCK, heads: int | None = None, density: float = 0.4, seed: int = 1) -> ListPlan:
        """Lists that may be empty and may lack the diagonal."""
        g = torch.Generator().manual_seed(seed)
        masks = []
        for rows in self.lens.rows():
            nq, nk = rows.query_blocks(block), rows.key_blocks(block)
            below = torch.ones(nq, nk, dtype=torch.bool).tril(rows.first_block(block))
            masks.append((torch.rand(heads or self.q.shape[1], nq, nk, generator=g) < density) & below)
        return ListPlan.from_mask(masks, self.lens, block)

    def random_lines(self, *, block: int = BLOCK, heads: int | None = None, has_extra: bool = False, seed: int = 1) -> VerticalSlashPlan:
        """Columns and diagonals that may lack the diagonal."""
        g = torch.Generator().manual_seed(seed)
        every = list(self.lens.rows())
        nq, nk = max(r.query_blocks(block) for r in every), max(r.key_blocks(block) for r in every)
        shape = (len(every), heads or self.q.shape[1], nk)
        vertical, slash = (torch.rand(shape, generator=g) < 0.25 for _ in range(2))
        return VerticalSlashPlan(block, vertical, slash, torch.rand(*shape[:2], nq, nk, generator=g) < 0.2 if has_extra else None)


def spread(pieces: list[Tensor], gap: int) -> tuple[Tensor, list[int]]:
    """One tensor with `gap` rows of NaN before every piece and behind the last, and where each piece starts."""
    hole = torch.full((gap, *pieces[0].shape[1:]), torch.nan, dtype=pieces[0].dtype)
    starts = [gap * (i + 1) + sum(p.shape[0] for p in pieces[:i]) for i in range(len(pieces))]
    return torch.cat([hole, *(x for piece in pieces for x in (piece, hole))]), starts


def paged(sides: list[list[Tensor]], lens: Ragged, page_size: int, g: torch.Generator) -> PagedKeys:
    """Shuffled pages; NaN in the unused ones and behind each sequence."""
    counts = [-(-n // page_size) for n in lens.kv_len.tolist()]
    order = torch.randperm(sum(counts) + 2, generator=g).int()
    table = torch.full((len(counts), max(counts) + 1), 2**30, dtype=torch.int32)
    stores = []
    for side in sides:
        pages = torch.full((len(order), page_size, *side[0].shape[1:]), torch.nan, dtype=side[0].dtype)
        at = 0
        for b, (x, n) in enumerate(zip(side, counts, strict=True)):
            table[b, :n] = order[at : at + n]
            for i in range(n):
                piece = x[i * page_size : (i + 1) * page_size]
                pages[order[at + i], : piece.shape[0]] = piece
            at += n
        stores.append(pages)
    return PagedKeys(stores[0], stores[1], table, lens.kv_len)


DENSE = ImplicitPlan.dense(BLOCK)
POWERS = ImplicitPlan(block_size=BLOCK, window_blocks=2)
IMPLICIT = {
    "dense": DENSE,
    "window": ImplicitPlan(BLOCK, window_blocks=3, sink_blocks=0, powers=False),
    "sink_window": ImplicitPlan(BLOCK, window_blocks=2, sink_blocks=2, powers=False),
    "powers": POWERS,
    "window_of_one": ImplicitPlan(BLOCK, window_blocks=1, sink_blocks=1),
    "window_of_three": ImplicitPlan(BLOCK, window_blocks=3, sink_blocks=3),
    "max_power": ImplicitPlan(BLOCK, window_blocks=1, sink_blocks=0, max_power=1),
    "no_own_block": ImplicitPlan(BLOCK, window_blocks=0, sink_blocks=1),
    "nothing": ImplicitPlan(BLOCK, window_blocks=0, sink_blocks=0, powers=False),
}


@pytest.mark.parametrize("plan", IMPLICIT.values(), ids=IMPLICIT.keys())
def test_implicit_patterns(plan):
    Call.random([150, 17], Hq=1).check(plan)


@pytest.mark.parametrize("heads", [None, 1], ids=["per_head", "shared"])
def test_lists(heads):
    one = Call.random([70, 1, 33], Hq=3)
    plan = one.random_lists(heads=heads)
    out, _ = one.check(plan)
    # rows without a key exist in this case: they are what is tested
    assert any((~plan.block_mask(rows).any(-1)).any() for rows in one.lens.rows())
    assert not out.isnan().any()


def test_a_block_below_the_diagonal_may_be_in_the_masked_list():
    one = Call.random([60])
    lists = one.random_lists()
    swapped = ListPlan(BLOCK, lists.full_count, lists.full_index, torch.zeros_like(lists.full_count), lists.full_index)
    one.check(swapped)


@pytest.mark.parametrize("has_extra", [False, True], ids=["lines", "lines_and_extra"])
@pytest.mark.parametrize("heads", [None, 1], ids=["per_head", "shared"])
def test_vertical_and_slash_lines(heads, has_extra):
    one = Call.random([90, 20], [90, 75], Hq=4, Hkv=2)
    one.check(one.random_lines(heads=heads, has_extra=has_extra))


@pytest.mark.parametrize("index_bytes", [1, 2 * 4 * 9 * 2 * 2, 1 << 20], ids=["row_by_row", "two_rows", "at_once"])
def test_lists_of_lines_fit_the_memory_they_may_take(index_bytes):
    one = Call.random([140, 90], [140, 110], Hq=4)
    plan = one.random_lines(has_extra=True)
    lists = Lists.empty(plan, 4, query_blocks(BLOCK, one.lens), index_bytes)
    row = 2 * 4 * 9 * 2
    assert lists.indices.nbytes <= max(index_bytes, row)
    assert torch.equal(one.check(plan, index_bytes=index_bytes)[0], one.run(plan)[0])


def test_lists_of_lines_at_a_million_tokens():
    # 128 MB hold 256 of the 8192 rows of 32 heads: 32 launches, no values needed
    nk, heads = 2**20 // 128, 32
    lines = torch.zeros(1, heads, nk, dtype=torch.bool, device="meta")
    lists = Lists.empty(VerticalSlashPlan(128, lines, lines), heads, nk, 128 << 20)
    assert lists.n_rows == 256
    assert lists.indices.dtype == torch.int16
    assert sum(t.nbytes for t in lists) <= 129 << 20
    wide = torch.zeros(1, heads, 2**16, dtype=torch.bool, device="meta")
    assert Lists.empty(VerticalSlashPlan(16, wide, wide), heads, 4, 1).indices.dtype == torch.int32


@pytest.mark.parametrize("q_len, kv_len", [([1, 63], [40, 63]), ([5, 30, 0], [37, 94, 50]), ([16], [48]), ([17], [49])], ids=str)
def test_cached_prefixes_keep_the_grid(q_len, kv_len):
    one = Call.random(q_len, kv_len)
    one.check(POWERS)
    one.check(one.random_lists())
    one.check(one.random_lines())


def test_sequences_without_gaps_fill_every_row_and_rows_behind_them_are_cleared():
    one = Call.random([37, 0, 20], [37, 4, 53], gap=0)
    assert one.lens.n_gapless == one.q.shape[0] == 57
    longer = replace(one, q=torch.cat([one.q, torch.full((70, 2, 16), torch.nan)]))
    for plan in (POWERS, one.random_lists(), one.random_lines()):
        want, _ = one.check(plan)
        out, lse = longer.run(plan)
        assert torch.equal(out[:57], want)
        assert not out[57:].any()
        assert lse[:, 57:].isneginf().all()


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_query_heads_share_keys(group):
    one = Call.random([50], Hq=2 * group, Hkv=2)
    one.check(one.random_lists())


@pytest.mark.parametrize("D, Dv", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (72, 40), (8, 24)], ids=str)
def test_head_sizes(D, Dv):
    Call.random([37], [45], D=D, Dv=Dv, gap=2).check(POWERS)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("encoding", ["implicit", "lists", "lines"])
def test_half_precision(encoding, dtype):
    one = Call.random([75, 20], D=64, dtype=dtype)
    one.check({"implicit": POWERS, "lists": one.random_lists(), "lines": one.random_lines()}[encoding])


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("encoding", ["implicit", "lists", "lines"])
def test_pages(encoding, page_size):
    one = Call.random([70, 9], [150, 60], Hq=4, Hkv=2, page_size=page_size)
    one.check({"implicit": POWERS, "lists": one.random_lists(), "lines": one.random_lines()}[encoding])


@pytest.mark.parametrize("page_size", [0, 16, 64], ids=["contiguous", "pages_of_16", "pages_of_64"])
@pytest.mark.parametrize("block, rows, cols", [(32, 16, 16), (64, 64, 32), (64, 16, 32), (24, 16, 16), (8, 16, 16), (40, 32, 16)], ids=str)
def test_blocks_of_several_tiles_and_of_odd_sizes(block, rows, cols, page_size):
    one = Call.random([2 * block + 3], [3 * block + 8], Hq=1, page_size=page_size)
    config = replace(SMALL, rows=rows, cols=cols)
    one.check(ImplicitPlan(block, window_blocks=1), config)
    one.check(one.random_lists(block=block, density=0.7), config)
    one.check(one.random_lines(block=block), config)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(softcap):
    Call.random([50], softcap=softcap).check(POWERS)
    Call.random([50], softcap=softcap, dtype=FP16).check(POWERS)


def test_scores_far_from_zero():
    one = replace(Call.random([64], D=32), scale=40.0)
    one.check(POWERS)


def poisoned(one: Call, plan: BlockPlan) -> Call:
    """NaN in the keys and values of every block that no row lists."""
    keys = one.keys
    k, v = keys.k.clone(), keys.v.clone()
    for rows in one.lens.rows():
        for j in (~plan.block_mask(rows).any(0).any(0)).nonzero()[:, 0].tolist():
            start = int(keys.start[rows.index])
            at = slice(start + j * BLOCK, start + min((j + 1) * BLOCK, rows.kv_len))
            k[at], v[at] = torch.nan, torch.nan
    return replace(one, keys=replace(keys, k=k, v=v))


@pytest.mark.parametrize("encoding", ["implicit", "lists", "lines"])
def test_unlisted_blocks_are_never_read(encoding):
    one = Call.random([16, 16], [160, 100])
    plan = {"implicit": POWERS, "lists": one.random_lists(), "lines": one.random_lines()}[encoding]
    bad = poisoned(one, plan)
    assert bad.keys.k[20:50].isnan().any()
    assert torch.equal(bad.check(plan, reference=one)[0], one.run(plan)[0])


def test_a_nan_key_reaches_the_rows_that_see_it_only():
    one = Call.random([48], gap=0)
    k = one.keys.k.clone()
    k[20] = torch.nan
    out, lse = replace(one, keys=replace(one.keys, k=k)).run(DENSE)
    sees = torch.arange(48) >= 20
    assert torch.equal(out.isnan().all(-1).all(-1), sees)
    assert torch.equal(lse.isnan().all(0), sees)
    assert torch.equal(out[~sees], one.run(DENSE)[0][~sees])


def test_a_nan_query_reaches_its_own_row_only():
    one = Call.random([48], gap=0)
    q = one.q.clone()
    q[20, 1] = torch.nan
    out, _ = replace(one, q=q).run(DENSE)
    wrong = torch.zeros(48, 2, dtype=torch.bool)
    wrong[20, 1] = True
    assert torch.equal(out.isnan().all(-1), wrong)


def test_odd_strides_and_addresses_are_copied_and_counted():
    one = Call.random([40], D=32, gap=0)
    before = dispatches.copy()
    q = torch.zeros(40, 2, 33)[..., 1:].copy_(one.q)
    k, v = (torch.zeros(40, 1, 37)[..., :32].copy_(t) for t in (one.keys.k, one.keys.v))
    out, _ = replace(one, q=q, keys=replace(one.keys, k=k, v=v)).run(POWERS)
    assert torch.equal(out, one.run(POWERS)[0])
    assert dispatches - before == {"copied-q": 1, "copied-k": 1, "copied-v": 1}


def test_the_stride_between_heads_does_not_matter_where_there_is_one():
    one = Call.random([40], gap=0)
    k, v = (t.as_strided((40, 1, 16), (16, 7, 1)) for t in (one.keys.k, one.keys.v))
    before = dispatches.copy()
    assert torch.equal(replace(one, keys=replace(one.keys, k=k, v=v)).run(POWERS)[0], one.run(POWERS)[0])
    assert dispatches == before


def test_a_cache_of_odd_strides_is_refused_by_name():
    one = Call.random([40], D=24, page_size=16)
    with pytest.raises(ValueError, match="k_pages cannot be read as it is"):
        one.run(POWERS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda one: replace(one, scale=0.0), "scale must be positive"),
        (lambda one: replace(one, q=one.q.new_zeros(46, 2, 272), keys=replace(one.keys, k=torch.zeros(46, 1, 272))), "at most 256"),
    ],
    ids=["scale", "head_dim"],
)
def test_a_wrong_argument_explains_itself(change, message):
    with pytest.raises(ValueError, match=message):
        change(Call.random([40])).run(POWERS)
    one = Call.random([40], Hq=4)
    with pytest.raises(ValueError, match="the plan describes 3 heads of 1 sequences, q has 4 of 1"):
        one.run(Call.random([40], Hq=3).random_lists())


def test_strides_past_32_bits():
    # a view whose tokens and heads lie far apart in a buffer that is never touched in between: only the rows that are used get memory
    n, far = 40, 2**26
    one = Call.random([n], D=16, gap=0, dtype=FP16)
    buffer = torch.empty(n * far + 64, dtype=FP16)
    k, v = (buffer.as_strided((n, 1, 16), (far, 32, 1), at).copy_(t) for at, t in ((0, one.keys.k), (16, one.keys.v)))
    apart = replace(one, keys=replace(one.keys, k=k, v=v))
    assert (n - 1) * k.stride(0) > 2**31
    for plan in (POWERS, one.random_lists(), one.random_lines()):
        assert torch.equal(apart.run(plan)[0], one.run(plan)[0])


def test_pages_past_32_bits():
    far = 2**30
    one = Call.random([40], D=16, page_size=16)
    pages, size = one.keys.k_pages.shape[:2]
    buffer = torch.empty(pages * far + 2**20, dtype=FP16)
    k, v = (buffer.as_strided((pages, size, 1, 16), (far, 32, 32, 1), at) for at in (0, 16))
    k.copy_(one.keys.k_pages)
    v.copy_(one.keys.v_pages)
    half = one.converted(FP16)
    assert torch.equal(replace(half, keys=replace(half.keys, k_pages=k, v_pages=v)).run(POWERS)[0], half.run(POWERS)[0])


def test_the_bound_on_query_blocks_holds():
    for q_len in range(1, 50):
        for offset in range(20):
            lens = Ragged.of([q_len], [q_len + offset])
            needed = next(lens.rows()).query_blocks(BLOCK)
            assert needed <= query_blocks(BLOCK, lens) <= needed + 1


def test_the_production_tile():
    one = Call.random([200], [300], D=64, dtype=FP16)
    plan = one.random_lines(block=128)
    one.check(plan, PrefillConfig())
    one.check(ImplicitPlan(256, window_blocks=1), PrefillConfig())


def test_the_interface_runs_the_kernels_where_asked():
    one = Call.random([40], gap=0)
    before = dispatches.copy()
    options = {"scale": one.scale, "return_lse": True}
    out, lse = block_sparse_attention(one.q, one.keys, POWERS, one.lens, impl="triton", **options)
    want, want_lse = block_sparse_attention(one.q, one.keys, POWERS, one.lens, impl="naive", **options)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    # on a CPU "auto" and the dense baseline stay with the CPU's own
    dense_attention(one.q, one.keys, one.lens, scale=one.scale)
    block_sparse_attention(one.q, one.keys, POWERS, one.lens, scale=one.scale)
    assert dispatches - before == {"triton": 1, "naive": 1, "cpu": 1, "dense-cpu": 1}


def test_an_empty_batch_and_empty_sequences():
    keys = ContiguousKeys(torch.zeros(0, 1, 16), torch.zeros(0, 1, 16), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    lens = Ragged.of([0, 0], [0, 0])
    out, lse = Call(torch.full((3, 2, 16), torch.nan), keys, lens).run(DENSE)
    assert torch.equal(out, torch.zeros(3, 2, 16))
    assert lse.isneginf().all()
