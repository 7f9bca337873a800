"""Walking the vocabulary in blocks of static size: the loop every blocked op and loss shares.

The last block of a vocabulary that is no multiple of the block is moved back to end on V, so the output matrix is never
padded, that is never copied; the ids it meets a second time are not ``fresh`` and must not count again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Fresh = jax.Array | None  # [block] bool, False for ids an earlier block has seen or that are no token; None: all are fresh


def each(body: Callable[[Any, jax.Array, Fresh], Any], carry: Any, vocab: int, block: int) -> Any:
    """Folds ``body(carry, start, fresh)`` over the blocks of ``vocab`` ids; start is the block's first id (int32 scalar)."""
    if block < 1:
        raise ValueError(f"block is {block}, it must be at least 1")
    block = min(block, vocab)
    if block == vocab:  # one block: no loop, so that the compiler can fuse across it
        return body(carry, jnp.int32(0), None)

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        start = jnp.minimum(index * block, vocab - block)
        fresh = None if vocab % block == 0 else start + jnp.arange(block, dtype=jnp.int32) >= index * block
        return body(carry, start, fresh), None

    return lax.scan(step, carry, jnp.arange(-(-vocab // block), dtype=jnp.int32))[0]


def rows(unembed: jax.Array, start: jax.Array, block: int) -> jax.Array:
    """[block, D]: the block's rows of the output matrix [V, D]."""
    block = min(block, unembed.shape[0])
    return unembed if block == unembed.shape[0] else lax.dynamic_slice_in_dim(unembed, start, block)


def product(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
    """[N, block] logits of hidden [N, D] and rows [block, D]. bfloat16 inputs multiply as such, the sum is float32."""
    dtype = jnp.promote_types(hidden.dtype, matrix.dtype)
    return lax.dot_general(hidden.astype(dtype), matrix.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def mask(logits: jax.Array, fresh: Fresh) -> jax.Array:
    """-inf at ids that do not count."""
    return logits if fresh is None else jnp.where(fresh[None, :], logits, -jnp.inf)


def start_logsumexp(tokens: int) -> tuple[jax.Array, jax.Array]:
    """Running maximum and sum, [N] each, before any block. The maximum starts finite: exp(-inf + inf) would be no number."""
    return jnp.full((tokens,), jnp.finfo(jnp.float32).min), jnp.zeros((tokens,), jnp.float32)


def add_logsumexp(running: tuple[jax.Array, jax.Array], logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Running maximum and sum of exp(logit - maximum) with one more block of masked logits."""
    maximum, total = running
    new = jnp.minimum(jnp.maximum(maximum, jnp.max(logits, axis=1)), jnp.finfo(jnp.float32).max)  # inf - inf would be no number
    return new, total * jnp.exp(maximum - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)


def finish_logsumexp(running: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[N] log-sum-exp."""
    return running[0] + jnp.log(running[1])


def accumulate(
    gradients: tuple[jax.Array, jax.Array], grad: jax.Array, hidden: jax.Array, matrix: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds one block's part to float32 (d hidden [N, D], d unembed [V, D]).

    grad [N, block] float32 is the gradient of the block's logits. The products are float32 whatever the inputs are: grad
    has small differences of probabilities in it that bfloat16 would round away.
    """
    d_hidden, d_unembed = gradients
    d_rows = lax.dot_general(grad, hidden.astype(jnp.float32), (((0,), (0,)), ((), ())))
    d_hidden = d_hidden + grad @ matrix.astype(jnp.float32)
    if d_rows.shape == d_unembed.shape:
        return d_hidden, d_unembed + d_rows
    old = lax.dynamic_slice_in_dim(d_unembed, start, d_rows.shape[0])
    return d_hidden, lax.dynamic_update_slice_in_dim(d_unembed, old + d_rows, start, axis=0)


def zero_gradients(hidden: jax.Array, unembed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 zeros like (hidden, unembed)."""
    return jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(unembed.shape, jnp.float32)
