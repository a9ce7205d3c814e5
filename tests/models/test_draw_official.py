"""Exports draw from official files, whose kind is told by their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accel.cli.main import main
from accel.errors import AccelError, OptionError
from accel.evals.drawing.artists import find_model, save_features
from accel.models.infinity import TextFeatures

pytest.importorskip("PIL")
VAR_FILE = {"depth": 2, "width": 32, "heads": 2, "sides": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "shared": False, "codes": 16, "code": 32, "classes": 6}
INFINITY_FILE = {"layers": 2, "width": 32, "heads": 2, "per_chunk": 1, "bits": 4, "text": 24, "text_tokens": 10, "pool": 2}


def test_an_official_var_draws_its_classes(
    official_var: Any, official_var_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(official_var(**VAR_FILE), tmp_path / "var.pth")
    torch.save(official_var_tokenizer(ch=32, mult=(1, 1), codes=16, code=32), tmp_path / "vae.pth")
    both = {"trainer": {"var_wo_ddp": official_var(**VAR_FILE), "vae_local": official_var_tokenizer(ch=32, mult=(1, 1), codes=16, code=32)}}
    torch.save(both, tmp_path / "training.pth")
    words = ["--labels", "0-4", "--per-class", "1", "--dtype", "float32", "--layout", "adm"]
    separate = ["--model", str(tmp_path / "var.pth"), "--tokenizer", str(tmp_path / "vae.pth")]
    assert main(["draw", *separate, *words, "--out", str(tmp_path / "a")]) == 0
    assert main(["draw", "--model", str(tmp_path / "training.pth"), *words, "--out", str(tmp_path / "b")]) == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "a" / "images").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "b" / "images").iterdir())
    ]
    assert find_model(str(tmp_path / "var.pth")).sampling({}) == {"guidance_scale": 1.5, "top_k": 900, "top_p": 0.96}
    assert main(["draw", *separate, *words, "--labels", "4-5", "--out", str(tmp_path / "c")]) == 2
    assert "knows the labels 0-4, got 5" in capsys.readouterr().err, "the class for no class is not drawn"


def test_an_official_infinity_draws_prompts(official_infinity: Any, official_infinity_tokenizer: Any, tmp_path: Path) -> None:
    torch.save(official_infinity(**INFINITY_FILE), tmp_path / "infinity.pth")
    torch.save({"vae": official_infinity_tokenizer(ch=32, mult=(1, 1), bits=4)}, tmp_path / "vae.pth")
    (tmp_path / "p.txt").write_text("a fox\n")
    save_features(tmp_path / "f.safetensors", ["a fox"], lambda prompts: TextFeatures.of([torch.ones(3, 24)]))
    words = ["--prompts", str(tmp_path / "p.txt"), "--features", str(tmp_path / "f.safetensors"), "--size", "0.06M", "--dtype", "float32"]
    files = ["--model", str(tmp_path / "infinity.pth"), "--tokenizer", str(tmp_path / "vae.pth")]
    assert main(["draw", *files, *words, "--out", str(tmp_path / "x")]) == 0
    assert [path.name for path in (tmp_path / "x" / "images").iterdir()] == ["000000.png"]
    with pytest.raises(OptionError, match="comes without its tokenizer"):
        find_model(str(tmp_path / "infinity.pth"))
    torch.save(official_infinity_tokenizer(ch=32, mult=(1, 1), bits=4), tmp_path / "flat.pth")
    with pytest.raises(AccelError, match="neither a VAR nor an Infinity"):
        find_model(str(tmp_path / "flat.pth"))
