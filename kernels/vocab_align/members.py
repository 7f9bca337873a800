"""The logits of units: the student's side of a comparison in which several of its ids are one class.

A unit is a set of rows of the output matrix, and its logit is the log-sum-exp of theirs. *Thin* units have few rows, which are
gathered for every token that asks for the unit: the first row of every place at once, all further rows (most units have none) by
columns, in a loop that runs as long as some token has any. *Fat* units have more: their rows lie in lanes and planes like those of
``layout`` and are multiplied block by block with all tokens. The logits [N, V] are never an array.

Letters: N tokens, D width, V student ids, K places of a token, U units, B rows of a block. Logits are float32 whatever the inputs are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import blocks, fat_units, over_devices, planes
from .layout import MOST
from .ops import SLAB, from_slabs, into_slabs, scatter, slab_count

COLUMNS = 32  # further rows of a token that are gathered at a time


class Members(NamedTuple):
    """Which rows each unit sums over; int32 arrays, a pytree. Made by ``members``; U = number of folds * V.

    starts [U + 1], rows [.]: a thin unit u has rows[starts[u]:starts[u + 1]]; a fat one has none there.
    fat [U]: its number among the fat ones, -1 where thin. fat_rows [blocks, B]: the row at plane * (B / 16) + lane, -1: none.
    fat_lanes [blocks, B / 16]: the number of the fat unit that has the lane; past the last unit, how many there are.
    unit_of [U]: the unit that each id is compared in, -1: none. rank [V], low [V], high [V], or [0] where not given: ids by their
    bytes; those that begin with the bytes of id y are those of rank low[y] to high[y] - 1.
    """

    starts: jax.Array | np.ndarray
    rows: jax.Array | np.ndarray
    fat: jax.Array | np.ndarray
    fat_rows: jax.Array | np.ndarray
    fat_lanes: jax.Array | np.ndarray
    unit_of: jax.Array | np.ndarray
    rank: jax.Array | np.ndarray
    low: jax.Array | np.ndarray
    high: jax.Array | np.ndarray


def members(folds: Sequence[np.ndarray], thin: int = 16, block: int = 2048, prefixes: Sequence[np.ndarray] | None = None) -> Members:
    """The units of several maps of one student: of each, ``unit_of_student`` int [V], the unit that every id is compared in, -1: none.

    Unit u of map number t gets the id t * V + u, so that rows of several teachers are trained in one batch. An id y that is no unit
    gets one too, where prefixes are given: the rows of its unit that begin with y's bytes, for ``gather_units(alone=)``. prefixes: (rank,
    low, high) int [V] as in ``Members``. thin: the largest
    fan-in that is gathered; block: rows of a block of fat units, a multiple of 16. No result depends on either beyond rounding.
    Raises ValueError for folds that are not integers [V] of one V from -1 to V - 1, and for sizes that make no sense.
    """
    folds = [np.asarray(fold) for fold in folds]
    vocab = folds[0].size if folds else 0
    if not vocab or any(f.shape != (vocab,) or not np.issubdtype(f.dtype, np.integer) for f in folds):
        raise ValueError(f"folds {[(str(f.dtype), f.shape) for f in folds]} must be integers [V], at least one, of one V")
    if any(f.min() < -1 or f.max() >= vocab for f in folds):
        raise ValueError(f"folds go from {min(f.min() for f in folds)} to {max(f.max() for f in folds)}: units are -1 to {vocab - 1}")
    if thin < 1 or block < MOST or block % MOST:
        raise ValueError(f"thin is {thin} and block {block}: thin must be at least 1, block a multiple of {MOST}")
    if len(folds) * vocab >= 2**31:
        raise ValueError(f"{len(folds)} folds of {vocab} ids are more units than an int32 can number")
    ids = np.arange(vocab, dtype=np.int64)
    rank, low, high = np.zeros((3, 0), np.int64) if prefixes is None else (np.asarray(x, np.int64) for x in prefixes)
    pairs = [(np.where(f < 0, -1, t * vocab + f.astype(np.int64)), ids) for t, f in enumerate(folds)]
    unit_of = np.concatenate([unit for unit, _ in pairs])
    if prefixes is not None:
        pairs += [(t * vocab + token, row) for t, f in enumerate(folds) for token, row in [_extensions(f, rank, low, high)]]
    unit, rows = (np.concatenate(x) for x in zip(*pairs, strict=True))
    order = np.argsort(unit, kind="stable")[np.count_nonzero(unit < 0) :]
    rows, unit = rows[order].astype(np.int32), unit[order]
    fan_in = np.bincount(unit, minlength=len(folds) * vocab)
    fat = np.flatnonzero(fan_in > thin)
    number = np.full(fan_in.size, -1, np.int32)
    number[fat] = np.arange(fat.size)
    starts = np.concatenate([[0], np.cumsum(np.where(number < 0, fan_in, 0))]).astype(np.int32)
    gathered = rows[number[unit] < 0] if (number[unit] < 0).any() else np.zeros(1, np.int32)  # an empty array could not be indexed
    lanes = fat_units.lanes(rows[number[unit] >= 0], fan_in[fat], block)
    return Members(starts, gathered, number, *lanes, *(x.astype(np.int32) for x in (unit_of, rank, low, high)))


def _extensions(fold: np.ndarray, rank: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(token, row) of every token that is no unit itself, and every row of its unit that begins with its bytes, itself included."""
    by_rank = np.argsort(rank)
    token = np.flatnonzero((fold != np.arange(fold.size)) & (high > low))
    count = high[token] - low[token]
    place = np.repeat(low[token] - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
    token, row = np.repeat(token, count), by_rank[place]
    same = fold[row] == fold[token]
    return token[same], row[same]


def gather_units(
    hidden: jax.Array, unembed: jax.Array, units: jax.Array, members: Members, alone: jax.Array | None = None, slab: int = SLAB
) -> jax.Array:
    """float32 [N, K]: the logits of units int32 [N, K], each the log-sum-exp of the logits of its rows; -inf at unit -1.

    hidden [N, D]; unembed [V, D]. alone int32 [N], -1 for none: an id that is no unit, set apart at this token: its unit's rows that
    begin with its bytes are left out of that unit, and the last place names their class, units[n, K - 1] = t * V + alone[n]. Exact for
    any fan-in. A unit without rows is -inf.
    Gradient to hidden and unembed, summed in float32, from rows gathered again; zero for units of -inf.
    Memory: slab elements of gathered rows (it changes nothing else), and N * B logits where there are fat units. Under a mesh the tokens
    are cut over all its devices, each with a copy of unembed, see ``over_devices``; the gradient to unembed is summed over them once.
    """
    if hidden.ndim != 2 or unembed.ndim != 2 or hidden.shape[1] != unembed.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and unembed {unembed.shape} must be [N, D] and [V, D] of one width D")
    tokens = hidden.shape[0]
    if units.ndim != 2 or units.shape[0] != tokens or units.shape[1] < 1 or (alone is not None and alone.shape != (tokens,)):
        named = "none" if alone is None else alone.shape
        raise ValueError(f"units {units.shape} and alone {named} must be [{tokens}, K] and [{tokens}], as hidden is {hidden.shape}")
    if members.fat.shape[0] % unembed.shape[0]:
        raise ValueError(f"members has {members.fat.shape[0]} units, no multiple of the {unembed.shape[0]} rows of the output matrix")
    if alone is not None and not members.rank.shape[0]:
        raise ValueError("alone needs members that were made with prefixes: nothing says what begins with a token's bytes")
    members = Members(*(jnp.asarray(x, jnp.int32) for x in members))
    alone = jnp.full((tokens,), -1, jnp.int32) if alone is None else alone
    if members.rank.shape[0]:
        some, apart, named = alone >= 0, jnp.maximum(alone, 0), jnp.clip(units[:, -1], 0, members.fat.shape[0] - 1)
        # [N, 3]: the ranks of what is set apart, and the unit that it leaves.
        alone = jnp.stack([jnp.where(some, x, -1) for x in (members.low[apart], members.high[apart], members.unit_of[named])], axis=1)
    else:
        members, alone = members._replace(rank=jnp.zeros(unembed.shape[:1], jnp.int32)), jnp.full((tokens, 3), -1, jnp.int32)
    units = jnp.where((units >= 0) & (units < members.fat.shape[0]), units, -1)

    def gather(rows, copied):
        (hidden, units, alone), (unembed, members) = rows, copied
        return _gather(hidden, unembed, units, members, alone, slab)

    return over_devices.by_rows(gather, (hidden, units, alone), (unembed, members))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _gather(hidden, unembed, units, members, alone, slab):
    slabs = _slabs(hidden, units, slab)

    def one(part):
        hidden, units, alone = part
        first, chosen, more = _thin(units, members, alone)
        logits = _logits(hidden, unembed[chosen], first)
        start = jnp.maximum(logits, -planes.LARGEST), jnp.where(jnp.isneginf(logits), 0.0, 1.0)

        def add(state):
            column, (maximum, total) = state
            place, chosen, taken = _column(column, *more, members, alone)
            logits = _logits(hidden, unembed[chosen], taken)
            new = jax.vmap(lambda x, at, y: x.at[at].max(y))(maximum, place, logits)
            terms = jnp.exp(logits - jnp.take_along_axis(new, place, axis=1))
            total = jax.vmap(lambda x, at, y: x.at[at].add(y))(total * jnp.exp(maximum - new), place, terms)
            return column + COLUMNS, (new, total)

        return blocks.finish_logsumexp(_while_rows(more, add, start))

    parts = jax.tree.map(lambda x: into_slabs(x, slabs), (hidden, units, alone))
    values = from_slabs(lax.map(one, parts), hidden.shape[0])
    if not members.fat_rows.shape[0]:
        return values
    return fat_units.fill(values, hidden, unembed, units, members, alone)


def _slabs(hidden, units, slab):
    return slab_count(hidden.shape[0], max(units.shape[1], COLUMNS), hidden.shape[1], slab)


def _thin(units, members, alone):
    """(whether each place [n, K] has a first row that counts, that row, what ``_column`` needs for the further ones)."""
    unit = jnp.maximum(units, 0)
    start = members.starts[unit]
    fan_in = jnp.where(units >= 0, members.starts[unit + 1] - start, 0)
    rows = members.rows[start]
    there = (fan_in > 0) & stays(rows, units, members, alone)
    further = jnp.maximum(fan_in - 1, 0)
    ends = jnp.cumsum(further, axis=1)
    return there, jnp.where(there, rows, 0), (start + 1 - (ends - further), ends, units)


def stays(rows, units, members, alone):
    """bool [n, .]: whether rows [n, .] of units [n, .] (or [1, .]) are in them still: all but those set apart from their own unit, whose
    rank lies between alone[:, 0] and alone[:, 1]; the unit is alone[:, 2]."""
    rank = members.rank[rows]
    return (units != alone[:, 2:]) | (rank < alone[:, :1]) | (rank >= alone[:, 1:2])


def _column(column, start, ends, units, members, alone):
    """The next COLUMNS of the further rows of every token: their places, the rows, which of them count, all [n, COLUMNS]."""
    at = column + jnp.arange(COLUMNS, dtype=jnp.int32)
    place = jax.vmap(lambda x: jnp.searchsorted(x, at, side="right"))(ends).astype(jnp.int32)
    place = jnp.minimum(place, ends.shape[1] - 1)
    taken = at[None, :] < ends[:, -1:]
    rows = members.rows[jnp.where(taken, jnp.take_along_axis(start, place, axis=1) + at[None, :], 0)]
    return place, rows, taken & stays(rows, jnp.take_along_axis(units, place, axis=1), members, alone)


def _while_rows(more, add, state):
    longest = jnp.max(more[1][:, -1])
    return lax.while_loop(lambda state: state[0] < longest, add, (jnp.int32(0), state))[1]


def _logits(hidden, rows, counts):
    return jnp.where(counts, jnp.einsum("nd,nkd->nk", hidden, rows, preferred_element_type=jnp.float32), -jnp.inf)


def _forward(hidden, unembed, units, members, alone, slab):
    values = _gather(hidden, unembed, units, members, alone, slab)
    return values, (hidden, unembed, units, members, alone, values)


def _backward(slab, saved, cotangent):
    hidden, unembed, units, members, alone, values = saved
    slabs = _slabs(hidden, units, slab)
    cotangent = jnp.where(jnp.isneginf(values), 0.0, cotangent)
    values = jnp.where(jnp.isneginf(values), 0.0, values)

    def one(d_unembed, part):
        hidden, units, alone, values, cotangent = part

        def add(gradients, chosen, counts, values, cotangent):
            """The share of a row in its unit is exp(its logit - the unit's)."""
            d_hidden, d_unembed = gradients
            rows = unembed[chosen]
            grad = cotangent * jnp.exp(jnp.where(counts, _logits(hidden, rows, counts) - values, -jnp.inf))
            d_hidden = d_hidden + jnp.einsum("nk,nkd->nd", grad, rows.astype(jnp.float32))
            return d_hidden, scatter(hidden, chosen, grad, d_unembed, slab)

        def add_column(state):
            column, gradients = state
            place, chosen, taken = _column(column, *more, members, alone)
            picked = (jnp.take_along_axis(x, place, axis=1) for x in (values, cotangent))
            return column + COLUMNS, add(gradients, chosen, taken, *picked)

        first, chosen, more = _thin(units, members, alone)
        gradients = add((jnp.zeros(hidden.shape, jnp.float32), d_unembed), chosen, first, values, cotangent)
        d_hidden, d_unembed = _while_rows(more, add_column, gradients)
        return d_unembed, d_hidden

    parts = jax.tree.map(lambda x: into_slabs(x, slabs), (hidden, units, alone, values, cotangent))
    d_unembed, d_hidden = lax.scan(one, jnp.zeros(unembed.shape, jnp.float32), parts)
    gradients = from_slabs(d_hidden, hidden.shape[0]), d_unembed
    if members.fat_rows.shape[0]:
        gradients = fat_units.add_gradients(gradients, hidden, unembed, units, members, alone, values, cotangent)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (hidden, unembed), strict=True)), None, None, None


_gather.defvjp(_forward, _backward)
