"""Positions of prompts whose pictures have lost tokens: those that stay have the ones of the whole prompt."""

from __future__ import annotations

import pytest
import torch

from accel.patches.hosts.vllm.models.positions import CHANNELS, grid_offsets, prompt_positions, split_offsets, with_offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_offsets_survive_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 4).to(dtype)
    offsets = torch.tensor([[0, 0, 0], [1, 255, 256], [257, 585, 1023], [65535, 65536, 300], [256**3 - 1, 2, 3]])
    features, found = split_offsets(with_offsets(rows, offsets))
    assert with_offsets(rows, offsets).shape == (5, 4 + CHANNELS)
    assert torch.equal(features, rows)
    assert torch.equal(found, offsets)


def test_offsets_follow_the_grid_row_by_row() -> None:
    assert grid_offsets(1, 2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    # steps of 1.5 positions, rounded down
    assert grid_offsets(3, 1, 1, 1.5)[:, 0].tolist() == [0, 1, 3]


def test_text_stands_where_it_stands_beside_whole_pictures() -> None:
    # two words, a picture of 4 × 6 tokens of which three are left, one word, a picture of 2 × 2 of which all are, two words
    found, delta = prompt_positions(2 + 3 + 1 + 4 + 2, [(2, 3, 6), (6, 4, 2)])
    assert found.shape == (3, 12)
    assert found[0].tolist() == [0, 1, 2, 2, 2, 8, 9, 9, 9, 9, 11, 12]
    assert torch.equal(found[0], found[1])
    # the answer goes on at 13, which is place 12
    assert delta == 1


def test_a_prompt_may_end_with_a_picture_and_hold_none() -> None:
    found, delta = prompt_positions(4, [(1, 3, 5)])
    assert found[0].tolist() == [0, 1, 1, 1]
    assert delta == 6 - 4
    assert prompt_positions(3, [])[0][0].tolist() == [0, 1, 2]
    assert prompt_positions(3, [])[1] == 0
