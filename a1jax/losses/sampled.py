"""On-policy distillation on the written token alone: an unbiased estimate of a divergence and of its gradient, from one token a position.

With y drawn from the student and r = q(y) / p(y), every divergence here is E_p[g(r)], and its gradient, as p depends on the parameters,

    grad E_p[g(r)] = E_p[(g(r) - r g'(r)) grad log p(y)],        for  d r = - r d log p.

    reverse         g = - log r                                        g - r g' = - log r + 1
    forward         g = r log r                                        g - r g' = - r
    jensen_shannon  g = 1/2 log(2 / (1 + r)) + r/2 log(2 r / (1 + r))  g - r g' = 1/2 log(2 / (1 + r))

The 1 of the first is left out: E_p[grad log p] = 0, so it is noise only. What is left there is the advantage log q - log p of
on-policy distillation (MOPD and others, ../shared/design/pitfalls.md). One number a token is all that a teacher has to send, and with a
teacher of another tokenizer the scores of a span add up to its log-probability of it (vocabulary_alignment.md, section 3).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.kernels import vocab_align
from a1jax.losses import divergence as divergences
from a1jax.losses.distill import reduced
from a1jax.types import Metrics


def sampled(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    written: jax.Array,
    score: jax.Array,
    weights: jax.Array,
    *,
    divergence: divergences.Divergence = "reverse",
    clip: float = 20.0,
    block: int = 4096,
    valid: jax.Array | np.ndarray | None = None,
) -> tuple[jax.Array, Metrics]:
    """sum over n of weights[n] * g(r[n]), and metrics; its gradient is the estimate above, to the student's two arrays only.

    student_hidden [N, D], student_unembed [V, D]; written int32 [N]: ids drawn from the student at temperature 1; score float32 [N]: the
    teacher's log-probability of each; weights float32 [N]. clip: log r is kept within it, so that a teacher that rules a token out
    (score -inf) costs clip nats and not infinitely many; the estimate is biased where it bites, which distill/clipped counts.
    block, valid: of the student's log-sum-exp, the one thing that reads its whole matrix (with gradient).

    Metrics, means over tokens with a weight: distill/kl (of g), distill/teacher_logp (no less than -1e4 each), distill/student_logp,
    distill/clipped; and distill/tokens.
    Raises ValueError for another divergence, a clip not above 0, and shapes that do not match.
    """
    divergences.term(divergence)
    tokens = student_hidden.shape[0]
    if not written.shape == score.shape == weights.shape == (tokens,):
        raise ValueError(f"written {written.shape}, score {score.shape} and weights {weights.shape} must be [{tokens}]")
    if not clip > 0:
        raise ValueError(f"clip is {clip}: it must be above 0")
    counts = weights != 0
    ids = jnp.where(counts, written, 0)
    logits = vocab_align.gather_logits(student_hidden, student_unembed, ids[:, None])[:, 0]
    logp = logits - vocab_align.logsumexp(student_hidden, student_unembed, block, valid)
    score = jnp.where(counts, lax.stop_gradient(score.astype(jnp.float32)), 0.0)
    ratio = score - lax.stop_gradient(logp)
    log_r = jnp.clip(ratio, -clip, clip)
    value, push = _estimate(log_r, divergence)
    value = value + push * (logp - lax.stop_gradient(logp))
    told = {"teacher_logp": jnp.maximum(score, -1e4), "student_logp": logp}
    return reduced(value, weights, clipped=(jnp.abs(ratio) > clip).astype(jnp.float32), **told)


def _estimate(log_r: jax.Array, divergence: divergences.Divergence) -> tuple[jax.Array, jax.Array]:
    """(g, g - r g') of log r."""
    if divergence == "reverse":
        return -log_r, -log_r
    r = jnp.exp(log_r)
    if divergence == "forward":
        return r * log_r, -r
    ours = 0.5 * (divergences.LOG_2 - jax.nn.softplus(log_r))
    theirs = 0.5 * r * (divergences.LOG_2 - jax.nn.softplus(-log_r))
    return ours + theirs, ours
