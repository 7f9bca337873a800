"""Figures drawn with matplotlib, as SVG. Colour-blind safe: Okabe and Ito's colours with markers and hatches, cividis for heat."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a run has no display
import matplotlib.patheffects as effects  # noqa: E402  (the backend has to be chosen first)
import matplotlib.pyplot as plt  # noqa: E402
import matplotlib.ticker as ticker  # noqa: E402

from .figures import Bars, Figure, Groups, Heat, Line, Panel  # noqa: E402
from .plots import COLOURS  # noqa: E402

MARKERS, STYLES, HATCHES = "osv^DPX", ("-", "--", ":", "-."), ("", "//", "..", "xx", "\\\\", "++", "oo")
FILLS = {  # a colour and a hatch for what always means the same
    "FINISHED": ("#009E73", ""), "FAILED": ("#D55E00", "//"), "TRUNCATED": ("#E69F00", ".."), "ABORTED": ("#999999", "xx"),
    "in_time": ("#009E73", ""), "early": ("#D55E00", "//"), "late": ("#E69F00", ".."), "never": ("#999999", "xx"),
    "untold": ("#E6E6E6", ""),
}  # fmt: skip
PER_ROW = 3
SETTINGS = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.4}
MANY = 14  # columns of cells from which on numbers are not written on each


def draw(figure: Figure) -> str:
    """The figure as SVG text. The same figure gives the same text."""
    with plt.rc_context({**SETTINGS, "svg.hashsalt": figure.name}):
        drawn = build(figure)
        text = io.StringIO()
        drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(drawn)
    return text.getvalue()


def build(figure: Figure) -> Any:
    """The matplotlib figure, one axis a panel in their order; whoever asks for it closes it."""
    across = 2 if len(figure.panels) == 4 else min(PER_ROW, len(figure.panels))
    down = math.ceil(len(figure.panels) / across)
    broad = max(_breadth(panel) for panel in figure.panels)
    high = 4.4 if any(isinstance(panel, Heat) and panel.extent for panel in figure.panels) else 3.4
    with plt.rc_context(SETTINGS):
        drawn, axes = plt.subplots(down, across, figsize=(broad * across, high * down), layout="constrained", squeeze=False)
        for axis in axes.flat[len(figure.panels) :]:
            axis.remove()
        shown = list(axes.flat[: len(figure.panels)])
        for axis, panel in zip(shown, figure.panels, strict=True):
            _KINDS[type(panel)](axis, panel)
            axis.set_title(_wrapped(panel.title, int(11 * broad)), fontsize=9.5, loc="left")
        _legends(drawn, shown)
        drawn.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # inches
    return drawn


def number(value: float) -> str:
    """A number of parameters, tokens or steps as a tick has it: 96, 8192, 33K, 1.2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= max(size, 1e4):
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _wrapped(title: str, width: int) -> str:
    """In lines of at most so many characters; what is in brackets stays together."""
    return textwrap.fill(re.sub(r"\([^)]*\)", lambda found: found[0].replace(" ", "\u00a0"), title), width)


def _breadth(panel: Panel | Bars | Groups | Heat) -> float:
    """Inches."""
    if isinstance(panel, Groups):
        return min(12.0, max(4.1, 1.2 + 0.26 * len(panel.labels) * (len(panel.parts) + 1)))
    return 5.2 if isinstance(panel, Heat) else 4.1


def _look(line: Line, i: int) -> dict[str, Any]:
    place = i if line.place is None else line.place
    style = STYLES[place // len(COLOURS) % len(STYLES)]
    look = {"color": COLOURS[place % len(COLOURS)], "linestyle": style, "linewidth": 1.3, "label": line.label if line.named else "_"}
    look |= {"markerfacecolor": "white"} if line.hollow else {}
    return {**look, "linestyle": "--", "linewidth": 0.9} if line.dashed or line.hollow else look


def _lines(axis: Any, panel: Panel) -> None:
    places = sorted({i if line.place is None else line.place for i, line in enumerate(panel.lines) if not line.dashed})
    for i, line in enumerate(panel.lines):
        place = i if line.place is None else line.place
        mark = (panel.whole or len(line.x) < 12) and not line.dashed
        look = _look(line, i) | ({"marker": MARKERS[place % len(MARKERS)], "markersize": 4} if mark else {})
        x = _apart(line.x, places.index(place) - (len(places) - 1) / 2, panel) if panel.whole and not line.dashed else line.x
        if line.low:
            axis.errorbar(x, line.y, _ends(line.y, line.low, line.high), **look, elinewidth=0.8, capsize=1.5)
        else:
            axis.plot(x, line.y, **look)
    positive = all(y > 0 for line in panel.lines for y in line.y)
    axis.set(xlabel=panel.xlabel, ylabel=textwrap.fill(panel.ylabel, 38), **({"yscale": "log"} if panel.log and positive else {}))
    if panel.log_x:
        axis.set_xscale("log", base=2 if panel.whole else 10)
        if not panel.whole:
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}".replace("e+", "e")))
            axis.minorticks_off()
    if not panel.log_x and all(float(x).is_integer() for line in panel.lines for x in line.x):
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if len(alone := {x for line in panel.lines for x in line.x}) == 1 and not panel.whole:
            axis.set_xlim(min(alone) - 1, max(alone) + 1)
    if panel.limits:
        axis.set_ylim(*panel.limits)
        if panel.log and positive and panel.limits[1] < 100 * panel.limits[0]:  # powers of ten alone would be hardly any tick
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)))
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
    if panel.whole:
        ticks = sorted({x for line in panel.lines if not line.dashed for x in line.x})
        axis.set_xticks(ticks, [number(x) for x in ticks])
        axis.minorticks_off()
    if panel.level:
        height, meaning = panel.level
        axis.axhline(height, color="#57606a", linewidth=0.8, linestyle=":")
        axis.annotate(meaning, (0.01, height), xycoords=axis.get_yaxis_transform(), fontsize=7, color="#57606a", va="bottom")
    if panel.note:
        axis.text(0.01, 0.98, panel.note, transform=axis.transAxes, fontsize=7, va="top", color="#8a3300")
    axis.grid(alpha=0.25)


def _apart(x: Sequence[float], offset: float, panel: Panel) -> list[float]:
    """x moved a little, so that intervals of several series at one x can be told apart."""
    return [value * 2 ** (0.05 * offset) if panel.log_x else value + 0.06 * offset for value in x]


def _ends(y: Iterable[float], low: Iterable[float], high: Iterable[float]) -> list[list[float]]:
    """Lengths of the two halves of each interval; one without an end leaves every panel."""
    each = list(zip(y, low, high, strict=True))
    return [[max(0.0, y - a) for y, a, _ in each], [max(0.0, b - y) if math.isfinite(b) else 1e6 * abs(y) for y, _, b in each]]


def _bars(axis: Any, panel: Bars) -> None:
    bottom = [0.0] * len(panel.labels)
    for i, (name, values) in enumerate(panel.parts.items()):
        colour, hatch = FILLS.get(name, (COLOURS[i % len(COLOURS)], HATCHES[i % len(HATCHES)]))
        axis.bar(panel.labels, values, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axis.set_ylabel(panel.ylabel)
    _slanted(axis)
    if max(bottom, default=0.0) <= 1.001:
        axis.set(ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1.0])


def _groups(axis: Any, panel: Groups) -> None:
    width = 0.8 / max(1, len(panel.parts))
    for i, (name, bars) in enumerate(panel.parts.items()):
        found = [(at + (i - (len(panel.parts) - 1) / 2) * width, bar) for at, bar in enumerate(bars) if bar is not None]
        y = [bar.value for _, bar in found]
        ends = _ends(y, [bar.low for _, bar in found], [bar.high for _, bar in found])
        look = {"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white", "linewidth": 0.5}
        axis.bar([x for x, _ in found], y, width, **look, label=name, yerr=ends, error_kw={"elinewidth": 0.8, "capsize": 1.5})
        if 0.8 * _breadth(panel) / max(1, len(panel.labels) * len(panel.parts)) > 0.19:  # inches that a number takes
            for x, bar in found:
                said = f"{100 * bar.value:+.1f}" if panel.signed else f"{100 * bar.value:.0f}"
                axis.annotate(said, (x, max(0.0, bar.high)), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axis.set_xticks(range(len(panel.labels)), panel.labels)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.signed:
        axis.axhline(0, color="#57606a", linewidth=0.8)
        axis.margins(y=0.12)
    else:
        axis.set(ylim=(0, 1.08), yticks=[0, 0.25, 0.5, 0.75, 1.0])
    if 0.08 * max(map(len, panel.labels), default=0) * len(panel.labels) > 0.8 * _breadth(panel):
        _slanted(axis)
    axis.grid(axis="y", alpha=0.25)


def _slanted(axis: Any) -> None:
    axis.tick_params(axis="x", rotation=35, labelsize=7.5)
    for label in axis.get_xticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")


def _heat(axis: Any, panel: Heat) -> None:
    values = [[math.nan if value is None else value for value in row] for row in panel.values]
    x, y = _edges(panel.x, panel.log), _edges(panel.y, panel.log)
    axis.set_facecolor("#eceff2")
    if panel.log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    low, high = panel.limits
    mesh = axis.pcolormesh(x, y, values, cmap="cividis", vmin=low, vmax=high, edgecolors="white", linewidth=0.4 if panel.n else 0)
    axis.figure.colorbar(mesh, ax=axis, label=panel.unit, fraction=0.05, pad=0.02)
    for ticks, names, put in ((panel.x, panel.xticks, axis.set_xticks), (panel.y, panel.yticks, axis.set_yticks)):
        if names:
            put(ticks, names)
    axis.minorticks_off()
    if panel.extent:
        (left, right), (bottom, top) = panel.extent
        axis.set(xlim=(left, right), ylim=(bottom, top))
        axis.fill_between([left, right], bottom, top, facecolor="none", edgecolor="#b6bec8", hatch="///", linewidth=0, zorder=0)
        axis.set_facecolor("#f6f8fa")
    if len(panel.x) < MANY and len(panel.y) < MANY and panel.n:
        for j, row in enumerate(panel.values):
            for i, value in enumerate(row):
                if value is not None:
                    light = (value - low) / max(1e-9, high - low) > 0.5
                    text = f"{100 * value:.0f} %\nn = {panel.n[j][i]}"
                    colour, edge = ("black", "white") if light else ("white", "black")
                    halo = [effects.withStroke(linewidth=2.2, foreground=edge, alpha=0.75)] if panel.isolines else []
                    look = {"color": colour, "path_effects": halo, "fontsize": 7, "ha": "center", "va": "center", "zorder": 3.5}
                    axis.text(panel.x[i], panel.y[j], text, **look)
    for line in panel.isolines:
        _isoline(axis, line)
    if panel.beyond:
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
        axis.text(0.01, 0.985, panel.beyond, transform=axis.transAxes, fontsize=7, va="top", color="#8a3300", bbox=box, zorder=5)


def _isoline(axis: Any, line: Line) -> None:
    """Dark with a light edge, to be seen on every colour; its label on it."""
    edge = [effects.Stroke(linewidth=2.4, foreground="white", alpha=0.8), effects.Normal()]
    axis.plot(
        line.x, line.y, color="#8a0000", linewidth=1.1, linestyle="--" if line.dashed else "-", path_effects=edge, label="_" + line.label
    )
    if line.named and line.x:
        at = len(line.x) // 2
        box = {"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 0.8}
        axis.text(line.x[at], line.y[at], line.label, fontsize=7, color="#8a0000", ha="center", va="center", bbox=box, zorder=4)


def _edges(centres: Sequence[float], log: bool) -> list[float]:
    """The borders of cells: half way between their centres, on a logarithmic axis the geometric mean."""
    at = [math.log2(value) for value in centres] if log else list(centres)
    if len(at) == 1:
        at = [at[0] - 0.5, at[0] + 0.5]
    else:
        inner = [(a + b) / 2 for a, b in zip(at, at[1:], strict=False)]
        at = [2 * at[0] - inner[0], *inner, 2 * at[-1] - inner[-1]]
    return [2.0**value for value in at] if log else at


def _legends(drawn: Any, axes: list[Any]) -> None:
    """One legend below where the panels share names and mean the same by them, where it hides nothing, else one in each."""
    named = [dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)) for axis in axes]
    together: dict[str, Any] = {}
    for of_panel in named:
        together |= of_panel
    shared = all(set(of_panel) & set(named[0]) for of_panel in named) and (len(axes) == 1 or len(together) > 1)
    if shared and all(_colour(handle) == _colour(together[name]) for of_panel in named for name, handle in of_panel.items()):
        fit = int(drawn.get_figwidth() / (0.6 + 0.075 * max(map(len, together))))  # inches: a handle and 8-point letters
        drawn.legend(together.values(), together, loc="outside lower center", ncols=max(1, min(7, fit)), fontsize=8, frameon=False)
        return
    for axis, of_panel in zip(axes, named, strict=True):
        if of_panel:
            axis.legend(of_panel.values(), of_panel, fontsize=7, framealpha=0.8)


def _colour(handle: Any) -> Any:
    """What an artist of a legend is painted with."""
    first = handle[0] if isinstance(handle, tuple) else handle
    return first.get_facecolor() if hasattr(first, "get_facecolor") else first.get_color()


_KINDS = {Panel: _lines, Bars: _bars, Groups: _groups, Heat: _heat}
