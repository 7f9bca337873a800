"""Sweeps made up by a known law, in the format of real ones: what the law's fit, the figures and the notebook are tested on.

    eta = intercept + active * log2(active parameters / 2 ** 15) + horizon * log2(H / 64) + length * log2(steps / 4)
          + interaction * (product of the first two logarithms) + spread of the cell + difficulty of the task

A task is solved with probability 1 / (1 + exp(-eta)). One doubling of the horizon is worth ``2 ** (horizon / active)`` times the
parameters at the law's centre, and everywhere where there is no interaction.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from a1jax.analysis import sweep

CENTRE = {"active": 2.0**15, "horizon": 64.0, "steps": 4.0}


@dataclasses.dataclass(frozen=True)
class Law:
    """cells: standard deviation of a cell's own eta (the luck of its training); tasks: of a task's, the same in all cells.
    by: what drives success, "tokens" (H) or "feedback" (a cell's train.feedback, scaled to H's place). saturates: log2(H) counts no
    further than at this many tokens."""

    intercept: float = 0.0
    active: float = 0.8
    horizon: float = 0.6
    length: float = -0.9
    interaction: float = 0.0
    cells: float = 0.0
    tasks: float = 0.0
    by: str = "tokens"
    saturates: float = math.inf

    @property
    def rate(self) -> float:
        """Times more parameters that one doubling of the horizon is worth at the centre."""
        return 2.0 ** (self.horizon / self.active) if self.active else math.inf

    def eta(self, active, horizon, steps):
        n = np.log2(np.asarray(active) / CENTRE["active"])
        h = np.log2(np.minimum(horizon, self.saturates) / CENTRE["horizon"])
        s = np.log2(np.asarray(steps) / CENTRE["steps"])
        return self.intercept + self.active * n + self.horizon * h + self.length * s + self.interaction * n * h


@dataclasses.dataclass(frozen=True)
class Grid:
    """sizes: name -> (total parameters, active ones). of_each: held-out tasks per domain and number of steps."""

    sizes: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=lambda: {"xs": (12_000, 8_192), "s": (30_000, 16_384), "m": (100_000, 32_768), "l": (220_000, 65_536)}
    )
    horizons: tuple[int, ...] = (32, 64, 128, 256)
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[str, ...] = ("tokens",)
    domains: tuple[str, ...] = ("search", "tool_calling")
    steps: tuple[int, ...] = (2, 4, 8)
    of_each: int = 8
    tokens_per_step: int = 24  # a run's length in tokens per step of its task

    @property
    def axes(self) -> dict[str, list[Any]]:
        return {"size": list(self.sizes), "horizon": list(self.horizons), "seed": list(self.seeds), "budget": list(self.budgets)}


SMALL = Grid(
    sizes={"s": (30_000, 16_384), "m": (100_000, 32_768), "l": (220_000, 65_536)},
    horizons=(32, 64, 128), domains=("search",), steps=(2, 4), of_each=12,
)  # fmt: skip


def cells(law: Law, grid: Grid, seed: int = 0) -> list[dict[str, Any]]:
    """Decoded cell.json of every cell of the grid; the same seed gives the same cells."""
    rng = np.random.default_rng(seed)
    places = [(d, s, i) for d in grid.domains for s in grid.steps for i in range(grid.of_each)]
    steps = np.array([s for _, s, _ in places])
    difficulty = law.tasks * rng.standard_normal(len(places))
    spread = grid.tokens_per_step * steps
    found = []
    for budget in grid.budgets:
        for size, (total, active) in grid.sizes.items():
            for horizon in grid.horizons:
                for number in grid.seeds:
                    feedback = horizon / 32 * math.exp(0.5 * rng.standard_normal())
                    eta = law.eta(active, horizon if law.by == "tokens" else 32 * feedback, steps) + difficulty
                    eta = eta + law.cells * rng.standard_normal()
                    wins = (rng.random(len(places)) < 1 / (1 + np.exp(-eta))).astype(int)
                    tokens = 1_000_000 if budget == "tokens" else int(1_000_000 * 32_768 / active)
                    tasks = [
                        {
                            "domain": d, "steps": s, "task_id": f"{d}-heldout-{s}-{i}", "success": int(win),
                            "status": "FINISHED" if win else "FAILED", "tokens": int(length),
                        }
                        for (d, s, i), win, length in zip(places, wins, spread, strict=True)
                    ]  # fmt: skip
                    found.append(
                        {
                            "format": sweep.CELL,
                            "name": f"{size}-{horizon}-{number}-{budget}",
                            "axes": {"size": size, "horizon": horizon, "seed": number, "budget": budget},
                            "parameters": {"total": total, "active": active},
                            "train": {
                                "steps": 200, "tokens": tokens, "flops": 6.0 * active * tokens, "longest_piece": horizon,
                                "mean_piece": 0.8 * horizon, "feedback": feedback,
                            },
                            "tasks": tasks,
                            "curves": {"train/loss": [[0, 4.0], [100, 2.0], [200, 1.0]]},
                            "seconds": {"train": 20.0, "evaluate": 5.0},
                            "machine": "made up",
                            "commit": "0000000",
                        }
                    )  # fmt: skip
    return found


def read(law: Law, grid: Grid, seed: int = 0) -> sweep.Sweep:
    """The sweep that ``load`` would read of ``write``'s folder, without the folder."""
    found = tuple(sweep.from_json(cell, cell["name"]) for cell in cells(law, grid, seed))
    return sweep.Sweep("made up", grid.axes, found)


def write(
    folder: pathlib.Path,
    law: Law | None = None,
    grid: Grid | None = None,
    seed: int = 0,
    missing: Iterable[str] = (),
    failed: Iterable[str] = (),
) -> pathlib.Path:
    """A sweep's folder; cells named ``missing`` are planned and not there, those named ``failed`` have a failed.json."""
    grid, missing, failed = grid or Grid(), set(missing), set(failed)
    every = cells(law or Law(), grid, seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [cell["name"] for cell in every]
    (folder / "sweep.json").write_text(json.dumps({"format": sweep.SWEEP, "name": folder.name, "axes": grid.axes, "cells": names}))
    for cell in every:
        if cell["name"] in missing:
            continue
        place = folder / "cells" / cell["name"]
        place.mkdir(parents=True, exist_ok=True)
        if cell["name"] in failed:
            error = {"name": cell["name"], "axes": cell["axes"], "error": "ValueError: loss is not finite at step 3", "traceback": "..."}
            (place / "failed.json").write_text(json.dumps(error))
        else:
            (place / "cell.json").write_text(json.dumps(cell))
    return folder
