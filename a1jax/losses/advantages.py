"""Advantages of groups: G runs of each of P prompts, compared with one another and with nothing else.

All arrays are [P, G]. ``valid`` says which runs exist: one that the system interrupted (ABORTED) is left out and takes nobody
along. The rewards of runs that are not valid are never read, so they may be anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from a1jax.types import ABORTED, STATUSES, TRUNCATED

Array = jax.Array | np.ndarray


def group_advantages(rewards: Array, valid: Array, *, deviation: bool = True, ddof: int = 0, eps: float = 1e-6) -> jax.Array:
    """(reward - mean) / (deviation + eps) within each group, float32 [P, G]; exactly 0 where not valid or where all rewards are equal.

    rewards: float [P, G]. valid: bool [P, G]; mean and deviation are over the group's valid runs.
    deviation: True is GRPO (arXiv 2402.03300, eq. 3 and section 4.1.2). False only takes the mean off (arXiv 2503.20783): dividing
    makes nearly solved and nearly hopeless prompts weigh more than the others.
    ddof: 0 divides the squares by the number of runs n, 1 by n - 1 as torch.std does; the paper does not say which.
    A NaN among the valid rewards makes its group NaN. Raises ValueError for shapes that differ or are not [P, G], and another ddof.
    """
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(f"rewards {rewards.shape} and valid {valid.shape} must be [P, G] alike")
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}, it must be 0 or 1")
    valid = jnp.asarray(valid, bool)
    rewards = jnp.where(valid, jnp.asarray(rewards, jnp.float32), 0.0)
    count = jnp.sum(valid, axis=1, keepdims=True).astype(jnp.float32)
    centred = jnp.where(valid, rewards - jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(count, 1.0), 0.0)
    if deviation:
        variance = jnp.sum(centred**2, axis=1, keepdims=True) / jnp.maximum(count - ddof, 1.0)
        centred = centred / (jnp.sqrt(variance) + eps)
    # The mean of equal rewards is off by a rounding, which a division by (0 + eps) would make an advantage of 0.01.
    return jnp.where(_spread(rewards, valid)[:, None] == 0, 0.0, centred)


def papo_advantages(
    outcome: Array, process: Array, valid: Array, *, coefficient: float = 0.5, deviation: bool = True, ddof: int = 0, eps: float = 1e-6
) -> jax.Array:
    """A_out + coefficient * [outcome = 0] * A_proc, float32 [P, G]: the tool-calling teacher's (arXiv 2606.30616, section 4.2).

    outcome: 0 or 1. process: fraction of rubrics met, in [0, 1]. A_out is ``group_advantages`` over the valid runs, A_proc over the
    valid runs that failed: among failures those that came nearer are pushed away less, and a success is never graded by its process.
    (PAPO itself, arXiv 2603.26535, does it the other way round and grades the successes.) A single failure has A_proc = 0.
    A valid run whose outcome or process is outside these ranges makes everything NaN: what cannot be raised under jit must not
    pass unnoticed. Raises ValueError for shapes that differ.
    """
    if outcome.shape != process.shape:
        raise ValueError(f"outcome {outcome.shape} and process {process.shape} must be [P, G] alike")
    outcome, process = jnp.asarray(outcome, jnp.float32), jnp.asarray(process, jnp.float32)
    normalise = {"deviation": deviation, "ddof": ddof, "eps": eps}
    of_outcome = group_advantages(outcome, valid, **normalise)
    valid = jnp.asarray(valid, bool)
    of_process = group_advantages(process, valid & (outcome == 0), **normalise)
    legal = ((outcome == 0) | (outcome == 1)) & (process >= 0) & (process <= 1)
    return jnp.where(jnp.all(legal | ~valid), of_outcome + coefficient * of_process, jnp.nan)


def mixed(rewards: Array, valid: Array) -> jax.Array:
    """bool [P]: the group's valid runs do not all have one reward, so it teaches something; the others are dropped.

    Dynamic sampling (arXiv 2503.14476, section 3.2), and with 5 tries a task the choice of questions for the search teacher
    (arXiv 2606.30616, section 4.2). Under ``papo_advantages`` a group of failures may still teach:
    ``mixed(outcome, valid) | mixed(process, valid & (outcome == 0))``. A NaN reward counts as mixed, to be seen downstream.
    """
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(f"rewards {rewards.shape} and valid {valid.shape} must be [P, G] alike")
    return _spread(jnp.asarray(rewards, jnp.float32), jnp.asarray(valid, bool)) != 0


def counted(statuses: Sequence[Sequence[str]], overlong_filter: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(valid, looked), bool [P, G] each, from the statuses of the runs.

    valid: the run's reward counts in its group; ABORTED ones do not. looked: the loss reads its tokens; with ``overlong_filter`` a
    TRUNCATED run only counts in its group (arXiv 2503.14476, section 3.4), else it is kept as a valid prefix (arXiv 2606.30616,
    section 4.3, of its stage 3; for the teachers the paper names no filter, so the default is none).
    Raises ValueError for an unknown status or groups of unequal size.
    """
    if len({len(group) for group in statuses}) > 1:
        raise ValueError(f"groups have {sorted({len(group) for group in statuses})} runs, all must have as many; pad with {ABORTED}")
    unknown = sorted({status for group in statuses for status in group} - set(STATUSES))
    if unknown:
        raise ValueError(f"status {unknown[0]!r} is none of {', '.join(STATUSES)}")
    names = np.asarray(statuses, dtype=object).reshape(len(statuses), -1)
    valid = names != ABORTED
    return valid, valid & (names != TRUNCATED) if overlong_filter else valid.copy()


def _spread(rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """float32 [P]: largest less smallest valid reward; 0 in a group without one, NaN where there is a NaN."""
    largest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1)
    smallest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1)
    return jnp.where(jnp.any(valid, axis=1), largest - smallest, 0.0)
