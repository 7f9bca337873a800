"""A mixture of teachers: by hand, against the dense sum in float64, with hard routing as one of its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.losses import distill, mixture

V, N = 50, 7


@pytest.fixture()
def teachers():
    """Hidden states and output matrices of two teachers of different width, in numpy."""
    rng = np.random.default_rng(0)
    made = [(rng.normal(size=(N, d)), rng.normal(size=(V, d))) for d in (6, 4)]
    return [h.astype(np.float32) for h, _ in made], [u.astype(np.float32) for _, u in made]


def dense(hidden, unembed, weights):
    """[N, V] probabilities of the mixture, float64."""
    logits = [h.astype(np.float64) @ u.astype(np.float64).T for h, u in zip(hidden, unembed, strict=True)]
    each = [np.exp(z - z.max(1, keepdims=True)) for z in logits]
    return sum(w * e / e.sum(1, keepdims=True) for w, e in zip(weights, each, strict=True))


def test_two_teachers_of_three_ids_by_hand():
    """q_1 = (1/2, 1/4, 1/4), q_2 = (0.1, 0.1, 0.8) with weights 3/4 and 1/4: (0.4, 0.2125, 0.3875)."""
    one = jnp.ones((1, 1))
    unembed = [jnp.log(jnp.asarray([[2.0], [1.0], [1.0]])), jnp.log(jnp.asarray([[0.1], [0.1], [0.8]]))]
    found = mixture.mixture_targets([one, one], unembed, (0.75, 0.25), 2, 3)
    np.testing.assert_array_equal(found.support, [[0, 2]])
    np.testing.assert_allclose(np.exp(found.logits), [[0.4, 0.3875]], rtol=1e-6)
    assert found.logsumexp[0] == 0
    score = mixture.mixture_score([one, one], unembed, (0.75, 0.25), jnp.asarray([1]), 3)
    np.testing.assert_allclose(np.exp(score), [0.2125], rtol=1e-6)


@pytest.mark.parametrize("block", [16, 50])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_the_best_of_the_mixture_are_those_of_the_dense_sum(teachers, weights, block):
    hidden, unembed = teachers
    expected = dense(hidden, unembed, weights)
    found = mixture.mixture_targets([*map(jnp.asarray, hidden)], [*map(jnp.asarray, unembed)], weights, 5, block)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.support, order)
    np.testing.assert_allclose(np.exp(found.logits), np.take_along_axis(expected, order, axis=1), rtol=2e-5)
    everything = mixture.mixture_targets([*map(jnp.asarray, hidden)], [*map(jnp.asarray, unembed)], weights, V, block)
    np.testing.assert_allclose(np.exp(everything.logits).sum(1), 1, rtol=1e-5)
    written = jnp.arange(N, dtype=jnp.int32) * 3
    score = mixture.mixture_score([*map(jnp.asarray, hidden)], [*map(jnp.asarray, unembed)], weights, written, block)
    np.testing.assert_allclose(np.exp(score), expected[np.arange(N), written], rtol=2e-5)


def test_an_id_that_is_among_no_teachers_best_can_be_the_mixtures():
    """(0.5, 0, 0.4, 0.1) and (0, 0.5, 0.4, 0.1): the third has 0.4 of the mixture and is the first of none."""
    one = jnp.ones((1, 1))
    unembed = [jnp.log(jnp.asarray(p)[:, None] + 1e-9) for p in ((0.5, 0.0, 0.4, 0.1), (0.0, 0.5, 0.4, 0.1))]
    assert mixture.mixture_targets([one, one], unembed, (0.5, 0.5), 1, 2).support.tolist() == [[2]]


def test_hard_routing_is_its_end(teachers):
    hidden, unembed = ([*map(jnp.asarray, x)] for x in teachers)
    own = distill.teacher_targets(hidden[1], unembed[1], 5, 16)
    for got, expected in zip(mixture.mixture_targets(hidden, unembed, (0.0, 1.0), 5, 16), own, strict=True):
        np.testing.assert_array_equal(got, expected)
    # A teacher mixed with itself says what it says alone, whatever the weights: the sum over teachers is really taken.
    both = mixture.mixture_targets([hidden[1]] * 2, [unembed[1]] * 2, (0.3, 0.7), 5, 16)
    np.testing.assert_array_equal(both.support, own.support)
    np.testing.assert_allclose(both.logits, own.logits - own.logsumexp[:, None], atol=2e-6)


def test_what_is_padding_everywhere_is_nobodys_and_there_is_no_gradient(teachers):
    hidden, unembed = teachers
    padded = [jnp.asarray(u).at[40:].set(-jnp.inf) for u in unembed]
    found = mixture.mixture_targets([*map(jnp.asarray, hidden)], padded, (0.5, 0.5), 45, 16)
    assert (np.sort(found.support, axis=1)[:, 5:] == np.arange(40)).all() and (np.asarray(found.support)[:, 40:] == -1).all()
    np.testing.assert_allclose(np.exp(found.logits).sum(1), 1, rtol=1e-5)

    def value(h):
        return mixture.mixture_targets([h, jnp.asarray(hidden[1])], [*map(jnp.asarray, unembed)], (0.5, 0.5), 5, 16).logits.sum()

    assert not jax.grad(value)(jnp.asarray(hidden[0])).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (0.5, 0.6)}, "1 in all"),
        ({"weights": (1.5, -0.5)}, "at least 0"),
        ({"weights": (1.0,)}, "for 2 teachers"),
        ({"k": V + 1}, "choose k from 1 to 50"),
        ({"unembed": [jnp.ones((V, 6)), jnp.ones((V + 1, 4))]}, "50 and 51 rows"),
    ],
)
def test_what_is_no_mixture_is_one_line(teachers, change, message):
    hidden, unembed = ([*map(jnp.asarray, x)] for x in teachers)
    arguments = {"hidden": hidden, "unembed": unembed, "weights": (0.5, 0.5), "k": 5, "block": 16} | change
    with pytest.raises(ValueError, match=message):
        mixture.mixture_targets(**arguments)
