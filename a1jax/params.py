"""Parameters as a tree of specs, from which arrays, abstract shapes, shardings and counts all come, so they cannot drift apart."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from a1jax import sharding
from a1jax.config import ConfigError

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
"""(key, shape, dtype) -> array."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter. Matrices hold (in, out) in their last two axes; axes before those are stacks (layers, experts)."""

    shape: tuple[int, ...]  # sizes
    axes: tuple[str | None, ...]  # logical axis per dimension, names of a1jax.sharding.RULES; None is never cut
    init: Initializer  # draws the initial value
    dtype: str = "float32"  # stored type

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ConfigError(f"ParamSpec of shape {self.shape} has {len(self.axes)} logical axes: give one per dimension")


def normal(std: float) -> Initializer:
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def uniform(low: float, high: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, jnp.float32, low, high).astype(dtype)


def constant(value: float) -> Initializer:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def log_uniform(low: float, high: float) -> Initializer:
    """log(a) of a uniform on (low, high)."""
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high)).astype(dtype)


def log_spread(low: float, high: float) -> Initializer:
    """log(a) of a spaced geometrically from low to high along the last dimension: the same for every key."""

    def init(key, shape, dtype):
        values = jnp.linspace(math.log(low), math.log(high), shape[-1], dtype=jnp.float32)
        return jnp.broadcast_to(values.reshape((1,) * (len(shape) - 1) + (-1,)), shape).astype(dtype)

    return init


def stack(specs: Any, n: int, axis: str = "layers") -> Any:
    """The same tree with a leading dimension of n on every parameter."""
    return jax.tree.map(lambda s: dataclasses.replace(s, shape=(n, *s.shape), axes=(axis, *s.axes)), specs)


def init(specs: Any, key: jax.Array) -> Any:
    """Arrays for a tree of specs. Each draws from the key folded with its own path, so a new parameter changes no other.

    ``jax.jit(lambda key: init(specs, key), out_shardings=shardings(specs, mesh))`` makes on every device only its own part.
    """

    def draw(path, spec):
        return spec.init(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, specs)


def abstract(specs: Any) -> Any:
    """jax.ShapeDtypeStruct for every spec: enough to lower, to restore and to count, without memory."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), specs)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """NamedSharding for every spec. Raises ConfigError, naming the parameter, when a dimension cannot be cut evenly."""

    def place(path, spec):
        try:
            return NamedSharding(mesh, sharding.partition_spec(spec.axes, mesh, spec.shape))
        except ConfigError as error:
            raise ConfigError(f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: {error}") from None

    return jax.tree_util.tree_map_with_path(place, specs)


def constrain(specs: Any, tree: Any) -> Any:
    """Inside jit: a tree that has the parameters somewhere in it (gradients, an optimizer's state), told to lie as they do; as it is
    without a mesh."""
    if not sharding.is_sharded():
        return tree

    def place(leaf, spec):
        axes, shape = ((), ()) if spec is None else (spec.axes, spec.shape)
        return jax.lax.with_sharding_constraint(leaf, sharding.partition_spec(axes, jax.sharding.get_abstract_mesh(), shape))

    return with_owners(place, tree, specs)


def with_owners(function: Callable[[Any, Any], Any], tree: Any, params: Any) -> Any:
    """function(leaf, owner) for every leaf of a tree that has trees like ``params`` somewhere in it: an optimizer's state.

    owner: the leaf of ``params`` (an array or a spec) whose path ends the leaf's own and whose shape it has; None for counts and rates.
    """
    known = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def call(path, leaf):
        owners = (known.get(path[start:]) for start in range(len(path) + 1))  # the longest path first: norm is not attention/norm
        return function(leaf, next((o for o in owners if o is not None and tuple(o.shape) == tuple(leaf.shape)), None))

    return jax.tree_util.tree_map_with_path(call, tree)


def count(specs: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs))
