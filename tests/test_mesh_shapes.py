import dataclasses
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from a1jax import mesh_shapes
from a1jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What ``arrange`` looks at. Every second place of a torus is empty, for which jax knows no order: chips stay in their own."""

    id: int
    slice_index: int | None = None
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (2 * self.id, 0, 0)


def test_all_products():
    found = list(mesh_shapes.products(8, mesh_shapes.MESH_AXES))
    assert len(found) == len({tuple(shape.values()) for shape in found}) == math.comb(8, 5)  # 3 twos on 6 axes
    assert all(mesh_shapes.size(shape) == 8 and tuple(shape) == mesh_shapes.MESH_AXES for shape in found)
    assert list(mesh_shapes.products(6, ("data", "fsdp"))) == [{"data": a, "fsdp": 6 // a} for a in (1, 2, 3, 6)]


@pytest.mark.parametrize(
    ("shape", "devices", "nearest"),
    [
        ({"data": 3, "fsdp": 2}, 8, {"data": 4, "fsdp": 2}),
        ({"data": 64}, 8, {"data": 8}),
        ({"data": 2, "context": 2}, 16, {"data": 8, "context": 2}),  # of equals the fewest changes, then the outer axis
        ({"fsdp": 5, "tensor": 3}, 12, {"fsdp": 4, "tensor": 3}),
        ({"slice": 2, "fsdp": 5}, 8, {"slice": 2, "fsdp": 4}),
        ({"context": 7}, 7, {"context": 7}),
        ({}, 4, {"data": 4}),  # no axis named: any but slice, the outermost first
    ],
)
def test_the_nearest_shape(shape, devices, nearest):
    assert mesh_shapes.nearest(shape, devices) == nearest


def test_other_axes_only_where_the_named_ones_do_not_do():
    small = lambda shape: shape.get("data", 1) <= 2  # noqa: E731
    assert mesh_shapes.nearest({"data": 4, "fsdp": 2}, 8, small) == {"data": 2, "fsdp": 4}
    assert mesh_shapes.nearest({"data": 8}, 8, small) == {"data": 2, "fsdp": 4}
    assert mesh_shapes.nearest({"data": 8}, 8, lambda shape: False) is None
    assert mesh_shapes.nearest({"slice": 4}, 8, lambda shape: shape.get("slice", 1) == 4) == {"slice": 4, "data": 2}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "mesh data 3 needs 3 devices, here are 8; nearest possible: mesh.shape={'data': 8}"),
        ({"rows": 8}, "mesh axis 'rows' is unknown: use slice, data, fsdp, expert, context, tensor"),
        ({"data": 0}, "mesh axis 'data' has size 0: give a size of at least 1"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(shape, message):
    with pytest.raises(ConfigError) as error:
        mesh_shapes.check(shape, 8)
    assert str(error.value) == message
    mesh_shapes.check({"slice": 2, "tensor": 4}, 8)


def slices_of(found: np.ndarray) -> list[set]:
    return [{chip.slice_index for chip in part.ravel()} for part in found]


def test_slices_lie_along_the_outermost_axis(caplog):
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]  # they come mixed
    assert slices_of(mesh_shapes.arrange(chips, (2, 1, 4, 1, 1, 1))) == [{0}, {1}]
    assert slices_of(mesh_shapes.arrange(chips, (4, 1, 2, 1, 1, 1))) == [{0}, {0}, {1}, {1}]
    four = [Chip(i, slice_index=i % 4) for i in range(8)]
    assert slices_of(mesh_shapes.arrange(four, (2, 2, 2, 1, 1, 1))) == [{0, 1}, {2, 3}]
    assert slices_of(mesh_shapes.arrange(four, (2, 2, 2, 1, 1, 1))[0]) == [{0}, {1}]  # whole slices within
    assert "slower network" not in caplog.text
    assert slices_of(mesh_shapes.arrange(chips, (1, 2, 4, 1, 1, 1))) == [{0, 1}] and "other axes cross the slower network" in caplog.text


def test_other_devices_stay_in_their_order():
    for chips in ([Chip(i) for i in range(8)], [Chip(i, slice_index=i % 2, platform="cpu") for i in range(8)]):
        found = mesh_shapes.arrange(chips, (2, 1, 2, 1, 2, 1))
        assert found.shape == (2, 1, 2, 1, 2, 1) and [chip.id for chip in found.ravel()] == list(range(8))


DESCRIBED = """
import numpy as np
from jax.experimental import topologies
from a1jax import sharding
devices = topologies.get_topology_desc("v5p:2x2x2", "tpu", num_slices=2).devices
mesh = sharding.make_mesh({"slice": 2, "fsdp": 4, "context": 2}, list(devices)[::-1])
assert [{d.slice_index for d in part.ravel()} for part in mesh.devices] == [{0}, {1}]
one = topologies.get_topology_desc("v5p:2x2x4", "tpu").devices
mesh = sharding.make_mesh({"fsdp": 8, "context": 2}, one)
steps = np.diff([[d.coords for d in pair] for pair in mesh.devices.reshape(8, 2)], axis=1)
assert (np.abs(steps).sum(-1) == 1).all(), "shards of a row are not neighbours"
print("placed")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
def test_described_chips_are_laid_along_their_wires(flags_for_tpu):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_for_tpu}
    env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", DESCRIBED], env=env, capture_output=True, text=True, timeout=240)
    assert "placed" in done.stdout, done.stderr[-2000:]
