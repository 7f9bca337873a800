"""Aligned targets: what a teacher of another tokenizer says at every position of a student's batch, as k + 1 classes a position.

Letters: N rows of the student's batch, NT of the teacher's, V_T teacher ids, k units kept, K = k + 1 places. Everything is float32 whatever
the inputs are; the teacher's logits [N, V_T] are never an array. ``a1jax.align.positions`` makes ``Tables`` and ``Positions``; the
meaning of a target is ``../../shared/design/vocabulary_alignment.md``, section 3, and ``a1jax.align.target`` computes it densely.

All numbers that a position needs are log masses in one row of a teacher's distribution, up to its normaliser: sums over a few gathered
rows of the output matrix (``_sums``), log-sum-exps over the vocabulary, and top-k searches. They lie end to end in a *pool*,

    sums of entries [G] | logsumexp of synchronised rows [P] | of chain rows [C] | of narrow slices [Q] | of wide slices [W],

so that a score is a sum of differences of numbers of the pool, and ``Positions`` says which.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import over_devices
from .aligned import Between, Implementation, aligned_topk
from .layout import Arranged, Layout, arrange
from .ops import SLAB, logsumexp

TILE = 1024  # rows of the teacher that a device searches at a time
BLOCK = 2048  # ids of the vocabulary at a time, where only the log-sum-exp is wanted
LEAST_REST = 2.0**-24  # left of a unit that a chain, or a class set apart, took all of: half a unit in the last place of 1. In float32
# a rest below about 1e-6 of what was there is rounding: no less than this floor, and no more exact.

Key = tuple[str, str, str, int]  # a map's mode, hashes of student and teacher, and the capacity of slices


class Tables(NamedTuple):
    """What does not change between batches of one teacher. layout: of the units of whole tokens. wide: rows (token, offset) of all
    slices above the capacity, ranks offset * V_T + rank; None where there are none. valid bool [V_T]. key: as of ``Positions``."""

    layout: Layout
    wide: Layout | None
    valid: np.ndarray
    key: Key


class Starts(NamedTuple):
    """Where each position's student token begins, int32 [T] numpy arrays: what mode "full" needs, which searches for nothing. Keys are
    offset * V_T + rank; ranges without their ends."""

    row: np.ndarray  # teacher row
    low: np.ndarray  # keys of the teacher's tokens that are possible there
    high: np.ndarray
    apart_low: np.ndarray  # and of those that go on with the bytes of ``alone``; none where that is not set or nothing is pending
    apart_high: np.ndarray


class Positions(NamedTuple):
    """One batch, as integers: numpy int32 arrays, padded to few different sizes (what is read TILE rows at a time to multiples of it)."""

    sync: np.ndarray  # [P] teacher rows where a student token begins with a teacher token
    chain: np.ndarray  # [C] teacher rows inside of chains
    entry_row: np.ndarray  # [E] logits to gather and add up: teacher row,
    entry_id: np.ndarray  # [E] teacher id (-1: none),
    entry_sum: np.ndarray  # [E] rising: the sum it belongs to; G - 1 is empty
    sum_unit: np.ndarray  # [G] the unit that a sum stands for, in slices; -1: none
    narrow_first: np.ndarray  # [Q] first sum of a slice,
    narrow_count: np.ndarray  # [Q] and how many
    wide_row: np.ndarray  # [W] slices above the capacity: teacher row,
    wide_low: np.ndarray  # [W] ranks as in Tables.wide
    wide_high: np.ndarray
    term_over: np.ndarray  # [M] places in the pool: a score is the sum of pool[over] - pool[under]
    term_under: np.ndarray  # [M]
    term_position: np.ndarray  # [M] rising
    row: np.ndarray  # [T] student row; from here on one entry per position, padding beyond all rows
    place: np.ndarray  # [T] in the searches' results, synchronised | narrow | wide: the best units
    total: np.ndarray  # [T] in the pool: log Z
    mass: np.ndarray  # [T] in the pool: of ``unit``, before anything moves to it; where straddled and set apart, of that class
    source: np.ndarray  # [T] where chained: the unit that mass is taken from
    unit: np.ndarray  # [T] and the one it goes to
    alone: np.ndarray  # [T] or the token, where that is set apart as a class of its own; -1 otherwise, in all three
    loser: np.ndarray  # [T] where straddled and set apart: the unit that ``mass`` is taken from
    chained: np.ndarray  # [T] 1 where exp(score) moves
    width: int  # at least as many sums as any narrow slice has
    counts: dict[str, int]  # entries: those that are real; rows: the teacher's highest + 1; student_rows: the student's
    masked: np.ndarray  # int32 [.] student rows of the tokens with no target, which belong in no denominator
    shares: dict[str, float]
    key: Key
    starts: Starts | None = None

    def report(self) -> dict[str, float]:
        """positions (a count, masked ones included), and the shares of them that are straddled, chained and masked."""
        return dict(self.shares)


class Targets(NamedTuple):
    """values float32 [N, K]: log q of each class; q over all classes and the residual is 1. An empty place: -inf.
    units int32 [N, K]: -1 in empty places; ``alone`` in the last place where that is such a class.
    alone int32 [N]: the token that is set apart in the last place, with those of its unit that begin with its bytes; -1 for none.
    score float32 [N]: log-probability of the token that was written; 0 in rows without a position.

    The first k places are the best units before the chain's mass is moved, the last one is for what it moved to, where that is not
    among them."""

    values: jax.Array
    units: jax.Array
    alone: jax.Array
    score: jax.Array


class _Found(NamedTuple):
    """Of a search: values [., k], falling, units [., k] (-inf and -1 in empty places), total [.]: log-sum-exp of all, the residual too."""

    values: jax.Array
    units: jax.Array
    total: jax.Array

    @classmethod
    def empty(cls, size: int, k: int) -> _Found:
        nothing = jnp.full((size, k), -jnp.inf, jnp.float32)
        return cls(nothing, jnp.full((size, k), -1, jnp.int32), nothing[:, 0])


def aligned_targets(
    hidden: jax.Array, unembed: jax.Array, tables: Tables, positions: Positions, k: int, rows: int, implementation: Implementation = "auto"
) -> Targets:
    """The targets of N = ``rows`` rows of a student's batch, no gradient; rows that no position points at are empty.

    hidden [NT, D]: the teacher's, row n predicts its next token. unembed [V_T, D]: as many rows as the map has teacher ids; rows that hold
    -inf are padding. implementation: of ``aligned_topk``. A sequence of jitted calls: call it from the host.

    Under a mesh (``jax.set_mesh``, of one process) all its devices, whatever their axes are for elsewhere, share out the searched rows and
    the entries, see ``over_devices``: the results are those of one device, and every device has them all. For that every device gets a
    copy of hidden, of unembed, and while it searches of unembed in the layout's order: NT D + 2 V_T D numbers, 2.2 GiB in bfloat16
    at NT = 45,000, D = 2,048 and V_T = 248,320. What is computed with them is the large part, and is cut by the number of devices.

    Raises ValueError for shapes that do not belong together, tables of another map, k below 1, and rows out of range.
    """
    _check(hidden, unembed, tables, positions, k, rows)
    hidden, unembed = over_devices.whole(lax.stop_gradient((hidden, unembed)))
    at, search = positions, functools.partial(_searched, hidden, unembed, k=k, implementation=implementation)
    masses = _sums(hidden, unembed, at.entry_row, at.entry_id, at.entry_sum, at.counts["entries"], at.sum_unit.size)
    sync = _cut(search(tables.layout, [(row, None) for (row,) in _tiles(at.sync)]), at.sync.size)
    chain = _cut([_totals(hidden, unembed, tables.valid, row) for (row,) in _tiles(at.chain)], at.chain.size)
    narrow = [_narrow(masses, at.sum_unit, *part, at.width, k) for part in _tiles(at.narrow_first, at.narrow_count)]
    wide = search(tables.wide, [(row, tuple(slice_)) for row, *slice_ in _tiles(at.wide_row, at.wide_low, at.wide_high)])
    sliced = _cut(narrow, at.narrow_first.size) + _cut(wide, at.wide_row.size)
    pool = [masses, *(part.total for part in sync), *chain, *(part.total for part in sliced)]
    found = [*sync, *sliced] or [_Found.empty(1, k)]
    values, units = _joined([part.values for part in found], -jnp.inf), _joined([part.units for part in found], -1)
    terms = (at.term_over, at.term_under, at.term_position)
    where = (at.row, at.place, at.total, at.mass, at.source, at.unit, at.alone, at.loser, at.chained)
    return _assemble(values, units, _joined(pool, -jnp.inf), terms, where, rows)


def _check(hidden, unembed, tables, positions, k, rows) -> None:
    if hidden.ndim != 2 or unembed.ndim != 2 or hidden.shape[1] != unembed.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and unembed {unembed.shape} must be [NT, D] and [V_T, D] of one width D")
    if unembed.shape[0] != tables.valid.size:
        raise ValueError(
            f"the map is of a teacher with {tables.valid.size} ids, and its output matrix has {unembed.shape[0]} rows: "
            "build the map with that vocab_size, or of this teacher's tokenizer"
        )
    if tables.key != positions.key:
        raise ValueError("the positions were made with another vocabulary map or capacity than the tables: use one for both")
    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1")
    for name, size in (("rows", hidden.shape[0]), ("student_rows", rows)):
        if positions.counts[name] > size:
            raise ValueError(f"a position points at row {positions.counts[name] - 1} of {'hidden' if name == 'rows' else 'the student'}, "
                             f"and there are {size}")  # fmt: skip


def _joined(parts: list[jax.Array], fill: float | int) -> jax.Array:
    """One after the other, filled up to a power of two, so that ``_assemble`` is compiled for few sizes."""
    total = sum(part.shape[0] for part in parts)
    rest = (1 << (total - 1).bit_length()) - total
    return jnp.concatenate([*parts, jnp.full((rest, *parts[0].shape[1:]), fill, parts[0].dtype)])


def _tiles(*arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """TILE rows a device at a time, fewer where there are fewer, filled up with zeros, so that few programs are compiled: without a
    mesh nothing is filled up, as the arrays are as long as ``Positions`` says."""
    rows, step = arrays[0].size, TILE * over_devices.count()
    size = min(1 << max(rows - 1, 0).bit_length(), step) if rows <= step else -(-rows // step) * step
    arrays = tuple(np.pad(x, (0, size - rows)) for x in arrays)
    return [tuple(x[start : start + step] for x in arrays) for start in range(0, rows, step)]


def _cut(parts: list, size: int) -> list:
    """The results of ``_tiles``, without those of rows that were filled in: ``size`` rows in all."""
    extra = sum(jax.tree.leaves(part)[0].shape[0] for part in parts) - size
    return [*parts[:-1], jax.tree.map(lambda x: x[:-extra], parts[-1])] if extra else parts


def _searched(hidden, unembed, planned: Layout | None, parts: list, *, k: int, implementation: Implementation) -> list[_Found]:
    """The search of every (rows, slices) in the output matrix, laid out for this call alone: it would double what a teacher holds."""
    if not parts:
        return []
    arranged = arrange(unembed, planned)
    return [_search(hidden, arranged, row, between, k, implementation) for row, between in parts]


@functools.partial(jax.jit, static_argnames=("k", "implementation"))
def _search(hidden: jax.Array, arranged: Arranged, row: jax.Array, between: Between, k: int, implementation: Implementation) -> _Found:
    """The rows' best units, each within its slice."""

    def search(rows, arranged):
        hidden, between = rows
        found = aligned_topk(hidden, arranged, k, between=between, implementation=implementation)
        return _Found(found.values, found.units, found.logsumexp)

    return over_devices.by_rows(search, (hidden[row], between), arranged, gather=True)


@jax.jit
def _totals(hidden: jax.Array, unembed: jax.Array, valid: jax.Array, row: jax.Array) -> jax.Array:
    """[C] log-sum-exp over the vocabulary."""
    return over_devices.by_rows(lambda hidden, by: logsumexp(hidden, by[0], BLOCK, by[1]), hidden[row], (unembed, valid), gather=True)


@functools.partial(jax.jit, static_argnames=("sums",))
def _sums(
    hidden: jax.Array, unembed: jax.Array, row: jax.Array, token: jax.Array, which: jax.Array, count: jax.Array, sums: int
) -> jax.Array:
    """[G] log-sum-exp of the gathered logits of each sum; -inf where it has none. ``which`` rises; the first ``count`` entries are real."""
    entries = (row, token, jnp.arange(row.shape[0], dtype=jnp.int32) < count)
    logits = over_devices.by_rows(_entries, entries, (hidden, unembed), gather=True)
    top = jax.ops.segment_max(logits, which, sums, indices_are_sorted=True)
    shift = jnp.where(jnp.isfinite(top), top, 0)
    return shift + jnp.log(jax.ops.segment_sum(jnp.exp(logits - shift[which]), which, sums, indices_are_sorted=True))


def _entries(entries: tuple, arrays: tuple) -> jax.Array:
    """[E] logits, a slab of rows at a time until the last real entry, which all real ones stand before; -inf for the others."""
    (row, token, real), (hidden, unembed) = entries, arrays
    size, count = row.shape[0], jnp.sum(real.astype(jnp.int32))
    tile = min(size, 1 << max(SLAB // hidden.shape[1], 1).bit_length() - 1)

    def step(state):
        index, logits = state
        rows, ids = (lax.dynamic_slice_in_dim(x, index * tile, tile) for x in (row, token))
        matrix = unembed[jnp.maximum(ids, 0)]
        fine = (ids >= 0) & ~jnp.any(jnp.isneginf(matrix), axis=1)
        matrix = jnp.where(fine[:, None], matrix, 0)  # 0 times -inf is no number
        new = jnp.einsum("ed,ed->e", hidden[rows], matrix, preferred_element_type=jnp.float32)
        return index + 1, lax.dynamic_update_slice_in_dim(logits, jnp.where(fine, new, -jnp.inf), index * tile, 0)

    state = (jnp.int32(0), jnp.full((size,), -jnp.inf, jnp.float32))
    return lax.while_loop(lambda state: state[0] * tile < count, step, state)[1]


@functools.partial(jax.jit, static_argnames=("width", "k"))
def _narrow(masses: jax.Array, sum_unit: jax.Array, first: jax.Array, count: jax.Array, width: int, k: int) -> _Found:
    """The best units of slices whose units' masses are masses[first : first + count]; lower units first."""
    lane = jnp.arange(max(width, k), dtype=jnp.int32)[None, :]

    def best_of(rows, copied):
        (first, count), (masses, sum_unit) = rows, copied
        inside = lane < count[:, None]
        places = jnp.where(inside, first[:, None] + lane, 0)
        values, units = jnp.where(inside, masses[places], -jnp.inf), jnp.where(inside, sum_unit[places], -1)
        best, place = lax.top_k(jnp.where(units >= 0, values, -jnp.inf), k)
        units = jnp.where(jnp.isneginf(best), -1, jnp.take_along_axis(units, place, axis=1))
        return _Found(best, units, jax.nn.logsumexp(values, axis=1))

    return over_devices.by_rows(best_of, (first, count), (masses, sum_unit), gather=True)


@functools.partial(jax.jit, static_argnames=("rows",))
def _assemble(values: jax.Array, units: jax.Array, pool: jax.Array, terms: tuple, where: tuple, rows: int) -> Targets:
    """From masses to targets: normalised, the chain's mass moved, at the rows of the student's batch."""
    over, under, position = terms
    row, place, total, mass, source, unit, alone, loser, chained = (jnp.asarray(x) for x in where)
    score = jax.ops.segment_sum(_less(pool[over], pool[under]), position, row.shape[0] + 1, indices_are_sorted=True)[:-1]
    total, units = pool[total], units[place]
    values = _less(values[place], total[:, None])
    mass, moved = _less(pool[mass], total), jnp.where(chained > 0, score, -jnp.inf)
    values = _without(_without(values, units, source, moved), units, loser, mass)
    given = (units == unit[:, None]) & (unit >= 0)[:, None]
    values = jnp.where(given, jnp.logaddexp(values, moved[:, None]), values)
    extra = ((unit >= 0) & ~jnp.any(given, axis=1)) | (alone >= 0)
    last = jnp.where(extra, jnp.logaddexp(mass, moved), -jnp.inf)
    some = ~jnp.isneginf(last)
    values = jnp.concatenate([values, last[:, None]], axis=1)
    units = jnp.concatenate([units, jnp.where(some, jnp.where(alone >= 0, alone, unit), -1)[:, None]], axis=1)
    nothing = _Found.empty(rows, values.shape[1])
    empty = Targets(nothing.values, nothing.units, jnp.full((rows,), -1, jnp.int32), jnp.zeros((rows,), jnp.float32))
    made = Targets(values, units, jnp.where(some, alone, -1), score)
    return jax.tree.map(lambda old, new: old.at[row].set(new, mode="drop"), empty, made)


def _without(values: jax.Array, units: jax.Array, unit: jax.Array, amount: jax.Array) -> jax.Array:
    """Log masses [T, k], that of ``unit`` [T] less ``amount`` [T]; never less than LEAST_REST of what it was."""
    taken = (units == unit[:, None]) & (unit >= 0)[:, None]
    share = jnp.minimum(jnp.where(taken, amount[:, None] - values, -jnp.inf), -LEAST_REST)
    return jnp.where(taken, values + jnp.log(-jnp.expm1(share)), values)


def _less(over: jax.Array, under: jax.Array) -> jax.Array:
    """over - under for log masses, one a part of the other: -inf of nothing is -inf."""
    return jnp.where(jnp.isneginf(over), -jnp.inf, over - under)
