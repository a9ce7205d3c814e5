"""Whole accuracy runs on a tiny random model: controls at equal density, resuming, and a model that is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.errors import AccelError, OptionError
from accel.evals import runner
from accel.evals.models import LoadedModel
from accel.evals.results import RunFolder
from accel.evals.runner import run_accuracy
from accel.evals.scoring import Scored

TOKENS = 1024
CONTROLS = ("streaming", "random_blocks")
CONFIG = {"model": "tiny"}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model(positions=4096), byte_tokenizer(), "tiny")


def variants() -> dict[str, list[Any]]:
    return {
        "flexprefill": [accel.FlexPrefill(gamma=0.6, min_budget=128, block_size=64, min_seq_len=0)],
        "narrow": [accel.Streaming(window_blocks=2, block_size=64, min_seq_len=0)],
    }


def run(loaded: LoadedModel, folder: RunFolder, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"n": 2, "seed": 0, "controls": CONTROLS, "progress": False, **changes}
    methods, tasks, lengths = (settings.pop(name, usual) for name, usual in (("methods", variants()), ("tasks", ["needle"]), ("lengths", [TOKENS])))
    return run_accuracy(loaded, methods, tasks, lengths, folder=folder, **settings)


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[dict[str, Any]]]:
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "r", CONFIG)
    return folder, run(loaded, folder, tasks=["needle", "niah_single"])


def test_dense_methods_and_controls_all_have_a_row(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    labels = ["dense", "flexprefill", "narrow", "streaming (same density)", "random_blocks (same density)"]
    assert [(row["task"], row["label"]) for row in finished[1]] == [(task, label) for task in ("needle", "niah_single") for label in labels]
    assert {row["n_prompts"] for row in finished[1]} == {2}
    assert {row["n"] for row in finished[1] if row["task"] == "needle"} == {8}


def test_all_methods_see_the_same_prompts(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    hashes = {(row["task"], tuple(row["hash"]["prompts"])) for row in finished[1]}
    assert len(hashes) == 2


def test_sparse_rows_are_sparse_and_dense_ones_are_not(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    for row in finished[1]:
        if row["is_baseline"]:
            assert row["density"] is None
            assert row["calls"] == {"sparse": 0, "dense": {}}
        else:
            assert 0 < row["density"] < 0.95
            assert row["calls"]["sparse"] > 0
            assert row["log_prob"] != finished[1][0]["log_prob"]


def test_controls_run_at_the_density_of_the_first_method_on_the_same_prompt(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    records = {r.key: r for r in finished[0].records}
    seeds: dict[int, set[int]] = {}
    for key, record in records.items():
        if key.label == "random_blocks (same density)":
            wanted = records[key._replace(label="flexprefill")].density
            assert record.options[0]["random_blocks"]["density"] == wanted
            assert record.options[0]["random_blocks"]["block_size"] == 64
            seeds.setdefault(key.sample, set()).add(record.options[0]["random_blocks"]["seed"])
            assert record.density == pytest.approx(wanted, abs=0.01)
    assert len(set().union(*seeds.values())) == len(seeds) > 1, "every prompt has draws of its own"


def test_only_the_prefill_is_counted_where_the_model_writes(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    for record in finished[0].records:
        if record.task == "niah_single" and record.label == "flexprefill":
            # three layers, one prefill: no decoding step among the calls
            assert record.sparse_calls + sum(record.dense_calls.values()) == 3


def test_the_model_is_given_back_unpatched(loaded: LoadedModel, tmp_path: Path) -> None:
    ids = torch.arange(600)[None] % 256
    with torch.no_grad():
        before = loaded.model(ids).logits
        run(loaded, RunFolder.create(tmp_path, CONFIG), n=1)
        assert torch.equal(loaded.model(ids).logits, before)


def test_a_stopped_run_goes_on_where_it_stopped(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(loaded, RunFolder.create(tmp_path / "whole", CONFIG))
    calls: list[str] = []
    genuine = runner.score

    def counted(*args: Any, **kwargs: Any) -> Scored:
        calls.append(args[2].prompt_hash)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(runner, "score", counted)
    partial = run(loaded, RunFolder.create(tmp_path / "part", CONFIG), limit=7)
    assert len(calls) == 7
    assert sum(row["n_prompts"] for row in partial) == 7
    resumed = run(loaded, RunFolder.create(tmp_path / "part", CONFIG, resume=True))
    assert len(calls) == 10
    unstable = ("prefill_ms", "selection_ms")
    assert [{k: v for k, v in row.items() if k not in unstable} for row in resumed] == [
        {k: v for k, v in row.items() if k not in unstable} for row in whole
    ]


def test_other_prompts_under_the_same_settings_stop_a_resumed_run(loaded: LoadedModel, tmp_path: Path) -> None:
    run(loaded, RunFolder.create(tmp_path, CONFIG), limit=1)
    with pytest.raises(AccelError, match="is not the one"):
        run(loaded, RunFolder.create(tmp_path, CONFIG, resume=True), seed=1)


def test_without_sparse_calls_the_controls_run_dense_too(loaded: LoadedModel, tmp_path: Path) -> None:
    method = accel.FlexPrefill(gamma=0.6, min_budget=128, min_seq_len=100_000)
    rows = run(loaded, RunFolder.create(tmp_path, CONFIG), methods={"flexprefill": [method]}, n=1)
    assert [row["calls"]["sparse"] for row in rows] == [0, 0, 0, 0]
    assert len({row["log_prob"] for row in rows}) == 1
    assert rows[1]["note"] == "ran dense: shorter than 100000 tokens (3)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [TOKENS, 8192]}, "holds 4096 tokens, asked for prompts of 8192"),
        ({"tasks": ["nedle"]}, "did you mean 'needle'"),
        ({"n": 0}, "at least 1"),
        ({"controls": ("powerattention",)}, "no option 'density'"),
        ({"methods": {}}, "name one"),
        ({"methods": {"dense": variants}}, "label 'dense'"),
    ],
    ids=["longer_than_the_model", "unknown_task", "no_samples", "control_without_density", "controls_without_method", "taken_label"],
)
def test_a_run_that_cannot_end_does_not_begin(loaded: LoadedModel, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(OptionError, match=message):
        run(loaded, folder, **changes)
    assert folder.done() == set()


def test_scores_that_are_no_numbers_fail_the_run(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(AccelError, match="not finite"):
        run(LoadedModel(model, byte_tokenizer(), "broken"), RunFolder.create(tmp_path, CONFIG), n=1)
