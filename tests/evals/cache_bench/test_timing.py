"""The benchmark of one layer at published sizes: what it measures agrees with the budgets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accel.evals.cache_bench import timing as cache_timing
from accel.evals.cache_bench.__main__ import main
from accel.evals.cache_bench.timing import CacheShape, measure, planted_profile
from accel.patches.hack import HACK
from accel.patches.random_kv import RandomKV

SMALL = CacheShape(32, 4, 3, (1, 2, 3, 4), has_rope=False)


@pytest.mark.parametrize("has_rope", [False, True])
def test_entries_and_bytes_are_those_of_the_budgets(has_rope: bool, tmp_path: Path) -> None:
    shape = CacheShape(32, 4, 3, (1, 2, 3, 4), has_rope=has_rope)
    methods = {
        "random": RandomKV(keep=9),
        "hack": HACK(keep=0.5, profile=str(planted_profile(shape, tmp_path)), alpha=0.5, contextual_share=0.4, allow_other_model=True),
    }
    rows = {row.label: row for row in measure(shape, methods, dtype=torch.float32, device="cpu", repeats=2)}
    assert list(rows) == ["dense", "random", "hack"]
    for row in rows.values():
        assert row.read == row.predicted_read
        assert row.cache_bytes == row.predicted_bytes
        # four scales, and all of them together
        assert len(row.attention) == len(row.select) == len(row.module) == 5
        assert row.module[-1].median >= row.attention[-1].median >= row.select[-1].median
    assert rows["dense"].read == 30
    assert rows["random"].read == 9
    assert rows["hack"].read == 15
    # 2 rows, 4 heads, 14 entries, keys and values of 8 channels in fp32
    assert rows["dense"].cache_bytes == 2 * 4 * 14 * 64
    assert rows["random"].cache_bytes == 2 * 4 * 9 * (64 + 4)
    assert rows["dense"].select[-1].median == 0


def test_the_command_prints_both_baselines_and_writes_its_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(cache_timing.SHAPES, "var-d16", SMALL)
    out = tmp_path / "numbers.json"
    words = ["--shape", "var-d16", "--method", "hack", "--method", "h2o", "--keeps", "0.5", "--repeats", "1", "--warmup", "0", "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("h2o(keep=0.5)", "have a planted one", "as published (fp32 keys", "all 3 layers, 2 rows"):
        assert part in text
    rows = json.loads(out.read_text())["rows"]
    assert [row["label"] for row in rows] == ["dense", "hack(keep=0.5)", "h2o(keep=0.5)"]
    # what can do without a profile has even budgets: 14 entries of which 14 fit, keys and values, and the attention received
    assert rows[2]["cache_bytes"] == 2 * 4 * 14 * (64 + 4)
    assert rows[1]["cache_bytes"] < rows[2]["cache_bytes"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shape", "var-d99"], "no shape 'var-d99'; there are infinity-8b"),
        (["--clock", "processor"], "processor time is that of one thread"),
        (["--method", "flexprefill"], "flexprefill is a sparse-attention method; a cache method is needed"),
        (["--rows", "0"], "rows and repeats must be at least 1"),
    ],
    ids=["shape", "clock", "method", "rows"],
)
def test_what_it_cannot_do_it_says(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
