import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.models import delta_rule

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


@functools.partial(jit, static_argnums=(0, 1))
def value_and_gradients(chunk, span, cotangent, *arguments):
    assert delta_rule.SPAN == span
    out, pull = jax.vjp(lambda *a: delta_rule.delta_rule(*a, jnp.asarray(RUNS), chunk)[0], *arguments)
    return pull(cotangent), out


@pytest.mark.parametrize(("chunk", "span"), [(4, 512), (16, 512), (32, 512), (4, 8), (2, 10)])
def test_chunks_and_spans_equal_the_recurrence_in_value_and_gradient(chunk, span, monkeypatch):
    monkeypatch.setattr(delta_rule, "SPAN", span)
    arguments, rng = inputs(), np.random.default_rng(5)
    cotangent = rng.standard_normal((B, T, H, DV))
    gradients, out = value_and_gradients(chunk, span, *(jnp.asarray(x, jnp.float32) for x in (cotangent, *arguments)))
    np.testing.assert_allclose(out, naive(*arguments), atol=1e-5)
    for i in range(5):  # the derivative of the float64 recurrence along a random direction of each argument
        direction, step = rng.standard_normal(arguments[i].shape), 1e-6
        shifted = [naive(*arguments[:i], arguments[i] + sign * step * direction, *arguments[i + 1 :]) for sign in (1, -1)]
        expected = np.sum(cotangent * (shifted[0] - shifted[1])) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(gradients[i], np.float64) * direction), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cut", "span"), [(1, 512), (7, 8), (13, 8)])
def test_two_parts_equal_the_whole_when_the_state_is_handed_over(cut, span, monkeypatch):
    """Cut inside a run and where the run goes on in one row and ends in the other; the state left behind is the whole row's."""
    monkeypatch.setattr(delta_rule, "SPAN", span)
    arguments, runs = [jnp.asarray(x, jnp.float32) for x in inputs(1)], jnp.asarray(RUNS)

    @jit
    def both(*arguments):
        whole, end = delta_rule.delta_rule(*arguments, runs, 4)
        out, state = delta_rule.delta_rule(*(x[:, :cut] for x in arguments), runs[:, :cut], 4)
        rest, last = delta_rule.delta_rule(*(x[:, cut:] for x in arguments), runs[:, cut:], 4, state, runs[:, cut - 1])
        return (whole, end), (jnp.concatenate([out, rest], axis=1), last)

    whole, parts = both(*arguments)
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_every_product_is_asked_for_in_full_float32():
    """Also those of the gradient, and also where the default is bfloat16 passes. In the program, as no such device is here."""
    arguments = [jnp.asarray(x, jnp.float32) for x in inputs()]
    text = jax.jit(jax.grad(lambda *a: jnp.sum(delta_rule.delta_rule(*a, jnp.asarray(RUNS), 4)[0]), argnums=(0, 1, 2, 3, 4))).lower(
        *arguments
    )
    products = [line for line in text.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20 and not [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line]


def test_inverse_is_stable_where_squaring_is_not():
    c = 64
    a = np.tril(np.ones((c, c)), -1)  # equal keys, beta 1, no decay: powers of it reach 1e17
    inverse = np.eye(c) - np.eye(c, k=-1)
    np.testing.assert_allclose(jit(delta_rule.unit_lower_inverse)(jnp.asarray(a[None], jnp.float32))[0], inverse, atol=1e-6)
    rng = np.random.default_rng(0)
    a = np.tril(rng.uniform(-0.3, 0.3, (2, 16, 16)), -1)
    g = rng.standard_normal(a.shape)
    expected = np.linalg.inv(np.eye(16) + a)
    value, gradient = jit(lambda a, g: (lambda out, pull: (out, pull(g)[0]))(*jax.vjp(delta_rule.unit_lower_inverse, a)))(
        jnp.asarray(a, jnp.float32), jnp.asarray(g, jnp.float32)
    )
    np.testing.assert_allclose(value, expected, atol=1e-5)
    turned = np.swapaxes(expected, 1, 2)
    np.testing.assert_allclose(gradient, -turned @ g @ turned, rtol=1e-3, atol=1e-4)
