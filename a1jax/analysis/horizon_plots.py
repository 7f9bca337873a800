"""A sweep's figures: success over horizon, size, task length and cost, with intervals and n, and what the fitted law adds to them.

Each figure is a function of rows, pooled over seeds (``points``); its CSV holds what it shows. Sweeps without the axes "size" and
"horizon" get theirs from ``ablation_plots``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from . import sweep as sweeps
from .drawing import number
from .figures import Figure, Heat, Line, Panel
from .sweep import Cell, Sweep

SHARES = (-0.03, 1.03)
SEED, SIZE, HORIZON = "seed", "size", "horizon"
H = "horizon H (tokens, log scale)"
ACTIVE = "active parameters per token (log scale)"
SUCCESS = "success (held-out tasks)"
STEPS = "task length (steps, log scale)"
INTERVALS = "n: runs behind a value. Thin bars are 95 % Wilson intervals as if all runs were independent; seeds share tasks."
Row = dict[str, Any]


def has_horizons(axes: dict[str, Sequence[Any]]) -> bool:
    """Whether a sweep is over the two axes that the law and these figures are about."""
    return SIZE in axes and HORIZON in axes


def facets(axes: dict[str, Sequence[Any]]) -> tuple[str, ...]:
    """The axes a panel is made for each combination of: all that vary but size, horizon and seed."""
    return tuple(axis for axis in axes if axis not in (SIZE, HORIZON, SEED) and len(axes[axis]) > 1)


def points(sweep: Sweep, *more: str) -> list[Row]:
    """A row per combination of the axes but seed (and of ``more``: "domain", "steps"), in the order of the axes' values: the axes, "wins",
    "n", "success", "low", "high" pooled over seeds, "seeds", "total", "active" parameters, and means over seeds of the numbers in
    ``train`` (tokens, flops, longest_piece, mean_piece, feedback, ...; its steps as "train_steps")."""
    by = tuple(axis for axis in sweep.axes if axis != SEED)
    order = {axis: {value: i for i, value in enumerate(sweep.axes[axis])} for axis in by}
    cells: dict[tuple, list[Cell]] = {}
    for cell in sweep.cells:
        cells.setdefault(tuple(cell.axes.get(axis) for axis in by), []).append(cell)
    rows = sweeps.rates(sweep.cells, (*by, *more))
    rows.sort(key=lambda row: (*(order[axis].get(row[axis], -1) for axis in by), *(row[name] for name in more)))
    facts = {key: {"seeds": len(found), **found[0].parameters, **_means(found)} for key, found in cells.items()}
    return [{**facts[tuple(row[axis] for axis in by)], **row} for row in rows]


def _means(cells: Sequence[Cell]) -> dict[str, float]:
    """Of the numbers in train that all of these cells have."""
    names = [k for k in cells[0].train if all(isinstance(c.train.get(k), (int, float)) for c in cells)]
    means = {name: sum(c.train[name] for c in cells) / len(cells) for name in names}
    return {"train_steps" if name == "steps" else name: value for name, value in means.items()}


def split(rows: Sequence[Row], *by: str) -> dict[tuple, list[Row]]:
    """Rows by the values of these keys, in the order met."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in by), []).append(row)
    return found


def told(names: Sequence[str], values: Sequence[Any]) -> str:
    """budget tokens, arm consults; "" for none."""
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value is not None)


def counted(rows: Sequence[Row]) -> str:
    """Runs behind a point: n = 48, or the range of an unfinished sweep's."""
    ns = sorted({row["n"] for row in rows})
    return f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"


def curve(label: str, rows: Sequence[Row], x: str, place: int | None = None) -> Line:
    """Success with its interval over the key ``x``, in ascending order."""
    rows = sorted(rows, key=lambda row: row[x])
    columns = {name: tuple(row[name] for row in rows) for name in (x, "success", "low", "high", "n")}
    return Line(label, columns[x], columns["success"], columns["low"], columns["high"], columns["n"], place)


def _title(*parts: str) -> str:
    return ", ".join(filter(None, parts)) or "all tasks"


def sized(row: Row) -> str:
    return f"{row[SIZE]} ({number(row['active'])})"


def _sizes(rows: Sequence[Row]) -> list[str]:
    """Names of the sizes with their active parameters, ascending: the places of their colours."""
    return list(dict.fromkeys(sized(row) for row in sorted(rows, key=lambda row: row["active"])))


def success_over_horizon(
    rows: Sequence[Row],
    facets: Sequence[str] = (),
    name: str = "success_over_horizon",
    law: dict[tuple, dict[str, Line]] | None = None,
) -> Figure:
    """A panel per combination of the facets, a line per size. law: of a panel's combination, the fitted law's line of each size."""
    panels, sizes = [], _sizes(rows)
    for values, of_panel in split(rows, *facets).items():
        lines = [curve(size, [r for r in of_panel if sized(r) == size], HORIZON, i) for i, size in enumerate(sizes)]
        lines += [dataclasses.replace(line, place=sizes.index(size)) for size, line in (law or {}).get(values, {}).items()]
        title = f"{_title(told(facets, values))} ({counted(of_panel)})"
        panels.append(Panel(title, H, SUCCESS, tuple(line for line in lines if line.x), limits=SHARES, whole=True, log_x=True))
    by = " by size and domain" if "domain" in facets else " by size"
    dashed = "Dashed: the fitted law. " if law else ""
    caption = (
        f"A line per size (active parameters per token). H: no training row has more tokens of one run. {dashed}{_pooled(rows)} {INTERVALS}"
    )
    return Figure(name, f"Success over horizon{by}", caption, tuple(panels))


def success_by_length(rows: Sequence[Row], facets: Sequence[str] = (), panel: str = SIZE, line: str = HORIZON) -> list[Figure]:
    """One figure per combination of the facets: a panel per size, a line per horizon (or the other way round)."""
    out = []
    names = {HORIZON: lambda row: f"H = {number(row[HORIZON])}", SIZE: sized}
    places = {HORIZON: list(dict.fromkeys(names[HORIZON](r) for r in sorted(rows, key=lambda r: r[HORIZON]))), SIZE: _sizes(rows)}
    for values, of_figure in split(rows, *facets).items():
        panels = []
        for title in places[panel]:
            mine = [r for r in of_figure if names[panel](r) == title]
            lines = [curve(label, [r for r in mine if names[line](r) == label], "steps", i) for i, label in enumerate(places[line])]
            lines = [line for line in lines if line.x]
            if lines:
                full = f"{panel} {title}" if panel == SIZE else title
                full = f"{full} ({counted(mine)})"
                panels.append(Panel(full, STEPS, SUCCESS, tuple(lines), limits=SHARES, whole=True, log_x=True))
        where = told(facets, values)
        name = "_".join(["success_by_length", *map(str, values)])
        caption = f"Of what is trained with {panel} and {line}{f' at {where}' if where else ''}. {_pooled(rows)} {INTERVALS}"
        out.append(Figure(name, _title("Success by task length", where), caption, tuple(panels)))
    return out


def success_over_flops(rows: Sequence[Row], facets: Sequence[str] = ()) -> Figure:
    """What success costs: a panel per combination of the facets whose cells differ in training FLOPs, a line per horizon."""
    panels, horizons = [], sorted({row[HORIZON] for row in rows})
    for values, of_panel in split([r for r in rows if r.get("flops", 0) > 0], *facets).items():
        flops = [row["flops"] for row in of_panel]
        if max(flops) < 1.1 * min(flops):  # one cost: success over horizon says it all
            continue
        lines = [curve(f"H = {number(h)}", [r for r in of_panel if r[HORIZON] == h], "flops", i) for i, h in enumerate(horizons)]
        title = f"{_title(told(facets, values))} ({counted(of_panel)})"
        lines = tuple(line for line in lines if line.x)
        panels.append(Panel(title, "training compute (FLOPs, log scale)", SUCCESS, lines, limits=SHARES, log_x=True))
    caption = (
        f"Along a line the size grows. Cells that all cost the same are in the figures over horizon alone. {_pooled(rows)} {INTERVALS}"
    )
    return Figure("success_over_flops", "Success over training compute", caption, tuple(panels))


def heat_map(rows: Sequence[Row], facets: Sequence[str] = (), isolines: dict[tuple, tuple[Line, ...]] | None = None) -> Figure:
    """A panel per combination of the facets: success at (horizon, active parameters). isolines: of a panel's combination, in the same
    coordinates, dashed outside the measured grid."""
    panels = []
    for values, of_panel in split(rows, *facets).items():
        x, y = sorted({r[HORIZON] for r in of_panel}), sorted({r["active"] for r in of_panel})
        at = {(r["active"], r[HORIZON]): r for r in of_panel}
        lines = (isolines or {}).get(values, ())
        table = [[at.get((active, h)) for h in x] for active in y]
        beyond = any(line.dashed for line in lines)
        panels.append(
            Heat(
                f"{_title(told(facets, values))} ({counted(of_panel)})",
                H,
                ACTIVE,
                "success",
                tuple(x),
                tuple(y),
                tuple(tuple(r and r["success"] for r in row) for row in table),
                tuple(tuple(r and r["n"] for r in row) for row in table),
                tuple(map(number, x)),
                tuple(next(sized(r) for r in of_panel if r["active"] == active) for active in y),
                log=True,
                isolines=lines,
                extent=((x[0] / 2, x[-1] * 2), (y[0] / 2, y[-1] * 2)) if beyond else None,
                beyond="dashed, hatched: outside the measured grid, extrapolated" if beyond else "",
            )
        )
    law = " Lines: equal success by the fitted law, solid inside the measured grid, dashed where extrapolated." if isolines else ""
    return Figure("heat_map", "Success by size and horizon", f"Percent of n held-out runs.{law} {_pooled(rows)}", tuple(panels))


def _pooled(rows: Sequence[Row]) -> str:
    seeds = sorted({row["seeds"] for row in rows})
    if len(seeds) > 1:
        return f"Pooled over {seeds[0]} to {seeds[-1]} seeds."
    return f"Pooled over {seeds[0]} seeds." if seeds[0] > 1 else "One seed."


def figures(
    sweep: Sweep, isolines: dict[tuple, tuple[Line, ...]] | None = None, law: dict[tuple, dict[str, Line]] | None = None
) -> list[Figure]:
    """All that show what was measured, in the order of the page. isolines, law: see ``heat_map`` and ``success_over_horizon``."""
    over, rows, by_domain = facets(sweep.axes), points(sweep), points(sweep, "domain")
    out = [success_over_horizon(rows, over, law=law), heat_map(rows, over, isolines)]
    if len({row["domain"] for row in by_domain}) > 1:
        out.append(success_over_horizon(by_domain, (*over, "domain"), "success_over_horizon_by_domain"))
    out += [*success_by_length(points(sweep, "steps"), over), success_over_flops(rows, over)]
    return [figure for figure in out if figure.panels]
