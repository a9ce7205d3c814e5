"""`accel run` from a saved model to the run folder."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_llama import save_tiny

from accel.cli.main import main
from accel.cli.options import read_variants
from accel.errors import AccelError, OptionError
from accel.evals.controls import swept
from accel.evals.results import MEASURED

SPARSE = "flexprefill:min_seq_len=0,min_budget=128,block_size=64,gamma=0.6"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=2048))


def run(model: str, *words: str) -> int:
    return main(["run", "--model", model, "--dtype", "float32", "--method", SPARSE, "--tasks", "needle", "--lengths", "1k", *words])


def test_one_command_leaves_a_whole_folder_and_a_table(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--out", str(tmp_path / "r")) == 0
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {".lock", "config.yaml", "machine.json", "samples.jsonl", "result.json", "report.md", "report.html"}
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    labels = ["dense", "flexprefill", "streaming (same density)", "random_blocks (same density)"]
    assert [row["label"].replace(SPARSE, "").split("(min")[0] for row in result["scores"]] == labels
    assert len(result["answers"]) == 16
    assert result["n_missing"] == 0
    out = capsys.readouterr()
    assert all(label in out.out for label in labels)
    assert "report.html" in out.err


def test_a_run_stopped_at_its_limit_is_unfinished_until_resumed(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "r")
    assert run(model, "--out", folder, "--limit", "3") == 1
    assert "1 sample is missing" in capsys.readouterr().out
    assert run(model, "--out", folder) != 0, "without --resume the folder is not touched"
    assert run(model, "--out", folder, "--resume") == 0
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 4
    assert run(model, "--out", folder, "--resume", "--seed", "5") == 2
    assert "seed" in capsys.readouterr().err


def test_answers_of_lengths_that_are_no_longer_asked_for_are_not_shown(model: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "r")
    assert run(model, "--out", folder, "--lengths", "960,1k", "--controls", "none", "--warmup", "0") == 0
    assert run(model, "--out", folder, "--resume", "--lengths", "1k") == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 4, "they stay in the folder"
    assert {row["question"].split(":")[0] for row in result["answers"]} == {"needle 1024"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "needle", "--lengths", "512"], "accel: needle needs prompts of at least"),
        (["--tasks", "needle,code", "--samples", "13"], "code has 12 samples, one per module, asked for 13"),
    ],
    ids=["length", "samples"],
)
def test_prompts_that_a_later_task_does_not_have_are_told_before_the_first_is_measured(
    words: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--out", str(tmp_path / "r"), *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists(), "nothing was measured"


def test_all_prompts_that_cannot_be_made_are_told_at_once(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--out", str(tmp_path / "r"), "--tasks", "needle,key_value,code", "--lengths", "64,128", "--samples", "13") == 2
    told = capsys.readouterr().err
    pairs = re.findall(r"  - (\w+) needs prompts of at least \d+ tokens .* asked for (\d+)", told)
    assert pairs == [("needle", "64"), ("needle", "128"), ("key_value", "64"), ("key_value", "128")]
    assert told.count("code has 12 samples") == 1, "once, not for each length"
    assert "Go on with" not in told
    assert not (tmp_path / "r").exists()


def own_data(path: Path, n: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{i} and one is", "answer": str(i + 1), "max_new_tokens": 2}) + "\n" for i in range(n)))
    return f"data:{path}"


def test_all_rows_of_own_data_are_asked_unless_a_number_is_given(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three, two = own_data(tmp_path / "three.jsonl", 3), own_data(tmp_path / "two.jsonl", 2)
    words = ["--tasks", three, "--controls", "none", "--warmup", "0"]
    assert run(model, *words, "--out", str(tmp_path / "a")) == 0
    assert "rows used" not in capsys.readouterr().out
    assert len(samples_but_for_times(tmp_path / "a")) == 2 * 3
    assert run(model, *words, "--samples", "1", "--lengths", "512,1k", "--out", str(tmp_path / "b")) == 0
    told = [f"{three}: 1 of 3 rows used", f"{three}: the prompts of all lengths are the same"]
    out = capsys.readouterr()
    assert all(line in out.out and line in out.err for line in told)
    assert all(line in " ".join(json.loads((tmp_path / "b" / "result.json").read_text())["notices"]) for line in told)
    for tasks, n in ((f"{three},{two}", 2), (f"{three},needle", 1)):
        assert main(["run", "--model", model, "--tasks", tasks, "--dry-run"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["samples"] == n


def test_a_resumed_run_may_grow_and_not_shrink(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--controls", "none", "--warmup", "0", "--out", str(tmp_path / "r")]
    assert run(model, *words, "--samples", "2") == 0
    report = (tmp_path / "r" / "result.json").read_text()
    assert main(["run", "--out", str(tmp_path / "r"), "--resume", "--samples", "1"]) == 2
    told = capsys.readouterr().err
    assert "holds 2 samples per task, asked for 1" in told
    assert "the run goes on" not in told
    assert (tmp_path / "r" / "result.json").read_text() == report
    assert main(["run", "--out", str(tmp_path / "r"), "--resume", "--samples", "3"]) == 0
    assert len(samples_but_for_times(tmp_path / "r")) == 2 * 3


@pytest.mark.parametrize(("after", "error", "told"), [
    (0, AccelError("broken"), "accel: no sample is saved.\n"), (1, OptionError("wrong"), "accel: 1 sample is saved.\n"),
    (1, AccelError("broken"), "accel: 1 sample is saved. Go on with"),
], ids=["nothing saved", "asked wrongly", "to go on with"])  # fmt: skip
def test_only_what_can_be_gone_on_with_is_told_to_be(
    after: int, error: AccelError, told: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accel.evals.measuring import Measurer

    measured, calls = Measurer.measure, iter(range(10))

    def failing(*given: Any) -> Any:
        if next(calls) == after:
            raise error
        return measured(*given)

    monkeypatch.setattr(Measurer, "measure", failing)
    assert run(model, "--warmup", "0", "--out", str(tmp_path / "r")) == 2
    assert told in capsys.readouterr().err


def test_a_folder_for_a_settings_file_is_told_which_file_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(tmp_path), "--dry-run"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    (tmp_path / "config.yaml").touch()
    assert main(["run", "--config", str(tmp_path), "--dry-run"]) == 2
    assert f"did you mean {tmp_path}/config.yaml?" in capsys.readouterr().err


def test_the_dry_run_shows_flags_over_file_over_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("tasks: code\nlengths: 2k\nsamples: 3\n")
    assert main(["run", "--config", str(file), "--lengths", "1k", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["tasks"], shown["lengths"], shown["samples"], shown["model"]) == ("code", "1k", 3, "smollm2")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "nedle"], "did you mean 'needle'"),
        (["--method", "flexprefil"], "did you mean 'flexprefill'"),
        (["--resume"], "--out"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--keeps", "0.5"], "such as --method fastervlm"),
        (["--tasks", "scene"], "did you mean 'scenes'"),
        (["--lengths", "4q"], "a length is"),
        (["--lengths", ""], "a length is"),
        (["--tasks", ","], "--tasks names no task"),
        (["--model", "smolm2"], "there is no model 'smolm2'; did you mean 'smollm2'?"),
        (["--method", "fastervlm", "--keeps", "1,0.5"], "write 1.0 for everything"),
        (["--method", "fastervlm", "--keeps", "1.5"], "a share in (0, 1]"),
        (["--method", "fastervlm", "--keeps", "half"], "a share such as 0.25"),
        (["--method", "flexprefill", "--keeps", "0.5"], "keeps are tried on methods that prune tokens"),
    ],
    ids=[
        "task", "method", "resume_without_folder", "limit", "samples", "batch", "warmup", "keeps_without_pruning", "group", "length",
        "no_length", "no_task", "model", "keep_one", "keep_too_much", "keep_word", "keeps_of_nothing",
    ],
)
def test_a_wrong_word_is_told_before_anything_loads(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_scenes_are_asked_at_every_budget_beside_the_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    words = ["run", "--model", "small-vlm", "--dtype", "float32", "--method", "fastervlm", "--keeps", "0.25,14", "--samples", "2"]
    out = tmp_path / "r"
    assert main([*words, "--tasks", "scene_color,scene_relation", "--out", str(out), "--limit", "20"]) == 1
    assert main([*words, "--tasks", "scene_color,scene_relation", "--out", str(out), "--resume"]) == 0
    result = json.loads((out / "result.json").read_text())
    controls = [f"{name} (keep {keep})" for name in ("random_tokens", "uniform_tokens", "downsample") for keep in (0.25, 14)]
    labels = ["dense", "fastervlm(keep=0.25)", "fastervlm(keep=14)", *controls]
    assert [row["label"] for row in result["scores"]] == labels * 2
    assert [mean["label"] for mean in result["means"]] == labels
    assert [(row["label"], row["other"]) for row in result["paired"]] == [
        (label, other) for label, keep in (("fastervlm(keep=0.25)", 0.25), ("fastervlm(keep=14)", 14)) for other in ("dense", *(
            control for control in controls if control.endswith(f" {keep})")
        ))
    ]  # fmt: skip
    assert yaml.safe_load((out / "config.yaml").read_text())["keeps"] == [0.25, 14]
    # one scene, its picture and the budget nearest to a quarter
    assert [row["title"] for row in result["overlays"]] == ["scene_color", "fastervlm(keep=0.25)", *(c for c in controls if "0.25" in c)]
    assert all((out / row["file"]).read_bytes().startswith(b"\x89PNG") for row in result["overlays"])
    shown = capsys.readouterr().out
    assert "fastervlm(keep=0.25) − random_tokens (keep 0.25): " in shown
    assert "scene_relation is left out of every table" in shown
    assert "log-prob" not in shown
    assert any("friendly case" in limit for limit in result["limits"])


@pytest.mark.parametrize("given", [{"fastervlm": {"keep": 0.1}}, [{"fastervlm": {"keep": 0.1}}], "fastervlm:keep=0.1", ["fastervlm:keep=0.1"]])
def test_a_settings_file_may_write_a_method_as_a_recipe_does(given: Any) -> None:
    [methods] = read_variants({"method": given, "recipe": None, "model": "small-vlm"}).values()
    assert [m.changed_options() for m in methods] == [{"keep": 0.1}]


def test_files_of_one_name_in_two_folders_are_two_variants() -> None:
    given = ["snapkv:profile=/runs/a/profile.safetensors", "snapkv:profile=/runs/b/profile.safetensors"]
    variants = read_variants({"method": given, "recipe": None, "model": "smollm2"})
    assert list(variants) == ["snapkv(keep=0.5, profile=profile.safetensors)", "snapkv(keep=0.5, profile=b/profile.safetensors)"]
    both = swept(variants, [0.3, 0.1])
    assert len(both) == 4
    assert {Path(m.options()["profile"]).parent.name for label, [m] in both.items() if "b/profile" in label} == {"b"}


def test_what_is_no_method_in_a_settings_file_is_refused() -> None:
    with pytest.raises(OptionError, match="as fastervlm:keep="):
        read_variants({"method": [7], "recipe": None, "model": "small-vlm"})


def test_pictures_have_defaults_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "small-vlm", "--tasks", "scenes", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["method"], shown["samples"]) == (["fastervlm"], 50)
    assert main(["run", "--tasks", "needle", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["samples"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("samples: two", "samples must be a whole number, got 'two'"), ("samples: 1.5", "samples"), ("seed: x", "seed"), ("limit: true", "limit")],
    ids=["word", "fraction", "seed", "flag"],
)
def test_a_settings_file_must_hold_numbers_where_they_are_needed(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(line)
    assert main(["run", "--config", str(file), "--dry-run"]) == 2
    assert f"{file}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "scenes"], "cannot be asked about pictures"),
        (["--tasks", "needle", "--controls", "downsample"], "the budget of a token-pruning method"),
    ],
    ids=["kind", "control"],
)
def test_what_does_not_fit_is_told_before_the_model_is_loaded(
    words: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.evals.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(["run", "--model", model, "--method", SPARSE, "--out", str(tmp_path / "r"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_what_only_the_model_tells_leaves_no_folder(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--lengths", "4k", "--out", str(tmp_path / "r")) == 2
    assert "holds 2048 tokens" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_folder_without_samples_can_be_used_again(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.yaml").write_text("command: run\nseed: 7\n")
    (folder / "samples.jsonl").touch()
    assert run(model, "--out", str(folder), "--limit", "1") == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0


def test_an_interrupted_run_tells_how_to_go_on_and_needs_nothing_else(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accel.evals.measuring import Measurer

    folder, measured = tmp_path / "r", Measurer.measure
    with monkeypatch.context() as patch:

        def interrupted(measurer: Any, keys: Any, *rest: Any) -> Any:
            if keys[0].label != "dense":
                # what a launcher, or a batch system, sends
                os.kill(os.getpid(), signal.SIGTERM)
            return measured(measurer, keys, *rest)

        patch.setattr(Measurer, "measure", interrupted)
        assert run(model, "--out", str(folder), "--seed", "3") == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert f"1 sample is saved. Go on with `accel run --out {folder} --resume`" in capsys.readouterr().err
    before = yaml.safe_load((folder / "config.yaml").read_text())
    assert main(["run", "--out", str(folder), "--resume"]) == 0
    assert json.loads((folder / "result.json").read_text())["env"]["dtype chosen"] == "as the run's config.yaml says"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == before
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 4
    assert main(["run", "--out", str(folder), "--resume", "--seed", "4"]) == 2
    assert "seed differs from its config.yaml" in capsys.readouterr().err


def samples_but_for_times(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def test_a_run_is_run_again_from_its_own_settings(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--seed", "7", "--samples", "2", "--controls", "random_blocks", "--out", str(tmp_path / "a")) == 0
    config = str(tmp_path / "a" / "config.yaml")
    assert main(["run", "--config", config, "--out", str(tmp_path / "b")]) == 0
    assert samples_but_for_times(tmp_path / "b") == samples_but_for_times(tmp_path / "a")
    assert (tmp_path / "b" / "config.yaml").read_text() == (tmp_path / "a" / "config.yaml").read_text()
    # flags still override
    assert main(["run", "--config", config, "--samples", "1", "--controls", "none", "--out", str(tmp_path / "c")]) == 0
    assert [line["label"][:5] for line in samples_but_for_times(tmp_path / "c")] == ["dense", "flexp"]
    capsys.readouterr()
    assert main(["run", "--config", config, "--out", str(tmp_path / "c"), "--resume"]) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_a_full_disk_fails_the_run_and_what_was_saved_is_gone_on_with(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, folder = os.fsync, tmp_path / "r"

    def full(number: int) -> None:
        if (folder / "samples.jsonl").exists() and (folder / "samples.jsonl").read_bytes().count(b"\n") == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(model, "--out", str(folder)) == 2
    said = capsys.readouterr().err
    assert f"cannot write {folder / 'samples.jsonl'}: No space left on device" in said
    assert f"2 samples are saved. Go on with `accel run --out {folder} --resume`" in said
    assert main(["run", "--out", str(folder), "--resume"]) == 0
    assert len(samples_but_for_times(folder)) == 4


def test_a_report_that_cannot_be_written_fails_the_run_without_a_traceback(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr("accel.evals.report.page.write_reports", full)
    assert run(model, "--controls", "none", "--out", str(tmp_path / "r")) == 2
    said = capsys.readouterr().err
    assert "No space left on device: 'report.html'" in said
    assert "2 samples are saved" in said
    assert json.loads((tmp_path / "r" / "result.json").read_text())["n_missing"] == 0


def test_a_batch_scores_as_single_prompts_and_says_so(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--samples", "3", "--controls", "none"]
    assert run(model, *words, "--out", str(tmp_path / "one")) == 0
    assert run(model, *words, "--batch-size", "2", "--out", str(tmp_path / "two")) == 0
    assert "in batches of 2" in capsys.readouterr().out
    one, two = ({(line["label"], line["sample"]): line for line in samples_but_for_times(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, line in one.items():
        assert two[key]["log_probs"] == pytest.approx(line["log_probs"], abs=1e-3)
        assert two[key]["hits"] == line["hits"]
        assert two[key]["batch"] == (1 if key[1] == 2 else 2)
    # whatever the size of the batches, the folder tells it when the run goes on or is run again
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["batch_size"] == 2
    assert main(["run", "--out", str(tmp_path / "two"), "--resume", "--batch-size", "3"]) == 2
    assert "batch_size differs" in capsys.readouterr().err


PICTURES = ["run", "--model", "small-vlm", "--dtype", "float32", "--method", "fastervlm", "--keeps", "0.5,0.25", "--tasks", "scene_color"]


def test_a_run_that_is_resumed_and_still_unfinished_draws_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    words = [*PICTURES, "--samples", "2", "--controls", "random_tokens", "--out", str(tmp_path)]
    assert main(words) == 0
    # of the method that the control is compared to, one sample is gone, and one of dense, which comes first when the run goes on
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    left = [line for line in lines if (line["label"], line["sample"]) not in (("fastervlm(keep=0.25)", 0), ("dense", 0))]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in left))
    assert main(["run", "--out", str(tmp_path), "--resume", "--samples", "3", "--limit", "1"]) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["title"] for row in result["overlays"]] == ["scene_color", "random_tokens (keep 0.25)"]
    assert "no mean yet" in capsys.readouterr().out


def test_a_failing_gallery_does_not_cost_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory for pictures")

    monkeypatch.setattr("accel.evals.pictures.gallery.watch_reply", lambda *_, **__: fail())
    with pytest.raises(RuntimeError, match="no memory for pictures"):
        main([*PICTURES, "--samples", "2", "--controls", "none", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "result.json").read_text())["means"]) == 3
    assert (tmp_path / "report.html").exists()


def test_a_resumed_run_keeps_its_methods_and_budgets_or_takes_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    assert main([*PICTURES, "--samples", "1", "--controls", "none", "--out", str(tmp_path), "--limit", "1"]) == 1
    again = ["run", "--out", str(tmp_path), "--resume"]
    for words in ([], ["--keeps", "0.5,0.25"], ["--method", "fastervlm"]):
        assert main([*again, *words]) == 0
        assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3
    assert main([*again, "--keeps", "0.1"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["label"] for row in result["scores"]] == ["dense", "fastervlm(keep=0.1)"]
    capsys.readouterr()


def test_cache_methods_are_swept_beside_controls_and_their_bytes_are_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", model, "--dtype", "float32", "--method", "snapkv", "--tasks", "needle,key_value", "--lengths", "1k"]
    assert main([*words, "--keeps", "0.5,0.2", "--shared-prefill", "--out", str(tmp_path / "r")]) == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    labels = [row["label"] for row in result["scores"] if row["task"] == "key_value"]
    assert labels == ["dense", "snapkv(keep=0.5)", "snapkv(keep=0.2)",
                      *(f"{name} (keep {keep})" for name in ("random_kv", "streaming_kv") for keep in (0.5, 0.2))]  # fmt: skip
    assert (result["config"]["questions"], result["config"]["shared_prefill"]) == ("apart, behind one cache", True)
    assert all(row["cache"]["peak_bytes"] < row["cache"]["whole_bytes"] for row in result["scores"] if not row["is_baseline"])
    assert {row["other"] for row in result["comparisons"]} == {"dense", *labels[3:]}
    assert "fronts" not in result, "some were timed on the last tokens of the prompt only"
    assert any(limit.startswith("key_value: its question stands at the end") for limit in result["limits"])
    out = capsys.readouterr().out
    for text in ("of whole", "random_kv (keep 0.2)", "up to its last 64 tokens"):
        assert text in out
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Against the most that the cache holds" in page
    # the settings of the run are taken over
    assert main(["run", "--out", str(tmp_path / "r"), "--resume", "--dtype", "float32"]) == 0


def test_a_run_that_compares_dense_with_itself_says_so_before_it_begins(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", model, "--tasks", "needle", "--lengths", "1k", "--samples", "1", "--controls", "none", "--warmup", "0"]
    for method, is_idle in (("streaming", True), ("streaming:min_seq_len=0,block_size=16,window_blocks=2", False)):
        out = tmp_path / method.partition(":")[2]
        assert main([*words, "--method", method, "--out", str(out / "run")]) == 0
        told = "streaming: prompts of 1024 tokens run dense (shorter than 4096 tokens), so that dense is compared with itself there"
        assert (told in capsys.readouterr().err) is is_idle
        assert any(told in notice for notice in json.loads((out / "run" / "result.json").read_text())["notices"]) is is_idle
