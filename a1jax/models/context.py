"""Between the shards of a row: what one needs from those before it. For use inside sharding.over_shards, over the axes of "length"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

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
