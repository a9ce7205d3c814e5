"""What a model draws or reads while its heads are measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel

# so that calibrations with neighbouring seeds share no picture, and none with the task images, which counts up from 0 in the same steps
STRIDE, FIRST_SEED = 1_000_003, 500_000
# of a prompt; §10.2 wants 4k at least
N_TOKENS = 4096
FILES = (".txt", ".jsonl")

Subject = Callable[[], Any]


def prompts(loaded: LoadedModel, data: Any, seed: int, n: int) -> list[Subject]:
    """Passes of a language model over n prompts. data: the name of a text task, or a .txt or .jsonl (with "text" in each line) of prose."""
    length = min(N_TOKENS, loaded.max_positions or N_TOKENS)
    if str(data).endswith(FILES):
        rows = _rows_of_file(loaded, Path(data), length, n)
    else:
        from accel.evals.tasks import load_text_task

        # other prompts than those of runs, whose seeds count from 0
        rows = [list(sample.input_ids[:length]) for sample in load_text_task(str(data)).samples(loaded.tokenizer, length, n, FIRST_SEED + seed)]
    return [lambda row=row: _read(loaded, row) for row in rows]      # type: ignore[misc]


def _read(loaded: LoadedModel, row: list[int]) -> None:
    loaded.model(input_ids=torch.tensor([row], device=loaded.model.device), use_cache=True, logits_to_keep=1)


def _rows_of_file(loaded: LoadedModel, path: Path, length: int, n: int) -> list[list[int]]:
    """n rows of ids, from the texts of a file in turn; a long text gives one row after the other."""
    try:
        text = path.read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else [text]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"hack: cannot read prompts from {path}: {error}; a .txt, or a .jsonl with \"text\" in each line, is needed") from error
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [row[i : i + length] for row in ids for i in range(0, max(1, len(row) - length // 2), length)]
    rows = [row for row in rows if len(row) >= length // 4]
    if not rows:
        raise OptionError(f"hack: {path} holds no text of {length // 4} tokens or more")
    return [rows[i % len(rows)] for i in range(n)]


def pictures(loaded: LoadedModel, data: Any, seed: int, n: int) -> list[Subject]:
    """Drawings of n pictures, from seeds of their own. data: "classes", or a .safetensors file of text features."""
    draw = loaded.draw      # type: ignore[attr-defined]
    return [lambda subject=subject, own=own: draw([subject], seed=[own]) for subject, own in _pictures(loaded, data, seed, n)]    # type: ignore[misc]


def _pictures(loaded: LoadedModel, data: Any, seed: int, n: int) -> list[tuple[Any, int]]:
    """What is drawn, and from which seeds."""
    from accel.evals.drawing.judged import image_model

    found = image_model(loaded)
    seeds = [FIRST_SEED + seed * STRIDE + i for i in range(n)]
    if str(data).endswith(".safetensors"):
        return list(zip(_features(Path(data), n), seeds, strict=True))
    if data != "classes":
        raise OptionError(f"hack: data is “classes”, or a .safetensors file of text features, got {data!r}")
    n_classes = getattr(found.model.config, "num_classes", None)
    if n_classes is None:
        raise OptionError(f"hack: {loaded.name} draws texts: give it a .safetensors file of their features, see accel.evals.drawing.artists")
    # spread over all classes where there are more of them than pictures
    return [(i % n_classes if n >= n_classes else i * n_classes // n, own) for i, own in enumerate(seeds)]


def named_data(data: Any) -> str:
    """What the user named, with a hash of a file's content: another file under the same name is other data."""
    if not str(data).endswith((".safetensors", *FILES)):
        return str(data)
    try:
        return f"{data} (SHA-256 {hashlib.sha256(Path(data).read_bytes()).hexdigest()[:16]})"
    except OSError as error:
        raise OptionError(f"hack: cannot read {data}: {error}") from error


def _features(path: Path, n: int) -> list[Tensor]:
    """The features of n prompts, in turn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"hack: cannot read the features in {path}: {error}") from error
    if not found or any(t.dim() != 2 for t in found.values()):
        raise OptionError(f"hack: {path} must hold the features (tokens, width) of at least one prompt")
    ordered = [found[name] for name in sorted(found, key=lambda name: (len(name), name))]
    return [ordered[i % len(ordered)] for i in range(n)]
