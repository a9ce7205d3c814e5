"""Run folders side by side: what is joined, what is told to be unlike, what is refused, and when a gate fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_bench, write_run

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.compare.folders import _is_same, compare, display_names, read_sources
from accel.evals.compare.gate import failures, gate_notices, gate_rows, parse_margins
from accel.evals.report.comparisons import front_figures, front_table
from accel.evals.report.page import _accuracy_figures
from accel.registry import build

pytest.importorskip("scipy")


def gated(folder: Path, given: str, confidence: float | None = None) -> list[dict[str, Any]]:
    sources = read_sources([folder])
    return gate_rows(sources, parse_margins([given]), display_names(sources), confidence=confidence)


# --- joining ------------------------------------------------------------------------------------------------------------------


def test_times_of_a_bench_are_joined_by_label_and_options(tmp_path: Path) -> None:
    write_run(tmp_path / "scores", {"m": [1, 1, 0, 1]}, prefill_ms={"m": 70.0})
    write_bench(tmp_path / "times", {"dense (sdpa)": 100.0, "dense (accel)": 80.0, "m": 40.0})
    result = compare(read_sources([tmp_path / "scores", tmp_path / "times"]))
    found = {row["label"]: row for row in result["fronts"]}
    assert {label: row["ms"] for label, row in found.items()} == {"dense": 100.0, "dense (accel)": 80.0, "m": 40.0}
    assert found["dense (accel)"]["score"] == found["dense"]["score"] == 1.0, "our dense path computes the same"
    assert {label for label, row in found.items() if row["is_front"]} == {"dense (accel)", "m"}
    assert result["notices"] == []


def test_another_option_under_the_same_label_is_not_joined_and_told(tmp_path: Path) -> None:
    write_run(tmp_path / "scores", {"m": [1, 1]})
    write_bench(tmp_path / "times", {"dense (sdpa)": 100.0, "m": 40.0}, gamma=0.5)
    result = compare(read_sources([tmp_path / "scores", tmp_path / "times"]))
    assert {row["time"] for row in result["fronts"]} == {"prefill_ms"}
    assert any("times timed what no folder has scores of (another label or other options): m" in line for line in result["notices"])


def test_other_machines_have_fronts_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "scores", {"m": [1, 1]}, device="Small, 1 threads")
    write_run(tmp_path / "more", {"n": [1, 0]}, device="Large, 64 threads")
    write_bench(tmp_path / "times", {"dense (sdpa)": 100.0, "m": 1.0}, device="Large, 64 threads")
    result = compare(read_sources([tmp_path / "scores", tmp_path / "more", tmp_path / "times"]))
    rows = {(row["machine"], row["label"]): row["time"] for row in result["fronts"]}
    assert set(rows.values()) == {"prefill_ms"}, "a time of the large machine is none of the small one"
    assert {machine for machine, _ in rows} == {"Small, 1 threads, float32", "Large, 64 threads, float32"}
    assert any(line.startswith("Other machines, threads, data types or batches") for line in result["notices"])


def test_a_label_of_two_folders_is_shown_twice_and_the_later_one_compared_with_the_first(tmp_path: Path) -> None:
    write_run(tmp_path / "old", {"m": [1, 1, 1, 0]})
    write_run(tmp_path / "new", {"m": [1, 0, 0, 0]})
    result = compare(read_sources([tmp_path / "old", tmp_path / "new"]))
    assert [row["label"] for row in result["scores"]] == ["dense [old]", "m [old]", "dense [new]", "m [new]"]
    rows = {(row["label"], row["other"]): row for row in result["comparisons"]}
    assert set(rows) == {("m [old]", "dense [old]"), ("m [new]", "dense [new]"), ("m [new]", "m [old]")}
    assert (rows["m [new]", "m [old]"]["better"], rows["m [new]", "m [old]"]["worse"]) == (0, 2)


def test_folders_of_other_lengths_share_their_labels(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{n}k", {"m": [1, 0], "w": [0, 0]}, tokens=1024 * n, controls=("w",)) for n in (1, 2)]
    result = compare(read_sources(folders))
    assert [(row["tokens"], row["label"]) for row in result["scores"]] == [(n, label) for n in (1024, 2048) for label in ("dense", "m", "w")]
    rows = [(row["label"], row["other"], row["tokens"], row["n"]) for row in result["comparisons"]]
    # prompts of the same number are made from one draw, and count once over all
    assert rows == [("m", "dense", 1024, 2), ("m", "dense", 2048, 2), ("m", "dense", None, 2)]
    assert [(row["tokens"], row["label"]) for row in result["fronts"]] == [(n, label) for n in (1024, 2048) for label in ("dense", "m", "w")]
    assert result["notices"] == []


def test_one_label_with_other_options_is_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{n}k", {"m": [1, 0]}, tokens=1024 * n, gamma=0.1 * n) for n in (1, 2)]
    assert {row["label"] for row in compare(read_sources(folders))["scores"]} == {"dense", "m [1k]", "m [2k]"}


def test_scores_stand_by_task_and_length_and_then_by_folder(tmp_path: Path) -> None:
    places = [("needle", 2048), ("needle", 1024), ("code", 1024)]
    folders = [write_run(tmp_path / name, {"m": [1]}) for name in ("old", "new")]
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        rows = [{**row, "task": task, "tokens": tokens} for task, tokens in places for row in result["scores"]]
        (folder / "result.json").write_text(json.dumps({**result, "scores": rows}))
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        samples = [{**line, "task": task, "tokens": tokens} for task, tokens in places for line in lines]
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    labels = ["dense [old]", "m [old]", "dense [new]", "m [new]"]
    assert [(row["task"], row["tokens"], row["label"]) for row in compare(read_sources(folders))["scores"]] == [
        (task, tokens, label) for task, tokens in [("needle", 1024), ("needle", 2048), ("code", 1024)] for label in labels
    ]


def test_the_only_methods_of_two_folders_are_compared_with_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"m": [1, 1]})
    write_run(tmp_path / "b", {"n": [0, 0]})
    pairs = {(row["label"], row["other"]) for row in compare(read_sources([tmp_path / "a", tmp_path / "b"]))["comparisons"]}
    assert ("n", "m") in pairs


def test_samples_beyond_the_settings_of_a_run_and_half_written_lines_stay_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [1, 1, 0]}, samples=2)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"task": "needle", "la')
    before = (folder / "samples.jsonl").read_bytes()
    [source] = read_sources([folder])
    assert {record.sample for record in source.records} == {0, 1}
    assert (folder / "samples.jsonl").read_bytes() == before, "another process may be writing there"


def test_a_sample_that_lies_in_two_files_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [1, 0, 1, 0]})
    # as where a kill came between taking a part in and removing it
    (folder / "samples-1.jsonl").write_text((folder / "samples.jsonl").read_text())
    [row] = compare(read_sources([folder]))["comparisons"]
    assert (row["n"], row["worse"], row["test"]) == (4, 2, "exact McNemar")


def test_scores_without_their_samples_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [1, 0]})
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(line for line in lines if '"label": "m"' not in line))
    with pytest.raises(AccelError, match=r"result\.json has scores of m on needle at 1024 tokens, and samples\.jsonl has none"):
        read_sources([folder])


def test_options_at_their_defaults_in_the_run_are_compared_too(tmp_path: Path) -> None:
    # labels of recipes are alike whatever the options
    at_defaults: list[dict[str, dict[str, Any]]] = [{"flexprefill": {}}]
    timed = {"method": "flexprefill", **build("flexprefill").options()}
    assert _is_same({"methods": [timed]}, at_defaults)
    assert not _is_same({"methods": [{**timed, "gamma": 0.5}]}, at_defaults)


def test_the_same_timed_twice_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "scores", {"m": [1, 1]})
    for name, ms in (("first", 40.0), ("second", 30.0)):
        write_bench(tmp_path / name, {"dense (sdpa)": 100.0, "m": ms})
    result = compare(read_sources([tmp_path / name for name in ("scores", "first", "second")]))
    assert {row["label"]: row["ms"] for row in result["fronts"]}["m"] == 30.0
    assert "m at 1024 tokens was timed in first, second: accuracy against time goes by the last of them." in result["notices"]


def test_tasks_that_failed_their_gate_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [1, 0]})
    result = json.loads((folder / "result.json").read_text())
    gates = [{"task": "scene_word", "passes": False}, {"task": "needle", "passes": True}]
    (folder / "result.json").write_text(json.dumps({**result, "gates": gates}))
    assert any(line.startswith("a: scene_word left out of everything") for line in compare(read_sources([folder]))["notices"])


# --- what is unlike -----------------------------------------------------------------------------------------------------------


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"m": [1]})
    write_run(tmp_path / "b", {"m": [1]}, model="other")
    with pytest.raises(UnsupportedError, match="different models") as caught:
        read_sources([tmp_path / "a", tmp_path / "b"])
    assert caught.value.reasons == ["a: tiny", "b: other"]


def test_other_seeds_and_prompts_are_told_and_never_paired(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"m": [1, 1]})
    write_run(tmp_path / "b", {"m": [0, 0]}, seed=1, prompt="b")
    write_run(tmp_path / "c", {"m": [0, 0]}, prompt="c")
    result = compare(read_sources([tmp_path / "a", tmp_path / "b", tmp_path / "c"]))
    assert "Other seeds make other prompts, which are not compared one by one (a, c: 0; b: 1)." in result["notices"]
    assert "needle at 1024 tokens: 2 of 2 prompts of c are not those of a; they are not compared one by one." in result["notices"]
    assert not any(row["other"].startswith("m") for row in result["comparisons"])


def test_runs_of_other_prompts_have_fronts_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"m": [1, 1]}, dense=[0, 0])
    write_run(tmp_path / "b", {"n": [0, 0]}, seed=1, prompt="b")
    write_run(tmp_path / "c", {"o": [0, 0]})
    write_run(tmp_path / "d", {"p": [0, 0, 0]})
    write_bench(tmp_path / "times", {"dense (sdpa)": 100.0, "m": 40.0})
    result = compare(read_sources([tmp_path / name for name in ("a", "b", "c", "d", "times")]))
    found: dict[str, list[str]] = {}
    for row in result["fronts"]:
        found.setdefault(row["prompts"], []).append(row["label"])
    assert found == {"a, c": ["dense [a]", "dense [c]", "m", "o"], "b": ["dense [b]", "n"], "d": ["dense [d]", "p"]}
    assert {row["label"]: row["ms"] for row in result["fronts"]}["m"] == 40.0, "times belong to no prompts"
    assert {row["label"] for row in result["fronts"] if row["prompts"] == "b" and row["is_front"]} == {"dense [b]"}, "not beaten by m of a"
    assert "Other prompts, or another number of them, have another accuracy against time: a, c; b; d." in result["notices"]
    table, figures = front_table(result["fronts"]), front_figures(result["fronts"], {})
    assert [row[0] for row in table.rows if row[1] == "n"] == ["1K, prompts of b"]
    assert "1K, prompts of b; 1K, prompts of d: score of needle; prefill while it was scored." in table.caption
    alike = front_table([row for row in result["fronts"] if row["prompts"] != "a, c"]).caption
    assert alike.endswith(" 1K: score of needle; prefill while it was scored."), "no list of folders where all mean the same"
    assert [figure.title for figure in figures] == [f"1K tokens, prompts of {names}" for names in found]


def test_an_unfinished_run_and_other_versions_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"m": [1]}, n_missing=3)
    write_run(tmp_path / "b", {"m": [1]}, env={"torch": "9.9"})
    notices = compare(read_sources([tmp_path / "a", tmp_path / "b"]))["notices"]
    assert "a is not finished: 3 samples are missing." in notices
    assert "Other versions of torch: a: 2.13; b: 9.9." in notices


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds no result.json"),
        (lambda folder: (folder / "result.json").write_text("{"), "cannot read"),
        (lambda folder: (folder / "result.json").write_text('{"command": "demo"}'), "was written by `accel demo`: compare takes folders of"),
        (lambda folder: (folder / "result.json").write_text('{"command": "run", "scores": []}'), "holds no samples"),
    ],
    ids=["empty", "broken", "demo", "no_samples"],
)
def test_what_is_no_run_folder_is_refused(prepare: Any, message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(AccelError, match=message):
        read_sources([tmp_path])


def test_folders_without_scores_and_folders_named_twice_are_refused(tmp_path: Path) -> None:
    write_bench(tmp_path / "times", {"dense (sdpa)": 1.0})
    with pytest.raises(OptionError, match="none of these folders holds scores"):
        read_sources([tmp_path / "times"])
    with pytest.raises(OptionError, match="named twice"):
        read_sources([tmp_path / "times", tmp_path / "times" / ".." / "times"])


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run", {"m": [1]}) for parent in ("x", "y")]
    assert [source.name for source in read_sources(folders)] == ["x/run", "y/run"]


def test_a_folder_that_is_not_there_is_told_from_a_run_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(AccelError, match="gone is not there"):
        read_sources([tmp_path / "gone"])
    (tmp_path / "file").touch()
    with pytest.raises(AccelError, match="file is no folder"):
        read_sources([tmp_path / "file"])


# --- the plots of density -----------------------------------------------------------------------------------------------------


def test_a_method_that_ran_dense_stands_at_density_one_and_dense_alone_has_no_plot() -> None:
    pytest.importorskip("matplotlib")
    dense = {"task": "needle", "tokens": 1024, "label": "dense", "score": {"value": 1.0, "stderr": 0.0}, "density": None, "is_baseline": True}
    short = {**dense, "label": "short", "is_baseline": False, "calls": {"sparse": 0, "dense": {"shorter than min_seq_len": 30}}}
    cache = {**short, "label": "cache", "calls": {"sparse": 0, "dense": {}}}
    [figure] = _accuracy_figures([dense, short, cache], {})
    assert "short" in (figure.svg or "")
    assert "cache" not in (figure.svg or ""), "what chooses no tiles has no density"
    assert _accuracy_figures([dense, {**dense, "label": "dense [b]"}], {}) == []


# --- the gate -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "passes"), [("0.25", True), ("0.2", False), ("needle=0.25", True), ("0.01,needle=0.25", True), ("1,needle=0.2", False)]
)  # fmt: skip
def test_the_gate_fails_where_more_is_lost_than_the_margin(margin: str, passes: bool, tmp_path: Path) -> None:
    [row] = gated(write_run(tmp_path / "a", {"m": [1, 1, 1, 0]}), margin)
    assert (row["loss"], row["n"], row["passes"]) == (0.25, 4, passes)


def test_the_sentence_names_method_task_length_loss_and_margin(tmp_path: Path) -> None:
    rows = gated(write_run(tmp_path / "a", {"m": [1, 1, 1, 0]}), "0.02")
    assert failures(rows) == ["gate: m on needle at 1024 tokens: it loses 0.250 of score against dense, more than the margin of 0.02 (4 prompts)"]


def test_a_gain_passes_and_controls_are_not_gated(tmp_path: Path) -> None:
    rows = gated(write_run(tmp_path / "a", {"m": [1, 1], "random": [0, 0]}, dense=[1, 0], controls=["random"]), "0")
    assert [(row["label"], row["loss"], row["passes"]) for row in rows] == [("m", -0.5, True)]


def test_a_method_that_did_nothing_passes_with_a_word_on_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [1, 1]})
    told = "gate: m on needle at 1024 tokens: the method did nothing to these prompts, so that dense was compared with itself."
    assert told not in gate_notices(gated(folder, "0.02"))
    file = folder / "samples.jsonl"
    file.write_text(file.read_text().replace('"density": 0.5', '"density": null'))
    assert told in gate_notices(gated(folder, "0.02"))
    assert gate_notices(gated(folder, "1", 0.9), 0.9) == [told]


def test_with_a_confidence_few_prompts_do_not_pass_though_nothing_was_lost(tmp_path: Path) -> None:
    few, many = (write_run(tmp_path / str(n), {"m": [1] * n}) for n in (4, 200))
    assert gated(few, "0.02")[0]["passes"]
    [row] = gated(few, "0.02", 0.95)
    assert (row["passes"], row["loss"]) == (False, 0.0)
    assert "it loses nothing (+0.000 of score) against dense, and up to 0.403 cannot be ruled out (95%, one-sided, 4 prompts)" in row["why"]
    assert gated(many, "0.02", 0.95)[0]["passes"]


def test_a_perplexity_is_gated_by_its_rise(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [0, 0, 0]}, log_prob={"dense": -2.0, "m": -2.03}, metric="perplexity")
    [row] = gated(folder, "0.02")
    assert row["loss"] == pytest.approx(2.718281828**0.03 - 1)
    assert not row["passes"]
    assert "of perplexity" in row["why"]
    assert gated(folder, "0.04")[0]["passes"]
    assert gated(folder, "0.04", 0.95)[0]["bound"] == pytest.approx(row["loss"]), "three prompts that agree"


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_a_task_of_which_dense_answers_nothing_is_no_basis_for_a_gate(confidence: float | None, tmp_path: Path) -> None:
    [row] = gated(write_run(tmp_path / "a", {"m": [0, 1]}, dense=[0, 0]), "1", confidence)
    assert (row["passes"], row["loss"], row["n"]) == (False, None, 2)
    assert row["why"] == "dense answers none of 2 prompts: no method can be told from it; choose a task it can do"
    assert gate_notices([row]) == [], "it fails, which says enough"


def test_few_prompts_and_a_margin_that_no_loss_exceeds_are_told(tmp_path: Path) -> None:
    few, loose, fine = (write_run(tmp_path / name, {"m": [1] * n}, dense=dense) for name, n, dense in
                        [("few", 9, None), ("loose", 10, [1] + [0] * 9), ("fine", 10, None)])  # fmt: skip
    [notice] = gate_notices(rows := gated(few, "0.02"))
    assert notice.startswith("gate: needle at 1024 tokens rests on 9 prompts; fewer than 10 tell little of others")
    assert f"`accel run --out {few} --resume --samples 10`" in notice
    assert gate_notices(rows, 0.95) == [], "a confidence counts the prompts"
    [notice] = gate_notices(gated(loose, "0.1"))
    assert notice == "gate: needle at 1024 tokens: dense scores 0.100, no more than the margin of 0.1, so that no loss can fail it."
    assert gate_notices(gated(loose, "0.09")) == gate_notices(gated(fine, "0.02")) == []


def test_prompts_that_were_not_answered_fail_the_gate(tmp_path: Path) -> None:
    [row] = gated(write_run(tmp_path / "a", {"m": [1, 1]}, samples=3, dense=[1, 1, 1]), "1")
    assert not row["passes"]
    assert "have both answered 2 of 3 prompts" in row["why"]


@pytest.mark.parametrize("given", ["x", "needle=", "=0.1", "-0.1", "2", "needle=nan"])
def test_margins_are_checked(given: str) -> None:
    with pytest.raises(OptionError, match="a gate is a margin of score"):
        parse_margins([given])


def test_gates_without_an_object_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"m": [1]})
    with pytest.raises(OptionError, match=r"no folder has scores of ruler.*There are: needle"):
        gated(folder, "ruler=0.1")
    with pytest.raises(OptionError, match="nothing to be gated"):
        gated(write_run(tmp_path / "b", {"random": [1]}, controls=["random"]), "0.1")
    with pytest.raises(OptionError, match=r"between 0.5 and 1"):
        gated(folder, "0.1", 95)
