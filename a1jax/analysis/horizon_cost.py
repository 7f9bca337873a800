"""What a success costs: the size and horizon that reach it with the fewest floating-point operations, in training and in serving.

Training: operations per token times the tokens of a training, as the cells say (``train.flops``, ``train.tokens``) and between and beyond
them by a straight line through their logarithms, or by a function (``models.flops.training`` of a model of that size, say). Serving: the
tokens of a run times twice the active parameters, which leaves out attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import ConfigError
from .horizon_law import Law
from .horizon_rate import Iso, iso

ALIKE = 1.01  # trainings whose costs differ by less cost the same

PerToken = Callable[[float, float], float]
"""(active parameters, horizon in tokens) -> operations per token of training."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One way to the target. train: operations of the whole training; serve: of one run."""

    active: float
    horizon: float
    train: float
    serve: float
    inside: bool
    warning: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """rows: by size. least_training, least_serving: among those inside the grid; None where none is, and least_training also where all
    train for the same within a hundredth, as they do where the budget is one of operations."""

    target: float
    rows: tuple[Cost, ...]
    least_training: Cost | None
    least_serving: Cost | None
    sentence: str

    def after(self, runs: float) -> Cost | None:
        """The cheapest inside the grid once it has served so many runs: training and serving together."""
        return min((row for row in self.rows if row.inside), key=lambda row: row.train + runs * row.serve, default=None)


def costs(
    law: Law,
    target: float,
    active: Any = None,
    steps: float | None = None,
    domain: str | None = None,
    per_token: PerToken | None = None,
    tokens: float | None = None,
    run_tokens: float | None = None,
) -> Costs:
    """tokens: of a training, None takes the cells' mean by size; run_tokens: of a run, None takes the mean of the held-out runs chosen.

    Raises ConfigError for a law that counts no tokens, and for cells that say neither operations nor tokens of their training."""
    if law.form.measure != "tokens":
        raise ConfigError("costs need a law whose horizon is in tokens: analyse(cells, measure='tokens')")
    curve = iso(law, target, active, steps, domain)
    of_run = run_tokens if run_tokens is not None else _run_tokens(law, steps, domain)
    rate = per_token or _line(law, "flops per token")
    budget = (lambda n, h: float(tokens)) if tokens is not None else _line(law, "tokens")
    rows = tuple(_cost(curve, i, rate, budget, of_run) for i in range(len(curve.active)) if np.isfinite(curve.horizon[i]))
    within = [row for row in rows if row.inside]
    training, serving = (min(within, key=key, default=None) for key in (lambda r: r.train, lambda r: r.serve))
    if within and max(row.train for row in within) < ALIKE * training.train:
        training = None
    return Costs(target, rows, training, serving, _sentence(target, training, serving))


def _cost(curve: Iso, i: int, rate: PerToken, budget: PerToken, of_run: float) -> Cost:
    n, h = float(curve.active[i]), float(curve.horizon[i])
    text = f"extrapolated: {n:.3g} active parameters and {h:.3g} tokens lie outside the grid" if curve.outside[i] else ""
    return Cost(n, h, rate(n, h) * budget(n, h), 2 * n * of_run, not curve.outside[i], text)


def _run_tokens(law: Law, steps: float | None, domain: str | None) -> float:
    asked = [t for c in law.table.cells for t in c.tasks if steps in (None, t["steps"]) and domain in (None, t["domain"])]
    found = [t["tokens"] for t in asked if t.get("tokens")]
    if not found:
        raise ConfigError("no held-out run of these tasks says its tokens: give run_tokens")
    return float(np.mean(found))


def _line(law: Law, what: str) -> PerToken:
    """A quantity of the cells' trainings as a power law of size and horizon, by least squares on logarithms."""
    t = law.table
    of_cell = []
    for cell in t.cells:
        flops, tokens = cell.train.get("flops"), cell.train.get("tokens")
        if not tokens or (what != "tokens" and not flops):
            raise ConfigError(f"cell {cell.name}: its train says no {'tokens' if not tokens else 'flops'}: give per_token and tokens")
        of_cell.append(tokens if what == "tokens" else flops / tokens)
    x = np.stack([np.ones(len(t.cells)), np.log2(t.active), np.log2(t.tokens)], 1)
    beta = np.linalg.lstsq(x, np.log2(of_cell), rcond=None)[0]
    return lambda n, h: float(np.exp2(beta @ [1.0, np.log2(n), np.log2(h)]))


def _sentence(target: float, training: Cost | None, serving: Cost | None) -> str:
    if serving is None:
        return f"No size and horizon inside the grid have a success of {100 * target:.0f} %."
    serve = f"least serving, {serving.serve:.3g} operations a run, with {serving.active:.3g} active parameters and a horizon of "
    serve += f"{serving.horizon:.3g} tokens"
    if training is None:
        return f"A success of {100 * target:.0f} % inside the grid takes {serve}; training costs the same everywhere."
    train = f"{training.train:.3g} operations, with {training.active:.3g} and {training.horizon:.3g}"
    return f"A success of {100 * target:.0f} % inside the grid takes {serve}; least training, {train}."
