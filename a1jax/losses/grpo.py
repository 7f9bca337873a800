"""Group-relative policy optimisation of single tokens (GRPO, arXiv 2402.03300), with the settings of arXiv 2606.30616, section 4.2.

Like the other losses it is ``sum(weights * per_token)`` with weights computed once on the whole batch: neither packing nor
micro-batches nor the mesh can change value or gradient (../shared/design/pitfalls.md, 5). Advantages: ``losses.advantages``.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.losses import masked
from a1jax.types import Metrics

Array = jax.Array | np.ndarray
Reduction = Literal["sample_mean", "token_mean", "fixed_length"]
Kl = Literal["k1", "k2", "k3"]
STEEPEST = 20.0  # exp is continued by its tangent from here on


def policy_weights(
    mask: Array, segment_ids: Array, reduction: Reduction = "sample_mean", *, length: int | None = None, samples: int | None = None
) -> jax.Array:
    """float32 [B, T] weights of the tokens; they carry no gradient. mask, segment_ids: as in ``masked.token_weights``.

    "sample_mean": mean over runs of the mean over their tokens, GRPO as published. "token_mean": every token alike (DAPO, arXiv
    2503.14476, section 3.3), the default of verl, TRL and NeMo. "fixed_length": 1 / (runs * length) for every token (arXiv 2503.20783):
    a long answer's tokens weigh as much as a short one's, and one token's weight does not depend on the others' lengths.
    The paper names none; the default is the published GRPO.
    length: tokens, "fixed_length" only: the response budget is usual. samples: "fixed_length" only, the number of runs to divide by
    where some were filtered out before packing; None counts the runs of the batch that have a masked token.
    Raises ValueError for another reduction, arrays of different shapes, a missing or needless length, and sizes below 1.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, choose one of {', '.join(get_args(Reduction))}")
    if not mask.shape == segment_ids.shape or mask.ndim != 2:
        raise ValueError(f"mask {mask.shape} and segment_ids {segment_ids.shape} must be [B, T] alike")
    if reduction != "fixed_length":
        if length is not None or samples is not None:
            raise ValueError(f"length and samples belong to reduction 'fixed_length', not to {reduction!r}")
        return masked.token_weights(mask, segment_ids, np.zeros(segment_ids.shape, np.int32), 1, reduction)
    if length is None or length < 1 or (samples is not None and samples < 1):
        raise ValueError(f"fixed_length needs a length, and samples where given, of at least 1; got length {length}, samples {samples}")
    mask = lax.stop_gradient(jnp.where(segment_ids > 0, mask, 0.0).astype(jnp.float32))
    if samples is None:
        present = jax.vmap(lambda m, s: jnp.zeros(mask.shape[1] + 1, jnp.float32).at[s].max(m))(mask, segment_ids)
        samples = jnp.maximum(jnp.sum(present > 0), 1)
    return mask / (jnp.float32(length) * samples)


def kl_estimate(logp: Array, ref_logp: Array, kind: Kl = "k3") -> jax.Array:
    """What one sampled token says of KL(policy || reference), in nats, float32 of the shape of both; no gradient to ref_logp.

    With d = logp - ref_logp: "k1" is d, "k2" is d^2 / 2, "k3" is exp(-d) - 1 + d (Schulman 2020, "Approximating KL divergence").
    As values k1 and k3 are right on average and k3 is never negative. As losses (arXiv 2510.01555) only k2 has the gradient of the
    KL: k1's is zero on average, so it is for reporting, and k3's, of GRPO and the default, agrees with k2's while d is small.
    Where -d is above 20 the exponential goes on as its tangent: finite, and still pulling. Raises ValueError for another kind.
    """
    if kind not in get_args(Kl):
        raise ValueError(f"kl is {kind!r}, choose one of {', '.join(get_args(Kl))}")
    difference = logp.astype(jnp.float32) - lax.stop_gradient(ref_logp.astype(jnp.float32))
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    # expm1: for a small d both terms are nearly d, and exp(-d) - 1 would leave rounding only.
    return _expm1(-difference) + difference


def grpo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    weights: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    ref_logp: Array | None = None,
    kl_coefficient: float = 0.001,
    kl: Kl = "k3",
    entropy: Array | None = None,
    entropy_coefficient: float = 0.0001,
    rollout_logp: Array | None = None,
    truncation: float = 2.0,
) -> tuple[jax.Array, Metrics]:
    """sum(weights * (policy + kl_coefficient * KL - entropy_coefficient * entropy)), float32, and metrics.

    All arrays have one shape, [N] or [B, T]; gradient to logp and entropy only. logp: of the sampled tokens under the parameters that
    learn. old_logp: under those the update began with; the paper takes the ones recorded while sampling. advantages: the run's, at each
    of its tokens. weights: ``policy_weights`` (or ``masked.token_weights``); a token of weight 0 adds nothing, whatever else it holds.

    policy = -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) with r = exp(logp - old_logp) (PPO, arXiv 1707.06347, eq. 7; the higher
    upper end is DAPO's, arXiv 2503.14476, eq. 10). dual_clip c > 1: where A < 0 the policy term is at most -c * A, so that one token that
    became likely again cannot dominate (arXiv 1912.09729, eq. 5; verl takes 3, NeMo 10; the paper names none).
    ref_logp, kl: ``kl_estimate``; needed unless kl_coefficient is 0, and then only measured. entropy: of the policy at each token, in nats;
    likewise.
    rollout_logp: where old_logp was computed anew by the training forward, the sampler's own. The policy term is multiplied by
    min(exp(old_logp - rollout_logp), truncation), a constant that corrects for the two not agreeing (the truncated ratio of IMPALA, arXiv
    1802.01561; 2 is the usual bound). None: old_logp are the sampler's.
    Where a log-ratio is above 20, exp is continued by its tangent: finite, with a gradient of the same sign.

    Metrics, plain means over tokens with a weight; to join micro-batches weigh them by grpo/tokens: grpo/ratio, grpo/clipped_low,
    grpo/clipped_high, grpo/clipped_dual (share of tokens that the clip holds), grpo/old_kl (k3 of sampling against learning policy),
    grpo/advantage; where given grpo/kl, grpo/entropy, grpo/mismatch (|old_logp - rollout_logp|), grpo/truncated (share at the bound).
    Raises ValueError for shapes that differ, bounds that are none, and a coefficient without its array.
    """
    _check_bounds(clip_low, clip_high, dual_clip, truncation)
    for name, coefficient, array in (("ref_logp", kl_coefficient, ref_logp), ("entropy", entropy_coefficient, entropy)):
        if coefficient and array is None:
            raise ValueError(f"the coefficient of {name} is {coefficient} but there is no {name}: give it, or set the coefficient to 0")
    given = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "weights": weights}
    given |= {"ref_logp": ref_logp, "entropy": entropy, "rollout_logp": rollout_logp}
    given = {name: x for name, x in given.items() if x is not None}
    if len({x.shape for x in given.values()}) > 1:
        raise ValueError("all arrays must have one shape: " + ", ".join(f"{name} {x.shape}" for name, x in given.items()))

    on = lax.stop_gradient(weights) != 0
    # A masked token may hold anything, also -inf; chosen away before any arithmetic it cannot make 0 * inf in a gradient.
    x = {name: jnp.where(on, value.astype(jnp.float32), 0.0) for name, value in given.items()}
    fixed = {name: lax.stop_gradient(value) for name, value in x.items() if name not in ("logp", "entropy")}
    policy, means = _policy_term(x["logp"] - fixed["old_logp"], fixed["advantages"], clip_low, clip_high, dual_clip)
    if rollout_logp is not None:
        apart = fixed["old_logp"] - fixed["rollout_logp"]
        correction = _expm1(apart) + 1.0
        policy = policy * jnp.minimum(correction, truncation)
        means |= {"mismatch": jnp.abs(apart), "truncated": correction > truncation}
    loss = policy
    if ref_logp is not None:
        means["kl"] = kl_estimate(x["logp"], fixed["ref_logp"], kl)
        loss = loss + kl_coefficient * means["kl"]
    if entropy is not None:
        means["entropy"] = x["entropy"]
        loss = loss - entropy_coefficient * means["entropy"]
    count = jnp.sum(on.astype(jnp.float32))
    some = jnp.maximum(count, 1.0)
    metrics = {f"grpo/{name}": jnp.sum(jnp.where(on, value, 0.0)) / some for name, value in means.items()}
    return jnp.sum(fixed["weights"] * loss), {**lax.stop_gradient(metrics), "grpo/tokens": count}


def _policy_term(difference: jax.Array, advantage: jax.Array, clip_low: float, clip_high: float, dual_clip: float | None):
    """The clipped policy term of every token, and what to report of it. difference: logp - old_logp."""
    ratio = _expm1(difference) + 1.0
    low, high = (advantage < 0) & (ratio < 1.0 - clip_low), (advantage > 0) & (ratio > 1.0 + clip_high)
    held = jnp.where(low, 1.0 - clip_low, jnp.where(high, 1.0 + clip_high, ratio))
    dual = (advantage < 0) & (ratio > (jnp.inf if dual_clip is None else dual_clip))
    policy = -jnp.where(dual, dual_clip or 1.0, held) * advantage
    means = {"ratio": ratio, "clipped_low": low, "clipped_high": high, "clipped_dual": dual}
    return policy, {**means, "advantage": advantage, "old_kl": _expm1(difference) - difference}


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None, truncation: float) -> None:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"clip_low is {clip_low} and clip_high {clip_high}; need 0 <= clip_low <= 1 and clip_high >= 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or None for no dual clip")
    if not truncation > 0:
        raise ValueError(f"truncation is {truncation}; it must be above 0")


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1; above STEEPEST its tangent there, which is finite and, unlike a clamp, still has a gradient."""
    return jnp.expm1(jnp.minimum(x, STEEPEST)) + float(np.exp(STEEPEST)) * jnp.maximum(x - STEEPEST, 0.0)
