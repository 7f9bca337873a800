"""The whole of two vocabularies, compared in units, against dense float64 sums."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.losses.distill import distill
from a1jax.losses.divergence import LEAST_REST, Divergence
from a1jax.losses.full_aligned import Chain, full_aligned, plan

N, V, VT, D, WIDE = 14, 60, 75, 6, 9
NAMES = get_args(Divergence)


def pair(seed=0):
    """(fold, unit of each teacher id, rank, valid ids of both): fat units on both sides, ids of no unit, units that nobody reaches."""
    rng = np.random.default_rng(seed)
    own = rng.permutation(V)[:20]
    fold = rng.choice(own, V)
    fold[:14] = own[0]
    fold[own] = own
    fold[np.setdiff1d(np.arange(V), own)[-5:]] = -1
    unit = rng.choice(own[:15], VT)
    unit[:21], unit[21:30] = own[1], -1
    valid = np.arange(V) < V - 2, np.arange(VT) != 40
    return fold, rng.permutation(unit), rng.permutation(VT).astype(np.int32), *valid


def batch(fold, unit, rank, valid, teacher_valid, seed=1):
    """Arrays of both models, slices, and chains of every kind; the last token is ruled out by the teacher, the first has no weight."""
    rng = np.random.default_rng(seed)
    hidden = [rng.normal(size=s) * 0.7 for s in ((N, D), (V, D), (N, WIDE), (VT, WIDE))]
    low, high = np.zeros(N, np.int32), np.full(N, VT, np.int32)
    low[N // 2 :], high[N // 2 :] = rng.integers(0, 20, N - N // 2), rng.integers(45, VT, N - N // 2)
    low[-1] = high[-1] = 3
    logits = hidden[2] @ hidden[3].T
    logits[:, ~teacher_valid] = -np.inf
    inside = (rank >= low[:, None]) & (rank < high[:, None])
    q = np.where(inside, np.exp(logits), 0)
    q /= np.maximum(q.sum(1, keepdims=True), 1e-30)
    source, to, alone = (np.full(N, -1, np.int32) for _ in range(3))
    score = np.log(rng.random(N))
    folded = np.flatnonzero((fold != np.arange(V)) & valid)
    for n in range(1, N - 1):
        have = np.unique(unit[(q[n] > 0) & (unit >= 0)])
        kind = n % 6
        if kind in (1, 2, 3):  # from a unit: to another, to a token of its own, to nothing
            source[n] = rng.choice(have)
        if kind in (1, 4):
            to[n] = rng.choice(np.setdiff1d(fold[(fold >= 0) & valid], have if n < 7 else source[n]))
        if kind in (2, 5):  # 4 and 5: out of the residual
            alone[n] = rng.choice(folded)
        score[n] += np.log(q[n][unit == source[n]].sum())  # a part of what is there
    source[8], alone[8] = np.unique(unit[(q[8] > 0) & (unit >= 0)])[0], -1
    to[8] = source[8]  # to where it was
    weights = rng.random(N)
    weights[0] = 0
    arrays = [jnp.asarray(x, jnp.float32) for x in (*hidden, weights)]
    return arrays, jnp.asarray(low), jnp.asarray(high), Chain(score.astype(np.float32), source, to, alone)


def target(q, unit, chain):
    """(q of each unit [N, V], residual [N], q of the token of its own [N]), floored as the loss says, from the slice's masses q [N, VT]."""
    score, source, to, alone = (np.asarray(x) for x in chain)
    units = np.stack([q[:, unit == u].sum(1) for u in range(V)], axis=1)
    residual, own = q[:, unit == -1].sum(1), np.zeros(N)
    for n in range(N):
        if not q[n].any():
            residual[n] = 1
        elif max(source[n], to[n], alone[n]) >= 0 and (source[n] != to[n] or alone[n] >= 0):
            amount = np.exp(float(score[n]))
            if source[n] >= 0:
                units[n, source[n]] -= amount
            residual[n] += amount * (int(to[n] < 0 and alone[n] < 0) - int(source[n] < 0))
            if to[n] >= 0:
                units[n, to[n]] += amount
            own[n] = amount * (alone[n] >= 0)
    return units, np.maximum(residual, LEAST_REST), own


def dense(hidden, unembed, weights, targets, alone, fold, valid, name):
    units, residual, own = targets
    p = jax.nn.softmax(jnp.where(valid, hidden @ unembed.T, -jnp.inf))
    apart = np.arange(V) == np.asarray(alone)[:, None]
    rest_of = jnp.where(apart, 0, p)
    ours = rest_of @ jnp.asarray((fold[:, None] == np.arange(V)) & valid[:, None], p.dtype)
    reached = units > 0
    rest = jnp.maximum(jnp.sum(jnp.where(reached, 0, ours), 1) + jnp.sum(jnp.where(fold == -1, rest_of, 0), 1), LEAST_REST)
    p = jnp.concatenate([ours, rest[:, None], jnp.sum(jnp.where(apart, p, 0), 1)[:, None]], axis=1)
    q = np.concatenate([units, residual[:, None], own[:, None]], axis=1)
    there = q > 0
    p, q = jnp.where(there, p, 0.5), jnp.where(there, q, 0.5)
    mean = (p + q) / 2
    each = {
        "reverse": p * jnp.log(p / q),
        "forward": q * jnp.log(q / p),
        "jensen_shannon": p * jnp.log(p / mean) / 2 + q * jnp.log(q / mean) / 2,
    }[name]
    return jnp.sum(weights * jnp.sum(jnp.where(there, each, 0), axis=1))


@jax.jit
def ours(hidden, unembed, theirs, matrix, weights, made, low, high, chain):
    def loss(hidden, unembed, name):
        return full_aligned(hidden, unembed, theirs, matrix, weights, made, low, high, chain, divergence=name, block=32)

    return {name: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed, name) for name in NAMES}


def close(got, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("block", [8, 1000])
def test_value_and_gradient_equal_the_dense_form(block):
    fold, unit, rank, valid, teacher_valid = pair()
    made = plan(fold, unit, rank, valid, teacher_valid, block)
    assert (len(made.units) > 3) == (block == 8)
    arrays, low, high, chain = batch(fold, unit, rank, valid, teacher_valid)
    found = ours(*arrays, made, low, high, chain)
    wide = [np.asarray(x, np.float64) for x in arrays]
    inside = (rank >= np.asarray(low)[:, None]) & (rank < np.asarray(high)[:, None]) & teacher_valid
    q = np.where(inside, np.exp(wide[2] @ wide[3].T), 0)
    q /= np.maximum(q.sum(1, keepdims=True), 1e-30)
    targets = target(q, unit, chain)
    np.testing.assert_allclose(targets[0].sum(1) + targets[1] + targets[2], 1, atol=1e-6)
    assert min(x.min() for x in targets) >= 0 and (targets[2] > 0).sum() > 2
    with jax.enable_x64(True):
        hidden, unembed = (jnp.asarray(x, jnp.float64) for x in wide[:2])

        @jax.jit
        def reference(h, w):
            def one(h, w, name):
                return dense(h, w, wide[4], targets, chain.alone, fold, valid, name)

            return {name: jax.value_and_grad(one, (0, 1))(h, w, name) for name in NAMES}

        expected = jax.tree.map(np.asarray, reference(hidden, unembed))
    classes = np.concatenate([targets[0], targets[1][:, None], targets[2][:, None]], axis=1)
    entropy = -(np.where(classes > 0, classes * np.log(np.maximum(classes, 1e-300)), 0)).sum(1)
    for name in NAMES:
        (loss, metrics), grads = found[name]
        np.testing.assert_allclose(loss, expected[name][0], rtol=1e-5, err_msg=name)
        close(grads, expected[name][1])
        assert not np.asarray(grads[0])[[0, -1]].any()  # no weight; nothing said
        np.testing.assert_allclose(metrics["distill/teacher_entropy"], entropy[1:].mean(), rtol=1e-5)


def test_one_tokenizer_is_mode_full():
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (V, D), (N, WIDE), (V, WIDE))]
    arrays.append(jnp.asarray(rng.random(N), jnp.float32))
    none = np.full(N, -1, np.int32)
    ids, every = np.arange(V), np.ones(V, bool)
    made = plan(ids, ids, ids, every, every, 16)
    found = ours(*arrays, made, np.zeros(N, np.int32), np.full(N, V, np.int32), Chain(np.zeros(N, np.float32), none, none, none))

    @jax.jit
    def plain(hidden, unembed):
        def loss(hidden, unembed, name):
            return distill(hidden, unembed, *arrays[2:], mode="full", divergence=name, block=16)

        return {name: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed, name) for name in NAMES}

    close(found, jax.tree.map(np.asarray, plain(*arrays[:2])), 1e-4)


def test_no_array_of_all_tokens_over_all_ids(largest):
    fold, unit = np.arange(2000), np.arange(2000)
    every, none = np.ones(2000, bool), np.full(512, -1, np.int32)
    made = plan(fold, unit, fold, every, every, 64)
    arrays = [jnp.zeros(s) for s in ((512, D), (2000, D), (512, WIDE), (2000, WIDE), (512,))]
    chain = Chain(np.zeros(512, np.float32), none, none, none)
    run = jax.make_jaxpr(lambda *a: ours(*a, none, none, chain))
    assert largest(run(*arrays, made).jaxpr) < 512 * 2000 // 8


def test_a_plan_by_hand():
    # Unit 0: ids 0, 3; unit 1: id 1 and nothing of the teacher's; id 2 in none, 4 no token. The teacher's: 0 and 2 in 0, 1 in none.
    made = plan(np.array([0, 1, -1, 0, 4]), np.array([0, -1, 0]), np.array([5, 6, 7]), np.arange(5) < 4, np.ones(3, bool), 2)
    np.testing.assert_array_equal(made.units, [[-1], [0], [1]])
    np.testing.assert_array_equal(made.ours, [[2, -1], [0, 3], [1, -1]])
    np.testing.assert_array_equal(made.theirs, [[1, -1], [0, 2], [-1, -1]])
    np.testing.assert_array_equal(made.rank, [[6, -1], [5, 7], [-1, -1]])


def test_wrong_arguments_are_refused():
    fold, unit, rank, valid, teacher_valid = pair()
    with pytest.raises(ValueError, match="must be"):
        plan(fold, unit, rank[1:], valid, teacher_valid)
    with pytest.raises(ValueError, match="block is 0"):
        plan(fold, unit, rank, valid, teacher_valid, 0)
    made = plan(fold, unit, rank, valid, teacher_valid)
    arrays, low, high, chain = batch(fold, unit, rank, valid, teacher_valid)
    with pytest.raises(ValueError, match="must be .* long"):
        full_aligned(*arrays, made, low[1:], high, chain)
    with pytest.raises(ValueError, match="60 student ids"):
        full_aligned(arrays[0], arrays[1][1:], *arrays[2:], made, low, high, chain)
