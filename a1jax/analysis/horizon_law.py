"""The law of a sweep: fitted, with its draws and the scores of all forms that were tried; what it predicts, and where it may."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import spatial, special

from ..config import ConfigError
from . import horizon_bootstrap, horizon_fit
from .horizon_bootstrap import DRAWS, Draws
from .horizon_fit import RIDGE, Form, Scale, Score, Table
from .sweep import Cell

MEASURES = ("tokens", "feedback")  # what a law may count the horizon in; other forms are there to compare with


@dataclasses.dataclass(frozen=True)
class Law:
    """beta: [P], the coefficients of ``form`` on ``table``; scores: of all forms that were tried, best first."""

    table: Table
    form: Form
    scale: Scale
    beta: np.ndarray
    draws: Draws
    scores: tuple[Score, ...]
    notes: tuple[str, ...]

    def slope(self, name: str) -> int:
        """The place of a covariate's coefficient."""
        horizon = [] if self.form.measure == "none" else [self.form.measure]
        names = [*self.form.sizes, *horizon, "steps", *(["interaction"] if self.form.interaction else [])]
        return len(self.table.domains) + names.index(name)


class _These:
    """Cells as a key: the same objects in the same order."""

    def __init__(self, cells: Sequence[Cell]):
        self.cells = tuple(cells)

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.cells)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _These) and tuple(map(id, self.cells)) == tuple(map(id, other.cells))


def analyse(
    cells: Sequence[Cell],
    measure: Literal["tokens", "feedback", "best"] = "tokens",
    form: Form | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    ridge: float = RIDGE,
) -> Law:
    """The law of these cells; select them first where a sweep has several budgets or arms.

    measure: what the horizon is counted in; with "best" whatever predicts held-out runs better. form: None takes the best of the measure.
    The last few are kept: figures, tables and sentences ask for the same ones. Raises ConfigError for cells that cannot be fitted."""
    return _analyse(_These(cells), measure, form, draws, seed, ridge)


@functools.lru_cache(maxsize=8)
def _analyse(these: _These, measure: str, form: Form | None, draws: int, seed: int, ridge: float) -> Law:
    cells = these.cells
    t = horizon_fit.table(cells)
    scores, notes = horizon_fit.choose(t, ridge)
    others = sorted({a for c in cells for a in c.axes if len({repr(d.axes.get(a)) for d in cells}) > 1} - {"size", "horizon", "seed"})
    if others:
        notes.append(f"cells that differ in {', '.join(others)} are taken together: select them first to tell them apart")
    if form is None:
        fitting = [s.form for s in scores if s.form.sizes and s.form.measure in MEASURES and measure in ("best", s.form.measure)]
        if not fitting:
            raise ConfigError(f"measure {measure!r}: {notes[-1] if notes else 'these cells do not have it'}")
        form = fitting[0]
    at = horizon_fit.scale(t)
    wins, n = (a.ravel() for a in t.counts)
    beta = horizon_fit.fit(horizon_fit.rows(t, form, at), wins, n, horizon_fit.penalties(form, at, t.domains, ridge))
    drawn = horizon_bootstrap.draw(t, form, at, beta, draws, seed, ridge)
    return Law(t, form, at, beta, drawn, tuple(scores), (*notes, *drawn.notes))


def horizons(law: Law) -> np.ndarray:
    """[C], the cells' horizons in the measure of the law."""
    return law.table.feedback if law.form.measure == "feedback" else law.table.tokens


def inside(law: Law, active: Any, horizon: Any) -> np.ndarray:
    """Whether points lie in the convex hull of the cells, on logarithmic axes."""
    points = np.unique(np.stack([np.log2(law.table.active), law.scale.logs(law.form.measure, horizons(law))], 1), axis=0)
    asked = np.stack(np.broadcast_arrays(np.log2(active), law.scale.logs(law.form.measure, horizon)), -1).reshape(-1, 2)
    within = ((asked >= points.min(0) - 1e-9) & (asked <= points.max(0) + 1e-9)).all(1)
    varied = np.ptp(points, axis=0) > 1e-9
    if varied.all() and np.linalg.matrix_rank(points - points.mean(0), tol=1e-6) == 2:
        middle = points.mean(0) + (asked - points.mean(0)) * (1 - 1e-9)  # a corner of the grid is inside
        within &= spatial.Delaunay(points).find_simplex(middle, tol=1e-9) >= 0
    elif varied.all():  # cells on one line: so must the point be
        direction = np.diff(points[[0, -1]], axis=0)[0]
        away = asked - points[0]
        within &= np.abs(away[:, 0] * direction[1] - away[:, 1] * direction[0]) < 1e-6
    return within.reshape(np.broadcast_shapes(np.shape(active), np.shape(horizon)))


def warning(law: Law, active: Any, horizon: Any, steps: float | None = None) -> str:
    """One line on what of these points lies outside the grid, "" where nothing does."""
    t, found = law.table, []
    unit = "of effective feedback" if law.form.measure == "feedback" else "tokens"
    for name, asked, known in (("active parameters", active, t.active), (unit, horizon, horizons(law))):
        low, high, least, most = np.min(asked), np.max(asked), known.min(), known.max()
        found += [f"{low:.4g} {name} is below the grid's {least:.4g}"] if low < least * (1 - 1e-9) else []
        found += [f"{high:.4g} {name} is above the grid's {most:.4g}"] if high > most * (1 + 1e-9) else []
    if not found and not inside(law, active, horizon).all():
        found.append("no cells around that size and horizon together")
    if steps is not None:
        lengths = [s for _, s in t.groups]
        found += (
            [f"{steps:g} steps are outside the asked {min(lengths)} to {max(lengths)}"] if not min(lengths) <= steps <= max(lengths) else []
        )
    return f"extrapolated: {'; '.join(found)}" if found else ""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Success with its 95 % interval. Numbers, or arrays in the shape of the points that were asked. warning: "" inside the grid."""

    active: Any
    horizon: Any
    success: Any
    low: Any
    high: Any
    inside: Any
    warning: str


def predict(law: Law, active: Any, horizon: Any, steps: float | None = None, domain: str | None = None, total: Any = None) -> Prediction:
    """Success at sizes and horizons, numbers or arrays that broadcast. steps, domain: None is the mix of the held-out tasks.

    horizon: in the measure of the law. total: None takes what the sweep's models of that active size have."""
    shape = np.broadcast_shapes(np.shape(active), np.shape(horizon))
    n, h = (np.broadcast_to(np.asarray(v, float), shape).ravel() for v in (active, horizon))
    total = total_of(law, n) if total is None else np.broadcast_to(np.asarray(total, float), shape).ravel()
    base, slope, share = lines(law, n, total, steps, domain)
    x = law.scale.logs(law.form.measure, h)

    def success(betas: np.ndarray) -> np.ndarray:
        return special.expit(base(betas) + (slope(betas) * x)[:, :, None]) @ share

    point = success(law.beta[None])[0]
    drawn = {name: np.quantile(success(b), [0.025, 0.975], axis=0) for name, b in law.draws.over.items()}
    low = np.min([d[0] for d in drawn.values()], axis=0) if drawn else np.zeros_like(point)
    high = np.max([d[1] for d in drawn.values()], axis=0) if drawn else np.ones_like(point)
    within = inside(law, n, h) & asked(law, steps)
    values = [v.reshape(shape) for v in (point, low, high, within)]
    found = [float(v) for v in values[:3]] + [bool(values[3])] if shape == () else values
    return Prediction(active, horizon, *found, warning(law, n, h, steps))


def asked(law: Law, steps: float | None) -> bool:
    """Whether tasks of so many steps lie between the shortest and the longest that were asked."""
    lengths = [s for _, s in law.table.groups]
    return steps is None or min(lengths) <= steps <= max(lengths)


def total_of(law: Law, active: Any) -> np.ndarray:
    """Total parameters of models with so many active ones: between the sweep's sizes, on logarithmic axes, and on along the last two."""
    sizes = np.unique(np.stack([np.log2(law.table.active), np.log2(law.table.total)], 1), axis=0)
    x, start = np.unique(sizes[:, 0], return_index=True)
    y, at = sizes[start, 1], np.log2(np.asarray(active, float))
    if len(x) == 1:
        return 2.0 ** (at - x[0] + y[0])
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    return 2.0 ** (y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i]))


def lines(law: Law, active: np.ndarray, total: np.ndarray, steps: float | None, domain: str | None):
    """The law along the horizon: (betas [K, P] -> logits at the horizon's centre [K, M, G], betas -> slope [K, M], share of groups [G])."""
    t = law.table
    if domain is not None and domain not in t.domains:
        raise ConfigError(f"domain {domain!r}: the cells were asked {', '.join(t.domains)}")
    mix: dict[tuple[str, float], float] = {}
    for (d, s), part in zip(t.groups, t.mix, strict=True):
        if domain in (None, d):
            key = (d, s if steps is None else steps)
            mix[key] = mix.get(key, 0.0) + part
    share = np.array(list(mix.values())) / sum(mix.values())
    m, g = len(active), len(mix)
    of = {"active": np.repeat(active, g), "total": np.repeat(total, g), "steps": np.tile([s for _, s in mix], m)}
    of |= {name: np.full(m * g, 2.0 ** law.scale.centre[name] - (law.scale.offset if name == "feedback" else 0.0)) for name in MEASURES}
    x = horizon_fit.design(law.form, law.scale, t.domains, of, [d for d, _ in mix] * m)
    first = law.scale.logs("total", total) if law.form.sizes[:1] == ("total",) else law.scale.logs("active", active)

    def slope(betas: np.ndarray) -> np.ndarray:
        along = np.zeros(len(betas)) if law.form.measure == "none" else betas[:, law.slope(law.form.measure)]
        bend = betas[:, [law.slope("interaction")]] * first if law.form.interaction else 0.0
        return along[:, None] + bend + np.zeros(m)

    return (lambda betas: (betas @ x.T).reshape(len(betas), m, g)), slope, share
