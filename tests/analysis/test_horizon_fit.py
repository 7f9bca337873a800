"""The law's table, fit, choice of form and bootstrap: values by hand, derivatives, and what resampling must give."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from a1jax.analysis import horizon_bootstrap, horizon_fit, sweep
from a1jax.analysis.horizon_fit import Form
from a1jax.config import ConfigError
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid, Law

NONE = np.zeros(2)


def test_two_rows_are_fitted_as_by_hand():
    """1 of 4 at x = -1 and 3 of 4 at x = +1: logits -ln 3 and ln 3, so no intercept and a slope of ln 3."""
    x, wins, n = np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([1.0, 3.0]), np.array([4.0, 4.0])
    beta = horizon_fit.fit(x, wins, n, NONE)
    assert beta == pytest.approx([0.0, math.log(3)], abs=1e-6)
    by_hand = -2 * (3 * math.log(0.75) + math.log(0.25))  # 4.4987
    assert by_hand == pytest.approx(4.4987, abs=1e-4)
    assert horizon_fit.loss(beta, x, wins, n, NONE)[0] == pytest.approx(by_hand)
    assert horizon_fit.log_likelihood(beta, x, wins, n) == pytest.approx(-by_hand)


def test_the_ridge_is_a_normal_prior():
    """Symmetric rows have the slope b with ridge * b = 2 * (3 - 4 sigmoid(b)); the solution for ridge 1 is 0.6835 (bisection by hand)."""
    x, wins, n = np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([1.0, 3.0]), np.array([4.0, 4.0])
    beta = horizon_fit.fit(x, wins, n, np.array([0.0, 1.0]))
    assert beta[1] == pytest.approx(2 * (3 - 4 * special.expit(beta[1])), abs=1e-6)
    assert beta[1] == pytest.approx(0.6835, abs=1e-3)
    apart = horizon_fit.fit(x, np.array([0.0, 4.0]), n, np.array([0.1, 0.1]))
    assert np.isfinite(apart).all() and 2 < apart[1] < 10  # separable: no end without the ridge


def test_gradient_and_curvature_are_derivatives():
    t = horizon_fit.table(synthetic_sweep.read(Law(interaction=0.2), Grid(), 3).cells)
    form = Form(("active", "total"), "feedback", True)
    at = horizon_fit.scale(t)
    x, ridge, (wins, n) = horizon_fit.rows(t, form, at), horizon_fit.penalties(form, at, t.domains), (a.ravel() for a in t.counts)
    beta = np.random.default_rng(0).standard_normal(x.shape[1])
    value, gradient = horizon_fit.loss(beta, x, wins, n, ridge)
    numeric = optimize.approx_fprime(beta, lambda b: horizon_fit.loss(b, x, wins, n, ridge)[0], 1e-6)
    assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-2) and np.abs(gradient).max() > 1
    along = optimize.approx_fprime(beta, lambda b: horizon_fit.loss(b, x, wins, n, ridge)[1] @ beta, 1e-6)
    assert horizon_fit.hessian(beta, x, n, ridge) @ beta == pytest.approx(along, rel=1e-3, abs=1e-2)


def test_a_table_counts_tasks_by_group_and_leaves_out_what_was_not_asked():
    def cell(seed, tasks):
        return sweep.Cell(f"c{seed}", {"size": "s", "horizon": 32, "seed": seed}, {"total": 20, "active": 10}, {}, tuple(tasks))

    def task(domain, steps, name, success, tokens=None):
        return {"domain": domain, "steps": steps, "task_id": name, "success": success, "tokens": tokens}

    first = cell(0, [task("search", 2, "a", 1, 40), task("search", 2, "b", 0, 90), task("general", 4, "c", 1, 70)])
    second = cell(1, [task("search", 2, "a", 1, 50), task("general", 4, "c", 0)])
    t = horizon_fit.table([first, second])
    assert t.groups == (("general", 4), ("search", 2)) and t.domains == ("general", "search")
    wins, n = t.counts
    assert wins.tolist() == [[1, 1], [0, 1]] and n.tolist() == [[1, 2], [1, 1]] and t.mix.tolist() == [0.4, 0.6]
    assert t.lengths.tolist() == [70, 45] and t.points.tolist() == [0, 0] and np.isnan(t.feedback).all()
    assert t.of(np.array([False, True])).counts[1].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda c: [], "no cells to fit"),
        (lambda c: [c[0], dataclasses.replace(c[0], name="again")], "another cell has the same axes"),
        (lambda c: [dataclasses.replace(c[0], axes={"size": "s", "horizon": "long"})], "its horizon is 'long'"),
        (lambda c: [dataclasses.replace(c[0], tasks=())], "no held-out tasks"),
        (lambda c: [dataclasses.replace(c[0], tasks=({**c[0].tasks[0], "steps": 0},))], "has 0 steps"),
    ],
)
def test_cells_that_cannot_be_fitted_are_refused_in_one_line(spoil, says):
    cells = synthetic_sweep.read(Law(), Grid(horizons=(32,), seeds=(0,))).cells
    with pytest.raises(ConfigError, match=says) as error:
        horizon_fit.table(spoil(cells))
    assert len(str(error.value).splitlines()) == 1


APART = {"a": (90_000, 8_192), "b": (30_000, 16_384), "c": (200_000, 16_384), "d": (40_000, 32_768), "e": (150_000, 65_536)}


@pytest.mark.parametrize(
    ("law", "form"),
    [
        (Law(), Form(("active",), "tokens")),
        (Law(interaction=0.4), Form(("active",), "tokens", True)),
        (Law(by="feedback"), Form(("active",), "feedback")),
    ],
)
def test_the_form_that_made_the_data_predicts_held_out_seeds_best(law, form):
    t = horizon_fit.table(synthetic_sweep.read(law, Grid(sizes=APART, of_each=20), 1).cells)
    scores, notes = horizon_fit.choose(t)
    best = {s.form: s.held_out for s in scores}
    assert notes == [] and len(scores) == 3 * 2 * 2 + 2 + 2
    # a size more, or a bend more, costs next to nothing on held-out runs; what is wrong costs much
    assert best[form] > scores[0].held_out - 0.001
    for wrong in (Form(("total",), form.measure, form.interaction), Form((), "tokens"), Form(("active",), "none")):
        assert best[wrong] < best[form] - 0.005 if wrong in best else True
    if form.interaction:
        assert best[Form(("active",), "tokens")] < best[form] - 0.003
    other = "tokens" if form.measure == "feedback" else "feedback"
    assert best[dataclasses.replace(form, measure=other)] < best[form] - 0.003


def test_a_held_out_score_is_that_of_a_fit_without_the_seed():
    t = horizon_fit.table(synthetic_sweep.read(Law(), Grid(seeds=(0, 1)), 1).cells)
    seeds = np.array(t.seeds)
    found = []
    for left_out in (0, 1):
        seen, unseen = t.of(seeds != left_out), t.of(seeds == left_out)
        at = horizon_fit.scale(seen)
        wins, n = (a.ravel() for a in seen.counts)
        beta = horizon_fit.fit(horizon_fit.rows(seen, Form(), at), wins, n, horizon_fit.penalties(Form(), at, t.domains))
        p = special.expit(horizon_fit.rows(unseen, Form(), at) @ beta).reshape(unseen.counts[0].shape)
        wins, n = unseen.counts
        found.append((wins * np.log(p) + (n - wins) * np.log(1 - p)).sum() / n.sum())
    got = horizon_fit.score(t, Form())
    assert got.by_fold == pytest.approx(found) and got.held_out == pytest.approx(np.mean(found))


def test_total_parameters_are_dropped_where_they_follow_the_active_ones_and_feedback_where_it_is_not_known():
    cells = synthetic_sweep.read(Law(), Grid(seeds=(0,))).cells
    cells = [dataclasses.replace(c, train={**c.train, "feedback": None}) if i == 3 else c for i, c in enumerate(cells)]
    found, notes = horizon_fit.forms(horizon_fit.table(cells))
    assert {f.sizes for f in found} == {("active",)} and {f.measure for f in found} == {"tokens"}
    assert "grow together" in notes[0] and "1 of 16 cells do not say" in notes[1]


def test_cells_without_any_feedback_have_a_logarithm_and_it_can_be_undone():
    cells = synthetic_sweep.read(Law(), Grid(horizons=(32, 64), seeds=(0,))).cells
    cells = [dataclasses.replace(c, train={**c.train, "feedback": f}) for c, f in zip(cells, [0, 0.4, 0.2, 1, 3, 1, 0, 2], strict=True)]
    t = horizon_fit.table(cells)
    at = horizon_fit.scale(t)
    assert t.offset == pytest.approx(0.1) == at.offset and at.centre["feedback"] == pytest.approx(np.log2(t.feedback + 0.1).mean())
    assert at.values("feedback", at.logs("feedback", t.feedback)) == pytest.approx(t.feedback)
    assert at.values("tokens", at.logs("tokens", [32, 64])) == pytest.approx([32, 64]) and at.logs("tokens", 64) == pytest.approx(0.5)
    assert horizon_fit.table(cells[1:4]).offset == 0.0
    assert np.isfinite(horizon_fit.score(t, Form(("active",), "feedback", True)).held_out)


# --- the bootstrap


def test_weights_have_the_mean_and_the_variance_of_a_sample():
    """Of k units each weight has mean 1 and variance 1, two of a stratum the covariance -1 / (k - 1), and each draw sums to k."""
    w = horizon_bootstrap.rao_wu(np.random.default_rng(0), np.array([0, 1, 0, 0, 1, 2]), 20_000)
    assert (w[:, [0, 2, 3]].sum(1) == pytest.approx(3)) and (w[:, [1, 4]].sum(1) == pytest.approx(2)) and (w[:, 5] == 1).all()
    cov = np.cov(w.T)
    assert np.diag(cov)[:5] == pytest.approx(1, abs=0.05)
    assert (
        cov[0, 2] == pytest.approx(-0.5, abs=0.05) and cov[1, 4] == pytest.approx(-1, abs=0.05) and cov[0, 1] == pytest.approx(0, abs=0.05)
    )
    assert w.mean(0) == pytest.approx(1, abs=0.03)


def test_few_seeds_are_stretched_as_students_t():
    pairs = np.repeat(np.arange(9), 2)  # 9 degrees of freedom: 2.2622 / 1.9600
    assert horizon_bootstrap.stretch(pairs) == pytest.approx(1.1542, abs=1e-4)
    assert horizon_bootstrap.stretch(np.repeat(0, 2000)) == pytest.approx(1, abs=1e-3)


def test_what_cells_are_told_by_costs_degrees_of_freedom():
    """16 cells, 3 coefficients: t of 13 degrees of freedom, 2.1604, over 1.9600, times the root of 15 / 13."""
    assert horizon_bootstrap.stretch(np.zeros(16), 3) == pytest.approx(2.1604 / 1.9600 * math.sqrt(15 / 13), abs=1e-3)


def test_weighted_counts_by_hand():
    t = horizon_fit.table(synthetic_sweep.read(Law(), Grid(horizons=(32,), seeds=(0, 1), of_each=2), 1).cells)
    rng = np.random.default_rng(1)
    cells, tasks = rng.integers(0, 3, (2, len(t.cells))), rng.integers(0, 3, (2, len(t.group)))
    wins, n = (a.reshape(2, len(t.cells), -1) for a in horizon_bootstrap.counts(t, (cells.astype(float), tasks.astype(float))))
    mine = t.group == 3
    assert wins[1, 2, 3] == cells[1, 2] * (tasks[1, mine] * t.success[2, mine]).sum()
    assert n[0, 5, 3] == cells[0, 5] * tasks[0, mine].sum()
    whole = horizon_bootstrap.counts(t, (np.ones((1, len(t.cells))), np.ones((1, len(t.group)))))
    assert whole[0][0] == pytest.approx(t.counts[0].ravel()) and whole[1][0] == pytest.approx(t.counts[1].ravel())


def test_refitting_many_at_once_is_fitting_each():
    t = horizon_fit.table(synthetic_sweep.read(Law(cells=0.5), Grid(), 2).cells)
    form, at = Form(("active",), "tokens", True), horizon_fit.scale(t)
    x, ridge = horizon_fit.rows(t, form, at), horizon_fit.penalties(form, at, t.domains)
    rng = np.random.default_rng(0)
    n = rng.integers(0, 9, (5, len(x))).astype(float)
    wins = np.floor(n * rng.random(n.shape) ** 2)
    wins[4] = 0  # nothing solved: far from the start, held by the ridge
    many = horizon_bootstrap.refit(x, wins, n, ridge, np.full(x.shape[1], 0.3))
    for one, w, m in zip(many, wins, n, strict=True):
        assert one == pytest.approx(horizon_fit.fit(x, w, m, ridge), abs=1e-4)


def test_an_interval_takes_the_wider_side():
    a, b = np.arange(1000) / 1000, np.arange(1000) / 500 - 0.5
    assert horizon_bootstrap.interval({"seeds": a}) == pytest.approx((0.025, 0.974))
    assert horizon_bootstrap.interval({"seeds": a, "tasks": b}) == pytest.approx((-0.45, 1.448))
    assert horizon_bootstrap.interval({}) == (-math.inf, math.inf)
    nothing = np.arange(1000) < 30
    assert horizon_bootstrap.interval({"seeds": a}, unknown={"seeds": nothing}) == (-math.inf, math.inf)


def test_draws_spread_as_the_luck_that_made_the_cells():
    """With much luck in training and many tasks, seeds' draws of a slope spread as slopes over sweeps made anew; tasks' draws do not."""
    grid = Grid(horizons=(32, 64, 128), steps=(4,), domains=("search",), of_each=30, seeds=(0, 1, 2, 3))
    found, over = [], {"seeds": [], "tasks": []}
    for seed in range(30):
        t = horizon_fit.table(synthetic_sweep.read(Law(cells=0.6), grid, seed).cells)
        at = horizon_fit.scale(t)
        wins, n = (a.ravel() for a in t.counts)
        beta = horizon_fit.fit(horizon_fit.rows(t, Form(), at), wins, n, horizon_fit.penalties(Form(), at, t.domains))
        found.append(beta[1])
        if seed < 6:
            drawn = horizon_bootstrap.draw(t, Form(), at, beta, 100, seed).over
            for name in over:
                over[name].append(drawn[name][:, 1].var())
    spread = np.std(found)
    assert 0.7 < math.sqrt(np.mean(over["seeds"])) / spread < 1.4
    assert math.sqrt(np.mean(over["tasks"])) / spread < 0.75


def test_slopes_are_stretched_by_the_freedom_that_their_points_leave_them():
    """What a cell moves the coefficients by, found by refitting with a little more weight on it; then Satterthwaite's formula in loops."""
    t = horizon_fit.table(synthetic_sweep.read(Law(cells=0.5), Grid(of_each=4), 3).cells)
    form, at = Form(), horizon_fit.scale(t)
    x, penalty = horizon_fit.rows(t, form, at), horizon_fit.penalties(form, at, t.domains, 1e-6)
    beta = horizon_fit.fit(x, *(a.ravel() for a in t.counts), penalty)
    heavier = np.ones((len(t.cells), len(t.cells))) + 1e-4 * np.eye(len(t.cells))
    again = horizon_bootstrap.refit(x, *horizon_bootstrap.counts(t, (heavier, np.ones((len(t.cells), len(t.group))))), penalty, beta)
    moved = (again - beta) / 1e-4
    for p, found in enumerate(horizon_bootstrap.stretch_of_slopes(t, x, beta, penalty)):
        each = [3 * np.var(moved[t.points == point, p], ddof=1) for point in np.unique(t.points)]
        free = sum(each) ** 2 / sum(v**2 / 2 for v in each)
        expected = max(horizon_bootstrap.stretch(t.points), stats.t.ppf(0.975, free) / 1.959964)
        assert 2 < free < 32 and found == pytest.approx(expected, rel=2e-3)
