"""The aligned target: hand-computed on a small pair, and the properties of the design's section 4 on random ones."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align import byte_table, spans, target, vocab_map

SEEDS = st.integers(0, 2**32 - 1)
MODES = st.sampled_from(["two_sided", "one_sided", "shared"])


def _targets(made, log_p=None):
    found = spans.align(made.student_ids, made.teacher_ids, made.map, made.text)
    return found, target.target(made.log_p if log_p is None else log_p, made.student_ids, made.teacher_ids, found, made.map)


def _unchained(made, found):
    """Targets as if every student token ended within its first teacher token."""
    ends = dataclasses.replace(found, last=found.teacher, complete=np.ones_like(found.complete))
    return target.target(made.log_p, made.student_ids, made.teacher_ids, ends, made.map)


@pytest.fixture(scope="module")
def digits():
    """A teacher that writes digit by digit, a student with three-digit numbers."""
    student = byte_table.make([b"1", b"2", b"12", b"123", b"3", b"3.", None], {6: "<s>"}, {"turn_end": (6,)})
    teacher = byte_table.make([b"1", b"2", b"3", b"23", b".", None, None], {5: "<e>", 6: "<f>"}, {"turn_end": (5,), "eos": (6,)})
    return student, teacher


def test_by_hand(digits):
    made = vocab_map.build(*digits)
    assert made.unit_of_student.tolist() == [0, 1, 0, 0, 4, 4, 6]  # 12 and 123 in 1, "3." in 3
    #                1    2    3    23   .    stop stop
    p = np.array([[0.50, 0.20, 0.10, 0.05, 0.05, 0.06, 0.04], [0.1, 0.3, 0.1, 0.4, 0.06, 0.02, 0.02], [0.1, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2]])
    ours, theirs = [0, 1, 4, 6], [0, 3, 5]  # 1|2|3|stop against 1|23|stop
    found = spans.align(ours, theirs, made)
    got = target.target(np.log(p), ours, theirs, found, made)
    expected = np.zeros((4, 7))
    expected[0, [0, 1, 4, 6]] = 0.5, 0.25, 0.1, 0.1  # 2 and 23 in 2, both stops in one
    expected[1, [0, 1, 4, 6]] = 0.1, 0.7, 0.1, 0.04
    expected[2, 4] = 0.4 / 0.7  # what starts with 2: 2 itself (residual) and 23
    expected[3, [0, 1, 4, 6]] = 0.1, 0.2, 0.2, 0.3
    np.testing.assert_allclose(got.q, expected, atol=1e-12)
    np.testing.assert_allclose(got.residual, [0.05, 0.06, 0.3 / 0.7, 0.2], atol=1e-12)
    np.testing.assert_allclose(np.exp(got.score), [0.5, 0.7, 0.4 / 0.7, 0.3], atol=1e-12)


def test_chained_by_hand(digits):
    p = np.array([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0], [0.1, 0.3, 0.1, 0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1, 0, 0]])
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    for mode in ("one_sided", "two_sided"):
        made = vocab_map.build(*digits, mode)
        found = spans.align([2], [0, 3], made)  # 12 against 1|23: all that start with 2 continue it
        assert found.masked.tolist() == [True]  # ... but 3 was never written by the student
        ours, theirs = [2, 4], [0, 3]  # 12|3 against 1|23
        got = target.target(log_p, ours, theirs, spans.align(ours, theirs, made), made)
        np.testing.assert_allclose(np.exp(got.score), [0.5 * (0.3 + 0.2), 0.2 / 0.5])
        row = np.zeros(7)
        row[[0, 1, 4, 6]] = 0.5, 0.2, 0.1, 0.1
        row[[0, 2]] += [-0.25, 0.25]  # 12 is a unit, or else stands alone
        np.testing.assert_allclose(got.q[0], row, atol=1e-12)
        assert got.alone.tolist() == ([2, -1] if mode == "two_sided" else [-1, -1])
        ours, theirs = [3], [0, 1, 2]  # 123 against 1|2|3
        got = target.target(log_p, ours, theirs, spans.align(ours, theirs, made), made)
        assert np.exp(got.score[0]) == pytest.approx(0.5 * 0.3 * 0.6)
        assert got.q[0, 3] == pytest.approx(0.09) and got.q[0, 0] == pytest.approx(0.41)


@settings(max_examples=80, deadline=None)
@given(SEEDS, MODES, st.booleans())
def test_mass_is_kept(pair, seed, mode, single):
    made = pair(seed, mode)
    log_p = made.log_p.astype(np.float32) if single else made.log_p
    found, got = _targets(made, log_p)
    assert not found.masked.any() and got.q.dtype == log_p.dtype
    np.testing.assert_allclose(got.q.sum(axis=1) + got.residual, 1, atol=1e-6 if single else 1e-12)
    assert (got.q >= 0).all() and (got.residual >= 0).all()
    if mode == "two_sided":
        units = np.unique(made.map.unit_of_student[made.map.unit_of_student >= 0])
        apart = np.flatnonzero(got.alone >= 0)
        own = got.q[apart, got.alone[apart]]
        begun = found.offset[apart] > 0  # there single tokens of the teacher may stand for it too
        np.testing.assert_array_equal(own[~begun], np.exp(got.score[apart][~begun]))
        assert (own[begun & found.chained[apart]] >= np.exp(got.score[apart][begun & found.chained[apart]])).all()
        got.q[apart, got.alone[apart]] = 0
        assert not np.delete(got.q, units, axis=1).any()  # nothing where the student's folded mass can never be
    else:
        assert (got.alone == -1).all()


@settings(max_examples=80, deadline=None)
@given(SEEDS, MODES)
def test_scores_telescope_over_every_synchronised_span(pair, seed, mode):
    made = pair(seed, mode, stop=False)
    found, got = _targets(made)
    written = made.log_p[np.arange(len(made.teacher_ids)), made.teacher_ids]
    borders = [k for k in range(len(found.offset)) if found.offset[k] == 0] + [len(found.offset)]
    starts = np.append(found.teacher, len(written))
    for a, b in zip(borders, borders[1:], strict=False):
        assert got.score[a:b].sum() == pytest.approx(written[starts[a] : starts[b]].sum(), abs=1e-9)


def test_a_dummy_prefix_conditions_the_first_token(pair, write):
    made = pair(5, stop=False)
    theirs = write(made.rng, made.teacher, b" " + made.text)
    log_p = target.log_softmax(made.rng.normal(0, 2, (len(theirs), len(made.teacher))), made.map.teacher_valid)
    found = spans.align(made.student_ids, theirs, made.map, made.text, teacher_prefix=b" ")
    got = target.target(log_p, made.student_ids, theirs, found, made.map)
    spaces = [i for i, b in enumerate(made.teacher.bytes) if b.startswith(b" ") and made.map.rank[i] < made.map.text_count]
    first = found.teacher[0]
    given_space = np.log(np.exp(log_p[0, spaces]).sum()) if first == 0 else log_p[0, theirs[0]]
    whole = log_p[np.arange(len(theirs)), theirs].sum()
    assert got.score.sum() == pytest.approx(whole - given_space)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(["two_sided", "one_sided"]))
def test_every_student_token_gets_what_the_teacher_gives_to_its_extensions(pair, seed, mode):
    made = pair(seed, mode)
    found = spans.align(made.student_ids, made.teacher_ids, made.map)
    got = _unchained(made, found)  # the move of the chain's mass is a step of its own
    own = [v for v, b in enumerate(made.student.bytes) if b and made.student.canonical[v] == v]
    for i, j in enumerate(found.teacher):
        d = int(found.offset[i])
        pending = made.teacher.bytes[made.teacher_ids[j]][:d]
        fit = [t for t in made.map.order[: made.map.text_count] if made.teacher.bytes[t].startswith(pending)]
        total = np.exp(made.log_p[j, fit]).sum() if d else 1.0
        # At an offset the two-sided target is folded too, so there of the tokens that are no unit only the written one has its own.
        for v in [v for v in own if mode == "one_sided" or d == 0 or made.map.unit_of_student[v] == v or v == got.alone[i]]:
            word = made.student.bytes[v]
            extending = [u for u, b in enumerate(made.student.bytes) if b.startswith(word) and made.student.canonical[u] in own]
            theirs = [t for t in fit if made.teacher.bytes[t][d:].startswith(word)]
            assert got.q[i, extending].sum() == pytest.approx(np.exp(made.log_p[j, theirs]).sum() / total, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_a_chain_moves_its_own_mass_to_what_was_written(pair, seed):
    made = pair(seed, "one_sided")
    found, got = _targets(made)
    plain = _unchained(made, found)
    for i, written in enumerate(made.student_ids):
        moved = got.q[i] - plain.q[i]
        if not found.chained[i]:
            assert not moved.any()
            continue
        unit = made.map.unit_of_student[written]
        assert moved[unit] == pytest.approx(np.exp(got.score[i]), abs=1e-12) or plain.residual[i] != got.residual[i]
        assert moved.sum() + got.residual[i] - plain.residual[i] == pytest.approx(0, abs=1e-12)
        assert np.count_nonzero(np.abs(moved) > 1e-15) <= 2
        assert got.q[i, unit] >= np.exp(got.score[i]) - 1e-12


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.booleans())
def test_the_same_tokenizer_gives_the_teacher_bit_for_bit(pair, seed, single):
    made = pair(seed, same=True)
    log_p = made.log_p.astype(np.float32) if single else made.log_p
    found, got = _targets(made, log_p)
    assert np.array_equal(got.q, np.exp(log_p)) and not got.residual.any()  # every valid id, so all text ids
    assert np.array_equal(got.score, log_p[np.arange(len(log_p)), made.teacher_ids])


def _kl(p, q):
    some = p > 0
    with np.errstate(divide="ignore"):
        return np.sum(p[some] * (np.log(p[some]) - np.log(q[some])))


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_folding_never_increases_the_divergence(pair, seed):
    made = pair(seed)
    p, q = (np.exp(target.log_softmax(made.rng.normal(0, 2, (6, len(made.student))), made.map.student_valid)) for _ in range(2))
    apart = np.flatnonzero(target.stands_alone(made.map, np.arange(len(made.student))) & made.map.student_valid)
    alone = made.rng.choice(np.append(apart, -1), 6)
    for one, two, folded, aimed in zip(p, q, *(np.column_stack(target.fold(x, made.map, alone)) for x in (p, q)), strict=True):
        assert folded.sum() == pytest.approx(1) and aimed.sum() == pytest.approx(1)
        assert _kl(folded, aimed) <= _kl(one, two) + 1e-12
        assert _kl(aimed, folded) <= _kl(two, one) + 1e-12


def test_folding_is_what_lets_a_student_keep_its_numbers(digits):
    p = np.array([[0.01, 0.01, 0.01, 0.95, 0.01, 0.0, 0.01]])  # a student that writes 123
    log_p = np.log(np.array([[0.94, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]]))  # and a teacher that begins it with 1
    divergence = {}
    for mode in ("one_sided", "two_sided"):
        made = vocab_map.build(*digits, mode)
        got = target.target(log_p, [0], [0], spans.align([0], [0], made), made)
        q = np.column_stack([got.q, got.residual])[0]
        divergence[mode] = _kl(np.column_stack(target.fold(p, made))[0], q)
    assert divergence["one_sided"] == np.inf and divergence["two_sided"] < 0.1


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_permuting_ids_permutes_the_target(pair, permuted, seed):
    made = pair(seed)
    _, got = _targets(made)
    ours, theirs = (made.rng.permutation(len(t)) for t in (made.student, made.teacher))
    moved = vocab_map.build(permuted(made.student, ours), permuted(made.teacher, theirs), "two_sided")
    log_p = np.empty_like(made.log_p)
    log_p[:, theirs] = made.log_p
    student_ids, teacher_ids = ours[made.student_ids], theirs[made.teacher_ids]
    other = target.target(log_p, student_ids, teacher_ids, spans.align(student_ids, teacher_ids, moved), moved)
    np.testing.assert_allclose(other.q[:, ours], got.q, atol=1e-14)
    np.testing.assert_allclose(other.score, got.score, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_every_row_is_read_where_its_token_is(pair, seed):
    """A target depends on the rows of its own teacher tokens j to m and on no other: not on the one after, as some merges do."""
    made = pair(seed)
    found, got = _targets(made)
    for row in range(len(made.log_p)):
        log_p = made.log_p.copy()
        log_p[[row]] = target.log_softmax(made.rng.normal(0, 2, (1, log_p.shape[1])), made.map.teacher_valid)
        _, other = _targets(made, log_p)
        begins = (found.teacher == row) & (found.offset == 0)
        assert (other.q[begins] != got.q[begins]).any(axis=1).all()
        uses = (found.teacher <= row) & (row <= found.last)
        assert np.array_equal(other.q[~uses], got.q[~uses]) and np.array_equal(other.score[~uses], got.score[~uses])


def test_masked_rows_are_zero_and_nothing_else_moves(pair):
    made = pair(11)
    found, got = _targets(made)
    hidden = dataclasses.replace(found, masked=np.arange(len(found.masked)) % 3 == 0)
    other = target.target(made.log_p, made.student_ids, made.teacher_ids, hidden, made.map)
    assert not other.q[hidden.masked].any() and not other.residual[hidden.masked].any() and not other.score[hidden.masked].any()
    assert np.array_equal(other.q[~hidden.masked], got.q[~hidden.masked]) and np.array_equal(other.masked, hidden.masked)


@pytest.mark.parametrize("mode", ["two_sided", "one_sided", "shared"])
def test_folding_by_hand(digits, mode):
    made = vocab_map.build(*digits, mode)
    p = np.array([[0.2, 0.1, 0.3, 0.15, 0.05, 0.12, 0.08]] * 2)
    alone = np.array([3, -1])
    folded, rest = target.fold(p, made, alone if mode == "two_sided" else None)
    expected = {
        "two_sided": [[0.5, 0.1, 0, 0.15, 0.17, 0, 0.08], [0.65, 0.1, 0, 0, 0.17, 0, 0.08]],
        "one_sided": [p[0], p[0]],
        "shared": [[0.2, 0.1, 0, 0, 0.05, 0, 0.08]] * 2,
    }[mode]
    np.testing.assert_allclose(folded, expected)
    np.testing.assert_allclose(rest, 1 - np.sum(expected, axis=1), atol=1e-12)
    assert p[0, 3] == 0.15


def test_which_token_stands_alone():
    student = byte_table.make([b"1", b"12", b"12", b"x", b"1a", b"1a"])  # 12 and 1a twice
    teacher = byte_table.make([b"1", b"2", b"12", b"a"])
    made = vocab_map.build(student, teacher)
    # 12 is a unit, also by its other name; x and both spellings of 1a are none
    assert target.stands_alone(made, np.arange(6)).tolist() == [False, False, False, True, True, True]
    for mode in ("one_sided", "shared"):
        assert not target.stands_alone(vocab_map.build(student, teacher, mode), np.arange(6)).any()
    log_p = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    for written, theirs, column in (([2], [0, 1], 1), ([5], [0, 3], 5)):  # 12 against 1|2, 1a against 1|a
        got = target.target(log_p, written, theirs, spans.align(written, theirs, made), made)
        assert got.alone.tolist() == [5 if column == 5 else -1]
        assert got.q[0, column] == pytest.approx(0.4 * (0.4 if column == 5 else 0.2) + (0 if column == 5 else 0.2))
        assert got.q[0].sum() + got.residual[0] == pytest.approx(1)


def test_a_teacher_of_digits_says_which_number_to_write(digits):
    """Of two students with the same mass on numbers that begin with 1, the one that writes the teacher's 123 is the nearer one."""
    made = vocab_map.build(*digits)
    log_p = np.log(
        np.array([[0.94, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01], [0.01, 0.95, 0.01, *[0.0075] * 4], [0.01, 0.01, 0.95, *[0.0075] * 4]])
    )
    got = target.target(log_p, [3], [0, 1, 2], spans.align([3], [0, 1, 2], made), made)
    assert got.q[0, 3] == pytest.approx(0.94 * 0.95**2)
    divergence = []
    for p in ([0.1, 0.01, 0.02, 0.84, 0.01, 0.01, 0.01], [0.84, 0.01, 0.02, 0.1, 0.01, 0.01, 0.01]):
        folded, rest = target.fold(np.array([p]), made, got.alone)
        divergence.append(_kl(np.append(folded, rest), np.append(got.q, got.residual + 1e-12)))
    assert divergence[0] < 0.1 < 1 < divergence[1]


def test_padding_rows_of_the_output_matrix_change_nothing(digits):
    student, teacher = digits
    wide = byte_table.make([*teacher.bytes[:5], None, None], {5: "<e>", 6: "<f>"}, {"turn_end": (5,), "eos": (6,)}, vocab_size=10)
    logits = np.random.default_rng(0).normal(size=(2, 10))
    results = []
    for table in (teacher, wide):
        made = vocab_map.build(student, table)
        log_p = target.log_softmax(logits[:, : len(table)], made.teacher_valid)
        results.append(target.target(log_p, [2, 4], [0, 3], spans.align([2, 4], [0, 3], made), made))
    assert np.array_equal(results[0].q, results[1].q) and np.array_equal(results[0].score, results[1].score)


def test_infinite_logits(digits):
    made = vocab_map.build(*digits)
    logits = np.zeros((3, 7))
    logits[1, [1, 3]] = -np.inf  # neither 2 nor 23, yet that was written
    ours, theirs = [0, 1, 4, 6], [0, 3, 5]
    got = target.target(target.log_softmax(logits, made.teacher_valid), ours, theirs, spans.align(ours, theirs, made), made)
    assert got.score[1] == -np.inf and got.score[2] == -np.inf and np.isfinite(got.q).all()
    np.testing.assert_allclose(got.q.sum(axis=1) + got.residual, 1)
    assert got.residual[2] == 1
    for mode in ("two_sided", "one_sided"):  # a chain that is ruled out moves nothing, and what was written stands in its unit
        made = vocab_map.build(*digits, mode)
        got = target.target(target.log_softmax(logits, made.teacher_valid), [2], [0, 1], spans.align([2], [0, 1], made), made)
        assert (
            got.score[0] == -np.inf and got.alone.tolist() == [-1] and got.q[0, 2] == 0 and got.q.sum() + got.residual == pytest.approx(1)
        )


def test_the_host_side_needs_no_jax():
    code = "import sys\nfrom a1jax.align import byte_table, spans, target, vocab_map\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ".", "PATH": ""}, check=True)
    assert done.stdout == "False\n"
