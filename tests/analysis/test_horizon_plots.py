"""Figures of a sweep hold the counts of its cells: made-up sweeps, counted again by hand."""

import matplotlib.pyplot as plt
import pytest

from a1jax.analysis import drawing, figures, horizon_plots
from a1jax.analysis.figures import Line
from a1jax.analysis.sweep import Cell, Sweep
from a1jax.stages.evaluate import wilson
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid, Law

GRID = Grid(sizes={"s": (30_000, 16_384), "m": (100_000, 32_768)}, horizons=(32, 128), budgets=("tokens", "flops"), of_each=2)


@pytest.fixture(scope="module")
def sweep():
    return synthetic_sweep.read(Law(), GRID)


def counted(sweep, keep, **axes):
    """(wins, n) of the runs that ``keep`` wants, of cells with these axes."""
    cells = [c for c in sweep.cells if all(c.axes[k] == v for k, v in axes.items())]
    runs = [t["success"] for c in cells for t in c.tasks if keep(t)]
    return sum(runs), len(runs)


def test_points_are_pooled_over_seeds_in_the_order_of_the_axes(sweep):
    rows = horizon_plots.points(sweep)
    assert [(r["size"], r["horizon"], r["budget"]) for r in rows[:3]] == [("s", 32, "tokens"), ("s", 32, "flops"), ("s", 128, "tokens")]
    wins, n = counted(sweep, lambda t: True, size="m", horizon=128, budget="flops")
    row = next(r for r in rows if (r["size"], r["horizon"], r["budget"]) == ("m", 128, "flops"))
    assert (row["wins"], row["n"], row["seeds"], row["active"]) == (wins, n, 3, 32_768) and n == 3 * 2 * 3 * 2
    assert (row["low"], row["high"]) == wilson(wins, n) and row["flops"] == 6.0 * 32_768 * 1_000_000 and row["train_steps"] == 200
    lengths = horizon_plots.points(sweep, "steps")
    assert len(lengths) == 3 * len(rows) and [r["steps"] for r in lengths[:3]] == [2, 4, 8]
    assert sum(r["n"] for r in lengths) == sum(r["n"] for r in rows) == sum(len(c.tasks) for c in sweep.cells)


def test_what_only_some_seeds_say_is_no_mean():
    cells = tuple(Cell(str(i), {"seed": i}, {"total": 2, "active": 1}, train, ()) for i, train in enumerate([{"a": 1, "b": 2}, {"a": 2}]))
    assert horizon_plots._means(cells) == {"a": 1.5}


def test_success_over_horizon_has_a_panel_per_budget_and_a_line_per_size(sweep):
    figure = horizon_plots.success_over_horizon(horizon_plots.points(sweep), ("budget",))
    assert [panel.title for panel in figure.panels] == ["budget tokens (n = 36)", "budget flops (n = 36)"]
    for panel, budget in zip(figure.panels, ("tokens", "flops"), strict=True):
        assert [line.label for line in panel.lines] == ["s (16.4K)", "m (32.8K)"] and "tokens" in panel.xlabel
        for line, size in zip(panel.lines, ("s", "m"), strict=True):
            found = [counted(sweep, lambda t: True, size=size, horizon=h, budget=budget) for h in (32, 128)]
            assert line.x == (32, 128) and line.y == tuple(w / n for w, n in found) and line.n == (36, 36)
            assert (line.low, line.high) == tuple(zip(*(wilson(w, n) for w, n in found), strict=True))
    drawn = drawing.build(figure)
    assert len(drawn.axes) == 2 and [t.get_text() for t in drawn.legends[0].texts] == ["s (16.4K)", "m (32.8K)"]
    measured = [line for line in drawn.axes[1].get_lines() if line.get_linestyle() == "-"]
    assert [tuple(line.get_ydata()) for line in measured] == [line.y for line in figure.panels[1].lines]
    plt.close(drawn)


def test_success_by_length_has_a_figure_per_budget_and_a_panel_per_size_or_horizon(sweep):
    rows = horizon_plots.points(sweep, "steps")
    tokens, flops = horizon_plots.success_by_length(rows, ("budget",))
    assert (tokens.name, flops.title) == ("success_by_length_tokens", "Success by task length, budget flops")
    assert [panel.title for panel in flops.panels] == ["size s (16.4K) (n = 12)", "size m (32.8K) (n = 12)"]
    line = flops.panels[1].lines[1]
    found = [counted(sweep, lambda t, s=s: t["steps"] == s, size="m", horizon=128, budget="flops") for s in (2, 4, 8)]
    assert line.label == "H = 128" and line.x == (2, 4, 8) and line.y == tuple(w / n for w, n in found)
    other = horizon_plots.success_by_length(rows, ("budget",), "horizon", "size")[1]
    assert [panel.title for panel in other.panels] == ["H = 32 (n = 12)", "H = 128 (n = 12)"] and other.panels[1].lines[1].y == line.y


def test_success_over_flops_leaves_out_what_all_costs_the_same(sweep):
    (panel,) = horizon_plots.success_over_flops(horizon_plots.points(sweep), ("budget",)).panels
    assert (
        panel.title.startswith("budget tokens")
        and "FLOPs" in panel.xlabel
        and [line.label for line in panel.lines] == ["H = 32", "H = 128"]
    )
    assert panel.lines[0].x == (6.0 * 16_384 * 1_000_000, 6.0 * 32_768 * 1_000_000)


def test_the_heat_map_has_every_point_and_nothing_where_there_is_none(sweep):
    rows = [r for r in horizon_plots.points(sweep) if not (r["size"], r["horizon"], r["budget"]) == ("m", 32, "tokens")]
    lines = {("flops",): (Line("50 %", (32.0, 64.0), (2e4, 1e4)), Line("50 %", (64.0, 256.0), (1e4, 5e3), dashed=True, named=False))}
    tokens, flops = horizon_plots.heat_map(rows, ("budget",), lines).panels
    by = {(r["budget"], r["size"], r["horizon"]): r["success"] for r in rows}
    assert tokens.x == (32, 128) and tokens.y == (16_384, 32_768) and tokens.yticks == ("s (16.4K)", "m (32.8K)")
    assert tokens.values == ((by["tokens", "s", 32], by["tokens", "s", 128]), (None, by["tokens", "m", 128]))
    assert tokens.n[1] == (None, 36) and tokens.extent is None and tokens.beyond == "" and tokens.isolines == ()
    assert flops.isolines == lines["flops",] and "extrapolated" in flops.beyond and flops.extent == ((16, 256), (8_192, 65_536))


def test_a_sweep_of_one_budget_and_one_seed_has_plain_titles():
    sweep = synthetic_sweep.read(Law(), Grid(sizes=GRID.sizes, horizons=(32,), seeds=(0,), domains=("search",), of_each=2))
    drawn = horizon_plots.figures(Sweep("s", {k: v for k, v in sweep.axes.items() if k != "budget"}, sweep.cells))
    assert [f.name for f in drawn] == ["success_over_horizon", "heat_map", "success_by_length", "success_over_flops"]
    assert drawn[0].panels[0].title == "all tasks (n = 6)" and "One seed." in drawn[0].caption
    for figure in drawn:
        assert all(row["n"] for row in figures.rows(figure))
        assert drawing.draw(figure).startswith("<?xml")
