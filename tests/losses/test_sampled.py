"""The estimate from sampled tokens: its expectation, enumerated, is the divergence over the whole vocabulary, and so is its gradient."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.losses.divergence import Divergence
from a1jax.losses.sampled import sampled

V, D = 23, 6
NAMES = get_args(Divergence)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, D)), rng.normal(size=(V, D)) * 0.7, rng.normal(size=(2, V))


def expected(hidden, unembed, teacher, name):
    """Sum over two tokens, weights 1 and 0.5, of the divergence, from its definition."""
    p, q = jax.nn.softmax(hidden @ unembed.T), jax.nn.softmax(teacher)
    mean = (p + q) / 2
    each = {
        "reverse": p * jnp.log(p / q),
        "forward": q * jnp.log(q / p),
        "jensen_shannon": p * jnp.log(p / mean) / 2 + q * jnp.log(q / mean) / 2,
    }[name]
    return jnp.sum(jnp.sum(each, axis=1) * jnp.array([1.0, 0.5]))


@pytest.fixture(scope="module")
def enumerated():
    """name -> (value, gradients, metrics): every id as the written one, weighted by its probability."""
    hidden, unembed, teacher = (jnp.asarray(x, jnp.float32) for x in arrays())

    @jax.jit
    def run(hidden, unembed):
        p = jax.nn.softmax(hidden @ unembed.T)
        weights = jax.lax.stop_gradient(p * jnp.array([[1.0], [0.5]])).reshape(-1)
        score = jax.nn.log_softmax(teacher).reshape(-1)
        written = jnp.tile(jnp.arange(V, dtype=jnp.int32), 2)

        def loss(hidden, unembed, name):
            return sampled(jnp.repeat(hidden, V, axis=0), unembed, written, score, weights, divergence=name, block=8)

        return {name: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed, name) for name in NAMES}

    return run(hidden, unembed)


@pytest.mark.parametrize("name", NAMES)
def test_the_expectation_is_the_divergence_and_its_gradient(enumerated, name):
    (value, metrics), grads = enumerated[name]
    with jax.enable_x64(True):
        hidden, unembed, teacher = (jnp.asarray(np.asarray(x, np.float32), jnp.float64) for x in arrays())
        wanted, wanted_grads = jax.jit(jax.value_and_grad(lambda h, w: expected(h, w, teacher, name), (0, 1)))(hidden, unembed)
        wanted, wanted_grads = jax.tree.map(np.asarray, (wanted, wanted_grads))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert metrics["distill/tokens"] == 2 * V and metrics["distill/clipped"] == 0


@jax.jit
def three(p, score, weights):
    """Every divergence on tokens whose written id 0 has probability p, of two ids; the gradient is the one to the logit of id 0."""

    def loss(logit, name):
        hidden = jnp.stack([logit, jnp.zeros_like(logit)], axis=1)  # with the identity as output matrix: the logits
        return sampled(hidden, jnp.eye(2), jnp.zeros(p.size, jnp.int32), score, weights, divergence=name)

    return {name: jax.value_and_grad(loss, has_aux=True)(jnp.log(p) - jnp.log1p(-p), name) for name in NAMES}


def test_values_by_hand():
    # p = 1/2, q = 1/4: r = 1/2, and grad log p is 1 - p = 1/2.
    found = three(jnp.array([0.5]), jnp.log(jnp.array([0.25])), jnp.array([2.0]))
    js = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)
    by_hand = {
        "reverse": (np.log(2), np.log(2) * 0.5),
        "forward": (0.5 * np.log(0.5), -0.5 * 0.5),
        "jensen_shannon": (js, 0.5 * np.log(4 / 3) * 0.5),
    }
    for name, (value, slope) in by_hand.items():
        (loss, metrics), grad = found[name]
        np.testing.assert_allclose((loss, metrics["distill/kl"], grad[0]), (2 * value, value, 2 * slope), rtol=1e-5, err_msg=name)


def test_a_token_the_teacher_rules_out():
    score = jnp.array([-jnp.inf, -jnp.inf, np.log(0.5), -1e4])
    found = three(jnp.full(4, 0.5), score, jnp.array([1.0, 0.0, 1.0, 1.0]))
    for name, value in {"reverse": 20, "forward": 0, "jensen_shannon": np.log(2) / 2}.items():
        (loss, metrics), grad = found[name]
        np.testing.assert_allclose(loss, 2 * value, rtol=1e-5, atol=1e-6)  # token 2 agrees, 1 has no weight
        assert np.isfinite(grad).all() and grad[1] == 0
        np.testing.assert_allclose(metrics["distill/clipped"], 2 / 3, rtol=1e-6)
    (_, metrics), _ = three(jnp.full(4, 0.5), score.at[2].set(jnp.nan), jnp.ones(4))["reverse"]
    assert np.isnan(metrics["distill/kl"])  # and no NaN is hidden


def test_wrong_arguments_are_refused():
    good = (jnp.zeros((3, D)), jnp.zeros((V, D)), jnp.zeros(3, jnp.int32), jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match="must be"):
        sampled(*good[:2], good[2][1:], *good[3:])
    with pytest.raises(ValueError, match="must be"):
        sampled(*good[:4], jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="clip is 0"):
        sampled(*good, clip=0.0)
