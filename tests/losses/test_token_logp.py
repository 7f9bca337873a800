"""Log-probability and entropy in blocks against the dense form in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.losses.token_logp import token_logp

N, D, V = 24, 6, 53


def arrays(dtype=jnp.float32, tokens=N, vocab=V, width=D):
    rng = np.random.default_rng(0)
    hidden, unembed = (jnp.asarray(rng.normal(size=(n, width)), dtype) for n in (tokens, vocab))
    return hidden, unembed, jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)


COTANGENTS = np.random.default_rng(1).normal(size=(2, N)).astype(np.float32)


@functools.cache
def ours(block, temperature=1.0):
    def total(hidden, unembed, written):
        both = token_logp(hidden, unembed, written, block, temperature)
        return sum(jnp.sum(c * x) for c, x in zip(COTANGENTS, both, strict=True)), both

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def dense(hidden, unembed, written, temperature):
    logp = jax.nn.log_softmax(hidden @ unembed.T / temperature)
    both = jnp.take_along_axis(logp, written[:, None], axis=1)[:, 0], -jnp.sum(jnp.exp(logp) * logp, axis=1)
    return sum(jnp.sum(c * x) for c, x in zip(COTANGENTS, both, strict=True)), both


@functools.cache
def reference(temperature, dtype=jnp.float32):
    with jax.enable_x64(True):
        hidden, unembed, written = arrays(dtype)
        wide = [jnp.asarray(np.asarray(x, np.float32), jnp.float64) for x in (hidden, unembed)]
        run = jax.jit(jax.value_and_grad(functools.partial(dense, temperature=temperature), (0, 1), has_aux=True))
        return jax.tree.map(np.asarray, run(*wide, written))


def close(got, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("block", "temperature"), [(16, 1.0), (V, 0.7), (4096, 1.0)])
def test_equals_the_dense_form_in_value_and_gradient(block, temperature):
    close(ours(block, temperature)(*arrays()), reference(temperature))


def test_bfloat16_is_summed_in_float32():
    (_, both), grads = ours(16)(*arrays(jnp.bfloat16))
    (_, expected), expected_grads = reference(1.0, jnp.bfloat16)
    close(both, expected, 1e-4)
    assert both[0].dtype == both[1].dtype == jnp.float32 and [g.dtype for g in grads] == [jnp.bfloat16] * 2
    close(grads, expected_grads, 2**-7)


def test_by_hand():
    # logits (0, ln 2, ln 5) -> p (1, 2, 5) / 8; logits all 0 -> p 1/3 each
    hidden, unembed = jnp.eye(2), jnp.asarray([[0.0, 0.0], [np.log(2.0), 0.0], [np.log(5.0), 0.0]])
    logp, entropy = token_logp(hidden, unembed, jnp.asarray([2, 0]), 2)
    np.testing.assert_allclose(logp, [np.log(5 / 8), -np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [-(np.log(1 / 8) + 2 * np.log(2 / 8) + 5 * np.log(5 / 8)) / 8, np.log(3)], rtol=1e-6)


def test_a_sure_policy_has_no_entropy_and_large_logits_no_nan():
    hidden, unembed = jnp.ones((1, 1)), jnp.asarray([[1e4], [-1e4], [0.0]])
    for written, expected in ((0, 0.0), (1, -2e4)):
        (logp, entropy), back = jax.vjp(lambda h, w, i=written: token_logp(h, w, jnp.asarray([i]), 2), hidden, unembed)
        assert logp[0] == expected and entropy[0] == 0
        assert all(np.isfinite(x).all() for x in back((jnp.ones(1), jnp.ones(1))))


def test_no_array_of_all_tokens_over_all_ids(largest):
    hidden, unembed, written = arrays(tokens=512, vocab=2100, width=8)

    def run(f):
        return jax.make_jaxpr(jax.grad(lambda h, w: sum(map(jnp.sum, f(h, w))), (0, 1)))(hidden, unembed).jaxpr

    assert largest(run(lambda h, w: token_logp(h, w, written, 64))) < 512 * 2100 // 8
    assert largest(run(lambda h, w: (jax.nn.log_softmax(h @ w.T),))) >= 512 * 2100  # the measure sees what it is meant to see


def test_what_does_not_fit_is_refused():
    hidden, unembed, written = arrays()
    for wrong, message in (((hidden[:, 1:], unembed, written, 8), "one width D"), ((hidden, unembed, written[1:], 8), "one per hidden"),
                           ((hidden, unembed, written, 8, 0.0), "above 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            token_logp(*wrong)
