"""Figures as data: what a figure shows is a value, drawn (``drawing``) and written as CSV from the same numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

COLUMNS = ("panel", "series", "x", "value", "low", "high", "n")


@dataclasses.dataclass(frozen=True)
class Line:
    """One series: y over x, with the ends of its intervals and the runs behind each point where it has any.

    place: of its colour and marker among the series of the figure; None: its place in the panel. dashed: drawn thin and without markers, as
    what is computed and not measured. hollow: dashed, with empty markers, as what is extrapolated. named: whether the legend has it."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    n: tuple[int, ...] = ()
    place: int | None = None
    dashed: bool = False
    named: bool = True
    hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes. limits: of y; None: by the data. whole: x are whole numbers that each get a tick. log, log_x: a
    logarithmic axis, where all is above 0. level: (height, what it means) of a thin line across. note: a sentence inside the panel."""

    title: str
    xlabel: str
    ylabel: str
    lines: tuple[Line, ...]
    log: bool = False
    limits: tuple[float, float] | None = None
    whole: bool = False
    log_x: bool = False
    level: tuple[float, str] | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Bars:
    """Stacked bars: parts[name][i] is the height of that part in the bar labels[i]."""

    title: str
    ylabel: str
    labels: tuple[str, ...]
    parts: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of n runs with the ends of its interval."""

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Groups:
    """Bars side by side, with intervals: parts[name][i] is the bar of that name in the group labels[i], None: there is none. signed: they
    are differences, not shares from 0 to 1."""

    title: str
    xlabel: str
    ylabel: str
    labels: tuple[str, ...]
    parts: dict[str, tuple[Rate | None, ...]]
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Heat:
    """A coloured cell for each (x, y), both ascending: values[j][i] at (x[i], y[j]), None: there is none; n: the runs behind each.

    unit: of the values. log: both axes are logarithmic and the cells' edges lie between their centres. isolines: drawn over the cells,
    their labels on them; what lies beyond the cells is hatched, and ``beyond`` says what it is. limits: of the colours."""

    title: str
    xlabel: str
    ylabel: str
    unit: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]
    n: tuple[tuple[int | None, ...], ...] = ()
    xticks: tuple[str, ...] = ()
    yticks: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)
    log: bool = False
    isolines: tuple[Line, ...] = ()
    extent: tuple[tuple[float, float], tuple[float, float]] | None = None
    beyond: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """name: of its file. title: its heading. caption: how to read it, with n."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel | Bars | Groups | Heat, ...]


def rows(figure: Figure) -> list[dict[str, Any]]:
    """Every number a figure shows: panel, series, x, value, and low, high and n where it has them."""
    return [dict(zip(COLUMNS, (panel.title, *row), strict=True)) for panel in figure.panels for row in _rows(panel)]


def _rows(panel: Panel | Bars | Groups | Heat) -> list[tuple[Any, ...]]:
    """(series, x, value, low, high, n) of a panel, in the order of COLUMNS."""
    if isinstance(panel, Bars):
        return [(name, x, y, "", "", "") for name, values in panel.parts.items() for x, y in zip(panel.labels, values, strict=True)]
    if isinstance(panel, Groups):
        bars = [(name, x, bar) for name, values in panel.parts.items() for x, bar in zip(panel.labels, values, strict=True)]
        return [(name, x, bar.value, bar.low, bar.high, bar.n) for name, x, bar in bars if bar is not None]
    if isinstance(panel, Heat):
        ticks = panel.yticks or panel.y
        cells = [(j, i) for j in range(len(panel.y)) for i in range(len(panel.x)) if panel.values[j][i] is not None]
        shown = [(ticks[j], panel.x[i], panel.values[j][i], "", "", panel.n[j][i] if panel.n else "") for j, i in cells]
        return shown + [row for line in panel.isolines for row in _of_line(line, "isoline ")]
    return [row for line in panel.lines for row in _of_line(line)]


def _of_line(line: Line, before: str = "") -> list[tuple[Any, ...]]:
    blank = ("",) * len(line.x)
    columns = (line.x, line.y, line.low or blank, line.high or blank, line.n or blank)
    return [(before + line.label, *row) for row in zip(*columns, strict=True)]


def to_csv(table: list[dict[str, Any]]) -> str:
    """A table as CSV, header first: all keys in the order met, empty where a row has not one. Numbers as Python writes them, so none is
    rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)) or list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
