"""Plans say the same in every encoding, and their steps cover every listed tile exactly once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NoHostReads

from accel.kernels.block_sparse import ImplicitPlan, ListPlan, Ragged, Rows, VerticalSlashPlan
from accel.kernels.block_sparse.cpu_steps import schedule


@st.composite
def one_sequence(draw, most=40):
    block = draw(st.sampled_from([1, 2, 16, 32]))
    n = draw(st.integers(1, most * block))
    return Rows(0, 0, draw(st.integers(1, n)), n), block


@st.composite
def masks(draw, heads=(1, 2, 4)):
    rows, block = draw(one_sequence(most=12))
    shape = (draw(st.sampled_from(heads)), rows.query_blocks(block), rows.key_blocks(block))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mask = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return rows, block, mask & torch.ones(shape[1:], dtype=torch.bool).tril(rows.first_block(block))


@settings(max_examples=60)
@given(one_sequence(), st.integers(1, 6), st.integers(0, 3), st.booleans(), st.none() | st.integers(0, 5))
def test_implicit_plan_lists_what_its_mask_shows(sequence, window, sink, powers, max_power):
    rows, block = sequence
    plan = ImplicitPlan(block, window, sink, powers, max_power)
    mask = plan.block_mask(rows)[0]
    for at in range(mask.shape[0]):
        blocks = plan.row_blocks(rows.first_block(block) + at)
        assert blocks == sorted(set(blocks))
        assert blocks == mask[at].nonzero()[:, 0].tolist()


@settings(max_examples=60)
@given(masks())
def test_list_plan_gives_back_its_mask_without_duplicates(found):
    rows, block, mask = found
    lens = Ragged.of([rows.q_len], [rows.kv_len])
    plan = ListPlan.from_mask([mask], lens, block)
    assert torch.equal(plan.block_mask(rows), mask)
    for count, index in ((plan.mask_count, plan.mask_index), (plan.full_count, plan.full_index)):
        for row, n in zip(index.flatten(0, 2), count.flatten(), strict=True):
            listed = row[: int(n)].tolist()
            assert listed == sorted(set(listed))
    assert int(plan.mask_count.max()) <= 1


def test_list_plan_refuses_a_row_longer_than_its_capacity():
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    lens = Ragged.of([64], [64])
    assert ListPlan.from_mask([mask], lens, 16, capacity=4).full_index.shape[-1] == 4
    with pytest.raises(ValueError, match="4 key blocks, but the capacity is 3"):
        ListPlan.from_mask([mask], lens, 16, capacity=3)


@settings(max_examples=80)
@given(masks(heads=(1, 4)), st.booleans(), st.integers(1, 20))
def test_steps_cover_every_listed_tile_once(found, are_alike, max_blocks):
    rows, block, mask = found
    if are_alike:
        mask = mask[:1].expand_as(mask)
    n_heads, group = 4, 2
    nk = mask.shape[2]
    seen = torch.zeros(n_heads, *mask.shape[1:], dtype=torch.int64)
    empty = torch.zeros(n_heads, mask.shape[1], dtype=torch.int64)
    for kv_heads in (range(0, 1), range(1, 2)):
        todo = schedule(mask, kv_heads, group, rows.first_block(block), max_blocks)
        assert todo.heads_per_tile == (group if mask.shape[0] == 1 or are_alike else todo.heads_per_tile)
        for step in todo.steps:
            assert len(step.tiles) == 1 or len(step.tiles) * step.n_blocks * todo.heads_per_tile <= max_blocks
            assert step.blocks.shape == (len(step.tiles), step.n_blocks)
            for (kv, first, i), blocks in zip(step.tiles, step.blocks.tolist(), strict=True):
                heads = slice((kv_heads.start + kv) * group + first, (kv_heads.start + kv) * group + first + todo.heads_per_tile)
                assert blocks == sorted(set(blocks))
                assert step.has_diagonal == (blocks[-1] - kv * nk == rows.first_block(block) + i)
                if step.run is not None:
                    assert blocks == list(range(step.run, step.run + step.n_blocks))
                for j in blocks:
                    seen[heads, i, j - kv * nk] += 1
        for kv, first, i in todo.empty:
            begin = (kv_heads.start + kv) * group + first
            empty[begin : begin + todo.heads_per_tile, i] += 1
    want = mask.expand(n_heads, -1, -1)
    assert torch.equal(seen, want.long())
    assert torch.equal(empty, (~want.any(-1)).long())


def test_heads_with_the_same_lists_share_a_tile():
    alike, different = torch.ones(4, 3, 3, dtype=torch.bool).tril(), torch.ones(4, 3, 3, dtype=torch.bool).tril()
    different[3, 2, 1] = False
    assert schedule(alike, range(2), 2, 0, 64).heads_per_tile == 2
    assert schedule(different, range(2), 2, 0, 64).heads_per_tile == 1
    # only heads of the same KV head need agree
    assert schedule(different, range(1), 2, 0, 64).heads_per_tile == 2


@pytest.mark.parametrize("heads, density", [(2, 0.5), (1, 0.75)])
def test_density_counts_causal_tiles_only(heads, density):
    mask = torch.eye(2, dtype=torch.bool)[None].repeat(heads, 1, 1)
    mask[0, 1, 0] = heads == 1
    lens = Ragged.of([32], [32])
    plan = ListPlan.from_mask([mask], lens, 16)
    assert plan.tiles(lens, 4) == ((12, 12) if heads == 1 else (8, 12))


@st.composite
def ragged(draw):
    kv_len = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    return Ragged.of([draw(st.integers(0, n)) for n in kv_len], kv_len)


@settings(max_examples=60)
@given(ragged(), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 4]), st.integers(0, 2**20))
def test_tiles_are_counted_as_the_masks_say_and_without_reading_a_value(lens, block, heads, seed):
    g = torch.Generator().manual_seed(seed)
    all_rows = list(lens.rows())
    nk, nq = (max(1, *(count(rows) for rows in all_rows)) for count in (lambda r: r.key_blocks(block), lambda r: r.query_blocks(block)))
    vertical, slash = (torch.rand(lens.batch, heads, nk, generator=g) < 0.4 for _ in range(2))
    lines = VerticalSlashPlan(block, vertical, slash)
    beside = VerticalSlashPlan(block, vertical, slash, torch.rand(lens.batch, heads, nq, nk, generator=g) < 0.3)
    lists = ListPlan.from_mask([beside.block_mask(rows) for rows in all_rows], lens, block)
    implicit = [ImplicitPlan(block, 2, 1), ImplicitPlan(block, 1, 0, max_power=1), ImplicitPlan(block, 2, 3, powers=False), ImplicitPlan.dense(block)]
    for plan in (lines, beside, lists, *implicit):
        masks = [plan.block_mask(rows) for rows in all_rows]
        want = [sum(int(m.sum()) * (heads // m.shape[0]) for m in masks), heads * sum(rows.causal_tiles(block) for rows in all_rows)]
        with NoHostReads():
            found = plan.tile_counts(lens, heads)
        assert found.tolist() == want


def test_a_plan_moves_with_all_of_its_tensors():
    lines, tiles = torch.ones(1, 2, 3, dtype=torch.bool), torch.ones(1, 2, 3, 3, dtype=torch.bool)
    here = VerticalSlashPlan(16, lines, lines, tiles)
    assert here.to(torch.device("cpu")) is here
    there = here.to(torch.device("meta"))
    assert {there.vertical.device.type, there.slash.device.type, there.extra.device.type} == {"meta"}
    assert there.block_size == 16
    assert here.extra.device.type == "cpu"
    implicit = ImplicitPlan.dense(16)
    assert implicit.to(torch.device("meta")) is implicit
