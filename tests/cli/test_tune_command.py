"""`accel tune`: what can be searched, a search on pictures from the shell to a recipe that works, and a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import accel
from accel import Recipe
from accel.cli.main import main
from accel.cli.options import parse_method
from accel.cli.tune import _given

pytest.importorskip("optuna")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn pictures with a question each."""
    from accel.evals.scenes import held_out

    folder = tmp_path_factory.mktemp("asked")
    rows = []
    for item in held_out("color", "validation", 3):
        Image.fromarray(item.scene.image).save(folder / f"{item.index}.png")
        rows.append({"image": f"{item.index}.png", "text": item.question.text})
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def tune(what: str, data: Path | str, out: Path, *words: str, model: str = "small-vlm") -> int:
    return main(["tune", what, "--model", model, "--dtype", "float32", "--data", str(data), "--out", str(out), *words])


def test_a_search_on_pictures_writes_a_recipe_that_can_be_applied(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert tune("vflowopt:keep=0.25,alpha=0", asked / "asked.jsonl", out, "--trials", "4") == 0
    assert "4 trials, 0 failed" in capsys.readouterr().out
    written = json.loads((out / "trials.json").read_text())
    assert written["fixed"] == {"keep": 0.25, "alpha": 0.0}, "also options that are given their default"
    assert set(written["trials"][1]["options"]) == {"r1_factor", "r2", "hub_factor", "cell"}
    assert written["score"] == max(row["score"] for row in written["trials"]) <= 3
    assert written["score"] >= written["default_score"] == written["trials"][0]["score"]
    recipe = Recipe.load(out / "recipe.yaml")
    assert all(word in recipe.note for word in ("information_flow", "small-vlm", "asked.jsonl", "3 samples"))

    from accel.evals.models import load_model
    from accel.evals.pictures.information_flow import information_flow, prepare

    loaded = load_model("small-vlm")
    [method] = recipe.methods
    score = information_flow(method, loaded.model, prepare(loaded, str(asked / "asked.jsonl")))   # type: ignore[arg-type]
    assert score == pytest.approx(written["score"], abs=1e-6)
    with accel.apply(loaded.model, recipe) as handle:
        assert handle.methods == recipe.methods


def test_a_search_goes_on_only_on_the_same_pictures(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert tune("fastervlm:keep=0.25,head_reduce=mean", asked / "asked.jsonl", out, "--trials", "2") == 0
    assert tune("fastervlm:keep=0.25,head_reduce=mean", asked / "asked.jsonl", out, "--trials", "3") == 0
    assert len(json.loads((out / "trials.json").read_text())["trials"]) == 3
    capsys.readouterr()
    changed = tmp_path / "asked.jsonl"
    rows = [json.loads(line) for line in (asked / "asked.jsonl").read_text().splitlines()]
    changed.write_text("\n".join(json.dumps({"image": str(asked / row["image"]), "text": row["text"]}) for row in rows[:2]))
    assert tune("fastervlm:keep=0.25,head_reduce=mean", changed, out, "--trials", "3") != 0
    assert "holds another search" in (err := capsys.readouterr().err)
    assert "2 samples" in err


@pytest.mark.parametrize(
    "what, data, message",
    [
        ("vflowopt", "gone", "there is no 'gone' to tune on"), ("vflowopt:keep=2.0", "scenes", "keep must lie in"),
        ("uniform_tokens", "scenes", "uniform_tokens has nothing to tune"), ("flexprefill", "scenes", "flexprefill has no objective"),
        ("croosover", "scenes", "nothing to tune that is called 'croosover'; did you mean 'crossover'?"),
    ],
    ids=["no_data", "bad_option", "nothing_to_tune", "no_objective", "crossover"],
)  # fmt: skip
def test_mistakes_are_one_line(what: str, data: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(what, data, tmp_path / "run", "--trials", "2") != 0
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("flag", ["--trials", "--samples", "--repeats"])
def test_numbers_that_measure_nothing_are_told_before_anything_loads(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"--trials": ("vflowopt", "--data", "scenes"), "--samples": ("flexprefill", "--objective", "accuracy@latency")}
    assert main(["tune", *words.get(flag, ("crossover",)), flag, "0"]) == 2
    assert capsys.readouterr().err == f"accel: {flag} must be at least 1, got 0\n"


def test_a_text_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_llama import save_tiny

    model = str(save_tiny(tmp_path / "tiny", positions=64))
    assert tune("vflowopt", "scenes", tmp_path / "run", "--trials", "2", model=model) != 0
    assert "cannot be asked about pictures: it is a text model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, shown, hidden",
    [
        (("crossover",), ("what: crossover", "method:", "lengths: 1k,2k,4k,8k", "repeats:"), ("trials:", "data:", "objective:", "margin:")),
        (("flexprefill", "--objective", "accuracy@latency"), ("tasks: needle,fewshot", "lengths: 2k", "margin: 0.02"), ("method:", "data:")),
        (("hack:keep=0.5",), ("what: hack:keep=0.5", "data:"), ("trials:", "objective:", "method:", "lengths:", "repeats:")),
        (("vflowopt", "--trials", "3"), ("what: vflowopt", "trials: 3", "data:", "objective:"), ("method:", "lengths:", "repeats:")),
    ],
    ids=["crossover", "trade_off", "calibration", "search"],
)
def test_a_dry_run_says_what_is_tuned_and_by_which_settings(
    words: tuple[str, ...], shown: tuple[str, ...], hidden: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *words, "--model", "small-var", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(line in text for line in shown)
    assert not any(line in text for line in hidden)
    (tmp_path / "settings.yaml").write_text(text)
    assert main(["tune", "--config", str(tmp_path / "settings.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == text, "a file that --config takes"


def test_a_search_where_there_is_only_a_calibration_says_which_flag_asked_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "hack:keep=0.5", "--model", "small-var", "--trials", "10"]) == 2
    err = capsys.readouterr().err
    assert "--trials asked for" in err
    assert "Without, `accel tune hack:keep=0.5 --model … --data …` makes a profile" in err
    assert "loading" not in err


def test_help_shows_a_calibration_of_each_kind_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "accel tune hack:keep=0.3 --model small-var --data classes" in text
    assert "For hack: classes" in text
    assert main(["tune", "dyvte"]) == 0
    assert "12 to 25 minutes" in capsys.readouterr().out


def test_the_list_speaks_of_the_crossover_only_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 0
    blocks: dict[str, list[str]] = {}
    crossover, trade_off, *lines = capsys.readouterr().out.splitlines()
    assert (crossover.split(":")[0], trade_off.split(":")[0]) == ("crossover", "--objective accuracy@latency")
    for line in lines:
        if line and not line.startswith(" "):
            name = line.split(":")[0]
        blocks.setdefault(name if line else "", []).append(line)
    assert blocks["vflowopt"][-1] == "  objectives: information_flow"
    assert "accel tune crossover" in blocks["flexprefill"][-1]
    from accel.registry import method_class

    for name in filter(None, blocks):
        assert not any("crossover" in line for line in blocks[name]) or method_class(name).kind == "sparse_attention"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("vflowopt", {}), ("vflowopt:keep=0.25", {"keep": 0.25}), ("vflowopt: alpha = 0 ,keep=0.1", {"keep": 0.1, "alpha": 0}),
        ("vflowopt:pixel_mean=[0.5,0.5,0.5],r3=null", {"pixel_mean": (0.5, 0.5, 0.5), "r3": None}),
    ],
    ids=["none", "one", "spaces", "list_and_null"],
)  # fmt: skip
def test_options_given_on_the_command_line_are_known_even_at_their_defaults(text: str, expected: dict[str, Any]) -> None:
    assert _given(text, parse_method(text)) == expected
