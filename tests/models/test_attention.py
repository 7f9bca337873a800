import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.models import attention

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, H, K, F = 2, 11, 4, 2, 6
RUNS = np.array([[0] * 5 + [1] + [2] * 5, [0] * 9 + [1] * 2], np.int32)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal((B, T, heads, F)), jnp.float32) for heads in (H, K, K)] + [
        jnp.asarray(rng.standard_normal((B, T, H * F)), jnp.float32)
    ]


def naive(q, k, v):
    """float64, one query at a time; query head h reads key head h // (H / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((B, T, H, F))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if RUNS[b, s] == RUNS[b, t]]
        scores = np.array([q[b, t, h] @ k[b, s, h // (H // K)] for s in seen]) / np.sqrt(F)
        p = np.exp(scores - scores.max())
        out[b, t, h] = (p / p.sum()) @ v[b, seen, h // (H // K)]
    return out.reshape(B, T, H * F)


def plain(q, k, v):
    """The same in jax, so that autodiff gives the gradient."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    mask = np.tril(np.ones((T, T), bool))[None] & (RUNS[:, :, None] == RUNS[:, None])
    scores = jnp.where(mask[:, None], jnp.einsum("bthf,bshf->bhts", q, k) / np.sqrt(F), -jnp.inf)
    return jnp.einsum("bhts,bshf->bthf", jax.nn.softmax(scores), v).reshape(B, T, H * F)


@pytest.mark.parametrize("chunk", [0, 4, 16])
def test_values_and_gradients(inputs, chunk):
    *qkv, g = inputs

    def ours(q, k, v):
        return attention.causal_attention(q, k, v, jnp.asarray(RUNS), chunk)

    np.testing.assert_allclose(jit(ours)(*qkv), naive(*qkv), atol=2e-6)
    got, expected = (jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * g), argnums=(0, 1, 2)))(*qkv) for f in (ours, plain))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunks_bound_the_scores(inputs):
    *qkv, g = inputs
    text = {
        chunk: jax.jit(jax.grad(lambda q, chunk=chunk: jnp.sum(attention.causal_attention(q, *qkv[1:], jnp.asarray(RUNS), chunk) * g)))
        .lower(qkv[0])
        .as_text()
        for chunk in (0, 4)
    }
    whole = f"tensor<{B}x{K}x{H // K * T}x{T}xf32>"
    assert whole in text[0] and whole not in text[4]


def test_gradients_of_keys_are_summed_over_chunks_in_float32():
    """bfloat16 inputs, 64 chunks of queries: values' gradients are about as close to float32's as with one chunk."""
    rng = np.random.default_rng(3)
    q, k, v, g = (jnp.asarray(rng.standard_normal((1, 512, heads, F)), jnp.bfloat16) for heads in (H, K, K, H))
    runs = jnp.zeros((1, 512), jnp.int32)

    def gradient(dtype, chunk):
        def total(v):
            out = attention.causal_attention(q.astype(dtype), k.astype(dtype), v, runs, chunk).astype(jnp.float32)
            return jnp.sum(out * g.reshape(out.shape).astype(jnp.float32))

        return np.asarray(jit(jax.grad(total))(v.astype(dtype)), np.float32)

    exact = gradient(jnp.float32, 0)
    one, many = (np.linalg.norm(gradient(jnp.bfloat16, chunk) - exact) for chunk in (0, 8))
    assert 0 < many < 1.25 * one
