"""What several teachers of one vocabulary say together: the weighted mean of their distributions, block by block.

    q(v) = sum over t of w_t q_t(v),   log q(v) = logsumexp over t of (log w_t + z_t(v) - logsumexp(z_t))

Hard routing is the mixture with all weight on one teacher. The k best ids of q are found among all of the vocabulary, exactly: an id that
is among no teacher's own k best can be among those of the mixture. Letters: N tokens, V vocabulary, D_t width of teacher t, k ids kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.kernels import vocab_align
from a1jax.kernels.vocab_align import blocks
from a1jax.losses.distill import TeacherTargets, teacher_targets


def mixture_targets(
    hidden: Sequence[jax.Array], unembed: Sequence[jax.Array], weights: Sequence[float], k: int, block: int
) -> TeacherTargets:
    """The k best ids of the mixture per token; equal probabilities: the lower id first. No gradient.

    hidden: [N, D_t] of each teacher; unembed: [V, D_t]; weights: of each, they sum to 1. ``logits`` are log-probabilities, so
    ``logsumexp`` is 0, but with one teacher of weight 1, which is its ``teacher_targets``. Memory: N * block floats a few times.
    Raises ValueError for weights that are none, different vocabularies, and a k below 1 or above V.
    """
    parts = _parts(hidden, unembed, weights)
    if len(parts) == 1:
        return teacher_targets(*parts[0][:2], k, block)
    vocab, tokens = parts[0][1].shape[0], parts[0][0].shape[0]
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}, but the output matrices have {vocab} ids: choose k from 1 to {vocab}")
    parts = [(*lax.stop_gradient((h, u)), w) for h, u, w in parts]
    # What is taken from a teacher's logits: its log-sum-exp less the log of its weight.
    offsets = [vocab_align.logsumexp(h, u, block) - np.float32(np.log(w)) for h, u, w in parts]

    def body(carry, start, fresh):
        values, ids = carry
        logp = blocks.mask(_mixed(parts, offsets, start, block), fresh)
        # As in ``vocab_align.topk``: what is kept stands first, so that of equal values the lower id stays.
        values, place = lax.top_k(jnp.concatenate([values, logp], axis=1), k)
        kept = jnp.take_along_axis(ids, jnp.minimum(place, k - 1), axis=1)
        return values, jnp.where(jnp.isneginf(values), -1, jnp.where(place < k, kept, start + place - k))

    empty = (jnp.full((tokens, k), -jnp.inf, jnp.float32), jnp.full((tokens, k), -1, jnp.int32))
    values, ids = blocks.each(body, empty, vocab, block)
    return TeacherTargets(values, ids, jnp.zeros((tokens,), jnp.float32))


def mixture_score(
    hidden: Sequence[jax.Array], unembed: Sequence[jax.Array], weights: Sequence[float], written: jax.Array, block: int
) -> jax.Array:
    """float32 [N]: the mixture's log-probability of the ids int32 [N] ``written``; arguments and errors else as of ``mixture_targets``."""
    each = []
    for h, u, w in _parts(hidden, unembed, weights):
        each.append(np.float32(np.log(w)) + vocab_align.gather_logits(h, u, written[:, None])[:, 0] - vocab_align.logsumexp(h, u, block))
    return lax.stop_gradient(jax.nn.logsumexp(jnp.stack(each), axis=0))


def _parts(hidden, unembed, weights) -> list[tuple[jax.Array, jax.Array, float]]:
    """(hidden, unembed, weight) of the teachers that have a weight."""
    if not len(hidden) == len(unembed) == len(weights) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights are {tuple(weights)} for {len(hidden)} teachers: give one of at least 0 for each, 1 in all")
    sizes = {u.shape[0] for u in unembed}
    if len(sizes) > 1:
        raise ValueError(f"the teachers' output matrices have {' and '.join(map(str, sorted(sizes)))} rows: a mixture needs one vocabulary")
    return [part for part in zip(hidden, unembed, weights, strict=True) if part[2] > 0]


def _mixed(parts, offsets, start, block) -> jax.Array:
    """[N, block] log-probabilities of one block; -inf at rows that no teacher's matrix has as a token."""
    each = []
    for (hidden, unembed, _), offset in zip(parts, offsets, strict=True):
        matrix = blocks.rows(unembed, start, block)
        token = jnp.logical_not(jnp.any(jnp.isneginf(matrix), axis=1))
        each.append(blocks.mask(blocks.product(hidden, jnp.where(token[:, None], matrix, 0)) - offset[:, None], token))
    total = each[0]
    for more in each[1:]:
        total = jnp.logaddexp(total, more)
    return total
