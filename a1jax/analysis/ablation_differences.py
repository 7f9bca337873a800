"""What each value of an ablation gives: success less that of the value it is compared with, paired by seed and held-out task.

Which one that is a cell says itself ("against"): the value that leaves the experiment as it is, or the first where none does. Of a sweep
without the axes "ablation", "value" and "seed" alone there are no differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from .figures import Figure, Groups, Rate
from .horizon_plots import SEED, Row, counted, split
from .sweep import Cell, Sweep

AXES = {"ablation", "value", SEED}
ALL = "all domains"
DRAWS = 10_000
LEVEL = 0.95
HOW = (
    "Success on held-out tasks, paired: the same seed, the same tasks. Of several seeds a t interval over the seeds' differences, or a "
    "bootstrap over all their tasks where that is wider. Of one seed alone a bootstrap over its tasks: what another seed would change is "
    "not in it, and that is often more. At 95 %, one interval in twenty misses, also where nothing differs."
)


def rows(sweep: Sweep) -> list[Row]:
    """A row per value, other than the one compared with, and domain (ALL first), in the order of the cells: "ablation", "value", "against",
    "unchanged" (whether ``against`` leaves the experiment as it is), "domain", "difference", "low", "high" (shares from -1 to 1),
    "interval" ("over seeds", "over tasks"), "seeds", "n": pairs. Where no seed has both cells, or they share no task, there is none."""
    at = {(c.axes["ablation"], c.axes["value"], c.axes[SEED]): c for c in sweep.cells if set(c.axes) == AXES}
    pairs: dict[tuple[str, str], list[tuple[Cell, Cell]]] = {}
    for (ablation, value, seed), cell in at.items():
        other = at.get((ablation, cell.against["value"], seed)) if cell.against else None
        if other is not None and other is not cell:
            pairs.setdefault((ablation, value), []).append((cell, other))
    out = []
    for (ablation, value), found in pairs.items():
        row = {"ablation": ablation, "value": value, "against": found[0][1].axes["value"], "unchanged": found[0][0].against["unchanged"]}
        domains = list(dict.fromkeys(task["domain"] for cell, _ in found for task in cell.tasks))
        for domain in (ALL, *domains) if len(domains) > 1 else (ALL,):
            each = [d for d in (paired(*pair, domain) for pair in found) if len(d)]
            if each:
                out.append({**row, "domain": domain, **difference(each)})
    return out


def paired(cell: Cell, other: Cell, domain: str = ALL) -> np.ndarray:
    """[tasks] of -1, 0 and 1: success in one less that in the other, on the tasks that both were put to."""
    one, two = (
        {(t["domain"], t["steps"], t["task_id"]): t["success"] for t in c.tasks if domain in (ALL, t["domain"])} for c in (cell, other)
    )
    return np.array([one[key] - two[key] for key in one if key in two], int)


def difference(each: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean over seeds of the mean over tasks, and its interval at 95 %. each: of a seed, [tasks] of -1, 0 and 1."""
    means, over = np.array([d.mean() for d in each]), "over tasks"
    low, high = bootstrap(np.concatenate(each))
    if len(each) > 1:
        half = stats.t.ppf((1 + LEVEL) / 2, len(each) - 1) * means.std(ddof=1) / np.sqrt(len(each))
        if 2 * half > high - low:  # seeds that happen to be alike do not make it sure
            low, high, over = max(-1.0, means.mean() - half), min(1.0, means.mean() + half), "over seeds"
    ends = {"difference": float(means.mean()), "low": float(low), "high": float(high)}
    return {**ends, "interval": over, "seeds": len(each), "n": sum(map(len, each))}


def bootstrap(found: np.ndarray) -> tuple[float, float]:
    """The interval of the mean when tasks are drawn again with replacement; the same tasks give the same one. [tasks] of -1, 0 and 1, whose
    numbers in a draw are multinomial."""
    n = len(found)
    drawn = np.random.default_rng(0).multinomial(n, [np.mean(found == x) for x in (-1, 0, 1)], DRAWS)
    ends = np.quantile((drawn[:, 2] - drawn[:, 0]) / n, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), method="inverted_cdf")
    return float(ends[0]), float(ends[1])


def sentences(table: Sequence[Row]) -> list[str]:
    """Of all domains together: "routing: uniform against hard: -1.3 points (95 %: -4.0 to 1.2)"."""
    return [_sentence(row) for row in table if row["domain"] == ALL]


def _sentence(row: Row) -> str:
    first = "" if row["unchanged"] else " (the first value, as none leaves the experiment as it is)"
    ends = f"{_points(row['difference'])} points (95 %: {_points(row['low'])} to {_points(row['high'])})"
    if row["low"] == row["high"]:
        ends = f"{_points(row['difference'])} points, every pair of runs alike: no interval"
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "one seed: without the luck of training"
    return f"{row['ablation']}: {row['value']} against {row['against']}{first}: {ends}; {seeds}"


def _points(share: float) -> str:
    return f"{100 * share:.1f}".replace("-0.0", "0.0")


def figure(table: Sequence[Row]) -> Figure:
    """A panel per ablation: the differences of its values over all domains, in the order of the table."""
    panels = []
    for (ablation, against), mine in split([row for row in table if row["domain"] == ALL], "ablation", "against").items():
        bars = tuple(Rate(row["difference"], row["low"], row["high"], row["n"]) for row in mine)
        title = f"{ablation}, against {against} ({counted(mine)})"
        panels.append(Groups(title, ablation, "difference in success", tuple(row["value"] for row in mine), {"": bars}, signed=True))
    caption = f"Points above the bars; n: pairs of runs. {HOW} By domain: differences.csv."
    return Figure("difference_by_ablation", "What each value gives", caption, tuple(panels))
