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


def _of_parameters(specs: Any, tree: Any) -> Any:
    """The tree with, for every leaf, the axes of the parameter it belongs to: one whose path ends with that parameter's and that has its
    shape, as the moments of an optimizer do. None for a leaf that belongs to no parameter."""
    owners = {tuple(map(_name, path)): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}

    def find(path, leaf):
        names = tuple(map(_name, path))
        found = (owners.get(names[i:]) for i in range(len(names)))
        spec = next((spec for spec in found if spec is not None), None)
        return spec.axes if spec is not None and spec.shape == tuple(jnp.shape(leaf)) else None

    return jax.tree_util.tree_map_with_path(find, tree)


def _name(key: Any) -> Any:
    return next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field))


def shardings_like(specs: Any, mesh: Mesh, tree: Any) -> Any:
    """NamedSharding for every leaf (array or ShapeDtypeStruct) of a tree that holds parameters, or what an optimizer keeps of each, in
    any depth: as their parameter lies, everything else on every device."""
    axes = _of_parameters(specs, tree)

    def place(own, leaf):
        return sharding.replicated(mesh) if own is None else NamedSharding(mesh, sharding.partition_spec(own, mesh, leaf.shape))

    return jax.tree.map(place, axes, tree, is_leaf=lambda x: x is None or _is_axes(x))


def constrain(specs: Any, tree: Any) -> Any:
    """``shardings_like`` within a jitted function, on the current mesh: what belongs to no parameter is left alone. The compiler would
    otherwise copy what starts as zeros to every device, and let parameters drift to where it last used them."""
    axes = _of_parameters(specs, tree)

    def place(own, leaf):
        return leaf if own is None else sharding.constrain(leaf, *own)

    return jax.tree.map(place, axes, tree, is_leaf=lambda x: x is None or _is_axes(x))


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)


def count(specs: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs))
