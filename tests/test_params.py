import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params, sharding
from a1jax.config import ConfigError
from a1jax.params import ParamSpec, constant, log_spread, log_uniform, normal, uniform

SPECS = {"a": {"w": ParamSpec((4, 6), ("embed", "heads"), normal(0.5)), "b": ParamSpec((3,), (None,), constant(2.0), "bfloat16")}}


def test_arrays_abstract_shapes_and_count_agree():
    arrays, abstract = params.init(SPECS, jax.random.key(0)), params.abstract(SPECS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), arrays) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert params.count(SPECS) == 4 * 6 + 3 == sum(x.size for x in jax.tree.leaves(arrays))
    np.testing.assert_array_equal(arrays["a"]["b"], jnp.full((3,), 2.0, jnp.bfloat16))


def test_a_new_parameter_changes_no_other():
    more = {"0": ParamSpec((5,), (None,), normal(1.0)), **SPECS}
    key = jax.random.key(3)
    np.testing.assert_array_equal(params.init(more, key)["a"]["w"], params.init(SPECS, key)["a"]["w"])
    twins = {"x": SPECS["a"]["w"], "y": SPECS["a"]["w"]}
    drawn = params.init(twins, key)
    assert np.abs(drawn["x"] - drawn["y"]).min() > 0


def test_initialisers():
    key, shape = jax.random.key(1), (200, 100)
    assert np.std(normal(0.3)(key, shape, "float32")) == pytest.approx(0.3, rel=0.02)
    flat = uniform(-0.5, 0.5)(key, shape, "float32")
    assert -0.5 <= flat.min() < -0.49 and 0.49 < flat.max() < 0.5
    decay = np.exp(log_uniform(0.01, 16.0)(key, shape, "float32"))
    assert 0.01 <= decay.min() and 15 < decay.max() <= 16.001 and decay.mean() == pytest.approx(8, rel=0.05)
    spread = log_spread(0.002, 0.2)(key, (2, 3), "float32")
    np.testing.assert_allclose(np.exp(spread), [[0.002, 0.02, 0.2]] * 2, rtol=1e-5)


def test_stack_adds_a_leading_axis():
    stacked = params.stack(SPECS, 7)["a"]["w"]
    assert stacked.shape == (7, 4, 6) and stacked.axes == ("layers", "embed", "heads")


def test_one_logical_axis_per_dimension():
    with pytest.raises(ConfigError, match="2 logical axes: give one per dimension"):
        ParamSpec((3,), ("embed", "heads"), constant(0.0))


def test_shardings_follow_the_table_and_name_the_parameter_that_does_not_fit():
    placed = params.shardings(SPECS, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    assert placed["a"]["w"].spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    made = jax.jit(lambda key: params.init(SPECS, key), out_shardings=placed)(jax.random.key(0))
    assert made["a"]["w"].addressable_shards[0].data.shape == (1, 3)
    np.testing.assert_array_equal(made["a"]["w"], params.init(SPECS, jax.random.key(0))["a"]["w"])
    with pytest.raises(ConfigError, match="^parameter a/w: axis 'embed' of size 4 cannot be cut over fsdp = 8"):
        params.shardings(SPECS, sharding.make_mesh({"fsdp": 8}))
