"""Figures for the HTML report: inline SVG that takes its text colour from the page, and tile maps as small PNG images. Grids: `plot_grids`."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, legible on white and on near-black
COLOURS = ("#1f83d6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
BASELINE_COLOURS = ("#7d8590", "#a8b0b9")
TILE_RGB = (31, 131, 214)

# drawn with this colour, then replaced by the page's own, so that one figure fits light and dark
INK = "#010203"


_TENTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def colour_by_label(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour per label, the same in every figure of a report: grey for dense baselines, the palette for the rest, in order."""
    baselines = list(dict.fromkeys(r["label"] for r in rows if r.get("is_baseline")))
    others = list(dict.fromkeys(r["label"] for r in rows if not r.get("is_baseline")))
    return {
        **{label: BASELINE_COLOURS[i % len(BASELINE_COLOURS)] for i, label in enumerate(baselines)},
        **{label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)},
    }


def time_plot(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, y_label: str, unit: float) -> str:
    """SVG of time against length, one line per label with its p20–p80 bar; both axes logarithmic. `unit`: milliseconds per y unit."""
    shown = [label for label in colours if any(r["label"] == label for r in rows)]
    # long names beside a plot leave it no room
    is_beside = max(map(len, shown)) <= 30
    n_columns = 1 if is_beside else _legend_columns(shown, 8.6)
    with canvas(width=8.6, height=3.9 + (0 if is_beside else 0.2 * -(-len(shown) // n_columns))) as (figure, axes):
        for label, colour in colours.items():
            mine = sorted((r for r in rows if r["label"] == label), key=lambda r: r["tokens"])
            if not mine:
                continue
            x, y = [r["tokens"] for r in mine], [r["ms"]["median"] / unit for r in mine]
            below = [m - r["ms"]["p20"] / unit for m, r in zip(y, mine, strict=True)]
            above = [r["ms"]["p80"] / unit - m for m, r in zip(y, mine, strict=True)]
            is_baseline = mine[0].get("is_baseline", False)
            look: dict[str, Any] = {"marker": "s", "linestyle": "--"} if is_baseline else {"marker": "o", "linestyle": "-"}
            look |= {"linewidth": 1.8, "markersize": 5, "capsize": 2, "elinewidth": 1}
            axes.errorbar(x, y, yerr=[below, above], label=label, color=colour, **look)
        lengths = sorted({r["tokens"] for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [short_length(n) for n in lengths])
        axes.minorticks_off()
        _plain_ticks(axes)
        axes.set_xlabel("tokens")
        axes.set_ylabel(y_label)
        figure.legend(loc="outside right center" if is_beside else "outside lower left", frameon=False, ncols=n_columns)
        return svg_text(figure)


def accuracy_density_plot(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, title: str, y_label: str) -> str:
    """SVG of score against density, one point per method with its standard error. rows: label, density, score, stderr."""
    n_columns = _legend_columns([row["label"] for row in rows], 4.3)
    with canvas(width=4.3, height=3.2 + 0.2 * -(-len(rows) // n_columns)) as (figure, axes):
        for row in rows:
            colour = colours.get(row["label"], BASELINE_COLOURS[0])
            axes.errorbar([row["density"]], [row["score"]], yerr=[row["stderr"] or 0.0], label=_short_floats(row["label"]), color=colour,
                          linestyle="none", marker="s" if row["is_baseline"] else "o", markersize=7, capsize=3, elinewidth=1)  # fmt: skip
        axes.set_xlim(0, 1.06)
        if all(0.0 <= row["score"] <= 1.0 for row in rows):
            axes.set_ylim(-0.05, 1.08)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("density (share of causal tiles)")
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower left", frameon=False, ncols=n_columns, fontsize=8, handletextpad=0.2, columnspacing=1.2)
        return svg_text(figure)


def accuracy_keep_plot(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """`keep_plot` of the share of right answers against the share of visual tokens."""
    return keep_plot(rows, colours, x_label="visual tokens kept, as a mean over the layers", y_label="share of right answers", y_limits=(-0.03, 1.05))


def keep_plot(
    rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, x_label: str, y_label: str, y_limits: tuple[float, float | None] = (0, None),
    width: float = 8.6, is_measured: bool = False,
) -> str:  # fmt: skip
    """SVG of a figure against a share (logarithmic), a line per series with standard errors.

    rows: series, share, score, stderr, is_baseline; a baseline is drawn across the whole width. is_measured: shares are what was found, not what was
    asked for: each point stands at its own, between ordinary ticks.
    """
    # long names stand below each other
    n_columns = 1 if max(map(len, colours)) > 40 else max(1, int(width / 2.4))
    with canvas(width=width, height=3.8 + 0.18 * -(-len(colours) // n_columns)) as (figure, axes):
        for number, (series, colour) in enumerate(colours.items()):
            mine = sorted((r for r in rows if r["series"] == series), key=lambda r: r["share"])
            if mine and mine[0]["is_baseline"]:
                value, error = mine[0]["score"], mine[0]["stderr"] or 0.0
                axes.axhline(value, label=_short_floats(series), color=colour, linestyle="--", linewidth=1.4)
                axes.axhspan(value - error, value + error, color=colour, alpha=0.15, linewidth=0)
            elif mine:
                errors = [r["stderr"] or 0.0 for r in mine]
                # a little apart, so that series of the same score do not hide each other
                apart = 1.0 if is_measured else 1.015 ** (number - len(colours) / 2)
                places = [r["share"] * apart for r in mine]
                axes.errorbar(places, [r["score"] for r in mine], yerr=errors, label=_short_floats(series), color=colour, marker="o",
                              markersize=5, linewidth=1.8, capsize=3, elinewidth=1)  # fmt: skip
        found = sorted({r["share"] for r in rows if not r["is_baseline"]})
        shares = _apart([share for share in _TENTHS if found[0] / 1.25 <= share <= found[-1] * 1.25] if is_measured else found)
        axes.set_xscale("log")
        # a single budget gives the axis no extent
        axes.set_xlim(found[0] / 1.25, found[-1] * 1.25)
        axes.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
        axes.minorticks_off()
        axes.set_ylim(*y_limits)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower left", frameon=False, ncols=n_columns, fontsize=8)
        return svg_text(figure)


def entries_plot(lines: Sequence[Mapping[str, Any]], *, width: float = 8.6) -> str:
    """SVG of cache entries per head against the scale, a line each. lines: label, entries (one number per scale), is_baseline."""
    colours = colour_by_label(lines)
    with canvas(width=width, height=3.8 + 0.18 * len(lines)) as (figure, axes):
        for line in lines:
            look: dict[str, Any] = {"marker": "s", "linestyle": "--"} if line["is_baseline"] else {"marker": "o", "linestyle": "-"}
            scales = range(1, len(line["entries"]) + 1)
            axes.plot(scales, line["entries"], label=line["label"], color=colours[line["label"]], markersize=5, linewidth=1.8, **look)
        axes.set_xticks(range(1, max(len(line["entries"]) for line in lines) + 1))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("scale, from coarse to fine")
        axes.set_ylabel("entries per head")
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
        return svg_text(figure)


def heads_plot(numbers: Mapping[str, Any]) -> str:
    """SVG of a number per head against its layer, heads of one kind in one colour. numbers: the fields of a `HeadNumbers`."""
    values, kinds = numbers["values"], numbers["kinds"] or [["heads"] * len(row) for row in numbers["values"]]
    names = sorted({kind for row in kinds for kind in row})
    with canvas(width=5.2, height=3.6) as (figure, axes):
        for name, colour in zip(names, COLOURS, strict=False):
            # heads of one layer a little apart, in their order
            points = [
                (layer + 0.6 * (head + 0.5) / len(row) - 0.3, value)
                for layer, row in enumerate(values) for head, value in enumerate(row) if kinds[layer][head] == name
            ]  # fmt: skip
            axes.plot(*zip(*points, strict=True), label=f"{name} ({len(points)})", color=colour, marker="o", markersize=4, linestyle="none")
        if numbers["is_log"]:
            axes.set_yscale("log")
            _plain_ticks(axes)
        else:
            axes.set_ylim(bottom=0)
        _layer_axis(axes, len(values))
        axes.set_xlabel("layer, its heads side by side")
        axes.set_ylabel(numbers["title"])
        figure.legend(loc="outside lower left", frameon=False, ncols=len(names), fontsize=8)
        return svg_text(figure)


def exit_plot(counts: Mapping[str, Sequence[int]], colours: Mapping[str, str]) -> str:
    """SVG of the share of questions by the last layer with visual tokens, tasks on top of each other. counts: by task, a number per layer."""
    n_layers = len(next(iter(counts.values())))
    total = sum(map(sum, counts.values()))
    bottom = [0.0] * n_layers
    with canvas(width=4.3, height=3.4) as (figure, axes):
        for task, own in counts.items():
            heights = [n / total for n in own]
            axes.bar(range(n_layers), heights, bottom=bottom, width=0.8, label=task, color=colours[task])
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        _layer_axis(axes, n_layers)
        axes.set_xlabel("last layer with visual tokens")
        axes.set_ylabel("share of the questions")
        figure.legend(loc="outside lower left", frameon=False, ncols=4, fontsize=8, handletextpad=0.4, columnspacing=1.2, handlelength=1.0)
        return svg_text(figure)


def pareto_plot(
    rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, x_label: str, y_label: str, width: float = 5.2
) -> str:  # fmt: skip
    """SVG of score against cost, points of one label in one colour with their standard errors, those on the front joined by steps.

    rows: label, score, stderr, cost, is_baseline, is_front.
    """
    shown = [label for label in colours if any(row["label"] == label for row in rows)]
    n_columns = _legend_columns(shown, width)
    with canvas(width=width, height=3.4 + 0.2 * -(-len(shown) // n_columns)) as (figure, axes):
        front = sorted((row["cost"], row["score"]) for row in rows if row["is_front"])
        axes.step(*zip(*front, strict=True), where="post", color=INK, alpha=0.45, linewidth=1.2)
        named: set[str] = set()
        # the first labels on top
        for row in sorted(rows, key=lambda row: -shown.index(row["label"])):
            look: dict[str, Any] = {"markersize": 8} if row["is_front"] else {"markersize": 5, "markerfacecolor": "none"}
            axes.errorbar([row["cost"]], [row["score"]], yerr=[row["stderr"] or 0.0], color=colours[row["label"]], linestyle="none", capsize=3,
                          label=None if row["label"] in named else _short_floats(row["label"]), elinewidth=1,
                          marker="s" if row["is_baseline"] else "o", **look)  # fmt: skip
            named.add(row["label"])
        axes.set_xlim(left=0, right=1.08 * max(row["cost"] for row in rows))
        if all(0.0 <= row["score"] <= 1.0 for row in rows):
            axes.set_ylim(-0.05, 1.08)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside lower left", frameon=False, ncols=n_columns, fontsize=8, handletextpad=0.2,
                      columnspacing=1.2)  # fmt: skip
        return svg_text(figure)


def attention_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    """SVG of shares of attention by layer. layers: layer, and the shares by name."""
    lines = (("text_to_visual", "text → picture"), ("text_to_text", "text → text"), ("visual_to_visual", "picture → picture"))
    with canvas(width=8.6, height=3.9) as (figure, axes):
        for (name, label), colour in zip(lines, COLOURS, strict=False):
            x, y = [row["layer"] for row in layers], [row[name] for row in layers]
            axes.plot(x, y, label=label, color=colour, marker="o", markersize=4, linewidth=1.8)
        _layer_axis(axes, max(row["layer"] for row in layers) + 1)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("decoder layer (in the paper's reading: fusion → intra-modality → multimodal)")
        axes.set_ylabel("share of attention")
        figure.legend(loc="outside right center", frameon=False)
        return svg_text(figure)


def tile_image(rows: Sequence[str]) -> str:
    """A block map as a PNG data address: read tiles in colour, skipped causal tiles pale, the future transparent."""
    size = max(len(row) for row in rows)
    paint = {"1": (*TILE_RGB, 255), "0": (128, 140, 155, 46)}
    pixels = [[*(paint[tile] for tile in row), *[(0, 0, 0, 0)] * (size - len(row))] for row in rows]
    return _png(pixels)


def short_length(tokens: int) -> str:
    """8192 → "8K", 1000 → "1000"."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _png(pixels: Sequence[Sequence[tuple[int, ...]]]) -> str:
    import numpy as np
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.array(pixels, dtype=np.uint8), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def canvas(*, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure without a window system and without touching the caller's matplotlib settings."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    settings = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.grid": True, "grid.color": INK,
        "grid.alpha": 0.13, "grid.linewidth": 0.6,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = NewFigure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def as_grid(axes: Axes) -> None:
    """Axes of a grid of cells: no lines between the cells, and none around it."""
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Columns of a legend under a plot of that width (inches) in which these labels do not lie on each other."""
    # about 14 letters of that size to the inch, and room for the marker
    return max(1, min(len(labels), int(width / (max(map(len, labels)) / 14 + 0.4))))


def _apart(ascending: Sequence[float]) -> list[float]:
    """Numbers on a logarithmic axis without those whose labels would lie on their neighbour's."""
    found: list[float] = []
    for value in ascending:
        if not found or value >= 1.2 * found[-1]:
            found.append(value)
    return found


def _layer_axis(axes: Axes, n_layers: int) -> None:
    """All layers on the x axis, also those without anything; numbers are whole."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, n_layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))


def _short_floats(text: str) -> str:
    """A label whose long numbers are cut to three digits, in lines that fit under a plot."""
    return textwrap.fill(re.sub(r"\d+\.\d{4,}(?:e[-+]?\d+)?", lambda found: f"{float(found[0]):.3g}", text), 110)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg_text(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    # inside an HTML page the prolog and the namespaces mean nothing, and they are the only addresses in the file
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    # the page sets the size; the view box keeps the proportions
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return text.replace(INK, "currentColor")
