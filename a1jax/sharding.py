"""Where arrays lie: the mesh, the one table from logical axes to mesh axes, and the constraint inside a jitted function.

Run a sharded function under ``with jax.set_mesh(make_mesh(shape)):``; without a mesh every function here that touches an
array returns it unchanged, so the same model code runs on one device.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from a1jax import types
from a1jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),  # outside the experts the expert axis is one more data axis
    "width_rows": ("data",),  # rows while their width is cut by "embed", see models.layers.embed
    "length": (),
    "hidden": (),
    # weights; "embed" and "batch" share axes, which is what makes it fully sharded data parallelism
    "layers": (),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "linear_qkv": (),  # q, k, v lie side by side in it: a cut over tensor would not follow the heads
    "linear_heads": ("tensor",),
    "shared_width": ("tensor",),
    "router": (),
    "norm": (),
    "tap": (),
    "single": (),
    # experts are cut by expert only, so that a device owns whole experts and nobody ever gathers expert weights
    "experts": ("expert", "fsdp", "tensor"),
    "expert_in": (),
    "expert_out": (),
}


def make_mesh(shape: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh with all of MESH_AXES; axes missing from ``shape`` have size 1.

    devices: defaults to all of jax.devices(); the product of the sizes must be their number.
    Raises ConfigError for an unknown axis, a size below 1 or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in shape.items():
        if name not in MESH_AXES:
            raise ConfigError(f"mesh axis {name!r} is unknown: use {', '.join(MESH_AXES)}")
        if size < 1:
            raise ConfigError(f"mesh axis {name!r} has size {size}: give a size of at least 1")
    sizes = [shape.get(name, 1) for name in MESH_AXES]
    if math.prod(sizes) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(f"mesh {product} needs {math.prod(sizes)} devices, here are {len(devices)}: change the sizes or pass devices")
    # Auto axes: the compiler propagates shardings from parameters, batch and constraints.
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(axes: tuple[str | None, ...], mesh, shape: tuple[int, ...] | None = None) -> P:
    """The PartitionSpec of an array whose dimensions have these logical axes; None is a dimension that is never cut.

    Raises ConfigError when an axis is not in the table, when two logical axes land on one mesh axis (of size above 1), or when
    a dimension of ``shape`` cannot be cut evenly.
    """
    entries, owner = [], {}
    for i, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise ConfigError(f"logical axis {axis!r} is not in a1jax.sharding.RULES: add it there")
        names = tuple(name for name in RULES[axis] if mesh.shape.get(name, 1) > 1) if axis else ()
        for name in names:
            if name in owner:
                both = f"logical axes {owner[name]!r} and {axis!r} of one array"
                raise ConfigError(f"{both} land on the same mesh axis {name!r}: change a1jax.sharding.RULES")
            owner[name] = axis
        parts = math.prod(mesh.shape[name] for name in names)
        if shape is not None and shape[i] % parts:
            cut = f"{' x '.join(names)} = {parts}"
            raise ConfigError(f"axis {axis!r} of size {shape[i]} cannot be cut over {cut}: change the mesh or the size")
        entries.append(names[0] if len(names) == 1 else names or None)
    return P(*entries)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Mesh axes (of size above 1, of the current mesh) on which a logical axis lies; () without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in RULES[axis] if mesh.shape.get(name, 1) > 1)


def is_sharded() -> bool:
    """True under ``jax.set_mesh`` of a mesh with more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, told to lie as its logical axes say (one per dimension); x itself without a mesh. Raises as partition_spec does."""
    if not is_sharded():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, jax.sharding.get_abstract_mesh(), x.shape))


def batch_shardings(mesh: Mesh, routes: bool = False) -> types.Batch:
    """A types.Batch of NamedShardings: rows over all data axes. Use with jax.device_put or as in_shardings. routes: the batch has some."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "length"), mesh))
    return types.Batch(**{field.name: sharding for field in dataclasses.fields(types.Batch) if routes or field.name != "routes"})


def put_batch(batch: types.Batch, mesh: Mesh) -> types.Batch:
    """The batch on the mesh's devices. Raises ConfigError when its rows cannot be cut evenly over the data axes."""
    partition_spec(("batch", "length"), mesh, batch.tokens.shape)
    return jax.device_put(batch, batch_shardings(mesh, batch.routes is not None))
