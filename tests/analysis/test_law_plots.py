"""The law's figures show what the law says: made-up sweeps, whose law is known."""

import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from a1jax.analysis import drawing, figures, horizon, horizon_plots, law_plots
from a1jax.analysis.law_plots import _pieces
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid, Law

GRID = Grid(horizons=(32, 64, 128), budgets=("tokens", "flops"), of_each=12)


@pytest.fixture(scope="module")
def made():
    """(sweep, what is fitted to it)"""
    sweep = synthetic_sweep.read(Law(cells=0.1, interaction=0.25), GRID)
    return sweep, law_plots.fit(sweep)


def test_each_part_of_a_sweep_has_its_own_law_or_one_line_why_not(made):
    sweep, fitted = made
    assert list(fitted.laws) == [("tokens",), ("flops",)] and fitted.refused == () and fitted.of({"budget": "flops"}) == ("flops",)
    assert {cell.axes["budget"] for cell in fitted.laws["flops",].table.cells} == {"flops"}
    one = law_plots.fit(synthetic_sweep.read(Law(), Grid(horizons=(32,), of_each=1)))
    assert one.laws == {} and one.refused == ("made up: a law needs cells of two sizes and two horizons",)


def test_isolines_are_where_the_law_predicts_that_success_and_dashed_outside_the_grid(made):
    law = made[1].laws["tokens",]
    lines = law_plots.isolines(law, (0.25, 0.5))
    assert {line.label for line in lines if line.named} == {"25 %", "50 %"} and sum(line.named for line in lines) == 2
    assert {line.dashed for line in lines} == {True, False}
    for line in lines:
        x, y = np.array(line.x), np.array(line.y)
        predicted = horizon.predict(law, y, x)
        np.testing.assert_allclose(predicted.success, float(line.label[:2]) / 100, atol=1e-6)
        assert (predicted.inside if not line.dashed else ~predicted.inside[1:-1]).all()
        assert x.min() >= 16 and x.max() <= 256 and y.min() >= 4_096 and y.max() <= 131_072 * (1 + 1e-9)


def test_a_line_is_cut_where_it_leaves_the_grid_by_hand():
    x = y = np.arange(7.0)
    outside = np.array([True, False, False, True, True, True, False])
    shown = np.array([True, True, True, True, False, True, True])
    found = _pieces("a", x, y, outside, shown)
    assert [(line.x, line.dashed, line.named) for line in found] == [
        ((0.0, 1.0), True, False), ((1.0, 2.0), False, True), ((2.0, 3.0), True, False), ((5.0, 6.0), True, False), ((6.0,), False, False),
    ]  # fmt: skip
    assert _pieces("a", x, y, outside, np.zeros(7, bool)) == []


def test_the_laws_curves_are_dashed_in_their_sizes_colours(made):
    sweep, fitted = made
    rows = [row for row in horizon_plots.points(sweep) if row["budget"] == "tokens"]
    curves = law_plots.curves(fitted.laws["tokens",], rows)
    figure = horizon_plots.success_over_horizon(rows, ("budget",), law={("tokens",): curves})
    lines = figure.panels[0].lines
    assert [line.label for line in lines[4:]] == [
        "xs (8192) by the law",
        "s (16.4K) by the law",
        "m (32.8K) by the law",
        "l (65.5K) by the law",
    ]
    assert [line.place for line in lines] == [0, 1, 2, 3] * 2 and all(line.dashed and not line.named for line in lines[4:])
    assert lines[5].x[0] == pytest.approx(32) and lines[5].x[-1] == pytest.approx(128) and len(lines[5].x) == 25
    assert lines[5].y[0] == pytest.approx(horizon.predict(fitted.laws["tokens",], 16_384, 32).success)
    drawn = drawing.build(figure)
    assert len(drawn.legends[0].texts) == 4
    plt.close(drawn)


def test_the_exchange_rate_is_the_laws_with_its_interval_and_unit(made):
    sweep, fitted = made
    figure = law_plots.exchange_rate(horizon_plots.points(sweep), fitted)
    assert [panel.title for panel in figure.panels] == ["budget tokens (36 cells)", "budget flops (36 cells)"]
    panel, law = figure.panels[0], fitted.laws["tokens",]
    assert law.form.interaction and panel.log and "times the parameters" in panel.ylabel and "tokens" in panel.xlabel
    assert panel.limits == figure.panels[1].limits and panel.level == (1.0, "worth nothing")
    line = next(line for line in panel.lines if line.label == "m (32.8K)")
    rates = [horizon.exchange(law, 32_768, h) for h in line.x]
    assert line.y == tuple(r.value for r in rates) and (line.low, line.high) == (tuple(r.low for r in rates), tuple(r.high for r in rates))
    assert len(figures.rows(figure)) == sum(len(line.x) for panel in figure.panels for line in panel.lines)
    drawn = drawing.build(figure)
    measured = [line for line in drawn.axes[0].get_lines() if line.get_linestyle() == "-"]
    assert [tuple(line.get_ydata()) for line in measured] == [line.y for line in panel.lines] and drawn.axes[0].get_yscale() == "log"
    plt.close(drawn)


def test_without_an_effect_of_size_there_is_no_rate_and_what_has_no_end_leaves_the_panel():
    sweep = synthetic_sweep.read(Law(active=0.0), Grid(horizons=(32, 128), seeds=(0, 1), of_each=4))
    figure = law_plots.exchange_rate(horizon_plots.points(sweep), law_plots.fit(sweep))
    assert figure.panels == () and figure.caption.endswith("size does not help there beyond doubt: all tasks.")
    line = figures.Line("a", (32.0, 64.0), (2.0, 3.0), (1.5, 2.0), (math.inf, 4.0))
    assert law_plots._limits([line]) == (0.8, 5.0)
    panel = figures.Panel("t", "x", "y", (line,), True, law_plots._limits([line]), whole=True, log_x=True)
    drawn = drawing.build(figures.Figure("f", "", "", (panel,)))
    drawn.draw_without_rendering()
    ends = [tuple(segment[:, 1]) for segment in drawn.axes[0].collections[0].get_segments()]
    assert ends[0][1] > 1e5 and ends[1] == (2.0, 4.0) and drawn.axes[0].get_ylim() == (0.8, 5.0)
    plt.close(drawn)


def test_rates_outside_the_grid_are_hollow_and_dashed_and_said():
    """The largest size is missing above 64 tokens: its rates at 128 and 256 are the law's alone."""
    sweep = synthetic_sweep.read(Law(interaction=0.3), Grid(of_each=12))
    kept = [c for c in sweep.cells if c.axes["size"] != "l" or c.axes["horizon"] <= 64]
    sweep = dataclasses.replace(sweep, cells=tuple(kept))
    fitted = law_plots.fit(sweep)
    figure = law_plots.exchange_rate(horizon_plots.points(sweep), fitted)
    (panel,) = figure.panels
    law = fitted.laws[()]
    assert law.form.interaction
    for line in panel.lines:
        active = {"xs": 8_192, "s": 16_384, "m": 32_768, "l": 65_536}[line.label.split()[0]]
        assert {horizon.exchange(law, active, h).inside for h in line.x} == {not line.hollow}
    ends = [(line.label, line.x, line.named, line.place) for line in panel.lines if line.label.startswith("l ")]
    assert ends == [("l (65.5K)", (32.0, 64.0), True, 3), ("l (65.5K), outside the grid", (128.0, 256.0), False, 3)]
    assert panel.note.endswith("hollow, dashed: 2 points outside the grid, extrapolated") and "extrapolated" in figure.caption
    assert [row["x"] for row in figures.rows(figure) if row["series"].endswith("outside the grid")] == [128, 256]
    drawn = drawing.build(figure)
    hollow = [line for line in drawn.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_markerfacecolor() for line in hollow] == ["white"] and hollow[0].get_marker() != "None"
    solid = next(line for line in drawn.axes[0].get_lines() if line.get_linestyle() == "-" and line.get_color() == hollow[0].get_color())
    assert hollow[0].get_xdata()[0] / solid.get_xdata()[0] == pytest.approx(4) and len(drawn.legends[0].texts) == 4
    assert any("outside the grid" in text.get_text() for text in drawn.axes[0].texts)
    plt.close(drawn)


def test_the_caption_names_all_that_an_interval_covers(made):
    sweep, fitted = made
    caption = law_plots.exchange_rate(horizon_plots.points(sweep), fitted).caption
    assert "widest of resampled seeds, resampled tasks and the chance of single runs (the fit's curvature);" in caption
    alone = synthetic_sweep.read(Law(), Grid(seeds=(0,)))
    caption = law_plots.exchange_rate(horizon_plots.points(alone), law_plots.fit(alone)).caption
    assert (
        "widest of resampled cells (where a point has few seeds), resampled tasks and the chance" in caption
        and "hollow" not in caption.lower()
    )
