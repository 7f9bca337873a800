"""Where the trade stops: the horizon beyond which a size's success rises no more, and sizes that a longer horizon does not help at all.

Success beyond a horizon is compared with success at it, one test a horizon, and it rises where the test says so by both of two spreads:

- of seeds (the luck of training): a cell's share of solved tasks less the mean of its grid point, pooled over the points compared, which
  all have the same success where nothing rises; Student's t, as three seeds a point leave few degrees of freedom. Resampled points of
  three seeds each say "rises" some three times too often, though stretched by t;
- of tasks: the difference over ``Law.draws``, the same draw of tasks for all cells.

Each test has LEVEL over the number of tests (Bonferroni): of sizes that no horizon helps, LEVEL at most are said to rise, if their seeds
differ alike at all horizons (where they differ four times as much at the least horizon, up to three times as many). Several sizes are
several such chances. A point of one seed or two has no spread of its own to speak of: then nothing is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from . import horizon_bootstrap
from .horizon_law import Law
from .sweep import Cell

LEVEL = 0.025  # one-sided, of all tests of a size together
FEWEST = 3  # seeds of a grid point from which on its spread is told
LEARNED = 0.5  # success from which on a size is not too small
FULL = 0.9  # and from which on little is left to gain


@dataclasses.dataclass(frozen=True)
class Stop:
    """Of one size. stop: the least horizon (tokens) beyond which success does not measurably rise; None: it still rises to the last, or
    ``rises`` is None. rises: False where the least horizon already is that one, None where it cannot be told. success: horizon -> pooled
    success. longest: tokens of a solved run of the longest tasks, nan where none was solved. whole: a row of ``stop`` tokens holds such a
    run, and one of the next shorter horizon does not: the trade ends where tasks end. A stop says what could be measured: few runs or
    seeds hide a rise that many would show."""

    size: Any
    active: float
    stop: float | None
    rises: bool | None
    success: dict[float, float]
    longest: float
    whole: bool
    sentence: str


def stops(law: Law, steps: int | None = None, domain: str | None = None, elsewhere: Sequence[Cell] = ()) -> list[Stop]:
    """One per size, in order of active parameters. steps, domain: of these tasks alone.

    elsewhere: the sweep's cells of other budgets and else alike: whether a size that fails here learns there."""
    t = law.table
    groups = np.array([steps in (None, s) and domain in (None, d) for d, s in t.groups])
    longest = _longest(law, groups)
    wins, n = (a[:, groups].sum(1) for a in t.counts)
    drawn = None
    if "tasks" in law.draws.weights:
        drawn = tuple(
            a.reshape(len(a), len(t.cells), -1)[:, :, groups].sum(2) for a in horizon_bootstrap.counts(t, law.draws.weights["tasks"])
        )
    of_tasks = np.bincount(t.group, minlength=len(t.groups))[groups]
    free_tasks = int(np.maximum(0, of_tasks - 1).sum())
    found = []
    for active in np.unique(t.active):
        mine = (t.active == active) & (n > 0)
        grid = np.unique(t.tokens[mine])
        masks = [mine & (t.tokens == h) for h in grid]
        success = {float(h): float(wins[m].sum() / n[m].sum()) for h, m in zip(grid, masks, strict=True)}
        seeds = [int(np.unique(t.points[m], return_counts=True)[1].min()) for m in masks]
        few = [float(h) for h, k in zip(grid, seeds, strict=True) if k < FEWEST]
        compared = len(grid) > 1 and not few
        stop = _stop(grid, masks, (wins, n), t.points, drawn, free_tasks) if compared else None
        rises = bool(stop != grid[0]) if compared else None
        labels = {str(c.axes.get("size", f"{active:.3g}")) for c, m in zip(t.cells, t.active == active, strict=True) if m}
        whole = stop is not None and stop >= longest and all(h < longest for h in grid[grid < stop])
        found.append(Stop("/".join(sorted(labels)), float(active), stop, rises, success, longest, whole, ""))
        learns = _learns(elsewhere, active, steps, domain) if rises is False else ""
        found[-1] = dataclasses.replace(found[-1], sentence=_sentence(found[-1], few, learns))
    return found


def _longest(law: Law, groups: np.ndarray) -> float:
    lengths = [length for length, chosen in zip(law.table.lengths, groups, strict=True) if chosen and not np.isnan(length)]
    return float(max(lengths)) if lengths else float("nan")


def _learns(cells: Sequence[Cell], active: float, steps: int | None, domain: str | None) -> str:
    """Where a size has LEARNED in other cells, and when most: "budget tokens (60 % at 190 tokens)"; "" for nowhere."""
    counts: dict[tuple[str, float], np.ndarray] = {}
    for cell in cells:
        mine = [t["success"] for t in cell.tasks if steps in (None, t["steps"]) and domain in (None, t["domain"])]
        horizon = cell.axes.get("horizon", cell.train.get("longest_piece"))
        if cell.parameters["active"] == active and mine and isinstance(horizon, (int, float)):
            key = f"budget {cell.axes.get('budget')}", float(horizon)
            counts[key] = counts.get(key, np.zeros(2)) + (sum(mine), len(mine))
    shares = {key: wins / n for key, (wins, n) in counts.items()}
    most = max(shares, key=shares.__getitem__, default=None)
    return f"{most[0]} ({100 * shares[most]:.0f} % at {most[1]:g} tokens)" if most and shares[most] >= LEARNED else ""


def _stop(
    grid: np.ndarray,
    masks: list[np.ndarray],
    counts: tuple[np.ndarray, np.ndarray],
    points: np.ndarray,
    drawn: tuple[np.ndarray, np.ndarray] | None,
    free_tasks: int,
) -> float | None:
    """The least horizon such that from it on no longer ones, taken together, have measurably more success; None: the last still has.

    counts: (wins, n), [C] each; drawn: the same over resampled tasks, [B, C]; free_tasks: degrees of freedom that tasks leave."""
    level = LEVEL / (len(grid) - 1)
    last = -1
    for i in range(len(grid) - 1):
        beyond = np.any(masks[i + 1 :], axis=0)
        spreads = [seeds_spread(*counts, points, beyond, masks[i])]
        if drawn is not None and free_tasks:
            spreads.append((float(np.std(gain(*drawn, beyond, masks[i]))), free_tasks))
        needed = max(stats.t.ppf(1 - level, free) * spread for spread, free in spreads)
        last = i if gain(*counts, beyond, masks[i]) > needed + 1e-12 else last
    return None if last == len(grid) - 2 else float(grid[last + 1])


def gain(wins: np.ndarray, n: np.ndarray, beyond: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Success of the cells ``beyond`` less that of those ``here`` (masks of C cells). wins, n: [..., C]."""
    shares = [wins[..., m].sum(-1) / np.maximum(n[..., m].sum(-1), 1e-9) for m in (beyond, here)]
    return shares[0] - shares[1]


def seeds_spread(wins: np.ndarray, n: np.ndarray, points: np.ndarray, beyond: np.ndarray, here: np.ndarray) -> tuple[float, int]:
    """(standard deviation of ``gain`` by the luck of training, its degrees of freedom): one variance of cells around the mean of their
    point for all of the points compared."""
    both = beyond | here
    shares, place = wins[both] / n[both], np.unique(points[both], return_inverse=True)[1]
    off = shares - (np.bincount(place, shares) / np.bincount(place))[place]
    free = len(off) - (place.max() + 1)
    weights = sum(((n[m] / n[m].sum()) ** 2).sum() for m in (beyond, here))
    return float(np.sqrt((off**2).sum() / free * weights)), int(free)


def _sentence(found: Stop, few: Sequence[float], learns: str) -> str:
    name = f"Size {found.size} ({found.active:.3g} active parameters)"
    if len(found.success) < 2:
        return f"{name}: one horizon only, nothing to compare."
    (first, least), *_, (last, most) = found.success.items()
    ends = f"from {100 * least:.0f} % at {first:g} tokens to {100 * most:.0f} % at {last:g}"
    if found.rises is None:
        of = "every horizon" if len(few) == len(found.success) else f"{', '.join(f'{h:g}' for h in few)} tokens"
        return f"{name}: fewer than {FEWEST} seeds at {of}: whether success rises with the horizon cannot be told ({ends})."
    if not found.rises:
        why = "; little is left to gain" if min(found.success.values()) >= FULL else ""
        if max(found.success.values()) < LEARNED:
            why = f"; it does learn with {learns}, so it is not too small" if learns else "; it may be too small or trained too little"
        return f"{name}: success does not measurably rise with the horizon ({ends}){why}."
    if found.stop is None:
        return f"{name}: success still rises at the grid's end ({ends})."
    text = f"{name}: success rises measurably to a horizon of {found.stop:g} tokens, beyond it by no more than chance ({ends}); "
    if np.isnan(found.longest):
        return f"{text}no task was solved."
    where = "it ends where a row holds them whole" if found.whole else "that is not where a row begins to hold them whole"
    return f"{text}solved runs of the longest tasks take {found.longest:.0f}: {where}."
