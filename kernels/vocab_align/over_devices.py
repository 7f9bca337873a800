"""Rows shared out over all devices of the current mesh (``jax.set_mesh``), whatever its axes are for elsewhere; without a mesh, nothing.

What is computed of each row by itself needs no partner: a device that has its rows and the whole output matrix does with them what a
single device does. No search and no sum over ids is cut, and the results are those of one device. The price is a copy of the output
matrix on every device for that time. The compiler by itself would leave the matrix cut and have the devices meet in every step of a
loop over ids, for gathers, for scatters and for the loop's end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def count() -> int:
    """Devices of the current mesh; 1 without one, and within ``jax.shard_map``, where the rows are one device's already."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.size


def whole(arrays: Any) -> Any:
    """The pytree of arrays with a copy on every device. From the host."""
    return arrays if count() == 1 else jax.device_put(arrays, P())


def by_rows(function: Callable[[Any, Any], Any], rows: Any, copied: Any, gather: bool = False) -> Any:
    """function(rows, copied), where every device has a piece of the rows and all of ``copied``; within jit.

    rows, copied: pytrees of arrays; the leading axis of all rows is N, and of all results too, which are rows in the same order.
    Where the devices are not a divisor of N, rows of zeros are computed too, and left out. Loops of the function may run as long as a
    device's own rows ask for. gather: every device gets all results; without it they stay cut. Gradients to ``copied`` are summed over
    the devices, once."""
    devices = count()
    if devices == 1:
        return function(rows, copied)
    size = jax.tree.leaves(rows)[0].shape[0]
    rows = jax.tree.map(lambda x: jnp.pad(x, [(0, -size % devices)] + [(0, 0)] * (x.ndim - 1)), rows)
    cut = P(jax.sharding.get_abstract_mesh().axis_names)
    # No check of varying axes: loops start from constants, which would have to be told that they vary.
    found = jax.shard_map(function, in_specs=(cut, P()), out_specs=cut, check_vma=False)(rows, copied)
    return jax.tree.map(lambda x: (jax.lax.with_sharding_constraint(x, P()) if gather else x)[:size], found)
