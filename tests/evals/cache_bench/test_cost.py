"""The arithmetic of a next-scale cache gives the published numbers (kv-compression.md §3), and exactly what a run counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_profiles import info_of, saved
from next_scale import INFO, last_logits, tiny_infinity, tiny_var
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import accel
from accel.errors import OptionError
from accel.evals.cache_bench.cost import (
    GenerationShape,
    HeadBudget,
    attention_flops,
    budgets_of,
    cache_bytes,
    counted_attention_flops,
    module_flops,
    scoring_flops,
    whole,
    whole_cache_bytes,
)
from accel.models.cache import Schedule
from accel.patches._head_plan import make_plan
from accel.patches._head_selectors import query_sample
from accel.patches.hack import HACK
from accel.patches.hosts.nextscale.cache import CompressedCache
from accel.protocols import CompressionContext, HeadGroup
from accel.registry import build
from accel.stats import CacheStats

SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
TOKENS = tuple(side * side for side in SIDES)
INFINITY_2B = GenerationShape(n_layers=32, n_heads=16, head_dim=128, tokens=TOKENS, n_rows=2)
INFINITY_8B = GenerationShape(n_layers=40, n_heads=28, head_dim=128, tokens=TOKENS, n_rows=2)
VAR_D30 = GenerationShape(n_layers=30, n_heads=30, head_dim=64, tokens=tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), n_rows=2)
# ρ and GFLOPs of one layer of Infinity-2B, one row
FIGURE_9 = [(0.0, 914.05), (0.5, 715.56), (0.7, 592.60), (0.9, 440.27)]
ROWS = ["CCCC", "SCCS"]


# --- published numbers --------------------------------------------------------------------------------------------------------


def test_the_sequence_of_a_megapixel() -> None:
    assert INFINITY_2B.ends[-1] == 10521
    assert sum(n * end for n, end in zip(TOKENS, INFINITY_2B.ends, strict=True)) == 68_484_681


@pytest.mark.parametrize("ratio, giga", FIGURE_9)
def test_module_flops_with_real_budgets_are_those_of_figure_9(ratio: float, giga: float) -> None:
    assert module_flops(TOKENS, INFINITY_2B.width, (1 - ratio) * 10521) / 1e9 == pytest.approx(giga, abs=0.005)
    if ratio == 0:
        assert module_flops(TOKENS, INFINITY_2B.width) / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize("ratio, giga", FIGURE_9[1:])
def test_whole_number_budgets_that_a_run_counts_give_figure_9_too(ratio: float, giga: float) -> None:
    """One head of one channel draws the megapixel: what attention reads does not depend on the width."""
    shape = GenerationShape(n_layers=1, n_heads=1, head_dim=1, tokens=TOKENS, n_rows=1)
    info = replace(INFO, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=1, scale_shapes=tuple((side, side) for side in SIDES))
    counters = CacheStats()
    method: Any = build("streaming_kv", {"keep": 1 - ratio})
    cache = CompressedCache(Schedule.of(SIDES), method, info, counters=lambda: counters, is_guided=False)
    for scale, n in enumerate(TOKENS):
        cache.begin(scale)
        t = torch.zeros(1, 1, n, 1)
        cache.attend(0, t, t, t)
    counted = counted_attention_flops(counters, shape)
    assert counted == attention_flops(shape, budgets_of(method, info))
    projections = 8 * INFINITY_2B.width**2 * 10521
    assert (projections + INFINITY_2B.width * counted) / 1e9 == pytest.approx(giga, abs=0.03)


def test_attention_of_infinity_8b_is_that_of_the_follow_up() -> None:
    assert attention_flops(INFINITY_8B, whole(INFINITY_8B)) / 1e12 == pytest.approx(78.54, abs=0.005)
    # what asymmetric splits of a 30 % budget cost, as far as whole numbers go
    types = [[True] * 14 + [False] * 14] * 40
    plan = make_plan(types, scale_shapes=tuple((side, side) for side in SIDES), n_protected=5, keep=0.3)
    budgets = [[HeadBudget(14, plan.contextual[layer]), HeadBudget(14, plan.structural[layer])] for layer in range(40)]
    assert attention_flops(INFINITY_8B, budgets) / 1e12 == pytest.approx(31.48, abs=0.01)
    even = [[HeadBudget(28, 3156)]] * 40
    assert attention_flops(INFINITY_8B, even) / 1e12 == pytest.approx(33.54, abs=0.01)


def test_cache_bytes_are_those_of_the_specification() -> None:
    reference: dict[str, Any] = {"key_bytes": 4, "value_bytes": 2}
    for shape, gib in ((INFINITY_8B, 16.86), (INFINITY_2B, 7.71)):
        assert whole_cache_bytes(shape, **reference) / 2**30 == pytest.approx(gib, abs=0.005)
    assert whole_cache_bytes(VAR_D30, **reference) / 2**20 == pytest.approx(448, abs=0.5)
    # the steps of §5.3, one after the other
    in_half: dict[str, Any] = {"key_bytes": 2, "value_bytes": 2}
    assert whole_cache_bytes(INFINITY_8B, **in_half) / 2**30 == pytest.approx(11.24, abs=0.005)
    assert whole_cache_bytes(INFINITY_8B, **in_half, has_last_scale=False) / 2**30 == pytest.approx(6.86, abs=0.005)
    split = [[HeadBudget(14, 1052), HeadBudget(14, 5260)]] * 40
    assert cache_bytes(INFINITY_8B, split, 11, number_bytes=2, position_bytes=0) / 2**30 == pytest.approx(3.37, abs=0.005)
    assert cache_bytes(INFINITY_8B, whole(INFINITY_8B), 11, number_bytes=2) == whole_cache_bytes(INFINITY_8B, **in_half, has_last_scale=False)


# --- what a run counts --------------------------------------------------------------------------------------------------------


def hack(folder: Path, model: Any, **options: Any) -> tuple[HACK, GenerationShape, Any]:
    """A method with a profile of `model`, the shape of a guided generation of two pictures, and the budgets by the closed form."""
    info = info_of(model)
    method = HACK(profile=saved(folder, ROWS, info), **options)
    return method, GenerationShape.of(info, 4), budgets_of(method.bind(info), info)


@pytest.mark.parametrize("options", [{"keep": 0.4}, {"keep": 12, "contextual_share": 0.5}, {"keep": 7, "alpha": 1}, {"keep": 1.0}], ids=str)
def test_counters_of_a_run_equal_the_closed_form(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_var()
    method, shape, budgets = hack(tmp_path, model, **options)
    with accel.apply(model, method) as handle:
        last_logits(model, [1, 2])
    stats = handle.stats.cache
    assert counted_attention_flops(stats, shape) == attention_flops(shape, budgets)
    assert stats.whole_bytes == whole_cache_bytes(shape, key_bytes=4, value_bytes=4, has_last_scale=False)
    behind = [cache_bytes(shape, budgets, scale, number_bytes=4) for scale in range(4)]
    # the last scale begins with what the one before left
    assert stats.bytes_by_scale == dict(enumerate([*behind[:3], behind[2]]))
    assert stats.peak_bytes == max(behind)
    assert behind[3] == 0


@pytest.mark.parametrize("name", ["streaming_kv", "random_kv", "snapkv"])
def test_other_methods_are_counted_alike(name: str) -> None:
    model = tiny_var()
    shape, method = GenerationShape.of(info_of(model), 4), build(name, {"keep": 9})
    budgets = budgets_of(method, info_of(model))    # type: ignore[arg-type]
    assert budgets == [[HeadBudget(4, 9)]] * 2
    with accel.apply(model, method) as handle:
        last_logits(model, [1, 2])
    assert counted_attention_flops(handle.stats.cache, shape) == attention_flops(shape, budgets)
    assert handle.stats.cache.peak_bytes == cache_bytes(shape, budgets, 2, number_bytes=4)


@pytest.mark.parametrize("n_queries", [1, 3, 12, None])
def test_torch_counts_the_same_flops_while_entries_are_scored(n_queries: int | None, tmp_path: Path) -> None:
    model = tiny_var()
    method, shape, budgets = hack(tmp_path, model, keep=8, n_queries=n_queries, merge=None)
    scores = matrix_flops(model, method) - matrix_flops(model, None)
    rows = [rows_of(scale, n_queries) for scale in range(4)]
    assert scores == scoring_flops(shape, budgets, rows) > 0
    assert rows[3] == (16 if n_queries is None else n_queries), "also where a grid is read"


def matrix_flops(model: Any, method: HACK | None) -> int:
    """FLOPs that torch counts in batched matrix products while two guided pictures are drawn; attention itself is not among them on a CPU."""
    with FlopCounterMode(display=False) as counter:
        if method is None:
            model.generate_codes([1, 2], seed=0)
        else:
            with accel.apply(model, method):
                model.generate_codes([1, 2], seed=0)
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))


def rows_of(scale: int, n_queries: int | None) -> int:
    side = scale + 1
    t = torch.zeros(1, 1, side * side, 8)
    placed: Any = {"position": t[..., 0], "valid": t[..., 0], "q_position": t[0, ..., 0]}
    ctx = CompressionContext(layer=0, step=scale, q=t, k=t, v=t, scale=1.0, scale_shapes=tuple((i, i) for i in range(1, 5)), **placed)
    return len(query_sample(ctx, n_queries))


def tensors_in(found: Any) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    if isinstance(found, Tensor):
        yield found
    elif is_dataclass(found):
        for f in fields(found):
            yield from tensors_in(getattr(found, f.name))
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors_in(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from tensors_in(value)


@pytest.mark.parametrize("make", [tiny_var, tiny_infinity], ids=["var", "infinity"])
def test_bytes_are_those_of_the_storages_that_are_alive(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make()
    monkeypatch.setattr(model, "default_schedule", lambda: Schedule.of([1, 2, 3, 4]))
    method, shape, budgets = hack(tmp_path, model, keep=10, contextual_share=0.4)
    seen: list[tuple[int, int, int]] = []
    begin = CompressedCache.begin

    def look(cache: CompressedCache, scale: int) -> None:
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in([cache._layers, cache._held])}
        seen.append((scale, cache.cache_bytes(), sum(held.values())))
        begin(cache, scale)

    monkeypatch.setattr(CompressedCache, "begin", look)
    with accel.apply(model, method):
        if make is tiny_var:
            model.generate_codes([1, 2], seed=0)
        else:
            model.generate_codes([torch.ones(3, 24)] * 2, seed=0, schedule=[1, 2, 3, 4])
    expected = [0, *(cache_bytes(shape, budgets, scale, number_bytes=4) for scale in range(3))]
    assert seen == [(scale, n, n) for scale, n in enumerate(expected)]


# --- mistakes -----------------------------------------------------------------------------------------------------------------


def test_what_it_cannot_describe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no scales"):
        GenerationShape.of(replace(INFO, scale_shapes=None), 2)
    shape = GenerationShape.of(INFO, 2)
    for budgets in ([[HeadBudget(4, 9)]], [[HeadBudget(4, 9)], [HeadBudget(2, 9), HeadBudget(1, 3)]]):
        with pytest.raises(OptionError, match="2 layers of 4 heads"):
            attention_flops(shape, budgets)
    decoupled = HACK(profile=saved(tmp_path, ["CCCS", "CSSS"]), mode="decoupled").bind(INFO)
    with pytest.raises(OptionError, match="hack: budgets that change from scale to scale"):
        budgets_of(decoupled, INFO)


def test_groups_without_heads_do_not_count() -> None:
    class Empty(HACK):
        def groups(self, *args: Any, **kwargs: Any) -> list[HeadGroup]:
            return [HeadGroup((), 3), HeadGroup((0, 1, 2, 3), 9)]

    assert budgets_of(Empty(), INFO) == [[HeadBudget(4, 9)]] * 2
