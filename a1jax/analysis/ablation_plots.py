"""Figures of a sweep over other axes than size and horizon: success by setting and domain, and by task length, with intervals and n."""

from __future__ import annotations

from typing import Any

from .figures import Figure, Groups, Line, Panel, Rate
from .horizon_plots import INTERVALS, SEED, SHARES, STEPS, SUCCESS, counted, curve, points, split, told
from .sweep import Sweep

ALL = "all domains"
MOST_LINES = 14  # settings from which on lines over task length cannot be told apart: they get a panel per value of the first axis


def settings(sweep: Sweep) -> tuple[str, ...]:
    """The axes that vary, without the seed; all of them where none does."""
    axes = tuple(axis for axis in sweep.axes if axis != SEED)
    return tuple(axis for axis in axes if len(sweep.axes[axis]) > 1) or axes


def bars(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> list[Figure]:
    """Of rows per setting and "domain" (ALL among them): a panel per domain, the first axis from left to right, the second side by side; of
    more axes a figure per combination of the others."""
    first, second, rest = axes[0], axes[1:2], axes[2:]
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


def by_length(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> Figure:
    """A line per setting over the length of tasks, pooled over domains; of many settings a panel per value of the first axis."""
    several = len(split(rows, *axes)) > MOST_LINES
    outer, inner = (axes[:1], axes[1:]) if several and len(axes) > 1 else ((), axes)
    places = {values: i for i, values in enumerate(split(rows, *inner))}
    panels = []
    for values, of_panel in split(rows, *outer).items():
        lines = tuple(curve(told(inner, at), found, "steps", places[at]) for at, found in split(of_panel, *inner).items())
        title = f"{told(outer, values) or ALL} ({counted(of_panel)})"
        panels.append(Panel(title, STEPS, SUCCESS, lines, limits=SHARES, whole=True, log_x=True))
    return Figure("success_by_length", "Success by task length", f"Pooled over seeds and domains. {INTERVALS}", tuple(panels))


def trained(sweep: Sweep) -> list[Figure]:
    """The metrics that cells keep over training, a panel each, a line per cell but for seeds, which are averaged at each step."""
    axes = settings(sweep)
    metrics = list(dict.fromkeys(name for cell in sweep.cells for name in cell.curves))
    panels = []
    for name in metrics:
        lines = []
        for values, rows in split([{**c.axes, "curve": c.curves[name]} for c in sweep.cells if name in c.curves], *axes).items():
            at: dict[float, list[float]] = {}
            for step, value in (pair for row in rows for pair in row["curve"]):
                at.setdefault(step, []).append(value)
            steps = tuple(sorted(at))
            lines.append(Line(told(axes, values), steps, tuple(sum(at[s]) / len(at[s]) for s in steps), n=tuple(len(at[s]) for s in steps)))
        if 0 < len(lines) <= MOST_LINES:
            panels.append(Panel(name, "training step", name, tuple(lines)))
    caption = "Means over seeds; n in the table is the number of seeds."
    return [Figure("training", "Over training", caption, tuple(panels))] if panels else []


def figures(sweep: Sweep) -> list[Figure]:
    """All of them, in the order of the page."""
    axes = settings(sweep)
    if not axes:
        return []
    whole, each = [{**row, "domain": ALL} for row in points(sweep)], points(sweep, "domain")
    rows = [*whole, *each] if len({row["domain"] for row in each}) > 1 else each
    return [*bars(rows, axes), by_length(points(sweep, "steps"), axes), *trained(sweep)]
