"""Units of many rows, for ``members``: their rows in lanes and planes like those of ``layout``, block by block times all tokens.

Letters as in ``members``. A block of B rows has B / 16 lanes of 16 planes; a unit takes as many neighbouring lanes as it needs,
over the end of a block into the next one if need be. Blocks of which no token wants a unit are skipped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import blocks, planes
from .layout import MOST


def lanes(rows: np.ndarray, fan_in: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ends, fat_rows, parts) of the rows of all fat units, one unit after the other."""
    width, wide = block // MOST, -(-fan_in // MOST)
    ends = np.cumsum(wide)
    count = -(-int(wide.sum()) // width)
    nth = np.arange(rows.size) - np.repeat(np.cumsum(fan_in) - fan_in, fan_in)
    lane = np.repeat(ends - wide, fan_in) + nth % np.repeat(wide, fan_in)
    fat_rows = np.full(count * block, -1, np.int32)
    fat_rows[lane // width * block + nth // np.repeat(wide, fan_in) * width + lane % width] = rows
    parts = np.full(count * width, 2 * fan_in.size, np.int32)
    parts[: wide.sum()] = 2 * np.repeat(np.arange(fan_in.size), wide)
    parts[ends - 1] += 1
    return ends.astype(np.int32), fat_rows.reshape(count, block), parts.reshape(count, width)


def _block(index, hidden, unembed, members, alone):
    """(rows of fat block ``index`` [B], zeros for none; the matrix [B, D]; logits [N, B], -inf where no row counts)."""
    rows = members.fat_rows[index]
    matrix = unembed[jnp.maximum(rows, 0)]
    counts = (rows >= 0)[None, :] & (rows[None, :] != alone[:, None])
    return rows, matrix, jnp.where(counts, blocks.product(hidden, matrix), -jnp.inf)


def _wanted(units, members):
    """(number of each place's fat unit [N, K] or -1, its last lane, bool [blocks]: some token wants a unit of that block)."""
    number = jnp.where(units >= 0, members.fat[jnp.maximum(units, 0)], -1)
    lane = members.ends[jnp.maximum(number, 0)] - 1
    asked = jnp.zeros(members.ends.shape, bool).at[jnp.where(number < 0, members.ends.size, number)].set(True, mode="drop")
    return number, lane, jnp.any(asked.at[members.parts >> 1].get(mode="fill", fill_value=False), axis=1)


def fill(values, hidden, unembed, units, members, alone):
    """``values`` with the places of fat units filled in."""
    number, lane, wanted = _wanted(units, members)
    count, width = members.parts.shape

    def body(carry, index):
        def step(values, open_unit):
            logits = _block(index, hidden, unembed, members, alone)[2]
            mass = planes.join(jnp.split(logits, MOST, axis=1))
            parts = jnp.broadcast_to(members.parts[index][None, :], mass.shape)
            mass, open_unit = planes.scan_lanes(mass, parts, open_unit, lambda x, n: jnp.roll(x, n, axis=1))
            at = lane - index * width
            found = jnp.take_along_axis(mass, jnp.clip(at, 0, width - 1), axis=1)
            return jnp.where((number >= 0) & (at >= 0) & (at < width), found, values), open_unit

        return lax.cond(wanted[index], step, lambda values, open_unit: (values, open_unit), *carry), None

    nothing = jnp.full((hidden.shape[0], width), -jnp.inf, jnp.float32)
    return lax.scan(body, (values, nothing), jnp.arange(count, dtype=jnp.int32))[0][0]


def add_gradients(gradients, hidden, unembed, units, members, alone, values, cotangent):
    """Both gradients with the part of the fat units."""
    number, _, wanted = _wanted(units, members)
    count, width = members.parts.shape
    numbers = members.parts >> 1

    def body(gradients, index):
        def step():
            _, matrix, logits = _block(index, hidden, unembed, members, alone)
            # A block has at most as many units as lanes: the places' cotangents go to those, and from there to the lanes.
            at = number - numbers[index, 0]
            at = jnp.where((number >= 0) & (at >= 0) & (at < width), at, width)
            mine = numbers[index] - numbers[index, 0]
            empty = jnp.zeros(width, jnp.float32)
            grad = jax.vmap(lambda at, x: empty.at[at].add(x, mode="drop"))(at, cotangent)[:, mine]
            value = jax.vmap(lambda at, x: (empty + planes.LARGEST).at[at].set(x, mode="drop"))(at, values)[:, mine]
            grad = jnp.tile(grad, (1, MOST)) * jnp.exp(logits - jnp.tile(value, (1, MOST)))
            d_rows = lax.dot_general(grad, hidden.astype(jnp.float32), (((0,), (0,)), ((), ())))
            return grad @ matrix.astype(jnp.float32), d_rows

        def nothing():
            return jnp.zeros(hidden.shape, jnp.float32), jnp.zeros((members.fat_rows.shape[1], hidden.shape[1]), jnp.float32)

        rows = members.fat_rows[index]
        d_hidden, d_rows = lax.cond(wanted[index], step, nothing)
        rows = jnp.where(rows < 0, unembed.shape[0], rows)
        return (gradients[0] + d_hidden, gradients[1].at[rows].add(d_rows, mode="drop")), None

    return lax.scan(body, gradients, jnp.arange(count, dtype=jnp.int32))[0]
