"""The shape of a mesh: its axes, which shapes are possible, the possible one next to an impossible one, and where devices stand in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from a1jax.config import ConfigError

MESH_AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
"""From the slowest network to the fastest. slice: several pods; the batch is cut over it and everything else copied, so that only sums of
gradients cross the network between pods."""

Shape = dict[str, int]
"""Mesh axis -> size; an axis that is not named has size 1."""

log = logging.getLogger(__name__)


def size(shape: Shape) -> int:
    """Devices that a shape needs."""
    return math.prod(shape.values())


def check(shape: Shape, devices: int) -> None:
    """Raises ConfigError for an unknown axis, for a size below 1, and, naming the nearest shape that does, where the product of the sizes
    is not the number of devices."""
    for name, count in shape.items():
        if name not in MESH_AXES:
            raise ConfigError(f"mesh axis {name!r} is unknown: use {', '.join(MESH_AXES)}")
        if count < 1:
            raise ConfigError(f"mesh axis {name!r} has size {count}: give a size of at least 1")
    if size(shape) != devices:
        raise ConfigError(wrong_count(shape, devices))


def wrong_count(shape: Shape, devices: int, fits: Callable[[Shape], bool] = lambda shape: True) -> str:
    """What is said of a shape that needs another number of devices."""
    product = " x ".join(f"{name} {count}" for name, count in shape.items()) or "of no axis"
    return f"mesh {product} needs {size(shape)} devices, here are {devices}{advice(shape, devices, fits)}"


def advice(shape: Shape, devices: int, fits: Callable[[Shape], bool]) -> str:
    """ "; nearest possible: mesh.shape={...}", or that there is none."""
    found = nearest(shape, devices, fits)
    return f"; no mesh of {devices} devices would do" if found is None else f"; nearest possible: mesh.shape={found}"


def nearest(shape: Shape, devices: int, fits: Callable[[Shape], bool] = lambda shape: True) -> Shape | None:
    """The shape of so many devices that ``fits`` and differs least: with the same axes where there is one, else with any; None: no shape.

    The distance is the sum over axes of |log(new / old)|: doubling one axis is as far as halving it. Of equals the one that changes the
    fewest axes, then the one that has more on the outer axes.
    """
    named = tuple(name for name in MESH_AXES if name in shape)
    for axes in (named, tuple(name for name in MESH_AXES if name in shape or name != "slice")):  # how many pods there are is no choice
        possible = [found for found in products(devices, axes) if fits(found)]
        if possible:
            best = min(possible, key=lambda found: _distance(found, shape))
            return {name: best[name] for name in MESH_AXES if best.get(name, 1) > 1 or name in shape}
    return None


def _distance(found: Shape, shape: Shape) -> tuple[Any, ...]:
    ratios = [max(found[name], shape.get(name, 1)) / min(found[name], shape.get(name, 1)) for name in found]
    changed = sum(found[name] != shape.get(name, 1) for name in found)
    return round(math.log(math.prod(ratios)), 9), changed, tuple(-found[name] for name in found)


def products(devices: int, axes: Sequence[str]) -> Iterator[Shape]:
    """All ways to write ``devices`` as a product of sizes, one per axis."""
    if not axes:
        if devices == 1:
            yield {}
        return
    for count in range(1, devices + 1):
        if devices % count == 0:
            for rest in products(devices // count, axes[1:]):
                yield {axes[0]: count, **rest}


def arrange(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of these sizes, the first of which is the axis slice.

    Devices that say which slice they are in (TPU pods joined by a slower network, also those of a topology that is only described) are put
    there by it: each place along the first axis lies in one slice, or is made of whole ones. Within a slice TPU chips are laid along their
    wires (jax.experimental.mesh_utils); other devices stay in their order.
    """
    groups: dict[Any, list[Any]] = {}
    for device in devices:
        groups.setdefault(_slice_of(device), []).append(device)
    rest, outer, real = tuple(sizes[1:]), sizes[0], len(groups)
    if real == 1:
        return _along_wires(list(devices), tuple(sizes))
    ordered = [groups[key] for key in sorted(groups)]
    if len({len(group) for group in ordered}) > 1 or (outer % real and real % outer) or outer == 1:
        log.warning("the devices are in %d slices and axis slice has size %d: other axes cross the slower network", real, outer)
        return np.asarray([device for group in ordered for device in group]).reshape(sizes)
    if outer % real == 0:
        return np.concatenate([_along_wires(group, (outer // real, *rest)) for group in ordered])
    return np.asarray([device for group in ordered for device in group]).reshape(sizes)


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0


def _along_wires(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    if devices[0].platform == "tpu" and len(devices) > 1:
        try:
            return mesh_utils.create_device_mesh(sizes, devices, contiguous_submeshes=False, allow_split_physical_axes=True)
        except (AssertionError, RuntimeError, ValueError) as error:  # a part of a slice, or a shape its torus does not have
            log.warning("chips stand in the mesh in their own order, not along their wires: %s", str(error).partition("\n")[0][:200])
    return np.asarray(devices).reshape(sizes)
