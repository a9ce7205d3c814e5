"""Bytes of compressed caches of decoders: what is measured is what the budgets predict, and what a method records is told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llama import tiny_model

import accel
from accel.evals.decoder_bench import measure_cache
from accel.evals.decoder_cache import held_figures, held_now, is_compressing, predicted_bytes, whole_cache_bytes
from accel.evals.latency import OWN_DENSE, measure_decode
from accel.patching import host_for
from accel.registry import build
from accel.stats import CacheStats

TOKENS = 200
# 3 layers, 2 key heads of 16, fp32, keys and values
WHOLE = 2 * 3 * 2 * TOKENS * 16 * 4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(positions=1024)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def measured(model: Any, ids: torch.Tensor, name: str, **options: Any) -> int:
    with accel.apply(model, name, **options) as handle, torch.no_grad():
        model(ids, use_cache=True)
        return held_now(handle.stats.cache)["held"]


@pytest.mark.parametrize("name", ["snapkv", "streaming_kv", "random_kv", "hack"])
@pytest.mark.parametrize("keep", [0.5, 0.3, 40, 150])
def test_what_is_held_behind_a_prompt_is_what_the_budgets_say(model: Any, ids: torch.Tensor, name: str, keep: float | int) -> None:
    method = build(name, {"keep": keep, "min_entries": 8})
    info = host_for(model).describe(model)
    n = keep if isinstance(keep, int) else int(keep * TOKENS)
    predicted = predicted_bytes([method], info, TOKENS, itemsize=4)
    # of every entry a key, a value and its place
    assert predicted == 3 * 2 * n * (2 * 16 * 4 + 4)
    held = measured(model, ids, name, keep=keep, min_entries=8)
    # beside the entries a method may keep a number per head
    assert predicted <= held <= predicted + 3 * 2 * 8


def test_what_a_method_records_is_measured_and_not_predicted(model: Any, ids: torch.Tensor) -> None:
    predicted = predicted_bytes([build("h2o", {"keep": 40, "min_entries": 8})], host_for(model).describe(model), TOKENS, itemsize=4)
    # the attention received, fp32, per entry
    assert measured(model, ids, "h2o", keep=40, min_entries=8) == predicted + 3 * 2 * 40 * 4


def test_a_cache_that_fits_needs_no_places_and_a_dense_one_has_no_budget(model: Any, ids: torch.Tensor) -> None:
    info = host_for(model).describe(model)
    assert whole_cache_bytes(info, TOKENS, itemsize=4) == WHOLE
    for methods in ([], [build("streaming")], [build("random_kv", {"keep": 300})], [build("snapkv", {"keep": 1.0})]):
        assert predicted_bytes(methods, info, TOKENS, itemsize=4) == WHOLE
    assert measured(model, ids, "streaming_kv", keep=300) == WHOLE


def test_figures_tell_the_prompt_and_the_peak_apart() -> None:
    stats = CacheStats()
    assert held_figures(stats, {}, 10) is None
    for held, whole in ((30, 100), (50, 120)):
        stats.add_layer(0, held=held, whole=whole)
        if whole == 100:
            at_prompt = held_now(stats)
    found = held_figures(stats, at_prompt, 10)
    assert found == {"kept_share": 0.3, "whole": [10], "prompt_bytes": 30, "peak_bytes": 50, "whole_bytes": 120, "peak_share": 50 / 120}


def test_methods_that_drop_entries_are_told_from_others() -> None:
    assert is_compressing([build("streaming"), build("snapkv")])
    assert not is_compressing([build("streaming")])
    assert not is_compressing([])


def test_the_benchmark_has_bytes_measured_and_predicted_beside_both_baselines(model: Any, ids: torch.Tensor) -> None:
    variants = {"window": [build("streaming_kv", {"keep": 0.3, "min_entries": 8})]}
    seen: list[str] = []
    rows = {row.label: row for row in measure_cache(model, ids, variants, repeats=2, chunk=64, progress=seen.append)}
    assert list(rows) == ["dense (sdpa)", OWN_DENSE, "window"]
    assert [text.split(",")[0] for text in seen] == list(rows) * 2, "the variants take turns"
    assert [row.is_baseline for row in rows.values()] == [True, True, False]
    dense, window = rows["dense (sdpa)"], rows["window"]
    assert (dense.held_bytes, dense.predicted_bytes, dense.chunked_held_bytes) == (WHOLE, WHOLE, WHOLE)
    assert window.held_bytes == window.predicted_bytes == window.chunked_held_bytes < WHOLE / 3
    assert all(row.peak_bytes >= 0 and row.chunked_peak_bytes >= 0 and row.n == 2 for row in rows.values())


def test_decode_begins_from_the_cache_that_each_variant_left(model: Any, ids: torch.Tensor) -> None:
    variants = {"window": [build("streaming_kv", {"keep": 0.3, "min_entries": 8, "every": 8})], "blocks": [build("streaming")]}
    shapes: list[int] = []
    genuine = torch.nn.functional.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if q.shape[2] == 1:
            shapes.append(k.shape[2])
        return genuine(q, k, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        rows = {row.label: row for row in measure_decode(model, ids, variants, steps=4, repeats=2, warmup=0)}
    # stock attention begins every pass anew from 196 tokens
    assert shapes.count(197) % 3 == 0
    assert max(shapes) == 200
    assert rows["window"].note == "no eviction in 4 steps, one comes every 8"
    assert rows["blocks"].note != rows["window"].note
    assert all(row.ms.n == 2 for row in rows.values())
    again = measure_decode(model, ids, {"window": variants["window"]}, steps=8, repeats=1, warmup=1)[-1]
    assert again.note == "evicts every 8 steps"
