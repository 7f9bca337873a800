"""On-policy distillation from the sampled token alone: one number of the teacher per token, an estimate of a divergence.

Every divergence here is an expectation over the student, D = E[g(r)] with y drawn from p_s and r = p_t(y) / p_s(y), so g(r) at the
token really written is an unbiased estimate of its value. For the gradient, p_s stands in the expectation and in r:

    grad D = sum over y of grad(p_s(y) g(p_t(y) / p_s(y))) = E[(g(r) - r g'(r)) grad log p_s(y)].

    reverse          g = -log r                                          g - r g' = -log r + 1
    forward          g = r log r                                         g - r g' = -r
    jensen_shannon   g = 1/2 log(2 / (1 + r)) + r/2 log(2 r / (1 + r))   g - r g' = 1/2 log(2 / (1 + r))

The 1 of reverse is left out: E[grad log p_s] = 0, so it is noise only. Unbiased where the tokens were drawn from the very p_s that is
differentiated (no temperature, no top-p, no update in between). Cheap and noisy: the other forms of ``distill`` compare k classes.

With another tokenizer the score of a token is the teacher's log-probability of its bytes after what was pending: p_t is then no
distribution over the student's tokens and the estimate one of no divergence; but over a span that both tokenizers end together the
scores add up to the teacher's log-probability of the span, and so do the terms of reverse.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.kernels import vocab_align
from a1jax.losses import divergence as divergences
from a1jax.losses.distill import reduce
from a1jax.losses.divergence import LOG_2
from a1jax.types import Metrics


def sampled(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    written: jax.Array | np.ndarray,
    score: jax.Array | np.ndarray,
    weights: jax.Array,
    *,
    divergence: divergences.Divergence = "reverse",
    block: int = 4096,
    valid: jax.Array | np.ndarray | None = None,
    clip: float = 20.0,
) -> tuple[jax.Array, Metrics]:
    """sum over n of weights[n] * g(r[n]), and metrics; gradient to the student's two arrays only, that of the estimate above.

    student_hidden [N, D]; student_unembed [V, D]; written int32 [N] ids; score float32 [N], the teacher's log-probability of each;
    weights float32 [N] from ``masked.token_weights``. block, valid: of the student's log-sum-exp.
    clip: log r is kept within -clip and clip, in value and gradient. A score of -inf, a token that the teacher rules out, so counts
    clip nats in reverse and nothing in forward. Lower it where a few tokens rule the loss: forward's terms grow like exp(log r).
    It biases the estimate only at tokens beyond it; a NaN stays one.

    Metrics over tokens with a weight (plain means): distill/kl (of g), distill/clipped (share of tokens), distill/tokens.
    Raises ValueError for an unknown divergence, a clip not above 0, and shapes that do not match.
    """
    shapes = {"written": written.shape, "score": score.shape, "weights": weights.shape}
    if set(shapes.values()) != {student_hidden.shape[:1]}:
        raise ValueError(f"{', '.join(f'{n} {s}' for n, s in shapes.items())} must be {student_hidden.shape[:1]}, as hidden is")
    divergences.term(divergence)
    if not clip > 0:
        raise ValueError(f"clip is {clip}: it must be above 0")
    logits = vocab_align.gather_logits(student_hidden, student_unembed, jnp.asarray(written)[:, None])[:, 0]
    log_p = logits - vocab_align.logsumexp(student_hidden, student_unembed, block, valid)
    log_r = lax.stop_gradient(jnp.asarray(score, jnp.float32) - log_p)
    value, slope = _terms(jnp.clip(log_r, -clip, clip), divergence)
    # The value is g; what is differentiated is log p times the slope.
    value = value + slope * (log_p - lax.stop_gradient(log_p))
    return reduce(value, weights, clipped=jnp.where(jnp.abs(log_r) > clip, 1.0, 0.0))


def _terms(log_r: jax.Array, divergence: divergences.Divergence) -> tuple[jax.Array, jax.Array]:
    """(g(r), g(r) - r g'(r))."""
    if divergence == "reverse":
        return -log_r, -log_r
    ratio = jnp.exp(log_r)
    if divergence == "forward":
        return ratio * log_r, -ratio
    student, teacher = LOG_2 - jax.nn.softplus(log_r), LOG_2 - jax.nn.softplus(-log_r)
    return 0.5 * (student + ratio * teacher), 0.5 * student
