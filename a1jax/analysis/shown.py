"""What a notebook shows: tables, figures, text and markup, each with a form for the page and a plain one for the terminal."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from ..config import ConfigError
from . import drawing, figures

WIDTH = 110  # columns of printed text
CELL, HEAD = "padding:2px 10px;border-bottom:1px solid #d0d7de", "padding:3px 10px;border-bottom:2px solid #57606a"
PRINTED = '<pre style="line-height:1.35;white-space:pre-wrap;overflow-wrap:anywhere"><code>{code}</code></pre>'


@dataclasses.dataclass(frozen=True)
class Table:
    """rows of as many cells as there are columns; numbers stand to the right, floats with three digits, None as an empty cell. note: a
    sentence below. Raises ConfigError for a row of another length."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(f"table '{self.title}': row {i} has {len(row)} cells, there are {len(self.columns)} columns")

    def texts(self) -> list[list[str]]:
        """Header and rows as they are read."""
        return [list(self.columns), *([cell_text(cell) for cell in row] for row in self.rows)]

    def __repr__(self) -> str:
        cells, right = self.texts(), self._right()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip() for row in cells]
        return "\n".join(filter(None, (self.title, lines[0], "-" * len(lines[0]), *lines[1:], self.note)))

    def _repr_html_(self) -> str:
        head, *body = self.texts()
        sides = ["right" if r else "left" for r in self._right()]
        rows = [_row("th", head, sides, HEAD), *(_row("td", row, sides, CELL) for row in body)]
        return f'{_title(self.title)}<table style="border-collapse:collapse">{"".join(rows)}</table>{_note(self.note)}'

    def _right(self) -> list[bool]:
        """Whether a column holds numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [any(isinstance(c, int | float) for c in column) and not any(isinstance(c, str) for c in column) for column in columns]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure on the page, its heading above and its caption below; in a terminal its numbers."""

    figure: figures.Figure

    def __repr__(self) -> str:
        return f"{self.figure.title}\n{figures.to_csv(figures.rows(self.figure))}{self.figure.caption}"

    def _repr_html_(self) -> str:
        if not self.figure.panels:
            return f"{_title(self.figure.title)}{_note(self.figure.caption or 'Nothing to show.')}"
        # As an image: inside one, a figure's names cannot meet another's.
        data = base64.b64encode(drawing.draw(self.figure).encode()).decode()
        image = f'<img style="max-width:100%;background:white" src="data:image/svg+xml;base64,{data}">'
        return f"{_title(self.figure.title)}{image}{_note(self.figure.caption)}"


@dataclasses.dataclass(frozen=True)
class Markup:
    """html: for the page. plain: the same for a terminal."""

    html: str
    plain: str

    def __repr__(self) -> str:
        return self.plain

    def _repr_html_(self) -> str:
        return self.html


@dataclasses.dataclass(frozen=True)
class Several:
    """One after the other."""

    parts: tuple[Any, ...]

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.parts))

    def _repr_html_(self) -> str:
        return "<br>".join(part._repr_html_() for part in self.parts)


def drawn(found: Sequence[figures.Figure]) -> Several:
    return Several(tuple(map(Drawn, found)))


def text(value: str) -> Markup:
    """Plain text, line by line as it is."""
    return Markup(PRINTED.format(code=html.escape(value)), value)


def printed(write: Callable[[Console], Any]) -> Markup:
    """What ``write`` prints on a console, with its colours."""
    # Bound to no screen and no notebook: rich would otherwise show every line as an output of its own.
    console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False, force_jupyter=False, color_system="truecolor")
    write(console)
    plain = console.export_text(clear=False)
    return Markup(console.export_html(inline_styles=True, code_format=PRINTED), plain)


def cell_text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _row(tag: str, cells: Sequence[str], sides: Sequence[str], style: str) -> str:
    made = (
        f'<{tag} style="text-align:{s};{style};white-space:pre-wrap">{html.escape(c)}</{tag}>' for c, s in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(made)}</tr>"


def _title(value: str) -> str:
    return f'<div style="font-weight:600;margin:4px 0">{html.escape(value)}</div>' if value else ""


def _note(value: str) -> str:
    return f'<div style="color:#57606a;font-size:90%;margin:4px 0;max-width:60em">{html.escape(value)}</div>' if value else ""
