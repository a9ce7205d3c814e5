"""Block tables shortened by a static pattern: the keys they leave are those of the pattern's mask, for any table, length and page."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accel.kernels.block_sparse import ImplicitPlan, Rows, VerticalSlashPlan
from accel.patches.hosts.vllm.attention.pages import PagePattern, TableBuffers

PAGE = 4
POWERS = ImplicitPlan(block_size=8, window_blocks=2)


def compacted(pattern: PagePattern, table: Tensor, lens: list[int], is_single: list[bool]) -> tuple[Tensor, Tensor]:
    """Shorter table and lengths, in memory full of nonsense."""
    out_table, out_lens = torch.full_like(table, -7), torch.full((len(lens),), -7, dtype=torch.int32)
    pattern.compact(table, torch.tensor(lens, dtype=torch.int32), torch.tensor(is_single), out_table=out_table, out_lens=out_lens)
    return out_table, out_lens


def tokens_read(table: Tensor, length: int) -> list[tuple[int, int]]:
    """(page, place) of every key that vLLM's kernels read."""
    return [(int(table[i // PAGE]), i % PAGE) for i in range(length)]


def tokens_listed(pattern: PagePattern, table: Tensor, length: int) -> list[tuple[int, int]]:
    """The same by the definition: the last query's row of the pattern's mask."""
    mask = pattern.plan.block_mask(Rows(0, 0, 1, length))[0, 0]
    return [(int(table[i // PAGE]), i % PAGE) for i in range(length) if mask[i // pattern.plan.block_size]]


def random_table(rows: int, width: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(rows)
    return (torch.randperm(rows * width, generator=g) + 1).view(rows, width).to(torch.int32)


@settings(max_examples=60)
@given(
    lens=st.lists(st.integers(1, 160), min_size=1, max_size=4), window=st.integers(1, 3), sink=st.integers(0, 2),
    powers=st.booleans(), max_power=st.sampled_from([None, 0, 2]), block=st.sampled_from([4, 8, 12]),
)  # fmt: skip
def test_a_shorter_table_lists_exactly_the_patterns_keys(
    lens: list[int], window: int, sink: int, powers: bool, max_power: int | None, block: int
) -> None:
    pattern = PagePattern(ImplicitPlan(block, window, sink, powers, max_power), PAGE)
    table = random_table(len(lens))
    out, out_lens = compacted(pattern, table, lens, [True] * len(lens))
    for row, n in enumerate(lens):
        assert tokens_read(out[row], int(out_lens[row])) == tokens_listed(pattern, table[row], n)


def test_other_requests_keep_their_pages() -> None:
    # too short, several queries, too long, and a row of padding; the third of all is shortened
    pattern = PagePattern(POWERS, PAGE, first=60, last=150)
    lens, is_single = [59, 100, 100, 151, 0], [True, False, True, True, False]
    table = random_table(5)
    out, out_lens = compacted(pattern, table, lens, is_single)
    assert out_lens.tolist()[:2] == [59, 100]
    assert out_lens[2] < 100
    assert out_lens.tolist()[3:] == [151, 0]
    for row in (0, 1, 3):
        pages = -(-lens[row] // PAGE)
        assert torch.equal(out[row, :pages], table[row, :pages])


def test_no_more_keys_are_read_than_the_bound_says() -> None:
    for longest in range(1, 161):
        for first in (1, 50):
            pattern = PagePattern(POWERS, PAGE, first=first)
            _, out_lens = compacted(pattern, random_table(longest), list(range(1, longest + 1)), [True] * longest)
            assert int(out_lens.max()) <= pattern.most_keys(longest) <= longest
    assert PagePattern(POWERS, PAGE).most_keys(160) < 160
    assert PagePattern(POWERS, PAGE, last=100).most_keys(160) == 160


def test_what_pages_cannot_express_says_why() -> None:
    nothing = torch.zeros(1, 1, 4, dtype=torch.bool)
    assert PagePattern.of(VerticalSlashPlan(8, nothing, nothing), PAGE, first=1, last=None) == "decoding reads other blocks in every head"
    assert PagePattern.of(POWERS, 16, first=1, last=None) == "blocks of 8 tokens are not whole pages of 16"
    assert PagePattern.of(POWERS, 8, first=3, last=9) == PagePattern(POWERS, 8, first=3, last=9)


def test_tables_stay_where_they_are_until_a_step_outgrows_them() -> None:
    buffers = TableBuffers()
    with torch.inference_mode():
        table, lens = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        first, first_lens = buffers.take(table, lens, rows=4)
    # graphs are captured in inference mode, and replayed anywhere
    first.fill_(1)
    again, again_lens = buffers.take(table[:1].expand(4, 5), lens[:1].expand(4), rows=4)
    assert again.data_ptr() == first.data_ptr()
    assert again_lens.data_ptr() == first_lens.data_ptr()
    assert (first.shape, again.shape) == ((2, 5), (4, 5))
    assert again.is_contiguous()
    assert buffers.take(table[:1].expand(5, 5), lens[:1].expand(5), rows=4)[0].shape == (5, 5)


@pytest.mark.parametrize("length", [1, 8, 9, 17, 200])
def test_a_request_shorter_than_the_first_sparse_length_is_not_shortened(length: int) -> None:
    pattern = PagePattern(POWERS, PAGE, first=100)
    assert pattern.shortens(torch.tensor([length])).tolist() == [length >= 100]
