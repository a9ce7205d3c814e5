"""The small VAR: loads without a network, draws the digit that was asked for, the same picture for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accel.errors import OptionError
from accel.evals import image_metrics as M
from accel.evals.models import LoadedImageModel, load_model
from accel.evals.models.small_var import training
from accel.evals.models.small_var.architecture import CODES, SIDES, new_model
from accel.evals.models.small_var.drawings import CLASSES, drawings
from accel.evals.models.small_var.load import WEIGHTS
from accel.evals.pictures.questions import vision_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_small_var.py"


@pytest.fixture(scope="module")
def loaded() -> LoadedImageModel:
    found = load_model("small-var")
    assert isinstance(found, LoadedImageModel)
    return found


def test_the_files_are_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 10e6
    assert {"config.json", "model.safetensors", "judge.safetensors"} <= {file.name for file in WEIGHTS.iterdir()}


def test_it_is_a_var_with_the_schedule_and_codebook_that_the_card_names(loaded: LoadedImageModel) -> None:
    assert type(loaded.model).__name__ == "VAR"
    assert loaded.model.schedule.sizes == tuple((side, side) for side in SIDES)
    assert loaded.model.config.codebook_size == CODES
    assert loaded.class_names == CLASSES
    assert loaded.reads == ("class",)
    assert loaded.max_positions is None
    assert "seed" in loaded.card
    assert not any(p.requires_grad for p in (*loaded.model.parameters(), *loaded.judge.parameters()))


def test_it_is_neither_asked_about_pictures_nor_given_text(loaded: LoadedImageModel) -> None:
    with pytest.raises(OptionError, match="it draws pictures"):
        vision_model(loaded)


def test_the_judge_knows_real_drawings_it_was_not_shown(loaded: LoadedImageModel) -> None:
    assert loaded.real is not None
    pixels, labels = loaded.real(500)
    assert M.class_accuracy(pixels, labels, loaded.judge).value >= 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_draws_the_digit_that_was_asked_for(dtype: torch.dtype) -> None:
    model = load_model("small-var", dtype=dtype)
    assert isinstance(model, LoadedImageModel)
    assert model.draw is not None
    labels = torch.arange(10).repeat(4)
    pixels = model.draw(labels, seed=7)
    assert pixels.shape == (40, 3, 32, 32)
    assert M.class_accuracy(pixels, labels, model.judge).value >= 0.8, "90 % are expected; three standard errors below"


def test_a_picture_depends_on_its_seed_alone(loaded: LoadedImageModel) -> None:
    assert loaded.draw is not None
    together = loaded.draw([3, 7], seed=5)
    torch.testing.assert_close(loaded.draw([7], seed=6), together[1:], rtol=0, atol=1e-3)
    assert not torch.equal(loaded.draw([7], seed=8), together[1:])


def test_the_tokenizer_gives_drawings_back(loaded: LoadedImageModel) -> None:
    pixels, _ = drawings("test", range(50))
    tokenizer, schedule, f = loaded.model.tokenizer, loaded.model.schedule, None
    for scale, ids in enumerate(tokenizer.encode(pixels, schedule)):
        f, _ = tokenizer(ids, f, scale, schedule)
    assert M.psnr(tokenizer.decode(f), pixels).mean() > 18


def test_a_drawing_depends_on_split_seed_and_number_alone() -> None:
    pixels, labels = drawings("train", [4, 17])
    assert labels.tolist() == [4, 7]
    assert 0 <= pixels.min() <= pixels.max() <= 1
    torch.testing.assert_close(drawings("train", [17]).pixels, pixels[1:])
    assert not torch.equal(drawings("test", [17]).pixels, pixels[1:])
    assert not torch.equal(drawings("train", [17], seed=1).pixels, pixels[1:])
    with pytest.raises(OptionError, match="one of train, validation, test"):
        drawings("holdout", [0])


def test_the_tokenizer_is_trained_on_the_codes_that_encode_gives() -> None:
    torch.manual_seed(0)
    model = new_model().eval()
    pixels, _ = drawings("train", range(3))
    with torch.no_grad():
        found = training.tokenizer_loss(model.tokenizer, pixels, model.schedule, is_quantised=True)
        codes = model.tokenizer.encode(pixels, model.schedule)
    assert torch.equal(found.ids, torch.cat(codes, 1))


def test_codes_that_nothing_uses_are_moved() -> None:
    book = torch.nn.Embedding(4, 2)
    use = training.CodeUse(4)
    for _ in range(300):
        use.count(torch.tensor([0, 1, 2]))
    before = book.weight.detach().clone()
    assert use.move_unused(book, torch.full((9, 2), 5.0)) == 1
    assert torch.equal(book.weight[:3], before[:3])
    assert book.weight[3].tolist() == [5.0, 5.0]


@pytest.mark.slow
def test_training_runs_to_a_model_that_loads_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--steps", "2", "4", "2", "--batch", "4", "20", "4"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "weights" / "judge.safetensors").exists()
    stages = [json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert stages == ["judge", "tokenizer", "transformer"]
    again = [*command, "--resume", "--stages", "transformer"]
    again[again.index("2", again.index("4") + 1)] = "3"
    subprocess.run(again, check=True, capture_output=True)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
