"""The pictures that a run has drawn: files in its folder, so that all methods are compared to the same dense ones, and grids for the report."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import accel
from accel.evals.latency import quiet_notices
from accel.evals.pictures.gallery import save_overlay
from accel.evals.pictures.overlays import png_bytes
from accel.evals.pictures.questions import picture_of
from accel.evals.summary.scores import BASELINE
from accel.registry import build

if TYPE_CHECKING:
    from accel.evals.models import LoadedImageModel
    from accel.evals.results import RunFolder, SampleKey, SampleRecord

FOLDER = "pictures"
N_SHOWN = 60                    # pictures of a grid
COLUMNS = 20
SCALE = 2                       # screen pixels per pixel


class Album:
    """Pictures (3, height, width) of a run's samples, as files of 8 bits per colour: all of dense, and of the others those that a grid shows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def keep(self, key: SampleKey, pixels: Tensor) -> None:
        """Saves the picture of a sample, where it is one of those that are looked at again."""
        if key.label != BASELINE and key.sample >= N_SHOWN:
            return
        target = self._file(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        # in one step: a kill must not leave half a picture that is then compared to
        part = target.with_suffix(".part")
        part.write_bytes(png_bytes(picture_of(in_bytes(pixels).permute(1, 2, 0).numpy())))
        part.replace(target)

    def find(self, key: SampleKey) -> Tensor | None:
        """The picture in [0, 1], fp32 on the CPU; None where it was not kept."""
        import numpy as np
        from PIL import Image

        if not (file := self._file(key)).exists():
            return None
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    def _file(self, key: SampleKey) -> Path:
        return self._folder / key.task / file_name(key.label) / f"{key.sample}.png"


def in_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as a picture file holds them, uint8 on the CPU."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def file_name(label: str) -> str:
    """A label as part of a file's name; labels that differ in signs only stay apart."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', label.lower()).strip('-')}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def draw_grids(model: LoadedImageModel, folder: RunFolder, records: Sequence[SampleRecord]) -> list[dict[str, Any]]:
    """The first pictures of every task and label side by side, saved in the folder: file, title, caption, starts_row.

    A picture that the folder does not hold, as in runs of earlier versions, is drawn again.
    """
    found = []
    for task, label in dict.fromkeys((r.task, r.label) for r in records if r.features is not None):
        own = [r for r in records if (r.task, r.label) == (task, label)]
        grid = _side_by_side(torch.stack(_pictures(model, Album(folder.path), own[:N_SHOWN])))
        file = save_overlay(folder.path, f"{task}-{file_name(label)}", grid)
        found.append({"file": file, "title": label, "caption": _about(own), "starts_row": True})
    return found


def _about(records: Sequence[SampleRecord]) -> str:
    """ "95.0 % right; perceptual distance to dense 0.0815", of all pictures and not of those shown alone."""
    right = f"{100 * statistics.fmean(r.exact for r in records):.1f} % of {len(records)} right"
    far = [r.perceptual for r in records if r.perceptual is not None]
    return f"{right}; perceptual distance to dense {statistics.fmean(far):.4f}" if far else right


def _pictures(model: LoadedImageModel, album: Album, records: Sequence[SampleRecord]) -> list[Tensor]:
    from accel.evals.tasks import ImageTask, load_task

    assert model.draw is not None
    found: list[Tensor] = []
    for r in records:
        pixels = album.find(r.key)
        if pixels is None:
            task = load_task(r.task)
            assert isinstance(task, ImageTask)
            sample = task.samples(r.sample + 1, r.seed)[r.sample]
            methods = [build(name, options) for entry in r.options for name, options in entry.items()]
            with quiet_notices(), accel.apply(model.model, *methods) if methods else nullcontext():
                pixels = model.draw([sample.number % len(model.class_names)], seed=[sample.picture_seed])[0].cpu()
            album.keep(r.key, pixels)
        found.append(pixels)
    return found


def _side_by_side(pixels: Tensor) -> Any:
    """The Pillow picture of (n, 3, height, width) in rows, on white."""
    n, _, height, width = pixels.shape
    columns = min(COLUMNS, n)
    padded = torch.ones(math.ceil(n / columns) * columns, 3, height, width)
    padded[:n] = pixels
    whole = padded.view(-1, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    picture = picture_of(in_bytes(whole).numpy())
    return picture.resize((picture.width * SCALE, picture.height * SCALE), resample=0)
