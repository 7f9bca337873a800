"""The law of a sweep: predictions, the exchange rate, curves of equal success, where the trade stops, costs; on grids of a known law."""

import dataclasses
import json
import math

import numpy as np
import pytest

from a1jax.analysis import horizon, horizon_fit, sweep
from a1jax.analysis.horizon import Form
from a1jax.config import ConfigError
from a1jax.models import config, flops
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid, Law

SMALL = Grid(
    sizes={"s": (30_000, 16_384), "m": (100_000, 32_768), "l": (220_000, 65_536)},
    horizons=(32, 64, 128), domains=("search",), steps=(2, 4), of_each=12,
)  # fmt: skip


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "grid"),
    [
        (Law(), SMALL),
        (Law(cells=0.5, tasks=1.0), SMALL),
        (Law(cells=0.5), Grid()),
        (Law(cells=0.5, tasks=0.5), Grid(seeds=(0, 1))),
        (Law(interaction=0.3, cells=0.3), Grid()),
    ],
)
def test_intervals_hold_it_on_many_grids_with_luck_in_training_and_hard_tasks(law, grid):
    """pytest -m slow; some minutes."""
    assert 0.90 <= covered(law, grid, 300, draws=200) <= 0.99


# --- units, missing cells, few cells


def test_units_of_size_and_horizon_change_nothing(law):
    thousand = [
        dataclasses.replace(
            c,
            parameters={k: 1000 * v for k, v in c.parameters.items()},
            axes={**c.axes, "horizon": 3 * c.axes["horizon"]},
        )
        for c in law.table.cells
    ]  # fmt: skip
    other = horizon.analyse(thousand, draws=100)
    a, b = horizon.exchange(law, 32_768, 64), horizon.exchange(other, 32_768_000, 192)
    assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), rel=1e-4)
    one, two = horizon.predict(law, 20_000, 50, 4), horizon.predict(other, 20_000_000, 150, 4)
    assert (two.success, two.low, two.high) == pytest.approx((one.success, one.low, one.high), abs=1e-4)
    assert [s.held_out for s in other.scores] == pytest.approx([s.held_out for s in law.scores], abs=1e-5)


def test_the_order_of_cells_changes_nothing(law):
    other = horizon.analyse(law.table.cells[::-1], draws=100)
    assert other.form == law.form and other.beta == pytest.approx(law.beta, abs=1e-4)


def test_missing_cells_are_no_obstacle_and_their_corner_is_outside():
    kept = [c for c in cells(seed=2) if not (c.axes["size"] == "l" and c.axes["horizon"] > 64)]
    found = horizon.analyse(kept, draws=100)
    rate = horizon.exchange(found, 32_768, 64)
    assert rate.low < Law().rate < rate.high
    corner = horizon.predict(found, 65_536, 256)
    assert not corner.inside and corner.warning == "extrapolated: no cells around that size and horizon together"
    assert horizon.predict(found, 65_536, 64).inside and horizon.predict(found, 32_768, 256).inside


def test_one_seed_is_said(law):
    found = horizon.analyse(cells(grid=Grid(seeds=(0,))), draws=50)
    assert any("one seed: intervals are over tasks alone" in note for note in found.notes) and set(found.draws.over) == {"tasks", "chance"}
    assert set(law.draws.over) == {"seeds", "tasks", "chance"} and not any("seed" in note for note in law.notes)
    rest = horizon.analyse([c for c in cells() if c.axes["seed"] == 0 or c.axes["size"] == "s"], draws=50)
    assert any("12 of 24 cells are their grid point's only seed" in note for note in rest.notes)


def test_one_cell_gives_a_law_that_knows_it_knows_nothing():
    found = horizon.analyse(cells()[:1], draws=50)
    assert any("one cell" in note for note in found.notes) and math.isnan(found.scores[0].held_out)
    assert not horizon.exchange(found, 8_192, 32).bounded and horizon.predict(found, 8_192, 32).inside


@pytest.mark.parametrize("outcome", [0, 1])
def test_all_runs_failed_or_all_solved(outcome):
    same = [dataclasses.replace(c, tasks=tuple({**t, "success": outcome} for t in c.tasks)) for c in cells(grid=SMALL)]
    found = horizon.analyse(same, draws=50)
    assert np.isfinite(found.beta).all() and abs(horizon.predict(found, 32_768, 64).success - outcome) < 0.05
    rate = horizon.exchange(found, 32_768, 64)
    assert not rate.bounded and rate.low < 0.5 and rate.high == math.inf  # resampling such runs finds the same each time


def test_budgets_taken_together_are_said():
    found = horizon.analyse(cells(grid=dataclasses.replace(SMALL, budgets=("tokens", "flops"))), draws=50)
    assert any("differ in budget are taken together" in note for note in found.notes)


# --- predictions


def test_predictions_are_near_the_law_and_in_the_shape_that_was_asked(law):
    got = horizon.predict(law, [[16_384], [65_536]], [32, 64, 128], steps=4, domain="search")
    true = 1 / (1 + np.exp(-Law().eta(np.array([[16_384], [65_536]]), np.array([32, 64, 128]), 4)))
    assert got.success.shape == got.inside.shape == (2, 3) and got.inside.all() and got.warning == ""
    assert np.abs(got.success - true).max() < 0.1 and ((got.low < got.success) & (got.success < got.high)).all()
    one = horizon.predict(law, 65_536, 128, steps=4, domain="search")
    assert isinstance(one.success, float) and one.inside is True and one.success == pytest.approx(got.success[1, 2])


def test_the_mix_is_the_mean_over_the_tasks_that_were_asked(law):
    each = [horizon.predict(law, 20_000, 50, s, d).success for d, s in law.table.groups]
    assert horizon.predict(law, 20_000, 50).success == pytest.approx(np.mean(each))
    assert horizon.predict(law, 20_000, 50, domain="search").success == pytest.approx(np.mean(each[:3]))


@pytest.mark.parametrize(
    ("active", "tokens", "steps", "says"),
    [
        (1e6, 64, None, "1e+06 active parameters is above the grid's 6.554e+04"),
        (5_000, 64, None, "5000 active parameters is below the grid's 8192"),
        (32_768, 16, None, "16 tokens is below the grid's 32"),
        (32_768, 1024, 9, "1024 tokens is above the grid's 256; 9 steps are outside the asked 2 to 8"),
        ([8_192, 1e6], 64, None, "1e+06 active parameters is above"),
    ],
)
def test_what_lies_outside_the_grid_is_said(law, active, tokens, steps, says):
    got = horizon.predict(law, active, tokens, steps)
    assert got.warning.startswith("extrapolated: ") and says in got.warning and not np.all(got.inside)
    if np.shape(active) == ():
        rate = horizon.exchange(law, active, tokens)
        assert not rate.inside and "Extrapolated" in rate.sentence


def test_the_grids_own_corners_are_inside(law):
    for active in (8_192, 65_536):
        for tokens in (32, 256):
            assert horizon.predict(law, active, tokens).inside


def test_total_parameters_go_along_with_active_ones(law):
    from a1jax.analysis.horizon_law import total_of

    assert total_of(law, [8_192, 65_536]) == pytest.approx([12_000, 220_000])
    assert float(total_of(law, 2**13.5)) == pytest.approx(math.sqrt(12_000 * 30_000))
    assert float(total_of(law, 2**17)) == pytest.approx(220_000 * 2.2)  # on along the last two sizes


def test_a_domain_that_was_not_asked_is_refused(law):
    with pytest.raises(ConfigError, match="domain 'sience'"):
        horizon.predict(law, 32_768, 64, domain="sience")


def test_feedback_can_be_the_measure():
    by = horizon.analyse(cells(Law(by="feedback"), Grid(of_each=20), 1), measure="best", draws=100)
    assert by.form.measure == "feedback" and horizon.better_measure(by)[0] == "feedback"
    assert "Effective feedback predicts success better, in all 3 folds" in horizon.better_measure(by)[1]
    rate = horizon.exchange(by, *horizon.middle(by))
    assert rate.value > 1 and "effective feedback" in rate.sentence and rate.inside
    tokens = horizon.analyse(cells(Law(), Grid(of_each=20), 1), draws=50)
    assert tokens.form.measure == "tokens" and horizon.better_measure(tokens)[0] == "tokens"
    with pytest.raises(ConfigError, match="costs need a law whose horizon is in tokens"):
        horizon.costs(by, 0.5)
    unknown = [dataclasses.replace(c, train={}) for c in cells(grid=SMALL)]
    with pytest.raises(ConfigError, match="measure 'feedback': 27 of 27 cells do not say"):
        horizon.analyse(unknown, measure="feedback")


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


# --- where the trade stops


def counted(success):
    """Cells with these shares of 60 tasks solved: (size, horizon) -> share, three seeds each; a solved run of 5 steps has 100 tokens."""
    found = []
    for (size, tokens), share in success.items():
        for seed in range(3):
            tasks = [
                {"domain": "search", "steps": 5, "task_id": str(i), "success": int((i * 7 + seed) % 60 < 60 * share), "tokens": 100}
                for i in range(60)
            ]
            active = {"s": 1000, "m": 2000, "l": 4000}[size]
            axes = {"size": size, "horizon": tokens, "seed": seed}
            found.append(sweep.Cell(f"{size}{tokens}{seed}", axes, {"total": 3 * active, "active": active}, {}, tuple(tasks)))
    return found


def test_where_the_trade_stops():
    shares = {"s": [0.1, 0.1, 0.1, 0.1], "m": [0.2, 0.4, 0.7, 0.7], "l": [0.3, 0.5, 0.7, 0.95]}
    success = {(size, h): share for size, row in shares.items() for h, share in zip((32, 64, 128, 256), row, strict=True)}
    small, middle, large = horizon.stops(horizon.analyse(counted(success), draws=200))
    assert (small.size, small.stop, small.rises) == ("s", 32.0, False) and "may be too small" in small.sentence
    assert (middle.stop, middle.rises, middle.whole, middle.longest) == (128.0, True, True, 100.0)
    assert "ends where a row holds them whole" in middle.sentence
    assert (large.stop, large.rises) == (None, True) and "still rises at the grid's end" in large.sentence
    assert middle.success == pytest.approx({32.0: 0.2, 64.0: 0.4, 128.0: 0.7, 256.0: 0.7})


def test_the_trade_can_stop_before_a_row_holds_the_longest_tasks():
    success = {("m", h): share for h, share in zip((16, 32, 64, 256), (0.1, 0.4, 0.8, 0.8), strict=True)}
    (stop,) = horizon.stops(horizon.analyse(counted(success), draws=200))
    assert stop.stop == 64.0 and not stop.whole and "not where a row begins to hold them whole" in stop.sentence


def test_a_law_that_saturates_stops_where_it_does():
    found = horizon.analyse(cells(Law(horizon=1.5, saturates=64.0), Grid(of_each=20), 1), draws=200)
    assert {s.stop for s in horizon.stops(found)} == {64.0}


# --- costs


def test_costs_by_hand(law):
    """6 N operations per token, a million tokens; a run of 2, 4 or 8 steps has 48, 96 or 192 tokens: 112 on average."""
    got = horizon.costs(law, 0.5)
    inner = [row for row in got.rows if row.inside]
    assert got.least_training == min(inner, key=lambda r: r.active) and got.least_serving == got.least_training
    for row in got.rows:
        assert row.train == pytest.approx(6 * row.active * 1e6, rel=1e-6) and row.serve == pytest.approx(2 * row.active * 112)
        assert row.inside == (row.warning == "") and horizon.predict(law, row.active, row.horizon).success == pytest.approx(0.5, abs=1e-6)
    assert not all(row.inside for row in got.rows) and "least training" in got.sentence


def test_costs_of_a_given_models_operations(law):
    """Where a long row costs more than a large model, the cheapest training is not the smallest model's."""

    def per_token(active, tokens):
        width = max(16, 16 * round(active / 8_192))
        cfg = dataclasses.replace(config.ModelConfig(), d_model=width, num_layers=4)
        return flops.training(cfg, max(1, round(tokens))).model + 40.0 * tokens**2

    got = horizon.costs(law, 0.5, per_token=per_token, tokens=1000.0, run_tokens=50.0)
    row = got.rows[10]
    assert row.train == pytest.approx(1000 * per_token(row.active, row.horizon)) and row.serve == pytest.approx(100 * row.active)
    assert got.least_training.active > got.least_serving.active


def test_a_success_that_the_grid_does_not_reach_has_no_cost():
    poor = horizon.analyse(cells(Law(intercept=-5.0), SMALL, 1), draws=50)
    got = horizon.costs(poor, 0.9)
    assert got.least_training is None and got.sentence == "No size and horizon inside the grid have a success of 90 %."
    with pytest.raises(ConfigError, match="its train says no tokens"):
        horizon.costs(horizon.analyse([dataclasses.replace(c, train={}) for c in cells(grid=SMALL)], draws=20), 0.5)


# --- all of it in sentences and rows


def test_a_sweep_in_sentences_and_rows(tmp_path):
    grid = dataclasses.replace(SMALL, budgets=("tokens", "flops"))
    folder = synthetic_sweep.write(tmp_path / "s", grid=grid, missing=["s-32-0-tokens"], failed=["l-64-1-flops"])
    found = sweep.load(folder)
    said = horizon.summary(found, draws=50)
    assert said[0] == "Sweep s: 52 cells finished, 1 failed, 1 missing."
    assert said[1] == "Failed: l-64-1-flops: ValueError: loss is not finite at step 3"
    for budget in ("tokens", "flops"):
        mine = [line for line in said if line.startswith(f"[budget {budget}] ")]
        assert any("one doubling of the horizon is worth" in line for line in mine) and sum("Size " in line for line in mine) == 3
        assert any("A success of 50 %" in line for line in mine) and any("over 26 cells and" in line for line in mine)
    assert all(len(line.splitlines()) == 1 for line in said)
    rows = horizon.rows(found, draws=50)
    assert len(rows) == 2 * 3 * 3 * 2 and json.dumps(rows)
    assert {key: rows[0][key] for key in ("size", "horizon", "budget", "domain", "steps", "active", "n", "inside")} == {
        "size": "s", "horizon": 32, "budget": "tokens", "domain": "search", "steps": 2, "active": 16_384, "n": 24, "inside": True,
    }  # fmt: skip
    assert all(row["law_low"] < row["law"] < row["law_high"] for row in rows) and sum(row["n"] for row in rows) == 52 * 24


def test_a_sweep_without_cells_says_so():
    assert horizon.summary(sweep.Sweep("empty", {}, (), missing=("a",))) == ["Sweep empty: 0 cells finished, 0 failed, 1 missing."]
    odd = sweep.Sweep("odd", {}, (dataclasses.replace(cells(grid=SMALL)[0], axes={"size": "s"}, train={}),))
    assert "No law: cell s-32-0-tokens: its horizon is None" in horizon.summary(odd)[1]
    assert "law" not in horizon.rows(odd)[0]


def test_the_law_has_the_best_form_of_its_measure(law):
    tokens = [s.form for s in law.scores if s.form.measure == "tokens" and s.form.sizes]
    assert law.form == tokens[0] and law.slope("tokens") == 3
    assert horizon_fit.rows(law.table, law.form, law.scale).shape[1] == len(law.beta)
