"""What the horizon is worth in parameters: the exchange rate at a point, and curves of equal success."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import special

from ..config import ConfigError
from . import horizon_bootstrap
from .horizon_law import Law, asked, horizons, inside, lines, total_of, warning

FAR = 20.0  # doublings beyond the grid at which the search for a horizon gives up


@dataclasses.dataclass(frozen=True)
class Rate:
    """One doubling of the horizon is worth ``value`` times the parameters, at a point. bounded: parameters help there beyond doubt; if
    not, value and high are inf (or value nan where the horizon does not help either). of_size, of_horizon: (slope, low, high) in logits
    per doubling."""

    active: float
    horizon: float
    value: float
    low: float
    high: float
    bounded: bool
    inside: bool
    of_size: tuple[float, float, float]
    of_horizon: tuple[float, float, float]
    sentence: str
    warning: str


def exchange(law: Law, active: float, horizon: float) -> Rate:
    """2 ** (slope of log2 H / slope of log2 N). N: active and total parameters grow together where the law has both.

    Raises ConfigError where the law has no horizon or no size."""
    if law.form.measure == "none" or not law.form.sizes:
        raise ConfigError(f"no exchange rate in a law of {law.form}")
    h = float(law.scale.logs(law.form.measure, horizon))
    first = active if law.form.sizes[0] == "active" else float(total_of(law, active))
    n = float(law.scale.logs(law.form.sizes[0], first))

    def slopes(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bend = betas[:, law.slope("interaction")] if law.form.interaction else 0.0
        return sum(betas[:, law.slope(s)] for s in law.form.sizes) + bend * h, betas[:, law.slope(law.form.measure)] + bend * n

    (size,), (along,) = slopes(law.beta[None])
    drawn = {name: slopes(b) for name, b in law.draws.over.items()}
    of_size = (float(size), *horizon_bootstrap.interval({name: s for name, (s, _) in drawn.items()}))
    of_horizon = (float(along), *horizon_bootstrap.interval({name: a for name, (_, a) in drawn.items()}))
    bounded = of_size[1] > 0
    powers, unknown = {}, {}
    for name, (s, a) in drawn.items():
        powers[name] = np.where(s > 0, a / np.where(s > 0, s, 1.0), np.inf)  # without help from size no factor is enough
        unknown[name] = (s <= 0) & (a <= 0)
    with np.errstate(over="ignore"):  # a slope near 0 in some draw: infinite is what is meant
        low, high = (float(np.exp2(v)) for v in horizon_bootstrap.interval(powers, unknown=unknown))
        value = float(np.exp2(along / size)) if bounded else math.inf if along > 0 else math.nan
    outside = warning(law, active, horizon)
    found = Rate(active, horizon, value, low, high if bounded else math.inf, bounded, not outside, of_size, of_horizon, "", outside)
    return dataclasses.replace(found, sentence=_sentence(law, found))


def _times(factor: float) -> str:
    return f"{factor:.3g}" if factor < 1000 else "more than 1000"


def _sentence(law: Law, r: Rate) -> str:
    what = "effective feedback" if law.form.measure == "feedback" else "the horizon"
    unit = "of effective feedback" if law.form.measure == "feedback" else "tokens"
    place = f"At {r.active:.3g} active parameters and {r.horizon:.3g} {unit}"
    if r.bounded:
        text = f"{place} one doubling of {what} is worth {r.value:.3g} times the parameters (95 %: {r.low:.3g} to {_times(r.high)})"
    else:
        slope = "{:.2g} logits per doubling, 95 %: {:.2g} to {:.2g}".format(*r.of_size)
        text = f"{place} {without_size(r)} ({slope}): "
        text += f"no factor of parameters is {'' if r.of_size[2] < 0 else 'sure to be '}worth a doubling of {what}"
        text += f"; it would be {r.low:.3g} times or more" if 1 < r.low < math.inf else ""
    if r.of_horizon[1] <= 0 <= r.of_horizon[2]:
        text += f"; the effect of {what} cannot be told from none either" if not r.bounded else f"; that of {what} cannot be told from none"
    return f"{text}. {r.warning[0].upper()}{r.warning[1:]}." if r.warning else f"{text}."


def without_size(r: Rate) -> str:
    """Why a rate has no bound."""
    return "larger models do worse" if r.of_size[2] < 0 else "the effect of size cannot be told from none"


@dataclasses.dataclass(frozen=True)
class Iso:
    """Horizons that give a success, [M] each by size; inf where no horizon does. outside: flags of points beyond the grid."""

    target: float
    active: np.ndarray
    horizon: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray
    warning: str


def iso(law: Law, target: float, active: Any = None, steps: float | None = None, domain: str | None = None) -> Iso:
    """active: [M] sizes; None takes 25 from the smallest to the largest. low, high: 95 % interval of the horizon.

    Raises ConfigError for a target that is no success between 0 and 1."""
    if not 0 < target < 1:
        raise ConfigError(f"target success {target}: it must lie between 0 and 1, both excluded")
    n = np.geomspace(law.table.active.min(), law.table.active.max(), 25) if active is None else np.atleast_1d(np.asarray(active, float))
    base, slope, share = lines(law, n, total_of(law, n), steps, domain)
    known = law.scale.logs(law.form.measure, horizons(law))

    def solve(betas: np.ndarray) -> np.ndarray:
        """[K, M] log2 of the horizon, centred; -inf where less than the least that was looked at is enough."""
        at, along = base(betas), slope(betas)
        low = np.full(along.shape, known.min() - FAR)
        high = np.full(along.shape, known.max() + FAR)
        ends = [special.expit(at + (along * x)[:, :, None]) @ share for x in (low, high)]
        for _ in range(50):
            middle = (low + high) / 2
            more = special.expit(at + (along * middle)[:, :, None]) @ share < target
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        found = np.where(ends[1] < target, np.inf, np.where(ends[0] >= target, -np.inf, high))
        return np.where(along > 0, found, np.inf)

    drawn = {name: solve(b) for name, b in law.draws.over.items()}
    ends = [horizon_bootstrap.interval({name: d[:, m] for name, d in drawn.items()}) for m in range(len(n))]
    point, low, high = (law.scale.values(law.form.measure, x) for x in (solve(law.beta[None])[0], *zip(*ends, strict=True)))
    reached = np.isfinite(point) & (point > 0)
    outside = ~(reached & inside(law, n, np.where(reached, point, 1.0))) | (not asked(law, steps))
    text = f"extrapolated: {outside.sum()} of {len(n)} points lie outside the grid" if outside.any() else ""
    return Iso(target, n, point, low, high, outside, text)
