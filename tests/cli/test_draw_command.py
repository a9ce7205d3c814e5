"""`accel draw` from a model to a folder that a metric script reads; dense and with methods, from classes and from texts, stopped and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import next_scale
import pytest
import torch

from accel.cli.draw import parse_labels
from accel.cli.main import main
from accel.errors import OptionError
from accel.evals.drawing.artists import save_features
from accel.models.infinity import TextFeatures

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parents[2]
PROMPTS = ("a fox", "a hare")


def draw(out: Path, *words: str, model: str = "small-var") -> int:
    return main(["draw", "--model", model, "--dtype", "float32", "--out", str(out), *words])


def pixels(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): Image.open(path).tobytes() for path in sorted((root / "images").rglob("*.png"))}


def furthest(one: dict[str, bytes], other: dict[str, bytes]) -> list[int]:
    """The largest difference of a level, for each picture."""
    assert one.keys() == other.keys()
    pairs = [[np.frombuffer(part[name], np.uint8).astype(int) for part in (one, other)] for name in one]
    return [int(np.abs(a - b).max()) for a, b in pairs]


def test_the_small_var_fills_an_array_with_its_classes_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from accel.evals.models import LoadedImageModel, load_model

    assert draw(tmp_path / "x", "--labels", "0-9", "--per-class", "3", "--layout", "adm") == 0
    found = np.load(tmp_path / "x" / "samples.npz")
    assert found["arr_0"].shape == (30, 32, 32, 3)
    assert found["arr_1"].tolist() == [*range(10)] * 3
    loaded = load_model("small-var")
    assert isinstance(loaded, LoadedImageModel)
    seen = loaded.judge.classes(torch.from_numpy(found["arr_0"]).permute(0, 3, 1, 2) / 255)
    assert (seen == torch.from_numpy(found["arr_1"])).float().mean() >= 0.8, "the judge sees the classes that the labels name"
    said = capsys.readouterr()
    assert f"evaluator.py REFERENCE.npz {tmp_path / 'x' / 'samples.npz'}" in said.out
    assert "REFERENCE.npz: real pictures of the 10 classes that the model was trained on, of 32×32 pixels" in said.out
    assert "imagenet" not in said.out
    assert "30/30" in said.err


def test_methods_change_pictures_and_nothing_else_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--labels", "2,4-5", "--per-class", "2")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schema: 1\nmethods:\n- h2o: {keep: 0.2}\n")
    for name, more in (("dense", ()), ("ones", ("--batch", "1")), ("h2o", ("--method", "h2o:keep=0.2")), ("recipe", ("--recipe", str(recipe)))):
        assert draw(tmp_path / name, *words, *more) == 0
    dense, ones, h2o, by_recipe = (pixels(tmp_path / name) for name in ("dense", "ones", "h2o", "recipe"))
    assert len(dense) == 6
    assert max(furthest(dense, ones)) <= 1, "rounding, in float32"
    assert h2o == by_recipe
    assert min(furthest(dense, h2o)) > 20, "pairs: the same numbers, labels and seeds"
    assert (tmp_path / "dense" / "pictures.jsonl").read_bytes() == (tmp_path / "h2o" / "pictures.jsonl").read_bytes()
    assert "h2o" in capsys.readouterr().out, "what the method did is printed"


def test_the_same_command_goes_on_and_another_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--labels", "0-3", "--per-class", "2", "--layout", "adm")
    assert draw(tmp_path / "x", *words) == 0
    before = pixels(tmp_path / "x")
    for name in ("000001.png", "000006.png"):
        (tmp_path / "x" / "images" / name).unlink()
    (tmp_path / "x" / "samples.npz").unlink()
    capsys.readouterr()
    assert draw(tmp_path / "x", *words) == 0
    assert "2 of 8 pictures to draw" in capsys.readouterr().err
    assert pixels(tmp_path / "x") == before
    assert draw(tmp_path / "x", *words) == 0
    assert "loading" not in capsys.readouterr().err, "nothing to draw, nothing to load"
    for change, named in (
        (("--seed", "1"), "seed was 0 and is 1"), (("--method", "h2o:keep=0.5"), "methods was"), (("--top-k", "3"), "top_k was 0 and is 3"),
        (("--per-class", "3"), "pictures of each was 2 and is 3"), (("--labels", "0-4"), "labels was 0-3 and is 0-4"),
        (("--batch", "3"), "batch was 8 and is 3"),
    ):  # fmt: skip
        assert draw(tmp_path / "x", *words, *change) == 2
        assert named in capsys.readouterr().err
    assert draw(tmp_path / "x", *words, "--npz-only") == 0
    assert not pixels(tmp_path / "x")
    assert draw(tmp_path / "x", *words, "--npz-only") == 0


def test_files_of_methods_count_by_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from head_profiles import info_of, profile_of

    from accel.evals.models import load_model

    info = info_of(load_model("small-var").model)
    words = ("--labels", "2,4", "--per-class", "1")

    def recipe(folder: str, kinds: str) -> tuple[str, str]:
        (tmp_path / folder).mkdir()
        profile_of([kinds] * 6, info).save(tmp_path / folder / "profile.safetensors")
        (tmp_path / folder / "r.yaml").write_text("schema: 1\nmethods:\n- hack: {keep: 0.3, profile: profile.safetensors}\n")
        return "--recipe", str(tmp_path / folder / "r.yaml")

    first = recipe("first", "CCSS")
    assert draw(tmp_path / "x", *words, *first) == 0
    before = pixels(tmp_path / "x")
    (tmp_path / "first").rename(tmp_path / "moved")
    next((tmp_path / "x" / "images").iterdir()).unlink()
    capsys.readouterr()
    assert draw(tmp_path / "x", *words, "--recipe", str(tmp_path / "moved" / "r.yaml")) == 0
    assert "1 of 2 pictures to draw" in capsys.readouterr().err
    assert pixels(tmp_path / "x") == before
    # under the path of the first one
    assert draw(tmp_path / "x", *words, *recipe("first", "SSCC")) == 2
    assert "pictures of other settings: methods was" in capsys.readouterr().err
    (tmp_path / "first" / "profile.safetensors").unlink()
    assert draw(tmp_path / "y", *words, *first) == 2
    assert "cannot read profile of hack" in capsys.readouterr().err


def test_features_count_by_what_they_hold(infinity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    moved, changed = tmp_path / "moved.safetensors", tmp_path / "changed.safetensors"
    moved.write_bytes((infinity / "f.safetensors").read_bytes())
    save_features(changed, PROMPTS, lambda prompts: TextFeatures.of([torch.zeros(len(prompt), 24) for prompt in prompts]))
    words = ("--prompts", str(tmp_path / "p.txt"), "--size", "0.06M")
    for features, code in ((infinity / "f.safetensors", 0), (moved, 0), (changed, 2)):
        assert draw(tmp_path / "x", *words, "--features", str(features), model=str(infinity / "model")) == code
    assert "features was SHA-256" in capsys.readouterr().err


def test_a_cut_list_of_the_pictures_is_mended(tmp_path: Path) -> None:
    words = ("--labels", "0-3", "--per-class", "1")
    assert draw(tmp_path / "x", *words) == 0
    listed = tmp_path / "x" / "pictures.jsonl"
    whole = listed.read_bytes()
    listed.write_bytes(whole[:-20])
    assert draw(tmp_path / "x", *words) == 0
    assert listed.read_bytes() == whole


def test_methods_that_cannot_stand_together_are_refused_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "hack.yaml"
    recipe.write_text("schema: 1\nmethods:\n- hack\n")
    both = tmp_path / "both.yaml"
    both.write_text("schema: 1\nmethods:\n- hack\n- snapkv\n")
    for words in (("--method", "h2o", "--recipe", str(recipe)), ("--recipe", str(both))):
        assert draw(tmp_path / "x", "--labels", "1", *words) == 2
        err = capsys.readouterr().err
        assert "at most one KV-compression method fits into a model" in err
        assert "loading" not in err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_pictures(tmp_path: Path) -> None:
    words = ["draw", "--labels", "0-9", "--per-class", "20", "--dtype", "float32", "--batch", "4", "--layout", "adm"]
    command = [sys.executable, "-m", "accel", *words, "--out", str(tmp_path / "killed")]
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list((tmp_path / "killed").glob("images/*.png"))) < 10:
        assert run.poll() is None, "it ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(pixels(tmp_path / "killed")) < 200, "every picture that is there can be read"
    assert main([*words, "--out", str(tmp_path / "killed")]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert pixels(tmp_path / "killed") == pixels(tmp_path / "whole")
    assert np.array_equal(np.load(tmp_path / "killed" / "samples.npz")["arr_0"], np.load(tmp_path / "whole" / "samples.npz")["arr_0"])


@pytest.fixture(scope="module")
def infinity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Infinity, and features of the prompts."""
    folder = tmp_path_factory.mktemp("infinity")
    next_scale.tiny_infinity().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    features = {prompt: torch.randn(len(prompt), 24, generator=generator) for prompt in PROMPTS}
    save_features(folder / "f.safetensors", PROMPTS, lambda prompts: TextFeatures.of([features[prompt] for prompt in prompts]))
    return folder


def test_an_infinity_draws_prompts_from_features(infinity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = [json.dumps({"tag": "single_object", "include": [], "prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(metadata))
    common = ("--features", str(infinity / "f.safetensors"), "--size", "0.06M", "--tau", "0.8", "--prompts")
    words = (*common, str(tmp_path / "evaluation_metadata.jsonl"), "--layout", "geneval", "--per-prompt", "2")
    for name, more in (("dense", ()), ("ones", ("--batch", "1")), ("h2o", ("--method", "h2o:keep=0.2"))):
        assert draw(tmp_path / name, *words, *more, model=str(infinity / "model")) == 0
    for index, line in enumerate(metadata):
        folder = tmp_path / "dense" / "images" / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png"]
        assert all(Image.open(folder / "samples" / name).size == (32, 32) for name in names)
    dense, ones, h2o = (pixels(tmp_path / name) for name in ("dense", "ones", "h2o"))
    assert len(set(dense.values())) == 4, "every picture has a seed of its own"
    assert max(furthest(dense, ones)) <= 1
    assert min(furthest(dense, h2o)) > 20
    (tmp_path / "other.txt").write_text("a fox\na bear\n")
    assert draw(tmp_path / "other", *common, str(tmp_path / "other.txt"), model=str(infinity / "model")) == 2
    assert "made for other prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name what to draw"),
        (("--labels", "0-9", "--layout", "amd"), "did you mean 'adm'"),
        (("--labels", "0-9", "--layout", "geneval"), "geneval is about texts, not classes"),
        (("--labels", "8-12"), "knows the labels 0-9, got 10, 11, 12"),
        (("--labels", "9-0"), "such as 0-999 or 3,7,10-12"),
        (("--labels", "0-9", "--per-prompt", "2"), "--per-prompt goes with prompts"),
        (("--labels", "0-9", "--per-class", "0"), "--per-class must be at least 1"),
        (("--labels", "0-9", "--npz-only"), "--npz-only goes with the layout adm"),
        (("--labels", "0-9", "--tau", "0.5"), "knows no tau"),
        (("--labels", "0-9", "--method", "h3o"), "h2o"),
        (("--labels", "0-9", "--method", "flexprefill"), "cannot apply flexprefill"),
        (("--labels", "0-9", "--batch", "0"), "--batch must be at least 1"),
        (("--prompts", "none.jsonl", "--layout", "geneval"), "there are no prompts none.jsonl"),
        (("--prompts", "README.md"), "takes a .txt file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_drawn_explains_itself_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert draw(tmp_path / "x", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_one_place_per_prompt_and_models_without_their_text_explain_themselves(
    infinity: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.json").write_text(json.dumps(PROMPTS))
    words = ("--prompts", str(tmp_path / "photo.json"), "--layout", "hpsv2")
    features = ("--features", str(infinity / "f.safetensors"))
    for more, message in (((*features, "--per-prompt", "2"), "one place per prompt"), ((), r"name a text encoder \(google/flan-t5-xl")):
        assert draw(tmp_path / "x", *words, *more, model=str(infinity / "model")) == 2
        assert re.search(message, capsys.readouterr().err)
    assert draw(tmp_path / "x", *words, model="small-var") == 2
    assert "draws classes: give it labels, not prompts" in capsys.readouterr().err
    assert main(["draw", "--labels", "1"]) == 2
    assert "--out" in capsys.readouterr().err


def test_labels_are_read_in_their_order() -> None:
    assert parse_labels("3, 7,10-12") == [3, 7, 10, 11, 12]
    assert parse_labels([4, "1-2"]) == [4, 1, 2]
    assert parse_labels(0) == [0]
    for wrong in ("", "a", "-1", "3-1", "1,1-2", "1..3"):
        with pytest.raises(OptionError):
            parse_labels(wrong)
