"""What mode "full" needs of a map and of a batch: the walks through all units, and what every token of the batch reads in them.

A token that begins with one of the teacher's reads the units of whole tokens, any other one those of remainders: SUF[t][d] of every
teacher token t after its first d bytes, of which it reads those that share the pending ones. There are as many remainders as the
teacher's vocabulary has bytes, and few tokens that read them: they are compared apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from a1jax.align import extensions
from a1jax.align.sums import bucket, ranges, unit_at
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap
from a1jax.config import ConfigError
from a1jax.kernels.vocab_align.targets import Positions
from a1jax.kernels.vocab_align.unit_walk import Read, Walk, walk


class Reads(NamedTuple):
    """Of a batch of R rows of T tokens; numpy arrays. whole [R, T], inside [R, S]: see ``Read``, without score; index int32 [R, S]: which
    tokens of each row the latter are, T for none. teacher_row int32 [R, T]: the row of the teacher's hidden states that says it."""

    whole: dict[str, np.ndarray]
    inside: dict[str, np.ndarray]
    index: np.ndarray
    teacher_row: np.ndarray

    def with_score(self, score: Any) -> tuple[Read, Read]:
        """(whole, inside) with the scores of ``aligned_targets``, [R, T]."""
        last = np.minimum(self.index, self.teacher_row.shape[1] - 1)
        return Read(**self.whole, score=score), Read(**self.inside, score=score[np.arange(len(last))[:, None], last])


def walks(vocab_map: VocabMap, block: int = 2048) -> tuple[Walk, Walk]:
    """Through whole tokens and through remainders, on the host: 0.3 s for 150,000 ids of either side; block as in ``unit_walk.walk``."""
    size = len(vocab_map.order)
    fold, valid, rank = vocab_map.unit_of_student, vocab_map.student_valid, extensions.prefixes(vocab_map)[0]
    ids = np.flatnonzero(vocab_map.teacher_valid)
    whole = walk(fold, valid, rank, ids, vocab_map.unit_of_teacher[ids], vocab_map.rank[ids], block)
    texts = vocab_map.order[: vocab_map.text_count].astype(np.int64)
    lengths = np.diff(vocab_map.teacher_starts)[texts]
    ids, offset = np.repeat(texts, lengths), ranges(np.ones(len(texts), np.int64), lengths)
    return whole, walk(fold, valid, rank, ids, unit_at(vocab_map, ids, offset), offset * size + vocab_map.rank[ids], block)


def reads(at: Positions, vocab_map: VocabMap, rows: int, length: int) -> Reads:
    """What the tokens of a batch [rows, length] read; at: ``positions.positions`` of its turns, whose student rows are flat ones.

    Raises ConfigError where a position lies beyond the batch."""
    if at.counts["student_rows"] > rows * length:
        raise ConfigError(f"a position is of row {at.counts['student_rows'] - 1}, and the batch has {rows} x {length}")
    some = np.flatnonzero(at.row < rows * length)
    where, alone, starts = at.row[some], at.alone[some], at.starts
    _, low, high = extensions.prefixes(vocab_map)
    token = np.maximum(alone, 0)
    ours = (np.where(alone >= 0, x, 0) for x in (low[token], high[token]))
    unit = np.where(alone >= 0, vocab_map.unit_of_student[token], NONE)
    columns = (starts.low[some], starts.high[some], at.chained[some], at.source[some], at.unit[some], alone, unit, *ours,
               starts.apart_low[some], starts.apart_high[some])  # fmt: skip
    empty = {"source": NONE, "unit": NONE, "alone": NONE, "alone_unit": NONE}
    made = {}
    for name, column in zip(Read._fields[:-1], columns, strict=True):
        made[name] = np.full(rows * length, empty.get(name, 0), np.int32)
        made[name][where] = column
    begins = made["low"] >= len(vocab_map.order)  # an offset above 0
    teacher_row = np.zeros(rows * length, np.int32)
    teacher_row[where] = starts.row[some]
    made, begins = {name: x.reshape(rows, length) for name, x in made.items()}, begins.reshape(rows, length)
    count = begins.sum(axis=1)
    size = min(bucket(max(int(count.max(initial=0)), 1)), length)
    index = np.argsort(~begins, axis=1, kind="stable")[:, :size]
    there = np.arange(size)[None, :] < count[:, None]
    inside = {name: np.where(there, np.take_along_axis(x, index, axis=1), empty.get(name, 0)).astype(np.int32) for name, x in made.items()}
    whole = {name: np.where(begins, empty.get(name, 0), x).astype(np.int32) for name, x in made.items()}
    return Reads(whole, inside, np.where(there, index, length).astype(np.int32), teacher_row.reshape(rows, length))
