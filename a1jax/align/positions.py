"""Positions of a whole batch for the accelerator: which rows of the teacher's output matrix to read where, as padded integers.

How large are slices? Tokens of the teacher that start with the pending bytes of a straddled position, on real text (docs, math,
trajectories of agents; ``tests/align/test_positions.py`` counts them again):

    Qwen3 student, Mistral teacher:  0.2 to 2.3 % of positions straddle; median 37 to 165 tokens, 99 % below 1,030 (trajectories 15,763)
    Mistral student, Qwen3 teacher:  5 to 16 %; median 121 to 460, 90 % 1,868 to 6,100, most 53,021 (a space)

The large ones are few different slices that come again and again (of 800 different ones 26 have more than 1,024 tokens, 3 more than
4,096), nearly all one byte into a token. So up to CAPACITY tokens a slice's rows are gathered, 85 to 160 a position; above it the position
is searched like a synchronised one, in a layout of the tokens' remainders.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from a1jax.align import spans
from a1jax.align.slices import slices
from a1jax.align.spans import Ids
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap
from a1jax.config import ConfigError
from a1jax.kernels.vocab_align import layout
from a1jax.kernels.vocab_align.targets import Positions, Tables

CAPACITY = 1024
"""Tokens of the teacher that a slice may have for its rows to be gathered. A gathered row costs about as much as 10 (a CPU) to 240 (a TPU)
rows of a matrix product, and a search reads the vocabulary once: 15,000 to 600 rows for 150,000 ids."""


class Turn(NamedTuple):
    """One generated turn in both tokenisations, and where the rows that predict its tokens are."""

    student_ids: Ids
    teacher_ids: Ids
    student_rows: Ids  # [T] flat row of the student's batch that predicts each token
    teacher_rows: Ids  # [T_T] row of the teacher's hidden states that predicts each; -1: not read, positions that need it are masked
    text: bytes | None = None  # what the turn says; differences to it are masked
    teacher_prefix: bytes = b""  # see ``spans.align``


@dataclasses.dataclass(frozen=True, eq=False)
class _Flat:
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


def positions(turns: Sequence[Turn], vocab_map: VocabMap) -> Positions:
    """What ``aligned_targets`` needs of a batch of turns. Linear in their length; 45,000 tokens take about 0.1 s.

    Raises ConfigError for ids or rows out of range, rows that are not one per token, and a student row that two tokens have.
    """
    flat = _flat(turns, vocab_map)
    chained = flat.last > flat.teacher
    sync = np.flatnonzero(flat.offset == 0)
    queries = _Queries.of(flat, vocab_map)
    narrow, wide = np.flatnonzero(queries.size <= CAPACITY), np.flatnonzero(queries.size > CAPACITY)
    entries = _Entries()
    first, number, sum_unit = _narrow_sums(entries, queries, narrow, flat, vocab_map)
    links = (flat.last - flat.teacher).astype(np.int64)  # teacher tokens before the last one
    place = _ranges(flat.teacher, links)
    middle = entries.add(flat.teacher_row[place], place_ids=flat.teacher_id[place], counts=np.ones(len(place), np.int64))
    end = np.zeros(len(flat.offset), np.int64)
    whole = np.flatnonzero(flat.complete)
    counts = (flat.end_high - flat.end_low)[whole]
    ids = vocab_map.order[_ranges(flat.end_low[whole], counts)]
    end[whole] = entries.add(flat.teacher_row[flat.last[whole]], ids, counts) + np.arange(len(whole))
    gaining = np.flatnonzero(flat.unit != NONE)
    ids, counts = _members(vocab_map, flat, gaining)
    gained = entries.add(flat.teacher_row[flat.teacher[gaining]], ids, counts) + np.arange(len(gaining))

    sizes = {"sync": len(sync), "chain": len(place), "narrow": len(narrow), "wide": len(wide)}
    padded = {name: bucket(size) for name, size in sizes.items()}
    sums = bucket(entries.sums + 1)
    base, at = {}, sums  # of the pool
    for name, size in padded.items():
        base[name], at = at, at + size
    query_place = np.zeros(len(queries.size), np.int64)
    for name, which in (("narrow", narrow), ("wide", wide)):
        query_place[which] = base[name] + np.arange(len(which))
    total = np.zeros(len(flat.offset), np.int64)
    total[sync] = base["sync"] + np.arange(len(sync))
    total[queries.begins] = query_place[queries.of_begin]
    end[queries.ends] = query_place[queries.of_end]
    best = total - base["sync"]
    best[best >= base["narrow"] - base["sync"]] -= padded["chain"]  # chain rows are searched for nothing
    mass = np.full(len(flat.offset), sums - 1, np.int64)
    mass[gaining] = gained

    position = np.repeat(np.arange(len(links)), links + 1)
    nth = np.arange(len(position)) - np.repeat(np.cumsum(links + 1) - (links + 1), links + 1)
    link = (np.cumsum(links) - links)[position] + nth
    over = np.where(nth < links[position], middle + link, end[position])
    under = np.where(nth == 0, total[position], base["chain"] + link - 1)

    count, terms, units = bucket(len(links)), bucket(len(position)), np.full(sums, NONE, np.int32)
    units[: len(sum_unit)] = sum_unit
    row, token, which = entries.arrays(sums)
    moving = np.where(chained, flat.source, NONE)
    return Positions(
        sync=_pad(flat.teacher_row[flat.teacher[sync]], padded["sync"]), chain=_pad(flat.teacher_row[place + 1], padded["chain"]),
        entry_row=row, entry_id=token, entry_sum=which, sum_unit=units,
        narrow_first=_pad(first, padded["narrow"]), narrow_count=_pad(number, padded["narrow"]),
        wide_row=_pad(queries.row[wide], padded["wide"]),
        wide_low=_pad((queries.offset * len(vocab_map.order) + queries.low)[wide], padded["wide"]),
        wide_high=_pad((queries.offset * len(vocab_map.order) + queries.low + queries.size)[wide], padded["wide"]),
        term_over=_pad(over, terms), term_under=_pad(under, terms), term_position=_pad(position, terms, count),
        row=_pad(flat.student_row, count, np.iinfo(np.int32).max), place=_pad(best, count), total=_pad(total, count),
        mass=_pad(mass, count, sums - 1), source=_pad(moving, count, NONE), unit=_pad(flat.unit, count, NONE),
        alone=_pad(flat.alone, count, NONE), width=bucket(int(number.max(initial=0)), 16),
        counts=sizes | {"entries": entries.count, "rows": int(flat.teacher_row.max(initial=-1)) + 1,
                        "student_rows": int(max(flat.student_row.max(initial=-1), flat.masked.max(initial=-1))) + 1},
        masked=flat.masked, shares=_shares(flat, chained), key=key(vocab_map),
    )  # fmt: skip


def tables(vocab_map: VocabMap, block: int | None = None) -> Tables:
    """The layouts of a teacher; once per teacher. block: rows per block, see ``layout.build``; by default 2,048, fewer for a vocabulary that
    would not fill them (a TPU's kernel wants 2,048 in any case)."""
    size = len(vocab_map.order)
    block = block or min(2048, max(64, 1 << (size // 16).bit_length()))
    whole = layout.build(vocab_map.unit_of_teacher, block, vocab_map.rank, vocab_map.teacher_valid)
    lengths = np.diff(vocab_map.teacher_starts)
    texts = vocab_map.order[: vocab_map.text_count]
    offset = _ranges(np.ones(len(texts), np.int64), lengths[texts] - 1)
    place = np.repeat(vocab_map.teacher_starts[texts], lengths[texts] - 1) + offset
    low, high = vocab_map.low[place].astype(np.int64), vocab_map.high[place].astype(np.int64)
    large = np.flatnonzero(high - low > CAPACITY)
    if not len(large):
        return Tables(whole, None, vocab_map.teacher_valid, key(vocab_map))
    _, first = np.unique(offset[large] * size + low[large], return_index=True)
    low, high, offset = low[large[first]], high[large[first]], offset[large[first]]
    rank, depth = _ranges(low, high - low), np.repeat(offset, high - low)
    ids = vocab_map.order[rank]
    made = layout.build(_unit_at(vocab_map, ids, depth), block, depth * size + rank)
    source = np.where(made.source >= 0, ids[made.source], layout.NOWHERE).astype(np.int32)
    return Tables(whole, dataclasses.replace(made, source=source), vocab_map.teacher_valid, key(vocab_map))


def key(vocab_map: VocabMap) -> tuple[str, str, str]:
    """What a map is known by."""
    return vocab_map.mode, vocab_map.student_hash, vocab_map.teacher_hash


def bucket(count: int, least: int = 64) -> int:
    """The size that ``count`` things are padded to: a power of two, so that few programs are compiled; 0 for none."""
    return max(least, 1 << (count - 1).bit_length()) if count else 0


def _flat(turns: Sequence[Turn], vocab_map: VocabMap) -> _Flat:
    parts, made, masked, ids, rows, tokens = [], [], [], [], [], 0
    for number, turn in enumerate(turns):
        ours, theirs = (_rows(turn, side, number) for side in ("student", "teacher"))
        found = spans.align(turn.student_ids, turn.teacher_ids, vocab_map, turn.text, turn.teacher_prefix)
        unread = np.append(0, np.cumsum(theirs < 0))
        if unread[-1]:
            hidden = found.masked | (unread[found.last + 1] > unread[found.teacher])
            found = dataclasses.replace(found, masked=hidden)
        at = np.flatnonzero(~found.masked)
        cut = slices(vocab_map, found, turn.student_ids, turn.teacher_ids)
        parts.append((ours[at], found.teacher[at] + np.int64(tokens), found.offset[at], found.last[at] + np.int64(tokens), found.reach[at],
                      found.complete[at]))  # fmt: skip
        moving = cut.alone[at] == NONE
        moving &= found.chained[at]
        made.append((cut.end_low[at], cut.end_high[at], cut.source[at], np.where(moving, cut.unit[at], NONE), cut.alone[at]))
        masked.append(ours[found.masked])
        ids.append(np.asarray(turn.teacher_ids, np.int64))
        rows.append(theirs)
        tokens += len(theirs)
    whole = [_joined(column) for column in zip(*(a + b for a, b in zip(parts, made, strict=True)), strict=True)]
    whole = whole or [np.zeros(0, np.int64)] * 11
    hidden = _joined(masked)
    every = np.append(whole[0], hidden)
    if len(np.unique(every)) != len(every):
        values, counts = np.unique(every, return_counts=True)
        raise ConfigError(f"student row {values[counts > 1][0]} predicts two tokens of these turns: give every token its own row")
    return _Flat(*whole, _joined(ids), _joined(rows), hidden, len(every))


def _rows(turn: Turn, side: str, number: int) -> np.ndarray:
    ids, rows = getattr(turn, f"{side}_ids"), np.asarray(getattr(turn, f"{side}_rows"), np.int64)
    if rows.shape != (len(ids),):
        raise ConfigError(f"turn {number} has {len(ids)} {side}_ids and {side}_rows {rows.shape}: give one row per token")
    least = 0 if side == "student" else -1
    if rows.min(initial=least) < least or rows.max(initial=0) > np.iinfo(np.int32).max - 1:
        raise ConfigError(f"turn {number} has {side}_rows from {rows.min()} to {rows.max()}: rows are numbers from 0")
    return rows


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class _Queries:
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
    def of(cls, flat: _Flat, vocab_map: VocabMap) -> _Queries:
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


class _Entries:
    """Logits to gather, in the order of the sums they belong to."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.sums = self.count = 0

    def add(self, rows: np.ndarray, place_ids: np.ndarray, counts: np.ndarray) -> int:
        """One sum per row, over its ``counts`` of the ids; returns the number of the first."""
        return self.add_sums(np.repeat(rows, counts), place_ids, np.repeat(np.arange(len(rows)), counts), len(rows))

    def add_sums(self, rows: np.ndarray, ids: np.ndarray, sums: np.ndarray, number: int) -> int:
        first = self.sums
        self.parts.append((rows, ids, sums + first))
        self.sums, self.count = first + number, self.count + len(ids)
        return first

    def arrays(self, sums: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = bucket(self.count, 256) or 256
        fills = (0, NONE, sums - 1)
        return tuple(_pad(_joined(column), size, fill) for column, fill in zip(zip(*self.parts, strict=True), fills, strict=True))


def _narrow_sums(
    entries: _Entries, queries: _Queries, narrow: np.ndarray, flat: _Flat, vocab_map: VocabMap
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first sum, number of sums) of every narrow query, and the units of all these sums, rising within a query (NONE first)."""
    low, offset, size = queries.low[narrow], queries.offset[narrow], queries.size[narrow]
    _, first, which = np.unique(offset * (len(vocab_map.order) + 1) + low, return_index=True, return_inverse=True)
    size = size[first]  # from here on: of different slices
    number = np.repeat(np.arange(len(first)), size)
    ids = vocab_map.order[_ranges(low[first], size)]
    unit = _unit_at(vocab_map, ids, offset[first][number])
    by_unit = np.argsort(number * (len(vocab_map.unit_of_student) + 1) + unit + 1, kind="stable")
    ids, unit = ids[by_unit], unit[by_unit]
    begins = np.ones(len(ids), bool)
    begins[1:] = (unit[1:] != unit[:-1]) | (number[1:] != number[:-1])
    sums = np.bincount(number[begins], minlength=len(first))
    local = np.cumsum(begins) - 1
    entry_start, sum_start = np.cumsum(size) - size, np.cumsum(sums) - sums
    taken = _ranges(entry_start[which], size[which])
    query = np.repeat(np.arange(len(narrow)), size[which])
    starts = np.cumsum(sums[which]) - sums[which]
    where = local[taken] - sum_start[which][query] + starts[query]
    base = entries.add_sums(queries.row[narrow][query], ids[taken], where, int(sums[which].sum()))
    return base + starts, sums[which], unit[begins][_ranges(sum_start[which], sums[which])]


def _unit_at(vocab_map: VocabMap, ids: np.ndarray, offset: np.ndarray) -> np.ndarray:
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


def _members(vocab_map: VocabMap, flat: _Flat, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(teacher ids, how many) that stand for each position's ``unit``, within its slice."""
    keys, ids = _by_unit(vocab_map)
    offset, token = flat.offset[at], flat.teacher_id[flat.teacher[at]]
    place = vocab_map.teacher_starts[token] + offset
    low = np.where(offset > 0, vocab_map.low[place], 0)
    high = np.where(offset > 0, vocab_map.high[place], len(vocab_map.order))
    first, stop = (np.searchsorted(keys, _key_of(vocab_map, offset, flat.unit[at], rank)) for rank in (low, high))
    return ids[_ranges(first, stop - first)], stop - first


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those of the next."""
    counts = np.asarray(counts, np.int64)
    return np.repeat(np.asarray(starts, np.int64) - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def _pad(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out


def _shares(flat: _Flat, chained: np.ndarray) -> dict[str, float]:
    sums = {"straddled": int(np.sum(flat.offset > 0)), "chained": int(chained.sum()), "masked": len(flat.masked)}
    return {"positions": float(flat.count)} | {name: value / max(flat.count, 1) for name, value in sums.items()}
