"""Longest prefixes and prefix slices for many byte strings at once: a trie walked level by level, every string in step, numpy only.

Strings lie end to end in one array of bytes ("flat") and are named by where they start and how long they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

NONE = -1

_SYMBOLS = 256


def flatten(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(flat uint8 [sum of lengths], starts int64 [N + 1]): text n is flat[starts[n]:starts[n + 1]]."""
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=starts[1:])
    return np.frombuffer(b"".join(texts), np.uint8), starts


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """levels[d]: the nodes at depth d + 1, as (key, sorted; label). A key is parent * 256 + byte, a label NONE or that of the
    string that ends there."""

    levels: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def build(cls, flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> Trie:
        """A trie of different, non-empty strings. starts, lengths, labels: [N]. Time and memory are linear in the sum of lengths."""
        node, alive, levels = np.zeros(len(starts), np.int64), np.arange(len(starts)), []
        for depth in range(int(lengths.max(initial=0))):
            alive = alive[lengths[alive] > depth]
            keys, place = np.unique(node[alive] * _SYMBOLS + flat[starts[alive] + depth], return_inverse=True)
            label = np.full(len(keys), NONE, np.int64)
            ends = lengths[alive] == depth + 1
            label[place[ends]] = labels[alive[ends]]
            node[alive] = place
            levels.append((keys, label))
        return cls(tuple(levels))

    def longest_prefix(self, flat: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(label int32, length int32) [N]: the longest string of the trie that flat[starts:stops] starts with, NONE and 0 without one."""
        best, size = np.full(len(starts), NONE, np.int32), np.zeros(len(starts), np.int32)
        alive, node = np.arange(len(starts)), np.zeros(len(starts), np.int64)
        for depth, (keys, label) in enumerate(self.levels):
            inside = starts[alive] + depth < stops[alive]
            alive, node = alive[inside], node[inside]
            if not len(alive):
                break
            key = node * _SYMBOLS + flat[starts[alive] + depth]
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            found = keys[place] == key
            alive, node = alive[found], place[found]
            hit = label[node] != NONE
            best[alive[hit]], size[alive[hit]] = label[node[hit]], depth + 1
        return best, size


def prefix_slices(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For strings in lexicographic order: (low, high) int32 [sum of lengths].

    Strings low <= n < high are those that share the first d bytes of string k, at [offset of k in the running sum of lengths + d],
    0 <= d < length of k; at d = 0 that is all of them.
    """
    count, offsets = len(starts), np.cumsum(lengths) - lengths
    low, high = np.zeros(int(lengths.sum()), np.int32), np.full(int(lengths.sum()), count, np.int32)
    shared = np.zeros(count, bool)  # does it share the first d bytes with the string before it?
    shared[1:] = True
    for depth in range(1, int(lengths.max(initial=0))):
        pair = np.flatnonzero(shared)
        long = (lengths[pair] >= depth) & (lengths[pair - 1] >= depth)
        shared[pair[~long]] = False
        pair = pair[long]
        shared[pair] = flat[starts[pair] + depth - 1] == flat[starts[pair - 1] + depth - 1]
        borders = np.append(np.flatnonzero(~shared), count)
        alive = np.flatnonzero(lengths > depth)
        group = np.searchsorted(borders, alive, side="right") - 1
        low[offsets[alive] + depth], high[offsets[alive] + depth] = borders[group], borders[group + 1]
    return low, high
