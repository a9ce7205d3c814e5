"""Scenes: coloured shapes and a sign with three digits on a cluttered background, the same picture for the same split, seed and index.

A scene is a grid of 12 × 12 cells of 16 pixels. Each thing lies inside one cell, in one of several sizes and places, and so does each digit:
with patches of 16 pixels, one patch holds one thing, and a model that loses that patch cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from accel.errors import OptionError

GRID, PATCH = 12, 16            # cells per side; pixels per side of a cell
SIZE = GRID * PATCH             # pixels per side
SPLITS = {"train": 0, "validation": 1, "test": 2}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (235, 210, 50), "pink": (240, 120, 200), "cyan": (60, 210, 220),
}  # fmt: skip
N_BACKGROUNDS = 128             # per split; rolled and mirrored for every scene
# 5 × 7 dots each, rows from the top
_DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110", "01110 10001 00001 00110 01000 10000 11111",
    "01110 10001 00001 00110 00001 10001 01110", "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000", "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape: its cell is `row * GRID + column`."""

    shape: str
    color: str
    cell: int

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID


@dataclass(frozen=True, eq=False)
class Scene:
    """digits: what the sign says, in the cells from `sign_cell` to the right. rng: where the layout left it; the picture goes on from there."""

    things: tuple[Thing, ...]
    digits: tuple[int, int, int]
    sign_cell: int
    split: str
    rng: np.random.Generator = field(repr=False)

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """(SIZE, SIZE, 3), drawn when it is first asked for: most questions need the layout alone."""
        return _draw(self.rng, self.split, self.things, self.digits, self.sign_cell)

    @property
    def sign_cells(self) -> tuple[int, int, int]:
        return (self.sign_cell, self.sign_cell + 1, self.sign_cell + 2)

    @property
    def content_cells(self) -> tuple[int, ...]:
        """Cells with something in them, in reading order."""
        return tuple(sorted([*(t.cell for t in self.things), *self.sign_cells]))


def scene(split: str, index: int, *, seed: int = 0) -> Scene:
    """Scene number `index` of a split. Splits share no random numbers and no background.

    Three or four colours, of which one stands once, one twice and one three times (a fourth once); of the shapes, at least two stand once.
    """
    if split not in SPLITS:
        raise OptionError(f"a split of the scenes is one of {', '.join(SPLITS)}, got {split!r}")
    rng = np.random.default_rng([SPLITS[split], seed, index])
    colors = _colors(rng)
    shapes = _shapes(rng, len(colors))
    sign_cell, cells = _places(rng, len(colors))
    things = tuple(Thing(SHAPES[s], list(COLORS)[c], int(cell)) for s, c, cell in zip(shapes, colors, cells, strict=True))
    a, b, c = (int(d) for d in rng.integers(0, 10, 3))
    return Scene(things, (a, b, c), sign_cell, split, rng)


def _colors(rng: np.random.Generator) -> list[int]:
    """The colour of each thing."""
    palette = rng.permutation(len(COLORS))[:4]
    times = [1, 2, 3, int(rng.integers(0, 2))]
    return [int(color) for color, n in zip(palette, times, strict=True) for _ in range(n)]


def _shapes(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """The shape of each thing, at least two of them standing once."""
    while True:
        shapes = rng.integers(0, len(SHAPES), n)
        if (np.bincount(shapes, minlength=len(SHAPES)) == 1).sum() >= 2:
            return shapes


def _places(rng: np.random.Generator, n: int) -> tuple[int, list[int]]:
    """The first cell of the sign and n cells for things; no two of them touch, not even at a corner."""
    is_free = np.ones((GRID, GRID), bool)
    row, column = int(rng.integers(0, GRID)), int(rng.integers(0, GRID - 2))
    _block(is_free, row, column, width=3)
    cells: list[int] = []
    for cell in rng.permutation(GRID * GRID):
        if len(cells) == n:
            break
        if is_free[cell // GRID, cell % GRID]:
            _block(is_free, int(cell) // GRID, int(cell) % GRID, width=1)
            cells.append(int(cell))
    return row * GRID + column, cells


def _block(is_free: NDArray[np.bool_], row: int, column: int, *, width: int) -> None:
    is_free[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + width + 1] = False


def _draw(rng: np.random.Generator, split: str, things: tuple[Thing, ...], digits: tuple[int, ...], sign_cell: int) -> NDArray[np.uint8]:
    picture = backgrounds(split)[rng.integers(0, N_BACKGROUNDS)]
    picture = np.roll(picture, tuple(rng.integers(0, SIZE, 2)), (0, 1))
    if rng.integers(0, 2):
        picture = picture[:, ::-1]
    picture = picture.astype(np.float32)
    for thing in things:
        masks = shape_masks(thing.shape)
        color = np.asarray(COLORS[thing.color], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
        _paint(picture, thing.cell, masks[rng.integers(0, len(masks))], color)
    for cell, digit in enumerate(digits, start=sign_cell):
        _paint(picture, cell, np.ones((PATCH, PATCH), np.float32), np.full(3, 35, np.float32))
        masks = digit_masks(digit)
        _paint(picture, cell, masks[rng.integers(0, len(masks))], np.full(3, 240, np.float32))
    drawn: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return drawn


def _paint(picture: NDArray[np.float32], cell: int, mask: NDArray[np.float32], color: NDArray[np.float32]) -> None:
    top, left = cell // GRID * PATCH, cell % GRID * PATCH
    part = picture[top : top + PATCH, left : left + PATCH]
    part += mask[..., None] * (color - part)


@cache
def shape_masks(shape: str) -> list[NDArray[np.float32]]:
    """Coverage masks (PATCH, PATCH) in 0–1 of a shape in several sizes and places, all inside the cell."""
    return [
        _coverage(shape, PATCH / 2 + dy, PATCH / 2 + dx, radius)
        for radius in (5.5, 6.0, 6.5)
        for dy in (-1.0, 0.0, 1.0)
        for dx in (-1.0, 0.0, 1.0)
    ]


def _coverage(shape: str, cy: float, cx: float, radius: float) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers, from 4 × 4 points a pixel."""
    at = (np.arange(PATCH * 4) + 0.5) / 4
    y, x = at[:, None] - cy, at[None, :] - cx
    far = np.hypot(y, x)
    inside = {
        "circle": far <= radius,
        "square": np.maximum(abs(y), abs(x)) <= radius * 0.88,
        "triangle": (y <= radius * 0.85) & (abs(x) <= (y + radius) * 0.6),
        "cross": (np.minimum(abs(y), abs(x)) <= radius * 0.32) & (np.maximum(abs(y), abs(x)) <= radius),
        "ring": (far <= radius) & (far >= radius * 0.55),
    }[shape]
    covered: NDArray[np.float32] = inside.reshape(PATCH, 4, PATCH, 4).mean((1, 3)).astype(np.float32)
    return covered


@cache
def digit_masks(digit: int) -> list[NDArray[np.float32]]:
    """Coverage masks (PATCH, PATCH) of a digit of 10 × 14 pixels in several places."""
    dots = np.array([[float(d) for d in row] for row in _DIGITS[digit].split()], np.float32)
    glyph = np.kron(dots, np.ones((2, 2), np.float32))
    found = []
    for top in (0, 1, 2):
        for left in (2, 3, 4):
            mask = np.zeros((PATCH, PATCH), np.float32)
            mask[top : top + 14, left : left + 10] = glyph
            found.append(mask)
    return found


@cache
def backgrounds(split: str) -> NDArray[np.uint8]:
    """(N_BACKGROUNDS, SIZE, SIZE, 3): tinted grey with soft spots of colour, muted lines and dots, and pixel noise."""
    rng = np.random.default_rng([SPLITS[split], 1_000_003])
    return np.stack([_background(rng) for _ in range(N_BACKGROUNDS)])


def _background(rng: np.random.Generator) -> NDArray[np.uint8]:
    # plain numpy: the pictures must not change with the version of a drawing library
    base = rng.uniform(90, 170) + rng.uniform(-15, 15, 3)
    picture = _soft(base + rng.uniform(-30, 30, (7, 7, 3)))
    for _ in range(int(rng.integers(20, 36))):
        y, x = rng.uniform(0, SIZE, 2)
        is_line = bool(rng.integers(0, 2))
        dy, dx = rng.uniform(-18, 18, 2) if is_line else (0.0, 0.0)
        _stroke(picture, (y, x, dy, dx), float(rng.uniform(0.6, 1.6) if is_line else rng.uniform(1, 4)), base + rng.uniform(-60, 60, 3))
    drawn: NDArray[np.uint8] = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
    return drawn


def _soft(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """(SIZE, SIZE, 3): a small field of colours, stretched with smooth steps between its points."""
    at = np.linspace(0, len(field) - 1, SIZE)
    far = np.clip(1 - abs(at[:, None] - np.arange(len(field))), 0, 1)
    weights = far * far * (3 - 2 * far)
    stretched: NDArray[np.float64] = np.einsum("yi,xj,ijc->yxc", weights, weights, field, optimize=True)
    return stretched


def _stroke(picture: NDArray[np.float64], segment: tuple[float, float, float, float], radius: float, color: NDArray[np.float64]) -> None:
    """Paints everything within `radius` of the segment from (y, x) to (y + dy, x + dx); a segment without length is a dot."""
    y, x, dy, dx = segment
    (top, bottom), (left, right) = (
        (max(int(min(a, a + d) - radius), 0), min(int(max(a, a + d) + radius) + 2, SIZE)) for a, d in ((y, dy), (x, dx))
    )
    rows, columns = np.arange(top, bottom)[:, None] - y, np.arange(left, right)[None] - x
    along = np.clip((rows * dy + columns * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)
    picture[top:bottom, left:right][np.hypot(rows - along * dy, columns - along * dx) <= radius] = color
