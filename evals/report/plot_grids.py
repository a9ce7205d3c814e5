"""Figures for the HTML report whose cells are coloured: right answers by length and depth, densities by layer and head. Inline SVG, as in `plots`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.evals.report.plots import INK, TILE_RGB, as_grid, canvas, short_length, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# side by side in one figure
MOST_ACROSS = 4
# the palest colour: a zero is told apart from a cell that holds nothing
_PALEST = 0.06


def depth_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG of the shares of right answers by length (across) and depth (down), a grid per label. rows: of `depths.depth_rows`, of one task."""
    # the page scales a figure to its own width: the same width for all, so that letters are of one size
    width, n_depths, n_lengths = 8.6, len(rows[0]["depths"]), max(len(row["lengths"]) for row in rows)
    across = max(1, min(MOST_ACROSS, int((width - 1) / (0.55 * n_lengths))))
    down = -(-len(rows) // across)
    with canvas(width=width, height=down * (1.1 + 0.34 * n_depths)) as (figure, axes):
        axes.remove()
        grid = figure.subplots(down, across, squeeze=False)
        for place, panel in enumerate(grid.flat):
            if place >= len(rows):
                panel.remove()
                continue
            _depth_panel(panel, rows[place], is_left=place % across == 0)
        return svg_text(figure)


def _depth_panel(panel: Axes, row: Mapping[str, Any], *, is_left: bool) -> None:
    panel.patch.set_alpha(0)
    _paint(panel, row["share"])
    for y, shares in enumerate(row["share"]):
        for x, share in enumerate(shares):
            text = "–" if share is None else f"{share:.2f}".removeprefix("0") if 0 < share < 1 else f"{share:.0f}"
            panel.text(x, y, text, ha="center", va="center", fontsize=7.5, color=INK)
    panel.set_xticks(range(len(row["lengths"])), [short_length(n) for n in row["lengths"]])
    panel.set_yticks(range(len(row["depths"])), row["depths"] if is_left else [""] * len(row["depths"]))
    panel.set_title(textwrap.fill(row["label"], 28), fontsize=8, color=INK, loc="left")
    panel.set_xlabel("tokens")
    if is_left:
        panel.set_ylabel("depth of the answer")


def head_density_plot(density: Mapping[str, Sequence[float]], n_layers: int) -> str:
    """SVG of the density of every head: layers across, heads down, stronger where more was read, nothing where the layer ran dense."""
    n_heads = max(len(heads) for heads in density.values())
    values = [[density[str(layer)][head] if str(layer) in density else None for layer in range(n_layers)] for head in range(n_heads)]
    with canvas(width=8.6, height=1.3 + 3.0 * min(1.0, n_heads / 16)) as (figure, axes):
        _paint(axes, values)
        axes.set_aspect("auto")
        for ticks, n in ((axes.set_xticks, n_layers), (axes.set_yticks, n_heads)):
            ticks(range(0, n, max(1, -(-n // 16))))
        axes.set_xlabel("layer")
        axes.set_ylabel("head")
        _scale(axes)
        return svg_text(figure)


def _paint(axes: Axes, values: Sequence[Sequence[float | None]]) -> None:
    """Cells as stronger or paler shades of one colour, which show on light and dark pages."""
    import numpy as np

    colour = [part / 255 for part in TILE_RGB]
    pixels = np.array([[[*colour, 0.0 if v is None else _PALEST + (1 - _PALEST) * v] for v in row] for row in values])
    axes.imshow(pixels, interpolation="none", aspect="auto")
    as_grid(axes)


def _scale(axes: Axes) -> None:
    """What the shades mean, beside the grid. matplotlib's own colour bar paints over itself, and so loses the transparency."""
    bar = axes.inset_axes((1.015, 0.0, 0.02, 1.0))
    bar.patch.set_alpha(0)
    n_steps = 50
    _paint(bar, [[1 - i / (n_steps - 1)] for i in range(n_steps)])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.set_xticks([])
    bar.set_yticks([0, (n_steps - 1) / 2, n_steps - 1], ["1", "0.5", "0"])
    bar.set_ylabel("density", color=INK)
