"""What drawn pictures show of methods: right classes, the distance to real pictures and to dense from the same seeds, and what the cache held."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.evals import image_metrics as M
from accel.evals.drawing.judged import image_model
from accel.evals.results import SampleRecord
from accel.evals.summary.pictures import clustered, series_of
from accel.evals.summary.scores import BASELINE, asked_of, cache_of

if TYPE_CHECKING:
    from accel.evals.controls import Control
    from accel.evals.models import LoadedImageModel, LoadedModel

N_REAL = 2000
REAL = "real pictures"


def summarise_drawn(loaded: LoadedModel, records: Sequence[SampleRecord], controls: Sequence[Control] = ()) -> dict[str, Any]:
    """Sections of a result.json: `drawn`, a row per task and label and one of real pictures, and `drawn_paired`; empty where nothing was drawn.

    controls: what the methods are paired with. Draws nothing: whatever is told of pictures stands in the records.
    """
    mine = [r for r in records if r.features is not None]
    if not mine:
        return {}
    model = image_model(loaded)
    assert model.real is not None
    pixels, _ = model.real(N_REAL)
    real = model.judge.features(_near(pixels, model))
    groups = {place: [r for r in mine if (r.task, r.label) == place] for place in dict.fromkeys((r.task, r.label) for r in mine)}
    rows = _in_series([_row(own, groups.get((task, BASELINE), []), real) for (task, _), own in groups.items()])
    rows = [_with_whole_cache(row, rows) if row["is_baseline"] else row for row in rows]
    labels = [row["label"] for row in rows]
    pairs = [(label, control.label) for control in controls for label in control.references if label in labels]
    pairs.sort(key=lambda pair: labels.index(pair[0]))
    paired = [
        row
        for task in dict.fromkeys(r.task for r in mine)
        for a, b in pairs
        if (row := paired_row(groups.get((task, a), []), groups.get((task, b), []))) is not None
    ]
    return {"drawn": [*rows, _real_row(model, real, max(row["n"] for row in rows))], "drawn_paired": paired}


def paired_row(method: Sequence[SampleRecord], other: Sequence[SampleRecord]) -> dict[str, Any] | None:
    """Method minus other on the seeds that both have drawn, each with n and a standard error over pictures: `right`, a difference of shares, and
    `perceptual`, of distances to dense (None where one of them has none). None where they share no seed.
    """
    by_sample = {r.sample: r for r in other}
    pairs = [(r, by_sample[r.sample]) for r in method if r.sample in by_sample]
    if not pairs:
        return None
    far = [a.perceptual - b.perceptual for a, b in pairs if a.perceptual is not None and b.perceptual is not None]
    return {"task": method[0].task, "label": method[0].label, "other": other[0].label, "keep": asked_of(method),
            "right": _estimate([a.exact - b.exact for a, b in pairs]), "perceptual": _estimate(far)}  # fmt: skip


def _row(records: Sequence[SampleRecord], dense: Sequence[SampleRecord], real: Tensor) -> dict[str, Any]:
    first, is_baseline = records[0], records[0].label == BASELINE
    right = _estimate([r.exact for r in records])
    assert right is not None
    features = torch.tensor([r.features for r in records])
    beside = None if is_baseline else paired_row(records, dense)
    psnr, far = ([v for r in records if (v := getattr(r, name)) is not None] for name in ("psnr", "perceptual"))
    return {
        "task": first.task, "label": first.label, "series": series_of(first), "keep": asked_of(records), "is_baseline": is_baseline, **right,
        "frechet": M.frechet_distance_of_features(features, real) if len(records) > 1 else None,
        "to_dense": beside and beside["right"], "psnr": _estimate(psnr), "perceptual": _estimate(far),
        "cache": cache_of(records), "memory": next((r.memory for r in records if r.memory is not None), None),
        "ms": statistics.median(r.prefill_ms for r in records),
    }  # fmt: skip


def _in_series(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those that are alone in their series named by their label."""
    members = Counter((row["task"], row["series"]) for row in rows)
    return [row if members[row["task"], row["series"]] > 1 else {**row, "series": row["label"]} for row in rows]


def _with_whole_cache(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The dense row with the whole cache that the counters of the other rows speak of; nothing counts an unpatched model's."""
    found = next((other["cache"] for other in rows if other["task"] == row["task"] and other["cache"]), None)
    if found is None:
        return row
    whole, n_bytes = found["whole"], found["whole_bytes"]
    # the last scale is read and never stored
    cache = {"whole": whole, "attended": whole, "retained": [*whole[:-1], 0], "kept_share": 1.0, "peak_bytes": n_bytes, "whole_bytes": n_bytes}
    return {**row, "cache": cache}


def _real_row(model: LoadedImageModel, real: Tensor, n: int) -> dict[str, Any]:
    """Real pictures that are not among `real`, as if they had been drawn."""
    assert model.real is not None
    n = max(n, 2)
    pixels, labels = (part[N_REAL:] for part in model.real(N_REAL + n))
    pixels = _near(pixels, model)
    found = M.class_accuracy(pixels, labels, model.judge)
    frechet = M.frechet_distance_of_features(model.judge.features(pixels), real)
    return {"task": "", "label": REAL, "series": REAL, "keep": None, "is_baseline": True, "n": n, "value": found.value, "stderr": found.stderr,
            "frechet": frechet, "to_dense": None, "psnr": None, "perceptual": None, "cache": None, "memory": None, "ms": None}  # fmt: skip


def _estimate(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, standard error over pictures and n; None of nothing."""
    return clustered(values, [str(i) for i in range(len(values))]).as_dict() if values else None


def _near(pixels: Tensor, model: LoadedImageModel) -> Tensor:
    """The pictures where the judge is."""
    return pixels.to(next(iter(model.judge.parameters())).device)
