"""Pictures with the fate of their patches drawn over them: kept, merged into another token, or dropped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.stats import PruningEvent

NO_PATCH, DROPPED, MERGED, KEPT, JOINED = -1, 0, 1, 2, 3
LEGEND = "Bright with a white line: kept as it is. Bright with an orange line: kept, with others merged into it. Orange: merged. Dark: dropped."
# small pictures are drawn larger, by a whole factor, so that a patch can be seen
_SMALLEST_SIDE, _LARGEST_SIDE = 360, 1024
_MERGED_RGB, _LINE_RGB = np.array((230.0, 140.0, 20.0)), np.array((255.0, 255.0, 255.0))
_DARK = 0.22
_GAP = 8


@dataclass(frozen=True)
class FateMap:
    """The patches of one map of a picture. grid: (rows, columns) int8 in its own extent, of NO_PATCH, DROPPED, MERGED, KEPT and JOINED (kept, with
    others merged into it).
    """

    number: int
    grid: NDArray[np.int8]

    def count(self, *fates: int) -> int:
        return int(np.isin(self.grid, fates).sum())


def fate_maps(events: Sequence[PruningEvent], *, sequence: int = 0, picture: int = 0) -> list[FateMap]:
    """What became of the patches of one picture after these stages of one prompt, map by map.

    events: in order, of the same prompt, whatever methods they belong to. A patch that any stage merged into another, and that is gone, is merged
    though the other be dropped later. Row-end and other tokens without a patch are not drawn.
    """
    last = events[-1]
    is_here = (last.unit[sequence] >= 0) & ~last.is_structural[sequence].bool()
    of_picture = [int(unit) for unit, u in enumerate(last.units) if u.sequence == sequence and u.picture == picture]
    chosen = [i for i in is_here.nonzero().flatten().tolist() if int(last.unit[sequence, i]) in of_picture]
    found: dict[int, list[tuple[int, int, int]]] = {}
    merged = {source: target for event in events for source, target in enumerate(event.anchor[sequence].tolist()) if target not in (-1, source)}
    anchors = set(merged.values())
    for i in chosen:
        is_kept = bool(last.is_kept[sequence, i])
        fate = (JOINED if i in anchors else KEPT) if is_kept else MERGED if i in merged else DROPPED
        number, row, column = last.place[sequence, i].tolist()
        found.setdefault(number, []).append((row, column, fate))
    return [FateMap(number, _grid(cells)) for number, cells in sorted(found.items())]


def overlay(picture: Any, maps: Sequence[FateMap]) -> Any:
    """A Pillow picture: `picture` with each map drawn over the whole of it, maps side by side."""
    from PIL import Image

    base = _sized(picture.convert("RGB"))
    panels = [_painted(np.asarray(base, np.float32), m.grid) for m in maps] or [np.asarray(base)]
    gap = np.full((base.height, _GAP, 3), 128, np.uint8)
    joined = [part for panel in panels for part in (gap, panel)][1:]
    return Image.fromarray(np.concatenate(joined, axis=1))


def plain(picture: Any) -> Any:
    """The picture alone, in the size of its overlays."""
    return _sized(picture.convert("RGB"))


def png_bytes(picture: Any) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_address(png: bytes) -> str:
    """A PNG file as an address that a page carries in itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _grid(cells: Sequence[tuple[int, int, int]]) -> NDArray[np.int8]:
    rows, columns, fates = (np.array(part) for part in zip(*cells, strict=True))
    rows, columns = rows - rows.min(), columns - columns.min()
    grid = np.full((rows.max() + 1, columns.max() + 1), NO_PATCH, np.int8)
    grid[rows, columns] = fates
    return grid


def _sized(picture: Any) -> Any:
    from PIL import Image

    longest = max(picture.size)
    if longest > _LARGEST_SIDE:
        scale = _LARGEST_SIDE / longest
        return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)
    factor = -(-_SMALLEST_SIDE // longest)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _painted(pixels: NDArray[np.float32], grid: NDArray[np.int8]) -> NDArray[np.uint8]:
    """(height, width, 3): the picture under one map."""
    height, width = pixels.shape[:2]
    down = np.arange(height) * grid.shape[0] // height
    across = np.arange(width) * grid.shape[1] // width
    fate = grid[down[:, None], across[None]]
    drawn = pixels.copy()
    drawn[fate == DROPPED] *= _DARK
    is_merged = fate == MERGED
    # light and dark still show through the tint
    light = pixels[is_merged].mean(-1, keepdims=True) / 255
    drawn[is_merged] = _MERGED_RGB * (0.3 + 0.6 * light)
    for kind, line in ((KEPT, _LINE_RGB), (JOINED, _MERGED_RGB)):
        drawn[_outline(fate == kind)] = line
    return np.clip(drawn, 0, 255).astype(np.uint8)


def _outline(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a region that touch its outside or the edge of the picture."""
    padded = np.pad(inside, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~surrounded
