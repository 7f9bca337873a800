"""Units of many rows, for ``members``: their rows in lanes and planes like those of ``layout``, block by block times all tokens.

Letters as in ``members``. A block of B rows has B / 16 lanes of 16 planes; a unit takes as many neighbouring lanes as it needs,
over the end of a block into the next one if need be. Only blocks are walked of which some token wants a unit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import blocks, planes
from .layout import MOST


def lanes(rows: np.ndarray, fan_in: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(fat_rows, fat_lanes) of the rows of all fat units, one unit after the other."""
    width, wide = block // MOST, -(-fan_in // MOST)
    ends = np.cumsum(wide)
    count = -(-int(wide.sum()) // width)
    nth = np.arange(rows.size) - np.repeat(np.cumsum(fan_in) - fan_in, fan_in)
    lane = np.repeat(ends - wide, fan_in) + nth % np.repeat(wide, fan_in)
    fat_rows = np.full(count * block, -1, np.int32)
    fat_rows[lane // width * block + nth // np.repeat(wide, fan_in) * width + lane % width] = rows
    fat_lanes = np.full(count * width, fan_in.size, np.int32)
    fat_lanes[: wide.sum()] = np.repeat(np.arange(fan_in.size), wide)
    return fat_rows.reshape(count, block), fat_lanes.reshape(count, width)


def _block(index, hidden, unembed, members, alone):
    """(rows of fat block ``index`` [B], zeros for none; the matrix [B, D]; logits [N, B], -inf where no row counts)."""
    rows = members.fat_rows[index]
    matrix = unembed[jnp.maximum(rows, 0)]
    rank = members.rank[jnp.maximum(rows, 0)][None, :]
    # As in members.stays, by lanes: those of the unit that something is set apart from.
    left = jnp.where(alone[:, 2:] >= 0, members.fat[jnp.maximum(alone[:, 2:], 0)], -1)
    own = jnp.tile((members.fat_lanes[index][None, :] == left) & (left >= 0), (1, MOST))
    counts = (rows >= 0)[None, :] & (~own | (rank < alone[:, :1]) | (rank >= alone[:, 1:2]))
    return rows, matrix, jnp.where(counts, blocks.product(hidden, matrix), -jnp.inf)


def _walk(body, state, units, members):
    """Folds ``body(state, number of a block, number of each place's fat unit [N, K] or -1)`` over the blocks that some token wants."""
    number = jnp.where(units >= 0, members.fat[jnp.maximum(units, 0)], -1)
    lanes = members.fat_lanes  # there are never more units than lanes
    asked = jnp.zeros(lanes.size, bool).at[jnp.where(number < 0, lanes.size, number)].set(True, mode="drop")
    wanted = jnp.any(asked[lanes], axis=1)
    order, count = jnp.argsort(jnp.logical_not(wanted), stable=True), jnp.sum(wanted.astype(jnp.int32))

    # A loop as long as there are any, and no lax.cond in one over all: products within a cond took 1.7 times as long on a CPU.
    def step(carry):
        return carry[0] + 1, body(carry[1], order[carry[0]], number)

    return number, lax.while_loop(lambda carry: carry[0] < count, step, (jnp.int32(0), state))[1]


def _within(number, lanes):
    """Place of each unit [N, K] among those of a block, whose lanes have the numbers [B / 16]; never below 0, and at least B / 16 for
    one that comes after all of a block or is in none: a block has no more units than lanes."""
    return jnp.where((number >= 0) & (number >= lanes[0]), number - lanes[0], lanes.size)


def fill(values, hidden, unembed, units, members, alone):
    """``values`` with the places of fat units filled in."""
    width = members.fat_lanes.shape[1]

    def body(running, index, number):
        maximum, total = running
        lanes = members.fat_lanes[index]
        logits = _block(index, hidden, unembed, members, alone)[2].reshape(-1, MOST, width)
        # Over the lanes of each unit: its own maximum, so that none is lost next to another of far larger mass.
        over = {"segment_ids": lanes - lanes[0], "num_segments": width, "indices_are_sorted": True}
        most = jnp.maximum(jax.ops.segment_max(jnp.max(logits, axis=1).T, **over), -planes.LARGEST).T
        terms = jnp.sum(jnp.exp(logits - most[:, lanes - lanes[0]][:, None]), axis=1)
        sums = jax.ops.segment_sum(terms.T, **over).T
        at = _within(number, lanes)
        most, sums = (jnp.take_along_axis(x, jnp.minimum(at, width - 1), axis=1) for x in (most, sums))
        new = jnp.where(at < width, jnp.maximum(maximum, most), maximum)
        return new, total * jnp.exp(maximum - new) + jnp.where(at < width, sums * jnp.exp(most - new), 0)

    start = jnp.full(values.shape, -planes.LARGEST), jnp.zeros(values.shape, jnp.float32)
    number, running = _walk(body, start, units, members)
    return jnp.where(number >= 0, blocks.finish_logsumexp(running), values)


def add_gradients(gradients, hidden, unembed, units, members, alone, values, cotangent):
    """Both gradients with the part of the fat units."""
    width = members.fat_lanes.shape[1]

    def body(gradients, index, number):
        lanes = members.fat_lanes[index]
        rows, matrix, logits = _block(index, hidden, unembed, members, alone)
        # The places' cotangents go to the units of the block, and from there to the lanes.
        at, mine = _within(number, lanes), lanes - lanes[0]
        empty = jnp.zeros(width, jnp.float32)
        grad = jax.vmap(lambda at, x: empty.at[at].add(x, mode="drop"))(at, cotangent)[:, mine]
        value = jax.vmap(lambda at, x: (empty + planes.LARGEST).at[at].set(x, mode="drop"))(at, values)[:, mine]
        grad = jnp.tile(grad, (1, MOST)) * jnp.exp(logits - jnp.tile(value, (1, MOST)))
        d_rows = lax.dot_general(grad, hidden.astype(jnp.float32), (((0,), (0,)), ((), ())))
        d_hidden, d_unembed = gradients
        rows = jnp.where(rows < 0, unembed.shape[0], rows)
        return d_hidden + grad @ matrix.astype(jnp.float32), d_unembed.at[rows].add(d_rows, mode="drop")

    return _walk(body, gradients, units, members)[1]
