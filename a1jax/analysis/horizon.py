"""How far the horizon stands in for size: one door to the analysis of a sweep over both.

    found = sweep.load("runs/horizon")
    law = analyse(sweep.where(found.cells, budget="tokens"))    # table, fit, bootstrap; which form and measure predict best
    exchange(law, 32_768, 96).sentence                          # how many times more parameters one doubling of the horizon is worth
    predict(law, 32_768, 96), iso(law, 0.5), stops(law), costs(law, 0.5)
    summary(found)                                              # all of it in sentences

Nothing is extrapolated in silence: every result says whether its point lies inside the grid of the cells that were fitted, and if not, a
warning says where it lies outside.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import special

from ..config import ConfigError
from ..stages.evaluate import wilson
from . import horizon_fit
from .horizon_cost import Cost, Costs, costs
from .horizon_fit import Form, Score
from .horizon_law import Law, Prediction, analyse, inside, predict, warning
from .horizon_rate import Iso, Rate, exchange, iso, without_size
from .horizon_stops import Stop, stops
from .sweep import Sweep, rates

__all__ = [
    "Cost",
    "Costs",
    "Form",
    "Iso",
    "Law",
    "Prediction",
    "Rate",
    "Score",
    "Stop",
    "analyse",
    "beyond_tasks",
    "better_measure",
    "costs",
    "exchange",
    "inside",
    "iso",
    "middle",
    "misses",
    "predict",
    "rows",
    "stops",
    "summary",
    "warning",
    "without_size",
]


def middle(law: Law) -> tuple[float, float]:
    """(active parameters, horizon) in the grid's middle, the geometric mean over cells."""
    return float(law.scale.values("active", 0.0)), float(law.scale.values(law.form.measure, 0.0))


def better_measure(law: Law) -> tuple[str | None, str]:
    """(whether "tokens" or "feedback" predicts held-out runs better, or None where the folds do not agree or there is one measure; why).

    Where a sweep has one feedback for each horizon this compares two spacings of the same few points, on folds that share their tasks."""
    best = {m: next((s for s in law.scores if s.form.measure == m and s.form.sizes), None) for m in ("tokens", "feedback")}
    tokens, feedback = best["tokens"], best["feedback"]
    if tokens is None or feedback is None or math.isnan(tokens.held_out):
        return None, "Tokens and effective feedback could not be compared."
    name, ahead = ("tokens", tokens) if tokens.held_out >= feedback.held_out else ("feedback", feedback)
    behind = feedback if ahead is tokens else tokens
    wins = sum(a > b for a, b in zip(ahead.by_fold, behind.by_fold, strict=True))
    left_out = horizon_fit.folds(law.table)[1]
    text = f"effective feedback {feedback.held_out:.4f}, tokens {tokens.held_out:.4f} nats per run on left-out {left_out}"
    if wins < len(ahead.by_fold):
        return (
            None,
            f"Neither measure fits success over these horizons better in every fold: {text}; {name} in {wins} of {len(ahead.by_fold)}.",
        )
    long = "Effective feedback" if name == "feedback" else "The horizon in tokens"
    return name, f"{long} fits success over these horizons better, in all {wins} folds: {text}."


def beyond_tasks(law: Law) -> str:
    """Whether the horizon counts beyond a task's length, by the same comparison: one sentence."""
    plain, capped = (next((s for s in law.scores if s.form.measure == m and s.form.sizes), None) for m in ("tokens", "reach"))
    if plain is None or capped is None or math.isnan(plain.held_out):
        return "No horizon is longer than the tasks: whether it counts beyond their end cannot be told."
    wins = sum(a > b for a, b in zip(capped.by_fold, plain.by_fold, strict=True))
    text = f"{capped.held_out:.4f} nats per held-out run against {plain.held_out:.4f}, better in {wins} of {len(plain.by_fold)} folds"
    if wins == len(plain.by_fold):
        return f"The horizon counts only up to a task's length: so counted it predicts success better, {text}."
    if wins == 0:
        return f"The horizon counts beyond a task's length: cut off there it predicts success worse, {text}."
    return f"Whether the horizon counts beyond a task's length cannot be told: cut off there, {text}."


def misses(law: Law) -> tuple[int, int]:
    """(points that the law misses, points): observed success of a grid point and a group of tasks, over its seeds, whose Wilson interval
    does not hold the law's. One in twenty is chance; more says that the law's form does not fit, or that seeds differ."""
    t = law.table
    x = horizon_fit.rows(t, law.form, law.scale)
    p = special.expit(x @ law.beta).reshape(len(t.cells), -1)
    wins, n = t.counts
    found = []
    for point in np.unique(t.points):
        mine = t.points == point
        for g in np.flatnonzero(n[mine].sum(0)):
            low, high = wilson(int(wins[mine, g].sum()), int(n[mine, g].sum()))
            expected = (p[mine, g] * n[mine, g]).sum() / n[mine, g].sum()
            found.append(not low <= expected <= high)
    return sum(found), len(found)


def summary(found: Sweep, draws: int = 400, targets: tuple[float, ...] = (0.5,)) -> list[str]:
    """What the sweep says, in sentences, each budget (and arm) by itself."""
    said = [f"Sweep {found.name}: {len(found.cells)} cells finished, {len(found.failed)} failed, {len(found.missing)} missing."]
    said += [f"Failed: {f.name}: {f.error}" for f in found.failed]
    parts = _parts(found)
    for name, cells in parts.items():
        head = f"[{name}] " if len(parts) > 1 else ""
        try:
            law = analyse(cells, draws=draws)
        except ConfigError as error:
            said.append(f"{head}No law: {error}.")
            continue
        said += [head + line for line in _of_law(law, targets)]
    return said


def _parts(found: Sweep) -> dict[str, list]:
    """Cells by all axes but size, horizon and seed."""
    parts: dict[str, list] = {}
    for cell in found.cells:
        rest = ", ".join(f"{axis} {value}" for axis, value in cell.axes.items() if axis not in ("size", "horizon", "seed"))
        parts.setdefault(rest, []).append(cell)
    return parts


def _of_law(law: Law, targets: tuple[float, ...]) -> list[str]:
    best = law.scores[0]
    score = "" if math.isnan(best.held_out) else f" ({best.held_out:.4f} nats per held-out run; without the horizon {_without(law)})"
    said = [f"The law of {law.form} over {len(law.table.cells)} cells and {int(law.table.counts[1].sum())} runs{score}."]
    said += [f"Note: {note}." for note in law.notes]
    missed, points = misses(law)
    said.append(f"The law lies outside the Wilson interval of {missed} of {points} points (one in twenty is chance).")
    said += [better_measure(law)[1], beyond_tasks(law), exchange(law, *middle(law)).sentence]
    said += [s.sentence for s in stops(law)]
    for target in targets:
        try:
            said.append(costs(law, target).sentence)
        except ConfigError as error:
            said.append(f"No costs: {error}.")
    return said


def _without(law: Law) -> str:
    return next((f"{s.held_out:.4f}" for s in law.scores if s.form.measure == "none"), "unknown")


def rows(found: Sweep, draws: int = 400) -> list[dict[str, Any]]:
    """One row per cell's place (all axes but the seed), domain and number of steps, ready for CSV: observed success with its interval, and
    the law's, which is fitted to each budget (and arm) by itself; empty where there is none."""
    out = []
    for cells in _parts(found).values():
        axes = [axis for axis in cells[0].axes if axis != "seed"]
        try:
            law = analyse(cells, draws=draws)
        except ConfigError:
            law = None
        places = {tuple(c.axes.get(a) for a in axes): c for c in cells}
        for row in rates(cells, [*axes, "domain", "steps"]):
            cell = places[tuple(row[a] for a in axes)]
            row = {**{a: row[a] for a in axes}, **cell.parameters, **{k: v for k, v in row.items() if k not in axes}}
            if law is not None:
                p = predict(law, cell.parameters["active"], cell.axes["horizon"], row["steps"], row["domain"], cell.parameters["total"])
                row |= {"law": p.success, "law_low": p.low, "law_high": p.high, "inside": p.inside, "warning": p.warning}
            out.append(row)
    return out
