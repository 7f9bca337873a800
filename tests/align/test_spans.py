"""Positions: by hand, equal to their definition on random turns, and exact masks where the two sides say different things."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align import byte_table, spans, vocab_map
from a1jax.config import ConfigError

SEEDS = st.integers(0, 2**32 - 1)
BYTES = [bytes([n]) for n in range(256)]


@pytest.fixture(scope="module")
def wordy():
    """A student that writes words and a teacher that writes bytes and a few odd pieces; ids from 256 on are the pieces."""
    student = [*BYTES, b" the", b"cat", b"\xe8\xaa", b"\x9e!", b"<think>", b"\r\n", b"\t\t", None, None]
    teacher = [*BYTES, b" ", b"t", b"he c", b"at", "\u8a9e".encode(), "\U0001f600".encode(), b"\n\t", None, None, None, b" x"]
    ours = byte_table.make(student, {263: "<stop>", 264: "<bos>"}, {"turn_end": (263,), "bos": (264,)})
    theirs = byte_table.make(teacher, {263: "<end>", 264: "<bos>", 265: "<eos>"}, {"turn_end": (263,), "bos": (264,), "eos": (265,)})
    return vocab_map.build(ours, theirs)


STOP, BOS = 263, 264


def _columns(found):
    return [found.teacher.tolist(), found.offset.tolist(), found.last.tolist(), found.reach.tolist()]


def test_small_turn_by_hand(wordy):
    # student:  " the" | " " | "cat" | stop      teacher:  " t" | "he c" | "at" | end   (bytes " the cat")
    found = spans.align([256, 32, 257, STOP], [32, 257, 258, 259, STOP], wordy)
    assert _columns(found) == [[0, 2, 2, 4], [0, 2, 3, 0], [2, 2, 3, 4], [2, 3, 2, 1]]
    assert found.complete.tolist() == [False, False, True, True] and not found.masked.any()
    assert found.straddled.tolist() == [False, True, True, False] and found.chained.tolist() == [True, False, True, False]
    assert found.report() == {"positions": 4.0, "straddled": 0.5, "chained": 0.5, "masked": 0.0}


def _define(made):
    """(teacher, offset, last, reach, complete) of every text token, by walking the bytes."""
    ends = np.cumsum([len(made.teacher.bytes[t]) or 1 for t in made.teacher_ids])
    begins, at, rows = np.append(0, ends)[:-1], 0, []
    for i in made.student_ids:
        stop = at + (len(made.student.bytes[i]) or 1)
        j = max(k for k in range(len(begins)) if begins[k] <= at)
        m = max(k for k in range(len(begins)) if begins[k] < stop)
        rows.append((j, at - begins[j], m, stop - begins[m], stop == ends[m]))
        at = stop
    return rows


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.booleans())
def test_positions_are_their_definition(pair, seed, stop):
    made = pair(seed, stop=stop)
    found = spans.align(made.student_ids, made.teacher_ids, made.map, made.text)
    rows = zip(found.teacher, found.offset, found.last, found.reach, found.complete, strict=True)
    assert [tuple(map(int, row)) for row in rows] == _define(made) and not found.masked.any()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_same_ids_are_synchronised_one_by_one(pair, seed):
    made = pair(seed, same=True)
    found = spans.align(made.student_ids, made.teacher_ids, made.map)
    count = len(made.student_ids)
    assert found.teacher.tolist() == found.last.tolist() == list(range(count))
    assert found.complete.all() and found.report() == {"positions": count, "straddled": 0, "chained": 0, "masked": 0}


def _masked(made, ours, theirs):
    """Which student tokens lie between the last common border before the one difference and the first after it."""
    one, two = (np.append(0, np.cumsum([len(t.bytes[i]) for i in ids])) for t, ids in ((made.student, ours), (made.teacher, theirs)))
    first, second = (b"".join(t.bytes[i] for i in ids) for t, ids in ((made.student, ours), (made.teacher, theirs)))
    head = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    rest = min(len(first), len(second)) - head
    tail = next((k for k in range(rest) if first[len(first) - 1 - k] != second[len(second) - 1 - k]), rest)
    grown = len(second) - len(first)
    before = max(b for b in one if b <= head and b in two)
    after = min([b for b in one if b >= len(first) - tail and b + grown in two], default=len(first))
    if first == second:
        return [False] * len(ours)
    return [bool(a >= before and b <= after) for a, b in zip(one, one[1:], strict=False)]


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.integers(0, 30), st.integers(0, 3), st.lists(st.integers(0, 8), max_size=3))
def test_a_difference_masks_the_smallest_span_between_common_borders(pair, write, seed, at, cut, put):
    made = pair(seed, stop=False)
    letters = sorted({b for b in made.teacher.bytes if len(b) == 1})
    other = made.text[:at] + b"".join(letters[k % len(letters)] for k in put) + made.text[at + cut :]
    theirs = write(made.rng, made.teacher, other)
    found = spans.align(made.student_ids, theirs, made.map)
    expected = _masked(made, made.student_ids, theirs)
    assert found.masked.tolist() == expected
    assert np.all((found.teacher == -1) == found.masked) and np.all((found.last == -1) == found.masked)
    starts = np.append(0, np.cumsum([len(made.student.bytes[i]) for i in made.student_ids]))
    theirs_at = np.append(0, np.cumsum([len(made.teacher.bytes[i]) for i in theirs]))
    for i in np.flatnonzero(~found.masked):  # what is not masked says the same on both sides
        a, n = theirs_at[found.teacher[i]] + found.offset[i], starts[i + 1] - starts[i]
        assert other[a : a + n] == made.student.bytes[made.student_ids[i]] and a + n == theirs_at[found.last[i]] + found.reach[i]


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 40))
def test_a_bos_on_one_side_changes_nothing(pair, seed, at):
    made = pair(seed)
    plain = spans.align(made.student_ids, made.teacher_ids, made.map)
    theirs = spans.align(made.student_ids, [made.teacher.roles["bos"][0], *made.teacher_ids], made.map)
    for name in ("offset", "reach", "complete", "masked"):
        assert np.array_equal(getattr(plain, name), getattr(theirs, name))
    assert np.array_equal(plain.teacher + 1, theirs.teacher) and np.array_equal(plain.last + 1, theirs.last)
    at = min(at, len(made.student_ids))
    ours = spans.align([*made.student_ids[:at], made.student.roles["bos"][0], *made.student_ids[at:]], made.teacher_ids, made.map)
    assert ours.masked.tolist() == [k == at for k in range(len(made.student_ids) + 1)]
    assert np.array_equal(np.delete(ours.teacher, at), plain.teacher) and np.array_equal(np.delete(ours.offset, at), plain.offset)


def test_no_chain_leads_over_a_control_of_the_teachers(wordy):
    found = spans.align([32, 256, 97], [32, 32, 116, BOS, 104, 101, 97], wordy)
    assert found.masked.tolist() == [False, True, False] and found.teacher.tolist() == [0, -1, 6]


@pytest.mark.parametrize(
    ("ours", "theirs", "masked", "straddled"),
    [
        ([], [], [], 0),
        ([STOP], [265], [False], 0),  # either of the teacher's stops
        ([258, 259], [260, 33], [False, False], 1),  # a character split between two student tokens
        ([*"\U0001f600".encode()], [261], [False] * 4, 3),
        ([261, 262, 9], [13, 262, 9, 9], [False, False, False], 1),  # \r\n \t\t \t against \r \n\t \t \t
        ([0xFF, 0xFE, 97], [0xFF, 0xFE, 97], [False] * 3, 0),  # invalid UTF-8 that both can write
        ([0xFF, 97], [0xEF, 0xBF, 0xBD, 97], [True, False], 0),  # and that the teacher's side replaced
        ([97, 0xE8], [97], [False, True], 0),  # cut within a character, which the teacher did not get
        ([97, 258], [97, 0xEF, 0xBF, 0xBD], [False, True], 0),  # or got as a replacement
        ([260], [*b"<think>"], [False], 0),  # a tag spelled as text
        ([*b"<think>"], [*b"<think>"], [False] * 7, 0),
        ([97, 98, 99], [97], [False, True, True], 0),  # the teacher's context cut short
        ([97, 98, STOP], [97, 98], [False, False, True], 0),
        ([97, 98], [97, 98, STOP], [False, False], 0),
        ([256, 97], [32, 257], [True, True], 0),  # cut within the student's first token
        ([], [97], [], 0),
        ([97], [], [True], 0),
    ],
)
def test_adversarial_turns(wordy, ours, theirs, masked, straddled):
    found = spans.align(ours, theirs, wordy)
    assert found.masked.tolist() == masked and int(found.straddled.sum()) == straddled


def test_tags_that_are_atomic_on_both_sides():
    def positions(ours, theirs, spelled):
        student = byte_table.make([*BYTES, None], {256: "<think>"}, {"think_open": (256,)})
        teacher = byte_table.make([*BYTES, None], {256: spelled}, {"think_open": (256,)})
        return spans.align(ours, theirs, vocab_map.build(student, teacher, "two_sided"))

    tag = list(b"<think>")
    alike = positions([97, *tag, 98], [97, 256, 98], "<think>")  # written as text and read as one token: the same bytes
    assert alike.offset.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0] and not alike.masked.any()
    assert positions([97, 256, 98], [97, 256, 98], "[THINK]").report()["masked"] == 0  # spelled differently: by role
    assert positions([97, *tag, 98], [97, 256, 98], "[THINK]").masked.tolist() == [False, *[True] * 7, False]
    assert positions([97, 256, 98], [97, *tag, 98], "[THINK]").masked.tolist() == [False, True, False]


def test_a_dummy_prefix_is_one_virtual_byte(wordy):
    theirs = [266, 121, STOP]  # " x" "y": a SentencePiece teacher that was given "xy"
    found = spans.align([120, 121, STOP], theirs, wordy, teacher_prefix=b" ")
    assert _columns(found) == [[0, 1, 2], [1, 0, 0], [0, 1, 2], [2, 1, 1]] and found.complete.all() and not found.masked.any()
    assert spans.align([120, 121, STOP], theirs, wordy).masked.tolist() == [True, False, False]  # not said: a difference like another
    assert spans.align([32, 120, 121, STOP], theirs, wordy).report()["masked"] == 0  # both have one: one more byte of text
    with pytest.raises(ConfigError, match="leave teacher_prefix out"):
        spans.align([120, 121], [120, 121], wordy, teacher_prefix=b" ")
    assert spans.align([], [], wordy, teacher_prefix=b" ").report()["positions"] == 0


def test_bytes_that_differ_from_the_text_are_masked(wordy):
    ids = [*b"ab cd", STOP]

    def masked(text, ours=ids, theirs=ids):
        return spans.align(ours, theirs, wordy, text=text).masked.tolist()

    assert masked(b"ab cd") == masked("ab cd") == [False] * 6
    assert masked(b"ab_cd") == [False, False, True, False, False, False]
    assert masked(b"ab cde") == [False] * 6  # the text has more: nothing that was written is wrong
    assert masked(b"acd") == [False, True, True, False, False, False]
    assert masked(b"") == [True] * 5 + [False]
    assert masked("ab the", [97, 98, 256, STOP], [97, 98, *b" the", STOP]) == [False] * 4
    assert masked("ab tee", [97, 98, 256, STOP], [97, 98, *b" the", STOP]) == [False, False, True, False]
    assert masked("ab_ the", [97, 98, 256, STOP], [97, 98, *b" the", STOP]) == [False] * 4  # lost between two tokens
    assert masked("ab thhe", [97, 98, 256, STOP], [97, 98, *b" the", STOP]) == [False, False, True, False]  # lost inside one
    assert masked("\ud800", [97], [97]) == [True]


@pytest.mark.parametrize(("side", "ids"), [("student", [97, 300]), ("student", [97, -1]), ("teacher", [97, 267])])
def test_ids_out_of_range_are_refused(wordy, side, ids):
    with pytest.raises(ConfigError, match=rf"{side}_ids\[1\] is {ids[1]}, and the map's {side} has ids 0 to") as error:
        spans.align(*((ids, [97]) if side == "student" else ([97], ids)), wordy)
    assert "\n" not in str(error.value)


def test_long_turns_take_linear_time_and_memory(wordy):
    rng = np.random.default_rng(0)

    def cost(count):
        words = [list(b" the"), [32, 257, 258, 259], [120]]
        ours, theirs = zip(
            *[([256, 32, 257], words[1]) if rng.random() < 0.5 else ([120], words[2]) for _ in range(count // 2)], strict=True
        )
        ours, theirs = np.concatenate(ours), np.concatenate(theirs)
        tracemalloc.start()
        spans.align(ours, theirs, wordy)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        times = []
        for _ in range(3):
            began = time.process_time()
            found = spans.align(ours, theirs, wordy)
            times.append(time.process_time() - began)
        assert not found.masked.any()
        return min(times), peak

    cost(500)
    seconds, peak = cost(45_000)
    assert seconds < 0.25 and peak < 40e6  # measured 0.02 s and 13 MB; a quadratic matrix would take 2 GB
    assert peak < 12 * cost(4_500)[1]
