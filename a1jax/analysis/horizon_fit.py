"""Success as a smooth function of size, horizon and task length: the table of a sweep, the logistic fit, and the choice of its form.

    logit p = intercept of the domain + a * log2 N + b * log2 H + c * log2 steps [+ d * log2 N * log2 H]

N: active parameters, total ones or both; H: tokens of a training row, or the effective feedback of a training piece. Where pieces of a
cell are too short for any feedback, half of the least that another cell has is added to all, so that there is a logarithm. For comparison
H counts only up to a task's length ("reach"): what lies beyond a task's end can teach nothing about it. All logarithms are centred on the
table's means. The fit is penalised: RIDGE is the weight of a normal prior around 0 on every coefficient, slopes taken per standard
deviation of their covariate (RIDGE = 0.1: standard deviation 3.2 logits), so that data which a line separates (all runs of a size failed)
have an answer; against hundreds of runs it weighs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import optimize, special

from ..config import ConfigError
from .sweep import Cell

RIDGE = 0.1
COLLINEAR = 0.98  # correlation of log2 total with log2 active over the cells from which the two cannot be told apart
FOLDS = 5
Measure = Literal["tokens", "feedback", "reach", "none"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as arrays. C cells, T tasks (the union over cells), G groups of tasks (domain and steps), R rows (cell and group).

    success: [C, T], 1, 0, or nan where a cell was not asked that task. group: [T]. groups: (domain, steps) of each group.
    active, total, tokens, feedback: [C]; feedback is nan where a cell does not say. seeds: [C]. points: [C], the number of the grid point:
    cells that differ in nothing but the seed. lengths: [G], median tokens of the solved runs of a group, nan where none was solved.
    """

    cells: tuple[Cell, ...]
    success: np.ndarray
    group: np.ndarray
    groups: tuple[tuple[str, int], ...]
    active: np.ndarray
    total: np.ndarray
    tokens: np.ndarray
    feedback: np.ndarray
    seeds: tuple[Any, ...]
    points: np.ndarray
    lengths: np.ndarray
    offset: float = 0.0  # added to feedback before its logarithm

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(domain for domain, _ in self.groups))

    @functools.cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(wins [C, G], n [C, G])."""
        member = (self.group[:, None] == np.arange(len(self.groups))).astype(float)
        asked = ~np.isnan(self.success)
        return np.nan_to_num(self.success) @ member, asked @ member

    @functools.cached_property
    def reach(self) -> np.ndarray:
        """[C, G], the horizon in tokens, but no more than the length of a group's solved runs."""
        return np.fmin(self.tokens[:, None], self.lengths[None])

    @functools.cached_property
    def mix(self) -> np.ndarray:
        """[G], the share of each group among all runs."""
        n = self.counts[1].sum(0)
        return n / n.sum()

    def of(self, cells: np.ndarray) -> Table:
        """The table of some cells alone, by mask or index."""
        numbers = np.arange(len(self.cells))[cells]
        arrays = {name: getattr(self, name)[numbers] for name in ("success", "active", "total", "tokens", "feedback", "points")}
        return dataclasses.replace(self, cells=tuple(self.cells[i] for i in numbers), seeds=tuple(self.seeds[i] for i in numbers), **arrays)


def table(cells: Sequence[Cell]) -> Table:
    """Raises ConfigError for cells without a horizon, and for several cells of the same axes."""
    cells = tuple(cells)
    if not cells:
        raise ConfigError("no cells to fit: the sweep has none that are finished, or the selection left none")
    keys = [tuple(sorted((axis, repr(value)) for axis, value in c.axes.items())) for c in cells]
    if len(set(keys)) < len(keys):
        twice = next(c for c, key in zip(cells, keys, strict=True) if keys.count(key) > 1)
        raise ConfigError(f"cell {twice.name}: another cell has the same axes {twice.axes}; select one of them")
    tokens = [c.axes.get("horizon", c.train.get("longest_piece")) for c in cells]
    for cell, horizon in zip(cells, tokens, strict=True):
        if isinstance(horizon, bool) or not isinstance(horizon, (int, float)) or horizon <= 0:
            raise ConfigError(f"cell {cell.name}: its horizon is {horizon!r}; the law needs a number of tokens")
    tasks = list(dict.fromkeys((t["domain"], t["steps"], t["task_id"]) for c in cells for t in c.tasks))
    if not tasks:
        raise ConfigError("no held-out tasks in any cell: nothing to fit")
    short = next((task for task in tasks if task[1] < 1), None)
    if short is not None:
        raise ConfigError(f"held-out task {short[2]} of {short[0]} has {short[1]} steps; the law needs at least 1")
    place = {task: i for i, task in enumerate(tasks)}
    groups = tuple(sorted({(domain, steps) for domain, steps, _ in tasks}))
    success = np.full((len(cells), len(tasks)), np.nan)
    solved: dict[tuple[str, int], list[int]] = {}
    for i, cell in enumerate(cells):
        for t in cell.tasks:
            success[i, place[t["domain"], t["steps"], t["task_id"]]] = t["success"]
            if t["success"] and t.get("tokens"):
                solved.setdefault((t["domain"], t["steps"]), []).append(t["tokens"])
    rest = [tuple(pair for pair in key if pair[0] != "seed") for key in keys]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(rest))}
    feedback = np.array([_number(c.train.get("feedback")) for c in cells])
    return Table(
        cells=cells,
        success=success,
        group=np.array([groups.index((domain, steps)) for domain, steps, _ in tasks]),
        groups=groups,
        active=np.array([float(c.parameters["active"]) for c in cells]),
        total=np.array([float(c.parameters["total"]) for c in cells]),
        tokens=np.array(tokens, float),
        feedback=feedback,
        seeds=tuple(c.axes.get("seed") for c in cells),
        points=np.array([numbers[key] for key in rest]),
        offset=0.5 * min([f for f in feedback if f > 0], default=2.0) if 0 in feedback else 0.0,
        lengths=np.array([np.median(solved[g]) if g in solved else np.nan for g in groups]),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else np.nan


@dataclasses.dataclass(frozen=True)
class Form:
    """Which covariates the law has. sizes: "active", "total" or both. interaction: of the first size with the horizon."""

    sizes: tuple[str, ...] = ("active",)
    measure: Measure = "tokens"
    interaction: bool = False

    def __str__(self) -> str:
        horizon = {
            "tokens": "horizon in tokens",
            "feedback": "effective feedback",
            "reach": "horizon up to a task's length",
            "none": "no horizon",
        }[self.measure]
        return f"{' and '.join(self.sizes) or 'no'} parameters, {horizon}{', interaction' if self.interaction else ''}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What covariates are centred on and how far they spread (for the ridge), in log2. All from the table that was fitted."""

    centre: dict[str, float]
    spread: dict[str, float]
    offset: float = 0.0  # added to feedback before its logarithm

    def logs(self, name: str, values: Any) -> np.ndarray:
        """log2 of a covariate's values, centred."""
        values = np.asarray(values, float) + (self.offset if name == "feedback" else 0.0)
        return np.log2(values) - self.centre.get(name, 0.0)

    def values(self, name: str, logs: Any) -> np.ndarray:
        """The inverse of ``logs``; nothing is less than 0."""
        found = np.exp2(np.asarray(logs, float) + self.centre.get(name, 0.0))
        return np.maximum(0.0, found - self.offset) if name == "feedback" else found


def scale(t: Table) -> Scale:
    columns = {name: np.log2(getattr(t, name)) for name in ("active", "total", "tokens")}
    columns["feedback"], columns["reach"] = np.log2(t.feedback + t.offset), np.log2(t.reach).ravel()
    columns["steps"] = np.repeat(np.log2([s for _, s in t.groups]), np.maximum(1, t.counts[1].sum(0)).astype(int))
    means, deviations = ({n: float(f(c)) for n, c in columns.items()} for f in (np.mean, np.std))
    return Scale(means, deviations, t.offset)


def design(form: Form, at: Scale, domains: Sequence[str], of: dict[str, Any], domain: Sequence[str]) -> np.ndarray:
    """[R, P]: one column per domain, then sizes, horizon, steps, interaction. of: name -> [R] values in their own units."""
    x = {name: at.logs(name, values) for name, values in of.items()}
    columns = [np.array([d == known for d in domain], float) for known in domains]
    columns += [x[name] for name in form.sizes]
    columns += [] if form.measure == "none" else [x[form.measure]]
    columns += [x["steps"]]
    columns += [x[form.sizes[0]] * x[form.measure]] if form.interaction else []
    return np.stack(columns, 1)


def penalties(form: Form, at: Scale, domains: Sequence[str], ridge: float = RIDGE) -> np.ndarray:
    """[P], the ridge of every coefficient: slopes per standard deviation; a covariate that does not vary has its slope held near 0."""
    names = [*form.sizes, *([] if form.measure == "none" else [form.measure]), "steps"]
    slopes = [at.spread[name] for name in names]
    slopes += [at.spread[form.sizes[0]] * at.spread[form.measure]] if form.interaction else []
    return ridge * np.concatenate([np.ones(len(domains)), [s * s if s > 1e-9 else 1e6 for s in slopes]])


def rows(t: Table, form: Form, at: Scale) -> np.ndarray:
    """The design matrix of a table, [C * G, P], cell by cell."""
    g = len(t.groups)
    of = {name: np.repeat(getattr(t, name), g) for name in ("active", "total", "tokens", "feedback")}
    of["reach"] = t.reach.ravel()
    of["steps"] = np.tile([s for _, s in t.groups], len(t.cells))
    return design(form, at, t.domains, of, [d for d, _ in t.groups] * len(t.cells))


def loss(beta: np.ndarray, x: np.ndarray, wins: np.ndarray, n: np.ndarray, ridge: np.ndarray) -> tuple[float, np.ndarray]:
    """Penalised negative log-likelihood (without the binomial coefficients) and its gradient. beta: [P]; x: [R, P]; wins, n: [R]."""
    eta = x @ beta
    value = (n * np.logaddexp(0, eta) - wins * eta).sum() + 0.5 * (ridge * beta * beta).sum()
    return float(value), x.T @ (n * special.expit(eta) - wins) + ridge * beta


def hessian(beta: np.ndarray, x: np.ndarray, n: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    p = special.expit(x @ beta)
    return (x * (n * p * (1 - p))[:, None]).T @ x + np.diag(ridge)


def fit(x: np.ndarray, wins: np.ndarray, n: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """The coefficients, [P]: the only minimum of a strictly convex loss."""
    found = optimize.minimize(
        loss, np.zeros(x.shape[1]), (x, wins, n, ridge), jac=True, method="trust-exact",
        hess=lambda beta, *_: hessian(beta, x, n, ridge), options={"gtol": 1e-6},
    )  # fmt: skip
    return found.x


def log_likelihood(beta: np.ndarray, x: np.ndarray, wins: np.ndarray, n: np.ndarray) -> float:
    """Summed over runs, in nats."""
    eta = x @ beta
    return float((wins * eta - n * np.logaddexp(0, eta)).sum())


@dataclasses.dataclass(frozen=True)
class Score:
    """held_out: log-likelihood per run, in nats, of runs that the fit did not see; by_fold: of each fold."""

    form: Form
    held_out: float
    by_fold: tuple[float, ...]


def folds(t: Table) -> tuple[np.ndarray, str]:
    """([C] fold of every cell, what was left out): a seed each time where there are several, else cells by turns."""
    seeds = list(dict.fromkeys(t.seeds))
    if len(seeds) > 1:
        return np.array([seeds.index(s) % FOLDS for s in t.seeds]), "seeds"
    return np.random.default_rng(0).permutation(len(t.cells)) % min(FOLDS, len(t.cells)), "cells"


def score(t: Table, form: Form, ridge: float = RIDGE) -> Score:
    fold, _ = folds(t)
    found, runs = [], []
    for number in range(fold.max() + 1):
        seen, unseen = t.of(fold != number), t.of(fold == number)
        at = scale(seen)
        wins, n = (a.ravel() for a in seen.counts)
        beta = fit(rows(seen, form, at), wins, n, penalties(form, at, t.domains, ridge))
        wins, n = (a.ravel() for a in unseen.counts)
        found.append(log_likelihood(beta, rows(unseen, form, at), wins, n))
        runs.append(n.sum())
    return Score(form, sum(found) / sum(runs), tuple(f / r for f, r in zip(found, runs, strict=True)))


def forms(t: Table) -> tuple[list[Form], list[str]]:
    """(the forms that the table can tell apart, notes on those it cannot)."""
    notes, sizes, measures = [], [("active",), ("total",), ("active", "total")], ["tokens"]
    if _collinear(t.active, t.total):
        sizes = [("active",)]
        notes.append(
            "total and active parameters grow together over these cells: their effects cannot be told apart, active stands for both"
        )
    if np.isnan(t.feedback).any():
        notes.append(
            f"{int(np.isnan(t.feedback).sum())} of {len(t.cells)} cells do not say their effective feedback: compared by tokens alone"
        )
    elif np.ptp(t.feedback) == 0:
        notes.append("all cells have the same effective feedback: compared by tokens alone")
    else:
        measures.append("feedback")
    return [Form(s, m, i) for s, m, i in itertools.product(sizes, measures, (False, True))], notes


def _collinear(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.log2(a), np.log2(b)
    return a.std() < 1e-9 or b.std() < 1e-9 or abs(np.corrcoef(a, b)[0, 1]) > COLLINEAR


def choose(t: Table, ridge: float = RIDGE) -> tuple[list[Score], list[str]]:
    """(scores, best first, of all forms and of those for comparison: the horizon up to a task's length, no horizon, no size; notes)."""
    candidates, notes = forms(t)
    if len(t.cells) < 2:
        return [Score(candidates[0], float("nan"), ())], [*notes, "one cell: no form could be tried on cells it did not see"]
    candidates += [Form(candidates[0].sizes, "none"), Form((), "tokens")]
    if not np.array_equal(t.reach, np.broadcast_to(t.tokens[:, None], t.reach.shape)):
        candidates += [Form(candidates[0].sizes, "reach", i) for i in (False, True)]
    return sorted((score(t, form, ridge) for form in candidates), key=lambda s: -s.held_out), notes
