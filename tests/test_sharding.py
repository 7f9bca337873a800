import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from a1jax import mesh_shapes, params, sharding, types
from a1jax.config import ConfigError
from a1jax.models import transformer
from a1jax.models.config import tiny


def test_a_mesh_has_all_axes():
    mesh = sharding.make_mesh({"expert": 4, "data": 2})
    assert mesh.axis_names == ("slice", "data", "fsdp", "expert", "context", "tensor") and mesh.devices.shape == (1, 2, 1, 4, 1, 1)
    assert sharding.make_mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "needs 3 devices, here are 8"),
        ({"rows": 8}, "mesh axis 'rows' is unknown: use slice, data, fsdp, expert, context, tensor"),
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
        one = sharding.constrain(x[:1], "batch", "hidden")  # a dimension of size 1 is not cut ...
        with pytest.raises(ConfigError, match="axis 'batch' of size 6 cannot be cut over data x expert = 8"):
            sharding.constrain(x[:6], "batch", "hidden")  # ... any other is, or refused
    assert y.addressable_shards[0].data.shape == one.addressable_shards[0].data.shape == (1, 4)
    assert sharding.mesh_axes("batch") == () and not sharding.is_sharded()


def test_every_product_of_axes_is_legal_for_a_model_whose_sizes_divide():
    """Specs of all parameters and of all activations, on all 56 meshes of 8 devices."""
    cfg = tiny(num_heads=8, num_kv_heads=2, linear_num_value_heads=8, moe="ragged", tie_embeddings=False)
    specs = transformer.specs(cfg)
    activations = [("batch", "length", "hidden"), ("batch", "length", "heads"), ("batch", "length", "linear_heads"), ("tokens", "hidden"),
                   ("width_rows", "width_length", "embed"), ("width_rows", "length", "width")]  # fmt: skip
    meshes = [sharding.make_mesh(shape) for shape in mesh_shapes.products(8, sharding.MESH_AXES)]
    assert len(meshes) == 56
    for mesh in meshes:
        placed = params.shardings(specs, mesh)
        assert not any("slice" in str(place.spec) for place in jax.tree.leaves(placed))  # nothing of a parameter crosses between pods
        owners = math.prod(mesh.shape[name] for name in ("expert", "fsdp", "context", "tensor"))
        down = placed["blocks"]["0"]["mlp"]["experts"]["down_proj"].shard_shape((1, 8, 64, 64))
        assert down == (1, 8 // owners, 64, 64)  # whole experts, copied over slice and data only
        for axes in activations:
            sharding.partition_spec(axes, mesh, (64,) * len(axes))


def test_experts_that_do_not_divide_are_refused_by_name():
    cut = "axis 'experts' of size 6 cannot be cut over expert x context = 8"
    message = f"^parameter blocks/0/mlp/experts/down_proj: {cut}: change the mesh or the size$"
    with pytest.raises(ConfigError, match=message):
        params.shardings(transformer.specs(tiny(num_experts=6)), sharding.make_mesh({"expert": 4, "context": 2}))


def test_flat_tokens_stay_where_they_are():
    x = jnp.arange(8 * 12 * 3).reshape(8, 12, 3)
    np.testing.assert_array_equal(sharding.flatten_tokens(x), x.reshape(96, 3))
    np.testing.assert_array_equal(sharding.unflatten_tokens(x.reshape(96, 3), 8, 12), x)
    mesh = sharding.make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("fsdp", "context")))
    with jax.set_mesh(mesh):
        flat = jax.jit(sharding.flatten_tokens)(placed)
        np.testing.assert_array_equal(jax.jit(lambda x: sharding.unflatten_tokens(x, 8, 12))(flat), x)
        with pytest.raises(ConfigError, match="axis 'length' of size 7 cannot be cut over context = 2"):
            sharding.flatten_tokens(x[:, :7])
    for before, after in zip(placed.addressable_shards, flat.addressable_shards, strict=True):
        assert before.device == after.device
        np.testing.assert_array_equal(after.data, before.data.reshape(-1, 3))


def test_a_batch_is_cut_by_rows_and_length():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "context": 2})
    fields = [field.name for field in dataclasses.fields(types.Batch)]
    batch = types.Batch(**{name: np.full((16, 6), i, np.int32) for i, name in enumerate(fields)})
    placed = sharding.put_batch(batch, mesh)
    for i, name in enumerate(fields):
        array = getattr(placed, name)
        assert array.addressable_shards[0].data.shape == (4, 3)
        np.testing.assert_array_equal(array, i)
    with pytest.raises(ConfigError, match="axis 'batch' of size 6 cannot be cut over data x fsdp = 4"):
        sharding.put_batch(jax.tree.map(lambda x: x[:6], batch), mesh)
    with pytest.raises(ConfigError, match="axis 'length' of size 5 cannot be cut over context = 2"):
        sharding.put_batch(jax.tree.map(lambda x: x[:, :5], batch), mesh)


def test_a_process_builds_the_rows_of_its_devices():
    """One process has all devices, and all rows; which of them two processes have is seen in tests/stages/test_processes.py."""
    mesh = sharding.make_mesh({"slice": 2, "fsdp": 2, "context": 2})
    assert sharding.rows_here(mesh, 8) == list(range(8)) and sharding.rows_here(sharding.make_mesh({"context": 8}), 3) == [0, 1, 2]
    with pytest.raises(ConfigError, match="axis 'batch' of size 6 cannot be cut over slice x fsdp = 4"):
        sharding.rows_here(mesh, 6)
    x = np.arange(8 * 4 * 3).reshape(8, 4, 3)
    whole, some = sharding._from_host(x, sharding.put_tokens(x, mesh).sharding), sharding.put_tokens(x, mesh)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(some, x)
    assert some.addressable_shards[0].data.shape == (2, 2, 3)
    part = sharding._from_host(x, some.sharding, rows=list(range(8)), total=8)
    np.testing.assert_array_equal(part, x)
