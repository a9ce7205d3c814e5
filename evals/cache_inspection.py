"""What cache methods do in one model, for `accel inspect`: what they know of its heads, and what it held for a picture or a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import accel
from accel.evals.controls import add_variant
from accel.evals.drawing.album import file_name, in_bytes
from accel.evals.drawing.judged import image_model
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedImageModel, LoadedModel
from accel.evals.pictures.overlays import png_bytes
from accel.evals.pictures.questions import picture_of
from accel.evals.prompt_cache import last_logits_only
from accel.evals.runner import head_rows
from accel.evals.summary.scores import BASELINE
from accel.protocols import Method

FOLDER = "pictures"
SEED = 0
# tokens of the features that stand for no text
N_NULL = 4


def inspect_caches(loaded: LoadedModel, folder: Path, methods: Sequence[Method]) -> dict[str, Any]:
    """`heads`, `pictures` and `notices` for a result.json: numbers of the heads, one picture from one seed, dense and with each method, saved under
    `folder`, and the report of each method behind its picture.
    """
    model = image_model(loaded)
    subject, what = _subject(model)
    pictures = [_drawn(model, subject, folder, BASELINE, f"{what}, seed {SEED}")]
    heads: list[dict[str, Any]] = []
    notices = []
    labels: dict[str, list[Method]] = {}
    for method in methods:
        label = add_variant(labels, [method])
        heads += head_rows(loaded, {label: [method]})
        with quiet_notices(), accel.apply(loaded.model, method) as handle:
            pictures.append(_drawn(model, subject, folder, label, f"{what}, seed {SEED}"))
            notices.append(_told(handle.report()))
    return {"heads": heads, "pictures": pictures, "notices": notices}


@torch.no_grad()
def report_of_prompt(loaded: LoadedModel, method: Method, input_ids: torch.Tensor) -> str:
    """What the method did while a language model read one prompt, (1, tokens)."""
    model = loaded.model
    with quiet_notices(), accel.apply(model, method) as handle:
        model(input_ids=input_ids, use_cache=True, **last_logits_only(model))
        return _told(handle.report())


def _subject(model: LoadedImageModel) -> tuple[Any, str]:
    """What is drawn, and in words: the first class, or of a model that draws texts nothing in particular, which needs no text encoder."""
    if model.class_names:
        return 0, f"class {model.class_names[0]}"
    return model.model.text.null_states[:N_NULL].detach().float(), "no text"


def _drawn(model: LoadedImageModel, subject: Any, folder: Path, label: str, caption: str) -> dict[str, Any]:
    """Draws and saves one picture, and returns its row."""
    assert model.draw is not None
    pixels = model.draw([subject], seed=[SEED])[0]
    target = folder / FOLDER / f"{file_name(label)}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png_bytes(picture_of(in_bytes(pixels).permute(1, 2, 0).numpy())))
    return {"file": target.relative_to(folder).as_posix(), "title": label, "caption": f"{caption}."}


def _told(report: str) -> str:
    """A report as one notice: lines on a terminal, and separated where line breaks are lost."""
    return ";\n".join(report.splitlines())
