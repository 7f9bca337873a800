"""Which tasks are kept: by hand, and what holds for any results."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.rollout.selection import mixed_tasks, near_misses

OUTCOMES = [
    [0, 0, 0, 0],  # always fails, near: 0.75
    [0, 0, 0, 0],  # always fails, far: 0.25
    [1, 0, 0, 0],  # a failed try meets 0.8 on average
    [1, 1, 1, 0],  # too easy
    [1, 1, 1, 1],  # solved
    [1, 1, 0, 0],  # half, 0.75
]
RUBRICS = [
    [0.75, 0.75, 0.5, 1.0],
    [0.25, 0.25, 0.5, 0.0],
    [1.0, 0.8, 0.9, 0.7],
    [1.0, 1.0, 1.0, 0.9],
    [1.0, 1.0, 1.0, 1.0],
    [1.0, 1.0, 0.75, 0.75],
]


def test_near_misses_by_hand():
    assert near_misses(OUTCOMES, RUBRICS, 64).tolist() == [2, 0, 5]  # 0 and 5 tie at 0.75; 0 is the harder one
    assert near_misses(OUTCOMES, RUBRICS, 2).tolist() == [2, 0]
    assert near_misses(OUTCOMES, RUBRICS, 64, fraction=0.2).tolist() == [2, 0, 5, 1]
    assert near_misses(OUTCOMES, RUBRICS, 64, fraction=0.76).tolist() == [2]
    assert near_misses(OUTCOMES, RUBRICS, 64, success=(0.25, 0.5)).tolist() == [2, 5]
    assert near_misses(OUTCOMES, RUBRICS, 64, success=(0.0, 1.0)).tolist() == [3, 2, 0, 5]  # the solved one is never a miss
    assert near_misses(OUTCOMES, RUBRICS, 64, success=(0.0, 1.0), fraction=0.0).tolist() == [3, 2, 0, 5, 1]
    assert near_misses([[1, 0], [0, 0]], [[1, 0.75], [0.75, 0.75]], 9).tolist() == [1, 0]  # a tie: the harder one first
    assert near_misses([[0], [0]], [[0.5], [0.5]], 9).tolist() == [0, 1]
    assert near_misses(np.zeros((0, 3)), np.zeros((0, 3)), 64).tolist() == []


def test_mixed_tasks_by_hand():
    assert mixed_tasks(OUTCOMES, tries=4).tolist() == [2, 3, 5]
    assert mixed_tasks(OUTCOMES, tries=2).tolist() == [2]  # only the first two tries count
    assert mixed_tasks([[0, 0, 1], [0, 1, 1]], tries=2).tolist() == [1]
    assert mixed_tasks([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [True] * 5]).tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_chosen_is_hard_and_near_and_nothing_nearer_is_left_out(data):
    tasks, tries, number = (data.draw(st.integers(1, high)) for high in (8, 5, 8))
    cells = st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
    table = data.draw(st.lists(st.lists(cells, min_size=tries, max_size=tries), min_size=tasks, max_size=tasks))
    outcomes, rubrics = np.array([[c[0] for c in row] for row in table]), np.array([[c[1] for c in row] for row in table])
    chosen = near_misses(outcomes, rubrics, number)
    near = {t: np.mean([r for o, r in row if not o]) for t, row in enumerate(table) if not all(o for o, _ in row)}
    fit = {t: n for t, n in near.items() if n >= 0.5 and outcomes[t].mean() <= 0.5}
    assert len(chosen) == len(set(chosen)) == min(number, len(fit)) and set(chosen) <= set(fit)
    assert sorted((fit[t] for t in chosen), reverse=True) == [fit[t] for t in chosen] == sorted(fit.values(), reverse=True)[:number]
    if tries > 1:
        assert mixed_tasks(outcomes, tries).tolist() == [t for t in range(tasks) if len(set(outcomes[t].tolist())) == 2]


@pytest.mark.parametrize(
    ("outcomes", "rubrics", "number", "more", "message"),
    [
        ([0, 1], [0, 1], 4, {}, "must be \\[tasks, tries\\]"),
        ([[0, 0.5]], [[0, 0]], 4, {}, "0 or 1"),
        ([[0, np.nan]], [[0, 0]], 4, {}, "0 or 1"),
        ([[0, 1]], [[0, 0, 0]], 4, {}, "rubrics are \\(1, 3\\)"),
        ([[0, 1]], [[0, 1.5]], 4, {}, "outside"),
        ([[0, 1]], [[0, np.nan]], 4, {}, "outside"),
        ([[0, 1]], [[0, 1]], 0, {}, "number 0"),
        ([[0, 1]], [[0, 1]], 4, {"success": (0.6, 0.5)}, "out of range"),
        ([[0, 1]], [[0, 1]], 4, {"fraction": 2.0}, "out of range"),
    ],
)
def test_bad_numbers_are_refused(outcomes, rubrics, number, more, message):
    with pytest.raises(ConfigError, match=message):
        near_misses(outcomes, rubrics, number, **more)


def test_too_few_tries_are_refused():
    for tries in (1, 3):
        with pytest.raises(ConfigError, match="tries of 2"):
            mixed_tasks([[0, 1]], tries=tries)
