"""Figures of a sweep over other axes than size and horizon: success by setting and domain, and by task length, with intervals and n."""

from __future__ import annotations

import math
from typing import Any

from . import training_plots
from .figures import Figure, Groups, Panel, Rate
from .horizon_plots import INTERVALS, SEED, SHARES, STEPS, SUCCESS, counted, curve, points, split, told
from .sweep import Sweep
from .training_plots import MOST_LINES, placed

ALL = "all domains"


def settings(sweep: Sweep) -> tuple[str, ...]:
    """The axes that vary, without the seed; all of them where none does."""
    axes = tuple(axis for axis in sweep.axes if axis != SEED)
    return tuple(axis for axis in axes if len(sweep.axes[axis]) > 1) or axes


def bars(rows: list[dict[str, Any]], first: str, second: tuple[str, ...] = (), rest: tuple[str, ...] = ()) -> list[Figure]:
    """Of rows per setting and "domain" (ALL among them): a panel per domain, the first axis from left to right, the second side by side, a
    figure per combination of the others."""
    out = []
    for values, of_figure in split(rows, *rest).items():
        panels = []
        for (domain,), of_panel in split(of_figure, "domain").items():
            labels = list(dict.fromkeys(row[first] for row in of_figure))
            parts = {}
            for value, of_part in split(of_panel, *second).items():
                found = {row[first]: Rate(row["success"], row["low"], row["high"], row["n"]) for row in of_part}
                parts[told(second, value) or "success"] = tuple(found.get(label) for label in labels)
            title = f"{domain} ({counted(of_panel)})"
            panels.append(Groups(title, first, SUCCESS, tuple(map(str, labels)), parts))
        where = told(rest, values)
        title = f"Success by {' and '.join((first, *second))}{f', {where}' if where else ''}"
        caption = f"Percent above the bars. {INTERVALS} Pooled over seeds."
        out.append(Figure("_".join(["success_by_setting", *map(str, values)]), title, caption, tuple(panels)))
    return out


def nested(sweep: Sweep, axes: tuple[str, ...]) -> bool:
    """Whether less than half of the axes' combinations are planned."""
    planned = (len(sweep.cells) + len(sweep.failed) + len(sweep.missing)) / max(1, len(sweep.axes.get(SEED, ())))
    return len(axes) > 1 and 2 * planned < math.prod(len(sweep.axes[axis]) for axis in axes)


def panels(rows: list[dict[str, Any]], axes: tuple[str, ...], apart: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the axes that panels are made for, those that lines are): of many settings, or nested ones, a panel per value of the first."""
    several = len(axes) > 1 and (apart or len(split(rows, *axes)) > MOST_LINES)
    return (axes[:1], axes[1:]) if several else ((), axes)


def by_length(rows: list[dict[str, Any]], outer: tuple[str, ...], inner: tuple[str, ...]) -> Figure:
    """Over the length of tasks, pooled over domains: a panel per combination of the outer axes, a line per combination of the inner."""
    shown = []
    for values, of_panel, places in placed(rows, outer, inner):
        lines = tuple(curve(told(inner, at), mine, "steps", places[at]) for at, mine in split(of_panel, *inner).items())
        title = f"{told(outer, values) or ALL} ({counted(of_panel)})"
        shown.append(Panel(title, STEPS, SUCCESS, lines, limits=SHARES, whole=True, log_x=True))
    return Figure("success_by_length", "Success by task length", f"Pooled over seeds and domains. {INTERVALS}", tuple(shown))


def figures(sweep: Sweep) -> list[Figure]:
    """All of them, in the order of the page. Where the first axis names ablations and the second has the values of each, every value of
    the first has a figure of its own."""
    axes = settings(sweep)
    if not axes:
        return []
    whole, each = [{**row, "domain": ALL} for row in points(sweep)], points(sweep, "domain")
    rows = [*whole, *each] if len({row["domain"] for row in each}) > 1 else each
    apart = nested(sweep, axes)
    drawn = bars(rows, *((axes[1], axes[2:3], (axes[0], *axes[3:])) if apart else (axes[0], axes[1:2], axes[2:])))
    outer, inner = panels(whole, axes, apart)
    return [*drawn, by_length(points(sweep, "steps"), outer, inner), *training_plots.figures(sweep, outer, inner)]
