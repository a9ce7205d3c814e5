"""Pictures that a model draws of classes: one sample, judged, and compared to what the unpatched model draws from the same seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.evals import image_metrics as M
from accel.evals.memory import track_peak
from accel.evals.models import LoadedImageModel, LoadedModel
from accel.evals.summary.scores import BASELINE

if TYPE_CHECKING:
    from accel.evals.drawing.album import Album
    from accel.evals.results import SampleKey
    from accel.evals.tasks import ClassSample
    from accel.protocols import ModelInfo
    from accel.stats import CacheStats

# of a picture that is the same as dense: JSON has no infinity, and a mean would be infinite too
MOST_PSNR = 100.0


def image_model(loaded: LoadedModel) -> LoadedImageModel:
    """The same object, where it draws; else OptionError."""
    if isinstance(loaded, LoadedImageModel):
        return loaded
    raise OptionError(f"{loaded.name} draws no pictures of classes; small-var does")


def dense_picture(loaded: LoadedImageModel, key: SampleKey, sample: ClassSample, album: Album) -> Tensor | None:
    """What dense drew from the seed of this sample, drawn now where the album does not hold it; None for dense itself. Ask with no method on."""
    if key.label == BASELINE:
        return None
    found = album.find(key._replace(label=BASELINE))
    if found is None:
        found = _draw(loaded, sample)[0]
        album.keep(key._replace(label=BASELINE), found)
    return found


def draw_sample(
    loaded: LoadedImageModel, key: SampleKey, sample: ClassSample, album: Album, *, dense: Tensor | None, on_drawn: Callable[[], None]
) -> dict[str, Any]:
    """What one drawn picture adds to its record; the picture itself goes into the album.

    dense: (3, height, width), as `dense_picture` returns it. `on_drawn` is called behind the picture. The first sample of a label is drawn twice,
    the second time for `memory` alone: watching memory takes time.
    """
    label = sample.number % len(loaded.class_names)
    begin = _now(loaded)
    pixels = _draw(loaded, sample)
    drawn_ms = (_now(loaded) - begin) * 1e3
    on_drawn()
    memory = memory_figures(loaded, lambda: _draw(loaded, sample)) if key.sample == 0 else None
    album.keep(key, pixels[0])
    [seen] = loaded.judge.classes(pixels).tolist()
    return {
        "n_tokens": loaded.model.schedule.total, "log_prob": None, "exact": float(seen == label), "log_probs": [], "hits": [float(seen == label)],
        "questions": [f"draw {loaded.class_names[label]}"], "expected": [loaded.class_names[label]], "answers": [loaded.class_names[seen]],
        "prefill_ms": drawn_ms, "features": [float(f"{value:.6g}") for value in loaded.judge.features(pixels)[0].tolist()], "memory": memory,
        **({} if dense is None else _distances(loaded, pixels, dense)),
    }  # fmt: skip


def cache_figures(stats: CacheStats, info: ModelInfo) -> dict[str, Any] | None:
    """What a compressed cache held in the generations counted, ready for JSON; None before the first.

    whole, attended, retained: entries per head by scale, as a mean over heads and layers, that a whole cache would have, that attention read, and
    that were left behind. kept_share: of the entries at the last scale that attention read. peak_bytes: the most that a cache held between attention
    calls; whole_bytes: what one holds without compression. None of them is the memory of the process.
    """
    if not stats.generations or info.scale_shapes is None or not stats.total:
        return None
    scales = sorted(stats.total)
    height, width = info.scale_shapes[scales[0]]
    # rows, heads and layers of all generations together
    n = stats.total[scales[0]] / (height * width)
    entries = (stats.total, stats.attended, stats.cached)
    by_scale = {name: [counts[scale] / n for scale in scales] for name, counts in zip(("whole", "attended", "retained"), entries, strict=True)}
    return {**by_scale, "kept_share": stats.kept_share, "peak_bytes": stats.peak_bytes, "whole_bytes": stats.whole_bytes}


def memory_figures(loaded: LoadedModel, draw: Callable[[], object]) -> dict[str, Any]:
    """What the process takes for one picture: `how` it was measured, and bytes, None where there is no such figure.

    allocated_bytes, reserved_bytes: peaks of the CUDA allocator, of tensors and of the memory it holds from the device, weights among them.
    resident_bytes: on a CPU, which keeps neither, the growth of the process's resident memory at its peak.
    """
    device = next(iter(loaded.model.parameters())).device
    if device.type == "cuda":
        # else what earlier methods had reserved would count for this one
        torch.cuda.empty_cache()
    with track_peak(device) as peak:
        draw()
    if device.type == "cuda":
        return {"how": "peaks of the CUDA allocator, weights among them", "allocated_bytes": torch.cuda.max_memory_allocated(device),
                "reserved_bytes": torch.cuda.max_memory_reserved(device), "resident_bytes": None}  # fmt: skip
    return {"how": peak.how, "allocated_bytes": None, "reserved_bytes": None, "resident_bytes": peak.peak_bytes}


def _draw(loaded: LoadedImageModel, sample: ClassSample) -> Tensor:
    """The picture (1, 3, height, width)."""
    assert loaded.draw is not None
    return loaded.draw([sample.number % len(loaded.class_names)], seed=[sample.picture_seed])


def _distances(loaded: LoadedImageModel, pixels: Tensor, dense: Tensor) -> dict[str, float]:
    """How far a picture is from dense, both as files hold them."""
    from accel.evals.drawing.album import in_bytes

    pixels, dense = (in_bytes(t).to(pixels.device) / 255 for t in (pixels, dense[None]))
    psnr = float(M.psnr(pixels, dense))
    return {"psnr": min(psnr, MOST_PSNR), "perceptual": float(M.perceptual_distance(pixels, dense, loaded.judge))}


def _now(loaded: LoadedModel) -> float:
    """Seconds, when the device has finished."""
    device = next(iter(loaded.model.parameters())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
