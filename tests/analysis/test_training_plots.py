import math

from a1jax.analysis import training_plots
from a1jax.analysis.sweep import Cell, Sweep


def cell(size, h, seed, curve):
    return Cell(f"{size}-{h}-{seed}", {"size": size, "horizon": h, "seed": seed}, {"total": 2, "active": 1}, {}, (), curve)


def test_curves_are_means_over_seeds_with_one_colour_a_horizon_in_every_panel():
    cells = (
        cell("s", 32, 0, {"ce/loss": [[1, 4.0], [2, 2.0]]}),
        cell("s", 32, 1, {"ce/loss": [[1, 2.0], [2, math.nan], [3, 1.0]]}),
        cell("s", 64, 0, {"ce/loss": [[1, 3.0]]}),
        cell("m", 64, 0, {"ce/loss": [[1, 5.0]], "other": [[1, 0.0]]}),
    )
    loss, other = training_plots.figures(Sweep("s", {}, cells), ("size",), ("horizon",))
    assert (loss.name, other.name) == ("training_ce_loss", "training_other")
    assert [panel.title for panel in loss.panels] == ["size s (2 seeds a line)", "size m (1 seed a line)"]
    line = loss.panels[0].lines[0]
    assert (line.label, line.x, line.y, line.n) == ("horizon 32", (1, 2, 3), (3.0, 2.0, 1.0), (2, 1, 1))
    assert [line.place for line in loss.panels[0].lines] == [0, 1] and loss.panels[1].lines[0].place == 1
    assert loss.panels[0].ylabel == "ce/loss" and not loss.panels[0].log and not other.panels[0].log


def test_more_lines_than_can_be_told_apart_are_no_panel():
    many = tuple(cell("s", h, 0, {"a": [[1, 1.0]]}) for h in range(training_plots.MOST_LINES + 1))
    assert training_plots.figures(Sweep("s", {}, many), (), ("horizon",)) == []
    assert len(training_plots.figures(Sweep("s", {}, many[1:]), (), ("horizon",))[0].panels[0].lines) == training_plots.MOST_LINES
