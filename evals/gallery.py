"""Pictures of a run with what each method kept of them, and what it answered: files beside the result, and rows that tell a report of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accel
from accel.errors import OptionError, UnsupportedError
from accel.evals.controls import Control, build_control, describe
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedModel, LoadedVisionModel
from accel.evals.overlays import JOINED, KEPT, MERGED, fate_maps, overlay, plain, png_bytes
from accel.evals.picture_summary import series_of
from accel.evals.pictures import Reply, inputs_of, picture_of, prompt_of, reply_to, seen_picture, vision_model
from accel.evals.results import RunFolder, SampleKey, SampleRecord
from accel.evals.summary import BASELINE
from accel.evals.tasks import PictureTask, load_task
from accel.protocols import Method
from accel.stats import PruningEvent

# of a sweep, one budget is shown: the one nearest to this share, where methods begin to differ
SHOWN_SHARE = 0.25
N_SCENES = 4
FOLDER = "overlays"
# of a reply to a question about any picture
N_WORDS = 24


@dataclass(frozen=True)
class Shown:
    """A reply, and the stages at which tokens left."""

    reply: Reply
    events: list[PruningEvent]


def watch_reply(loaded: LoadedVisionModel, inputs: dict[str, Any], methods: Sequence[Method], max_new_tokens: int) -> Shown:
    """The model's reply under the methods, and what they dropped."""
    events: list[PruningEvent] = []
    with quiet_notices(), accel.apply(loaded.model, *methods) as handle, handle.observe_pruning(events.append):
        reply = reply_to(loaded, inputs, max_new_tokens)
    return Shown(reply, events)


def run_gallery(
    loaded: LoadedModel, folder: RunFolder, methods: Mapping[str, Sequence[Method]], controls: Sequence[Control], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Draws a few pictures of finished samples, one of each task, under the methods and controls of one budget; saves them and returns their rows.

    tasks: about pictures, those that passed the gate. Each row: file, title, caption, starts_row.
    """
    labels = shown_labels(folder.records, [*methods, *(c.label for c in controls)])
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(tasks[:N_SCENES]):
        # another picture for every task, where there are enough
        samples = sorted({r.sample for r in folder.records if r.task == name and r.label == BASELINE})
        if not samples:
            continue
        key = SampleKey(name, BASELINE, 0, samples[number % len(samples)])
        found = {label: record for label in labels if (record := folder.get(key._replace(label=label))) is not None}
        if found:
            rows += _scene(vision_model(loaded), folder, key, found, methods, controls)
    return rows


def inspect_picture(
    loaded: LoadedModel, folder: Path, methods: Sequence[Method], file: Path, question: str, *, must_apply: bool
) -> dict[str, Any]:
    """`overlays` and `notices` for a result.json: what each method keeps of any picture, stage by stage, saved under `folder`.

    must_apply: raise where a method does not run on this model; else a notice says why.
    """
    model = vision_model(loaded)
    original = _opened(file)
    inputs = inputs_of(model, original, prompt_of(model, question))
    picture = seen_picture(model, inputs, original)
    dense = reply_to(model, inputs, N_WORDS)
    caption = f"{question} {BASELINE}: {dense.text or '(nothing)'}."
    rows = [{"file": save_overlay(folder, file.stem, plain(picture)), "title": file.name, "caption": caption, "starts_row": True}]
    notices: list[str] = []
    for method in methods:
        label = describe(method)
        try:
            shown = watch_reply(model, inputs, [method], N_WORDS)
        except UnsupportedError as error:
            if must_apply:
                raise
            notices.append(" ".join(str(error).split()))
            continue
        if not shown.events:
            notices.append(f"{label} dropped nothing of this picture")
        for i, event in enumerate(shown.events):
            stage = f", {_stage_text(event)}" if len(shown.events) > 1 else ""
            so_far = shown.events[: i + 1]
            drawn = overlay(picture, fate_maps(so_far))
            text = f"{kept_text(so_far)}. Answer: {shown.reply.text or '(nothing)'}."
            saved = save_overlay(folder, f"{file.stem}-{label}{stage}", drawn)
            rows.append({"file": saved, "title": label + stage, "caption": text, "starts_row": False})
    return {"overlays": rows, "notices": notices}


def shown_labels(records: Sequence[SampleRecord], labels: Sequence[str]) -> list[str]:
    """Of each series, the label with the budget nearest to `SHOWN_SHARE`; series that drop no tokens are left out."""
    best: dict[str, tuple[float, str]] = {}
    firsts = {r.label: r for r in reversed(records) if r.picture_hash is not None}
    for label in labels:
        record = firsts.get(label)
        if record is None or record.kept_share is None or record.visual_tokens == 0:
            continue
        share = record.keep if isinstance(record.keep, float) else (record.kept_tokens or 0) / record.visual_tokens
        distance = abs(share - SHOWN_SHARE)
        if distance < best.get(series_of(record), (float("inf"), ""))[0]:
            best[series_of(record)] = (distance, label)
    return [label for label in labels if label in {label for _, label in best.values()}]


def kept_text(events: Sequence[PruningEvent]) -> str:
    """ "36 of 144 patches kept", and how many went into others."""
    if not events:
        return "all patches kept"
    maps = fate_maps(events)
    n, kept, merged = sum(int((m.grid >= 0).sum()) for m in maps), sum(m.count(KEPT, JOINED) for m in maps), sum(m.count(MERGED) for m in maps)
    return f"{kept} of {n} patches kept" + (f", {merged} merged into others" if merged else "")


def _stage_text(event: PruningEvent) -> str:
    return f"before layer {event.stage.layer}" if event.stage.boundary == "layer" else f"behind the {event.stage.boundary}"


def _opened(file: Path) -> Any:
    """The Pillow picture in a file, turned the way its camera says."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except OSError as error:
        raise OptionError(f"cannot read the picture {file}: {error}") from error


def save_overlay(folder: Path, name: str, picture: Any) -> str:
    """Writes the Pillow picture under `folder` and returns its path inside it."""
    target = folder / FOLDER / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.png"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(png_bytes(picture))
    return target.relative_to(folder).as_posix()


def _scene(
    loaded: LoadedVisionModel, folder: RunFolder, key: SampleKey, found: Mapping[str, SampleRecord], methods: Mapping[str, Sequence[Method]],
    controls: Sequence[Control],
) -> list[dict[str, Any]]:  # fmt: skip
    task, dense = load_task(key.task), folder.get(key)
    assert isinstance(task, PictureTask)
    assert dense is not None
    sample = task.samples(key.sample + 1, dense.seed)[key.sample]
    inputs = inputs_of(loaded, picture_of(sample.image), prompt_of(loaded, sample.question, sample.instruction))
    picture = seen_picture(loaded, inputs, picture_of(sample.image))
    stem = f"{key.task}-{key.sample}"
    about = f"{sample.question} Expected: {sample.answers[0]}. {_answer_text(BASELINE, dense)}"
    rows = [{"file": save_overlay(folder.path, stem, plain(picture)), "title": key.task, "caption": about, "starts_row": True}]
    for label, record in found.items():
        applied = methods[label] if label in methods else [_control(label, controls, methods, folder, key)]
        shown = watch_reply(loaded, inputs, applied, max_new_tokens=1)
        drawn = overlay(picture, fate_maps(shown.events)) if shown.events else plain(picture)
        file = save_overlay(folder.path, f"{stem}-{label}", drawn)
        rows.append({"file": file, "title": label, "caption": f"{kept_text(shown.events)}. {_answer_text('', record)}", "starts_row": False})
    return rows


def _control(label: str, controls: Sequence[Control], methods: Mapping[str, Sequence[Method]], folder: RunFolder, key: SampleKey) -> Method:
    control = next(c for c in controls if c.label == label)
    reference = folder.get(key._replace(label=control.references[0]))
    assert reference is not None
    return build_control(control, methods[control.references[0]], reference, seed=key.sample)


def _answer_text(label: str, record: SampleRecord) -> str:
    mark = "✓" if record.exact else "✗"
    return f"{label + ' answers' if label else 'Answer'}: {mark} {record.answers[0] or '(nothing)'}"
