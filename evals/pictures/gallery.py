"""Pictures of a run with what each method kept of them, and what it answered: files beside the result, and rows that tell a report of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accel
from accel.errors import UnsupportedError
from accel.evals.controls import Control, add_variant
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedModel, LoadedVisionModel
from accel.evals.pictures.attention_flow import attention_flow
from accel.evals.pictures.overlays import JOINED, KEPT, MERGED, fate_maps, overlay, plain, png_bytes
from accel.evals.pictures.questions import Reply, inputs_of, open_picture, picture_of, prompt_of, reply_to, seen_picture, vision_model
from accel.evals.results import RunFolder, SampleKey, SampleRecord
from accel.evals.summary.pictures import series_of
from accel.evals.summary.scores import BASELINE
from accel.evals.tasks import PictureTask, load_task
from accel.protocols import Method
from accel.registry import build
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

    tasks: about pictures, those that passed the gate. What has not run on a picture is left out beside it.
    Each row: file, title, caption, starts_row.
    """
    labels = shown_labels(folder.records, list(methods), controls)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(tasks[:N_SCENES]):
        # another picture for every task, where there are enough
        samples = sorted({r.sample for r in folder.records if r.task == name and r.label == BASELINE})
        if not samples:
            continue
        key = SampleKey(name, BASELINE, 0, samples[number % len(samples)])
        found = {label: record for label in labels if (record := folder.get(key._replace(label=label))) is not None}
        if found:
            rows += _scene(vision_model(loaded), folder, key, found, methods)
    return rows


def inspect_picture(
    loaded: LoadedModel, folder: Path, methods: Sequence[Method], file: Path, question: str, *, must_apply: bool
) -> dict[str, Any]:
    """`overlays` and `notices` for a result.json: what each method keeps of any picture, stage by stage, saved under `folder`.

    must_apply: raise where a method does not run on this model; else a notice says why.
    """
    model = vision_model(loaded)
    original = open_picture(file)
    inputs = inputs_of(model, original, prompt_of(model, question))
    picture = seen_picture(model, inputs, original)
    dense = reply_to(model, inputs, N_WORDS)
    caption = f"{question} {BASELINE}: {dense.text or '(nothing)'}."
    rows = [{"file": save_overlay(folder, file.stem, plain(picture)), "title": file.name, "caption": caption, "starts_row": True}]
    notices: list[str] = []
    labels: dict[str, list[Method]] = {}
    for method in methods:
        label = add_variant(labels, [method])
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


def inspect_attention(loaded: LoadedModel, file: Path, question: str) -> dict[str, Any]:
    """`attention` for a result.json: what text and picture read in each layer, without any method."""
    model = vision_model(loaded)
    return attention_flow(model.model, inputs_of(model, open_picture(file), prompt_of(model, question)))


def shown_labels(records: Sequence[SampleRecord], methods: Sequence[str], controls: Sequence[Control]) -> list[str]:
    """Of each series of methods, the label whose share kept is nearest to `SHOWN_SHARE`, and the controls of those that were chosen.

    Series that drop no tokens are left out.
    """
    best: dict[str, tuple[float, str]] = {}
    firsts = {r.label: r for r in reversed(records) if r.picture_hash is not None and r.kept_share is not None}
    for label in methods:
        record = firsts.get(label)
        if record is None or record.kept_share is None:
            continue
        distance = abs(record.kept_share - SHOWN_SHARE)
        if distance < best.get(series_of(record), (float("inf"), ""))[0]:
            best[series_of(record)] = (distance, label)
    chosen = {label for _, label in best.values()}
    return [*(label for label in methods if label in chosen), *(c.label for c in controls if c.label in firsts and chosen & {*c.references})]


def kept_text(events: Sequence[PruningEvent]) -> str:
    """ "36 of 144 patches kept", and how many went into others."""
    if not events:
        return "all patches kept"
    maps = fate_maps(events)
    n, kept, merged = sum(int((m.grid >= 0).sum()) for m in maps), sum(m.count(KEPT, JOINED) for m in maps), sum(m.count(MERGED) for m in maps)
    return f"{kept} of {n} patches kept" + (f", {merged} merged into others" if merged else "")


def _stage_text(event: PruningEvent) -> str:
    return f"before layer {event.stage.layer}" if event.stage.boundary == "layer" else f"behind the {event.stage.boundary}"


def save_overlay(folder: Path, name: str, picture: Any) -> str:
    """Writes the Pillow picture under `folder` and returns its path inside it."""
    target = folder / FOLDER / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.png"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(png_bytes(picture))
    return target.relative_to(folder).as_posix()


def _scene(
    loaded: LoadedVisionModel, folder: RunFolder, key: SampleKey, found: Mapping[str, SampleRecord], methods: Mapping[str, Sequence[Method]]
) -> list[dict[str, Any]]:
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
        applied = methods[label] if label in methods else [build(name, options) for entry in record.options for name, options in entry.items()]
        shown = watch_reply(loaded, inputs, applied, max_new_tokens=1)
        drawn = overlay(picture, fate_maps(shown.events)) if shown.events else plain(picture)
        file = save_overlay(folder.path, f"{stem}-{label}", drawn)
        rows.append({"file": file, "title": label, "caption": f"{_reached_text(record, shown)}. {_answer_text('', record)}", "starts_row": False})
    return rows


def _reached_text(record: SampleRecord, shown: Shown) -> str:
    """What is left in the end, and the mean over the decoder layers where that is more."""
    text = kept_text(shown.events)
    if record.kept_share is None or record.kept_tokens is None or abs(record.kept_share * record.visual_tokens - record.kept_tokens) < 0.5:
        return text
    return f"{text} in the end, {100 * record.kept_share:.1f} % as a mean over the layers"


def _answer_text(label: str, record: SampleRecord) -> str:
    mark = "✓" if record.exact else "✗"
    return f"{label + ' answers' if label else 'Answer'}: {mark} {record.answers[0] or '(nothing)'}"
