"""Figures as data: what a figure shows is a value, drawn as SVG and written as CSV from the same numbers. Colour-blind safe."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a run has no display
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

from .plots import COLOURS  # noqa: E402

MARKERS, STYLES, HATCHES = "osv^DPX", ("-", "--", ":", "-."), ("", "//", "..", "xx")
FILLS = {  # a colour and a hatch for what always means the same
    "FINISHED": ("#009E73", ""), "FAILED": ("#D55E00", "//"), "TRUNCATED": ("#E69F00", ".."), "ABORTED": ("#999999", "xx"),
    "in_time": ("#009E73", ""), "early": ("#D55E00", "//"), "late": ("#E69F00", ".."), "never": ("#999999", "xx"),
}  # fmt: skip
PER_ROW = 3


@dataclasses.dataclass(frozen=True)
class Line:
    """One series: y over x, with the ends of its intervals where it has any."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes. limits: of y; None: by the data. whole: x are whole numbers that each get a tick."""

    title: str
    xlabel: str
    ylabel: str
    lines: tuple[Line, ...]
    log: bool = False
    limits: tuple[float, float] | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Bars:
    """Stacked bars: parts[name][i] is the height of that part in the bar labels[i]."""

    title: str
    ylabel: str
    labels: tuple[str, ...]
    parts: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """name: of its file. title: its heading. caption: how to read it, with n."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel | Bars, ...]


def rows(figure: Figure) -> list[dict[str, Any]]:
    """Every number a figure shows: panel, series, x, value, and low and high where it draws intervals."""
    out = []
    for panel in figure.panels:
        if isinstance(panel, Bars):
            cells = [(name, x, y) for name, values in panel.parts.items() for x, y in zip(panel.labels, values, strict=True)]
            out += [{"panel": panel.title, "series": name, "x": x, "value": y, "low": "", "high": ""} for name, x, y in cells]
            continue
        for line in panel.lines:
            for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
                ends = {"low": line.low[i], "high": line.high[i]} if line.low else {"low": "", "high": ""}
                out.append({"panel": panel.title, "series": line.label, "x": x, "value": y, **ends})
    return out


def to_csv(table: list[dict[str, Any]]) -> str:
    """A table of equal keys as CSV, header first; numbers as Python writes them, so none is rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else ["panel", "series", "x", "value", "low", "high"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def draw(figure: Figure) -> str:
    """The figure as SVG text. The same figure gives the same text."""
    across = 2 if len(figure.panels) == 4 else min(PER_ROW, len(figure.panels))
    down = math.ceil(len(figure.panels) / across)
    settings = {"svg.hashsalt": figure.name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.4}
    with plt.rc_context(settings):
        drawn, axes = plt.subplots(down, across, figsize=(4.1 * across, 3.3 * down), layout="constrained", squeeze=False)
        for axis in axes.flat[len(figure.panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes.flat, figure.panels, strict=False):
            _bars(axis, panel) if isinstance(panel, Bars) else _lines(axis, panel)
            axis.set_title(panel.title, fontsize=9.5, loc="left")
        _legends(drawn, axes.flat[: len(figure.panels)])
        text = io.StringIO()
        drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(drawn)
    return text.getvalue()


def _lines(axis: Any, panel: Panel) -> None:
    shift = 0.06 if panel.whole else 0.0  # so that intervals of several models at one length can be told apart
    for i, line in enumerate(panel.lines):
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": style, "linewidth": 1.3, "label": line.label}
        mark = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4} if panel.whole or len(line.x) < 12 else {}
        x = [value + shift * (i - (len(panel.lines) - 1) / 2) for value in line.x]
        if line.low:
            ends = [[y - low for y, low in zip(line.y, line.low, strict=True)], [h - y for y, h in zip(line.y, line.high, strict=True)]]
            axis.errorbar(x, line.y, [[max(0.0, e) for e in end] for end in ends], **look, **mark, elinewidth=0.8, capsize=1.5)
        else:
            axis.plot(x, line.y, **look, **mark)
    positive = all(y > 0 for line in panel.lines for y in line.y)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, **({"yscale": "log"} if panel.log and positive else {}))
    if panel.limits:
        axis.set_ylim(*panel.limits)
    if panel.whole:
        axis.set_xticks(sorted({x for line in panel.lines for x in line.x}))
    axis.grid(alpha=0.25)


def _bars(axis: Any, panel: Bars) -> None:
    bottom = [0.0] * len(panel.labels)
    for i, (name, values) in enumerate(panel.parts.items()):
        colour, hatch = FILLS.get(name, (COLOURS[i % len(COLOURS)], HATCHES[i % len(HATCHES)]))
        axis.bar(panel.labels, values, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axis.set_ylabel(panel.ylabel)
    axis.tick_params(axis="x", rotation=35, labelsize=7.5)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
    if max(bottom, default=0.0) <= 1.001:
        axis.set(ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1.0])


def _legends(drawn: Any, axes: Any) -> None:
    """One legend below where several panels name the same things, else one a panel."""
    named = [axis.get_legend_handles_labels() for axis in axes]
    if len(named) > 1 and len(named[0][1]) > 1 and all(labels == named[0][1] for _, labels in named):
        drawn.legend(*named[0], loc="outside lower center", ncols=min(7, len(named[0][1])), fontsize=8, frameon=False)
        return
    for axis in axes:
        axis.legend(fontsize=7, framealpha=0.8)
