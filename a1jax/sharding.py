"""Where arrays lie: the mesh, the one table from logical axes to mesh axes, and the constraint inside a jitted function.

Run a sharded function under ``with jax.set_mesh(make_mesh(shape)):``; without a mesh every function here that touches an
array returns it unchanged, so the same model code runs on one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from a1jax import mesh_shapes, types
from a1jax.config import ConfigError
from a1jax.mesh_shapes import MESH_AXES

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("slice", "data", "fsdp", "expert"),  # outside the experts the expert axis is one more data axis
    "length": ("context",),  # consecutive pieces of every row
    "hidden": (),
    "tokens": ("slice", "data", "fsdp", "expert", "context"),  # "batch" and "length" in one, see flatten_tokens
    "width_rows": ("slice", "data"),  # the three of models.layers.embed: rows while their width is cut by "embed", ...
    "width_length": (),  # ... the length beside them, ...
    "width": ("fsdp", "expert"),  # ... and the width once the length is where it belongs
    # weights. "embed" has every axis that cuts tokens but slice and data, which makes it fully sharded data parallelism: a weight is
    # gathered when it is used, its gradient is summed and cut in one exchange. context is one of them: the gather is as long either way,
    # and the sum over context, which copies would need too, leaves each device its part only.
    "layers": (),
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "linear_qkv": (),  # q, k, v lie side by side: stored whole, and split by head where it is used, see models.gated_delta.mix_sharded
    "linear_heads": ("tensor",),
    "shared_width": ("tensor",),
    "router": (),
    "norm": (),
    "tap": (),
    "single": (),
    # Experts are cut by expert only, so that a device owns whole experts and nobody ever gathers expert weights. Every axis that cuts
    # tokens but data and slice cuts them, as with "embed": tokens travel to their experts, see models.exchange.
    "experts": ("expert", "fsdp", "context", "tensor"),
    "expert_in": (),
    "expert_out": (),
}


def make_mesh(shape: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh with all of MESH_AXES; axes missing from ``shape`` have size 1. Devices stand in it as ``mesh_shapes.arrange`` says.

    devices: defaults to all of jax.devices(); the product of the sizes must be their number. They may be those of a topology that is only
    described (jax.experimental.topologies), to compile for.
    Raises ConfigError for an unknown axis, a size below 1 or a product that is not the number of devices, with the nearest that is.
    """
    devices = jax.devices() if devices is None else devices
    mesh_shapes.check(shape, len(devices))
    placed = mesh_shapes.arrange(devices, [shape.get(name, 1) for name in MESH_AXES])
    # Auto axes: the compiler propagates shardings from parameters, batch and constraints.
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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


def mesh_axes(axis: str, size: int | None = None) -> tuple[str, ...]:
    """Mesh axes (of size above 1, of the current mesh) on which a logical axis lies; () without a mesh, and for a dimension of size 1,
    which is never cut: the one token of a decoding step has no length."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if size == 1 else tuple(name for name in RULES[axis] if mesh.shape.get(name, 1) > 1)


def shards(axis: str, size: int) -> int:
    """Into how many pieces the current mesh cuts a dimension with this logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in mesh_axes(axis, size))


def if_even(axis: str, size: int) -> str | None:
    """The logical axis if the current mesh cuts a dimension of this size evenly over it, else None: for what may also be copied."""
    return None if size % shards(axis, 0) else axis


def is_sharded() -> bool:
    """True under ``jax.set_mesh`` of a mesh with more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def platform() -> str:
    """What the program that is being traced is meant for: "cpu", "gpu" or "tpu". The current mesh's devices tell, which are not this
    machine's when a program is only compiled; without a mesh it is the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def activation_spec(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> P:
    """partition_spec on the current mesh, where dimensions of size 1 stay whole."""
    axes = tuple(None if size == 1 else axis for size, axis in zip(shape, axes, strict=True))
    return partition_spec(axes, jax.sharding.get_abstract_mesh(), shape)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, told to lie as its logical axes say (one per dimension); x itself without a mesh. Raises as partition_spec does."""
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, axes)) if is_sharded() else x


def flatten_tokens(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B * T, ...] for what is computed token by token. Without context, row after row; with it, shard after shard (the
    same order for every array of these B and T), because the plain order would gather the whole rows on every device."""
    b, t = x.shape[:2]
    rows, columns = shards("batch", b), shards("length", t)
    if columns == 1:
        return x.reshape(b * t, *x.shape[2:])
    x = constrain(x, "batch", "length", *[None] * (x.ndim - 2)).reshape(rows, b // rows, columns, t // columns, *x.shape[2:])
    return constrain(jnp.moveaxis(x, 2, 1).reshape(b * t, *x.shape[4:]), "tokens", *[None] * (x.ndim - 4))


def unflatten_tokens(x: jax.Array, b: int, t: int) -> jax.Array:
    """[B * T, ...] as flatten_tokens made it -> [B, T, ...]."""
    rows, columns = shards("batch", b), shards("length", t)
    if columns == 1:
        return x.reshape(b, t, *x.shape[1:])
    x = jnp.moveaxis(x.reshape(rows, columns, b // rows, t // columns, *x.shape[1:]), 1, 2)
    return constrain(x.reshape(b, t, *x.shape[4:]), "batch", "length", *[None] * (x.ndim - 4))


def over_shards(
    function: Callable[..., jax.Array],
    arguments: Sequence[tuple[jax.Array, tuple[str | None, ...]]],
    out_shape: tuple[int, ...],
    out_axes: tuple[str | None, ...],
) -> jax.Array:
    """function on every device's part of the arguments, each given with its logical axes; its results are the parts of an array of
    out_shape. Collectives inside name axes from ``mesh_axes``. Raises as partition_spec does.

    An argument that several devices share gets the sum of their gradients. That is why the check of varying axes is off: with it, jax
    would leave the sum to the function, and custom gradients inside (matrix products, convolution, attention) do not sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    single = tuple(name for name in mesh.axis_names if mesh.shape[name] == 1)  # named, or the sum would be asked for over them too

    def spec(x, axes):
        head, *rest = activation_spec(x.shape, axes)
        return P((*(head if isinstance(head, tuple) else [head] if head else []), *single), *rest)

    specs = tuple(spec(x, axes) for x, axes in arguments)
    run = jax.shard_map(function, in_specs=specs, out_specs=activation_spec(out_shape, out_axes), check_vma=False)
    return run(*(x for x, _ in arguments))


def rows_here(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch of so many the devices of this process hold, in order; all of them in one process. With ``context`` cut over
    processes several of them hold parts of the same row. Raises as partition_spec does."""
    placed = NamedSharding(mesh, partition_spec(("batch",), mesh, (rows,)))
    held = (index[0].indices(rows) for index in placed.addressable_devices_indices_map((rows,)).values())
    return sorted({row for start, stop, _ in held for row in range(start, stop)})


def batch_shardings(mesh: Mesh, routes: bool = False) -> types.Batch:
    """A types.Batch of NamedShardings: rows over all data axes, their length over context. Use with jax.device_put or as in_shardings.
    routes: the batch has some."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "length"), mesh))
    return types.Batch(**{field.name: sharding for field in dataclasses.fields(types.Batch) if routes or field.name != "routes"})


def put_batch(batch: types.Batch, mesh: Mesh, rows: Sequence[int] | None = None, total: int = 0) -> types.Batch:
    """The batch, from host memory, on the mesh's devices; every process puts what its own devices hold.

    rows, total: ``batch`` has only these rows of a batch of ``total``, at least those of ``rows_here``; None: all of them.
    Raises ConfigError when rows or length cannot be cut evenly over the axes that cut them.
    """
    shape = (batch.tokens.shape[0] if rows is None else total, batch.tokens.shape[1])
    partition_spec(("batch", "length"), mesh, shape)
    placed = batch_shardings(mesh, batch.routes is not None)
    if rows is None and not mesh.is_multi_process:
        return jax.device_put(batch, placed)
    return jax.tree.map(lambda x, sharding: _from_host(x, sharding, rows, shape[0]), batch, placed)


def put_tokens(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """[B, T, ...] from host memory, where a batch of these rows lies. Raises as put_batch does."""
    partition_spec(("batch", "length"), mesh, x.shape[:2])
    return _from_host(x, NamedSharding(mesh, partition_spec(("batch", "length"), mesh)))


def _from_host(x: np.ndarray, placed: NamedSharding, rows: Sequence[int] | None = None, total: int = 0) -> jax.Array:
    """x, or an array of ``total`` rows of which x has these; a process need not have what no device of its own holds."""
    at = None if rows is None else {row: i for i, row in enumerate(rows)}

    def part(index):
        if at is None:
            return x[index]
        start, stop, _ = index[0].indices(total)
        return x[at[start] : at[start] + stop - start][(slice(None), *index[1:])]  # rows in order: those of a device lie side by side

    return jax.make_array_from_callback((len(x) if at is None else total, *x.shape[1:]), placed, part)


def abstract_batch(rows: int, length: int, mesh: Mesh | None, device: jax.Device | None = None, routes: tuple[int, int] | None = None):
    """A types.Batch of ShapeDtypeStructs as put_batch would place it, on ``mesh`` or, without one, on ``device``.

    routes: (layers, active experts) of a batch that has some. Raises as put_batch."""
    if mesh is None:
        placed = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(device), types.Batch(*[0] * 6, 0 if routes else None))
    else:
        partition_spec(("batch", "length"), mesh, (rows, length))
        placed = batch_shardings(mesh, routes is not None)
    kinds = {"mask": jnp.float32, "routes": jnp.int16}

    def of(name, sharding):
        shape = (rows, length, *routes) if name == "routes" else (rows, length)
        return jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32), sharding=sharding)

    fields = ((field.name, getattr(placed, field.name)) for field in dataclasses.fields(types.Batch))
    return types.Batch(**{name: of(name, sharding) for name, sharding in fields if sharding is not None})
