"""The operator benchmark measures what it says: the asked density, both baselines, the same numbers of rounds."""

from __future__ import annotations

import pytest
import torch

from accel.evals import operator_bench
from accel.evals.operator_bench import Inputs, main, operator_table, path_name, random_lists
from accel.kernels.block_sparse.cpu_probe import Route


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))


def test_random_lists_hold_sink_and_own_block_and_the_asked_share():
    inputs = Inputs.random(4096, (4, 2), 8, torch.float32, seed=0)
    plan = random_lists(inputs, 0.25, seed=0)
    mask = plan.block_mask(next(inputs.lens.rows()))
    assert mask[:, :, 0].all()
    assert torch.diagonal(mask, dim1=-2, dim2=-1).all()
    assert plan.density(inputs.lens, 4) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(mask[0], mask[1])
    # forced blocks alone exceed a very small density: the true one is reported
    assert random_lists(inputs, 0.0, seed=0).density(inputs.lens, 4) == pytest.approx((2 * 32 - 1) / (32 * 33 / 2))


def test_table_has_a_row_per_length_and_density_with_both_ratios(monkeypatch):
    threads = torch.get_num_threads()
    rows = operator_table([256, 384], [0.5, 1.0], heads=(2, 1), head_dim=16, dtype=torch.float32, threads=1, repeats=2)
    assert [(r["tokens"], r["density"]) for r in rows] == [(256, 0.5), (256, 1.0), (384, 0.5), (384, 1.0)]
    assert rows[1]["true_density"] == 1.0
    for row in rows:
        assert row["sparse_p20_ms"] <= row["sparse_ms"] <= row["sparse_p80_ms"]
        assert min(row["to_sdpa"], row["to_dense"], row["plan_ms"], row["sdpa_ms"], row["dense_ms"]) > 0
        assert row["efficiency"] == pytest.approx(row["true_density"] / max(row["to_sdpa"], row["to_dense"]))
    assert torch.get_num_threads() == threads


def test_contestants_run_in_turn():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = operator_bench.interleaved(runs, 2)
    assert order == list("ababab")
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_main_prints_the_table(capsys):
    assert main(["--lengths", "256", "--densities", "0.5", "--heads", "2,1", "--head-dim", "16", "--dtype", "float32", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "to sdpa" in printed
    assert "256" in printed


@pytest.mark.parametrize(
    "route, name",
    [
        (Route("sdpa", torch.bfloat16, torch.bfloat16), "torch"),
        (Route("gemm"), "gemm fp32/fp32"),
        (Route("gemm", torch.float32, torch.bfloat16, is_routed=True), "gemm fp32/bf16, routed"),
    ],
)
def test_paths_have_short_names(route, name):
    assert path_name(route) == name
