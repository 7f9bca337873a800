"""Differences to the unchanged value: paired by seed and task, counted by hand."""

import numpy as np
import pytest
from scipy import stats

from a1jax.analysis import ablation_differences, drawing
from a1jax.analysis.figures import rows as figure_rows
from a1jax.analysis.sweep import Cell, Sweep


def cell(value, seed, wins, ablation="routing", against="hard", unchanged=True, order=1):
    """wins: of ten tasks, the odd ones of domain b; each is found by its id, whatever the order."""
    tasks = [
        {"domain": "ab"[i % 2], "steps": 1 + i // 5, "task_id": str(i), "success": int(i in wins), "status": "", "tokens": 1}
        for i in range(10)
    ]
    axes = {"ablation": ablation, "value": value, "seed": seed}
    told = {"value": against, "unchanged": unchanged} if against else {}
    return Cell(f"{ablation}-{value}-{seed}", axes, {"total": 2, "active": 1}, {}, tuple(tasks[::order]), against=told)


def table(*cells):
    return ablation_differences.rows(Sweep("s", {}, cells))


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_of_three_seeds_the_interval_is_students_over_their_differences():
    hard = [cell("hard", 0, {0, 1}), cell("hard", 1, {0, 1}), cell("hard", 2, set())]
    other = [cell("soft", 0, {0, 2, 4}, order=-1), cell("soft", 1, {0, 1, 2, 4}), cell("soft", 2, {0, 2, 4})]  # +1, +2, +3 of ten
    found = table(*hard, *other)
    whole = only(found, domain="all domains")
    assert (whole["ablation"], whole["value"], whole["against"], whole["seeds"], whole["n"]) == ("routing", "soft", "hard", 3, 30)
    assert whole["interval"] == "over seeds" and whole["difference"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / 3**0.5  # of 0.1, 0.2, 0.3; two degrees of freedom
    assert (whole["low"], whole["high"]) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    of_a, of_b = (only(found, domain=d)["difference"] for d in "ab")
    assert (of_a, of_b) == pytest.approx(((2 + 2 + 3) / 15, (-1 + 0 + 0) / 15)) and len(found) == 3
    (said,) = ablation_differences.sentences(found)
    assert said == "routing: soft against hard: 20.0 points (95 %: -4.8 to 44.8); 3 seeds"


def test_seeds_that_only_one_of_the_two_has_are_left_out():
    found = table(cell("hard", 0, {0}), cell("hard", 1, set()), cell("soft", 1, {3}), cell("soft", 2, set(range(10))))
    row = only(found, domain="all domains")
    assert (row["seeds"], row["n"], row["difference"], row["interval"]) == (1, 10, 0.1, "over tasks")
    assert table(cell("soft", 0, {0})) == [] and table(cell("hard", 0, {0}), cell("soft", 1, {0})) == []
    assert table(cell("hard", 0, {0}, against=""), cell("soft", 0, {0}, against="")) == []  # does not say what it is compared with


def test_of_one_seed_the_interval_is_that_of_drawing_its_tasks_again():
    found = np.array([1] * 12 + [0] * 28)  # the number of ones in a draw is binomial
    expected = stats.binom.ppf((0.025, 0.975), 40, 0.3) / 40
    assert ablation_differences.bootstrap(found) == pytest.approx(tuple(expected)) and expected[0] > 0.1
    assert ablation_differences.bootstrap(-found) == pytest.approx(tuple(-expected[::-1]))
    both = np.array([1] * 20 + [-1] * 20)  # 2 * binomial - n
    assert ablation_differences.bootstrap(both) == pytest.approx((-0.3, 0.3))
    assert ablation_differences.bootstrap(np.zeros(5, int)) == (0.0, 0.0)
    (said,) = ablation_differences.sentences(table(cell("hard", 0, {0, 1}), cell("soft", 0, {0, 1})))
    assert said == "routing: soft against hard: 0.0 points, every pair of runs alike: no interval; one seed: without the luck of training"


def test_seeds_that_differ_alike_leave_the_spread_of_tasks():
    of_seed = np.array([1] * 2 + [0] * 18)
    found = ablation_differences.difference([of_seed] * 3)
    low, high = stats.binom.ppf((0.025, 0.975), 60, 0.1) / 60
    assert (found["low"], found["high"], found["interval"]) == (pytest.approx(low), pytest.approx(high), "over tasks")


def test_tasks_that_only_one_was_put_to_are_no_pairs():
    one, two = cell("hard", 0, {0, 1}), cell("soft", 0, {1})
    few = Cell(two.name, two.axes, two.parameters, {}, two.tasks[:4], against=two.against)
    row = only(table(one, few), domain="all domains")
    assert (row["n"], row["difference"]) == (4, -0.25)


def test_each_ablation_has_its_panel_and_says_what_it_is_compared_with():
    k = {"ablation": "k", "against": "8", "unchanged": False}
    cells = [cell("hard", 0, {0}), cell("soft", 0, {0, 1}), cell("8", 0, {0, 1}, **k), cell("32", 0, {0}, **k), cell("128", 0, {2}, **k)]
    found = table(*cells)
    drawn = ablation_differences.figure(found)
    assert [panel.title for panel in drawn.panels] == ["routing, against hard (n = 10)", "k, against 8 (n = 10)"]
    assert drawn.panels[1].labels == ("32", "128") and [bar.value for bar in drawn.panels[1].parts[""]] == [-0.1, -0.1]
    assert [(row["x"], row["value"]) for row in figure_rows(drawn)] == [("soft", 0.1), ("32", -0.1), ("128", -0.1)]
    assert drawing.draw(drawn).startswith("<?xml")
    said = ablation_differences.sentences(found)
    assert said[1].startswith("k: 32 against 8 (the first value, as none leaves the experiment as it is): -10.0 points (95 %: ")
