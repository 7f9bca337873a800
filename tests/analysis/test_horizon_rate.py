"""The exchange rate and curves of equal success: by hand, on grids of a known law, and how often an interval holds what it should."""

import dataclasses
import math

import numpy as np
import pytest

from a1jax.analysis import horizon
from a1jax.analysis.horizon import Form
from a1jax.config import ConfigError
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import SMALL, Grid, Law


def cells(law=None, grid=None, seed=0):
    return synthetic_sweep.read(law or Law(), grid or Grid(), seed).cells


@pytest.fixture(scope="module")
def law():
    return horizon.analyse(cells(seed=1), draws=100)


# --- the exchange rate


def with_slopes(law, size, along, bend=0.0, spread=0.01):
    """The law with these slopes, exactly, and draws around them."""
    beta = np.array([0.0, 0.0, size, along, -0.9, bend])
    rng = np.random.default_rng(0)
    drawn = beta + spread * rng.standard_normal((400, 6))
    form = Form(("active",), "tokens", True)
    return dataclasses.replace(law, form=form, beta=beta, draws=dataclasses.replace(law.draws, over={"seeds": drawn}))


def test_the_rate_is_two_to_the_ratio_of_the_slopes(law):
    known = with_slopes(law, size=0.5, along=0.75)
    n, h = horizon.middle(known)
    got = horizon.exchange(known, n, h)
    assert got.value == pytest.approx(2**1.5) and got.bounded and got.inside and got.warning == ""
    assert got.low < got.value < got.high and got.of_size[0] == 0.5 and got.of_horizon[0] == 0.75
    assert "one doubling of the horizon is worth 2.83 times the parameters" in got.sentence
    # with a bend of 0.1 at one doubling more of each: slopes 0.6 and 0.85
    bent = horizon.exchange(with_slopes(law, 0.5, 0.75, 0.1), 2 * n, 2 * h)
    assert bent.value == pytest.approx(2 ** (0.85 / 0.6))


def test_the_rates_interval_is_that_of_the_ratio(law):
    """For small spreads the ratio's standard deviation is s / a * sqrt(1 + ratio ** 2): here 0.02 * sqrt(1 + 2.25)."""
    got = horizon.exchange(with_slopes(law, 0.5, 0.75, spread=0.01), *horizon.middle(law))
    half = 1.96 * 0.02 * math.sqrt(1 + 1.5**2)
    assert math.log2(got.low) == pytest.approx(1.5 - half, abs=0.02) and math.log2(got.high) == pytest.approx(1.5 + half, abs=0.02)


def test_where_size_does_not_help_the_rate_is_unbounded_and_says_so():
    got = horizon.exchange(horizon.analyse(cells(Law(active=0.0), seed=1), draws=200), 32_768, 64)
    assert not got.bounded and got.value == got.high == math.inf and 1 < got.low < math.inf
    assert got.of_size[1] <= 0 and "cannot be told from none" in got.sentence and "no factor of parameters is sure" in got.sentence
    worse = horizon.exchange(horizon.analyse(cells(Law(active=-0.8), seed=1), draws=200), 32_768, 64)
    assert not worse.bounded and worse.value == worse.low == worse.high == math.inf
    assert (
        "larger models do worse" in worse.sentence and "no factor of parameters is worth" in worse.sentence and "inf" not in worse.sentence
    )


def test_where_nothing_helps_there_is_no_rate():
    got = horizon.exchange(horizon.analyse(cells(Law(active=0.0, horizon=-0.5), seed=1), draws=200), 32_768, 64)
    assert not got.bounded and math.isnan(got.value) and (got.low, got.high) == (0.0, math.inf)


def test_where_the_horizon_does_not_help_a_doubling_is_worth_about_one():
    got = horizon.exchange(horizon.analyse(cells(Law(horizon=0.0), seed=1), draws=200), 32_768, 64)
    assert got.bounded and got.low < 1 < got.high < 1.5 and "that of the horizon cannot be told from none" in got.sentence


def test_one_size_or_one_horizon_gives_no_rate():
    one = horizon.analyse(cells(grid=dataclasses.replace(Grid(), sizes={"s": (30_000, 16_384)})), draws=50)
    got = horizon.exchange(one, 16_384, 64)
    assert not got.bounded and got.high == math.inf and got.inside
    flat = horizon.analyse(cells(grid=Grid(horizons=(64,))), draws=50)
    assert horizon.exchange(flat, 32_768, 64).value == pytest.approx(1, abs=1e-6)
    assert [s.sentence.split(": ")[1] for s in horizon.stops(flat)] == ["one horizon only, nothing to compare."] * 4


def covered(law, grid, count, first=0, draws=120, at=(32_768, 64)):
    """The share of sweeps whose interval holds the law's rate, the form chosen on held-out seeds each time."""
    hits = 0
    for seed in range(first, first + count):
        rate = horizon.exchange(horizon.analyse(cells(law, grid, seed), draws=draws, seed=seed), *at)
        hits += rate.low <= law.rate <= rate.high
    return hits / count


def test_intervals_hold_the_known_rate_as_often_as_they_say():
    assert 0.90 <= covered(Law(), SMALL, 100) <= 0.99


def test_intervals_hold_it_with_luck_in_training():
    """Of 40 sweeps 38 are to be expected, fewer than 34 once in 300. Without the draws of seeds it is 27. More grids: below, -m slow."""
    assert covered(Law(cells=0.5), Grid(domains=("search",), of_each=16), 40) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "grid"),
    [
        (Law(), SMALL),
        (Law(cells=0.5, tasks=1.0), SMALL),
        (Law(cells=0.5), Grid()),
        (Law(cells=0.5, tasks=0.5), Grid(seeds=(0, 1))),
        (Law(cells=0.5), Grid(seeds=(0,))),
        (Law(interaction=0.3, cells=0.3), Grid()),
    ],
)
def test_intervals_hold_it_on_many_grids_with_luck_in_training_and_hard_tasks(law, grid):
    """pytest -m slow; some minutes. Where luck outweighs chance on three seeds, 0.90 of 300 hold it (0.92 of 200 with the form given: which
    form is chosen is in no interval); that case is asked for 0.87."""
    lucky = law == Law(cells=0.5) and grid == Grid()
    assert (0.87 if lucky else 0.90) <= covered(law, grid, 300, draws=200) <= 0.99


# --- curves of equal success


def test_a_curve_of_equal_success_has_that_success(law):
    curve = horizon.iso(law, 0.5)
    assert len(curve.active) == 25 and (np.diff(curve.horizon) < 0).all()
    assert horizon.predict(law, curve.active, curve.horizon).success == pytest.approx(np.full(25, 0.5), abs=1e-6)
    assert ((curve.low < curve.horizon) & (curve.horizon < curve.high)).all()
    beyond = (curve.horizon < 32) | (curve.horizon > 256)
    assert (curve.outside == beyond).all() and beyond.any() and not beyond.all()
    assert curve.warning == f"extrapolated: {beyond.sum()} of 25 points lie outside the grid"


def test_a_curves_slope_is_the_exchange_rate(law):
    """Along a curve half the horizon takes as many times the parameters as the rate says, where there is no interaction."""
    plain = horizon.analyse(law.table.cells, form=Form(), draws=20)
    rate = horizon.exchange(plain, 20_000, 60).value
    curve = horizon.iso(plain, 0.5, [20_000, 20_000 * rate])
    assert curve.horizon[0] / curve.horizon[1] == pytest.approx(2, rel=1e-6)


def test_what_no_horizon_reaches_is_infinite():
    found = horizon.analyse(cells(Law(horizon=-0.5), seed=1), draws=50)
    curve = horizon.iso(found, 0.9, [16_384])
    assert curve.horizon[0] == curve.high[0] == math.inf and curve.outside[0]
    with pytest.raises(ConfigError, match="target success 1"):
        horizon.iso(found, 1.0)
