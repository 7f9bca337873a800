"""The law of a sweep: what may be asked of it, predictions, where the trade stops, costs, sentences and rows; on grids of a known law."""

import dataclasses
import json
import math

import numpy as np
import pytest

from a1jax.analysis import horizon, horizon_fit, sweep
from a1jax.analysis.horizon import Form, Score
from a1jax.analysis.horizon_law import total_of
from a1jax.config import ConfigError
from a1jax.models import config, flops
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import SMALL, Grid, Law


def cells(law=None, grid=None, seed=0):
    return synthetic_sweep.read(law or Law(), grid or Grid(), seed).cells


@pytest.fixture(scope="module")
def law():
    return horizon.analyse(cells(seed=1), draws=100)


# --- units, missing cells, few cells


def test_units_of_size_and_horizon_change_nothing(law):
    thousand = [
        dataclasses.replace(
            c,
            parameters={k: 1000 * v for k, v in c.parameters.items()},
            axes={**c.axes, "horizon": 3 * c.axes["horizon"]},
            tasks=tuple({**t, "tokens": 3 * t["tokens"]} for t in c.tasks),
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
    assert any("16 of 16 cells are their grid point's only seed: the luck of training is told from" in note for note in found.notes)
    assert set(found.draws.over) == {"cells", "tasks", "chance"} and set(found.draws.weights) == {"tasks"}
    assert set(law.draws.over) == {"seeds", "tasks", "chance"} and not any("seed" in note for note in law.notes)
    rest = horizon.analyse([c for c in cells() if c.axes["seed"] == 0 or c.axes["size"] == "s"], draws=50)
    assert any("12 of 24 cells are their grid point's only seed" in note for note in rest.notes) and "cells" in rest.draws.over
    few = horizon.analyse([c for c in cells() if c.axes["seed"] == 0 or c.axes["horizon"] > 32], draws=50)
    assert any("intervals hold too little of the luck" in note for note in few.notes) and "seeds" in few.draws.over


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
    assert total_of(law, [8_192, 65_536]) == pytest.approx([12_000, 220_000])
    assert float(total_of(law, 2**13.5)) == pytest.approx(math.sqrt(12_000 * 30_000))
    assert float(total_of(law, 2**17)) == pytest.approx(220_000 * 2.2)  # on along the last two sizes


def test_a_domain_that_was_not_asked_is_refused(law):
    with pytest.raises(ConfigError, match="domain 'sience'"):
        horizon.predict(law, 32_768, 64, domain="sience")


def test_feedback_can_be_the_measure():
    by = horizon.analyse(cells(Law(by="feedback"), Grid(of_each=20), 1), measure="best", draws=100)
    assert by.form.measure == "feedback" and horizon.better_measure(by)[0] == "feedback"
    assert "Effective feedback fits success over these horizons better, in all 3 folds" in horizon.better_measure(by)[1]
    assert "spacings" not in horizon.better_measure(by)[1]  # here every cell has its own feedback
    rate = horizon.exchange(by, *horizon.middle(by))
    assert rate.value > 1 and "effective feedback" in rate.sentence and rate.inside
    tokens = horizon.analyse(cells(Law(), Grid(of_each=20), 1), draws=50)
    assert tokens.form.measure == "tokens" and horizon.better_measure(tokens)[0] == "tokens"
    with pytest.raises(ConfigError, match="costs need a law whose horizon is in tokens"):
        horizon.costs(by, 0.5)
    unknown = [dataclasses.replace(c, train={}) for c in cells(grid=SMALL)]
    with pytest.raises(ConfigError, match="measure 'feedback': 27 of 27 cells do not say"):
        horizon.analyse(unknown, measure="feedback")


def test_of_a_feedback_that_follows_from_horizon_and_arm_it_is_said():
    """Real cells of one horizon differ in the last digits."""

    def of(cell, arm):
        feedback = 2.0 if arm == "solvable" else math.sqrt(cell.axes["horizon"] / 32) * (1 + 1e-13 * cell.axes["seed"])
        return dataclasses.replace(cell, axes={**cell.axes, "arm": arm}, train={**cell.train, "feedback": feedback})

    found = [of(c, arm) for arm in ("consults", "solvable") for c in cells(grid=SMALL, seed=1)]
    alone = [c for c in found if c.axes["arm"] == "consults"]
    clause = "; feedback follows from the horizon here, so two spacings of the same points are compared."
    for chosen in (alone, found):
        by = horizon.analyse(chosen, draws=5)
        assert horizon.better_measure(by)[1].endswith(clause)
        scores = (Score(Form(), -0.5, (-0.5, -0.5)), Score(Form(measure="feedback"), -0.6, (-0.4, -0.8)))
        unsure = horizon.better_measure(dataclasses.replace(by, scores=scores))
        assert unsure[0] is None and unsure[1].startswith("Neither measure fits") and unsure[1].endswith(f"tokens in 1 of 2{clause}")
    odd = [dataclasses.replace(c, train={**c.train, "feedback": 0.5}) if i == 4 else c for i, c in enumerate(alone)]
    assert "spacings" not in horizon.better_measure(horizon.analyse(odd, draws=5))[1]


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
    assert (small.size, small.stop, small.rises) == ("s", 32.0, False) and "it may be too small or trained too little" in small.sentence
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


def test_whether_the_horizon_counts_beyond_a_tasks_length():
    """Runs of 2 and 8 steps take 48 and 192 tokens; in the first law the horizon counts up to 48 for tasks of 2 steps."""
    grid = Grid(of_each=40, steps=(2,), horizons=(16, 32, 64, 128, 256))
    ends = horizon.analyse(cells(Law(horizon=1.2, saturates=48.0), grid, 1), draws=20)
    assert "counts only up to a task's length" in horizon.beyond_tasks(ends)
    goes_on = horizon.analyse(cells(Law(horizon=1.2), grid, 1), draws=20)
    assert "counts beyond a task's length" in horizon.beyond_tasks(goes_on)
    short = horizon.analyse(cells(Law(), Grid(horizons=(16, 32), steps=(8,)), 1), draws=20)
    assert "No horizon is longer than the tasks" in horizon.beyond_tasks(short)


def test_points_that_the_law_misses_are_counted(law):
    missed, points = horizon.misses(law)
    assert points == 4 * 4 * 6 and missed <= 10  # one in twenty, 5, is chance
    bent = horizon.analyse(cells(Law(horizon=2.0, saturates=64.0), Grid(of_each=40), 1), draws=20)
    assert horizon.misses(bent)[0] > 20


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


def test_the_more_is_served_the_smaller_the_cheapest_model():
    found = horizon.analyse(cells(seed=1), draws=20)
    got = horizon.costs(found, 0.5, per_token=lambda active, tokens: tokens**4, tokens=1.0)
    assert got.after(0) == got.least_training and got.after(1e30) == got.least_serving
    assert got.least_training.active > got.least_serving.active


def test_one_budget_of_operations_has_no_least_training():
    found = horizon.analyse(cells(grid=Grid(budgets=("flops",)), seed=1), draws=20)
    got = horizon.costs(found, 0.5)
    assert got.least_training is None and got.least_serving is not None and "training costs the same everywhere" in got.sentence


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


def supervised(cells, share):
    return [dataclasses.replace(c, train={**c.train, "supervised": share(c) * c.train["tokens"]}) for c in cells]


def test_how_many_targets_horizons_get_of_equal_tokens():
    """Of a million tokens 0.4 at 32, 0.5 at 64 and 0.45 at 128 are targets, 0.01 more in one seed of three at 32."""
    shares = {32: 0.4, 64: 0.5, 128: 0.45}
    made = supervised(cells(grid=SMALL), lambda c: shares[c.axes["horizon"]] + 0.01 * (c.axes["seed"] == 1) * (c.axes["horizon"] == 32))
    said = (
        "At equal tokens (1,000,000 a cell) the targets, tokens that the loss looks at, are fewest at H = 32, 403,333, and most at H = 64, "
    )
    assert horizon.targets(made) == said + "500,000 (means over the cells of a horizon)."
    assert horizon.targets(made) in horizon.summary(sweep.Sweep("s", {}, tuple(made)), draws=5)
    even = horizon.targets(supervised(made, lambda c: 0.5))
    assert even.endswith("are as many at every horizon, 500,000.")
    assert horizon.targets(cells(grid=SMALL)) == ""  # none says
    flops = supervised(cells(grid=dataclasses.replace(SMALL, budgets=("flops",))), lambda c: 0.5)
    assert horizon.targets(flops) == ""  # no equal tokens
    old = [
        dataclasses.replace(c, train={k: v for k, v in c.train.items() if k != "supervised"}) if i < 2 else c for i, c in enumerate(made)
    ]
    assert horizon.targets(old) == "2 of 27 cells do not say how many of their tokens were targets: horizons are not compared by them."


def test_the_summary_says_which_commits_and_machines_cells_are_from():
    made = cells(grid=SMALL)
    assert not any("come from" in line for line in horizon.summary(sweep.Sweep("s", {}, made), draws=5))
    mixed = [dataclasses.replace(c, commit="1234567890" if i < 5 else "") for i, c in enumerate(made)]
    said = horizon.summary(sweep.Sweep("s", {}, tuple(mixed)), draws=5)
    assert said[1] == "Cells come from 2 commits (22 of unknown; 5 of 1234567)."


def test_a_sweep_without_cells_says_so():
    assert horizon.summary(sweep.Sweep("empty", {}, (), missing=("a",))) == ["Sweep empty: 0 cells finished, 0 failed, 1 missing."]
    odd = sweep.Sweep("odd", {}, (dataclasses.replace(cells(grid=SMALL)[0], axes={"size": "s"}, train={}),))
    assert "No law: cell s-32-0-tokens: its horizon is None" in horizon.summary(odd)[1]
    assert "law" not in horizon.rows(odd)[0]


def test_the_law_has_the_best_form_of_its_measure(law):
    tokens = [s.form for s in law.scores if s.form.measure == "tokens" and s.form.sizes]
    assert law.form == tokens[0] and law.slope("tokens") == 3
    assert horizon_fit.rows(law.table, law.form, law.scale).shape[1] == len(law.beta)


def test_a_law_is_fitted_once_for_the_same_cells_and_again_for_others():
    made = cells(grid=Grid(of_each=4))
    law = horizon.analyse(made, draws=5)
    assert horizon.analyse(list(made), draws=5) is law and horizon.analyse(made, draws=6) is not law
    assert horizon.analyse(made[1:], draws=5) is not law and horizon.analyse(made[::-1], draws=5) is not law
    same = tuple(dataclasses.replace(cell) for cell in made)  # equal, but somebody might change one of them
    np.testing.assert_array_equal(horizon.analyse(same, draws=5).beta, law.beta)
