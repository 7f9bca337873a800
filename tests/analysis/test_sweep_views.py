"""A sweep in a notebook: the made-up one says that it is, and its law is found again; one without a law says why."""

import dataclasses

import pytest

from a1jax.analysis import sweep_views
from a1jax.analysis.sweep import Failure, where


@pytest.fixture(scope="module")
def known():
    return sweep_views.made_up(1.7)


def test_made_up_says_so_and_is_always_the_same(known):
    assert known.name.startswith("SYNTHETIC") and known == sweep_views.made_up(1.7)
    assert all(cell.machine == "made up" for cell in known.cells)
    assert "SYNTHETIC" in sweep_views.cells(known)._repr_html_() and "SYNTHETIC" in repr(sweep_views.findings(known))


def test_the_rate_it_was_drawn_from_is_found_again(known):
    table, figure = sweep_views.exchange(known).parts
    ((_, _, value, low, high, note),) = table.rows
    assert low < 1.7 < high and 1.4 < value < 2.1 and note == ""
    assert figure.figure.panels and figure._repr_html_()


def test_two_cells_are_shown_and_have_no_law(known):
    few = dataclasses.replace(known, cells=where(known.cells, size="n8k", horizon=(32, 64), seed=0), missing=("n8k-128-0",))
    assert "2 cells finished, 0 failed, 1 missing" in sweep_views.cells(few).note
    (table,) = sweep_views.exchange(few).parts
    assert table.rows == () and "two sizes" in table.note
    assert "No law" in repr(sweep_views.findings(few)) and "<img" in sweep_views.figures(few)._repr_html_()


def test_a_sweep_without_a_finished_cell_says_why(known):
    none = dataclasses.replace(known, cells=(), failed=(Failure("n8k-32-0", {}, "ValueError: loss is not finite"),))
    assert sweep_views.cells(none).rows == (("n8k-32-0", "failed: ValueError: loss is not finite"),)
