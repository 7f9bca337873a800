"""Rows shared out over devices: the same numbers in the same places, however many rows there are, and gradients summed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import over_devices


@pytest.fixture()
def mesh():
    return jax.make_mesh((2, 2), ("rows", "ids"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])


def products(rows, matrix):
    """A loop whose length is each device's own: rows are multiplied as often as their largest entry says."""
    x, times = rows
    most = jnp.max(times)
    out = jax.lax.while_loop(lambda s: s[0] < most, lambda s: (s[0] + 1, jnp.where((s[0] < times)[:, None], s[1] @ matrix, s[1])), (0, x))[
        1
    ]
    return {"out": out, "sum": jnp.sum(out, axis=1)}


@pytest.mark.parametrize("size", [1, 8, 11])
@pytest.mark.parametrize("gather", [True, False])
def test_rows_are_those_of_one_device(mesh, size, gather):
    x, matrix = jax.random.normal(jax.random.key(0), (size, 3)), jax.random.normal(jax.random.key(1), (3, 3))
    rows = (x, jnp.arange(size) % 5)
    expected = products(rows, matrix)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda rows, matrix: over_devices.by_rows(products, rows, matrix, gather))
        got = run(rows, over_devices.whole(matrix))
        assert over_devices.count() == 4 and (not gather or got["out"].sharding.is_fully_replicated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_gradients_are_summed_over_the_devices_once(mesh):
    x, matrix = jax.random.normal(jax.random.key(0), (11, 3)), jax.random.normal(jax.random.key(1), (5, 3))

    def loss(x, matrix):
        return jnp.sum(over_devices.by_rows(lambda x, matrix: jnp.tanh(x @ matrix.T), x, matrix) ** 2)

    grad = jax.grad(loss, (0, 1))
    expected = grad(x, matrix)
    with jax.set_mesh(mesh):
        got = jax.jit(grad)(x, matrix)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_without_a_mesh_and_inside_of_one_device_nothing_is_moved(mesh):
    x = jnp.ones((3, 2))
    assert over_devices.count() == 1 and over_devices.whole(x) is x
    assert over_devices.by_rows(lambda x, y: (x, y), x, 7) == (x, 7)
    with jax.set_mesh(mesh):
        seen = []
        jax.jit(lambda x: jax.shard_map(lambda x: seen.append(over_devices.count()) or x, in_specs=jax.P(), out_specs=jax.P())(x))(x)
    assert set(seen) == {1}
