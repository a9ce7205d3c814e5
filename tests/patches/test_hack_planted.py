"""HACK on models whose heads are known: the real calibration sorts them without a mistake, and selection keeps what they read (§8.2: 15, 16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import CORNERS, PLANTED, STRIPES, calibrate, drawing, info_of, planted_var
from next_scale import last_logits

import accel
from accel.models.var import VAR
from accel.patches._head_profile import HeadProfile
from accel.patches.hack import HACK
from accel.protocols import CompressionContext, HeadGroup, Retain

# a layer of contextual heads alone, a mixed one, one of structural heads alone
HALF = ["CCCC", "SCSC", "SSSS"]


def kinds(method: HACK, model: VAR) -> list[str]:
    info = info_of(model)
    return ["".join("C" if one else "S" for one in row) for row in method.bind(info).plan_for(info).is_contextual]


@pytest.mark.parametrize("n_samples", [1, 2, 3])
@pytest.mark.parametrize(
    "rows, alpha",
    [(HALF, 1 / 2), (["SSCC", "CCCS"], 5 / 8), (["CCCC", "CCSC", "CCCC", "SSSC"], 3 / 4), (["CCCC", "SSSC", "CCCC", "CCCC", "CCCC"], 0.85)],
    ids=["one of each kind", "five of eight", "three quarters", "the edge of the window"],
)  # fmt: skip
def test_planted_heads_are_sorted_without_a_mistake(rows: list[str], alpha: float, n_samples: int, tmp_path: Path) -> None:
    model = planted_var(rows)
    method = calibrate(drawing(model), tmp_path, n_samples=n_samples)
    assert method.alpha == "auto"
    assert kinds(method, model) == rows
    info = info_of(model)
    assert method.bind(info).plan_for(info).alpha == alpha


def test_what_was_measured_of_planted_heads_is_what_was_planted(tmp_path: Path) -> None:
    model = planted_var(HALF)
    method = calibrate(drawing(model), tmp_path, n_samples=2)
    assert method.profile is not None
    profile = HeadProfile.load(method.profile)
    is_contextual = torch.tensor([[letter == "C" for letter in row] for row in HALF])
    # all queries alike; and one-hot rows over the four corners, four queries for each
    assert (profile.sigma[is_contextual] < 1e-9).all()
    torch.testing.assert_close(profile.sigma[~is_contextual], torch.full((6,), 0.75), rtol=0, atol=0.02)
    # three stripes, one in each of the scales 1, 2 and 3; corners are all of scale 2
    torch.testing.assert_close(profile.scale_use[is_contextual][:, 3], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]).expand(6, -1), rtol=0, atol=0.02)
    torch.testing.assert_close(profile.scale_use[~is_contextual][:, 3], torch.tensor([0.0, 0, 1, 0]).expand(6, -1), rtol=0, atol=0.02)
    assert profile.sigma_unconditional is not None
    assert (profile.sigma_unconditional[is_contextual] < 1e-9).all()
    assert profile.header.rank_correlation is not None


def what_is_kept(model: VAR, method: HACK, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], list[set[tuple[int, ...]]]]:
    """By layer and kind: the sets of positions that heads attended to, at every scale at which the method was asked."""
    found: dict[tuple[int, str], list[set[tuple[int, ...]]]] = {}
    select = HACK.select

    def watched(self: HACK, ctx: CompressionContext, group: HeadGroup) -> Retain:
        retain = select(self, ctx, group)
        kept = ctx.position.gather(2, retain.cache_index).flatten(0, 1).tolist()
        found.setdefault((ctx.layer, group.label), []).append({tuple(row) for row in kept})
        return retain

    with monkeypatch.context() as patch, accel.apply(model, method):
        patch.setattr(HACK, "select", watched)
        model.generate_codes([1, 2], seed=0)
    return found


def test_selection_keeps_what_planted_heads_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted_var(HALF)
    calibrate(drawing(model), tmp_path, n_samples=1)
    kept = what_is_kept(model, HACK(profile=str(tmp_path / "profile.safetensors"), **PLANTED), monkeypatch)     # type: ignore[arg-type]
    # the layer without the other kind is never asked about it
    assert set(kept) == {(0, "contextual"), (1, "contextual"), (1, "structural"), (2, "structural")}
    structural = tuple(sorted({*range(5), *CORNERS, *range(14, 30)}))
    for (_, label), rows in kept.items():
        if label == "contextual":
            # scales 1, 2 and 3, each with another stripe, and so far nothing else that is read
            assert all(STRIPES[0] in row for row in rows[0])
            assert all({*STRIPES[:2]} <= set(row) for row in rows[1])
            assert rows[2] == {STRIPES}
        else:
            # 25 entries: they fit before the last scale
            assert rows == [{structural}]


def test_a_budget_of_what_is_read_changes_nothing_and_any_other_of_that_size_does(tmp_path: Path) -> None:
    model = planted_var(HALF)
    path = calibrate(drawing(model), tmp_path, n_samples=1).profile
    dense = last_logits(model, [1, 2])

    def distance(method: Any, **options: Any) -> float:
        with accel.apply(model, method, **options):
            return float((last_logits(model, [1, 2]) - dense).abs().max())

    hack = {"profile": path, "merge": None, **PLANTED}
    assert distance("hack", **hack) < 1e-5
    # the same budgets to the wrong heads, the wrong way to choose, and equal budgets for all
    assert distance("hack", **{**hack, "selectors": "swapped"}) > 1e-3
    others = [distance(name, keep=14) for name in ("streaming_kv", "random_kv")]
    assert min(others) > 1e-3
    # what merges brings something else into the stripes
    assert distance("hack", **{**hack, "merge": "lookm"}) > 1e-3


def test_decoupled_structural_heads_choose_by_the_scale_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted_var(HALF)
    path = calibrate(drawing(model), tmp_path, n_samples=1).profile
    seen: list[tuple[CompressionContext, Retain]] = []
    select = HACK.select

    def watched(self: HACK, ctx: CompressionContext, group: HeadGroup) -> Retain:
        retain = select(self, ctx, group)
        if group.label == "structural" and ctx.step == 3:
            seen.append((ctx, retain))
        return retain

    monkeypatch.setattr(HACK, "select", watched)
    with accel.apply(model, HACK(profile=path, mode="decoupled", keep=12, cache_keep=9)):
        model.generate_codes([1], seed=0)
    assert [ctx.layer for ctx, _ in seen] == [1, 2]
    for ctx, retain in seen:
        # nearly all that is read are entries of scale 2: no other is kept while there are such
        assert ctx.entry_scale is not None
        n = min(int((ctx.entry_scale[0, 0] == 2).sum()), retain.cache_index.shape[2])
        assert n > 0
        assert ((ctx.entry_scale.gather(2, retain.cache_index) == 2).sum(-1) == n).all()
