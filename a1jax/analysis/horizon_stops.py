"""Where the trade stops: the horizon beyond which a size's success rises no more, and sizes that a longer horizon does not help at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from . import horizon_bootstrap
from .horizon_law import Law

LEVEL = 0.025  # one-sided: success rises beyond a horizon if at most this share of the draws says it does not


@dataclasses.dataclass(frozen=True)
class Stop:
    """Of one size. stop: the least horizon (tokens) beyond which success does not measurably rise; None: it still rises to the last.
    rises: False where the least horizon already is that one. success: horizon -> pooled success. longest: tokens of a solved run of the
    longest tasks, nan where none was solved. whole: a row of ``stop`` tokens holds such a run, and one of the next shorter horizon does
    not: the trade ends where tasks end. A stop says what could be measured: few runs hide a rise that many would show."""

    size: Any
    active: float
    stop: float | None
    rises: bool
    success: dict[float, float]
    longest: float
    whole: bool
    sentence: str


def stops(law: Law, steps: int | None = None, domain: str | None = None) -> list[Stop]:
    """One per size, in order of active parameters. steps, domain: of these tasks alone."""
    t = law.table
    groups = np.array([steps in (None, s) and domain in (None, d) for d, s in t.groups])
    longest = _longest(law, groups)
    drawn = {name: horizon_bootstrap.counts(t, w) for name, w in law.draws.weights.items()}
    shaped = {name: tuple(a.reshape(len(a), len(t.cells), -1)[:, :, groups].sum(2) for a in pair) for name, pair in drawn.items()}
    here = tuple(a[None, :, groups].sum(2) for a in t.counts)
    found = []
    for active in np.unique(t.active):
        mine = t.active == active
        grid = np.unique(t.tokens[mine])
        masks = [mine & (t.tokens == h) for h in grid]
        success = {float(h): float(v[0]) for h, v in zip(grid, _success(here, masks), strict=True)}
        stop = _stop(grid, masks, shaped) if len(grid) > 1 else None
        labels = {str(c.axes.get("size", f"{active:.3g}")) for c, m in zip(t.cells, mine, strict=True) if m}
        whole = stop is not None and stop >= longest and all(h < longest for h in grid[grid < stop])
        size = "/".join(sorted(labels))
        rises = len(grid) > 1 and stop != grid[0]
        text = _sentence(size, active, grid, stop, rises, success, longest, whole)
        found.append(Stop(size, float(active), stop, rises, success, longest, whole, text))
    return found


def _longest(law: Law, groups: np.ndarray) -> float:
    lengths = [length for length, chosen in zip(law.table.lengths, groups, strict=True) if chosen and not np.isnan(length)]
    return float(max(lengths)) if lengths else float("nan")


def _success(counts: tuple[np.ndarray, np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    """[B] success of the cells of each mask."""
    wins, n = counts
    return [wins[:, m].sum(1) / np.maximum(n[:, m].sum(1), 1e-9) for m in masks]


def _stop(grid: np.ndarray, masks: list[np.ndarray], drawn: dict[str, tuple[np.ndarray, np.ndarray]]) -> float | None:
    """The least horizon such that from it on no longer ones, taken together, have measurably more success."""
    rising = []
    for i in range(len(grid) - 1):
        beyond = np.any(masks[i + 1 :], axis=0)
        lows = []
        for counts in drawn.values():
            more, less = _success(counts, [beyond, masks[i]])
            lows.append(np.quantile(more - less, LEVEL))
        rising.append(bool(lows) and min(lows) > 0)
    if rising[-1]:
        return None
    last = max((i for i, r in enumerate(rising) if r), default=-1)
    return float(grid[last + 1])


def _sentence(
    size: str, active: float, grid: np.ndarray, stop: float | None, rises: bool, success: dict[float, float], longest: float, whole: bool
) -> str:
    ends = f"from {100 * success[grid[0]]:.0f} % at {grid[0]:g} tokens to {100 * success[grid[-1]]:.0f} % at {grid[-1]:g}"
    name = f"Size {size} ({active:.3g} active parameters)"
    if len(grid) < 2:
        return f"{name}: one horizon only, nothing to compare."
    if not rises:
        why = "; it may be too small to hold what a run needs" if success[grid[-1]] < 0.5 else "; little is left to gain"
        return f"{name}: success does not measurably rise with the horizon ({ends}){why}."
    if stop is None:
        return f"{name}: success still rises at the grid's end ({ends})."
    known = f"solved runs of the longest tasks take {longest:.0f}" if longest == longest else "no task was solved"
    where = "it ends where a row holds them whole" if whole else "that is not where a row begins to hold them whole"
    text = f"{name}: success rises measurably to a horizon of {stop:g} tokens, beyond it by no more than chance ({ends}); {known}"
    return f"{text}: {where}." if longest == longest else f"{text}."
