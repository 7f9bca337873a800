"""Where the trade stops: by hand, how often luck alone is taken for a rise, and what is said of few seeds and of other budgets."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from a1jax.analysis import horizon, horizon_stops
from a1jax.analysis.horizon import Form
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid, Law

NO_EFFECT = Law(active=0.0, horizon=0.0, cells=0.5)
HORIZONS = (32, 64, 128, 256, 512)


def law(of, grid, seed=0):
    return horizon.analyse(synthetic_sweep.read(of, grid, seed).cells, form=Form(), draws=20)


def many(seeds, count=40):
    """So many sizes, each a sweep over five horizons of its own; 184 held-out tasks."""
    sizes = {f"s{i:02}": (3000 + 30 * i, 1000 + i) for i in range(count)}
    return Grid(sizes=sizes, horizons=HORIZONS, seeds=tuple(range(seeds)), domains=("search",), steps=(2, 4), of_each=92)


def test_the_luck_of_training_is_seldom_taken_for_a_rise():
    """Without any effect, and half a logit of luck: 160 sizes, of which 4 are to be expected at 2.5 %; more than 10 come once in 400."""
    found = [stop for seed in range(4) for stop in horizon.stops(law(NO_EFFECT, many(3), seed))]
    rising = sum(stop.rises is True for stop in found)
    assert len(found) == 160 and all(stop.rises is not None for stop in found) and 1 <= rising <= 10, rising


def test_a_rise_is_found_through_the_luck_of_training():
    found = horizon.stops(law(dataclasses.replace(NO_EFFECT, horizon=1.0), many(3, 20), 1))
    assert sum(stop.rises is True for stop in found) >= 19


@pytest.mark.parametrize("seeds", [1, 2])
def test_of_fewer_than_three_seeds_nothing_is_said(seeds):
    found = horizon.stops(law(Law(horizon=2.0), Grid(seeds=tuple(range(seeds)))))
    assert {(stop.stop, stop.rises, stop.whole) for stop in found} == {(None, None, False)}
    assert all("fewer than 3 seeds at every horizon: whether success rises with the horizon cannot be told" in s.sentence for s in found)


def test_a_point_with_fewer_seeds_is_named_and_other_sizes_are_judged():
    cells = synthetic_sweep.read(Law(horizon=2.0), Grid(), 1).cells
    kept = [c for c in cells if not (c.axes["size"] == "m" and c.axes["horizon"] == 64 and c.axes["seed"] == 2)]
    found = {stop.size: stop for stop in horizon.stops(horizon.analyse(kept, form=Form(), draws=20))}
    assert found["m"].rises is None and "fewer than 3 seeds at 64 tokens: whether" in found["m"].sentence
    assert all(found[size].rises for size in ("xs", "s", "l"))


def test_the_spread_of_seeds_by_hand():
    """Shares 0.2, 0.4, 0.6 here, 0.5, 0.7, 0.9 beyond: squares off the means sum to 0.16 of 4 degrees, and 1/3 + 1/3 of that variance."""
    wins, n, points = np.array([2.0, 4, 6, 5, 7, 9, 1]), np.full(7, 10.0), np.array([5, 5, 5, 8, 8, 8, 9])
    here, beyond = points == 5, points == 8
    spread, free = horizon_stops.seeds_spread(wins, n, points, beyond, here)
    assert (spread, free) == (pytest.approx(math.sqrt(0.04 * 2 / 3)), 4)
    assert float(horizon_stops.gain(wins, n, beyond, here)) == pytest.approx(0.3)
    two_sided = stats.ttest_ind(wins[beyond] / 10, wins[here] / 10)  # of two points it is the t test
    assert 0.3 / spread == pytest.approx(two_sided.statistic) and free == two_sided.df


def of_budget(budget, intercept):
    """Cells of one size with equal training, success the same at every horizon."""
    cells = synthetic_sweep.read(Law(intercept=intercept, active=0.0, horizon=0.0), Grid(sizes={"s": (30_000, 16_384)}), 1).cells
    return [dataclasses.replace(c, name=f"{c.name}-{budget}", axes={**c.axes, "budget": budget, "arm": "consults"}) for c in cells]


def test_a_size_that_learns_at_another_budget_is_not_called_too_small():
    poor, rich = of_budget("flops", -3.0), of_budget("tokens", 2.0)
    here = horizon.analyse(poor, form=Form(), draws=20)
    (alone,), (beside,) = horizon.stops(here), horizon.stops(here, elsewhere=rich)
    assert alone.rises is False and alone.sentence.endswith("; it may be too small or trained too little.")
    most = max(horizon.stops(horizon.analyse(rich, form=Form(), draws=20))[0].success.items(), key=lambda pair: pair[1])
    told = f"{100 * most[1]:.0f} % at {most[0]:g} tokens"
    assert beside.sentence.endswith(f"; it does learn with budget tokens ({told}), so it is not too small.")
    assert horizon.stops(here, elsewhere=of_budget("tokens", -3.0))[0].sentence == alone.sentence
    other = [dataclasses.replace(c, parameters={"total": 9, "active": 9}) for c in rich]
    assert horizon.stops(here, elsewhere=other)[0].sentence == alone.sentence
    solvable = [dataclasses.replace(c, name=c.name + "x", axes={**c.axes, "arm": "solvable"}) for c in rich]
    for cells, wanted in (([*poor, *rich], True), ([*poor, *solvable], False)):
        found = synthetic_sweep.sweep.Sweep("s", {}, tuple(cells))
        said = [line for line in horizon.summary(found, draws=20) if line.startswith("[budget flops, arm consults] Size s")]
        assert len(said) == 1 and ("so it is not too small" in said[0]) is wanted
    full = horizon.stops(horizon.analyse(of_budget("tokens", 6.0), form=Form(), draws=20))
    assert full[0].sentence.endswith("; little is left to gain.")


@pytest.mark.parametrize(("of_each", "rises"), [(6, False), (120, True)])
def test_few_tasks_show_no_rise_however_alike_the_seeds(of_each, rises):
    """A sixth of the tasks solved at 32 tokens, another third at 64, by every seed alike."""

    def of(cell):
        share = {32: (0,), 64: (1, 2)}[cell.axes["horizon"]]
        return dataclasses.replace(cell, tasks=tuple({**t, "success": int(i % 6 in share)} for i, t in enumerate(cell.tasks)))

    grid = Grid(sizes={"s": (30_000, 16_384)}, horizons=(32, 64), domains=("search",), steps=(2,), of_each=of_each)
    made = [of(c) for c in synthetic_sweep.read(Law(), grid).cells]
    (stop,) = horizon.stops(horizon.analyse(made, form=Form(), draws=100))
    assert stop.success == {32.0: pytest.approx(1 / 6), 64.0: pytest.approx(1 / 3)} and stop.rises is rises
