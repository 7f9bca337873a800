"""The cells of the ablation of horizon against parameters: model size x training horizon x seed, for two budgets and two arms."""

from __future__ import annotations

import dataclasses

from ..config import bind
from ..data.pieces import Arm
from ..models import flops
from ..models.config import NAMED
from . import horizon_cell
from .horizon_cell import Budget, HorizonCell
from .sweep import Planned


def cells(
    base: HorizonCell,
    sizes: tuple[str, ...],
    horizons: tuple[int, ...],
    seeds: tuple[int, ...],
    budgets: tuple[Budget, ...] = ("tokens", "flops"),
    solvable: tuple[int, ...] = (),
    reference: str = "",
    reference_horizon: int = 0,
) -> list[Planned]:
    """Every size x horizon x seed x budget of consults, and for the budget "tokens" the horizons named by ``solvable`` once more with runs
    that fit whole only (the longest horizon needs none: nothing is cut there, nor the shortest where no run fits).

    base: what all cells have in common. reference, reference_horizon: of the budget "flops"; by default the middle ones.
    Seed by seed, so that a sweep that is stopped early has whole grids; the programs of all sizes stay compiled.
    """
    reference = reference or sizes[len(sizes) // 2]
    base = dataclasses.replace(base, reference=_model(base, reference), reference_horizon=reference_horizon or horizons[len(horizons) // 2])
    kinds: list[tuple[Arm, Budget, tuple[int, ...]]] = [("consults", budget, horizons) for budget in budgets]
    kinds += [("solvable", "tokens", solvable)] if solvable else []
    return [
        _planned(base, size, horizon, arm, budget, seed)
        for seed in seeds
        for size in sizes
        for arm, budget, several in kinds
        for horizon in several
    ]


def _model(base: HorizonCell, size: str):
    return NAMED[size](vocab_size=base.model.vocab_size)


def _planned(base: HorizonCell, size: str, horizon: int, arm: Arm, budget: Budget, seed: int) -> Planned:
    cell = dataclasses.replace(base, model=_model(base, size), horizon=horizon, arm=arm, budget=budget, seed=seed)
    axes = {"size": size, "horizon": horizon, "seed": seed, "budget": budget, "arm": arm}
    name = f"{size}-h{horizon}-{arm}-{budget}-s{seed}"
    each = flops.training(cell.model, horizon).model
    tokens = base.tokens if budget == "tokens" else base.tokens * flops.training(base.reference, horizon).model / each
    return Planned(name, axes, cell, bind(horizon_cell.run), tokens * (each + 1e6))  # what is not FLOPs costs as much as a million
