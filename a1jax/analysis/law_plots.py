"""What the fitted law adds to a sweep's figures: iso-success lines, its curves over the horizon, the exchange rate with its interval."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from ..config import ConfigError
from . import horizon
from .figures import Figure, Line, Panel
from .horizon import Law, Rate
from .horizon_bootstrap import Draws
from .horizon_plots import HORIZON, SIZE, H, Row, facets, points, sized, split, told
from .sweep import Sweep, where

TARGETS = (0.1, 0.25, 0.5, 0.75, 0.9)
BEYOND = 2.0  # times the grid's ends that isolines are followed to
FINE = 97  # points of a curve
KINDS = {  # of draws (horizon_bootstrap)
    "seeds": "resampled seeds",
    "cells": "resampled cells (where a point has few seeds)",
    "tasks": "resampled tasks",
    "chance": "the chance of single runs (the fit's curvature)",
}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """laws: of each combination of a sweep's facets that could be fitted. refused: one line for each that could not."""

    over: tuple[str, ...]
    laws: dict[tuple, Law]
    refused: tuple[str, ...] = ()

    def of(self, row: Row) -> tuple:
        """The combination that a row belongs to."""
        return tuple(row.get(axis) for axis in self.over)


def fit(sweep: Sweep) -> Fitted:
    """A law for each combination of the axes other than size, horizon and seed."""
    over = facets(sweep.axes)
    laws, refused = {}, []
    for values, rows in split(points(sweep), *over).items():
        try:
            if min(len({row[axis] for row in rows}) for axis in (SIZE, HORIZON)) < 2:
                raise ConfigError("a law needs cells of two sizes and two horizons")
            laws[values] = horizon.analyse(where(sweep.cells, **dict(zip(over, values, strict=True))))
        except ConfigError as error:
            refused.append(f"{told(over, values) or sweep.name}: {error}")
    return Fitted(over, laws, tuple(refused))


def isolines(law: Law, targets: Sequence[float] = TARGETS) -> tuple[Line, ...]:
    """Lines of equal success, x: horizon, y: active parameters, from half the grid's ends to twice; dashed where extrapolated."""
    law = dataclasses.replace(law, draws=Draws({}, {}, ()))  # the lines have no intervals, which would take most of the time
    t = law.table
    active = np.geomspace(t.active.min() / BEYOND, t.active.max() * BEYOND, FINE)
    lines = []
    for target in targets:
        found = horizon.iso(law, target, active)
        shown = (found.horizon >= t.tokens.min() / BEYOND) & (found.horizon <= t.tokens.max() * BEYOND)
        lines += _pieces(f"{100 * target:.0f} %", found.horizon, active, found.outside, shown)
    return tuple(lines)


def _pieces(label: str, x: np.ndarray, y: np.ndarray, outside: np.ndarray, shown: np.ndarray) -> list[Line]:
    """Stretches of one line that are shown, each all inside or all outside; the longest has the label. A stretch outside begins and ends
    where its neighbour inside does."""
    places = np.flatnonzero(shown)
    cuts = np.flatnonzero((np.diff(places) > 1) | (np.diff(outside[places].astype(int)) != 0)) + 1
    runs = [run for run in np.split(places, cuts) if len(run)]
    longest = max(runs, key=lambda run: (not outside[run[0]], len(run)), default=None)
    lines = []
    for run in runs:
        dashed, named = bool(outside[run[0]]), run is longest
        if dashed:
            run = np.array([i for i in (run[0] - 1, *run, run[-1] + 1) if 0 <= i < len(x) and shown[i]])
        lines.append(Line(label, tuple(x[run].tolist()), tuple(y[run].tolist()), dashed=dashed, named=named))
    return lines


def curves(law: Law, rows: Sequence[Row]) -> dict[str, Line]:
    """Size -> the law's success over the horizon, inside what was measured of that size."""
    out = {}
    for (label,), found in split([{**row, "label": sized(row)} for row in rows], "label").items():
        measured = [row[HORIZON] for row in found]
        x = np.geomspace(min(measured), max(measured), 25)
        y = horizon.predict(law, float(found[0]["active"]), x).success
        out[label] = Line(f"{label} by the law", tuple(x.tolist()), tuple(np.asarray(y).tolist()), dashed=True, named=False)
    return out


def exchange_rate(rows: Sequence[Row], fitted: Fitted) -> Figure:
    """How many times the parameters a doubling of the horizon is worth at each size and horizon, with its 95 % interval; hollow and dashed
    where no cells are around that size and horizon together."""
    panels, none = [], []
    for values, law in fitted.laws.items():
        mine = [row for row in rows if fitted.of(row) == values]
        sizes = {sized(row): row["active"] for row in sorted(mine, key=lambda row: row["active"])}
        if not law.form.interaction:  # one rate everywhere
            sizes = {"every size": float(np.exp2(np.log2(law.table.active).mean()))}
        x = sorted({row[HORIZON] for row in mine})
        lines, lost, beyond = [], 0, 0
        for place, (label, active) in enumerate(sizes.items()):
            every = [horizon.exchange(law, active, h) for h in x]
            rates = [rate for rate in every if rate.bounded and math.isfinite(rate.value)]
            lost += len(every) - len(rates)
            beyond += sum(not rate.inside for rate in rates)
            lines += _stretches(label, rates, place)
        if not lines:
            none.append(told(fitted.over, values) or "all tasks")
            continue
        notes = [f"{lost} points not shown: there size does not help beyond doubt"] if lost else []
        notes += [f"hollow, dashed: {beyond} points outside the grid, extrapolated"] if beyond else []
        title = f"{told(fitted.over, values) or 'all tasks'} ({len(law.table.cells)} cells)"
        unit = "worth of a doubling of H (times the parameters, log scale)"
        level = 1.0, "worth nothing"
        panels.append(Panel(title, H, unit, tuple(lines), True, whole=True, log_x=True, level=level, note="\n".join(notes)))
    limits = _limits([line for panel in panels for line in panel.lines])
    panels = [dataclasses.replace(panel, limits=limits) for panel in panels]
    caption = (
        "2 to the power of (slope of log2 H / slope of log2 N) of the fitted law; above 1 a longer horizon stands in for parameters. "
        f"Thin bars are 95 % intervals, on each side the widest of {_kinds(fitted)}; one that leaves the panel may have no end."
    )
    if any(line.hollow for panel in panels for line in panel.lines):
        caption += " Hollow and dashed: outside the grid of the cells, extrapolated by the law."
    if none:
        caption += f" Not shown, as size does not help there beyond doubt: {'; '.join(none)}."
    return Figure("exchange_rate", "Exchange rate of horizon for parameters", caption, tuple(panels))


def _stretches(label: str, rates: Sequence[Rate], place: int) -> list[Line]:
    """A size's rates by ascending horizon, cut where they leave the grid or enter it; hollow outside. The legend has the first inside."""
    lines = []
    for inside, group in itertools.groupby(rates, key=lambda rate: rate.inside):
        of = list(group)
        columns = (tuple(getattr(rate, name) for rate in of) for name in ("horizon", "value", "low", "high"))
        lines.append(Line(label if inside else f"{label}, outside the grid", *columns, place=place, named=False, hollow=not inside))
    first = next((i for i, line in enumerate(lines) if not line.hollow), 0)
    return [dataclasses.replace(line, named=i == first) for i, line in enumerate(lines)]


def _kinds(fitted: Fitted) -> str:
    """What the laws' intervals hold, in words."""
    found = [words for kind, words in KINDS.items() if any(kind in law.draws.over for law in fitted.laws.values())]
    return f"{', '.join(found[:-1])} and {found[-1]}" if len(found) > 1 else "".join(found) or "nothing"


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Around the values and those ends of intervals that are within 30 times of them: one for all panels, to compare them."""
    values = [y for line in lines for y in line.y] or [1.0]
    ends = [e for line in lines for e in (*line.low, *line.high) if min(values) / 30 < e < max(values) * 30]
    return 0.8 * min(1.0, *values, *ends), 1.25 * max(1.0, *values, *ends)
