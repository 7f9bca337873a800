import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from a1jax import sharding, types
from a1jax.config import ConfigError


def test_a_mesh_has_all_axes():
    mesh = sharding.make_mesh({"expert": 4, "data": 2})
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor") and mesh.devices.shape == (2, 1, 4, 1, 1)
    assert sharding.make_mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "needs 3 devices, here are 8"),
        ({"rows": 8}, "mesh axis 'rows' is unknown: use data, fsdp, expert, context, tensor"),
        ({"data": 0}, "mesh axis 'data' has size 0"),
    ],
)
def test_impossible_meshes_are_refused_in_one_line(shape, message):
    with pytest.raises(ConfigError, match=message) as error:
        sharding.make_mesh(shape)
    assert "\n" not in str(error.value)


def test_specs_come_from_the_table():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert sharding.partition_spec(("batch", "length", None), mesh) == P(("data", "fsdp"), None, None)
    assert sharding.partition_spec(("experts", "expert_in"), mesh) == P(("fsdp", "tensor"), None)
    with pytest.raises(ConfigError, match="logical axis 'rows' is not in"):
        sharding.partition_spec(("rows",), mesh)
    with pytest.raises(ConfigError, match="axis 'batch' of size 6 cannot be cut over data x fsdp = 4"):
        sharding.partition_spec(("batch",), mesh, (6,))


def test_two_logical_axes_of_one_array_must_not_land_on_one_mesh_axis():
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ConfigError, match="'batch' and 'embed' of one array land on the same mesh axis 'fsdp'"):
        sharding.partition_spec(("batch", "embed"), mesh)
    # An axis of size 1 cuts nothing: no conflict.
    assert sharding.partition_spec(("batch", "embed"), sharding.make_mesh({"data": 8})) == P("data", None)


def test_constrain_is_nothing_without_a_mesh_and_cuts_with_one():
    x = jnp.zeros((8, 4))
    assert sharding.constrain(x, "batch", "hidden") is x
    mesh = sharding.make_mesh({"data": 2, "expert": 4})
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "hidden"))(x)
        assert sharding.mesh_axes("batch") == ("data", "expert") and sharding.is_sharded()
    assert y.addressable_shards[0].data.shape == (1, 4)
    assert sharding.mesh_axes("batch") == () and not sharding.is_sharded()


def test_a_batch_is_cut_by_rows():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    fields = [field.name for field in dataclasses.fields(types.Batch)]
    batch = types.Batch(**{name: np.full((16, 3), i, np.int32) for i, name in enumerate(fields)})
    placed = sharding.put_batch(batch, mesh)
    for i, name in enumerate(fields):
        array = getattr(placed, name)
        assert array.addressable_shards[0].data.shape == (2, 3)
        np.testing.assert_array_equal(array, i)
    with pytest.raises(ConfigError, match="size 6 cannot be cut over data x fsdp = 8"):
        sharding.put_batch(jax.tree.map(lambda x: x[:6], batch), mesh)
