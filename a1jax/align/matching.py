"""Where two sequences of symbols are equal: the stretches that both have, in order. Linear in length for few differences.

Equal beginnings and ends are found first. In what lies between, a stretch counts as common when at least NEAR symbols agree at most
REACH symbols past a difference, or FAR symbols agree anywhere later; shorter coincidences belong to the difference.
"""

from __future__ import annotations

import numpy as np

NEAR, REACH, FAR = 4, 8, 16

_CHUNK = 256
_BASE = np.uint64(0x9E3779B97F4A7C15)


def common_stretches(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64 [K, 3] rows (start in first, start in second, length), both starts rising: first[a:a + n] equals second[b:b + n].

    The first row begins at (0, 0) and the last ends at both ends; these two, and only these, may have length 0.
    """
    n, m = len(first), len(second)
    head = _equal_run(first, second)
    if head == n == m:
        return np.array([[0, 0, n]], np.int64)
    tail = _equal_run(first[head:][::-1], second[head:][::-1])
    rows = [(0, 0, head)]
    a, b = head, head
    while True:
        skipped = _next_anchor(first[a : n - tail], second[b : m - tail])
        if skipped is None:
            break
        a, b = a + skipped[0], b + skipped[1]
        run = _equal_run(first[a : n - tail], second[b : m - tail])
        rows.append((a, b, run))
        a, b = a + run, b + run
    return np.array([*rows, (n - tail, m - tail, tail)], np.int64)


def _equal_run(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the equal beginning; looks only a little farther than that."""
    size, at, chunk = min(len(first), len(second)), 0, _CHUNK
    while at < size:
        stop = min(at + chunk, size)
        different = first[at:stop] != second[at:stop]
        if different.any():
            return at + int(different.argmax())
        at, chunk = stop, chunk * 2
    return size


def _next_anchor(first: np.ndarray, second: np.ndarray) -> tuple[int, int] | None:
    """How many symbols to skip in each until they agree again, as few together as possible; None where they never do."""
    near = _first_agreement(first[: REACH + NEAR - 1], second[: REACH + NEAR - 1], NEAR)
    if near is not None and sum(near) <= REACH:
        return near
    window = 4 * FAR
    while True:  # a window twice as large each time: what is skipped pays for the search
        found = _first_agreement(first[: window + FAR - 1], second[: window + FAR - 1], FAR)
        if found is not None and sum(found) < window:
            return found
        if window >= max(len(first), len(second)):
            return found
        window *= 2


def _first_agreement(first: np.ndarray, second: np.ndarray, size: int) -> tuple[int, int] | None:
    if min(len(first), len(second)) < size:
        return None
    _, one, two = np.intersect1d(_hashes(first, size), _hashes(second, size), return_indices=True)
    if not len(one):
        return None
    best = int(np.argmin(one + two))
    return int(one[best]), int(two[best])


def _hashes(symbols: np.ndarray, size: int) -> np.ndarray:
    """One number per run of ``size`` symbols; equal runs have equal numbers."""
    count = len(symbols) - size + 1
    total = np.zeros(count, np.uint64)
    for k in range(size):
        total = total * _BASE + symbols[k : k + count].astype(np.uint64) + np.uint64(1)
    return total
