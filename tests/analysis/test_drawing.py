"""Figures are drawn from their values: what is asserted are matplotlib's artists."""

import contextlib

import matplotlib.pyplot as plt
import numpy as np
import pytest

from a1jax.analysis import drawing, figures
from a1jax.analysis.figures import Bars, Figure, Groups, Heat, Line, Panel, Rate


@contextlib.contextmanager
def drawn(*panels):
    """The axes of a figure of these panels, with all layout done."""
    figure = drawing.build(Figure("f", "F", "", panels))
    figure.draw_without_rendering()
    try:
        yield figure.axes
    finally:
        plt.close(figure)


MEASURED = Line("a", (32.0, 128.0), (0.25, 0.5), (0.2, 0.25), (0.5, 0.75), (40, 8))


def test_lines_have_their_values_intervals_and_colours_by_place():
    other = Line("b", (32.0, 128.0), (0.125, 0.25), place=5)
    fitted = Line("law", (32.0, 64.0, 128.0), (0.1, 0.2, 0.3), place=0, dashed=True, named=False)
    panel = Panel(
        "t", "H (tokens)", "success", (MEASURED, other, fitted), limits=(0, 1), whole=True, log_x=True, level=(0.5, "half"), note="so"
    )
    with drawn(panel) as (axis,):
        first, second, third = [line for line in axis.get_lines() if line.get_linestyle() in ("-", "--")]
        assert tuple(first.get_ydata()) == MEASURED.y and tuple(second.get_ydata()) == other.y and tuple(third.get_ydata()) == fitted.y
        np.testing.assert_allclose(
            np.asarray(first.get_xdata(), float), MEASURED.x, rtol=0.06
        )  # moved, so that intervals do not cover each other
        assert first.get_xdata()[0] < 0.98 * second.get_xdata()[0] and tuple(third.get_xdata()) == fitted.x
        assert (first.get_color(), second.get_color(), third.get_color()) == (drawing.COLOURS[0], drawing.COLOURS[5], drawing.COLOURS[0])
        (interval,) = axis.collections
        np.testing.assert_allclose([segment[:, 1] for segment in interval.get_segments()], [(0.2, 0.5), (0.25, 0.75)])
        assert [t.get_text() for t in axis.get_xticklabels()] == ["32", "128"] and axis.get_xscale() == "log"
        assert {t.get_text() for t in axis.texts} == {"half", "so"} and axis.get_ylim() == (0, 1)
        assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title("left")) == ("H (tokens)", "success", "t")


def test_one_legend_outside_where_panels_mean_the_same_and_one_in_each_where_not():
    two = tuple(Panel(t, "x", "y", (Line("a", (1, 2), (1, 2)), Line("b", (1, 2), (2, 3)))) for t in "pq")
    figure = drawing.build(Figure("f", "F", "", two))
    assert [t.get_text() for t in figure.legends[0].texts] == ["a", "b"] and all(axis.get_legend() is None for axis in figure.axes)
    plt.close(figure)
    other = Panel("r", "x", "y", (Line("c", (1, 2), (1, 2)), Line("b", (1, 2), (2, 3), place=4)))
    with drawn(two[0], other) as axes:
        assert [[t.get_text() for t in axis.get_legend().texts] for axis in axes] == [["a", "b"], ["c", "b"]]


def test_bars_side_by_side_have_heights_intervals_and_percents():
    rates = Rate(0.5, 0.25, 0.75, 8), Rate(0.25, 0.125, 0.5, 8)
    with drawn(Groups("g", "domain", "success", ("p", "q"), {"base": rates, "sft": (None, rates[0])})) as (axis,):
        base, sft = (c for c in axis.containers if hasattr(c, "patches"))
        assert [bar.get_height() for bar in base] == [0.5, 0.25] and [bar.get_height() for bar in sft] == [0.5]
        assert base[1].get_x() + base[1].get_width() == pytest.approx(sft[0].get_x()) and base[0].get_hatch() != sft[0].get_hatch()
        np.testing.assert_allclose(axis.collections[0].get_segments()[0][:, 1], (0.25, 0.75))
        assert [t.get_text() for t in axis.texts] == ["50", "25", "50"]
        assert [t.get_text() for t in axis.get_xticklabels()] == ["p", "q"] and axis.get_xlabel() == "domain"


def test_bars_of_differences_go_both_ways_from_zero():
    rates = Rate(0.125, -0.5, 0.75, 8), Rate(-0.25, -0.375, -0.125, 8)
    with drawn(Groups("g", "value", "difference", ("p", "q"), {"": rates}, signed=True)) as (axis,):
        (bars,) = (c for c in axis.containers if hasattr(c, "patches"))
        assert [bar.get_height() for bar in bars] == [0.125, -0.25] and axis.get_legend() is None
        low, high = axis.get_ylim()
        assert -0.8 < low < -0.5 and 0.75 < high < 1.0 and {t.get_text() for t in axis.texts} == {"+12.5", "-25.0"}
        assert [(0, 0)] == [
            tuple(line.get_ydata()) for line in axis.get_lines() if set(line.get_ydata()) == {0}
        ]  # the line of no difference


def test_stacked_bars_stand_on_each_other():
    with drawn(Bars("b", "share", ("m", "n"), {"FINISHED": (0.25, 1.0), "FAILED": (0.75, 0.0)})) as (axis,):
        assert [(bar.get_y(), bar.get_height()) for bar in axis.containers[1]] == [(0.25, 0.75), (1.0, 0.0)]


HEAT = Heat(
    "t", "H (tokens)", "parameters", "success", (32.0, 128.0), (1e4, 4e4), ((0.25, 0.5), (0.75, None)), ((8, 8), (4, None)), ("32", "128"),
    ("s (10K)", "m (40K)"), log=True, extent=((8.0, 512.0), (2.5e3, 1.6e5)), beyond="extrapolated",
    isolines=(Line("50 %", (32.0, 64.0), (4e4, 1e4)), Line("50 %", (64.0, 256.0), (1e4, 5e3), dashed=True, named=False)),
)  # fmt: skip


def test_heat_has_a_cell_for_each_value_with_n_and_isolines_in_the_same_coordinates():
    with drawn(HEAT) as (axis, bar):
        (mesh,) = (c for c in axis.collections if hasattr(c, "get_coordinates"))
        assert np.ma.filled(mesh.get_array(), -1).tolist() == [[0.25, 0.5], [0.75, -1]] and mesh.get_clim() == (0, 1)
        corners = mesh.get_coordinates()
        np.testing.assert_allclose(corners[0, :, 0], [16, 64, 256])  # geometric means between the centres
        np.testing.assert_allclose(corners[:, 0, 1], [5e3, 2e4, 8e4])
        assert [(tuple(line.get_xdata()), line.get_linestyle()) for line in axis.get_lines()] == [((32, 64), "-"), ((64, 256), "--")]
        texts = [t.get_text() for t in axis.texts]
        assert "25 %\nn = 8" in texts and "75 %\nn = 4" in texts and texts.count("50 %") == 1 and "extrapolated" in texts
        assert axis.get_xlim() == (8, 512) and bar.get_ylabel() == "success"
        assert [t.get_text() for t in axis.get_yticklabels()] == ["s (10K)", "m (40K)"]


def test_the_csv_of_groups_and_heat_has_what_is_drawn():
    groups = Groups("g", "x", "y", ("p", "q"), {"base": (Rate(1 / 3, 0.1, 0.5, 3), None)})
    table = figures.rows(Figure("f", "", "", (groups, HEAT, Panel("l", "x", "y", (MEASURED,)))))
    assert [tuple(row.values()) for row in table] == [
        ("g", "base", "p", 1 / 3, 0.1, 0.5, 3),
        ("t", "s (10K)", 32.0, 0.25, "", "", 8),
        ("t", "s (10K)", 128.0, 0.5, "", "", 8),
        ("t", "m (40K)", 32.0, 0.75, "", "", 4),
        ("t", "isoline 50 %", 32.0, 4e4, "", "", ""),
        ("t", "isoline 50 %", 64.0, 1e4, "", "", ""),
        ("t", "isoline 50 %", 64.0, 1e4, "", "", ""),
        ("t", "isoline 50 %", 256.0, 5e3, "", "", ""),
        ("l", "a", 32.0, 0.25, 0.2, 0.5, 40),
        ("l", "a", 128.0, 0.5, 0.25, 0.75, 8),
    ]


def test_numbers_on_ticks_are_short():
    assert [drawing.number(x) for x in (96, 8192, 16_384, 131_072, 1.2e6, 3.5e10, 2e12)] == [
        "96",
        "8192",
        "16.4K",
        "131K",
        "1.2M",
        "35B",
        "2T",
    ]


def test_no_two_colours_of_lines_are_near_for_the_colour_blind():
    """By lightness alone, as in print, or by what a deuteranope sees (Vienot et al. 1999, linear RGB): one of the two tells them apart."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in drawing.COLOURS])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    seen = linear @ np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).T
    for i, j in zip(*np.triu_indices(len(rgb), 1), strict=True):
        assert np.abs(seen[i] - seen[j]).max() > 0.05, (drawing.COLOURS[i], drawing.COLOURS[j])
