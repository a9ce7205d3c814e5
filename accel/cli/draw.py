"""`accel draw`: many pictures of classes or prompts, dense or with methods, in the layouts that public metric scripts read."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import choose_dtype, merge_settings, print_settings, require_least, settle_threads
from accel.cli.options import add_machine_arguments, add_method_argument, add_settings_arguments, by_content, content_hash, read_variants, split_items
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.evals.drawing.artists import Encode, FoundModel
    from accel.evals.drawing.export_folder import ExportFolder
    from accel.evals.drawing.exports import Subject
    from accel.protocols import Method

HELP = "many pictures of classes or prompts, for the public scripts of FID, GenEval, HPSv2 and ImageReward"

PER_CLASS = 50
DEFAULTS: dict[str, Any] = {
    "model": "small-var", "tokenizer": None, "method": None, "recipe": None, "labels": None, "per_class": None, "prompts": None, "per_prompt": None,
    "text_encoder": None, "features": None, "layout": "folder", "out": None, "npz_only": None, "seed": 0, "batch": 8, "guidance": None,
    "top_k": None, "top_p": None, "tau": None, "size": None, "aspect_ratio": None, "dtype": "auto", "device": "cpu", "threads": None,
}  # fmt: skip
WHOLE = ("per_class", "per_prompt", "seed", "batch", "top_k", "threads")
SAMPLING = ("guidance", "top_k", "top_p", "tau", "size", "aspect_ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from accel.evals.drawing.exports import LAYOUTS

    # no default here: a flag that was not given must not override the settings file
    parser.add_argument("--model", help="small-var, a folder of save_pretrained, or an official VAR or Infinity file or folder (default: small-var)")
    parser.add_argument("--tokenizer", help="the tokenizer's file, beside official weights")
    add_method_argument(parser, "applied to the model; repeatable (default: dense)")
    parser.add_argument("--recipe", help="a recipe file, applied to the model")
    parser.add_argument("--labels", help="classes to draw, such as 0-999 or 3,7,10-12")
    parser.add_argument("--per-class", type=int, help=f"pictures of each class (default: {PER_CLASS})")
    prompts = "; ".join(f"{name} takes {layout.prompts}" for name, layout in LAYOUTS.items() if layout.needs_prompts)
    parser.add_argument("--prompts", help=f"a file of prompts: {LAYOUTS['folder'].prompts}; {prompts}")
    counts = ", ".join(f"{layout.copies} for {name}" for name, layout in LAYOUTS.items() if layout.copies > 1)
    parser.add_argument("--per-prompt", type=int, help=f"pictures of each prompt (default: 1; {counts})")
    parser.add_argument("--text-encoder", help="the T5 that reads the prompts, a folder or hub id (google/flan-t5-xl for the official Infinity)")
    parser.add_argument("--features", help="instead of a text encoder: what accel.evals.drawing.artists.save_features wrote")
    parser.add_argument("--layout", help="; ".join(f"{name}: {layout.what}" for name, layout in LAYOUTS.items()) + " (default: folder)")
    parser.add_argument("--out", help="folder of the export; the same command goes on where it was stopped")
    parser.add_argument("--npz-only", action="store_const", const=True, help="adm: delete the pictures when the .npz holds them")
    parser.add_argument("--seed", type=int, help="picture i is drawn from its own seed, the same with every method (default: 0)")
    why = "another batch rounds otherwise, which moves a code now and then, above all in bfloat16; and a few methods divide one budget over a batch"
    parser.add_argument("--batch", type=int, help=f"pictures at a time; compare runs of the same batch, as {why} (default: {DEFAULTS['batch']})")
    parser.add_argument("--guidance", type=float, help="guidance scale; this and the next: default as in the model's generate")
    parser.add_argument("--top-k", type=int, help="0 turns it off")
    parser.add_argument("--top-p", type=float, help="0 or 1 turn it off")
    parser.add_argument("--tau", type=float, help="temperature; Infinity only")
    parser.add_argument("--size", help="0.06M, 0.25M, 0.60M or 1M pixels; Infinity only")
    parser.add_argument("--aspect-ratio", type=float, help="height / width; Infinity only")
    add_machine_arguments(parser)
    add_settings_arguments(parser)
    parser.epilog = (
        "examples:\n  accel draw --model var_d30.pth --tokenizer vae_ch160v4096z32.pth --labels 0-999 --method h2o:keep=0.5 --layout adm"
        " --device cuda --dtype float16 --batch 64 --out var-h2o\n"
        "  accel draw --model infinity_2b_reg.pth --tokenizer infinity_vae_d32reg.pth --text-encoder google/flan-t5-xl"
        " --prompts evaluation_metadata.jsonl --layout geneval --device cuda --out infinity-geneval\n"
        "  accel draw --model small-var --labels 0-9 --per-class 2 --layout adm --out digits"
    )


def main(args: argparse.Namespace) -> int:
    """Draws what is missing and finishes the layout. 0 when every picture is there."""
    settings = merge_settings(args, DEFAULTS, WHOLE)
    if args.dry_run:
        print_settings(settings)
        return 0
    if not settings["out"]:
        raise OptionError("name the folder of the pictures with --out: the same command goes on there when it was stopped")
    require_least(settings, batch=1, per_class=1, per_prompt=1)
    settle_threads(settings["threads"])
    from accel.evals.drawing.artists import check_fit, find_model
    from accel.evals.drawing.export_folder import ExportFolder
    from accel.evals.drawing.exports import Plan, layout_named, read_subjects
    from accel.patching import check_together

    layout = layout_named(settings["layout"])
    if settings["npz_only"] and layout.archive is None:
        raise OptionError(f"--npz-only goes with the layout adm; {layout.name} is made of pictures")
    labels = None if settings["labels"] is None else parse_labels(settings["labels"])
    subjects = read_subjects(layout, labels=labels, prompts=settings["prompts"])
    methods = [m for group in read_variants(settings).values() for m in group] if settings["method"] or settings["recipe"] else []
    # told before anything is loaded
    if methods:
        check_together(methods)
    found = find_model(settings["model"], tokenizer=settings["tokenizer"], size=settings["size"])
    check_fit(found, subjects, text_encoder=settings["text_encoder"], features=settings["features"])
    sampling = found.sampling({name: settings[name] for name in SAMPLING})
    dtype, reason = choose_dtype(settings["dtype"], settings["device"])
    plan = Plan(subjects, _copies(settings, layout), settings["seed"])
    folder = ExportFolder(settings["out"], layout, plan, _identity(settings, subjects, methods, sampling, dtype=dtype, copies=plan.copies))
    n_missing = len(plan) - folder.n_done()
    if n_missing:
        print(f"{n_missing} of {len(plan)} pictures to draw; loading {settings['model']} in {dtype} ({reason})", file=sys.stderr)
        _draw(folder, found, settings, methods, sampling, dtype=dtype)
    folder.finish(archive_only=bool(settings["npz_only"]))
    print(f"{len(plan)} {'picture' if len(plan) == 1 else 'pictures'} in {folder.root}, layout {layout.name}")
    print(f"score: {layout.scoring(folder.root, found.drawn)}")
    return 0


def parse_labels(given: Any) -> list[int]:
    """The labels in `0-999`, `3,7,10-12`, or a list, in this order. Raises OptionError for anything else, and for a label that is there twice."""
    found: list[int] = []
    for item in split_items(given):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise OptionError(f"labels are numbers and ascending ranges, such as 0-999 or 3,7,10-12, got {item!r}")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    if not found or len(set(found)) < len(found):
        raise OptionError(f"{given!r} names {'a label twice: --per-class draws more of each' if found else 'no labels'}")
    return found


def _copies(settings: Mapping[str, Any], layout: Any) -> int:
    """Pictures of each subject."""
    mine, other = ("per_prompt", "per_class") if settings["labels"] is None else ("per_class", "per_prompt")
    if settings[other] is not None:
        raise OptionError(f"--{other.replace('_', '-')} goes with {'labels' if other == 'per_class' else 'prompts'}; use --{mine.replace('_', '-')}")
    copies: int = settings[mine] if settings[mine] is not None else layout.copies if settings["labels"] is None else PER_CLASS
    if layout.most_copies is not None and copies > layout.most_copies:
        raise OptionError(f"{layout.name} has one place per prompt, asked for {copies} pictures; another --seed and --out give further ones")
    return copies


def _identity(
    settings: Mapping[str, Any], subjects: Sequence[Subject], methods: Sequence[Method], sampling: Mapping[str, Any], *, dtype: str, copies: int
) -> dict[str, Any]:
    """What the pictures depend on; a folder holds pictures of one such set. Files of prompts, features and methods count by what they hold."""
    from accel.evals.drawing.artists import prompts_hash

    kept = {key: settings[key] for key in ("model", "tokenizer", "text_encoder", "layout", "seed") if settings[key] is not None}
    if settings["features"] is not None:
        kept["features"] = content_hash(settings["features"], "the features")
    drawn = {"labels": str(settings["labels"])} if settings["prompts"] is None else {"prompts": prompts_hash(subjects)}
    return {
        **kept, **drawn, "pictures of each": copies, **sampling, "dtype": dtype, "device": str(settings["device"]).split(":")[0],
        # rounding depends on the batch, and moves a code now and then in bfloat16; a method may treat a batch as one
        "batch": settings["batch"], "methods": by_content(methods),
    }  # fmt: skip


def _draw(
    folder: ExportFolder, found: FoundModel, settings: Mapping[str, Any], methods: Sequence[Method], sampling: Mapping[str, Any], *, dtype: str
) -> None:
    """Loads the model, draws what is missing with a bar on stderr, and says what the methods did."""
    from tqdm import tqdm

    import accel
    from accel.evals.drawing.artists import load_found, make_artist

    model = load_found(found, dtype=dtype, device=settings["device"])
    encode = None if found.draws_classes else _encode(settings, folder.plan.subjects, model, dtype)
    artist = make_artist(found, model, folder.plan.subjects, sampling, encode)
    with accel.apply(model, *methods) if methods else nullcontext() as handle:
        folder.begin()
        bar = tqdm(total=len(folder.plan), initial=folder.n_done(), file=sys.stderr, unit="picture")
        try:
            with bar:
                folder.draw_missing(artist, batch=settings["batch"], on_saved=bar.update)
        except KeyboardInterrupt:
            print(f"accel: {folder.n_done()} of {len(folder.plan)} pictures are saved. The same command goes on.", file=sys.stderr)
            raise
        if handle is not None:
            print(handle.report())


def _encode(settings: Mapping[str, Any], subjects: Sequence[Subject], model: Any, dtype: str) -> Encode:
    """Where the features of the prompts come from."""
    from accel.evals.drawing.artists import encoder_of, features_of
    from accel.evals.models import torch_dtype

    if settings["features"]:
        return features_of(settings["features"], subjects, width=model.config.text_width, most_tokens=model.config.text_tokens)
    return encoder_of(settings["text_encoder"], dtype=torch_dtype(dtype), device=settings["device"])
