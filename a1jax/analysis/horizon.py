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
from collections.abc import Sequence
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
from .sweep import Cell, Sweep, origins, rates

ALIKE = 1.05  # training tokens of cells that differ by less are equal: budgets are rounded to whole steps
EQUAL = 1.01  # and so are targets

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
    "targets",
    "warning",
    "without_size",
]


def middle(law: Law) -> tuple[float, float]:
    """(active parameters, horizon) in the grid's middle, the geometric mean over cells."""
    return float(law.scale.values("active", 0.0)), float(law.scale.values(law.form.measure, 0.0))


def better_measure(law: Law) -> tuple[str | None, str]:
    """(whether "tokens" or "feedback" predicts held-out runs better, or None where the folds do not agree or there is one measure; why).

    Where a sweep has one feedback for each horizon (and arm) this compares two spacings of the same few points, on folds that share their
    tasks, and the sentence says so."""
    best = {m: next((s for s in law.scores if s.form.measure == m and s.form.sizes), None) for m in ("tokens", "feedback")}
    tokens, feedback = best["tokens"], best["feedback"]
    if tokens is None or feedback is None or math.isnan(tokens.held_out):
        return None, "Tokens and effective feedback could not be compared."
    name, ahead = ("tokens", tokens) if tokens.held_out >= feedback.held_out else ("feedback", feedback)
    behind = feedback if ahead is tokens else tokens
    wins = sum(a > b for a, b in zip(ahead.by_fold, behind.by_fold, strict=True))
    left_out = horizon_fit.folds(law.table)[1]
    text = f"effective feedback {feedback.held_out:.4f}, tokens {tokens.held_out:.4f} nats per run on left-out {left_out}"
    same = "; feedback follows from the horizon here, so two spacings of the same points are compared" if _follows(law.table) else ""
    if wins < len(ahead.by_fold):
        return (
            None,
            f"Neither measure fits success over these horizons better in every fold: {text}; {name} in {wins} of {len(ahead.by_fold)}"
            f"{same}.",
        )
    long = "Effective feedback" if name == "feedback" else "The horizon in tokens"
    return name, f"{long} fits success over these horizons better, in all {wins} folds: {text}{same}."


def _follows(t: horizon_fit.Table) -> bool:
    """Whether feedback is a function of the horizon and the arm alone: whatever else differs, it is the same."""
    of_place: dict[tuple, float] = {}
    places = [(h, repr(cell.axes.get("arm"))) for h, cell in zip(t.tokens, t.cells, strict=True)]
    firsts = [of_place.setdefault(place, value) for place, value in zip(places, t.feedback, strict=True)]
    return bool(np.allclose(firsts, t.feedback, rtol=1e-6, atol=0.0))


def targets(cells: Sequence[Cell]) -> str:
    """How many targets (tokens that the loss looks at, ``train.supervised``) cells of different horizons get of equal training tokens: one
    sentence; "" where their tokens differ by more than ALIKE or no cell says its targets."""
    silent = sum(not isinstance(c.train.get("supervised"), (int, float)) for c in cells)
    tokens = [c.train.get("tokens", 0) for c in cells]
    if silent == len(cells) or min(tokens) <= 0 or max(tokens) > ALIKE * min(tokens):
        return ""
    if silent:
        return f"{silent} of {len(cells)} cells do not say how many of their tokens were targets: horizons are not compared by them."
    found: dict[float, list[float]] = {}
    for cell in cells:
        found.setdefault(cell.axes.get("horizon", cell.train.get("longest_piece")), []).append(cell.train["supervised"])
    means = {h: sum(of) / len(of) for h, of in found.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    head = f"At equal tokens ({sum(tokens) / len(tokens):,.0f} a cell) the targets, tokens that the loss looks at, are"
    if means[high] < EQUAL * means[low]:
        return f"{head} as many at every horizon, {means[high]:,.0f}."
    ends = f"fewest at H = {low:g}, {means[low]:,.0f}, and most at H = {high:g}, {means[high]:,.0f}"
    return f"{head} {ends} (means over the cells of a horizon)."


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


def summary(found: Sweep, draws: int = 400, successes: tuple[float, ...] = (0.5,)) -> list[str]:
    """What the sweep says, in sentences, each budget (and arm) by itself. successes: what costs are asked for."""
    said = [f"Sweep {found.name}: {len(found.cells)} cells finished, {len(found.failed)} failed, {len(found.missing)} missing."]
    said += filter(None, [origins(found.cells)])
    said += [f"Failed: {f.name}: {f.error}" for f in found.failed]
    parts = _parts(found)
    for name, cells in parts.items():
        head = f"[{name}] " if len(parts) > 1 else ""
        try:
            law = analyse(cells, draws=draws)
        except ConfigError as error:
            said.append(f"{head}No law: {error}.")
            continue
        said += [head + line for line in _of_law(law, successes, _other_budgets(found, cells))]
    return said


def _parts(found: Sweep) -> dict[str, list]:
    """Cells by all axes but size, horizon and seed."""
    parts: dict[str, list] = {}
    for cell in found.cells:
        rest = ", ".join(f"{axis} {value}" for axis, value in cell.axes.items() if axis not in ("size", "horizon", "seed"))
        parts.setdefault(rest, []).append(cell)
    return parts


def _other_budgets(found: Sweep, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that differ from these in their budget alone (and in size, horizon and seed)."""
    rest = {k: v for k, v in cells[0].axes.items() if k not in ("size", "horizon", "seed")}
    if "budget" not in rest:
        return []
    alike = [c for c in found.cells if all(c.axes.get(k) == v for k, v in rest.items() if k != "budget")]
    return [c for c in alike if c.axes.get("budget") not in (None, rest["budget"])]


def _of_law(law: Law, successes: tuple[float, ...], elsewhere: Sequence[Cell]) -> list[str]:
    best = law.scores[0]
    score = "" if math.isnan(best.held_out) else f" ({best.held_out:.4f} nats per held-out run; without the horizon {_without(law)})"
    said = [f"The law of {law.form} over {len(law.table.cells)} cells and {int(law.table.counts[1].sum())} runs{score}."]
    said += [f"Note: {note}." for note in law.notes]
    missed, points = misses(law)
    said.append(f"The law lies outside the Wilson interval of {missed} of {points} points (one in twenty is chance).")
    said += [better_measure(law)[1], beyond_tasks(law), exchange(law, *middle(law)).sentence, *filter(None, [targets(law.table.cells)])]
    said += [s.sentence for s in stops(law, elsewhere=elsewhere)]
    for target in successes:
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
