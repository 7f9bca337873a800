"""Which tasks to train on, from the results of a few tries each: pure functions of arrays [tasks, tries]."""

from __future__ import annotations

import numpy as np

from ..config import ConfigError


def mixed_tasks(outcomes: np.ndarray, tries: int = 5) -> np.ndarray:
    """Indices of the tasks whose first ``tries`` tries were both right and wrong: the search teacher's filter (arXiv 2606.30616, 4.2).

    outcomes: [tasks, at least ``tries``], 1 where a try was accepted, else 0. Raises ConfigError for other shapes and values.
    """
    outcomes = _verdicts("mixed_tasks", outcomes)
    if tries < 2 or outcomes.shape[1] < tries:
        raise ConfigError(f"mixed_tasks: {tries} tries of {outcomes.shape[1]}; it takes at least 2, and as many as there are at most")
    right = outcomes[:, :tries].sum(axis=1)
    return np.flatnonzero((right > 0) & (right < tries))


def near_misses(
    outcomes: np.ndarray,
    rubrics: np.ndarray,
    number: int,
    *,
    success: tuple[float, float] = (0.0, 0.5),
    fraction: float = 0.5,
) -> np.ndarray:
    """Indices of at most ``number`` hard near-miss tasks, the nearest first (the tool-calling teacher's 64, arXiv 2606.30616, 4.2).

    outcomes: [tasks, tries], 1 where a try was accepted, else 0. rubrics: [tasks, tries], the fraction of rubrics a try met, in [0, 1].
    A task is hard when its share of right tries lies in ``success`` (both ends included) and some try failed; it is near when its failed
    tries met at least ``fraction`` of the rubrics on average. Sorted by that average, high first; ties: fewer right tries, then
    the lower index. The paper gives the number and no rule: the thresholds are ours. Fewer indices when fewer tasks qualify.
    Raises ConfigError for shapes that differ and numbers out of range.
    """
    outcomes, rubrics = _verdicts("near_misses", outcomes), np.asarray(rubrics, np.float64)
    if rubrics.shape != outcomes.shape:
        raise ConfigError(f"near_misses: rubrics are {rubrics.shape} and outcomes {outcomes.shape}; both are [tasks, tries]")
    if not np.all((rubrics >= 0) & (rubrics <= 1)):
        raise ConfigError("near_misses: a fraction of rubrics is outside [0, 1]")
    low, high = success
    if number < 1 or not 0 <= low <= high <= 1 or not 0 <= fraction <= 1:
        raise ConfigError(f"near_misses: number {number}, success {success}, fraction {fraction}: one is out of range")
    failed = 1.0 - outcomes
    rate, failures = outcomes.mean(axis=1), failed.sum(axis=1)
    nearness = (rubrics * failed).sum(axis=1) / np.maximum(failures, 1.0)
    chosen = np.flatnonzero((failures > 0) & (rate >= low) & (rate <= high) & (nearness >= fraction))
    order = np.lexsort((chosen, rate[chosen], -nearness[chosen]))
    return chosen[order][:number]


def _verdicts(where: str, outcomes: np.ndarray) -> np.ndarray:
    outcomes = np.asarray(outcomes, np.float64)
    if outcomes.ndim != 2 or outcomes.shape[1] < 1:
        raise ConfigError(f"{where}: outcomes are {outcomes.shape}; they must be [tasks, tries] with at least one try")
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise ConfigError(f"{where}: outcomes must be 0 or 1; leave tasks with aborted tries out")
    return outcomes
