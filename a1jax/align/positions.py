"""Positions of a whole batch for the accelerator: which rows of the teacher's output matrix to read where, as padded integers.

How large are slices? Tokens of the teacher that start with the pending bytes of a straddled position, on 40,000 to 78,000 tokens each of
docs, mathematics and agents' trajectories:

    Qwen3 student, Mistral teacher:  0.2 to 2.3 % of positions straddle; median 37 to 165 tokens, 99 % below 1,030 (trajectories 15,763)
    Mistral student, Qwen3 teacher:  5 to 16 %; median 121 to 460, 90 % 1,868 to 6,100, most 53,021 (a space)

The large ones are few different slices that come again and again (of 800 different ones 26 have more than 1,024 tokens, 3 more than
4,096), nearly all one byte into a token. So up to CAPACITY tokens a slice's rows are gathered, 85 to 160 a position; above it the position
is searched like a synchronised one, in a layout of the tokens' remainders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from a1jax.align import extensions, spans
from a1jax.align.slices import slices
from a1jax.align.spans import Ids
from a1jax.align.sums import Entries, Flat, Queries, bucket, continuing, joined, members, narrow_sums, pad, ranges, unit_at
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap
from a1jax.config import ConfigError
from a1jax.kernels.vocab_align import layout
from a1jax.kernels.vocab_align.targets import TILE, Key, Positions, Starts, Tables

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


def positions(turns: Sequence[Turn], vocab_map: VocabMap, capacity: int = CAPACITY) -> Positions:
    """What ``aligned_targets`` needs of a batch of turns; capacity as in ``tables``. Linear in their length: 45,000 tokens take 0.1 s.

    Raises ConfigError for ids or rows out of range, rows that are not one per token, and a student row that two tokens have.
    """
    flat = _flat(turns, vocab_map)
    queries = Queries.of(flat, vocab_map)
    sync = np.flatnonzero(flat.offset == 0)
    narrow, wide = np.flatnonzero(queries.size <= capacity), np.flatnonzero(queries.size > capacity)
    links = (flat.last - flat.teacher).astype(np.int64)  # teacher tokens before the last one
    inside = ranges(flat.teacher, links)

    entries = Entries()
    first, number, sum_unit = narrow_sums(entries, queries, narrow, vocab_map)
    middle = entries.add(flat.teacher_row[inside], flat.teacher_id[inside], np.ones(len(inside), np.int64))
    end = np.zeros(len(links), np.int64)  # in the pool: log Y
    whole = np.flatnonzero(flat.complete)
    count = (flat.end_high - flat.end_low)[whole]
    ids = vocab_map.order[ranges(flat.end_low[whole], count)]
    end[whole] = entries.add(flat.teacher_row[flat.last[whole]], ids, count) + np.arange(len(whole))
    gaining = np.flatnonzero(flat.unit != NONE)
    ids, count = members(vocab_map, flat, gaining)
    begun = np.flatnonzero((flat.alone != NONE) & (flat.offset > 0))
    apart, number_apart = continuing(vocab_map, flat, begun)
    sums = bucket(entries.sums + len(gaining) + len(begun) + 1)
    mass = np.full(len(links), sums - 1, np.int64)
    mass[gaining] = entries.add(flat.teacher_row[flat.teacher[gaining]], ids, count) + np.arange(len(gaining))
    mass[begun] = entries.add(flat.teacher_row[flat.teacher[begun]], apart, number_apart) + np.arange(len(begun))
    loser = np.full(len(links), NONE, np.int64)
    loser[begun] = vocab_map.unit_of_student[flat.alone[begun]]
    units = pad(sum_unit, sums, NONE)
    row, token, which = entries.arrays(sums)

    sizes = {"sync": len(sync), "chain": len(inside), "narrow": len(narrow), "wide": len(wide)}
    padded = {name: bucket(size, 256 if name != "narrow" else 64, TILE) for name, size in sizes.items()}
    base = dict(zip(padded, (sums + np.cumsum([0, *padded.values()])).tolist(), strict=False))
    total = np.zeros(len(links), np.int64)  # in the pool: log Z
    total[sync] = base["sync"] + np.arange(len(sync))
    where = np.zeros(len(queries.size), np.int64)
    where[narrow], where[wide] = base["narrow"] + np.arange(len(narrow)), base["wide"] + np.arange(len(wide))
    total[queries.begins], end[queries.ends] = where[queries.of_begin], where[queries.of_end]
    best = total - np.where(flat.offset == 0, base["sync"], base["sync"] + padded["chain"])  # a chain's rows are not searched

    position = np.repeat(np.arange(len(links)), links + 1)
    nth = np.arange(len(position)) - np.repeat(np.cumsum(links + 1) - (links + 1), links + 1)
    link = (np.cumsum(links) - links)[position] + nth
    over = np.where(nth < links[position], middle + link, end[position])
    under = np.where(nth == 0, total[position], base["chain"] + link - 1)

    count, terms = bucket(len(links)), bucket(len(position))
    low = queries.offset * len(vocab_map.order) + queries.low
    return Positions(
        sync=pad(flat.teacher_row[flat.teacher[sync]], padded["sync"]), chain=pad(flat.teacher_row[inside + 1], padded["chain"]),
        entry_row=row, entry_id=token, entry_sum=which, sum_unit=units,
        narrow_first=pad(first, padded["narrow"]), narrow_count=pad(number, padded["narrow"]),
        wide_row=pad(queries.row[wide], padded["wide"]),
        wide_low=pad(low[wide], padded["wide"]), wide_high=pad((low + queries.size)[wide], padded["wide"]),
        term_over=pad(over, terms), term_under=pad(under, terms), term_position=pad(position, terms, count),
        row=pad(flat.student_row, count, np.iinfo(np.int32).max), place=pad(best, count), total=pad(total, count),
        mass=pad(mass, count, sums - 1), source=pad(np.where(links > 0, flat.source, NONE), count, NONE),
        unit=pad(flat.unit, count, NONE), alone=pad(flat.alone, count, NONE), loser=pad(loser, count, NONE), chained=pad(links > 0, count),
        width=bucket(int(number.max(initial=1))),
        counts={"entries": entries.count, "rows": int(flat.teacher_row.max(initial=-1)) + 1,
                "student_rows": int(max(flat.student_row.max(initial=-1), flat.masked.max(initial=-1))) + 1},
        masked=flat.masked.astype(np.int32), shares=_shares(flat, links > 0), key=key(vocab_map, capacity),
        starts=Starts(*(pad(x, count) for x in _starts(flat, begun, vocab_map))),
    )  # fmt: skip


def _starts(flat: Flat, begun: np.ndarray, vocab_map: VocabMap) -> list[np.ndarray]:
    """The columns of ``Starts``; begun: the positions where a token is set apart inside of one of the teacher's."""
    tokens, offset = flat.teacher_id[flat.teacher], flat.offset.astype(np.int64)
    place = vocab_map.teacher_starts[tokens] + offset
    low = np.where(offset > 0, vocab_map.low[place], 0)
    high = np.where(offset > 0, vocab_map.high[place], int(vocab_map.teacher_valid.sum()))
    apart = np.zeros((2, len(offset)), np.int64)
    for at in begun:
        apart[:, at] = extensions.going_on(vocab_map, tokens[at], offset[at], flat.alone[at])
    shift = offset * len(vocab_map.order)
    some = apart[1] > apart[0]
    return [flat.teacher_row[flat.teacher], low + shift, high + shift, *np.where(some, apart + shift, 0)]


def tables(vocab_map: VocabMap, block: int | None = None, capacity: int = CAPACITY) -> Tables:
    """The layouts of a teacher's output matrix; once per teacher.

    block: rows per block, see ``layout.build``; by default 2,048, fewer for a vocabulary that would not fill them (a TPU's kernel wants
    2,048 in any case). capacity: of a slice whose rows are gathered, the same one for ``positions``.
    """
    size = len(vocab_map.order)
    block = block or min(2048, max(64, 1 << (size // 16).bit_length()))
    whole = layout.build(vocab_map.unit_of_teacher, block, vocab_map.rank, vocab_map.teacher_valid)
    lengths = np.diff(vocab_map.teacher_starts)
    texts = vocab_map.order[: vocab_map.text_count]
    offset = ranges(np.ones(len(texts), np.int64), lengths[texts] - 1)
    place = np.repeat(vocab_map.teacher_starts[texts], lengths[texts] - 1) + offset
    low, high = vocab_map.low[place].astype(np.int64), vocab_map.high[place].astype(np.int64)
    large = np.flatnonzero(high - low > capacity)
    if not len(large):
        return Tables(whole, None, vocab_map.teacher_valid, key(vocab_map, capacity))
    _, first = np.unique(offset[large] * size + low[large], return_index=True)
    low, high, offset = low[large[first]], high[large[first]], offset[large[first]]
    rank, depth = ranges(low, high - low), np.repeat(offset, high - low)
    ids = vocab_map.order[rank]
    made = layout.build(unit_at(vocab_map, ids, depth), block, depth * size + rank)
    source = np.where(made.source >= 0, ids[made.source], layout.NOWHERE).astype(np.int32)
    return Tables(whole, dataclasses.replace(made, source=source), vocab_map.teacher_valid, key(vocab_map, capacity))


def key(vocab_map: VocabMap, capacity: int) -> Key:
    """What tables and positions must agree in."""
    return vocab_map.mode, vocab_map.student_hash, vocab_map.teacher_hash, capacity


def _flat(turns: Sequence[Turn], vocab_map: VocabMap) -> Flat:
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
        moving = found.chained[at] & (cut.alone[at] == NONE)
        made.append((cut.end_low[at], cut.end_high[at], cut.source[at], np.where(moving, cut.unit[at], NONE), cut.alone[at]))
        masked.append(ours[found.masked])
        ids.append(np.asarray(turn.teacher_ids, np.int64))
        rows.append(theirs)
        tokens += len(theirs)
    whole = [joined(column) for column in zip(*(a + b for a, b in zip(parts, made, strict=True)), strict=True)]
    whole = whole or [np.zeros(0, np.int64)] * 11
    hidden = joined(masked)
    every = np.append(whole[0], hidden)
    if len(np.unique(every)) != len(every):
        values, counts = np.unique(every, return_counts=True)
        raise ConfigError(f"student row {values[counts > 1][0]} predicts two tokens of these turns: give every token its own row")
    return Flat(*whole, joined(ids), joined(rows), hidden, len(every))


def _rows(turn: Turn, side: str, number: int) -> np.ndarray:
    ids, rows = getattr(turn, f"{side}_ids"), np.asarray(getattr(turn, f"{side}_rows"), np.int64)
    if rows.shape != (len(ids),):
        raise ConfigError(f"turn {number} has {len(ids)} {side}_ids and {side}_rows {rows.shape}: give one row per token")
    least = 0 if side == "student" else -1
    if rows.min(initial=least) < least or rows.max(initial=0) > np.iinfo(np.int32).max - 1:
        raise ConfigError(f"turn {number} has {side}_rows from {rows.min()} to {rows.max()}: rows are numbers from 0")
    return rows


def _shares(flat: Flat, chained: np.ndarray) -> dict[str, float]:
    sums = {"straddled": int(np.sum(flat.offset > 0)), "chained": int(chained.sum()), "masked": len(flat.masked)}
    return {"positions": float(flat.count)} | {name: value / max(flat.count, 1) for name, value in sums.items()}
