"""Log-probability of written tokens and the policy's entropy, from hidden states and an output matrix, block by block.

What policy-gradient losses need of the vocabulary is two numbers a token. Both come out of one walk over it, their gradients out of a
second that makes the logits again: no array of all tokens over all ids exists (../shared/design/pitfalls.md, 4).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from a1jax.kernels.vocab_align import blocks

Array = jax.Array | np.ndarray


def token_logp(hidden: Array, unembed: Array, written: Array, block: int, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """(log p[n, written[n]], entropy of p[n] in nats), float32 [N] each, with p = softmax(hidden @ unembed.T / temperature).

    hidden [N, D] and unembed [V, D], float32 or bfloat16 (their products are summed in float32); written int32 [N]. Gradients of both
    results to both arrays: d log p / d logits = one_hot - p, d entropy / d logits = -p * (log p + entropy).
    block: ids per step, memory is N * block floats; the value does not depend on it. temperature: that of sampling, above 0.
    A written id outside the vocabulary has log-probability -inf and no gradient of its own.
    Raises ValueError for shapes that do not belong together and a temperature not above 0.
    """
    if hidden.ndim != 2 or unembed.ndim != 2 or hidden.shape[1] != unembed.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and unembed {unembed.shape} must be [N, D] and [V, D] of one width D")
    if written.shape != hidden.shape[:1]:
        raise ValueError(f"written {written.shape} must be [{hidden.shape[0]}], one per hidden state")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    return _both(jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(written), block, temperature)


def _statistics(hidden, unembed, written, block, temperature):
    """(log-sum-exp, entropy, logit of the written id), float32 [N] each."""

    def body(carry, start, fresh):
        maximum, total, first, picked = carry
        logits = blocks.mask(blocks.product(hidden, blocks.rows(unembed, start, block)) / temperature, fresh)
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        below = logits - new[:, None]
        share = jnp.exp(below)
        scale, moved = jnp.exp(maximum - new), maximum - new
        # first is the sum of (logit - maximum) * exp(logit - maximum): the mean logit, which the entropy needs, without large numbers.
        first = scale * (first + total * moved) + jnp.sum(jnp.where(share > 0, below * share, 0.0), axis=1)
        local = written - start
        mine = jnp.take_along_axis(logits, jnp.clip(local, 0, logits.shape[1] - 1)[:, None], axis=1)[:, 0]
        picked = jnp.where((local >= 0) & (local < logits.shape[1]), jnp.maximum(picked, mine), picked)
        return new, total * scale + jnp.sum(share, axis=1), first, picked

    maximum, total = blocks.start_logsumexp(hidden.shape[0])
    start = (maximum, total, jnp.zeros_like(total), jnp.full_like(total, -jnp.inf))
    maximum, total, first, picked = blocks.each(body, start, unembed.shape[0], block)
    return maximum + jnp.log(total), jnp.log(total) - first / total, picked


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _both(hidden, unembed, written, block, temperature):
    return _forward(hidden, unembed, written, block, temperature)[0]


def _forward(hidden, unembed, written, block, temperature):
    logsumexp, entropy, picked = _statistics(hidden, unembed, written, block, temperature)
    return (picked - logsumexp, entropy), (hidden, unembed, written, logsumexp, entropy)


def _backward(block, temperature, saved, cotangents):
    hidden, unembed, written, logsumexp, entropy = saved
    of_logp, of_entropy = (c[:, None] / temperature for c in cotangents)

    def body(gradients, start, fresh):
        matrix = blocks.rows(unembed, start, block)
        logp = blocks.mask(blocks.product(hidden, matrix) / temperature, fresh) - logsumexp[:, None]
        p = jnp.exp(logp)
        at = jnp.arange(logp.shape[1], dtype=written.dtype)[None, :] == (written - start)[:, None]
        if fresh is not None:
            at = at & fresh[None, :]
        spread = jnp.where(p > 0, p * (logp + entropy[:, None]), 0.0)  # p log p is 0 where p is
        grad = jnp.where(at, of_logp, 0.0) - of_logp * p - of_entropy * spread
        return blocks.accumulate(gradients, grad, hidden, matrix, start)

    d_hidden, d_unembed = blocks.each(body, blocks.zero_gradients(hidden, unembed), unembed.shape[0], block)
    return d_hidden.astype(hidden.dtype), d_unembed.astype(unembed.dtype), None


_both.defvjp(_forward, _backward)
