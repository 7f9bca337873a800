import functools

import jax
import jax.numpy as jnp
import numpy as np

from a1jax.models import layers

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_norms_by_hand():
    x = jnp.array([[3.0, 4.0]])  # mean square 12.5
    np.testing.assert_allclose(layers.rms_norm(x, jnp.array([0.0, 1.0]), 0.0), [[3 / 12.5**0.5, 2 * 4 / 12.5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(layers.rms_norm(x, jnp.zeros(2), 12.5), [[3 / 5, 4 / 5]], rtol=1e-6)  # eps under the root
    gated = layers.rms_norm_gated(x, jnp.array([1.0, 2.0]), jnp.array([[0.0, 1.0]]), 0.0)
    np.testing.assert_allclose(gated, [[0.0, 2 * 4 / 12.5**0.5 / (1 + np.exp(-1))]], rtol=1e-6)
    np.testing.assert_allclose(layers.l2_normalise(x, 0.0), [[0.6, 0.8]], rtol=1e-6)
    assert layers.rms_norm(x.astype(jnp.bfloat16), jnp.zeros(2), 0.0).dtype == jnp.bfloat16


def test_silu_by_tanh_is_silu():
    x = jnp.linspace(-30, 30, 400)
    tolerance = 30 * 2.0**-23  # tanh of large numbers is one but for a rounding, and x times that is left
    np.testing.assert_allclose(layers.silu(x), x / (1 + np.exp(-np.asarray(x, np.float64))), atol=tolerance)


def test_linear_has_the_gradient_of_a_matmul():
    x, w, g = normal(3, 5, 4), normal(4, 6), normal(3, 5, 6)
    plain, ours = (jit(jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) * g), argnums=(0, 1)))(x, w) for f in (jnp.matmul, layers.linear))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    half = jax.grad(lambda w: jnp.sum(layers.linear(x.astype(jnp.bfloat16), w)))(w)
    assert half.dtype == jnp.float32


def test_rotation_by_hand():
    cos, sin = layers.rotary_angles(jnp.array([[0, 2]]), 4, 100.0)
    np.testing.assert_allclose(cos[0], [[1, 1], [np.cos(2), np.cos(0.2)]], rtol=1e-6)
    x = jnp.tile(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), (1, 2, 1, 1))
    y = layers.rotate(x, cos, sin)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])  # position 0 does not turn
    c, s, c2, s2 = np.cos(2), np.sin(2), np.cos(0.2), np.sin(0.2)
    turned = [1 * c - 3 * s, 2 * c2 - 4 * s2, 3 * c + 1 * s, 4 * c2 + 2 * s2]
    np.testing.assert_allclose(y[0, 1, 0], [*turned, 5, 6], rtol=1e-6)  # pairs (i, i + half); the rest passes


def test_rotation_shows_only_distances():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8)

    @jit
    def score(i, j):
        at = [layers.rotary_angles(jnp.array([[position]]), 8, 50.0) for position in (i, j)]
        return jnp.sum(layers.rotate(q, *at[0]) * layers.rotate(k, *at[1]))

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def naive_conv(x, taps, runs):
    """Token by token, tap by tap, as the definition says."""
    rows = []
    for b in range(x.shape[0]):
        out = []
        for t in range(x.shape[1]):
            total = jnp.zeros(x.shape[2])
            for back in range(taps.shape[0]):
                if t >= back and runs[b, t] == runs[b, t - back]:
                    total = total + taps[taps.shape[0] - 1 - back] * x[b, t - back]
            out.append(jax.nn.silu(total))
        rows.append(jnp.stack(out))
    return jnp.stack(rows)


def test_convolution_stops_at_borders_in_value_and_gradient():
    runs = np.array([[0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 2, 3, 4, 4, 4, 5]], np.int32)
    x, taps, g = normal(2, 9, 3), normal(4, 3), normal(2, 9, 3)
    ours, expected = (
        jit(jax.value_and_grad(lambda x, taps, f=f: jnp.sum(f(x, taps) * g), argnums=(0, 1)))(x, taps)
        for f in (lambda x, taps: layers.causal_conv(x, taps, jnp.asarray(runs)), lambda x, taps: naive_conv(x, taps, runs))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)


def test_convolution_step_by_step():
    x, taps = normal(2, 6, 3), normal(4, 3)
    window, outs, step = jnp.zeros((2, 3, 3)), [], jit(layers.conv_step)
    for t in range(6):
        out, window = step(window, x[:, t], taps)
        outs.append(out)
    np.testing.assert_allclose(jnp.stack(outs, 1), jit(layers.causal_conv)(x, taps, jnp.zeros((2, 6), jnp.int32)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(window, x[:, 3:])
