"""The integers of a batch: read back in plain numpy they give the dense target; errors, masks, and how slices are really distributed."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align import positions, spans, target
from a1jax.align.sums import bucket
from a1jax.config import ConfigError

SEEDS = st.integers(0, 2**32 - 1)


def _log_sum(x):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x).sum())


def _read(made, log_p, tables):
    """(units: mass, residual apart, score, mass of ``unit``) of every position, from log_p [rows, V_T] in float64, as the device would."""
    count = made.counts["entries"]
    logits = np.append(log_p[made.entry_row[:count], made.entry_id[:count]], np.full(len(made.entry_id) - count, -np.inf))
    assert (made.entry_id[count:] == -1).all() and (np.diff(made.entry_sum) >= 0).all()
    sums = np.array([_log_sum(logits[made.entry_sum == g]) for g in range(len(made.sum_unit))])
    found, totals = [], []

    def layout_masses(planned, row, low, high):
        source, units = planned.source, planned.units.reshape(-1)
        rank, mass = planned.rank.reshape(-1), {}
        width = planned.block
        unit_of_row = np.full(len(source), -1)
        for kind, first, number in planned.runs:
            if kind == 0:
                continue
            lanes = width // min(kind, 16)
            table = units.reshape(-1, width)[first : first + number, :lanes].reshape(-1)
            if kind == 32:  # a unit's mass stands in its last lane
                parts = planned.parts[first : first + number].reshape(-1) // 2
                names = {part: name for part, name in zip(parts, table, strict=True) if name >= 0}
                table = np.array([names.get(part, -1) for part in parts])
            for block in range(number):
                lane = np.arange(width) % lanes
                unit_of_row[(first + block) * width : (first + block + 1) * width] = table[block * lanes + lane]
        inside = (source >= 0) & (rank >= low) & (rank < high)
        for unit in np.unique(unit_of_row[inside]):
            mass[int(unit)] = _log_sum(log_p[row, source[inside & (unit_of_row == unit)]])
        return mass, _log_sum(log_p[row, source[inside]])

    for row in made.sync:
        mass, total = layout_masses(tables.layout, row, 0, 1 << 30)
        found.append(mass)
        totals.append(total)
    totals += [0.0] * len(made.chain)  # log_p is normalised
    for first, number in zip(made.narrow_first, made.narrow_count, strict=True):
        units = made.sum_unit[first : first + number]
        assert (np.diff(units) > 0).all()
        found.append(dict(zip(units.tolist(), sums[first : first + number].tolist(), strict=True)))
        totals.append(_log_sum(sums[first : first + number]))
    for row, low, high in zip(made.wide_row, made.wide_low, made.wide_high, strict=True):
        mass, total = layout_masses(tables.wide, row, low, high) if high > low else ({}, -np.inf)
        found.append(mass)
        totals.append(total)
    pool = np.append(sums, totals)
    out = []
    for p in np.flatnonzero(made.row < 1 << 30):
        terms = made.term_position == p
        score = (pool[made.term_over[terms]] - pool[made.term_under[terms]]).sum()
        out.append((int(made.row[p]), found[made.place[p]], pool[made.total[p]], score, pool[made.mass[p]], p))
    return out


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from([None, "one_sided", "shared", "same"]), st.sampled_from([2, 1024]))
def test_the_integers_give_the_dense_target(pair, seed, mode, capacity):
    made = pair(seed, None if mode == "same" else mode, same=mode == "same")
    count, length = len(made.student_ids), len(made.teacher_ids)
    student_rows, teacher_rows = made.rng.permutation(count + 5)[:count], made.rng.permutation(length + 5)[:length]
    turn = positions.Turn(made.student_ids, made.teacher_ids, student_rows, teacher_rows, made.text)
    got = positions.positions([turn], made.map, capacity)
    log_p = np.full((length + 5, made.log_p.shape[1]), np.nan)
    log_p[teacher_rows] = made.log_p
    log_p[np.isnan(log_p)] = 0
    found = spans.align(made.student_ids, made.teacher_ids, made.map, made.text)
    dense = target.target(made.log_p, made.student_ids, made.teacher_ids, found, made.map)
    plain = dataclasses.replace(found, last=found.teacher, complete=np.ones_like(found.complete))
    plain = target.target(made.log_p, made.student_ids, made.teacher_ids, plain, made.map, set_apart=False)
    at = {row: i for i, row in enumerate(student_rows.tolist())}
    read = _read(got, log_p, positions.tables(made.map, capacity=capacity))
    assert sorted(at[row] for row, *_ in read) == np.flatnonzero(~found.masked).tolist()
    for row, masses, total, score, mass, p in read:
        i = at[row]
        q = np.zeros(len(made.student))
        for unit, value in masses.items():
            q[unit] += np.exp(value - total) if unit >= 0 else 0
        np.testing.assert_allclose(q, plain.q[i], atol=1e-12)
        assert score == pytest.approx(dense.score[i], abs=1e-9)
        moved = dense.q[i] - plain.q[i]
        apart = np.exp(mass - total) if got.alone[p] >= 0 else 0
        assert dense.alone[i] == (got.alone[p] if apart + got.chained[p] * np.exp(score) > 0 else -1)
        assert got.loser[p] == (made.map.unit_of_student[got.alone[p]] if got.alone[p] >= 0 and found.offset[i] else -1)
        if dense.alone[i] >= 0:
            assert moved[dense.alone[i]] == pytest.approx(apart + got.chained[p] * np.exp(score), abs=1e-12)
            if got.loser[p] >= 0:
                same = got.loser[p] == got.source[p]
                assert moved[got.loser[p]] == pytest.approx(-apart - (np.exp(score) if same and got.chained[p] else 0), abs=1e-12)
        if got.unit[p] >= 0:
            assert found.chained[i] and np.exp(mass - total) == pytest.approx(plain.q[i, got.unit[p]], abs=1e-12)
            assert moved[got.unit[p]] == pytest.approx(np.exp(score), abs=1e-12)
        assert got.chained[p] == found.chained[i] and (got.source[p] < 0 or found.chained[i])
        if got.source[p] >= 0 and got.source[p] not in (got.unit[p], got.loser[p]):
            assert moved[got.source[p]] == pytest.approx(-np.exp(score), abs=1e-12)


def test_turns_of_all_kinds_and_a_report_over_all(pair, write):
    made = pair(3)
    letters = [b for b in made.student.bytes if len(b) == 1]
    texts = [b"", b"a", b"".join(letters), b"abab" * 5]
    turns, first, theirs_first, spanned = [], 0, 0, []
    for text in texts:
        ours, theirs = write(made.rng, made.student, text), write(made.rng, made.teacher, text)
        said = text + b"b" if text == b"a" else text  # a turn that says more than both wrote
        rows, theirs_rows = np.arange(first, first + len(ours)), np.arange(theirs_first, theirs_first + len(theirs))
        turns.append(positions.Turn(ours, theirs, rows, theirs_rows, said))
        spanned.append(spans.align(ours, theirs, made.map, said))
        first, theirs_first = first + len(ours), theirs_first + len(theirs)
    got = positions.positions(turns, made.map)
    every = {name: np.concatenate([getattr(s, name) for s in spanned]) for name in ("straddled", "chained", "masked")}
    assert got.report() == {"positions": float(first)} | {name: pytest.approx(value.mean()) for name, value in every.items()}
    assert np.array_equal(got.masked, np.flatnonzero(every["masked"]))
    assert np.array_equal(np.sort(got.row[got.row < 1 << 30]), np.flatnonzero(~every["masked"]))
    nothing = positions.positions([], made.map)
    assert nothing.report() == {"positions": 0.0, "straddled": 0.0, "chained": 0.0, "masked": 0.0} and not nothing.row.size


def test_teacher_tokens_that_were_not_read_mask_what_needs_them(pair):
    made = next(made for made in map(pair, range(50)) if len(made.student_ids) > 8 and len(made.teacher_ids) > 8)
    count, length = len(made.student_ids), len(made.teacher_ids)
    for cut in range(length + 1):
        rows = np.where(np.arange(length) < cut, np.arange(length), -1)
        got = positions.positions([positions.Turn(made.student_ids, made.teacher_ids, np.arange(count), rows, made.text)], made.map)
        found = spans.align(made.student_ids, made.teacher_ids, made.map, made.text)
        assert np.array_equal(got.masked, np.flatnonzero(found.last >= cut))
        assert got.counts["rows"] <= cut


def test_a_dummy_prefix_is_no_position_but_conditions_one(pair, write):
    made = pair(5, stop=False)
    theirs = write(made.rng, made.teacher, b" " + made.text)
    rows = np.arange(len(made.student_ids)), np.arange(len(theirs))
    got = positions.positions([positions.Turn(made.student_ids, theirs, *rows, made.text, b" ")], made.map)
    found = spans.align(made.student_ids, theirs, made.map, made.text, b" ")
    assert not found.masked.any() and got.report() == pytest.approx(found.report())


def test_sizes_are_few():
    assert [bucket(n) for n in (0, 1, 64, 65, 5000)] == [0, 64, 64, 128, 8192]
    assert [bucket(n, 256, 1024) for n in (0, 1, 257, 1024, 1025, 5000)] == [0, 256, 512, 1024, 2048, 5120]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_rows": [0]}, r"turn 1 has 2 student_ids and student_rows \(1,\)"),
        ({"teacher_rows": [[0], [1]]}, r"turn 1 has 2 teacher_ids and teacher_rows \(2, 1\)"),
        ({"student_rows": [-1, 0]}, "turn 1 has student_rows from -1 to 0"),
        ({"teacher_rows": [-2, 0]}, "turn 1 has teacher_rows from -2 to 0"),
        ({"student_rows": [7, 7]}, "student row 7 predicts two tokens"),
        ({"student_rows": [100, 7]}, "student row 100 predicts two tokens"),
        ({"student_ids": [0, 10**6]}, r"student_ids\[1\] is 1000000"),
        ({"teacher_ids": [0, -1]}, r"teacher_ids\[1\] is -1"),
    ],
)
def test_mistakes_are_one_line(pair, change, message):
    made = pair(7)
    good = positions.Turn([0, 0], [0, 0], [1, 2], [1, 2])
    first = positions.Turn(made.student_ids, made.teacher_ids, 100 + np.arange(len(made.student_ids)), np.arange(len(made.teacher_ids)))
    with pytest.raises(ConfigError, match=message) as raised:
        positions.positions([first, good._replace(**change)], made.map)
    assert "\n" not in str(raised.value)


def test_a_long_batch_is_quick(pair, write):
    made = pair(2)
    text = b"".join(b for b in made.student.bytes if len(b) == 1) * 100
    turns, at = [], np.zeros(2, int)
    for _ in range(100):
        ids = [write(made.rng, table, text) for table in (made.student, made.teacher)]
        turns.append(positions.Turn(*ids, *(np.arange(a, a + len(x)) for a, x in zip(at, ids, strict=True)), text))
        at += [len(x) for x in ids]
    positions.positions(turns[:1], made.map)
    began = time.thread_time()
    got = positions.positions(turns, made.map)
    assert time.thread_time() - began < 1.0 and got.report()["positions"] == at[0] > 10_000
