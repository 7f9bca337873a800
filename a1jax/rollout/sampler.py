"""Two jitted programs for many environments in lockstep: feed a token to every slot, or up to C known tokens to a few; sample the next.

The host decides what is fed (a prompt, an observation, or what was just sampled); the device only ever sees these two shapes.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ConfigError
from ..models import decode, transformer
from ..models.config import ModelConfig
from ..sharding import constrain, is_sharded
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
        ids = invert(jnp.exp(logp), uniforms)
    else:
        ids = jnp.argmax(x, axis=-1).astype(jnp.int32)
    return ids, jnp.take_along_axis(logp, ids[:, None], axis=-1)[:, 0]


def invert(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """ids int32 [B]: where the running sum of weights [B, V] >= 0 passes uniforms [B] in [0, 1) of their total; never a weight of 0.

    In two steps, the block of ids first and then the id in its block: a running sum over V is the dearest part of a small model's step.
    """
    b, v = weights.shape
    width = 1 << math.isqrt(v).bit_length()
    parts = jnp.pad(weights, ((0, 0), (0, -v % width))).reshape(b, -1, width)
    ends = jnp.cumsum(jnp.sum(parts, axis=-1), axis=-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = _possible(jnp.any(parts > 0, axis=-1), jnp.sum(ends <= target, axis=-1))
    start = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    part = jnp.take_along_axis(parts, block[:, None, None], axis=1)[:, 0]
    place = _possible(part > 0, jnp.sum(start[:, None] + jnp.cumsum(part, axis=-1) <= target, axis=-1))
    return (block * width + place).astype(jnp.int32)


def _possible(possible: jax.Array, place: jax.Array) -> jax.Array:
    """[B]: the first possible place (bool [B, n]) from place [B] on, or the last there is: rounding moves a sum by a hair."""
    index = jnp.arange(possible.shape[1])[None]
    later = possible & (index >= place[:, None])
    return jnp.where(jnp.any(later, axis=-1), jnp.argmax(later, axis=-1), jnp.max(jnp.where(possible, index, 0), axis=-1))


@functools.lru_cache(maxsize=16)
def make_step(cfg: ModelConfig, temperature: float, record: bool = False):
    """step(params, cache, tokens [B], reset [B], active [B], uniforms [B]) -> (ids [B], logp [B], cache); the cache is donated.

    record: also the experts that the token fed took, int16 [B, L, A], -1 where not active.
    """

    def step(params: Params, cache: Any, tokens, reset, active, uniforms):
        hidden, cache, *routes = decode.step(params, cache, tokens, cfg, reset=reset, active=active, record=record)
        logits = transformer.head(params, hidden, cfg)
        ids, logp = sample(logits, uniforms, temperature)
        return *for_the_host(ids, logp), decode.place_cache(cache, cfg), *for_the_host(*routes)

    return jax.jit(step, donate_argnums=(1,))


LAST = -1  # as a token: feed what the slot sampled last, which the host has not seen yet


@functools.lru_cache(maxsize=16)
def make_advance(cfg: ModelConfig, temperature: float, record: bool = False):
    """make_step for a host that is one step behind: advance(params, slots, tokens [B], reset, active, uniforms) -> (ids, logp, slots).

    slots: (cache, the id each slot sampled last [B]), donated; see ``open_slots``. A token LAST is that id.
    """
    step = make_step(cfg, temperature, record)

    def advance(params: Params, slots: tuple[Any, jax.Array], tokens, reset, active, uniforms):
        cache, last = slots
        ids, logp, cache, *routes = step(params, cache, jnp.where(tokens == LAST, last, tokens), reset, active, uniforms)
        return ids, logp, (cache, *for_the_host(jnp.where(active, ids, last))), *routes

    return jax.jit(advance, donate_argnums=(1,))


@functools.lru_cache(maxsize=16)
def make_feed(cfg: ModelConfig, temperature: float, record: bool = False):
    """feed(params, slots, rows [R], tokens [R, C], lengths [R], reset [R], uniforms [R]) -> (ids [R], logp [R], slots, ...).

    Feeds the first lengths[r] of tokens[r] to slot rows[r], which go in no order but once each (a row out of range is nobody), and
    samples what follows them. slots as in ``make_advance``; record: also the experts taken, int16 [R, C, L, A].
    """

    def feed(params: Params, slots: tuple[Any, jax.Array], rows, tokens, lengths, reset, uniforms):
        cache = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), slots[0])
        hidden, cache, *routes = decode.prefill(params, cache, tokens, lengths, cfg, reset, record)
        ids, logp = for_the_host(*sample(transformer.head(params, decode.last(hidden, lengths), cfg), uniforms, temperature))
        cache, newest = jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), slots, (cache, ids))
        return ids, logp, (decode.place_cache(cache, cfg), *for_the_host(newest)), *for_the_host(*routes)

    return jax.jit(feed, donate_argnums=(1,))


def for_the_host(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """What the host reads of a step: under a mesh on every device, so that every process has it."""
    return tuple(constrain(x, *[None] * x.ndim) for x in arrays)


def open_slots(cfg: ModelConfig, slots: int, max_length: int) -> tuple[Any, jax.Array]:
    """(empty cache, ids sampled last [B]); under a mesh no device ever has more of the cache than its part."""
    if not is_sharded():
        return decode.init_cache(cfg, slots, max_length), jnp.zeros(slots, jnp.int32)
    make = functools.partial(decode.init_cache, cfg, slots, max_length)
    return jax.jit(lambda: (decode.place_cache(make(), cfg), *for_the_host(jnp.zeros(slots, jnp.int32))))()


@functools.lru_cache(maxsize=16)
def make_unstack(cfg: ModelConfig):
    """params -> params as decode.step reads them fastest. A CPU gets a second copy of the layers where there is more than one block;
    other devices have less room and cut a layer out without one."""
    if cfg.num_blocks == 1 or jax.default_backend() != "cpu":
        return lambda params: params
    return jax.jit(functools.partial(decode.unstack, cfg=cfg))


def seed_of(seed: int, use: str, number: int) -> int:
    """The seed of one ``Engine.run``: of an experiment's seed, of what is sampled for (a stage's name) and of the how-manieth time it is.

    A pure function, so that who goes on after a stop samples as it would have. Seeds below 2^32, uses of another crc32 and numbers below
    2^32 each stand in bits of their own: no two stages, seeds or steps share their numbers. Raises ConfigError for others."""
    if not (0 <= seed < 1 << 32 and 0 <= number < 1 << 32):
        raise ConfigError(f"{use}: seed {seed} and number {number} of what is sampled must be at least 0 and below 2^32")
    return (seed << 64) + (zlib.crc32(use.encode()) << 32) + number


def run_uniforms(seed: int, run: int, attempt: int, length: int) -> np.ndarray:
    """The numbers one run samples with: float32 [length], fixed by (seed, run, attempt)."""
    return np.random.default_rng([seed, run, attempt]).random(length, dtype=np.float32)
