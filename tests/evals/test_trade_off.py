"""What a search on tasks measures: the harness on a tiny model, times as ratios prompt by prompt, and nothing twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import save_tiny

from accel import Recipe
from accel.cli.main import main
from accel.evals.results import SampleRecord
from accel.evals.trade_off import TradeOff, time_share, tuning_result
from accel.registry import build
from accel.tune.front import FrontResult, Measured

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")


def timed(label: str, tokens: int, sample: int, ms: float) -> SampleRecord:
    return SampleRecord(
        task="needle", label=label, options=[], tokens=tokens, sample=sample, seed=0, n_tokens=tokens, prompt_hash="", log_prob=None, exact=1.0,
        log_probs=[], hits=[1.0], questions=[""], expected=[""], answers=[""], density=None, sparse_calls=0, dense_calls={}, prefill_ms=ms,
    )  # fmt: skip


def test_the_share_of_time_is_a_median_by_length_and_a_geometric_mean_over_lengths() -> None:
    # 1K: ratios 0.5, 0.5 and an outlier of 9; 2K: 0.125
    dense = [timed("dense", 1024, i, ms) for i, ms in enumerate((10, 20, 10))] + [timed("dense", 2048, 0, 80)]
    mine = [timed("trial", 1024, i, ms) for i, ms in enumerate((5, 10, 90))] + [timed("trial", 2048, 0, 10)]
    assert time_share([*dense, *mine]) == pytest.approx(0.25)
    slower = [replace(r, prefill_ms=3 * r.prefill_ms) for r in (*dense, *mine)]
    assert time_share(slower) == pytest.approx(0.25), "a machine that slows down slows both"
    # a better dense kernel is not sold as sparsity
    own = [timed("dense (accel)", 1024, i, ms) for i, ms in enumerate((5, 10, 5))] + [timed("dense (accel)", 2048, 0, 160)]
    assert time_share([*dense, *own, *mine]) == pytest.approx((1.0 * 0.125) ** 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=1024))


def tune(model: str, out: Path, *words: str) -> int:
    fixed = ["--model", model, "--dtype", "float32", "--tasks", "needle", "--lengths", "1k", "--samples", "2", "--out", str(out)]
    return main(["tune", "flexprefill:min_seq_len=0,block_size=64", "--objective", "accuracy@latency", *fixed, *words])


def test_a_search_from_the_shell_to_a_recipe_and_a_report(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    # random weights know no answer, dense or not
    assert tune(model, out, "--trials", "3", "--search", "precision=accurate|fast") == 1
    text = capsys.readouterr().out
    assert "Trials, the fastest first" in text
    assert "Dense answers none of the prompts of needle" in text
    assert "dense answers nothing, so that accuracy chose nothing" in Recipe.load(out / "recipe.yaml").note
    [method] = Recipe.load(out / "recipe.yaml").methods
    assert method.options()["min_seq_len"] == 0
    written = json.loads((out / "trials.json").read_text())
    assert list(written["trials"][0]["options"]) == ["precision", "gamma", "min_budget", "tau"]
    assert {row["dense_score"] for row in written["trials"]} == {written["trials"][0]["dense_score"]}
    assert all(row["time_share"] > 0 for row in written["trials"])
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "Dense answers none of the prompts of needle" in page
    assert "are likely to be lower on others" in page
    assert "| chosen" in (out / "report.md").read_text() or "chosen, defaults |" in (out / "report.md").read_text()

    samples = {file: file.read_bytes() for file in (out / "samples").glob("*/samples.jsonl")}
    assert len(samples) == 3
    assert {line["label"] for data in samples.values() for line in map(json.loads, data.splitlines())} == {"dense", "dense (accel)", "trial"}
    assert tune(model, out, "--trials", "4", "--search", "precision=accurate|fast", "--margin", "0.5") == 1
    assert len(list((out / "samples").iterdir())) == 4
    assert {file: file.read_bytes() for file in samples} == samples, "what was measured is not measured again"
    assert tune(model, out, "--trials", "4") == 2, "another space is another search"


def test_samples_of_a_trial_that_was_cut_short_are_kept(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.evals.models import load_model
    from accel.evals.results import RunFolder

    measure = TradeOff(load_model(model, dtype="float32"), ["needle"], [1024], 2, 0, tmp_path)
    method, append, saved = build("streaming_kv", {"keep": 0.5}), RunFolder.append, 0

    def dying(folder: RunFolder, record: SampleRecord) -> None:
        nonlocal saved
        if saved == 3:
            raise KeyboardInterrupt
        append(folder, record)
        saved += 1

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            measure(method)
    [file] = tmp_path.glob("*/samples.jsonl")
    before = file.read_bytes()
    # equal options, as a search that goes on builds them anew
    measure(build("streaming_kv", {"keep": 0.5}))
    assert file.read_bytes().startswith(before)
    assert len(file.read_bytes().splitlines()) == 6
    measure(build("streaming_kv", {"keep": 0.25}))
    assert len(list(tmp_path.glob("*/samples.jsonl"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "code"], "scored by a perplexity"), (["--search", "keep"], "--search takes OPTION=LOW..HIGH"),
        (["--search", "gama=0.1..0.9"], "has no option 'gama' to search; did you mean 'gamma'? It has: "), (["--lengths", "4k"], "holds 1024 tokens"),
        (["--lengths", "256"], "needle needs prompts of at least"), (["--samples", "0"], "at least 1"), (["--margin", "2"], "the margin is"),
    ],
    ids=["perplexity", "spelling", "option", "length", "short", "samples", "margin"],
)  # fmt: skip
def test_mistakes_are_one_line(words: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(model, tmp_path / "run", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_flags_that_say_nothing_of_this_objective_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(model, tmp_path / "run", "--data", "scenes", "--repeats", "3") == 2
    assert "--repeats and --data say nothing of accuracy@latency" in capsys.readouterr().err


def test_a_recipe_that_is_slower_than_dense_is_told(tmp_path: Path) -> None:
    found = FrontResult(build("streaming_kv"), Measured(1.0, 1.0, 1.25), True, [], 0, tmp_path)
    [notice] = tuning_result(found, margin=0.02, tasks=["needle"])["notices"]
    assert "no faster than dense here (1.25 of its prefill time)" in notice
    faster = replace(found, measured=Measured(1.0, 1.0, 0.8))
    assert tuning_result(faster, margin=0.02, tasks=["needle"])["notices"] == []


def test_a_margin_that_no_trial_can_exceed_is_told(tmp_path: Path) -> None:
    found = FrontResult(build("streaming_kv"), Measured(0.0, 0.25, 0.8), True, [], 0, tmp_path)
    [notice] = tuning_result(found, margin=0.25, tasks=["needle"])["notices"]
    assert notice == "Dense scores 0.250, no more than the margin of 0.25: no trial can lose more."
    assert tuning_result(found, margin=0.24, tasks=["needle"])["notices"] == []


@pytest.mark.parametrize(
    ("outcome", "chosen", "code"),
    [
        (Measured(0.9, 0.9, 0.5), "0.50 of dense's prefill time, the fastest of 1 trials within 0.02 of dense\nwrote", 0),
        (Measured(0.5, 0.9, 0.5), "0.50 of dense's prefill time, the highest score of 1 trials\nNo trial came within 0.02", 1),
        (Measured(0.0, 0.0, 0.5), "0.50 of dense's prefill time, the fastest of 1 trials\nDense answers none", 1),
    ],
    ids=["within", "outside", "no_basis"],
)
def test_the_exit_code_tells_whether_the_recipe_keeps_the_score(
    outcome: Measured, chosen: str, code: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TradeOff, "__call__", lambda self, method: outcome)
    assert tune(model, tmp_path / "run", "--trials", "1") == code
    assert chosen in capsys.readouterr().out
    assert (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("what", ["flexprefill", "crossover"])
def test_an_objective_that_is_misspelt_is_told_before_its_flags(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", what, "--objective", "accuracy@latncy", "--tasks", "needle"]) == 2
    assert "there is no objective 'accuracy@latncy'; did you mean 'accuracy@latency'? There are: accuracy@latency, " in capsys.readouterr().err


def test_flags_of_this_objective_are_refused_with_another(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "vflowopt", "--model", model, "--data", "scenes", "--margin", "0.1"]) == 2
    assert "--margin belong to --objective accuracy@latency" in capsys.readouterr().err
