import collections

import numpy as np

from a1jax.data import statistics
from a1jax.data.packing import Example
from a1jax.data.trajectories import ReadReport, SourceReport
from a1jax.types import Trajectory


def pair(source, length, supervised, domain="search"):
    mask = np.zeros(length, np.float32)
    mask[:supervised] = 1
    return Trajectory(domain, "t", (), metadata={"source": source}), Example(np.zeros(length, np.int32), mask)


PAIRS = [pair("b", 10, 5), pair("a", 100, 10), pair("a", 300, 90, "science"), pair("a", 200, 0)]
SKIPPED = ReadReport({"a": SourceReport(3, collections.Counter({"broken JSON": 2, "unknown role": 1})), "c": SourceReport()})


def test_rows_by_hand():
    a, b, c, total = statistics.rows(PAIRS, SKIPPED)
    assert (a.source, a.runs, a.mean, a.median, a.max, a.tokens) == ("a", 3, 200.0, 200.0, 300, 600)
    assert a.p95 == 290.0 and a.supervised == 100 / 600 and a.skipped == {"broken JSON": 2, "unknown role": 1}
    assert (b.runs, b.median, b.supervised, b.skipped) == (1, 10.0, 0.5, {})
    assert (c.runs, c.tokens, c.supervised) == (0, 0, 0.0)
    assert (total.source, total.runs, total.tokens, total.supervised, total.skipped) == ("all", 4, 610, 105 / 610, a.skipped)


def test_by_domain():
    names = [(row.source, row.runs) for row in statistics.rows(PAIRS, SKIPPED, statistics.by_domain)]
    assert names == [("science", 1), ("search", 3), ("all", 4)]


def test_table_is_plain_aligned_text():
    text = statistics.table(statistics.rows(PAIRS, SKIPPED))
    lines = text.splitlines()
    assert lines[0].split() == list(statistics.COLUMNS) and set(lines[1]) == {"-", " "}
    assert lines[2].split()[:8] == ["a", "3", "200", "200", "290", "300", "600", "16.7%"]
    assert lines[2].endswith("3 (2 broken JSON; 1 unknown role)")
    ends = {line.index("%") for line in lines if "%" in line}
    assert len(ends) == 1
