"""A sweep over size and horizon in a notebook: its cells, its figures with the fitted law in them, the exchange rate; and a made-up sweep
with a law that is known, to see what all of it looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import ConfigError
from . import horizon, horizon_plots, law_plots, sweep_page
from . import sweep as sweeps
from .shown import Markup, Several, Table, drawn, text
from .sweep import Cell, Sweep

SYNTHETIC = "SYNTHETIC: made up by a known law, measured nowhere"


def cells(found: Sweep) -> Table:
    """Every planned cell: its axes, what it was trained on, and success on held-out tasks pooled over lengths with its interval."""
    if not found.cells:
        return Table(found.name, ("cell", "state"), tuple((f.name, f"failed: {f.error}") for f in found.failed), "No cell is finished.")
    rows = [{k: v for k, v in row.items() if v not in ([], {}, "")} for row in sweep_page.cell_rows(found)]
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    note = f"{len(found.cells)} cells finished, {len(found.failed)} failed, {len(found.missing)} missing."
    return Table(found.name, columns, tuple(tuple(row.get(name) for name in columns) for row in rows), note)


def figures(found: Sweep) -> Several:
    """What was measured, with the fitted law's lines where it could be fitted."""
    _check(found)
    rows, fitted = horizon_plots.points(found), law_plots.fit(found)
    lines = {values: law_plots.isolines(law) for values, law in fitted.laws.items()}
    curves = {values: law_plots.curves(law, [row for row in rows if fitted.of(row) == values]) for values, law in fitted.laws.items()}
    return drawn(horizon_plots.figures(found, lines, curves))


def findings(found: Sweep) -> Markup:
    """What the sweep says, in sentences: the law, which measure of the horizon predicts better, exchange rate, where it stops, costs."""
    _check(found)
    fitted = law_plots.fit(found)
    return text("\n".join(horizon.summary(found) if fitted.laws else [f"No law: {line}" for line in fitted.refused]))


def _check(found: Sweep) -> None:
    if not found.cells or not horizon_plots.has_horizons(found.axes):
        raise ConfigError(f"{found.name}: no finished cells over size and horizon in it; `a1jax report` shows every sweep")


def exchange(found: Sweep) -> Several:
    """How many times the parameters a doubling of the horizon is worth: in the middle of the grid as a table, over the grid as a figure."""
    _check(found)
    fitted, rows = law_plots.fit(found), []
    for values, law in fitted.laws.items():
        part = horizon_plots.told(fitted.over, values) or found.name
        try:
            rate = horizon.exchange(law, *horizon.middle(law))
        except ConfigError as error:
            rows.append((part, str(law.form), None, None, None, str(error)))
            continue
        ends = (rate.value, rate.low, rate.high) if rate.bounded else (None, rate.low, None)
        rows.append((part, str(law.form), *ends, rate.warning or ("" if rate.bounded else horizon.without_size(rate))))
    columns = ("cells", "law in", "times the parameters", "low", "high", "note")
    table = Table(
        f"{found.name}: worth of one doubling of the horizon, in the grid's middle", columns, tuple(rows), "\n".join(fitted.refused)
    )
    figure = law_plots.exchange_rate(horizon_plots.points(found), fitted)
    return Several((table, *(drawn([figure]).parts if figure.panels else ())))


def made_up(
    rate: float = 1.7, of_size: float = 0.8, of_length: float = -0.9, seeds: Sequence[int] = (0, 1), of_each: int = 16, seed: int = 0
) -> Sweep:
    """A SYNTHETIC sweep, drawn from logit p = of_size * log2(N / 2^15) + of_size * log2(rate) * log2(H / 64) + of_length * log2(steps / 4):
    ``rate`` is what the exchange rate has to come out at. of_each: tasks of each length. The same seed gives the same sweep."""
    rng, made = np.random.default_rng(seed), []
    sizes, horizons, lengths = {f"n{2**k}k": 1024 * 2**k for k in (3, 4, 5, 6)}, (32, 64, 128, 256), (2, 4, 8)
    for size, active in sizes.items():
        for h in horizons:
            for number in seeds:
                by_size = of_size * (np.log2(active / 2**15) + np.log2(rate) * np.log2(h / 64))
                tasks = []
                for steps in lengths:
                    wins = rng.random(of_each) < 1 / (1 + np.exp(-by_size - of_length * np.log2(steps / 4)))
                    tasks += [
                        {"domain": "made up", "steps": steps, "task_id": f"{steps}-{i}", "success": int(win), "tokens": 24 * steps,
                         "status": "FINISHED" if win else "FAILED"}
                        for i, win in enumerate(wins)
                    ]  # fmt: skip
                train = {
                    "steps": 200,
                    "tokens": 1_000_000,
                    "flops": 6e6 * active,
                    "longest_piece": h,
                    "mean_piece": 0.8 * h,
                    "feedback": h / 32,
                }
                axes = {"size": size, "horizon": h, "seed": number}
                made.append(
                    Cell(f"{size}-{h}-{number}", axes, {"total": 3 * active, "active": active}, train, tuple(tasks), machine="made up")
                )
    return Sweep(SYNTHETIC, {"size": list(sizes), "horizon": list(horizons), "seed": list(seeds)}, tuple(made))


load = sweeps.load
