"""The ops in plain dense jax: [N, V] logits and all. What ``ops`` is tested against; too large for real vocabularies.

Shapes as in ``ops``. They compute in the dtype of their inputs, so float64 inputs give a float64 reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
