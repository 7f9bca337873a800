"""How the losses of single tokens become one number: a weight per token, computed once on the whole batch.

``loss = sum(weights * per_token_loss)``. A train step that accumulates over micro-batches therefore only adds up, and
neither packing, nor the number of micro-batches, nor the mesh can change the value (../shared/design/pitfalls.md, 5).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Reduction = Literal["token_mean", "sample_mean", "domain_mean"]


def token_weights(mask: Array, segment_ids: Array, domains: Array, num_domains: int, reduction: Reduction) -> jax.Array:
    """float32 [B, T] weights that sum to 1 (to 0 where nothing is masked in); they carry no gradient.

    mask: float32 [B, T], 1 where the loss looks; positions of segment 0 (padding) never count. segment_ids: int32 [B, T],
    1, 2, ... within a row, at most T; a sample is one (row, segment). domains: int32 [B, T] in 0 .. num_domains - 1, one
    per sample, read by "domain_mean" only; a masked token of any other domain makes all weights NaN: a value that cannot
    be raised under jit, and must not be dropped unnoticed.

    "token_mean": every token alike, long samples dominate.
    "sample_mean": the mean over samples of the mean over their tokens.
    "domain_mean": the mean over the domains present of the mean over their samples of the mean over their tokens
    (arXiv 2606.30616, section 2.3). No domain starves another (pitfall 6). "present": has a sample with a masked token.
    Raises ValueError for another reduction, arrays of different shapes, or no domains.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, choose one of {', '.join(get_args(Reduction))}")
    if not mask.shape == segment_ids.shape == domains.shape or mask.ndim != 2:
        raise ValueError(f"mask {mask.shape}, segment_ids {segment_ids.shape} and domains {domains.shape} must be [B, T] alike")
    if num_domains < 1:
        raise ValueError(f"num_domains is {num_domains}, it must be at least 1")
    mask = jax.lax.stop_gradient(jnp.where(segment_ids > 0, mask, 0.0).astype(jnp.float32))
    # Sums of zeros and ones are exact in float32 (below 2^24), so they do not depend on order, packing or mesh.
    if reduction == "token_mean":
        return mask * _inverse(jnp.sum(mask))

    length = mask.shape[1]
    tokens = jax.vmap(lambda m, s: jnp.zeros(length + 1, jnp.float32).at[s].add(m))(mask, segment_ids)  # [B, segment]
    present = (tokens > 0).astype(jnp.float32)
    per_token = mask * jnp.take_along_axis(_inverse(tokens), segment_ids, axis=1)
    if reduction == "sample_mean":
        return per_token * _inverse(jnp.sum(present))

    # A sample's domain is that of its masked tokens; where several were given the largest counts, so it has only one.
    looked = jnp.where(mask > 0, domains, 0)
    of_sample = jax.vmap(lambda d, s: jnp.zeros(length + 1, domains.dtype).at[s].max(d))(looked, segment_ids)
    one_hot = of_sample[:, :, None] == jnp.arange(num_domains, dtype=domains.dtype)[None, None, :]
    samples = jnp.sum(one_hot * present[:, :, None], axis=(0, 1))  # [num_domains]
    each = _inverse(samples) * _inverse(jnp.sum(samples > 0))
    weights = per_token * each[jnp.take_along_axis(of_sample, segment_ids, axis=1)]
    legal = jnp.all((looked >= 0) & (looked < num_domains))
    return jnp.where(legal, weights, jnp.nan)


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x > 0, 1.0 / jnp.maximum(x, jnp.finfo(jnp.float32).tiny), 0.0)
