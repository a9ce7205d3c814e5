"""The folder of one export: its settings, its pictures as they finish, and what is made of them in the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accel.errors import AccelError
from accel.evals.drawing.exports import IMAGES, Layout, Picture, Plan

# as Infinity's authors save theirs; JPEG where a script asks for that name
JPEG_QUALITY = 95


class Artist(Protocol):
    """Draws: one Pillow picture (RGB) per `Picture`, each from its own seed."""

    def draw(self, pictures: Sequence[Picture]) -> list[Any]: ...


class ExportFolder:
    """An export that is begun, goes on or is complete. Nothing is written before `begin`.

    settings: what the pictures depend on, plain values. Raises AccelError where the folder holds something else, or pictures of other settings.
    """

    def __init__(self, root: str | Path, layout: Layout, plan: Plan, settings: Mapping[str, Any]) -> None:
        self.root, self.layout, self.plan = Path(root), layout, plan
        # through JSON: YAML files hold no tuples
        self.settings = {"command": "draw", **json.loads(json.dumps(settings))}
        self._is_begun_again = False
        self._check()

    def _check(self) -> None:
        import yaml

        if not self.root.exists():
            return
        file = self.root / "config.yaml"
        if not self.root.is_dir() or (not file.exists() and any(self.root.iterdir())):
            raise AccelError(f"{self.root} exists already and is no folder of drawn pictures: choose another with --out")
        if not file.exists():
            return
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise AccelError(f"cannot read the settings in {file}: {error}") from error
        if not isinstance(before, dict) or before.get("command") != "draw":
            raise AccelError(f"{self.root} holds something else than drawn pictures: choose another folder with --out")
        changed = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        # a run that failed before its first picture may be mended
        self._is_begun_again = bool(changed)
        if changed and (self.has_archive or any(self.root.glob(f"{IMAGES}/**/*.png")) or any(self.root.glob(f"{IMAGES}/**/*.jpg"))):
            values = "; ".join(f"{key} was {_short(before.get(key))} and is {_short(self.settings.get(key))} now" for key in changed)
            raise AccelError(f"{self.root} holds pictures of other settings: {values}. Use the same settings, or another --out")

    @property
    def has_archive(self) -> bool:
        """Whether all pictures are in the layout's own file already."""
        return self.layout.archive is not None and (self.root / self.layout.archive).exists()

    def path(self, picture: Picture) -> Path:
        return self.root / IMAGES / self.layout.file(picture)

    def n_done(self) -> int:
        """How many pictures are there."""
        return len(self.plan) if self.has_archive else sum(self.path(picture).exists() for picture in self.plan)

    def begin(self) -> None:
        """Writes the settings, the list of the pictures and what the layout wants beside them."""
        import yaml

        if self._is_begun_again:
            shutil.rmtree(self.root / IMAGES, ignore_errors=True)
        (self.root / IMAGES).mkdir(parents=True, exist_ok=True)
        _replace(self.root / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True))
        self._write_beside()

    def _write_beside(self) -> None:
        """Writes what lies beside the pictures, whatever was there: a kill or an editor may have left half of it."""
        rows = []
        for picture in self.plan:
            shown = {"prompt": picture.subject.text} if picture.subject.label is None else {"label": picture.subject.label}
            row = {"number": picture.number, "file": f"{IMAGES}/{self.layout.file(picture)}", "seed": picture.seed, **shown}
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        _replace(self.root / "pictures.jsonl", "".join(rows))
        self.layout.begin(self.root, self.plan)

    def save(self, picture: Picture, image: Any) -> None:
        """Writes one picture; a kill leaves it whole or not there at all."""
        target = self.path(picture)
        target.parent.mkdir(parents=True, exist_ok=True)
        # outside images/, whose files some scripts count
        part = self.root / f".part{target.suffix}"
        image.save(part, **({"quality": JPEG_QUALITY} if target.suffix == ".jpg" else {}))
        part.replace(target)

    def draw_missing(self, artist: Artist, *, batch: int, on_saved: Callable[[], object] = lambda: None) -> None:
        """Draws what is not there. A batch always holds the same pictures, because they depend on it by rounding, and with some methods by more."""
        for start in range(0, len(self.plan), batch):
            block = [self.plan.picture(number) for number in range(start, min(start + batch, len(self.plan)))]
            missing = {picture.number for picture in block if not self.path(picture).exists()}
            if not missing:
                continue
            for picture, image in zip(block, artist.draw(block), strict=True):
                if picture.number in missing:
                    self.save(picture, image)
                    on_saved()

    def finish(self, *, archive_only: bool = False) -> None:
        """Makes what the layout makes of all pictures, and mends what lies beside them; with `archive_only` the single pictures go then."""
        self._write_beside()
        if not self.has_archive:
            self.layout.finish(self.root, self.plan)
        if archive_only and self.has_archive:
            for picture in self.plan:
                self.path(picture).unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _replace(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
