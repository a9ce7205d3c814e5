"""HACK while a model draws: the invariants of kv-compression.md §8.2 that need a cache (1, 3–5, 8, 12, 22–24)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import info_of, profile_of, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from next_scale import INFO, SHAPES, context, last_logits, tiny_infinity, tiny_var
from torch import Tensor

import accel
from accel.models.cache import Schedule
from accel.patches.hack import HACK
from accel.patches.hosts.nextscale.cache import CompressedCache
from accel.protocols import CompressionContext, HeadGroup, ModelInfo, Retain
from accel.stats import CacheStats

ROWS = ["CSCS", "SCCS"]
CONTEXTUAL, STRUCTURAL = HeadGroup((0, 1, 2, 3), 9, "contextual"), HeadGroup((0, 1, 2, 3), 9, "structural")
# of the ends of the scales
ENDS = (1, 5, 14, 30)


@dataclass(frozen=True, kw_only=True)
class Watched(HACK):
    """Calls `seen` with everything that was asked and answered."""

    seen: Callable[[CompressionContext, HeadGroup, Retain], None] = lambda ctx, group, retain: None

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        retain = super().select(ctx, group)
        self.seen(ctx, group, retain)
        return retain


def bound(method: HACK, rows: list[str], info: ModelInfo = INFO) -> Any:
    """The method as `bind` would return it, without a file."""
    found: Any = replace(method, profile="made up")
    object.__setattr__(found, "_profile", profile_of(rows, info))
    return found


# --- equal to dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1.0}, {"keep": 30}, {"keep": 30, "contextual_share": 1}, {"keep": 1.0, "alpha": 1},
        {"keep": 1.0, "mode": "decoupled", "cache_keep": 1.0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["var", "infinity"])
def test_all_kept_is_bit_equal_to_dense_and_codes_are_the_same(
    options: dict[str, Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_var() if family == "var" else tiny_infinity()
    monkeypatch.setattr(model, "default_schedule", lambda: Schedule(SHAPES))
    inputs: Any = [1, 2] if family == "var" else [torch.ones(3, 24)]
    extra: dict[str, Any] = {} if family == "var" else {"schedule": [1, 2, 3, 4]}
    dense, codes = last_logits(model, inputs, **extra), model.generate_codes(inputs, seed=3, **extra)[0]
    with accel.apply(model, HACK(profile=saved(tmp_path, ROWS, info_of(model)), **options)) as handle:
        assert torch.equal(last_logits(model, inputs, **extra), dense)
        again = model.generate_codes(inputs, seed=3, **extra)[0]
        assert handle.stats.cache.kept_share == 1
    assert all(torch.equal(a, b) for a, b in zip(codes, again, strict=True))


def test_it_differs_from_dense_while_on_and_is_gone_behind(tmp_path: Path) -> None:
    model = tiny_var()
    dense = last_logits(model, [1, 2])
    with accel.apply(model, "hack", profile=saved(tmp_path, ROWS, info_of(model)), keep=0.4) as handle:
        compressed = last_logits(model, [1, 2])
        assert not torch.allclose(compressed, dense, atol=1e-3)
        assert torch.equal(last_logits(model, [1, 2]), compressed)
        with handle.paused():
            assert torch.equal(last_logits(model, [1, 2]), dense)
    assert torch.equal(last_logits(model, [1, 2]), dense)


# --- what is dropped, and how much --------------------------------------------------------------------------------------------


def test_dropping_one_entry_drops_the_one_with_the_least_attention() -> None:
    ctx = context(14)
    received = (ctx.q @ ctx.k.mT).softmax(-1).sum(2)
    index = HACK(n_queries=None).select(ctx, replace(CONTEXTUAL, budget=29)).cache_index
    for row in range(2):
        for head in range(4):
            assert set(range(30)) - set(index[row, head].tolist()) == {int(received[row, head].argmin())}
    # structural heads drop the one of those between
    index = HACK(n_queries=None).select(ctx, replace(STRUCTURAL, budget=29)).cache_index
    for row in range(2):
        for head in range(4):
            assert set(range(30)) - set(index[row, head].tolist()) == {5 + int(received[row, head, 5:14].argmin())}


@pytest.mark.parametrize("keep, share", [(12, 0.5), (0.4, "auto"), (15, 1.0)])
def test_every_head_holds_and_reads_exactly_its_budget_at_every_scale(keep: float, share: Any, tmp_path: Path) -> None:
    model = tiny_var()
    method = HACK(profile=saved(tmp_path, ROWS, info_of(model)), keep=keep, contextual_share=share)
    plan = method.bind(info_of(model)).plan_for(info_of(model))
    with accel.apply(model, method) as handle:
        last_logits(model, [1, 2, 3])
    cache = handle.stats.cache
    for scale, end in enumerate(ENDS):
        per_row = sum(
            min(end, plan.contextual[layer] if kind == "C" else plan.structural[layer]) for layer, row in enumerate(ROWS) for kind in row
        )
        assert cache.total[scale] == 6 * 8 * end
        assert cache.attended[scale] == 6 * per_row
        assert cache.cached[scale] == (6 * per_row if scale < 3 else 0)
    assert cache.attended[3] == 6 * plan.n_entries()


def run(method: Any, *, rows: int = 2, layers: int = 2, counters: CacheStats | None = None) -> tuple[CompressedCache, Tensor, Tensor]:
    """A cache that has come to the last scale but one, and all keys and values of layer 1."""
    found = counters or CacheStats()
    cache = CompressedCache(Schedule(SHAPES), method, INFO, counters=lambda: found, is_guided=False)
    keys, values = [], []
    for scale in range(3):
        cache.begin(scale)
        for layer in range(layers):
            draw = torch.Generator().manual_seed(10 * scale + layer)
            q, k, v = torch.randn(3, rows, 4, SHAPES[scale][0] ** 2, 8, generator=draw)
            cache.attend(layer, q, k, v)
        keys.append(k)
        values.append(v)
    return cache, torch.cat(keys, 2), torch.cat(values, 2)


def test_kept_entries_keep_their_order_and_their_bits() -> None:
    seen: list[CompressionContext] = []
    method = bound(Watched(keep=8, contextual_share=0.5, seen=lambda ctx, group, retain: seen.append(ctx)), ROWS)
    cache, keys, values = run(method)
    _, position = cache.entries(1)
    # layer 1 is SCCS; −1 pads
    assert (position >= 0).sum(-1).tolist() == [[12, 4, 4, 12]] * 2
    for row in range(2):
        for head in range(4):
            own = [place for place in position[row, head].tolist() if place >= 0]
            assert own == sorted(set(own))
    seen.clear()
    cache.begin(3)
    draw = torch.Generator().manual_seed(31)
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=draw)
    cache.attend(1, q, k, v)
    every_k, every_v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    for ctx, heads in zip(seen, ([1, 2], [0, 3]), strict=True):
        index = ctx.position[..., None].expand(-1, -1, -1, 8)
        assert torch.equal(ctx.k, every_k[:, heads].gather(2, index))
        assert torch.equal(ctx.v, every_v[:, heads].gather(2, index))


def test_only_contextual_heads_merge_and_only_at_the_last_scale(tmp_path: Path) -> None:
    answers: list[tuple[int, str, bool, bool]] = []
    model = tiny_var()

    def seen(ctx: CompressionContext, group: HeadGroup, retain: Retain) -> None:
        answers.append((ctx.step, group.label, retain.merge is not None, retain.renorm_keys))

    for merge, renorm in (("lookm", False), ("normalised", True), (None, True)):
        answers.clear()
        method = Watched(keep=8, merge=merge, renorm_keys=renorm, seen=seen, profile=saved(tmp_path, ROWS, info_of(model)))     # type: ignore[arg-type]
        with accel.apply(model, method):
            model.generate_codes([1], seed=0)
        assert {step for step, *_ in answers} == {1, 2, 3}
        assert {label for _, label, *_ in answers} == {"contextual", "structural"}
        for step, label, merges, renorms in answers:
            assert merges == (step == 3 and label == "contextual" and merge is not None)
            assert renorms == (merges and renorm)


# --- rows, heads and pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [CONTEXTUAL, STRUCTURAL], ids=lambda group: group.label)
@pytest.mark.parametrize("budget", [9, 24])
def test_heads_and_rows_select_on_their_own(group: HeadGroup, budget: int) -> None:
    method, group = HACK(keep=0.5), replace(group, budget=budget)
    ctx = context(14, batch=4)
    index = method.select(ctx, group).cache_index
    assert not torch.equal(index[:, 0], index[:, 1])
    assert not torch.equal(index[0], index[1])

    def turned(**order: list[int]) -> CompressionContext:
        rows, heads = order.get("rows", [0, 1, 2, 3]), order.get("heads", [0, 1, 2, 3])
        return replace(ctx, **{part: getattr(ctx, part)[rows][:, heads] for part in ("q", "k", "v", "position", "valid", "entry_scale")})

    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        assert torch.equal(method.select(turned(heads=order), group).cache_index, index[:, order])
        assert torch.equal(method.select(turned(rows=order), group).cache_index, index[order])


@pytest.mark.parametrize("group", [CONTEXTUAL, STRUCTURAL], ids=lambda group: group.label)
def test_guidance_pairs_select_alike_where_the_option_says_so(group: HeadGroup) -> None:
    ctx = context(14, batch=4, has_guidance_pairs=True)
    for shares in (False, True):
        index = HACK(share_cfg_selection=shares).select(ctx, group).cache_index
        assert torch.equal(index[:2], index[2:]) == shares
        assert not torch.equal(index[0], index[1]), "different images"


# --- robustness ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_exception_in_any_step_leaves_the_model_usable_and_whole(step: int, tmp_path: Path) -> None:
    model = tiny_var()
    dense = last_logits(model, [1])
    path, is_broken = saved(tmp_path, ROWS, info_of(model)), [True]

    def fails(ctx: CompressionContext, group: HeadGroup, retain: Retain) -> None:
        if is_broken[0] and ctx.step == step:
            raise RuntimeError("injected")

    with accel.apply(model, HACK(profile=path, keep=8)):
        expected = last_logits(model, [1])
    with accel.apply(model, Watched(profile=path, keep=8, seen=fails)) as handle:
        with pytest.raises(RuntimeError, match="injected"):
            last_logits(model, [1])
        is_broken[0] = False
        assert torch.equal(last_logits(model, [1]), expected)
        with handle.paused():
            assert torch.equal(last_logits(model, [1]), dense)
    assert torch.equal(last_logits(model, [1]), dense)


def test_two_plans_on_one_model_do_not_meet() -> None:
    methods = [bound(HACK(keep=8), ROWS), bound(HACK(keep=20, alpha=0.25), ["CSSS", "SSSC"])]

    def drawn(caches: list[CompressedCache]) -> list[list[Tensor]]:
        outs: list[list[Tensor]] = [[] for _ in caches]
        for scale in range(4):
            for cache, out in zip(caches, outs, strict=True):
                cache.begin(scale)
                for layer in range(2):
                    draw = torch.Generator().manual_seed(10 * scale + layer)
                    out.append(cache.attend(layer, *torch.randn(3, 2, 4, SHAPES[scale][0] ** 2, 8, generator=draw)))
        return outs

    def new(method: Any) -> CompressedCache:
        counters = CacheStats()
        return CompressedCache(Schedule(SHAPES), method, INFO, counters=lambda: counters, is_guided=False)

    alone = [drawn([new(method)])[0] for method in methods]
    # two of the first, one of the second, scale by scale
    mixed = drawn([new(methods[0]), new(methods[1]), new(methods[0])])
    for expected, found in ((alone[0], mixed[0]), (alone[1], mixed[1]), (alone[0], mixed[2])):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(alone[0][-1], alone[1][-1])


@settings(max_examples=60)
@given(data=st.data())
def test_any_list_of_scales_and_any_split_give_answers_that_hold(data: st.DataObject) -> None:
    """The cache checks each answer: ascending, in range, as many as promised. Attention is finite: nobody reads nothing."""
    shapes = tuple(data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)))
    rows = ["".join(row) for row in data.draw(st.lists(st.lists(st.sampled_from("CS"), min_size=4, max_size=4), min_size=1, max_size=2))]
    total = sum(height * width for height, width in shapes)
    info = replace(INFO, scale_shapes=shapes, n_layers=len(rows))
    method = HACK(
        keep=data.draw(st.integers(min(total, 8) + 2, total + 10)), alpha=sum(row.count("C") for row in rows) / (4 * len(rows)),
        contextual_share=data.draw(st.sampled_from([0.2, 0.5, 1.0])), n_protected=data.draw(st.integers(0, 6)),
        n_queries=data.draw(st.sampled_from([1, 3, 8, None])), middle_share=data.draw(st.sampled_from([0.0, 0.25, 1.0])),
        recent_policy=data.draw(st.sampled_from(["grid", "score"])), merge=data.draw(st.sampled_from(["lookm", "normalised", None])),
        selectors=data.draw(st.sampled_from(["own", "swapped", "structural", "contextual"])),
    )  # fmt: skip
    counters = CacheStats()
    cache = CompressedCache(Schedule(shapes), bound(method, rows, info), info, counters=lambda: counters, is_guided=False)
    draw = torch.Generator().manual_seed(total)
    for scale, (height, width) in enumerate(shapes):
        cache.begin(scale)
        for layer in range(len(rows)):
            out = cache.attend(layer, *torch.randn(3, 1, 4, height * width, 8, generator=draw))
            assert torch.isfinite(out).all()
    last = len(shapes) - 1
    assert counters.attended[last] == min(4 * len(rows) * total, bound(method, rows, info).plan_for(info).n_entries())
