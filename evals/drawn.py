"""Pictures that a model draws of classes: one sample, and what a run says of all of them beside real pictures and beside dense."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import accel
from accel.errors import OptionError
from accel.evals import image_metrics as M
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedImageModel, LoadedModel
from accel.evals.report_sections import Row, Section, Table, milliseconds, number
from accel.evals.results import RunFolder, SampleRecord
from accel.evals.summary import BASELINE
from accel.protocols import Method

if TYPE_CHECKING:
    from accel.evals.tasks import ClassSample

N_REAL = 2000
N_SHOWN = 60                    # pictures of a grid
COLUMNS = 20
SCALE = 2                       # screen pixels per pixel
REAL = "real pictures"


def image_model(loaded: LoadedModel) -> LoadedImageModel:
    """The same object, where it draws; else OptionError."""
    if isinstance(loaded, LoadedImageModel):
        return loaded
    raise OptionError(f"{loaded.name} draws no pictures of classes; small-var does")


def draw_sample(loaded: LoadedImageModel, sample: ClassSample, *, on_drawn: Callable[[], None]) -> dict[str, Any]:
    """What one drawn picture adds to its record. `on_drawn` is called behind the picture."""
    assert loaded.draw is not None
    label = sample.number % len(loaded.class_names)
    begin = _now(loaded)
    pixels = loaded.draw([label], seed=[sample.picture_seed])
    drawn_ms = (_now(loaded) - begin) * 1e3
    on_drawn()
    [seen] = loaded.judge.classes(pixels).tolist()
    return {
        "n_tokens": loaded.model.schedule.total, "log_prob": None, "exact": float(seen == label), "log_probs": [], "hits": [float(seen == label)],
        "questions": [f"draw {loaded.class_names[label]}"], "expected": [loaded.class_names[label]], "answers": [loaded.class_names[seen]],
        "prefill_ms": drawn_ms, "features": [float(f"{value:.6g}") for value in loaded.judge.features(pixels)[0].tolist()],
    }  # fmt: skip


def summarise_drawn(
    loaded: LoadedModel, folder: RunFolder, records: Sequence[SampleRecord], methods: Mapping[str, Sequence[Method]]
) -> dict[str, Any]:
    """`drawn`, the rows of `drawn_table`, and `grids`, pictures saved in the folder; empty where nothing was drawn.

    The pictures of the grids are drawn again, under dense and the methods, from the seeds of their samples.
    """
    mine = [r for r in records if r.features is not None]
    if not mine:
        return {}
    model = image_model(loaded)
    assert model.real is not None
    pixels, _ = model.real(N_REAL)
    real = model.judge.features(pixels)
    rows, grids, dense = [], [], None
    for task in dict.fromkeys(r.task for r in mine):
        for label in dict.fromkeys(r.label for r in mine if r.task == task):
            own = [r for r in mine if (r.task, r.label) == (task, label)]
            row = _row(own, real)
            if label == BASELINE or label in methods:
                shown = _drawn_again(model, folder, own[:N_SHOWN], methods.get(label, ()))
                dense = shown if label == BASELINE else dense
                if label != BASELINE and dense is not None and len(dense) == len(shown):
                    row |= {
                        "psnr": float(M.psnr(shown, dense).clamp_max(100).mean()),
                        "perceptual": float(M.perceptual_distance(shown, dense, model.judge).mean()), "n_paired": len(shown),
                    }  # fmt: skip
                grids.append(_grid(folder, f"{task}-{label}", label, shown))
            rows.append(row)
    return {"drawn": [*rows, _real_row(model, real, max(row["n"] for row in rows))], "grids": grids}


def drawn_sections(result: Mapping[str, Any]) -> list[Section]:
    """The section about drawn pictures, where there are some."""
    return [Section("drawn", "Drawn pictures", tables=[drawn_table(result["drawn"])])] if result.get("drawn") else []


def drawn_table(rows: Sequence[Row]) -> Table:
    """One row per method, and one for real pictures."""
    cells = [
        [row["label"], str(row["n"]), _share(row), number(row["frechet"], 2), number(row.get("psnr"), 1), number(row.get("perceptual"), 4),
         milliseconds(row.get("ms"))]
        for row in rows
    ]  # fmt: skip
    return Table(
        ["method", "n", "right, %", "Fréchet distance", "PSNR to dense, dB", "perceptual distance", "time per picture"],
        cells,
        quiet_rows=frozenset(i for i, row in enumerate(rows) if row["label"] in (BASELINE, REAL)),
        caption="Right: the judge sees the class that was asked for, ± standard error. Fréchet distance: of the judge's features, to "
        f"{N_REAL} held-out real pictures; the last row is what as many other real pictures reach. PSNR (at most 100) and perceptual distance: mean "
        f"over the first {N_SHOWN} pictures at most, to dense from the same seeds.",
    )


def _row(records: Sequence[SampleRecord], real: Tensor) -> dict[str, Any]:
    hits, features = [r.exact for r in records], torch.tensor([r.features for r in records])
    error = statistics.stdev(hits) / math.sqrt(len(hits)) if len(hits) > 1 else None
    frechet = M.frechet_distance_of_features(features, real) if len(hits) > 1 else None
    ms = statistics.median(r.prefill_ms for r in records)
    return {"task": records[0].task, "label": records[0].label, "n": len(hits), "value": statistics.fmean(hits), "stderr": error,
            "frechet": frechet, "ms": ms}  # fmt: skip


def _real_row(model: LoadedImageModel, real: Tensor, n: int) -> dict[str, Any]:
    """Real pictures that are not among `real`, as if they had been drawn."""
    assert model.real is not None
    n = max(n, 2)
    pixels, labels = (part[N_REAL:] for part in model.real(N_REAL + n))
    found = M.class_accuracy(pixels, labels, model.judge)
    frechet = M.frechet_distance_of_features(model.judge.features(pixels), real)
    return {"task": "", "label": REAL, "n": n, "value": found.value, "stderr": found.stderr, "frechet": frechet}


def _drawn_again(model: LoadedImageModel, folder: RunFolder, records: Sequence[SampleRecord], methods: Sequence[Method]) -> Tensor:
    """The pictures (n, 3, height, width) of these samples, on the CPU."""
    from accel.evals.tasks import ImageTask, load_task

    assert model.draw is not None
    task = load_task(records[0].task)
    assert isinstance(task, ImageTask)
    wanted = [task.samples(r.sample + 1, r.seed)[r.sample] for r in records]
    with quiet_notices(), accel.apply(model.model, *methods) if methods else nullcontext():
        # one by one, as they were measured: a method may treat a batch as one
        return torch.cat([model.draw([s.number % len(model.class_names)], seed=[s.picture_seed]).cpu() for s in wanted])


def _grid(folder: RunFolder, name: str, label: str, pixels: Tensor) -> dict[str, Any]:
    """Saves the pictures side by side, and says where."""
    from accel.evals.gallery import save_overlay
    from accel.evals.pictures import picture_of

    n, _, height, width = pixels.shape
    columns = min(COLUMNS, n)
    padded = torch.ones(math.ceil(n / columns) * columns, 3, height, width)
    padded[:n] = pixels
    whole = padded.view(-1, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    picture = picture_of((whole * 255).round().to(torch.uint8).numpy())
    picture = picture.resize((picture.width * SCALE, picture.height * SCALE), resample=0)
    return {"file": save_overlay(folder.path, name, picture), "title": label, "caption": f"The first {n} pictures.", "starts_row": True}


def _share(row: Row) -> str:
    error = row.get("stderr")
    return f"{100 * row['value']:.1f}" if error is None else f"{100 * row['value']:.1f} ± {100 * error:.1f}"


def _now(loaded: LoadedModel) -> float:
    """Seconds, when the device has finished."""
    device = next(iter(loaded.model.parameters())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
