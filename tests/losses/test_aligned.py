"""``sva`` over units against dense float64 sums: a teacher of another tokenizer, thin and fat units, tokens compared on their own."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align.members import members

from a1jax.losses.distill import sva
from a1jax.losses.divergence import Divergence

N, V, D, K = 20, 120, 8, 6  # K places: five units and one for the token written
NAMES = get_args(Divergence)
MODES = ("salient", "tail")


def make_fold(seed):
    """A unit of 30 ids, several of 2 to 6, ids of no unit."""
    rng = np.random.default_rng(seed)
    fold, order = np.arange(V), rng.permutation(V)
    for first, last in ((0, 30), (30, 36), (36, 40), (40, 42)):
        fold[order[first:last]] = order[first]
    fold[order[42:50]] = -1
    return fold.astype(np.int32)


FOLDS = (make_fold(1), make_fold(2))
SINGLE = (np.arange(V), np.arange(V), np.arange(V) + 1)  # no id begins with the bytes of another
MEMBERS = members(FOLDS, 4, 32, SINGLE)


def batch(seed=0):
    """hidden, unembed, values, units, alone, weights: float32 and int32.

    Odd tokens have the second teacher. Row 0 is masked and empty, row 1 empty with a weight, rows 2 to 4 have empty places.
    """
    rng = np.random.default_rng(seed)
    hidden, unembed = rng.normal(size=(N, D)), rng.normal(size=(V, D)) * 0.5
    values, units = np.full((N, K), -np.inf), np.full((N, K), -1)
    alone, weights = np.full(N, -1), rng.random(N)
    weights[[0, 7]] = 0
    for n in range(2, N):
        fold = FOLDS[n % 2]
        own = np.unique(fold[fold >= 0])
        fat = np.bincount(fold[fold >= 0]).argmax()
        mass = rng.dirichlet(np.full(K + 1, 0.7))  # the last is what S leaves over
        count = K - 1 if n > 4 else 2
        chosen = rng.choice(own[own != fat], count, replace=False)
        chosen[0] = fat if n % 3 else chosen[0]
        values[n, :count], units[n, :count] = np.log(mass[:count]), chosen + n % 2 * V
        if n % 4 < 2:  # the token written is no unit: one of the fat unit, of a thin one, or of none
            outside = np.flatnonzero((fold != np.arange(V)) & ((fold == chosen[0]) | (fold == -1) if n % 8 < 4 else True))
            alone[n], values[n, -1] = rng.choice(outside), np.log(mass[K - 1])
            units[n, -1] = alone[n] + n % 2 * V
        elif n % 4 == 2:  # it is a unit that was not among the best
            values[n, -1], units[n, -1] = np.log(mass[K - 1]), rng.choice(np.setdiff1d(own, chosen)) + n % 2 * V
    singles = (jnp.asarray(x, jnp.float32) for x in (hidden, unembed, values))
    return *singles, jnp.asarray(units, jnp.int32), jnp.asarray(alone, jnp.int32), jnp.asarray(weights, jnp.float32)


def classes(units, alone):
    """bool [N, K, V]: the ids of each class, from the folds."""
    inside = np.zeros((N, K, V), bool)
    for n in range(N):
        for j in range(K):
            if units[n, j] >= 0:
                teacher, unit = divmod(int(units[n, j]), V)
                inside[n, j] = FOLDS[teacher] == unit
        if alone[n] >= 0:
            inside[n, :, alone[n]] = False
            inside[n, -1] = np.arange(V) == alone[n]
    return inside


def dense(hidden, unembed, values, inside, weights, mode, name):
    """The definition, over whole probabilities; classes of nothing are left out of every sum."""
    p = jax.nn.softmax(hidden @ unembed.T)
    there = jnp.isfinite(values)
    ours = jnp.sum(jnp.where(inside, p[:, None], 0), axis=2)
    theirs = jnp.where(there, jnp.exp(values), 0)
    if mode == "salient":
        ours, theirs = (x / jnp.where(there.any(1), jnp.sum(x * there, axis=1), 1)[:, None] for x in (ours, theirs))
    else:
        ours, theirs = (jnp.concatenate([x, 1 - jnp.sum(x * jnp.isfinite(values), 1, keepdims=True)], axis=1) for x in (ours, theirs))
        there = jnp.concatenate([there, there.any(1, keepdims=True)], axis=1)
    p, q = (jnp.where(there, x, 0.5) for x in (ours, theirs))
    mean = (p + q) / 2
    each = {
        "reverse": p * jnp.log(p / q),
        "forward": q * jnp.log(q / p),
        "jensen_shannon": p * jnp.log(p / mean) / 2 + q * jnp.log(q / mean) / 2,
    }[name]
    return jnp.sum(weights * jnp.sum(jnp.where(there, each, 0), axis=1))


def close(got, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@functools.cache
def ours(mode, names=NAMES):
    def run(hidden, unembed, values, units, alone, weights, made):
        def loss(hidden, unembed, name):
            common = {"mode": mode, "divergence": name, "block": 32, "members": made, "alone": alone}
            return sva(hidden, unembed, values, units, weights, **common)

        return {name: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed, name) for name in names}

    return jax.jit(run)


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_equal_the_dense_form(mode):
    hidden, unembed, values, units, alone, weights = batch()
    inside = classes(np.asarray(units), np.asarray(alone))
    assert (np.asarray(alone) >= 0).sum() > 5 and (inside.sum(2) > 4).sum() > 5  # fat ones
    found = ours(mode)(hidden, unembed, values, units, alone, weights, MEMBERS)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, unembed, values, weights)]

        @jax.jit
        def reference(hidden, unembed):
            def one(h, w, name):
                return dense(h, w, wide[2], inside, wide[3], mode, name)

            return {name: jax.value_and_grad(one, (0, 1))(hidden, unembed, name) for name in NAMES}

        expected = jax.tree.map(np.asarray, reference(*wide[:2]))
        p = np.asarray(jax.nn.softmax(wide[0] @ wide[1].T))
    masked = np.asarray(weights) == 0
    for name in NAMES:
        (loss, metrics), grads = found[name]
        np.testing.assert_allclose(loss, expected[name][0], rtol=1e-5, err_msg=name)
        close(grads, expected[name][1])
        assert not np.asarray(grads[0])[masked].any()
        if mode == "salient":  # only ids of a class of a token with a weight
            touched = (inside & ~masked[:, None, None]).any(axis=(0, 1))
            assert (np.asarray(grads[1]).any(axis=1) == touched).all() and not touched.all()
        covered = (inside.any(1) * p).sum(1)[~masked].mean()
        np.testing.assert_allclose(metrics["distill/coverage"], covered, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_more_places_than_units_and_the_names_of_teachers_change_nothing(mode):
    hidden, unembed, values, units, alone, weights = batch(3)
    run = ours(mode, ("jensen_shannon",))
    base = jax.tree.map(np.asarray, run(hidden, unembed, values, units, alone, weights, MEMBERS))
    # Empty places, put in the middle so that the last stays the last.
    wider = jnp.concatenate([values[:, :3], jnp.full((N, 4), -jnp.inf), values[:, 3:]], axis=1)
    named = jnp.concatenate([units[:, :3], jnp.full((N, 4), 11, jnp.int32), units[:, 3:]], axis=1)
    close(run(hidden, unembed, wider, named, alone, weights, MEMBERS), base, 1e-5)
    # The two teachers in the other order, and units of other widths gathered.
    swapped = jnp.where(units >= V, units - V, jnp.where(units >= 0, units + V, -1))
    close(run(hidden, unembed, values, swapped, alone, weights, members(FOLDS[::-1], 50, 32, SINGLE)), base, 1e-5)
    # And the student's ids, with the folds that go with them.
    order = np.random.default_rng(5).permutation(V)
    place = np.argsort(order)
    folds = [np.where(f[order] < 0, -1, place[f[order]]) for f in FOLDS]
    units, alone = np.asarray(units), np.asarray(alone)
    renamed = jnp.asarray(np.where(units < 0, -1, units // V * V + place[units % V]), jnp.int32)
    alone = jnp.asarray(np.where(alone < 0, -1, place[alone]), jnp.int32)
    again = run(hidden, unembed[order], values, renamed, alone, weights, members(folds, prefixes=SINGLE))
    (loss, metrics), grads = base["jensen_shannon"]
    close(again["jensen_shannon"], ((loss, metrics), (grads[0], grads[1][order])), 1e-5)


def test_what_is_no_number_stays_none():
    # A hidden state that has become NaN must show in the loss, also through classes of several ids.
    hidden, unembed, values, units, alone, weights = batch()
    run = ours("salient", ("jensen_shannon",))
    (loss, _), _ = run(hidden.at[9].set(jnp.nan), unembed, values, units, alone, weights, MEMBERS)["jensen_shannon"]
    assert np.isnan(loss) and weights[9] > 0


def test_an_identity_is_the_plain_loss():
    rng = np.random.default_rng(2)
    hidden, unembed, values = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (V, D), (N, K)))
    ids = jnp.asarray(np.stack([rng.permutation(V)[:K] for _ in range(N)]), jnp.int32)
    total, weights = jnp.full(N, 5.0), jnp.asarray(rng.random(N), jnp.float32)

    @jax.jit
    def run(hidden, unembed, made):
        def loss(hidden, unembed):
            return sva(hidden, unembed, values, ids, weights, teacher_logsumexp=total, mode="tail", block=32, members=made)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)

    close(run(hidden, unembed, members([np.arange(V)])), jax.tree.map(np.asarray, run(hidden, unembed, None)), 1e-6)


def test_a_student_that_agrees_has_no_loss():
    # The teacher's values are the student's own sums over the units: 0, and only then.
    hidden, unembed, values, units, alone, weights = batch(4)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        own = np.log((classes(np.asarray(units), np.asarray(alone)) * p[:, None]).sum(2))
    agreed = jnp.where(jnp.isneginf(values), -jnp.inf, jnp.asarray(own, jnp.float32))
    nobody = int(np.setdiff1d(np.arange(V), FOLDS[0])[0])  # a unit of no id, which a map that fits never names: no mass, but no NaN
    for mode in MODES:
        strange = ours(mode)(hidden, unembed, values, units.at[6, 1].set(nobody), alone, weights, MEMBERS)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(strange))
        for (loss, metrics), grads in ours(mode)(hidden, unembed, agreed, units, alone, weights, MEMBERS).values():
            np.testing.assert_allclose(loss, 0, atol=2e-6)
            assert all(np.abs(g).max() < 1e-5 for g in grads) and metrics["distill/kl"] < 1e-6
        assert all(loss > 0.1 for (loss, _), _ in ours(mode)(hidden, unembed, values, units, alone, weights, MEMBERS).values())
