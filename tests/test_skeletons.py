"""The three protocols carry all six planned methods: their skeletons type-check, are built, and run on small inputs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, ImplicitPlan, Ragged, VerticalSlashPlan
from accel.protocols import (
    AttentionContext,
    AttentionStep,
    CompressionContext,
    HeadGroup,
    KVCompression,
    Method,
    ModelInfo,
    PruningContext,
    RunDense,
    SparseAttention,
    Stage,
    TokenPruning,
    Unit,
)

ROOT = Path(__file__).parent.parent
SOURCE = Path(__file__).parent / "data" / "method_skeletons.py"
KINDS = {
    "FasterVLM": TokenPruning, "VFlowOpt": TokenPruning, "DyVTE": TokenPruning,
    "HACK": KVCompression, "HeavyHitters": KVCompression, "FlexLike": SparseAttention,
}  # fmt: skip
INFO = ModelInfo("llama", 12, 4, 4, 8, ("full_attention",) * 12, "cpu", "float32", has_vision=True, hidden_size=8)
NEXT_SCALE = replace(INFO, scale_shapes=((1, 1), (2, 2), (3, 3), (4, 4)))


@pytest.fixture(scope="module")
def skeletons() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_skeletons", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["method_skeletons"] = module
    spec.loader.exec_module(module)
    return module


# --- types --------------------------------------------------------------------------------------------------------------------


def type_errors(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # absent where only the oldest supported libraries are installed
    mypy = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    report, trouble, _ = mypy.run(["--strict", str(path)])
    assert trouble == ""
    return "" if report.startswith("Success") else report


def test_the_skeletons_type_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type_errors(SOURCE, monkeypatch) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("self, stage: Stage, units: Sequence[Unit]) -> list[int] | None", "self, units: Sequence[Unit]) -> list[int] | None", "count"),
        ("-> BlockPlan | RunDense:", "-> BlockPlan | RunDense | str:", "plan"),
        ("ctx.q_position[:, -1", "ctx.query_position[:, -1", "query_position"),
        ("hidden=image & fired", "masked=image & fired", "masked"),
    ],
    ids=["signature", "answer", "what is seen", "what is returned"],
)
def test_a_method_that_strays_from_the_protocols_is_found(
    right: str, wrong: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SOURCE.read_text()
    assert right in text
    strayed = tmp_path / "strayed.py"
    strayed.write_text(text.replace(right, wrong))
    assert complaint in type_errors(strayed, monkeypatch)


def test_all_six_are_built_with_their_kind(skeletons: ModuleType) -> None:
    classes = {name: cls for name, cls in vars(skeletons).items() if isinstance(cls, type) and issubclass(cls, Method)}
    found = {name: cls for name, cls in classes.items() if cls.__module__ == skeletons.__name__}
    assert {name: cls.__mro__[1] for name, cls in found.items()} == KINDS
    for cls in found.values():
        method = cls()
        assert hash(method) == hash(cls())
        assert method.changed_options() == {}
        bound = method.bind(NEXT_SCALE)
        assert bound == method
        # what was loaded is no option, so that a recipe written from a bound method is the user's
        assert bound.options() == method.options()
        assert not any(name.startswith("_") for name in bound.options())


# --- token pruning ------------------------------------------------------------------------------------------------------------

# one sequence: 2 text, a 4×4 image with a newline behind each row, 3 text; another: left padding, a 2×4 image, 2 text
UNITS = [Unit(0, 16, 4, 4, n_structural=4), Unit(1, 8, 2, 4, n_structural=2)]
TOKENS = 25


def picture(stage: Stage, observed: dict[str, torch.Tensor], **changes: Any) -> PruningContext:
    masks = {name: torch.zeros(2, TOKENS, dtype=torch.bool) for name in ("is_visual", "is_structural", "is_text")}
    unit = torch.full((2, TOKENS), -1)
    place = torch.full((2, TOKENS, 3), -1)
    for b, (start, height) in enumerate([(2, 4), (13, 2)]):
        at = torch.arange(height * 5)
        masks["is_visual"][b, start + at] = at % 5 < 4
        masks["is_structural"][b, start + at] = at % 5 == 4
        unit[b, start + at] = b
        place[b, start + at] = torch.stack([torch.zeros_like(at), at // 5, at % 5], 1)
    masks["is_text"][0] = unit[0] < 0
    masks["is_text"][1, 23:] = True
    features = torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    return PruningContext(stage, UNITS, features, unit=unit, place=place, observed=observed, **{**masks, "state": {}, **changes})


def attention_rows() -> torch.Tensor:
    return torch.rand(2, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("newline", ["all", "nonempty", "none"])
def test_fastervlm_keeps_the_promised_tokens_and_the_newlines_of_their_rows(skeletons: ModuleType, newline: str) -> None:
    method = skeletons.FasterVLM(keep=0.25, newline=newline)
    [stage] = method.stages(INFO)
    rows = attention_rows()
    ctx = picture(stage, {"cls_row": rows})
    keep = method.select(ctx)
    promised = method.count(stage, UNITS)
    assert (promised is None) == (newline == "nonempty")
    for b, height in enumerate([4, 2]):
        index = keep.index[b, keep.ok[b]]
        assert (index.diff() > 0).all()
        visual = index[ctx.is_visual[b, index]]
        best = set(rows[b, : 4 * height].topk(height).indices.tolist())
        assert {int(r * 4 + c) for _, r, c in ctx.place[b, visual]} == best
        kept_rows = ctx.place[b, index[ctx.is_structural[b, index]], 1].tolist()
        expected = {"all": range(height), "none": [], "nonempty": sorted({i // 4 for i in best})}[newline]
        assert kept_rows == list(expected)
        if promised is not None:
            assert len(index) == promised[b]


def test_vflowopt_carries_merges_and_scores_from_stage_to_stage(skeletons: ModuleType) -> None:
    method = skeletons.VFlowOpt(shares=(0.5, 0.75, 0.5), alpha=0.1).bind(INFO)
    assert [o.what for o in method.observe()] == ["mean_received", "mean_selected_rows", "pixel_map"]
    assert method.select_rows(attention_rows()).sum(-1).tolist() == [1, 1]
    stages = method.stages(INFO)
    pixels = torch.randint(0, 256, (16, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    ctx = picture(stages[0], {"mean_selected_rows": attention_rows(), "pixel_map": method.map_pixels(pixels).expand(2, -1)})
    keep = method.select(ctx)
    assert keep.ok.sum(1).tolist() == method.count(stages[0], UNITS) == [12, 6]
    assert keep.merge is not None
    for b in range(2):
        real = keep.merge.weight[b] > 0
        kept = keep.index[b, keep.ok[b]]
        # nothing is lost: every visual token stays or is a source, and the weights of an anchor sum to one
        gone = set(ctx.is_visual[b].nonzero().flatten().tolist()) - set(kept.tolist())
        assert gone <= set(keep.merge.source[b, real].tolist())
        assert torch.isin(keep.merge.anchor[b, real], kept).all()
        total = torch.zeros(TOKENS).index_add(0, keep.merge.anchor[b, real], keep.merge.weight[b, real])
        torch.testing.assert_close(total[total > 0], torch.ones(int((total > 0).sum())))
    # what a host does between the stages: survivors and text, with the scores beside them
    survivors = ctx.is_text.clone()
    for b in range(2):
        survivors[b, keep.index[b, keep.ok[b]]] = True
    scores = torch.zeros(2, TOKENS).scatter(1, keep.index, keep.scores.masked_fill(~keep.ok, 0))
    masks = {name: getattr(ctx, name) & survivors for name in ("is_visual", "is_structural", "is_text")}
    later = replace(ctx, stage=stages[1], observed={}, scores=scores, **masks)
    assert method.select(later).ok.sum(1).tolist() == method.count(stages[1], UNITS) == [10, 5]
    assert method.count(stages[2], UNITS) == [7, 4]


def test_dyvte_hides_early_exits_until_every_row_with_an_image_has_fired(skeletons: ModuleType) -> None:
    unbound = skeletons.DyVTE()
    with pytest.raises(UnsupportedError, match="hidden size"):
        unbound.bind(replace(INFO, hidden_size=None))
    method = unbound.bind(INFO)
    stages = method.stages(INFO)
    assert [stage.layer for stage in stages] == [4, 6, 8, 10, 12][: len(stages)]
    assert all(stage.needs_learned_choice for stage in stages)
    assert unbound.stages(INFO) == []
    # both logits of the dummy router are equal, so the threshold alone decides
    ctx = picture(stages[0], {})
    assert skeletons.DyVTE(threshold=0.5).bind(INFO).select(ctx) is None
    early = replace(ctx, state={"fired": torch.tensor([True, False])})
    keep = method.select(early)
    assert torch.equal(keep.hidden, (ctx.is_visual | ctx.is_structural) & torch.tensor([[True], [False]]))
    assert keep.ok.sum(1).tolist() == [20, 10]
    gone = skeletons.DyVTE(threshold=0.4).bind(INFO).select(ctx)
    assert gone.index.shape == (2, 0)
    assert gone.hidden is None


# --- KV compression -----------------------------------------------------------------------------------------------------------


def cache_context(group: HeadGroup, n: int, step: int, **changes: Any) -> CompressionContext:
    """Two sequences, two query heads per head of the group, the last 4 entries new."""
    generator = torch.Generator().manual_seed(n)
    heads = len(group.heads)
    q, k, v = (torch.randn(2, h, rows, 8, generator=generator) for h, rows in ((2 * heads, 4), (heads, n), (heads, n)))
    entries = {
        "position": torch.arange(n).expand(2, heads, n),
        "valid": torch.ones(2, heads, n, dtype=torch.bool),
        "q_position": torch.arange(n - 4, n).expand(2, 4),
    }
    return CompressionContext(layer=1, step=step, q=q, k=k, v=v, scale=0.3, **{**entries, **changes})


def test_hack_keeps_its_budgets_and_merges_at_the_last_scale(skeletons: ModuleType) -> None:
    with pytest.raises(UnsupportedError, match="next-scale"):
        skeletons.HACK().bind(INFO)
    method = skeletons.HACK(renorm_keys=True).bind(NEXT_SCALE)
    assert [w.moment for w in method.when] == ["before_attention"]
    groups = method.groups(NEXT_SCALE, 1, step=3, n_entries=30)
    assert sorted(h for g in groups for h in g.heads) == [0, 1, 2, 3]
    assert {g.label: g.budget for g in groups} == {"contextual": 3, "structural": 15}
    for group in groups:
        ctx = cache_context(group, 30, 3, scale_shapes=NEXT_SCALE.scale_shapes, has_guidance_pairs=True)
        retain = method.select(ctx, group)
        assert retain.cache_index.shape == (2, 2, group.budget)
        assert (retain.cache_index.diff(dim=-1) > 0).all()
        assert torch.equal(retain.cache_index[0], retain.cache_index[1])
        assert (retain.merge is not None) == retain.renorm_keys == (group.label == "contextual")
        if retain.merge is None:
            assert (retain.cache_index >= 30 - 16).all()
            continue
        # (Σ weight · key) is the mean of an anchor and its similar keys; each entry is used once
        assert torch.equal(retain.merge.source.sort(-1).values, torch.arange(30).expand(2, 2, 30))
        assert torch.isin(retain.merge.anchor, retain.cache_index).all()
    assert [method.release(NEXT_SCALE, 1, step=step) for step in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("score", ["mass", "last_queries"])
def test_heavy_hitters_keep_sinks_window_and_protected_entries_and_never_padding(skeletons: ModuleType, score: str) -> None:
    method = skeletons.HeavyHitters(keep=20, window=6, score=score)
    assert [w.moment for w in method.when] == ["after_prefill", "every_n_steps"]
    assert method.needs().attention_mass == (score == "mass")
    [group] = method.groups(INFO, 11, step=0, n_entries=60)
    valid = torch.ones(2, 4, 60, dtype=torch.bool)
    valid[1, :, 5:57] = False
    protected = torch.zeros(2, 50, dtype=torch.bool)
    protected[0, 33] = True
    mass = torch.rand(2, 4, 60, generator=torch.Generator().manual_seed(0))
    retain = method.select(cache_context(group, 60, 0, valid=valid, protected=protected, attention_mass=mass), group)
    assert retain.cache_index.shape == (2, 4, group.budget) == (2, 4, 10)
    # sinks and the newest six outnumber the budget by nothing but the protected entry
    for head in range(4):
        assert set(retain.cache_index[0, head].tolist()) <= {0, 1, 2, 3, 33, *range(54, 60)}
        assert retain.cache_index[1, head, retain.ok[1, head]].tolist() == [0, 1, 2, 3, 4, 57, 58, 59]


# --- sparse attention ---------------------------------------------------------------------------------------------------------


def test_flexlike_plans_from_pooled_keys_and_is_static_where_told(skeletons: ModuleType) -> None:
    method = skeletons.FlexLike(static_layers=(1,))
    q, k = (torch.randn(100, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    lens = Ragged.of([100], [100])
    keys = ContiguousKeys(k, k, torch.tensor([0]), torch.tensor([100]))
    step = AttentionStep(0, 2, 1, 100, 100, 4, 2, 8, "cpu", "float32")
    state: dict[str, Any] = {}
    ctx = AttentionContext(step, lens, 0.3, state=state)
    plan = method.plan(q, keys, ctx)
    assert isinstance(plan, VerticalSlashPlan)
    assert plan.vertical.sum(-1).tolist() == [[2, 2, 2, 2]]
    assert state
    assert method.plan(q * torch.nan, keys, ctx) == RunDense("NaN in the probe")
    assert method.static_pattern(step) is None
    assert method.static_pattern(replace(step, layer=1)) == ImplicitPlan(16, 2)
