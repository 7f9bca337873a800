"""From gradients to new parameters: in which precision parameters are kept, and in which memory the optimizer's state lies.

bfloat16 has 8 significant bits: a parameter plus less than 2^-9 of itself is the same parameter, and at the learning rates of
fine-tuning most updates are smaller than that. Two ways out: "master" keeps a float32 copy in the optimizer's state and adds to that
(4 more bytes a parameter, Micikevicius et al. 2018, arXiv 1710.03740); "stochastic" rounds the sum up or down by chance, so that small
updates arrive on average (no more bytes, Gupta et al. 2015, arXiv 1502.02551). Parameters that are float32 already are plainly added to.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .config import ConfigError
from .params import with_owners
from .types import Params

Precision = Literal["plain", "master", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """An optimizer that makes the new parameters itself, where an optax transformation gives something to add to them.

    init(params) -> state. step(gradients in float32, state, params, key) -> (params, state). host: what the state has of every parameter
    (moments, masters) lies in pinned host memory between the steps.
    """

    init: Callable[[Params], Any]
    step: Callable[[Params, Any, Params, jax.Array], tuple[Params, Any]]
    host: bool = False


class Mastered(NamedTuple):
    """master: float32, as params; empty where the parameter itself is float32. inner: state of the transformation."""

    master: Any
    inner: Any


class Counted(NamedTuple):
    """count: int32, updates done; it makes the keys of the rounding. inner: state of the transformation."""

    count: jax.Array
    inner: Any


def rule(inner: optax.GradientTransformation, precision: Precision = "plain", offload: bool = False) -> Any:
    """``inner`` with parameters kept in this precision and, with ``offload``, its state in host memory; ``inner`` itself for neither.

    Raises ConfigError for a precision that does not exist.
    """
    made = {"plain": plain, "master": master, "stochastic": stochastic}.get(precision)
    if made is None:
        raise ConfigError(f"optimizer precision is {precision!r}: choose plain, master or stochastic")
    if precision == "plain" and not offload:
        return inner
    return dataclasses.replace(made(inner), host=offload)


def plain(inner: optax.GradientTransformation) -> Rule:
    """What optax does: gradients, state and sums in the parameters' own type."""

    def step(grads: Params, state: Any, params: Params, key: jax.Array) -> tuple[Params, Any]:
        del key
        return plain_step(inner, grads, state, params)

    return Rule(inner.init, step)


def plain_step(inner: optax.GradientTransformation, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    updates, state = inner.update(jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), state, params)
    return optax.apply_updates(params, updates), state


def master(inner: optax.GradientTransformation) -> Rule:
    """Updates add up in a float32 copy; the bfloat16 parameters are that copy, rounded to nearest, after every step.

    ``inner`` sees only float32: gradients and the copy. So its run is that of float32 parameters given the same gradients, bit for bit.
    """

    def init(params: Params) -> Mastered:
        kept = jax.tree.map(lambda p: p.astype(jnp.float32) if _is_narrow(p) else optax.MaskedNode(), params)
        return Mastered(kept, inner.init(_wide(params)))

    def step(grads: Params, state: Mastered, params: Params, key: jax.Array) -> tuple[Params, Mastered]:
        del key
        before = jax.tree.map(lambda p, m: m if _is_narrow(p) else p, params, state.master)
        updates, rest = inner.update(grads, state.inner, before)
        after = optax.apply_updates(before, updates)
        kept = jax.tree.map(lambda p, a: a if _is_narrow(p) else optax.MaskedNode(), params, after)
        return jax.tree.map(lambda p, a: a.astype(p.dtype), params, after), Mastered(kept, rest)

    return Rule(init, step)


def stochastic(inner: optax.GradientTransformation) -> Rule:
    """The float32 sum of parameter and update, rounded to bfloat16 by chance (``round_by_chance``); ``inner`` sees only float32.

    Every parameter's chance comes from the run's key, the count of updates and its own path: a resumed run goes on the same, and
    how arrays are cut over devices changes nothing.
    """

    def init(params: Params) -> Counted:
        return Counted(jnp.zeros((), jnp.int32), inner.init(_wide(params)))

    def step(grads: Params, state: Counted, params: Params, key: jax.Array) -> tuple[Params, Counted]:
        before = _wide(params)
        updates, rest = inner.update(grads, state.inner, before)
        after = optax.apply_updates(before, updates)
        key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"rounding")), state.count)

        def rounded(path: Any, p: jax.Array, a: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
            return round_by_chance(a, own) if _is_narrow(p) else a

        return jax.tree_util.tree_map_with_path(rounded, params, after), Counted(state.count + 1, rest)

    return Rule(init, step)


def round_by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: one of the two neighbours, each with the chance that makes the mean x. Infinities and nan stay what they are.

    A float32's upper 16 bits are the neighbour towards zero and its lower 16 bits the way to the other one in units of 2^-16, so 16
    random bits are added and the lower half is cut off. The bits do not depend on how the array is cut (jax_threefry_partitionable).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    chosen = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), chosen, x.astype(jnp.bfloat16))


def to_device(state: Any, params: Params) -> Any:
    """Inside jit: what a host rule's state has of every parameter, in the device's memory."""
    return _moved(state, params, jax.memory.Space.Device)


def to_host(state: Any, params: Params) -> Any:
    """Inside jit: the reverse of ``to_device``."""
    return _moved(state, params, jax.memory.Space.Host)


def _moved(state: Any, params: Params, space: jax.memory.Space) -> Any:
    return with_owners(lambda x, owner: x if owner is None else jax.device_put(x, space), state, params)


def _is_narrow(p: jax.Array) -> bool:
    return p.dtype == jnp.bfloat16


def _wide(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32) if _is_narrow(p) else p, params)
