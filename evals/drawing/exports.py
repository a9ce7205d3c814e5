"""Generated pictures in the layouts that public metric scripts read: what each of them draws, where its files lie, and how they are scored.

Every export is a folder with `images/`, which holds nothing but the layout, and beside it what the layout needs or we note down. A further layout is
one more subclass of `Layout` here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accel.errors import OptionError

IMAGES = "images"
# the reference batches of openai/guided-diffusion by side, and how many classes they are of
REFERENCES: dict[int | None, str] = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Subject:
    """What to draw: a class or a text. key: the name by which a layout finds its pictures. line: what the layout keeps of the prompts file."""

    label: int | None = None
    text: str | None = None
    key: str = ""
    line: str = ""


@dataclass(frozen=True)
class Drawn:
    """What a model draws, as told before its weights are read: of how many classes, None of texts, and the side of a picture in pixels."""

    n_classes: int | None = None
    side: int | None = None


@dataclass(frozen=True)
class Picture:
    """One picture of a plan. copy: it is the copy-th of its subject, from 0. index: which subject."""

    number: int
    seed: int
    index: int
    copy: int
    subject: Subject


@dataclass(frozen=True)
class Plan:
    """All pictures of one export: `copies` of every subject.

    The subjects take turns: picture i shows subject i modulo their number. ADM's Inception score is a mean over stretches of 5000 pictures, and a
    stretch of a hundred classes could not score above 100. So too a run that was cut short has drawn a little of everything.
    """

    subjects: tuple[Subject, ...]
    copies: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.subjects or self.copies < 1:
            raise OptionError(f"nothing to draw: {len(self.subjects)} labels or prompts, {self.copies} pictures of each")

    def __len__(self) -> int:
        return len(self.subjects) * self.copies

    def __iter__(self) -> Iterator[Picture]:
        return (self.picture(number) for number in range(len(self)))

    def picture(self, number: int) -> Picture:
        """The picture of this number; its seed is that of the task `images` of `accel run`."""
        from accel.evals.tasks.images import STRIDE

        copy, index = divmod(number, len(self.subjects))
        return Picture(number, self.seed * STRIDE + number, index, copy, self.subjects[index])


class Layout:
    """How one public script finds pictures. Subclasses say what differs."""

    name: ClassVar[str]
    what: ClassVar[str]                         # for help: what reads it
    prompts: ClassVar[str] = "a .txt file with a prompt per line, or a .json or .jsonl file"
    needs_prompts: ClassVar[bool] = False
    copies: ClassVar[int] = 1                   # pictures of each subject where nothing else is asked for
    most_copies: ClassVar[int | None] = None
    archive: ClassVar[str | None] = None        # a file that `finish` makes of all pictures, and that can stand for them

    def read_prompts(self, path: Path) -> list[Subject]:
        """The subjects in a prompts file; OptionError names what is wrong with it."""
        return [Subject(text=text) for text in _texts(path)]

    def file(self, picture: Picture) -> str:
        """Where the picture lies, below `images/`."""
        return f"{picture.number:06d}.png"

    def begin(self, root: Path, plan: Plan) -> None:
        """Writes what lies beside the pictures; called each time the export goes on."""

    def finish(self, root: Path, plan: Plan) -> None:
        """Makes what needs all pictures."""

    def scoring(self, root: Path, drawn: Drawn) -> str:
        """How the pictures are scored, for people."""
        return f"the pictures are numbered in {root / IMAGES}, and listed with seeds in {root / 'pictures.jsonl'}"


class Folder(Layout):
    """Numbered PNG files, as FID tools that take a folder read them."""

    name, what = "folder", "numbered PNG files"


class Adm(Layout):
    """The evaluator of openai/guided-diffusion: `arr_0` (N, H, W, 3) uint8, and `arr_1` (N,) int64 with the classes, which it does not read."""

    name, what, archive = "adm", "one .npz for FID and Inception score", "samples.npz"

    def finish(self, root: Path, plan: Plan) -> None:
        """Writes samples.npz out of the pictures, one at a time."""
        from accel.evals.drawing.npz import write_npz

        labels = [picture.subject.label for picture in plan]
        known = None if None in labels else labels
        write_npz(root / "samples.npz", [root / IMAGES / self.file(picture) for picture in plan], known)  # type: ignore[arg-type]

    def scoring(self, root: Path, drawn: Drawn) -> str:
        """With the published reference batch for ImageNet; other pictures need one of their own kind, and against ImageNet a score says nothing."""
        reference = REFERENCES.get(drawn.side) if drawn.n_classes == IMAGENET_CLASSES else None
        command = f"python evaluator.py {reference or 'REFERENCE.npz'} {root / 'samples.npz'}    (openai/guided-diffusion, evaluations/)"
        if reference:
            return command
        what = "of what the prompts describe" if drawn.n_classes is None else f"of the {drawn.n_classes} classes that the model was trained on"
        size = f"of {drawn.side}×{drawn.side} pixels, as these are, " if drawn.side else ""
        return f"{command}\nREFERENCE.npz: real pictures {what}, {size}as arr_0 (N, H, W, 3) uint8, many thousands; no published batch holds them"


class GenEval(Layout):
    """djghosh13/geneval: a folder per prompt, with the prompt's own line of the metadata and the pictures in `samples/`."""

    name, what, needs_prompts, copies = "geneval", "a folder per prompt with its metadata", True, 4
    prompts = "GenEval's evaluation_metadata.jsonl"

    def read_prompts(self, path: Path) -> list[Subject]:
        found = []
        for number, line in enumerate(_lines(path, (".jsonl",), self), start=1):
            record = _json(line, f"{path}, line {number}")
            _require(record, ("tag", "prompt"), f"{path}, line {number}", self)
            found.append(Subject(text=record["prompt"], key=f"{number - 1:05d}", line=line))
        return found

    def file(self, picture: Picture) -> str:
        return f"{picture.subject.key}/samples/{picture.copy:04d}.png"

    def begin(self, root: Path, plan: Plan) -> None:
        for subject in plan.subjects:
            folder = root / IMAGES / subject.key
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(subject.line + "\n", encoding="utf-8")

    def scoring(self, root: Path, drawn: Drawn) -> str:
        return f"python evaluation/evaluate_images.py {root / IMAGES} --outfile {root / 'results.jsonl'} --model-path DETECTOR    (djghosh13/geneval)"


class HPSv2(Layout):
    """tgxs002/HPSv2: a folder per style, JPEG files by the place of the prompt in the style's list. It takes every entry beside them for a style."""

    name, what, needs_prompts, most_copies = "hpsv2", "a folder per style, numbered JPEG files", True, 1
    prompts = "the folder with HPSv2's anime.json, concept-art.json, paintings.json and photo.json, or one of them"
    styles = ("anime", "concept-art", "paintings", "photo")

    def read_prompts(self, path: Path) -> list[Subject]:
        # the folder holds other lists too, of other benchmarks
        files = [file for style in self.styles if (file := path / f"{style}.json").exists()] if path.is_dir() else [path]
        if not files:
            raise OptionError(f"{path} holds none of {', '.join(f'{style}.json' for style in self.styles)}: hpsv2 takes {self.prompts}")
        found = []
        for file in files:
            listed = _json(_text(file), str(file))
            if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
                raise OptionError(f"{file} must hold a list of prompts: hpsv2 takes {self.prompts}")
            found += [Subject(text=text, key=f"{file.stem}/{i:05d}") for i, text in enumerate(listed)]
        return found

    def file(self, picture: Picture) -> str:
        return f"{picture.subject.key}.jpg"

    def scoring(self, root: Path, drawn: Drawn) -> str:
        return f"python -c \"import hpsv2; hpsv2.evaluate('{root / IMAGES}')\"    (tgxs002/HPSv2; its means count 800 prompts per style)"


class ImageReward(Layout):
    """THUDM/ImageReward: `<id>_<copy>.png` in one folder, whose files it counts, and the list of ids and prompts."""

    name, what, needs_prompts, copies = "imagereward", "pictures by prompt id, and prompts.json", True, 10
    prompts = "ImageReward's benchmark-prompts.json"

    def read_prompts(self, path: Path) -> list[Subject]:
        listed = _json(_text(path), str(path))
        if not isinstance(listed, list):
            raise OptionError(f"{path} must hold a list: imagereward takes {self.prompts}")
        for number, record in enumerate(listed):
            _require(record, ("id", "prompt"), f"{path}, entry {number}", self)
            if not record["id"] or Path(record["id"]).name != record["id"]:
                raise OptionError(f"{path}, entry {number}: the id {record['id']!r} cannot name a file")
        if len({record["id"] for record in listed}) < len(listed):
            raise OptionError(f"{path}: an id is there twice, and names the pictures of one prompt only")
        return [Subject(text=record["prompt"], key=record["id"]) for record in listed]

    def file(self, picture: Picture) -> str:
        return f"{picture.subject.key}_{picture.copy}.png"

    def begin(self, root: Path, plan: Plan) -> None:
        records = [{"id": subject.key, "prompt": subject.text} for subject in plan.subjects]
        (root / "prompts.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def scoring(self, root: Path, drawn: Drawn) -> str:
        words = f"--prompts_path {root / 'prompts.json'} --img_dir {root} --model {IMAGES} --result_dir {root / 'scores'}"
        return f"python test-benchmark.py {words}    (THUDM/ImageReward)"


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Adm(), GenEval(), HPSv2(), ImageReward(), Folder())}


def layout_named(name: str) -> Layout:
    """The layout of this name; OptionError with the closest known one."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    close = difflib.get_close_matches(str(name), list(LAYOUTS), n=1)
    raise OptionError(f"there is no layout {name!r}{f'; did you mean {close[0]!r}?' if close else '.'} There are: {', '.join(LAYOUTS)}")


def read_subjects(layout: Layout, *, labels: Sequence[int] | None, prompts: str | Path | None) -> tuple[Subject, ...]:
    """What is drawn: the classes, or the prompts of a file; OptionError unless exactly one of them is given and the layout takes it."""
    if (labels is None) == (prompts is None):
        raise OptionError("name what to draw: labels, such as 0-999, or a prompts file, and not both")
    if prompts is None:
        if layout.needs_prompts:
            raise OptionError(f"the layout {layout.name} is about texts, not classes: it takes {layout.prompts}")
        return tuple(Subject(label=label) for label in labels or ())
    path = Path(prompts)
    if not path.exists():
        raise OptionError(f"there are no prompts {path}: {layout.name} takes {layout.prompts}")
    found = layout.read_prompts(path)
    if not found:
        raise OptionError(f"{path} holds no prompts: {layout.name} takes {layout.prompts}")
    for i, subject in enumerate(found):
        if not (subject.text or "").strip():
            raise OptionError(f"{path}: prompt {i}, counted from 0, is empty")
    return tuple(found)


def _texts(path: Path) -> list[str]:
    """The prompts of a plain list."""
    layout = LAYOUTS["folder"]
    if path.suffix == ".json":
        records = _json(_text(path), str(path))
        if not isinstance(records, list):
            raise OptionError(f"{path} must hold a list of prompts")
    else:
        lines = _lines(path, (".txt", ".jsonl"), layout)
        records = lines if path.suffix == ".txt" else [_json(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
    for i, record in enumerate(records):
        if not isinstance(record, str):
            _require(record, ("prompt",), f"{path}, entry {i}", layout)
    return [record if isinstance(record, str) else record["prompt"] for record in records]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the prompts in {path}: {error}") from error


def _lines(path: Path, suffixes: Sequence[str], layout: Layout) -> list[str]:
    if path.suffix not in suffixes:
        raise OptionError(f"cannot read prompts from {path}: {layout.name} takes {layout.prompts}")
    # not splitlines: JSON may hold other line separators within a text
    lines = _text(path).rstrip().replace("\r\n", "\n").split("\n")
    return [] if lines == [""] else lines


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{where} is not JSON: {error}") from error


def _require(record: Any, keys: Sequence[str], where: str, layout: Layout) -> None:
    """Raises OptionError unless the record holds text under these keys."""
    if not isinstance(record, dict) or any(not isinstance(record.get(key), str) for key in keys):
        names = " and ".join(repr(key) for key in keys)
        raise OptionError(f"{where}: expected an object with the texts {names}, got {str(record)[:80]!r}; {layout.name} takes {layout.prompts}")
