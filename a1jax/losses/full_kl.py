"""A divergence over the full vocabulary from both sides' hidden states, block by block: the yardstick of the truncated forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.kernels.vocab_align import blocks, logsumexp
from a1jax.losses import divergence as divergences


def full_divergence(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembed: jax.Array,
    block: int,
    divergence: divergences.Divergence = "reverse",
    valid: jax.Array | np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(divergence [N], teacher entropy [N]) over all valid ids, float32; gradient to the student's two arrays only.

    student_hidden [N, D], student_unembed [V, D]; teacher_hidden [N, D'], teacher_unembed [V, D'], any other width.
    valid: [V] bool, ids that are tokens; the others are in neither distribution. Memory: N * block floats a few times.
    Raises ValueError when the vocabularies differ in size.
    """
    if student_unembed.shape[0] != teacher_unembed.shape[0]:
        raise ValueError(
            f"the student's output matrix has {student_unembed.shape[0]} rows, the teacher's {teacher_unembed.shape[0]}: "
            "mode full needs one vocabulary, cut or pad the rows that are no tokens"
        )
    divergences.term(divergence)
    teacher = lax.stop_gradient((teacher_hidden, teacher_unembed))
    tokens = jnp.logical_not(jnp.any(jnp.isneginf(student_unembed), axis=1) | jnp.any(jnp.isneginf(teacher_unembed), axis=1))
    valid = tokens if valid is None else tokens & valid
    value, entropy = _divergence(student_hidden, student_unembed, *teacher, valid, block, divergence)
    return value, lax.stop_gradient(entropy)


def _log_probabilities(hidden, unembed, total, start, counts, block):
    """One block: log-probabilities [N, block], a large negative number at ids that do not count, and its rows, zeros there."""
    matrix = jnp.where(counts[:, None], blocks.rows(unembed, start, block), 0)
    logp = blocks.product(hidden, matrix) - total[:, None]
    return jnp.where(counts[None, :], logp, -1e30), matrix  # -1e30 and not -inf: 0 * (-inf + inf) is no number


def _counts(valid, start, fresh, block):
    here = lax.dynamic_slice_in_dim(valid, start, min(block, valid.shape[0]))
    return here if fresh is None else here & fresh


def _forward(student_hidden, student_unembed, teacher_hidden, teacher_unembed, valid, block, divergence):
    """Two passes: both log-sum-exps, then the sums over classes of terms, of their derivatives and of the entropy, [N] each."""
    term = divergences.term(divergence)
    ours = logsumexp(student_hidden, student_unembed, block, valid)
    theirs = logsumexp(teacher_hidden, teacher_unembed, block, valid)

    def body(sums, start, fresh):
        counts = _counts(valid, start, fresh, block)
        student, _ = _log_probabilities(student_hidden, student_unembed, ours, start, counts, block)
        teacher, _ = _log_probabilities(teacher_hidden, teacher_unembed, theirs, start, counts, block)
        value, slope = jax.vjp(lambda x: term(x, teacher), student)
        parts = (value, slope(jnp.ones_like(value))[0], -jnp.exp(teacher) * teacher)
        return jax.tree.map(lambda total, part: total + jnp.sum(part, axis=1), sums, parts)

    zero = jnp.zeros(student_hidden.shape[:1], jnp.float32)
    value, slopes, entropy = blocks.each(body, (zero, zero, zero), valid.shape[0], block)
    return (value, entropy), (ours, theirs, slopes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _divergence(student_hidden, student_unembed, teacher_hidden, teacher_unembed, valid, block, divergence):
    return _forward(student_hidden, student_unembed, teacher_hidden, teacher_unembed, valid, block, divergence)[0]


def _divergence_forward(student_hidden, student_unembed, teacher_hidden, teacher_unembed, valid, block, divergence):
    arrays = (student_hidden, student_unembed, teacher_hidden, teacher_unembed, valid)
    value, sums = _forward(*arrays, block, divergence)
    return value, (*arrays, *sums)


def _divergence_backward(block, divergence, saved, cotangents):
    student_hidden, student_unembed, teacher_hidden, teacher_unembed, valid, ours, theirs, slopes = saved
    term = divergences.term(divergence)

    def body(gradients, start, fresh):
        counts = _counts(valid, start, fresh, block)
        student, matrix = _log_probabilities(student_hidden, student_unembed, ours, start, counts, block)
        teacher, _ = _log_probabilities(teacher_hidden, teacher_unembed, theirs, start, counts, block)
        slope = jax.vjp(lambda x: term(x, teacher), student)[1](cotangents[0][:, None] * jnp.ones_like(student))[0]
        # Through log p = logit - logsumexp every class also feels the sum of all slopes, times its own probability.
        grad = slope - jnp.exp(student) * (slopes * cotangents[0])[:, None]
        return blocks.accumulate(gradients, grad, student_hidden, matrix, start)

    start = blocks.zero_gradients(student_hidden, student_unembed)
    d_hidden, d_unembed = blocks.each(body, start, valid.shape[0], block)
    return d_hidden.astype(student_hidden.dtype), d_unembed.astype(student_unembed.dtype), None, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)
