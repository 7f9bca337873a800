"""What a notebook shows: on the page nothing is markup that was not meant to be, in a terminal columns stand below each other."""

import pytest
from rich.text import Text

from a1jax.analysis import shown
from a1jax.analysis.figures import Bars, Figure
from a1jax.config import ConfigError

TABLE = shown.Table("Sizes <b>", ("name", "n", "share"), (("a & b", 1200, 0.12345), ("c", None, None)), "a note")


def test_a_table_in_a_terminal():
    assert repr(TABLE).splitlines() == ["Sizes <b>", "name       n  share", "-------------------", "a & b  1,200  0.123", "c", "a note"]


def test_a_table_on_the_page_is_escaped():
    page = TABLE._repr_html_()
    assert "Sizes &lt;b&gt;" in page and "a &amp; b" in page and "<b>" not in page
    assert page.count("<tr>") == 3 and "text-align:right" in page and "1,200" in page


def test_cells_as_they_are_read():
    assert [shown.cell_text(c) for c in (None, True, False, 1234567, 0.00012345, "x")] == ["", "yes", "no", "1,234,567", "0.000123", "x"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="row 0 has 1 cells, there are 2 columns"):
        shown.Table("t", ("a", "b"), (("x",),))


def test_a_figure_is_an_image_and_numbers():
    figure = Figure("f", "Title", "Caption", (Bars("p", "y", ("a", "b"), {"one": (1.0, 2.0)}),))
    drawn = shown.Drawn(figure)
    assert 'src="data:image/svg+xml;base64,' in drawn._repr_html_() and "Caption" in drawn._repr_html_()
    assert "p,one,b,2.0" in repr(drawn)
    assert "Nothing to show" in shown.Drawn(Figure("f", "Title", "", ()))._repr_html_()


def test_printed_text_is_one_output_with_its_colours():
    made = shown.printed(lambda console: console.print(Text("<tag> it", "bold red")))
    assert made.plain == "<tag> it\n" and repr(made) == made.plain
    assert "&lt;tag&gt; it" in made.html and "<tag>" not in made.html and "font-weight: bold" in made.html


def test_several_are_shown_one_after_the_other():
    both = shown.Several((TABLE, shown.text("a < b")))
    assert both._repr_html_().index("Sizes") < both._repr_html_().index("a &lt; b")
    assert repr(both).endswith("a < b")
