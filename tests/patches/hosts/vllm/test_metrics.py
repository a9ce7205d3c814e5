"""Reports of workers, joined."""

from __future__ import annotations

from typing import Any

import pytest

import accel
from accel.patches.hosts.vllm import worker as workers
from accel.patches.hosts.vllm.engine import Engine
from accel.patches.hosts.vllm.host import plain_vlm
from accel.patches.hosts.vllm.metrics import joined_stats, report_text, why_not_served

STREAMING = accel.Streaming(min_seq_len=0)


def worker(*, patched: set[int] | None = None, sparse: int = 2, dense: int = 1, tiles: tuple[int, int] = (3, 10)) -> dict[str, Any]:
    """What a worker says that counted this much in layer 1."""
    engine = Engine(plain_vlm(), (STREAMING,), patched={0, 1} if patched is None else patched, skipped={2: "sliding window"})
    layer = engine.stats.layer(1)
    layer.sparse_calls, (layer.active_tiles, layer.causal_tiles) = sparse, tiles
    layer.dense_calls["decode"] = dense
    engine.stats.tokens.prompts, engine.stats.tokens.patches, engine.stats.tokens.kept_patches = 1, 100, 25
    engine.stats.tokens.layer_tokens, engine.stats.tokens.all_layer_tokens = 50, 200
    return engine.report()


def test_patched_workers_are_served() -> None:
    assert why_not_served([worker(), worker()], ["streaming"]) == []


@pytest.mark.parametrize(
    ("reports", "reason"),
    [
        ([], "no worker answered"),
        ([worker(), None], "worker 1 was not told of streaming"),
        ([worker(patched=set())], "worker 0: streaming runs in no attention layer (layer 2: sliding window)"),
    ],
    ids=["silent", "not_told", "dense"],
)
def test_a_worker_that_is_silent_or_dense_is_named(reports: list[Any], reason: str) -> None:
    assert why_not_served(reports, ["streaming"]) == [reason]


def test_a_worker_of_another_recipe_is_named() -> None:
    [reason] = why_not_served([worker()], ["streaming", "fastervlm"])
    assert reason == "worker 0 runs streaming, and streaming, fastervlm was asked for"


def test_calls_and_tiles_of_workers_add_up_and_pictures_do_not() -> None:
    stats = joined_stats([worker(), worker(sparse=4, tiles=(7, 10))])
    assert (stats.total.sparse_calls, stats.density) == (6, 0.5)
    assert stats.total.dense_calls == {"decode": 2}
    assert (stats.tokens.patches, stats.tokens.kept_patches, stats.tokens.kept_share) == (100, 25, 0.25)


def test_a_worker_that_sees_no_picture_hides_none() -> None:
    later_stage = worker()
    later_stage["tokens"] = dict.fromkeys(later_stage["tokens"], 0)
    for reports in ([worker(), later_stage], [later_stage, worker()]):
        assert joined_stats(reports).tokens.patches == 100


def test_layers_are_found_again_where_their_numbers_became_text() -> None:
    report = worker()
    report["layers"] = {str(i): layer for i, layer in report["layers"].items()}
    assert joined_stats([report]).layers.keys() == {1}


def test_the_text_is_that_of_a_handle() -> None:
    lines = report_text((STREAMING,), [worker()]).splitlines()
    assert lines[0] == "streaming(min_seq_len=0) on vllm: 2 of 3 layers patched"
    assert lines[1] == "skipped 2: sliding window"
    assert lines[-1] == "calls: 2 sparse (density 0.30), 1 dense (decode)"


def test_visual_tokens_and_passes_left_alone_are_told() -> None:
    engine = Engine(plain_vlm(), (accel.FasterVLM(keep=0.25),), pruned={"fastervlm"})
    engine.stats.tokens.prompts, engine.stats.tokens.patches, engine.stats.tokens.kept_patches = 1, 100, 25
    engine.stats.tokens.layer_tokens, engine.stats.tokens.all_layer_tokens = 50, 200
    engine.steps["no picture"] = 3
    text = report_text((accel.FasterVLM(keep=0.25),), [engine.report()])
    assert "visual tokens: 25 of 100 left in 1 prompts (25.0%" in text
    assert text.endswith("3 forward passes left as they were (no picture)")


def test_what_was_counted_while_vllm_warmed_up_is_forgotten_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(plain_vlm(), (STREAMING,), patched={1})
    monkeypatch.setattr(workers, "engine_of", lambda config: engine)
    monkeypatch.setattr(workers, "note_foreign_layers", lambda config, engine: None)
    mine = workers.AccelWorker()
    mine.vllm_config = None

    def work() -> None:
        engine.stats.layer(1).sparse_calls += 2
        engine.stats.tokens.patches += 64
        engine.steps["replayed"] += 1
        engine.exit_rows["before"] += 64

    def counted(report: Any) -> tuple[Any, ...]:
        return report["sparse_calls"], report["tokens"]["visual"], report["left_alone"], report["exit_rows"]

    work()
    first = mine.accel_ready()
    assert counted(first) == (0, 0, {}, {})
    assert first is not None
    assert first["patched_layers"] == [1]
    work()
    # a second API server of the same engine
    assert counted(mine.accel_ready()) == counted(mine.accel_report()) == (2, 64, {"replayed": 1}, {"before": 64})
