"""Grouped matmuls: the gradients' formulas through jax.lax.ragged_dot, and that the kernels lower for a GPU that is not here."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.config import ConfigError
from a1jax.models import experts, experts_gpu
from a1jax.models.moe import route

SIZES = np.array([40, 0, 25, 7], np.int32)  # an empty group, and 8 rows behind the last one
P, D, F = 80, 12, 20


def test_gradients_are_those_of_a_matmul_per_group():
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((P, D), (4, D, F), (P, F)))
    used = int(SIZES.sum())
    owner = np.repeat(np.arange(4), SIZES)

    def ours(x, w):
        return jnp.sum((experts_gpu.grouped_dot(x, w, jnp.asarray(SIZES), False) * g)[:used])

    def plain(x, w):
        return jnp.sum(jnp.einsum("pd,pdf->pf", x[:used], w[owner]) * g[:used])

    for a, b in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_layer_is_the_dense_one():
    rng = np.random.default_rng(1)
    x, up, down = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((30, D), (4, D, 2 * F), (4, F, D)))
    weights = route(jnp.asarray(rng.standard_normal((30, 4)), jnp.float32), 2)

    def dot(*args):
        return experts_gpu.grouped_dot(*args, False)

    def loss(form):
        return jax.value_and_grad(lambda x, up, down: jnp.sum(form(x, weights, up, down) ** 2), (0, 1, 2))(x, up, down)

    got = loss(lambda *a: experts.experts_ragged(*a, 2, dot))
    expected = loss(experts.experts_dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, expected)


def test_kernels_lower_for_a_gpu(monkeypatch):
    """Value and both gradients: three kernels, and no matmul of every row with every group."""
    monkeypatch.setattr(jax, "devices", lambda *a: [types.SimpleNamespace(core_count=132)])
    sizes = jnp.full(4, 64, jnp.int32)

    def loss(x, w):
        return jnp.sum(experts_gpu.grouped_dot(x, w, sizes).astype(jnp.float32) ** 2)

    arrays = jnp.zeros((256, 128), jnp.bfloat16), jnp.zeros((4, 128, 256), jnp.bfloat16)
    text = jax.jit(jax.grad(loss, (0, 1))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 3 and "stablehlo.dot_general" not in text and "chlo.ragged_dot" not in text


def test_widths_that_are_no_tiles_are_refused():
    with pytest.raises(ConfigError, match="expert's matrix is \\(64, 96\\): make d_model and expert_width multiples of 128"):
        experts_gpu.grouped_dot(jnp.zeros((8, 64)), jnp.zeros((2, 64, 96)), jnp.full(2, 4, jnp.int32))
