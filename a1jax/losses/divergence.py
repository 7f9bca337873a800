"""Divergences of two distributions over the same classes, as one term per class: summed over the classes they are the divergence.

A term is a function of two log-probabilities of one shape (student, teacher), float32, elementwise. Another divergence is
one more function here and one more name in ``TERMS``; every mode of ``distill`` then has it, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["reverse", "forward", "jensen_shannon"]

LOG_2 = 0.6931472
LEAST_REST = 2.0**-24  # the smallest mass outside a support that float32 can tell from none: half a unit in the last place of 1


def reverse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(student || teacher): p_s (log p_s - log p_t). Mode seeking; the divergence of arXiv 2606.30616, section 2.3."""
    return jnp.exp(student) * (student - teacher)


def forward(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student): p_t (log p_t - log p_s). Covers every mode of the teacher; unbounded where the student has no mass."""
    return jnp.exp(teacher) * (teacher - student)


def jensen_shannon(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Half the sum of both KLs to the mean m = (p_s + p_t) / 2. Symmetric, at most log 2; its gradient is never large."""
    mean = jnp.logaddexp(student, teacher) - LOG_2
    return 0.5 * (jnp.exp(student) * (student - mean) + jnp.exp(teacher) * (teacher - mean))


TERMS: dict[Divergence, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "reverse": reverse,
    "forward": forward,
    "jensen_shannon": jensen_shannon,
}


def term(divergence: Divergence) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function of that name. Raises ValueError for another name."""
    if divergence not in TERMS:
        raise ValueError(f"divergence is {divergence!r}, choose one of {', '.join(TERMS)}")
    return TERMS[divergence]


def log_rest(log_mass: jax.Array) -> jax.Array:
    """log(1 - exp(log_mass)), the log of what a support leaves over; both forms are needed to keep its relative precision.

    A mass that rounding brings to 1 or above leaves LEAST_REST, on both sides of a divergence alike: finite, no gradient.
    """
    log_mass = jnp.minimum(log_mass, -LEAST_REST)
    half = -LOG_2
    near_one = jnp.log(-jnp.expm1(jnp.maximum(log_mass, half)))  # each form is kept inside its own range, so that the
    return jnp.where(log_mass > half, near_one, jnp.log1p(-jnp.exp(jnp.minimum(log_mass, half))))  # other's gradient is finite
