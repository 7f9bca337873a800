"""Figures of sweeps over other axes: counted again by hand."""

import pytest

from a1jax.analysis import ablation_plots, drawing
from a1jax.analysis.sweep import Cell, Sweep
from a1jax.stages.evaluate import wilson

AXES = {"mode": ["salient", "tail", "full"], "k": [4, 16], "seed": [0, 1], "lr": [0.1]}


def sweep(axes=AXES, without=()):
    cells = []
    for mode in axes["mode"]:
        for k in axes.get("k", [4]):
            for seed in axes["seed"]:
                name = f"{mode}-{k}-{seed}"
                wins = len(mode) % 3 + (k == 16) + seed  # of 8
                tasks = tuple(
                    {"domain": "science" if i % 2 else "search", "steps": 1 + i // 4, "task_id": str(i), "success": int(i < wins)}
                    for i in range(8)
                )
                made = {"mode": mode, "k": k, "seed": seed, "lr": 0.1}
                cells.append(Cell(name, made, {"total": 2, "active": 1}, {}, tasks, {"kl": [[1, 0.5 + seed], [2, 0.25]]}))
    return Sweep("s", axes, tuple(c for c in cells if c.name not in without))


def test_bars_of_two_axes_stand_side_by_side_in_a_panel_per_domain():
    made = sweep(without=("tail-16-0", "tail-16-1", "full-4-1"))
    assert ablation_plots.settings(made) == ("mode", "k")
    bars, by_length, trained = ablation_plots.figures(made)
    assert [panel.title for panel in bars.panels] == ["all domains (n = 8 to 16)", "science (n = 4 to 8)", "search (n = 4 to 8)"]
    whole = bars.panels[0]
    assert whole.labels == ("salient", "tail", "full") and list(whole.parts) == ["k 4", "k 16"] and whole.xlabel == "mode"
    four, sixteen = whole.parts.values()
    assert four[0].value == (1 + 2) / 16 and (four[0].low, four[0].high) == wilson(3, 16)  # wins: 7 % 3, and one more of seed 1
    assert sixteen[0].value == 5 / 16 and sixteen[1] is None and four[2].n == 8
    assert [line.label for line in by_length.panels[0].lines][:2] == ["mode salient, k 4", "mode salient, k 16"]
    assert by_length.panels[0].lines[1].y == (5 / 8, 0.0) and by_length.panels[0].lines[1].x == (1, 2)
    kl = trained.panels[0].lines[0]
    assert (kl.label, kl.x, kl.y, kl.n) == ("mode salient, k 4", (1, 2), (1.0, 0.25), (2, 2)) and trained.panels[0].ylabel == "kl"
    for figure in (bars, by_length, trained):
        assert drawing.draw(figure).startswith("<?xml")


def test_a_third_axis_makes_figures_and_many_settings_make_panels():
    axes = {"seed": [0], "mode": ["salient", "tail"], "k": list(range(8)), "lr": [0.1, 0.2]}
    bars = ablation_plots.bars(ablation_plots.points(sweep(axes), "domain"), "mode", ("k",), ("lr",))
    assert [figure.name for figure in bars] == ["success_by_setting_0.1"] and bars[0].title.endswith("lr 0.1")
    rows = ablation_plots.points(sweep(axes), "steps")
    assert ablation_plots.panels(rows, ("mode", "k"), False) == (("mode",), ("k",))
    assert ablation_plots.panels(rows, ("mode",), False) == ((), ("mode",)) and not ablation_plots.nested(sweep(axes), ("mode", "k", "lr"))
    lengths = ablation_plots.by_length(rows, ("mode",), ("k",))
    assert [panel.title for panel in lengths.panels] == ["mode salient (n = 4)", "mode tail (n = 4)"]
    assert [line.label for line in lengths.panels[1].lines] == [f"k {k}" for k in range(8)]


def test_where_values_belong_to_one_ablation_each_every_ablation_has_its_figure():
    plan = {"stages": ["sft", "student"], "modes": ["salient", "full"], "writers": ["teacher"]}
    task = {"domain": "search", "steps": 1, "task_id": "a", "success": 1}
    cells = tuple(
        Cell(
            f"{a}-{v}", {"ablation": a, "value": v, "seed": 0}, {"total": 2, "active": 1}, {}, (task,), {f"{a}/loss": [[1, 2.0], [5, 0.01]]}
        )
        for a, values in plan.items()
        for v in values
    )
    axes = {"ablation": list(plan), "value": [v for values in plan.values() for v in values], "seed": [0]}
    drawn = ablation_plots.figures(Sweep("s", axes, cells))
    unfinished = Sweep("s", axes, cells[:1], (), tuple(c.name for c in cells[1:]))
    assert ablation_plots.nested(unfinished, ("ablation", "value"))  # by the plan, whatever is finished
    names = [f"success_by_setting_{a}" for a in plan] + ["success_by_length"] + [f"training_{a}_loss" for a in plan]
    assert [f.name for f in drawn] == names and drawn[0].title == "Success by value, ablation stages"
    assert drawn[0].panels[0].labels == ("sft", "student") and drawn[1].panels[0].labels == ("salient", "full")
    assert [panel.title for panel in drawn[3].panels] == [f"ablation {a} (n = 1)" for a in plan]
    assert [(line.label, line.place) for line in drawn[3].panels[1].lines] == [("value salient", 0), ("value full", 1)]
    assert [panel.title for panel in drawn[5].panels] == ["ablation modes (1 seed a line)"] and drawn[5].panels[0].log


@pytest.mark.parametrize(("axes", "expected"), [({"seed": [0, 1]}, ()), ({"mode": ["a"], "seed": [0]}, ("mode",))])
def test_the_settings_of_hardly_any_axes(axes, expected):
    assert ablation_plots.settings(Sweep("s", axes, ())) == expected
