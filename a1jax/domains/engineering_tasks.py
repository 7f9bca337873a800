"""Small real data and optimisation problems on a table of columns, each with its wording, a solution in Python and its grader.

A stage fills one new column (the target) from another (the source). Data stages have one right result; optimisation stages have
many, and their mark is the objective against that of a reference method. Columns are lists of ``ROWS`` integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROWS = 8
PASS = 0.95  # mark from which a stage counts as passed; data stages have 1 or 0
NAMES = (
    *("age", "area", "cost", "debt", "fare", "gain", "heat", "hour", "item", "lane", "load", "loss", "mark", "mass", "need", "page"),
    *("part", "path", "pay", "rain", "rate", "rent", "risk", "sale", "size", "tax", "team", "time", "trip", "unit", "wage", "wind"),
)
Table = dict[str, list[int]]


def column(i: int) -> str:
    """The i-th column's name: 32 short names, then the same with a number."""
    return NAMES[i % len(NAMES)] + (str(i // len(NAMES) + 1) if i >= len(NAMES) else "")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kind of stage. wording, code: formats of {s} (source), {t} (target), {n}; ``code`` is what an expert writes for it.

    mark: (source, answer, n) -> 0..1. apply: (source, n) -> the right column, None where there are many.
    """

    wording: str
    code: str
    numbers: tuple[int, ...] = (0,)
    apply: Callable[[list[int], int], list[int]] | None = None
    mark: Callable[[list[int], Any, int], float] | None = None


def _data(wording: str, expression: str, apply, numbers: Sequence[int] = (0,)) -> Operation:
    return Operation("{t} = " + wording, "s = t['{s}']; t['{t}'] = " + expression, tuple(numbers), apply)


SMALL, TENS = range(2, 10), range(20, 90, 10)
DATA = (
    _data("{s} + {n}", "[v + {n} for v in s]", lambda s, n: [v + n for v in s], SMALL),
    _data("{s} * {n} % 100", "[v * {n} % 100 for v in s]", lambda s, n: [v * n % 100 for v in s], SMALL),
    _data("{s} % {n}", "[v % {n} for v in s]", lambda s, n: [v % n for v in s], SMALL),
    _data("min({s}, {n})", "[min(v, {n}) for v in s]", lambda s, n: [min(v, n) for v in s], TENS),
    _data("max({s}, {n})", "[max(v, {n}) for v in s]", lambda s, n: [max(v, n) for v in s], TENS),
    _data("abs({s} - {n})", "[abs(v - {n}) for v in s]", lambda s, n: [abs(v - n) for v in s], TENS),
    _data("{s} sorted", "sorted(s)", lambda s, n: sorted(s)),
    _data("{s} reversed", "s[::-1]", lambda s, n: s[::-1]),
    _data("per row, how many {s} are smaller", "[sum(w < v for w in s) for v in s]", lambda s, n: [sum(w < v for w in s) for v in s]),
    _data(
        "running sum of {s} % 100",
        "[sum(s[: i + 1]) % 100 for i in range(len(s))]",
        lambda s, n: [sum(s[: i + 1]) % 100 for i in range(len(s))],
    ),
    _data(
        "{s} minus the row before, 0 before the first",
        "[b - a for a, b in zip([0] + s, s)]",
        lambda s, n: [b - a for a, b in zip([0, *s], s, strict=False)],
    ),
)


def mark_subset(source: list[int], answer: Any, n: int) -> float:
    """Subset sum: values of the column, their sum at most n and as large as can be. Reference: all reachable sums, exact."""
    rest, reachable = list(source), {0}
    for v in answer:
        rest.remove(v)  # ValueError when it is not, or no longer, there
    for v in source:
        reachable |= {k + v for k in reachable if k + v <= n}
    return sum(answer) / max(1, max(reachable)) if sum(answer) <= n else 0.0


def mark_split(source: list[int], answer: Any, n: int) -> float:
    """Makespan on n machines: a partition whose largest sum is small. Reference: longest first onto the least loaded (R. L. Graham,
    Bounds on multiprocessing timing anomalies, 1969)."""
    if len(answer) != n or sorted(v for part in answer for v in part) != sorted(source):
        return 0.0
    loads = [0] * n
    for v in sorted(source, reverse=True):
        loads[loads.index(min(loads))] += v
    return min(1.0, max(loads) / max(1, *(sum(part) for part in answer)))


def tour_length(cells: Sequence[int]) -> int:
    """Closed tour over cells of a grid ten wide, cell v at row v // 10, place v % 10, distances along the axes."""
    pairs = zip(cells, [*cells[1:], cells[0]], strict=True)
    return sum(abs(a // 10 - b // 10) + abs(a % 10 - b % 10) for a, b in pairs)


def shorten(cells: list[int]) -> list[int]:
    """2-opt: turn a stretch of the tour round as long as that makes it shorter (G. A. Croes, 1958)."""
    better = True
    while better:
        better = False
        for i in range(1, len(cells) - 1):
            for j in range(i + 2, len(cells) + 1):
                new = cells[:i] + cells[i:j][::-1] + cells[j:]
                if tour_length(new) < tour_length(cells):
                    cells, better = new, True
    return cells


def mark_tour(source: list[int], answer: Any, n: int) -> float:
    """Travelling salesman. Reference: 2-opt from the sorted order."""
    if sorted(answer) != sorted(source):
        return 0.0
    return min(1.0, tour_length(shorten(sorted(source))) / max(1, tour_length(answer)))


def mark_climb(source: list[int], answer: Any, n: int) -> float:
    """Longest strictly increasing subsequence, exact by dynamic programming."""
    rows = iter(source)
    if not all(v in rows for v in answer) or any(b <= a for a, b in zip(answer, answer[1:], strict=False)):
        return 0.0
    lengths: list[int] = []
    for i, v in enumerate(source):
        lengths.append(1 + max((lengths[j] for j in range(i) if source[j] < v), default=0))
    return len(answer) / max(lengths)


def mark_line(source: list[int], answer: Any, n: int) -> float:
    """Least squares: [a, b] of a + b * row. Reference: the normal equations."""
    a, b = (float(v) for v in answer)
    if not (math.isfinite(a) and math.isfinite(b)):  # float reads the word "nan", against which every line would win
        return 0.0
    rows, values = np.arange(len(source)), np.asarray(source, float)
    slope, start = np.polyfit(rows, values, 1)
    best, got = (float(np.sum((values - p - q * rows) ** 2)) for p, q in ((start, slope), (a, b)))
    return min(1.0, (best + 1e-6) / (got + 1e-6))


_SUBSET = """s = t['{s}']; best = {{0: []}}
    for v in s:
        best.update({{k + v: p + [v] for k, p in list(best.items()) if k + v <= {n}}})
    t['{t}'] = best[max(best)]"""
_SPLIT = """s = t['{s}']; parts = [[] for _ in range({n})]
    for v in sorted(s, reverse=True):
        min(parts, key=sum).append(v)
    t['{t}'] = parts"""
_TOUR = """s = sorted(t['{s}']); better = True
    far = lambda c: sum(abs(a // 10 - b // 10) + abs(a % 10 - b % 10) for a, b in zip(c, c[1:] + c[:1]))
    while better:
        better = False
        for i in range(1, len(s) - 1):
            for j in range(i + 2, len(s) + 1):
                new = s[:i] + s[i:j][::-1] + s[j:]
                if far(new) < far(s): s, better = new, True
    t['{t}'] = s"""
_CLIMB = """s = t['{s}']; best = []
    for v in s:
        best.append(max((p for p in best if p[-1] < v), key=len, default=[]) + [v])
    t['{t}'] = max(best, key=len)"""
_LINE = """s = t['{s}']; m = (len(s) - 1) / 2; y = sum(s) / len(s)
    b = sum((i - m) * (v - y) for i, v in enumerate(s)) / sum((i - m) ** 2 for i in range(len(s)))
    t['{t}'] = [y - b * m, b]"""
OPTIMISATION = (
    Operation("{t} = list of {s} values with the largest sum up to {n}", _SUBSET, (100, 150, 200), mark=mark_subset),
    Operation("{t} = the {s} values in {n} lists, the largest sum as small as you can", _SPLIT, (2, 3, 4), mark=mark_split),
    Operation("{t} = the {s} values in the order of a short closed tour, v at row v // 10, column v % 10", _TOUR, mark=mark_tour),
    Operation("{t} = a longest strictly increasing subsequence of {s}", _CLIMB, mark=mark_climb),
    Operation("{t} = [a, b] of the least squares line a + b * row through {s}", _LINE, mark=mark_line),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One check of a task: fill ``target`` from ``source``. options: numbers the wording offers when it leaves open which; ``n`` is one."""

    operation: Operation
    source: str
    target: str
    n: int = 0
    options: tuple[int, ...] = ()

    def wording(self) -> str:
        texts = [self.operation.wording.format(s=self.source, t=self.target, n=n) for n in self.options or (self.n,)]
        return texts[0] if len(texts) == 1 else "one of: " + " or ".join(texts)

    def code(self, n: int | None = None) -> str:
        return self.operation.code.format(s=self.source, t=self.target, n=self.n if n is None else n)


def marks(stages: Sequence[Stage], table: Table, returned: Any) -> list[float]:
    """One mark per stage, 0..1, for what a program made of ``table``. Whatever shape ``returned`` has, this answers."""
    right, found = dict(table), []
    for stage in stages:
        source, answer = right[stage.source], returned.get(stage.target) if isinstance(returned, dict) else None
        if stage.operation.apply:
            right[stage.target] = stage.operation.apply(source, stage.n)
            found.append(float(answer == right[stage.target]))
        else:
            try:
                mark = float(stage.operation.mark(source, answer, stage.n))
            except Exception:  # an answer of another shape than was asked for: words, nested lists, numbers beyond floats
                mark = 0.0
            found.append(mark if 0.0 <= mark <= 1.0 else 0.0)
    return found


def told_apart(source_columns: Sequence[list[int]]) -> list[tuple[Operation, int]]:
    """The data operations that these columns tell from every other one and from doing nothing."""
    made: dict[str, list[tuple[Operation, int]]] = {str(list(source_columns)): [(DATA[0], 0)]}
    for operation in DATA:
        for n in operation.numbers:
            made.setdefault(str([operation.apply(s, n) for s in source_columns]), []).append((operation, n))
    return [found[0] for found in made.values() if len(found) == 1 and found[0] != (DATA[0], 0)]
