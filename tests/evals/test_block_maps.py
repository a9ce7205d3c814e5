"""Block maps say exactly which tiles a plan holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from accel.evals.block_maps import HeadMaps
from accel.kernels.block_sparse.plan import BlockPlan, ImplicitPlan, ListPlan
from accel.kernels.block_sparse.ragged import Ragged
from accel.protocols import AttentionStep

STEP = AttentionStep(
    layer=0, n_layers=4, batch=1, q_len=500, kv_len=500, n_heads=2, n_kv_heads=1, head_dim=64, device="cpu", dtype="float32"
)
LENS = Ragged.of([500], [500])
WINDOW = ImplicitPlan(128, window_blocks=1, sink_blocks=1, powers=False)


def two_heads() -> BlockPlan:
    """Head 0 reads its own block only, head 1 everything."""
    import torch

    own = torch.eye(4, dtype=torch.bool)
    return ListPlan.from_mask([torch.stack([own, torch.ones(4, 4, dtype=torch.bool).tril()])], LENS, 128)


def recorded(*calls: tuple[int, BlockPlan]) -> HeadMaps:
    maps = HeadMaps()
    for layer, plan in calls:
        maps.record(step=replace(STEP, layer=layer), plan=plan, lens=LENS)
    return maps


def test_a_map_lists_the_causal_tiles_row_by_row() -> None:
    found = recorded((2, WINDOW)).as_dict("window", [(2, 1)])
    assert found["maps"] == [{"layer": 2, "head": 1, "density": pytest.approx(7 / 10), "rows": ["1", "11", "101", "1001"]}]
    assert (found["label"], found["block_size"], found["tokens"], found["n_layers"]) == ("window", 128, 500, 4)
    assert found["density"] == {"2": [0.7, 0.7]}


def test_density_is_per_head() -> None:
    assert recorded((1, two_heads())).head_density() == {1: [pytest.approx(0.4), 1.0]}


def test_rows_of_a_continued_prompt_keep_their_prefix() -> None:
    maps = HeadMaps()
    maps.record(step=replace(STEP, q_len=128, kv_len=384), plan=WINDOW, lens=Ragged.of([128], [384]))
    assert maps.as_dict("window", [(0, 0)])["maps"][0]["rows"] == ["101"]
    assert maps.head_density() == {0: [pytest.approx(2 / 3)] * 2}


def test_equal_maps_are_shown_once() -> None:
    assert recorded((0, WINDOW), (1, WINDOW)).typical_heads(3) == [(0, 0)]


def test_typical_heads_run_from_sparse_to_dense() -> None:
    assert recorded((0, WINDOW), (3, two_heads())).typical_heads(3) == [(3, 0), (0, 1), (3, 1)]


def test_decoding_steps_are_not_recorded() -> None:
    maps = HeadMaps()
    maps.record(step=replace(STEP, q_len=1), plan=WINDOW, lens=Ragged.of([1], [500]))
    assert maps.masks == {}
    assert maps.typical_heads() == []
