"""Common stretches: equal where they say so, nothing lost around one edit, and linear."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align.matching import common_stretches


def _symbols(text):
    return np.frombuffer(text, np.uint8).astype(np.uint16)


def _rows(first, second):
    return common_stretches(_symbols(first), _symbols(second)).tolist()


@pytest.mark.parametrize(
    ("first", "second", "rows"),
    [
        (b"", b"", [[0, 0, 0]]),
        (b"abc", b"abc", [[0, 0, 3]]),
        (b"abc", b"", [[0, 0, 0], [3, 0, 0]]),
        (b"abXcd", b"abcd", [[0, 0, 2], [3, 2, 2]]),
        (b"abXcd", b"abYYcd", [[0, 0, 2], [3, 4, 2]]),
        (b"abc", b"abcdef", [[0, 0, 3], [3, 6, 0]]),
        (b"abc", b"xyz", [[0, 0, 0], [3, 3, 0]]),
        (b"aaa", b"aa", [[0, 0, 2], [3, 2, 0]]),  # an ambiguous one: the beginning wins
        (b"1Xabcd2Y3", b"1abcd23", [[0, 0, 1], [2, 1, 5], [8, 6, 1]]),  # four equal symbols near a difference count
        (b"1Xabc2Y3", b"1abcZZ3", [[0, 0, 1], [7, 6, 1]]),  # three do not
        (b"1" + b"X" * 40 + b"abcdefghijklmnopq" + b"Y3", b"1abcdefghijklmnopqZZ3", [[0, 0, 1], [41, 1, 17], [59, 20, 1]]),
        (b"1" + b"X" * 40 + b"abcdefgh" + b"Y3", b"1abcdefghZZ3", [[0, 0, 1], [50, 11, 1]]),  # far away it takes sixteen
    ],
)
def test_by_hand(first, second, rows):
    assert _rows(first, second) == rows


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4), st.binary(max_size=4)), max_size=4))
def test_stretches_are_equal_in_order_and_reach_both_ends(first, edits):
    second = first
    for at, cut, put in edits:
        second = second[:at] + put + second[at + cut :]
    rows = _rows(first, second)
    assert rows[0][:2] == [0, 0] and [rows[-1][0] + rows[-1][2], rows[-1][1] + rows[-1][2]] == [len(first), len(second)]
    for a, b, n in rows:
        assert first[a : a + n] == second[b : b + n]
    for (a, b, n), (c, d, _) in zip(rows, rows[1:], strict=False):
        assert a + n <= c and b + n <= d and (a + n, b + n) != (c, d)
    assert all(n > 0 for _, _, n in rows[1:-1])
    if first == second:
        assert rows == [[0, 0, len(first)]]


def test_many_edits_in_a_long_text_are_found_one_by_one_in_linear_time():
    rng = np.random.default_rng(0)

    def seconds(size):
        first = rng.integers(0, 256, size).astype(np.uint16)
        places = np.arange(100, size - 100, 100)
        second = np.insert(first, places, 300)
        began = time.process_time()
        rows = common_stretches(first, second)
        assert np.array_equal(rows[1:, 0], places) and np.array_equal(rows[1:, 1], places + np.arange(1, len(places) + 1))
        return time.process_time() - began

    seconds(2000)
    assert seconds(80_000) < 20 * seconds(8_000) + 0.1


def test_two_texts_with_nothing_in_common_end():
    first, second = np.arange(0, 40_000, 2).astype(np.uint16), np.arange(1, 40_001, 2).astype(np.uint16)
    assert common_stretches(first, second).tolist() == [[0, 0, 0], [20_000, 20_000, 0]]
