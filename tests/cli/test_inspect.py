"""`accel inspect` names what would be patched, and draws what heads read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llama import save_tiny

from accel.cli.inspect import as_ranges, layer_rows
from accel.cli.main import main
from accel.evals.models import load_model
from accel.evals.models.small_vlm.load import WEIGHTS
from accel.evals.scenes import scene

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), positions=2048))


def test_every_registered_method_is_tried(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from accel.registry import method_names

    assert main(["inspect", model, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in method_names())
    layers = json.loads((tmp_path / "run" / "result.json").read_text())["layers"]
    assert {row["method"] for row in layers} == set(method_names())
    assert "3 layers, 4 query and 2 key heads of 16, runs sdpa" in text


def test_layers_that_stay_as_they_are_come_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from tiny_llama import byte_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        use_sliding_window=True, sliding_window=64, max_window_layers=1, max_position_embeddings=2048,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 0
    rows = [row for row in json.loads((tmp_path / "run" / "result.json").read_text())["layers"] if row["method"] == "flexprefill"]
    assert [(row["layers"], row["patched"], row["reason"]) for row in rows] == [("0", True, ""), ("1–2", False, "sliding window")]


def test_maps_of_a_prompt_are_drawn(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("All work and no play makes Jack a dull boy. " * 30)
    words = ("--method", "streaming:min_seq_len=0,window_blocks=2", "--method", "flexprefill", "--tokens", "1k", "--prompt", str(file))
    assert main(["inspect", model, *words, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    [found] = result["block_maps"]
    assert found["tokens"] == 1024
    assert found["maps"][0]["rows"] == ["1", "11", "111", "1011", "10011", "100011", "1000011", "10000011"]
    assert "flexprefill ran dense in every layer at 1024 tokens: shorter than" in text
    html = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64," in html


def test_without_a_method_it_says_why_no_maps_are_drawn(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--out", str(tmp_path / "run")]) == 0
    assert "no block maps: --method" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [(("--method", "streaming", "--tokens", "4k"), "2048 positions"), (("--method", "streaming:window=2"), "has no option 'window'")],
    ids=["too-long", "option"],
)
def test_a_wrong_argument_explains_itself(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["inspect", model, *words, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("numbers, text", [([], ""), ([3], "3"), ([0, 1, 2, 5], "0–2, 5"), ([1, 3, 4], "1, 3–4")])
def test_layer_numbers_are_written_as_ranges(numbers: list[int], text: str) -> None:
    assert as_ranges(numbers) == text


# --- caches of models that draw -----------------------------------------------------------------------------------------------


def test_a_model_that_draws_runs_the_cache_methods_and_says_why_it_runs_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from accel.protocols import KVCompression
    from accel.registry import method_class, method_names

    assert main(["inspect", "small-var", "--out", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["layers"]
    assert {row["method"] for row in rows if row["patched"]} == {name for name in method_names() if issubclass(method_class(name), KVCompression)}
    assert [row["type"] for row in rows if row["method"] == "h2o"] == ["heads 0–3: 65 of 130 entries"]
    text = capsys.readouterr().out
    assert "1 2 3 4 6 8, 130 tokens in all" in text
    assert "the next-scale host runs KV-compression methods only" in text
    assert "cannot apply" not in text, "which method it is stands in front of each line"


@pytest.mark.parametrize("kind", ["var", "infinity"])
def test_what_a_cache_method_does_is_shown_by_one_picture(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from head_profiles import info_of, saved
    from next_scale import tiny_infinity, tiny_var

    # nothing drawn depends on the weights, which are saved in 32 bits
    model = tiny_var() if kind == "var" else tiny_infinity(default_size="0.06M")
    model.save_pretrained(tmp_path / "model")
    profile, out = saved(tmp_path, ["CCSS", "CCCS"], info_of(model)), tmp_path / "run"
    words = ["--method", f"hack:keep=0.8,profile={profile}", "--method", "h2o:keep=1.0", "--dtype", "float32"]
    assert main(["inspect", str(tmp_path / "model"), *words, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    hack = [row for row in result["layers"] if row["method"] == "hack"]
    assert [(row["layers"], row["patched"]) for row in hack] == [("0", True), ("1", True)]
    assert hack[1]["type"].startswith("contextual heads 0–2: ")
    assert "structural heads 3: " in hack[1]["type"]
    [whole] = [row for row in result["layers"] if row["method"] == "h2o"]
    assert (whole["patched"], whole["reason"]) == (False, "these options keep everything")
    assert [row["title"] for row in result["heads"]] == ["Kinds of heads", "Budget of each head"]
    assert [row["title"].split("(")[0] for row in result["pictures"]] == ["dense", "hack", "h2o"]
    dense, compressed, same = ((out / row["file"]).read_bytes() for row in result["pictures"])
    assert dense.startswith(b"\x89PNG")
    assert dense == same != compressed
    text = capsys.readouterr().out
    assert "entries read at step" in text, "the report of the handle, behind the picture"
    assert "c: contextual, s: structural" in text
    assert "entries read at step" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--method", "flexprefill"], "flexprefill: the next-scale host runs KV-compression methods only"),
        (["--prompt", "README.md"], "small-var draws pictures and reads no prompt"),
    ],
    ids=["method", "prompt"],
)
def test_what_a_model_that_draws_cannot_show_is_refused_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "small-var", *words, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_a_cache_method_drops_of_a_prompt_is_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--method", "h2o:keep=0.25", "--tokens", "1k", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "bytes held now" in text
    assert "min_seq_len" not in text, "which cache methods have not"


# --- pictures -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    image = pytest.importorskip("PIL.Image")
    file = tmp_path_factory.mktemp("picture") / "Photo 1.jpg"
    image.fromarray(scene("test", 3).image).save(file)
    return str(file)


def test_what_each_method_keeps_of_a_picture_is_drawn(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ("--method", "fastervlm:keep=0.25", "--method", "vflowopt:r1=0.5,r2=0.5,r3=0.5", "--dtype", "float32", "--out", str(out))
    # a folder, so that it is loaded as any vision-language model is
    assert main(["inspect", str(WEIGHTS), "--image", photo, "--question", "what does the sign say ?", *words]) == 0
    result = json.loads((out / "result.json").read_text())
    staged = "vflowopt(keep=0.25, r1=0.5, r2=0.5, r3=0.5)"
    stages = [f"{staged}, behind the projector", f"{staged}, before layer 2", f"{staged}, before layer 4"]
    assert [row["title"] for row in result["overlays"]] == ["Photo 1.jpg", "fastervlm(keep=0.25)", *stages]
    digits = " ".join(map(str, scene("test", 3).digits))
    assert result["overlays"][0]["caption"] == f"what does the sign say ? dense: {digits}."
    assert [row["caption"].split(" of ")[0] for row in result["overlays"][1:]] == ["36", "72", "36", "18"]
    assert result["overlays"][1]["file"] == "overlays/photo-1-fastervlm-keep-0.25.png"
    assert all((out / row["file"]).read_bytes().startswith(b"\x89PNG") for row in result["overlays"])
    assert (out / "report.html").read_text().count('<img src="data:image/png;base64,') == 5
    assert "fastervlm(keep=0.25): 36 of 144 patches kept." in capsys.readouterr().out


def test_without_a_method_every_one_that_drops_tokens_is_drawn(photo: str, tmp_path: Path) -> None:
    from accel.protocols import TokenPruning
    from accel.registry import method_class, method_names

    assert main(["inspect", "small-vlm", "--image", photo, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    shown = {row["title"].split("(")[0] for row in result["overlays"][1:]}
    # what does not run with its defaults says what it wants instead
    refused = {row["method"]: row["reason"] for row in result["layers"] if not row["patched"]}
    pruning = {name for name in method_names() if issubclass(method_class(name), TokenPruning)}
    assert shown == pruning - refused.keys()
    assert set(refused) & pruning == {"dyvte"}
    assert "exit_layer=N" in refused["dyvte"]


def test_attention_to_the_picture_is_plotted_by_layer(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ("--method", "fastervlm:keep=0.25", "--question", "what does the sign say ?", "--attention", "--out", str(out))
    assert main(["inspect", "small-vlm", "--image", photo, *words]) == 0
    result = json.loads((out / "result.json").read_text())
    # six words and the placeholders, behind nothing but the begin token
    assert (result["attention"]["n_visual"], result["attention"]["n_text"]) == (144, 6)
    rows = result["attention"]["layers"]
    assert [row["layer"] for row in rows] == list(range(8))
    assert all(row["text_to_visual"] + row["text_to_text"] == pytest.approx(1, abs=0.02) for row in rows)
    assert len(result["overlays"]) == 2, "overlays are still drawn"
    assert "text → picture" in capsys.readouterr().out
    assert (out / "report.html").read_text().count("<svg") == 1


def test_layers_of_a_method_that_drops_tokens_are_those_that_run_without_them() -> None:
    from accel.patching import host_for
    from accel.registry import build

    model = load_model("small-vlm").model
    info = host_for(model).describe(model)
    assert [(row["layers"], row["type"]) for row in layer_rows(model, build("fastervlm"), info)] == [("0–7", "visual tokens")]
    assert [row["layers"] for row in layer_rows(model, build("fastv", {"layer": 3}), info)] == ["3–7"]
    [whole] = layer_rows(model, build("fastv", {"keep": 1.0}), info)
    assert (whole["patched"], whole["reason"]) == (False, "these options keep everything")


@pytest.mark.parametrize(
    "words, message",
    [
        (["small-vlm", "--method", "fastervlm"], "show it one with --image"),
        (["small-vlm", "--method", "streaming", "--image", "{photo}"], "leave --image out"),
        (["small-vlm", "--image", "nowhere.png"], "there is no picture nowhere.png"),
        (["smollm2", "--prompt", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["smollm2", "--heads", "0"], "--heads must be at least 1"),
        (["small-vlm", "--attention"], "name one with --image"),
        (["small-vlm", "--image", "{text}"], "cannot read the picture"),
        (["{model}", "--image", "{photo}"], "it is a text model"),
        (["small-vlm", "--image", "{photo}", "--method", "fastv:layer=8"], "must be below the 8 layers"),
    ],
    ids=[
        "pruning_without_picture", "sparse_with_picture", "no_file", "no_text", "no_heads", "attention_without_picture", "no_picture", "text_model",
        "does_not_run",
    ],
)
def test_a_wrong_picture_or_method_explains_itself(
    model: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("no picture")
    filled = [word.format(photo=photo, model=model, text=tmp_path / "text.txt") for word in words]
    assert main(["inspect", *filled, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
