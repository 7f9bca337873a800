import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params
from a1jax.models import gated_delta

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, HK, H, DK, DV = 2, 21, 1, 2, 4, 3
RUNS = np.array([[0] * 6 + [1] + [2] * 9 + [3] * 5, [0] * 8 + [1] * 8 + [2] * 3 + [3] * 2], np.int32)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, T, HK, DK)) for _ in range(2))
    q, k = q / np.linalg.norm(q, axis=-1, keepdims=True), k / np.linalg.norm(k, axis=-1, keepdims=True)
    g = -np.exp(rng.uniform(-6, 2, (B, T, H)))  # decays from nearly 1 to nearly 0
    return [q, k, rng.standard_normal((B, T, H, DV)), g, rng.uniform(0, 1, (B, T, H))]


def naive(q, k, v, g, beta):
    """The recurrence itself, float64, token by token; the state is zero where a run begins."""
    out = np.zeros((B, T, H, DV))
    for b, h in np.ndindex(B, H):
        state = np.zeros((DK, DV))
        for t in range(T):
            if t and RUNS[b, t] != RUNS[b, t - 1]:
                state = np.zeros((DK, DV))
            key = k[b, t, h // (H // HK)]
            state = np.exp(g[b, t, h]) * state
            state = state + beta[b, t, h] * np.outer(key, v[b, t, h] - key @ state)
            out[b, t, h] = q[b, t, h // (H // HK)] @ state
    return out


@functools.partial(jit, static_argnums=0)
def value_and_gradients(chunk, cotangent, *arguments):
    out, pull = jax.vjp(lambda *a: gated_delta.delta_rule(*a, jnp.asarray(RUNS), chunk)[0], *arguments)
    return pull(cotangent), out


@pytest.mark.parametrize("chunk", [4, 16, 32])
def test_chunks_equal_the_recurrence_in_value_and_gradient(chunk):
    arguments, rng = inputs(), np.random.default_rng(5)
    cotangent = rng.standard_normal((B, T, H, DV))
    gradients, out = value_and_gradients(chunk, *(jnp.asarray(x, jnp.float32) for x in (cotangent, *arguments)))
    np.testing.assert_allclose(out, naive(*arguments), atol=1e-5)
    for i in range(5):  # the derivative of the float64 recurrence along a random direction of each argument
        direction, step = rng.standard_normal(arguments[i].shape), 1e-6
        shifted = [naive(*arguments[:i], arguments[i] + sign * step * direction, *arguments[i + 1 :]) for sign in (1, -1)]
        expected = np.sum(cotangent * (shifted[0] - shifted[1])) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(gradients[i], np.float64) * direction), expected, rtol=1e-4, atol=1e-4)


def test_inverse_is_stable_where_squaring_is_not():
    c = 64
    a = np.tril(np.ones((c, c)), -1)  # equal keys, beta 1, no decay: powers of it reach 1e17
    inverse = np.eye(c) - np.eye(c, k=-1)
    np.testing.assert_allclose(jit(gated_delta.unit_lower_inverse)(jnp.asarray(a[None], jnp.float32))[0], inverse, atol=1e-6)
    rng = np.random.default_rng(0)
    a = np.tril(rng.uniform(-0.3, 0.3, (2, 16, 16)), -1)
    g = rng.standard_normal(a.shape)
    expected = np.linalg.inv(np.eye(16) + a)
    value, gradient = jit(lambda a, g: (lambda out, pull: (out, pull(g)[0]))(*jax.vjp(gated_delta.unit_lower_inverse, a)))(
        jnp.asarray(a, jnp.float32), jnp.asarray(g, jnp.float32)
    )
    np.testing.assert_allclose(value, expected, atol=1e-5)
    turned = np.swapaxes(expected, 1, 2)
    np.testing.assert_allclose(gradient, -turned @ g @ turned, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def layer(cfg):
    return jit(lambda key: params.init(gated_delta.specs(cfg), key))(jax.random.key(2))


def test_a_packed_row_equals_its_segments_alone_at_every_border(cfg, layer):
    """Row i: a segment of i tokens, one of one token, one of two (shorter than the convolution), the rest; borders at every offset of
    three chunks of 8. In value, and in the gradient of every segment's output by the input."""
    length = 24
    x = jax.random.normal(jax.random.key(3), (length, length, cfg.d_model))
    cuts = [[0, i, i + 1, i + 3, length] for i in range(1, length - 3)]
    runs = np.stack([np.searchsorted(c, np.arange(length), side="right") for c in cuts]).astype(np.int32)
    x = x[: len(cuts)]

    def outputs(x, runs, weight):
        y = gated_delta.apply(layer, x, runs, cfg)
        return jnp.sum(jnp.sin(y) * weight), y

    run = jit(jax.value_and_grad(outputs, has_aux=True))
    one = jnp.ones((len(cuts), length, 1))
    (_, packed), gradient = run(x, jnp.asarray(runs), one)
    for part in range(4):
        alone = np.zeros_like(x)
        for row, c in enumerate(cuts):
            alone[row, : c[part + 1] - c[part]] = x[row, c[part] : c[part + 1]]
        lengths = np.array([c[part + 1] - c[part] for c in cuts])
        inside = np.arange(length)[None] < lengths[:, None]
        padding = jnp.asarray(~inside, jnp.int32)
        (_, values), gradients = run(jnp.asarray(alone), padding, jnp.asarray(inside[..., None], jnp.float32))
        for row, c in enumerate(cuts):
            np.testing.assert_allclose(packed[row, c[part] : c[part + 1]], values[row, : lengths[row]], atol=1e-5)
            np.testing.assert_allclose(gradient[row, c[part] : c[part + 1]], gradients[row, : lengths[row]], atol=1e-5)


def test_initial_decay(cfg, layer):
    np.testing.assert_allclose(np.exp(layer["A_log"]), [0.002, 0.2], rtol=1e-5)
    np.testing.assert_array_equal(layer["dt_bias"], 0)
    assert -0.5 <= layer["conv1d"].min() < -0.4
