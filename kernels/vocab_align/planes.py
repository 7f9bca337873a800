"""Log-sum-exps over planes, lanes and blocks: the arithmetic that the blocked form and the kernel share.

Every one of them takes -inf (a row in no sum) and +inf without making a NaN: the maximum that is subtracted is kept finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

LARGEST = float(jnp.finfo(jnp.float32).max)


def shape(logits: jax.Array, soft_cap: float | None, temperature: float) -> jax.Array:
    """cap * tanh(logits / cap) where there is a cap, then divided by the temperature."""
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits * (1.0 / soft_cap))
    return logits if temperature == 1.0 else logits * (1.0 / temperature)


def join(slices: Sequence[jax.Array]) -> jax.Array:
    """Log-sum-exp of arrays of one shape, elementwise. One array is itself, bitwise."""
    if len(slices) == 1:
        return slices[0]
    maximum = slices[0]
    for x in slices[1:]:
        maximum = jnp.maximum(maximum, x)
    maximum = jnp.clip(maximum, -LARGEST, LARGEST)
    total = jnp.exp(slices[0] - maximum)
    for x in slices[1:]:
        total = total + jnp.exp(x - maximum)
    return maximum + jnp.log(total)


def add(running: tuple[jax.Array, jax.Array], slices: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(maximum, sum of exp(x - maximum)) with more arrays of its shape; it starts as (-LARGEST, 0)."""
    maximum, total = running
    new = maximum
    for x in slices:
        new = jnp.maximum(new, x)
    new = jnp.minimum(new, LARGEST)
    total = total * jnp.exp(maximum - new)
    for x in slices:
        total = total + jnp.exp(x - new)
    return new, total


def scan_lanes(
    values: jax.Array, parts: jax.Array, carry: jax.Array, roll: Callable[[jax.Array, int], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Joins the lanes of a FAT block to units: (values, carry for the next block of the run), [N, lanes] each.

    values [N, lanes]; parts int32 [N, lanes] as in ``Layout.parts``, the same in every row; carry: what the last block left
    for its successor's first lane, -inf everywhere else and before the first. A unit's mass comes out in its last lane, -inf
    elsewhere. roll(x, n): lanes turned to the right by n.
    """
    lanes = values.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    segment, last = parts >> 1, parts & 1
    values = join([values, carry])
    step = 1
    while step < lanes:  # after it, a lane holds its segment's last 2 * step lanes up to itself
        same = (lane >= step) & (roll(segment, step) == segment)
        values = jnp.where(same, join([values, roll(values, step)]), values)
        step *= 2
    open_end = (lane == 0) & (roll(last, 1) == 0)
    return jnp.where(last == 1, values, -jnp.inf), jnp.where(open_end, roll(values, 1), -jnp.inf)
