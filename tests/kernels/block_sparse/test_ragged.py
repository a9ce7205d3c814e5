"""What a batch of sequences says of itself before anybody reads its tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.kernels.block_sparse import Ragged
from accel.kernels.block_sparse.ragged import gapless_rows


@pytest.mark.parametrize(
    "q_len, q_start, n",
    [
        ([5, 3], None, 8),
        ([5, 3], [0, 6], 5),
        ([5, 3], [1, 6], 0),
        ([3, 5], [5, 0], 8),
        ([5, 3], [0, 2], 5),
        ([4, 0, 2], [0, 9, 4], 6),
        ([], None, 0),
    ],
    ids=["behind one another", "gap between", "gap before", "out of order", "overlap", "an empty one elsewhere", "no sequence"],
)
def test_rows_without_a_gap_are_counted_from_the_first(q_len, q_start, n):
    assert Ragged.of(q_len, q_len, q_start=q_start).n_gapless == n


def test_nothing_is_claimed_of_tensors_that_nobody_read():
    at = torch.tensor([0])
    assert Ragged(at, at + 8, at + 8, max_q=8, max_kv=8).n_gapless == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=8))
def test_every_row_that_is_counted_belongs_to_a_sequence_and_the_next_to_none(sequences):
    owned = {row for start, length in sequences for row in range(start, start + length)}
    n = gapless_rows(*zip(*sequences, strict=True)) if sequences else 0
    assert set(range(n)) <= owned
    assert n not in owned
