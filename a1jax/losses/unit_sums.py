"""Sums over rows of two output matrices that are walked together, for ``full_aligned``: what is possible, what is set apart, per unit.

Letters as in ``kernels.vocab_align.unit_walk``: N tokens, B and B' rows of the student's and the teacher's in a block, L units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from a1jax.kernels.vocab_align import blocks

LARGEST = float(jnp.finfo(jnp.float32).max)


def theirs(hidden, unembed, read, rows, keys):
    """Logits [N, B'] of a block's rows, -inf where they are not possible, and which are set apart if their unit is alone_unit."""
    matrix = unembed[jnp.maximum(rows, 0)]
    fine = (rows >= 0) & ~jnp.any(jnp.isneginf(matrix), axis=1)
    logits = blocks.product(hidden, jnp.where(fine[:, None], matrix, 0))
    possible = fine[None, :] & _between(keys, read.low, read.high)
    return jnp.where(possible, logits, -jnp.inf), _between(keys, read.apart_low, read.apart_high)


def ours(hidden, unembed, walk, read, rows):
    """Logits [N, B] of a block's rows, -inf where they are no tokens, the rows, and as ``theirs``."""
    matrix = unembed[jnp.maximum(rows, 0)]
    fine = (rows >= 0) & ~jnp.any(jnp.isneginf(matrix), axis=1)
    matrix = jnp.where(fine[:, None], matrix, 0)
    logits = jnp.where(fine[None, :], blocks.product(hidden, matrix), -jnp.inf)
    return logits, matrix, _between(walk.rank[jnp.maximum(rows, 0)], read.our_low, read.our_high)


def _between(x, low, high):
    return (x[None, :] >= low[:, None]) & (x[None, :] < high[:, None])


def leaves(read, units):
    """bool [N, B]: whether what is set apart leaves the unit int [B] of each row."""
    return (units[None, :] == read.alone_unit[:, None]) & (read.alone >= 0)[:, None]


def split(logits, apart):
    """(logits that stay in their units, those that are set apart)."""
    return jnp.where(apart, -jnp.inf, logits), jnp.where(apart, logits, -jnp.inf)


def join(logits, place, count):
    """[N, B] -> [N, count]: log-sum-exp of the columns of each place (rising), -inf where there is nothing."""
    over = {"segment_ids": place, "num_segments": count, "indices_are_sorted": True}
    most = jnp.clip(jax.ops.segment_max(logits.T, **over), -LARGEST, LARGEST)  # inf - inf would be no number
    return (most + jnp.log(jax.ops.segment_sum(jnp.exp(logits.T - most[place]), **over))).T


def add(mass, logits, of):
    """A fat unit's sum [N] with one more block's."""
    more = jnp.logaddexp(mass[:, of], join(logits, jnp.zeros(logits.shape[1], jnp.int32), 1)[:, 0])
    return mass.at[:, of].set(more)


def teacher(hidden, unembed, walk, read):
    """Log-sum-exps: of all possible rows [N], of those set apart [N], of the fat units [N, F] without them."""
    start = blocks.start_logsumexp(hidden.shape[0])

    def thin(sums, part):
        units, rows, place, keys = part
        logits, apart = theirs(hidden, unembed, read, rows, keys)
        _, away = split(logits, apart & leaves(read, units[place]))
        return tuple(blocks.add_logsumexp(x, y) for x, y in zip(sums, (logits, away), strict=True)), None

    def fat(state, part):
        (total, apart), mass = state
        of, rows, keys = part
        logits, between = theirs(hidden, unembed, read, rows, keys)
        stay, away = split(logits, between & leaves(read, walk.fat_units[of][None]))
        return ((blocks.add_logsumexp(total, logits), blocks.add_logsumexp(apart, away)), add(mass, stay, of)), None

    sums = lax.scan(thin, (start, start), (walk.units, walk.theirs, walk.their_place, walk.keys))[0]
    mass = nothing(hidden, walk)
    if walk.fat_of.shape[0]:
        sums, mass = lax.scan(fat, (sums, mass), (walk.fat_of, walk.fat_theirs, walk.fat_keys))[0]
    return *(blocks.finish_logsumexp(x) for x in sums), mass


def nothing(hidden, walk):
    """The fat units' sums [N, F] before any block."""
    return jnp.full((hidden.shape[0], walk.fat_units.shape[0]), -jnp.inf, jnp.float32)
