"""Between the shards of a row: what one needs from those before it. For use inside sharding.over_shards, over the axes of "length"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Shaped

Axes = tuple[str, ...]
"""Mesh axes that cut the length, as sharding.mesh_axes("length", T) gives them."""


def shift(x: jax.Array, by: int, axes: Axes) -> jax.Array:
    """x of the shard `by` places before this one; zeros where there is none."""
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(x, axes, [(i, i + by) for i in range(size - by)]) if by < size else jnp.zeros_like(x)


def halo(x: Shaped[Array, "B T *rest"], width: int, axes: Axes) -> Shaped[Array, "B width *rest"]:
    """The `width` entries of the row before this shard's own [B, T, ...], from as many shards as have them; zeros before the first."""
    t, pieces = x.shape[1], []
    for hop in range(1, -(-width // t) + 1):
        wanted = min(t, width - (hop - 1) * t)
        pieces.append(shift(x[:, t - wanted :], hop, axes))
    return jnp.concatenate(pieces[::-1], axis=1) if pieces else x[:, :0]


def chain(
    transfer: Float32[Array, "B H DK DK"], gain: Float32[Array, "B H DK DV"], axes: Axes, reverse: bool = False
) -> Float32[Array, "B H DK DV"]:
    """Every shard has a map S -> transfer @ S + gain. The result of applying, to zero, the maps of all shards before this one, in their
    order; reverse: of all shards behind it, the last one first. Only the maps travel, [DK, DK + DV] per head and shard."""
    index, size = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    transfers, gains = jax.lax.all_gather((transfer, gain), axes)

    def step(state, shard):
        i, transfer, gain = shard
        # Full float32 also where the default is bfloat16 passes: what is lost here is lost for the rest of the row.
        following = jnp.matmul(transfer, state, precision=jax.lax.Precision.HIGHEST) + gain
        return jnp.where(i > index if reverse else i < index, following, state), None

    return jax.lax.scan(step, jnp.zeros_like(gain), (jnp.arange(size), transfers, gains), reverse=reverse)[0]


def balance(x: Shaped[Array, "B T *rest"], axes: Axes) -> Shaped[Array, "B T *rest"]:
    """Of a row in 2 n pieces, where shard i of n holds pieces 2 i and 2 i + 1: pieces i and 2 n - 1 - i, the even one first, so that all
    shards have as many tokens before their own. Half of every shard travels. T must be even; places: balanced_places."""
    return _exchange(x, axes, lambda home, away: (home, away))


def restore(x: Shaped[Array, "B T *rest"], axes: Axes) -> Shaped[Array, "B T *rest"]:
    """The inverse of balance."""
    return _exchange(x, axes, lambda home, away: (away, home))


def _exchange(x, axes, direction):
    size, half = jax.lax.axis_size(axes), x.shape[1] // 2

    def move(part, parity):
        pieces = range(parity, 2 * size, 2)  # two on one shard are of different parity, before and after: each parity is a permutation
        return jax.lax.ppermute(part, axes, [direction(piece // 2, min(piece, 2 * size - 1 - piece)) for piece in pieces])

    return jnp.concatenate([move(x[:, :half], 0), move(x[:, half:], 1)], axis=1)


def balanced_places(t: int, axes: Axes) -> Int[Array, " T"]:
    """int32 [T]: the places in the row of what balance gives to this shard."""
    index, size = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    other = 2 * size - 1 - index
    even, odd = jnp.where(index % 2 == 0, index, other), jnp.where(index % 2 == 0, other, index)
    return jnp.concatenate([piece * (t // 2) + jnp.arange(t // 2) for piece in (even, odd)]).astype(jnp.int32)
