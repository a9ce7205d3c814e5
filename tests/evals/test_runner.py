"""Whole accuracy runs on a tiny random model: controls at equal density, resuming, and a model that is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals import measuring
from accel.evals.controls import plan_controls
from accel.evals.models import LoadedModel
from accel.evals.parallel import Team
from accel.evals.results import MEASURED, RunFolder
from accel.evals.runner import model_info, run_accuracy, wanted_samples
from accel.evals.scoring.single import Scored
from accel.evals.tasks import load_text_task
from accel.registry import build

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


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in (*MEASURED, "selection_share")}


def saved(folder: RunFolder) -> list[dict[str, Any]]:
    """What the file holds, line by line, but for what a clock measured."""
    return [without_times(json.loads(line)) for line in (folder.path / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[dict[str, Any]]]:
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "r", CONFIG)
    return folder, run(loaded, folder, tasks=["needle", "passkey"])


def test_dense_methods_and_controls_all_have_a_row(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    labels = ["dense", "flexprefill", "narrow", "streaming (same density)", "random_blocks (same density)"]
    assert [(row["task"], row["label"]) for row in finished[1]] == [(task, label) for task in ("needle", "passkey") for label in labels]
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
        if record.task == "passkey" and record.label == "flexprefill":
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
    genuine = measuring.score

    def counted(*args: Any, **kwargs: Any) -> Scored:
        calls.append(args[2].prompt_hash)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(measuring, "score", counted)
    partial = run(loaded, RunFolder.create(tmp_path / "part", CONFIG), limit=7)
    assert len(calls) == 7
    assert sum(row["n_prompts"] for row in partial) == 7
    resumed = run(loaded, RunFolder.create(tmp_path / "part", CONFIG, resume=True))
    assert len(calls) == 10
    assert [without_times(row) for row in resumed] == [without_times(row) for row in whole]


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


SHORT: dict[str, Any] = {"lengths": [900], "n": 2, "controls": ("random_blocks",), "tasks": ["needle", "passkey"]}


@pytest.fixture(scope="module")
def uninterrupted(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder.create(tmp_path_factory.mktemp("whole") / "r", CONFIG)
    run(loaded, folder, **SHORT)
    return folder


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 0.999])
def test_a_run_killed_at_any_byte_resumes_to_the_samples_of_one_that_was_not(
    loaded: LoadedModel, uninterrupted: RunFolder, tmp_path: Path, share: float
) -> None:
    whole = (uninterrupted.path / "samples.jsonl").read_bytes()
    RunFolder.create(tmp_path, CONFIG)
    (tmp_path / "samples.jsonl").write_bytes(whole[: int(share * len(whole))])
    folder = RunFolder.create(tmp_path, CONFIG, resume=True)
    run(loaded, folder, **SHORT)
    assert saved(folder) == saved(uninterrupted)


def test_two_runs_with_one_seed_are_the_same_and_with_another_are_not(loaded: LoadedModel, uninterrupted: RunFolder, tmp_path: Path) -> None:
    again, other = (RunFolder.create(tmp_path / name, CONFIG) for name in ("again", "other"))
    run(loaded, again, **SHORT)
    run(loaded, other, **{**SHORT, "seed": 1})
    assert saved(again) == saved(uninterrupted)
    assert [line["prompt_hash"] for line in saved(other)] != [line["prompt_hash"] for line in saved(uninterrupted)]


def test_a_warm_up_changes_no_score_and_tells_the_memory_of_the_first_of_each_label(
    loaded: LoadedModel, uninterrupted: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_scored = 0
    genuine = measuring.score

    def counted(*args: Any, **kwargs: Any) -> Scored:
        nonlocal n_scored
        n_scored += 1
        return genuine(*args, **kwargs)

    monkeypatch.setattr(measuring, "score", counted)
    folder = RunFolder.create(tmp_path, CONFIG)
    run(loaded, folder, **SHORT, warmup=2)
    assert saved(folder) == saved(uninterrupted)
    n_labels = len({record.label for record in folder.records})
    # twice for needle, which has no reply, and twice for passkey
    assert n_scored == len(folder.records) + 2 * 2 * n_labels
    told = [record for record in folder.records if record.peak_bytes is not None]
    assert [(r.task, r.sample) for r in told] == [("needle", 0)] * n_labels


def test_samples_carry_the_metrics_of_serving(uninterrupted: RunFolder) -> None:
    for record in uninterrupted.records:
        assert record.ttft_ms == record.prefill_ms > 0
        assert record.energy_j is None, "nothing counts it on a CPU"
        assert (record.selection_share is not None) == (record.label != "dense")
        if record.task == "needle":
            assert (record.tpot_ms, record.e2el_ms, record.n_output_tokens, record.finish_reason) == (None, None, None, None)
        else:
            assert record.n_output_tokens is not None
            assert record.e2el_ms is not None
            assert record.tpot_ms is not None
            assert record.e2el_ms == pytest.approx(record.ttft_ms + (record.n_output_tokens - 1) * record.tpot_ms)
            assert record.finish_reason in ("stop", "length")


def test_processes_share_the_prompts_and_together_have_what_one_has(loaded: LoadedModel, uninterrupted: RunFolder, tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, CONFIG)
    second = RunFolder.join(tmp_path, CONFIG, part=1)
    for index, folder in enumerate((first, second)):
        run(loaded, folder, **SHORT, team=Team(index, 2))
    assert {record.sample for record in first.records} == {0}
    assert {record.sample for record in second.records} == {1}
    controls = plan_controls(("random_blocks",), variants(), model_info(loaded))
    wanted = wanted_samples(variants(), SHORT["tasks"], SHORT["lengths"], n=2, controls=controls)
    first.collect(wanted)
    assert saved(first) == saved(uninterrupted)
    assert [path.name for path in tmp_path.glob("samples*")] == ["samples.jsonl"]


def test_processes_that_were_killed_are_gone_on_with_by_another_number_of_them(
    loaded: LoadedModel, uninterrupted: RunFolder, tmp_path: Path
) -> None:
    RunFolder.create(tmp_path, CONFIG)
    for index in (1, 2):
        run(loaded, RunFolder.join(tmp_path, CONFIG, part=index), **SHORT, team=Team(index, 3))
    with (tmp_path / "samples-1.jsonl").open("a") as file:
        file.write('{"task": "need')
    folder = RunFolder.create(tmp_path, CONFIG, resume=True)
    assert 0 < len(folder.done()) < len(uninterrupted.records)
    run(loaded, folder, **SHORT)
    folder.collect([record.key for record in uninterrupted.records])
    assert saved(folder) == saved(uninterrupted)


BATCH: dict[str, Any] = {**SHORT, "n": 3, "controls": (), "batch_size": 2}


def test_batches_score_as_single_prompts_and_resume_to_the_same_numbers(loaded: LoadedModel, tmp_path: Path) -> None:
    single, batched, stopped = (RunFolder.create(tmp_path / name, CONFIG) for name in ("single", "batched", "stopped"))
    run(loaded, single, **{**BATCH, "batch_size": 1})
    run(loaded, batched, **BATCH)
    for record in batched.records:
        alone = single.get(record.key)
        assert alone is not None
        assert record.log_probs == pytest.approx(alone.log_probs, abs=1e-3)
        assert (record.hits, record.answers, record.finish_reason) == (alone.hits, alone.answers, alone.finish_reason)
        assert record.batch == (1 if record.sample == 2 else 2)
        assert (record.ttft_ms is None) == (record.batch == 2)
    # stopped between two prompts of one batch: its other half comes from a batch as large
    run(loaded, stopped, **BATCH, limit=3)
    again = RunFolder.create(stopped.path, CONFIG, resume=True)
    assert [(r.label, r.sample) for r in again.records] == [("dense", 0), ("dense", 1), ("flexprefill", 0)]
    run(loaded, again, **BATCH)
    assert saved(again) == saved(batched)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"controls": ("random_blocks",)}, "--controls none goes without"),
        ({"methods": {"snapkv": [build("snapkv")]}}, "what a compressed cache holds"),
        ({"tasks": ["scene_color"]}, "asked by itself"),
        ({"tasks": ["images"]}, "drawn by itself"),
    ],
    ids=["controls", "caches", "pictures", "drawing"],
)
def test_what_cannot_be_read_in_batches_is_refused_with_the_reason(
    loaded: LoadedModel, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        run(loaded, RunFolder.create(tmp_path, CONFIG), **{**BATCH, **changes})


def test_a_prompt_that_is_longer_with_its_reply_than_the_model_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    class Long(LoadedModel):
        max_positions = 600

    task = "passkey"
    small = Long(loaded.model, loaded.tokenizer, "small")
    [sample] = load_text_task(task).samples(loaded.tokenizer, 600, 1, 0)
    measurer = measuring.Measurer(small, measuring.Album(tmp_path))
    key = wanted_samples({}, [task], [600], n=1)[0]
    measurer.measure([key], [sample], ())
    with pytest.raises(OptionError, match=r"small holds 600 tokens, and prompt 0 of passkey at 600 tokens with its reply takes 6\d\d"):
        measurer.measure([key], [replace(sample, max_new_tokens=sample.max_new_tokens + 100)], ())


def test_more_samples_are_not_added_to_prompts_of_another_version(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "r", CONFIG)
    only: dict[str, Any] = {"lengths": [900], "tasks": ["passkey"], "methods": {}, "controls": ()}
    run(loaded, folder, n=1, **only)
    run(loaded, folder, n=2, **only)
    # as of another version: sample 2 has not been asked yet, and those before it were others
    monkeypatch.setattr("accel.evals.tasks._infinitebench.NOISE", "Another line.")
    with pytest.raises(AccelError, match=r"prompt 0 of passkey at 900 tokens is not the one that .* was begun with"):
        run(loaded, folder, n=3, **only)
    assert len(saved(folder)) == 2
