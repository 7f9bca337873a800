"""Logits of units against dense float64 sums over their rows: thin and fat ones, tokens that stand alone, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align.members import gather_units, members

N, D, V, K = 21, 8, 400, 7


def fold(seed, vocab=V, fattest=170, none=0.1):
    """A fold of many fan-ins: one unit of ``fattest`` rows, several of 3 to 40, thin ones, ids that are in no unit."""
    rng = np.random.default_rng(seed)
    unit, order, at = np.arange(vocab), rng.permutation(vocab), 0
    for fan_in in (fattest, 40, 33, 17, 16, 5, 3, 3, 2, 2):
        unit[order[at : at + fan_in]] = order[at]
        at += fan_in
    rest = order[at:]
    unit[rest[rng.random(rest.size) < none]] = -1
    return unit.astype(np.int32)


FOLDS = (fold(1), fold(2, fattest=90))


def batch(folds, seed=0, tokens=N, places=K):
    """hidden, unembed, units with fat ones, equal ones and empty places, alone (some -1), cotangents."""
    rng = np.random.default_rng(seed)
    units = np.stack([rng.permutation(len(folds) * V)[:places] for _ in range(tokens)])
    fat = [t * V + np.bincount(f[f >= 0]).argsort()[-6:] for t, f in enumerate(folds)]
    units[:, 1] = rng.choice(np.concatenate(fat), tokens)
    units[::2, 3] = rng.choice(np.concatenate(fat), units[::2].shape[0])
    units[3, :] = -1
    units[5, 2] = -1
    folded = np.flatnonzero(folds[0] != np.arange(V))
    alone = np.where(rng.random(tokens) < 0.6, rng.choice(folded, tokens), -1)
    with_members = [np.flatnonzero((folds[0] == u) & (np.arange(V) != u)) for u in fat[0] if u < V]
    for n in range(0, 12, 2):  # those that matter: left out of a fat unit that the token asks for
        units[n, 1], alone[n] = folds[0][with_members[n % 4][0]], with_members[n % 4][n // 2 % with_members[n % 4].size]
    units[:, -1] = np.where(alone >= 0, alone, units[:, -1])
    hidden, unembed = rng.normal(size=(tokens, D)), rng.normal(size=(V, D))
    return hidden, unembed, units.astype(np.int32), alone.astype(np.int32), rng.normal(size=(tokens, places))


def prefixes(seed=3):
    """rank, low, high of made-up bytes: some ids begin as others do."""
    rng = np.random.default_rng(seed)
    rank = rng.permutation(V)
    return rank, rank, np.minimum(rank + np.where(rng.random(V) < 0.3, rng.integers(2, 30, V), 1), V)


def membership(folds, order):
    """bool [units, V]."""
    out = np.concatenate([f[None, :] == np.arange(V)[:, None] for f in folds])
    if order is not None:
        rank, low, high = order
        begins = (rank[None, :] >= low[:, None]) & (rank[None, :] < high[:, None])
        out |= np.concatenate([begins & (f[None, :] == f[:, None]) & (f != np.arange(V))[:, None] for f in folds])
    return out


def dense(hidden, unembed, units, alone, folds, order):
    """From whole logits, in the dtype that it is given."""
    logits = hidden @ unembed.T
    inside = membership(folds, order)[np.maximum(units, 0)] & (units >= 0)[:, :, None]
    if alone is not None:
        rank, low, high = order
        begins = (rank >= low[alone][:, None]) & (rank < high[alone][:, None]) & (alone >= 0)[:, None]
        unit_of = np.concatenate([np.where(f < 0, -1, t * V + f) for t, f in enumerate(folds)])
        left = np.where(alone >= 0, unit_of[np.maximum(units[:, -1], 0)], -1)  # only the unit that it is otherwise in loses it
        inside &= ~(begins[:, None] & ((units == left[:, None]) & (left >= 0)[:, None])[:, :, None])
    there = inside.any(axis=2)
    shown = jnp.where(inside | ~there[:, :, None], jnp.broadcast_to(logits[:, None], inside.shape), -jnp.inf)
    return jnp.where(there, jax.nn.logsumexp(shown, axis=2), -jnp.inf)


def reference(hidden, unembed, units, alone, cotangents, folds, order=None):
    def loss(hidden, unembed):
        values = dense(hidden, unembed, units, alone, folds, order)
        return jnp.sum(jnp.where(jnp.isneginf(values), 0, cotangents * values)), values

    with jax.enable_x64(True):
        arrays = (jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, unembed))
        (_, values), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays)
        return np.asarray(values), *map(np.asarray, grads)


@functools.partial(jax.jit, static_argnames="slab")
def ours(hidden, unembed, units, made, alone, cotangents, slab):
    def loss(hidden, unembed):
        values = gather_units(hidden, unembed, units, made, alone, slab)
        return jnp.sum(jnp.where(jnp.isneginf(values), 0, cotangents * values)), values

    (_, values), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)
    return values, *grads


def close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(np.asarray(a)[finite], b[finite], rtol=tolerance, atol=tolerance * np.abs(b[finite]).max())


def singles(hidden, unembed, *rest):
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(unembed, jnp.float32), *rest


@pytest.mark.parametrize("with_alone", [True, False])
@pytest.mark.parametrize(("thin", "block", "slab"), [(16, 64, 1 << 20), (16, 2048, 1 << 20), (400, 64, 1000), (1, 16, 1000)])
def test_values_and_gradients_equal_the_dense_form(thin, block, slab, with_alone):
    hidden, unembed, units, alone, cotangents = batch(FOLDS)
    alone = alone if with_alone else None
    order = prefixes() if with_alone else None
    made = members(FOLDS, thin, block, order)
    assert (made.fat_rows.shape[0] > 1) == (block < 2048 and thin < 400)  # several blocks, so that units lie across their ends
    hidden, unembed, cotangents = singles(hidden, unembed, jnp.asarray(cotangents, jnp.float32))
    expected = reference(hidden, unembed, units, alone, cotangents, FOLDS, order)
    assert np.isneginf(expected[0]).sum() > K  # empty places and units without a row
    close(ours(hidden, unembed, units, made, alone, cotangents, slab), expected)


def test_every_row_of_a_fat_unit_left_out_and_alone():
    # A unit of 170 rows, and token n has its n-th row as a class of its own.
    unit = np.bincount(FOLDS[0][FOLDS[0] >= 0]).argmax()
    rows = np.flatnonzero((FOLDS[0] == unit) & (np.arange(V) != unit))
    rng = np.random.default_rng(4)
    hidden, unembed = singles(rng.normal(size=(rows.size, D)), rng.normal(size=(V, D)))
    units = np.stack([np.full(rows.size, unit), rows], axis=1).astype(np.int32)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
    total = np.exp(logits[:, FOLDS[0] == unit]).sum(1)
    own = logits[np.arange(rows.size), rows]
    expected = np.stack([np.log(total - np.exp(own)), own], axis=1)
    order = (np.arange(V), np.arange(V), np.arange(V) + 1)
    for thin in (16, 400):
        made = members(FOLDS[:1], thin, 32, order)
        found = jax.jit(gather_units)(hidden, unembed, units, made, jnp.asarray(rows, jnp.int32))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_lose_nothing():
    # 300 and -300 next to each other: exp of either is no float32, and no unit's mass can be told from 0 next to another's.
    hidden = jnp.asarray([[300.0], [-300.0]])
    unembed = jnp.asarray(np.linspace(-1, 1, V), jnp.float32)[:, None]
    low_and_high = np.where(np.arange(V) < 100, 0, np.where(np.arange(V) < 300, np.arange(V), 399))
    for units in ([[0, -1, 150], [0, 399, 150]], [[399, -1, 150]] * 2):  # also without the first unit of a block
        units = np.array(units, np.int32)
        expected = reference(hidden, unembed, units, None, np.ones((2, 3)), [low_and_high])
        for thin, block in ((16, 2048), (16, 16), (400, 2048)):  # both in one block, in several, gathered
            close(ours(hidden, unembed, units, members([low_and_high], thin, block), None, jnp.ones((2, 3)), 1 << 20), expected)


def test_what_is_no_unit_is_nothing():
    # Empty places, a unit without rows and one beyond the last: -inf, and whatever comes back for them moves nothing.
    hidden, unembed, *_ = batch(FOLDS)
    hidden, unembed = singles(hidden, unembed)
    nobody = np.flatnonzero(np.bincount(FOLDS[0][FOLDS[0] >= 0], minlength=V) == 0)[0]
    units = jnp.broadcast_to(jnp.array([-1, nobody, V, -7], jnp.int32), (N, 4))

    @jax.jit
    def run(made):
        values, pull = jax.vjp(lambda h, w: gather_units(h, w, units, made), hidden, unembed)
        return values, pull(jnp.full((N, 4), jnp.nan))

    values, grads = run(members(FOLDS[:1], 16, 64))
    assert np.isneginf(values).all() and not any(np.asarray(g).any() for g in grads)


def test_an_identity_is_gather_logits_bitwise():
    from a1jax.kernels.vocab_align.ops import gather_logits

    rng = np.random.default_rng(5)
    hidden, unembed = singles(rng.normal(size=(N, D)), rng.normal(size=(V, D)))
    ids = jnp.asarray(rng.integers(0, V, (N, K)), jnp.int32)
    cotangents = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)

    @jax.jit
    def plain(hidden, unembed):
        values, pull = jax.vjp(lambda h, w: gather_logits(h, w, ids), hidden, unembed)
        return values, *pull(cotangents)

    made = members([np.arange(V, dtype=np.int32)])
    for a, b in zip(ours(hidden, unembed, ids, made, None, cotangents, 1 << 20), plain(hidden, unembed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_stays_in_the_rows_of_the_units():
    hidden, unembed, units, alone, cotangents = batch(FOLDS, seed=7)
    hidden, unembed, cotangents = singles(hidden, unembed, jnp.asarray(cotangents, jnp.float32))
    units = units % V
    units[:, :] = units[:1, :]
    grads = ours(hidden, unembed, units, members(FOLDS), None, cotangents, 1 << 20)[2]
    touched = np.isin(np.arange(V), np.flatnonzero(np.isin(FOLDS[0], units)))
    assert (np.asarray(grads).any(axis=1) == touched).all() and 0 < touched.sum() < V


def test_a_fan_in_of_thousands_without_an_array_of_all_tokens_over_all_ids(largest):
    vocab, tokens = 9000, 128
    unit = np.where(np.arange(vocab) < 5900, 7, np.arange(vocab)).astype(np.int32)
    made = members([unit], block=512)
    rng = np.random.default_rng(0)
    hidden, unembed = singles(rng.normal(size=(tokens, 4)), rng.normal(size=(vocab, 4)))
    units = np.stack([np.full(tokens, 7), rng.integers(6000, vocab, tokens)], axis=1).astype(np.int32)
    cotangents = jnp.ones((tokens, 2))
    assert largest(jax.make_jaxpr(lambda *a: ours(*a, None, cotangents, 1 << 15))(hidden, unembed, units, made).jaxpr) < tokens * 5900 / 4
    values, d_hidden, d_unembed = ours(hidden, unembed, units, made, None, cotangents, 1 << 15)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
    fat = np.exp(logits[:, :5900])
    np.testing.assert_allclose(values[:, 0], np.log(fat.sum(1)), rtol=1e-5)
    share = fat / fat.sum(1, keepdims=True)
    np.testing.assert_allclose(d_hidden, share @ np.asarray(unembed)[:5900] + np.asarray(unembed)[units[:, 1]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_unembed[:5900], share.T @ np.asarray(hidden), rtol=1e-4, atol=1e-5)


def test_under_a_mesh_every_device_has_its_tokens_and_the_matrix_travels_once():
    """21 tokens over 4 devices, the matrix cut both ways: fat, thin and set-apart units, values and both gradients."""
    mesh = jax.make_mesh((2, 2), ("rows", "ids"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    hidden, unembed, units, alone, cotangents = batch(FOLDS)
    hidden, unembed, cotangents = singles(hidden, unembed, jnp.asarray(cotangents, jnp.float32))
    made = members(FOLDS, 16, 64, prefixes())
    expected = reference(hidden, unembed, units, alone, cotangents, FOLDS, prefixes())
    with jax.set_mesh(mesh):
        cut = jax.device_put(unembed, jax.P("ids", "rows"))
        compiled = ours.lower(hidden, cut, units, made, alone, cotangents, 1000).compile()
        close(compiled(hidden, cut, units, made, alone, cotangents), expected)
    inside = [name for name, body in re.findall(r"^%(\S*) \([^\n]*\{\n(.*?)^\}", compiled.as_text(), re.M | re.S) if "all-" in body]
    assert not inside, inside  # no device waits for another within a loop


def test_members_by_hand():
    made = members([np.array([0, 0, -1, 3, 0]), np.array([2, 1, 2, -1, 1])], thin=2, block=16)
    np.testing.assert_array_equal(made.starts, [0, 0, 0, 0, 1, 1, 1, 3, 5, 5, 5])  # unit 0 of the first has 3 rows: fat
    np.testing.assert_array_equal(made.rows, [3, 1, 4, 0, 2])
    np.testing.assert_array_equal(made.fat, [0] + [-1] * 9)
    np.testing.assert_array_equal(made.fat_rows, [[0, 1, 4] + [-1] * 13])
    np.testing.assert_array_equal(made.fat_lanes, [[0]])


def test_what_is_set_apart_leaves_its_own_unit_only():
    # 1 2 3 a 12 123 of a teacher that has 1 2 3 a 123: 12 is compared in 1, and 123, which begins with it, in itself.
    from a1jax.align import byte_table, extensions, target, vocab_map

    student, teacher = (
        byte_table.make(list(words)) for words in ((b"1", b"2", b"3", b"a", b"12", b"123"), (b"1", b"2", b"3", b"a", b"123"))
    )
    made = vocab_map.build(student, teacher)
    assert made.unit_of_student.tolist() == [0, 1, 2, 3, 0, 5]
    rng = np.random.default_rng(0)
    hidden, unembed = rng.normal(size=(1, D)), rng.normal(size=(6, D))
    p = np.exp(hidden @ unembed.T) / np.exp(hidden @ unembed.T).sum()
    folded, _ = target.fold(p, made, np.array([4]))
    for thin in (16, 1):
        built = members([made.unit_of_student], thin, 16, extensions.prefixes(made))
        units = jnp.array([[0, 5, 3, 4]], jnp.int32)
        found = jax.jit(gather_units)(*singles(hidden, unembed), units, built, jnp.array([4], jnp.int32))
        np.testing.assert_allclose(np.exp(np.asarray(found)) / np.exp(hidden @ unembed.T).sum(), folded[:, [0, 5, 3, 4]], rtol=1e-5)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="alone needs members that were made with prefixes"):
        gather_units(jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.zeros((1, 1), jnp.int32), members([np.arange(3)]), jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="at least one"):
        members([])
    with pytest.raises(ValueError, match="of one V"):
        members([np.arange(3), np.arange(4)])
    with pytest.raises(ValueError, match="integers"):
        members([np.zeros(3)])
    with pytest.raises(ValueError, match="from -1 to 3"):
        members([np.array([-1, 3, 0])])
    with pytest.raises(ValueError, match="from -2 to 0"):
        members([np.array([-2, 0, 0])])
    for sizes in ((0, 2048), (16, 24), (16, 0)):
        with pytest.raises(ValueError, match=f"thin is {sizes[0]} and block {sizes[1]}"):
            members([np.arange(3)], *sizes)
    made = members([np.arange(V)])
    hidden, unembed, units = jnp.zeros((N, D)), jnp.zeros((V, D)), jnp.zeros((N, K), jnp.int32)
    with pytest.raises(ValueError, match="one width D"):
        gather_units(hidden[:, 1:], unembed, units, made)
    with pytest.raises(ValueError, match="must be"):
        gather_units(hidden, unembed, units[1:], made)
    with pytest.raises(ValueError, match="must be"):
        gather_units(hidden, unembed, units, made, jnp.zeros(N + 1, jnp.int32))
    with pytest.raises(ValueError, match="no multiple"):
        gather_units(hidden, unembed[1:], units, made)
