"""The estimate from one written token: its expectation over all tokens is the divergence, and so is its gradient's."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from a1jax.losses.sampled import sampled

V, D = 11, 5
KINDS = ("reverse", "forward", "jensen_shannon")


def case():
    rng = np.random.default_rng(0)
    hidden, unembed, teacher = (rng.normal(size=shape) for shape in ((1, D), (V, D), (V,)))
    return hidden, unembed, teacher - np.log(np.exp(teacher).sum())


def whole(hidden, unembed, log_q, kind):
    log_p = jax.nn.log_softmax((hidden @ unembed.T)[0])
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "reverse":
        return jnp.sum(p * (log_p - log_q))
    if kind == "forward":
        return jnp.sum(q * (log_q - log_p))
    mean = jnp.log((p + q) / 2)
    return 0.5 * jnp.sum(p * (log_p - mean) + q * (log_q - mean))


@pytest.mark.parametrize("kind", KINDS)
def test_the_expectation_is_the_divergence_and_its_gradient(kind):
    hidden, unembed, log_q = case()
    with jax.enable_x64(True):
        expected, gradient = jax.value_and_grad(whole, (0, 1))(*map(jnp.asarray, (hidden, unembed, log_q)), kind)
        expected, gradient = np.asarray(expected), [np.asarray(g) for g in gradient]
    logits = (hidden @ unembed.T)[0]
    p = np.exp(logits) / np.exp(logits).sum()

    def loss(hidden, unembed):
        """Every token is written once, with its probability as its weight."""
        args = (jnp.broadcast_to(hidden, (V, D)), unembed, jnp.arange(V), jnp.asarray(log_q, jnp.float32), jnp.asarray(p, jnp.float32))
        return sampled(*args, divergence=kind, block=4)[0]

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(*(jnp.asarray(x, jnp.float32) for x in (hidden, unembed)))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for got, wanted in zip(grads, gradient, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_by_hand_and_what_is_reported():
    """p = (1/2, 1/4, 1/4); token 0 is written, the teacher gives it 1/4: log r = -log 2."""
    unembed = jnp.log(jnp.asarray([[0.5], [0.25], [0.25]]))
    args = (jnp.ones((2, 1)), unembed, jnp.array([0, 7]), jnp.log(jnp.array([0.25, 0.0])), jnp.array([2.0, 0.0]))
    for kind, value in (
        ("reverse", np.log(2)),
        ("forward", -0.5 * np.log(2)),
        ("jensen_shannon", 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)),
    ):
        (loss, out), grad = jax.value_and_grad(lambda h, kind=kind: sampled(h, *args[1:], divergence=kind, block=2), has_aux=True)(args[0])
        np.testing.assert_allclose(loss, 2 * value, rtol=1e-5)
        assert out["distill/tokens"] == 1 and out["distill/clipped"] == 0
        np.testing.assert_allclose([out["distill/teacher_logp"], out["distill/student_logp"]], np.log([0.25, 0.5]), rtol=1e-5)
        assert np.isfinite(grad).all() and grad[1] == 0  # no weight: neither its id nor its score matter


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_the_teacher_rules_out_costs_the_clip(kind):
    hidden, unembed, _ = (jnp.asarray(x, jnp.float32) for x in case())
    step = jax.jit(jax.value_and_grad(functools.partial(sampled, divergence=kind, clip=5.0, block=4), has_aux=True))
    (loss, out), grad = step(hidden, unembed, jnp.array([2]), jnp.array([-jnp.inf]), jnp.ones(1))
    r = np.exp(-5.0)
    expected = {"reverse": 5.0, "forward": -5 * r, "jensen_shannon": 0.5 * np.log(2 / (1 + r)) + 0.5 * r * np.log(2 * r / (1 + r))}
    np.testing.assert_allclose(loss, expected[kind], rtol=1e-4)
    assert out["distill/clipped"] == 1 and np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize(("change", "message"), [({"divergence": "both"}, "divergence"), ({"clip": 0.0}, "clip is"), ({}, "must be")])
def test_bad_input_is_refused(change, message):
    args = [jnp.ones((1, D)), jnp.ones((V, D)), jnp.zeros(1, jnp.int32), jnp.zeros(1), jnp.ones(1 if change else 2)]
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        sampled(*args, **change)
