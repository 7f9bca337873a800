"""The sums of a batch: which logits to gather and add up for slices, for ends of tokens, for chains and for single units.

Arrays only, vectorised over all positions of a batch; ``positions`` puts them together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from a1jax.align import extensions
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """All turns end to end: one entry per student token that has a target; teacher tokens by their place among all of them."""

    student_row: np.ndarray
    teacher: np.ndarray  # j, and so on as in Spans
    offset: np.ndarray
    last: np.ndarray
    reach: np.ndarray
    complete: np.ndarray
    end_low: np.ndarray  # as in Slices
    end_high: np.ndarray
    source: np.ndarray
    unit: np.ndarray
    alone: np.ndarray
    teacher_id: np.ndarray  # [all teacher tokens]
    teacher_row: np.ndarray
    masked: np.ndarray  # student rows
    count: int  # of student tokens, masked ones too


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """Different (teacher token, offset > 0): what starts with its first ``offset`` bytes. A position that begins there needs its units and
    log Z; one that ends there, log Y. Mostly one position does and the next one does."""

    row: np.ndarray
    offset: np.ndarray
    low: np.ndarray  # ranks
    size: np.ndarray
    begins: np.ndarray  # positions that begin at a query,
    of_begin: np.ndarray  # and at which
    ends: np.ndarray
    of_end: np.ndarray

    @classmethod
    def of(cls, flat: Flat, vocab_map: VocabMap) -> Queries:
        begins, ends = np.flatnonzero(flat.offset > 0), np.flatnonzero(~flat.complete.astype(bool))
        token = np.append(flat.teacher[begins], flat.last[ends])
        offset = np.append(flat.offset[begins], flat.reach[ends]).astype(np.int64)
        span = int(offset.max(initial=0)) + 1
        found, which = np.unique(token * span + offset, return_inverse=True)
        token, offset = found // span, found % span
        place = vocab_map.teacher_starts[flat.teacher_id[token]] + offset
        low = vocab_map.low[place].astype(np.int64)
        return cls(
            flat.teacher_row[token], offset, low, vocab_map.high[place] - low, begins, which[: len(begins)], ends, which[len(begins) :]
        )


class Entries:
    """Logits to gather, in the order of the sums they belong to."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.sums = self.count = 0

    def add(self, rows: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> int:
        """One sum per row, over its ``counts`` of the ids; returns the number of the first."""
        return self.add_sums(np.repeat(rows, counts), ids, np.repeat(np.arange(len(rows)), counts), len(rows))

    def add_sums(self, rows: np.ndarray, ids: np.ndarray, sums: np.ndarray, number: int) -> int:
        """``number`` sums over the logits of ``ids`` in ``rows``; sums: which of them each belongs to, rising from 0."""
        first = self.sums
        self.parts.append((rows, ids, sums + first))
        self.sums, self.count = first + number, self.count + len(ids)
        return first

    def arrays(self, sums: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = bucket(self.count, 256) or 256
        fills = (0, NONE, sums - 1)
        return tuple(pad(joined(column), size, fill) for column, fill in zip(zip(*self.parts, strict=True), fills, strict=True))


def narrow_sums(entries: Entries, queries: Queries, narrow: np.ndarray, vocab_map: VocabMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first sum, number of sums) of every narrow query, and the units of all these sums, rising within a query (NONE first)."""
    low, offset, size = queries.low[narrow], queries.offset[narrow], queries.size[narrow]
    _, first, which = np.unique(offset * (len(vocab_map.order) + 1) + low, return_index=True, return_inverse=True)
    size = size[first]  # from here on: of different slices
    number = np.repeat(np.arange(len(first)), size)
    ids = vocab_map.order[ranges(low[first], size)]
    unit = unit_at(vocab_map, ids, offset[first][number])
    by_unit = np.argsort(number * (len(vocab_map.unit_of_student) + 1) + unit + 1, kind="stable")
    ids, unit = ids[by_unit], unit[by_unit]
    begins = np.ones(len(ids), bool)
    begins[1:] = (unit[1:] != unit[:-1]) | (number[1:] != number[:-1])
    sums = np.bincount(number[begins], minlength=len(first))
    local = np.cumsum(begins) - 1
    entry_start, sum_start = np.cumsum(size) - size, np.cumsum(sums) - sums
    taken = ranges(entry_start[which], size[which])
    query = np.repeat(np.arange(len(narrow)), size[which])
    starts = np.cumsum(sums[which]) - sums[which]
    where = local[taken] - sum_start[which][query] + starts[query]
    base = entries.add_sums(queries.row[narrow][query], ids[taken], where, int(sums[which].sum()))
    return base + starts, sums[which], unit[begins][ranges(sum_start[which], sums[which])]


def unit_at(vocab_map: VocabMap, ids: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """SUF[t][d]; NONE where the token ends there."""
    place = vocab_map.teacher_starts[ids] + offset
    ends = place == vocab_map.teacher_starts[ids + 1]
    return np.where(ends, NONE, vocab_map.suffix[np.where(ends, 0, place)]).astype(np.int64)


@functools.lru_cache(maxsize=8)
def _by_unit(vocab_map: VocabMap) -> tuple[np.ndarray, np.ndarray]:
    """(keys, ids) of every offset into every token, sorted by offset, unit and rank."""
    lengths = np.diff(vocab_map.teacher_starts)
    ids = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(ids)) - np.repeat(vocab_map.teacher_starts[:-1], lengths)
    some = np.flatnonzero(vocab_map.suffix != NONE)
    ids = ids[some]
    keys = _key_of(vocab_map, offset[some], vocab_map.suffix[some], vocab_map.rank[ids])
    order = np.argsort(keys)
    return keys[order], ids[order]


def _key_of(vocab_map: VocabMap, offset: np.ndarray, unit: np.ndarray, rank: np.ndarray) -> np.ndarray:
    return (offset.astype(np.int64) * len(vocab_map.unit_of_student) + unit) * (len(vocab_map.order) + 1) + rank


def members(vocab_map: VocabMap, flat: Flat, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(teacher ids, how many) that stand for each position's ``unit``, within its slice."""
    keys, ids = _by_unit(vocab_map)
    offset, token = flat.offset[at], flat.teacher_id[flat.teacher[at]]
    place = vocab_map.teacher_starts[token] + offset
    low = np.where(offset > 0, vocab_map.low[place], 0)
    high = np.where(offset > 0, vocab_map.high[place], len(vocab_map.order))
    first, stop = (np.searchsorted(keys, _key_of(vocab_map, offset, flat.unit[at], rank)) for rank in (low, high))
    return ids[ranges(first, stop - first)], stop - first


def continuing(vocab_map: VocabMap, flat: Flat, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(teacher ids, how many) of what is set apart with each position's ``alone``: see ``extensions.continuing``."""
    tokens = flat.teacher_id[flat.teacher[at]]
    keys = zip(tokens.tolist(), flat.offset[at].tolist(), flat.alone[at].tolist(), strict=True)
    found = [extensions.continuing(vocab_map, *key) for key in keys]
    return joined(found), np.fromiter(map(len, found), np.int64, len(found))


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those of the next."""
    counts = np.asarray(counts, np.int64)
    return np.repeat(np.asarray(starts, np.int64) - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def pad(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out


def bucket(count: int, least: int = 64, most: int | None = None) -> int:
    """The size that ``count`` things are padded to, so that few programs are compiled: 0, a power of two, or multiples of ``most``."""
    if count and most and count > most:
        return -(-count // most) * most
    return max(least, 1 << (count - 1).bit_length()) if count else 0


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0, np.int64)
