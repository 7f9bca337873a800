"""Which tasks a teacher is trained on, from tries of the model it starts from (arXiv 2606.30616, section 4.2)."""

from __future__ import annotations

import numpy as np


def mixed_tasks(outcomes: np.ndarray) -> np.ndarray:
    """Indices of the tasks that the tries [tasks, tries] of 0 and 1 both solved and missed: the search teacher's filter, with 5 tries."""
    solved = np.asarray(outcomes) >= 1
    return np.flatnonzero(solved.any(1) & ~solved.all(1))


def near_misses(outcomes: np.ndarray, rubrics: np.ndarray, number: int) -> np.ndarray:
    """At most ``number`` indices: the tasks never solved, those first whose best try met the largest share of rubrics [tasks, tries]."""
    unsolved = np.flatnonzero(~(np.asarray(outcomes) >= 1).any(1))
    best = np.asarray(rubrics, np.float64)[unsolved].max(1, initial=0.0)
    return np.sort(unsolved[np.argsort(-best, kind="stable")][:number])
