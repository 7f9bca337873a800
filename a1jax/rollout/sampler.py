"""One jitted decode step for many environments in lockstep: feed a token to every slot, sample the next.

The host decides what is fed (a prompt, an observation, or what was just sampled); the device only ever sees one shape.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models import decode, transformer
from ..models.config import ModelConfig
from ..types import Params


def sample(logits: jax.Array, uniforms: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Sample by inverse distribution function.

    logits: [B, V]. uniforms: [B] in [0, 1), one per slot, so that what a run samples depends on its own numbers only and not on
    the slot it sits in. temperature: 0 takes the best id (lowest id on ties).
    Returns ids int32 [B] and their log-probabilities float32 [B] under the distribution sampled from (at temperature 0, under the
    untempered softmax).
    """
    x = logits.astype(jnp.float32) / (temperature if temperature > 0 else 1.0)  # float32: a log-softmax
    logp = jax.nn.log_softmax(x, axis=-1)
    if temperature > 0:
        cdf = jnp.cumsum(jnp.exp(logp), axis=-1)
        below = cdf <= uniforms[:, None] * cdf[:, -1:]  # scaled by the last value: rounding never points past the vocabulary
        ids = jnp.minimum(below.sum(-1), logits.shape[-1] - 1).astype(jnp.int32)
    else:
        ids = jnp.argmax(x, axis=-1).astype(jnp.int32)
    return ids, jnp.take_along_axis(logp, ids[:, None], axis=-1)[:, 0]


@functools.lru_cache(maxsize=16)
def make_step(cfg: ModelConfig, temperature: float, record: bool = False):
    """step(params, cache, tokens [B], reset [B], active [B], uniforms [B]) -> (ids [B], logp [B], cache); the cache is donated.

    record: also the experts that the token fed took, int16 [B, L, A], -1 where not active.
    """

    def step(params: Params, cache: Any, tokens, reset, active, uniforms):
        hidden, cache, *routes = decode.step(params, cache, tokens, cfg, reset=reset, active=active, record=record)
        logits = hidden @ transformer.unembed(params, cfg).T.astype(hidden.dtype)
        ids, logp = sample(logits, uniforms, temperature)
        return ids, logp, cache, *routes

    return jax.jit(step, donate_argnums=(1,))


def run_uniforms(seed: int, run: int, attempt: int, length: int) -> np.ndarray:
    """The numbers one run samples with: float32 [length], fixed by (seed, run, attempt)."""
    return np.random.default_rng([seed, run, attempt]).random(length, dtype=np.float32)
