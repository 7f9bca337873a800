"""Tables of token counts per source or domain."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from a1jax.data.packing import Example
from a1jax.data.trajectories import ReadReport
from a1jax.types import Trajectory

COLUMNS = ("source", "runs", "mean", "median", "p95", "max", "tokens", "supervised", "skipped")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; lengths in tokens per run. supervised: share of tokens the model wrote. skipped: reason -> records."""

    source: str
    runs: int
    mean: float
    median: float
    p95: float
    max: int
    tokens: int
    supervised: float
    skipped: dict[str, int]

    def cells(self) -> tuple[str, ...]:
        why = "; ".join(f"{n} {reason}" for reason, n in self.skipped.items())
        numbers = [f"{value:,.0f}" for value in (self.runs, self.mean, self.median, self.p95, self.max, self.tokens)]
        return (self.source, *numbers, f"{self.supervised:.1%}", f"{sum(self.skipped.values())}" + (f" ({why})" if why else ""))


def by_source(trajectory: Trajectory) -> str:
    return str(trajectory.metadata.get("source", ""))


def by_domain(trajectory: Trajectory) -> str:
    return trajectory.domain


def rows(
    pairs: Iterable[tuple[Trajectory, Example]], report: ReadReport | None = None, key: Callable[[Trajectory], str] = by_source
) -> list[Row]:
    """One Row per source (or whatever ``key`` says) and one for all, from ``examples.tokenized``'s pairs; ``report`` adds the skipped
    records per source, read after the pairs are exhausted."""
    found: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for trajectory, example in pairs:
        found[key(trajectory)].append((len(example), int(example.mask.sum())))
    return of_counts(found, report, key is by_source)


def of_counts(found: Mapping[str, list[tuple[int, int]]], report: ReadReport | None, sources: bool = True) -> list[Row]:
    """The same from (tokens, supervised tokens) of every run by name; sources: the names are those of the report's sources."""
    skipped = {name: dict(source.skipped.most_common()) for name, source in report.sources.items()} if report else {}
    names = sorted({*found, *(skipped if sources else ())})
    table = [_row(name, found.get(name, []), skipped.get(name, {}) if sources else {}) for name in names]
    total = collections.Counter[str]()
    for reasons in skipped.values():
        total.update(reasons)
    return [*table, _row("all", [pair for pairs in found.values() for pair in pairs], dict(total.most_common()))]


def _row(name: str, counts: list[tuple[int, int]], skipped: dict[str, int]) -> Row:
    lengths = np.asarray([n for n, _ in counts] or [0], np.int64)
    total = int(lengths.sum())
    share = sum(n for _, n in counts) / total if total else 0.0
    p95 = float(np.percentile(lengths, 95))
    return Row(name, len(counts), float(lengths.mean()), float(np.median(lengths)), p95, int(lengths.max()), total, share, skipped)


def table(found: Iterable[Row]) -> str:
    """Plain text, columns aligned, numbers to the right."""
    cells = [COLUMNS, *(row.cells() for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    last = len(COLUMNS) - 1

    def aligned(line: tuple[str, ...]) -> str:
        parts = (text.ljust(w) if i in (0, last) else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(parts).rstrip()

    return "\n".join([aligned(COLUMNS), "  ".join("-" * w for w in widths), *(aligned(line) for line in cells[1:])])
