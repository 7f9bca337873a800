"""A walk through all units of two vocabularies: blocks of rows of both output matrices that hold the same units.

``layout`` orders a teacher's rows for a search; here the student's and the teacher's are ordered together, so that a block has all that
both sides give to its units, and a divergence over everything is a sum over blocks. A unit with more rows than a block is *fat*: it
has blocks of its own, whose sums are added up first. Made on the host, once per teacher.

Letters: V rows of the student's output matrix, U units, L places of a block, B and B' rows of the student's and the teacher's in one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Walk(NamedTuple):
    """int32 arrays, a pytree: pass it through jit. Made by ``walk``.

    units [blocks, L]: the unit in each place, -1: none, whose rows are in no class. ours [blocks, B], theirs [blocks, B']: rows of the
    two output matrices, -1 for none; our_place, their_place: the place of each, rising. keys [blocks, B']: of the teacher's rows, ``Read``.
    fat_units [F]; fat_of [fat blocks]: which of them a block is of; fat_ours, fat_theirs, fat_keys as above.
    rank [V]: the student's ids by their bytes. valid bool [V]: those that are tokens.
    """

    units: Any
    ours: Any
    our_place: Any
    theirs: Any
    their_place: Any
    keys: Any
    fat_units: Any
    fat_of: Any
    fat_ours: Any
    fat_theirs: Any
    fat_keys: Any
    rank: Any
    valid: Any


class Read(NamedTuple):
    """What is read at every token, int32 of one shape each; keys as in ``Walk``, ranges without their ends.

    low, high: keys of the teacher's rows that are possible; none: the token is not compared. chained: 1 where exp(score) moves from unit
    ``source`` to unit ``unit`` (-1: out of the residual, into it), or to what is set apart. alone: the token that is set apart, -1 for
    none, and of its unit alone_unit the student's rows with our_low <= rank < our_high, the teacher's with keys apart_low to apart_high.
    score float32: log-probability of the token that was written.
    """

    low: Any
    high: Any
    chained: Any
    source: Any
    unit: Any
    alone: Any
    alone_unit: Any
    our_low: Any
    our_high: Any
    apart_low: Any
    apart_high: Any
    score: Any


def walk(
    fold: np.ndarray, valid: np.ndarray, rank: np.ndarray, rows: np.ndarray, units: np.ndarray, keys: np.ndarray, block: int = 2048
) -> Walk:
    """The walk of one map.

    fold int [V]: the unit that every id of the student is compared in, -1: none; valid bool [V]; rank int [V]. rows, units, keys int [E]:
    the teacher's rows in any order, one also several times, the unit that each stands for (-1: none) and its key. block: half the rows
    of a block, which both sides share out as they have them.
    Raises ValueError for shapes that do not belong together and a block below 1.
    """
    fold, valid, rank, rows, units, keys = (np.asarray(x) for x in (fold, valid, rank, rows, units, keys))
    if fold.ndim != 1 or not fold.shape == valid.shape == rank.shape or units.ndim != 1 or not units.shape == rows.shape == keys.shape:
        raise ValueError(f"fold {fold.shape}, valid {valid.shape} and rank {rank.shape} must be [V] alike, "
                         f"rows {rows.shape}, units {units.shape} and keys {keys.shape} [E] alike")  # fmt: skip
    if block < 1:
        raise ValueError(f"block is {block}, it must be at least 1")
    ours = np.flatnonzero(valid)
    ours, theirs = ours[np.argsort(fold[ours], kind="stable")], np.argsort(units, kind="stable")
    names = np.union1d(fold[ours], units[theirs])
    share = ours.size / max(ours.size + theirs.size, 1)
    most = max(1, round(2 * block * share)), max(1, round(2 * block * (1 - share)))  # both sides are through at about the same time
    counts = [
        np.searchsorted(own, names, "right") - np.searchsorted(own, names) for own in (fold[ours], units[theirs])
    ]  # of both sides' rows, per unit
    parts = np.maximum(1, np.maximum(-(-counts[0] // most[0]), -(-counts[1] // most[1])))
    fat = (names >= 0) & (parts > 1)
    rising = np.append(names[fat], np.iinfo(np.int64).max)
    heavy = [rising[np.searchsorted(rising, own)] == own for own in (fold[ours], units[theirs])]

    thin = np.flatnonzero(~fat)
    which, sizes = _pieces(thin, parts, counts, most)
    block_of, place = _packed(sizes, most)
    table = np.full((int(block_of.max(initial=0)) + 1, int(place.max(initial=0)) + 1), -1, np.int32)
    table[block_of, place] = names[which]
    tables = [_table(x[~h], n, block_of, place, len(table)) for x, h, n in zip((ours, theirs), heavy, sizes, strict=True)]
    number, sizes = _pieces(np.flatnonzero(fat), parts, counts, most)
    every = np.arange(len(number))
    alone = [_table(x[h], n, every, every * 0, len(number))[0] for x, h, n in zip((ours, theirs), heavy, sizes, strict=True)]
    (our_rows, our_place), (their_rows, their_place) = tables
    fat_of = np.searchsorted(np.flatnonzero(fat), number)
    made = [
        table, our_rows, our_place, _at(rows, their_rows), their_place, _at(keys, their_rows),
        names[fat], fat_of, alone[0], _at(rows, alone[1]), _at(keys, alone[1]), rank,
    ]  # fmt: skip
    return Walk(*(x.astype(np.int32) for x in made), valid.astype(bool))


def _pieces(which: np.ndarray, parts: np.ndarray, counts: list[np.ndarray], most: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Units cut into as many parts as they need: (the number of each part's unit, [rows of ours, rows of theirs] of each part)."""
    number = np.repeat(which, parts[which])
    nth = np.arange(len(number)) - np.repeat(np.cumsum(parts[which]) - parts[which], parts[which])
    return number, [np.clip(count[number] - nth * size, 0, size) for count, size in zip(counts, most, strict=True)]


def _packed(sizes: list[np.ndarray], most: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(block, place in it) of every piece, one after the other, a new block where either side is full."""
    block_of, place = np.zeros((2, len(sizes[0])), np.int64)
    block = used = a = b = 0
    for i, (x, y) in enumerate(zip(sizes[0].tolist(), sizes[1].tolist(), strict=True)):
        if used and (used == most[0] or a + x > most[0] or b + y > most[1]):
            block, used, a, b = block + 1, 0, 0, 0
        block_of[i], place[i] = block, used
        used, a, b = used + 1, a + x, b + y
    return block_of, place


def _table(rows: np.ndarray, counts: np.ndarray, block_of: np.ndarray, place: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """([blocks, B] rows, -1 for none, [blocks, B] the place of each) of rows in the order of their pieces."""
    of = np.repeat(block_of, counts)
    size = np.bincount(of, minlength=blocks)
    nth = np.arange(rows.size) - np.repeat(np.cumsum(size) - size, size)
    made = np.full((blocks, max(int(size.max(initial=0)), 1)), -1, np.int64)
    places = np.full(made.shape, place.max(initial=0), np.int64)  # of none: the last one, so that they rise
    made[of, nth], places[of, nth] = rows, np.repeat(place, counts)
    return made, places


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.where(index >= 0, np.append(values, -1)[index], -1)
