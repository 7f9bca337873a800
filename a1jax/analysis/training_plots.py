"""What the cells of a sweep kept of their training, drawn: a figure per metric, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .figures import Figure, Line, Panel
from .horizon_plots import split, told
from .sweep import Sweep

MOST_LINES = 14  # from which on they cannot be told apart, and a panel is left out


def figures(sweep: Sweep, panels: Sequence[str], lines: Sequence[str]) -> list[Figure]:
    """One for each metric in the cells' ``curves``: a panel per combination of some axes, a line per combination of others."""
    out = []
    for metric in dict.fromkeys(name for cell in sweep.cells for name in cell.curves):
        rows = [{**cell.axes, "curve": cell.curves[metric]} for cell in sweep.cells if metric in cell.curves]
        shown = []
        for values, of_panel, places in placed(rows, panels, lines):
            found = [_mean(told(lines, at), mine, places[at]) for at, mine in split(of_panel, *lines).items()]
            if len(found) <= MOST_LINES:
                title = f"{told(panels, values) or 'all cells'} ({_seeds(found)})"
                shown.append(Panel(title, "training step", metric, tuple(found), log=_falls_far(found)))
        if shown:
            name = f"training_{metric.replace('/', '_')}"
            out.append(
                Figure(name, f"Over training: {metric}", "On the training data, means over seeds; n in the table: seeds.", tuple(shown))
            )
    return out


def placed(rows: Sequence[dict], panels: Sequence[str], lines: Sequence[str]) -> Iterator[tuple[tuple, list[dict], dict[tuple, int]]]:
    """Of each panel (combination, rows, places of its lines' colours): the same line has one place in all panels; lines that are in one
    panel each are counted there, as few colours are far apart."""
    order = list(split(rows, *lines))
    each = split(rows, *panels)
    alone = sum(len(split(of_panel, *lines)) for of_panel in each.values()) == len(order)
    for values, of_panel in each.items():
        names = list(split(of_panel, *lines)) if alone else order
        yield values, of_panel, {at: i for i, at in enumerate(names)}


def _mean(label: str, rows: Sequence[dict[str, Any]], place: int) -> Line:
    """Over the cells that have a finite value at a step."""
    at: dict[float, list[float]] = {}
    for step, value in (pair for row in rows for pair in row["curve"]):
        if value is not None and math.isfinite(value):
            at.setdefault(step, []).append(value)
    steps = tuple(sorted(at))
    return Line(label or "mean", steps, tuple(sum(at[s]) / len(at[s]) for s in steps), n=tuple(len(at[s]) for s in steps), place=place)


def _seeds(lines: Sequence[Line]) -> str:
    most = max((n for line in lines for n in line.n), default=0)
    return f"{most} seed{'s' if most != 1 else ''} a line"


def _falls_far(lines: Sequence[Line]) -> bool:
    values = [y for line in lines for y in line.y]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)
