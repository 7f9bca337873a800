"""The ops in plain dense jax: [N, V] logits and all. What ``ops`` is tested against; too large for real vocabularies.

Shapes as in ``ops``. They compute in the dtype of their inputs, so float64 inputs give a float64 reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def logits(hidden: jax.Array, unembed: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """[N, V] logits, -inf where the output matrix has no token (``valid`` false, or a row with -inf in it)."""
    token = jnp.logical_not(jnp.any(jnp.isneginf(unembed), axis=1))
    if valid is not None:
        token = token & valid
    return jnp.where(token[None, :], hidden @ jnp.where(token[:, None], unembed, 0).T, -jnp.inf)


def topk(hidden: jax.Array, unembed: jax.Array, k: int, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values [N, k], ids [N, k], logsumexp [N])."""
    full = logits(hidden, unembed, valid)
    values, ids = lax.top_k(full, k)
    return values, ids, jax.nn.logsumexp(full, axis=1)


def logsumexp(hidden: jax.Array, unembed: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """[N]."""
    return jax.nn.logsumexp(logits(hidden, unembed, valid), axis=1)


def gather_logits(hidden: jax.Array, unembed: jax.Array, ids: jax.Array) -> jax.Array:
    """[N, k]."""
    return jnp.take_along_axis(logits(hidden, unembed), ids, axis=1)


def aligned_topk(
    full: jax.Array, unit_of_teacher: np.ndarray, k: int, rank: np.ndarray | None = None, between: tuple | None = None
) -> tuple[jax.Array, ...]:
    """(values [N, k], units [N, k], residual [N], logsumexp [N], everything [N]) of dense logits [N, V], -inf at rows that are no token.

    unit_of_teacher int [V], -1 for the residual; rank [V] and between = (lower [N], upper [N]): the slice of rows that count.
    """
    inside = full
    if between is not None:
        lower, upper = (jnp.asarray(x)[:, None] for x in between)
        inside = jnp.where((rank[None, :] >= lower) & (rank[None, :] < upper), full, -jnp.inf)
    count = int(unit_of_teacher.max()) + 1
    # One more segment than there are units takes the residual, enough more to have k places.
    segments = np.where(unit_of_teacher < 0, count, unit_of_teacher)
    mass = jax.vmap(lambda x: _segment_logsumexp(x, segments, count + 1))(inside)
    units = jnp.pad(mass[:, :count], ((0, 0), (0, max(k - count, 0))), constant_values=-jnp.inf)
    values, best = lax.top_k(units, k)
    ends = (mass[:, count], jax.nn.logsumexp(inside, axis=1), jax.nn.logsumexp(full, axis=1))
    return values, jnp.where(jnp.isneginf(values), -1, best), *ends


def _segment_logsumexp(x: jax.Array, segments: np.ndarray, count: int) -> jax.Array:
    """[V] -> [count]: log-sum-exp of the elements of each segment, -inf of an empty one."""
    maximum = jax.ops.segment_max(x, segments, count)
    shift = jnp.where(jnp.isfinite(maximum), maximum, 0)
    return shift + jnp.log(jax.ops.segment_sum(jnp.exp(x - shift[segments]), segments, count))
