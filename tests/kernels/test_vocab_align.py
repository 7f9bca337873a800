"""The blocked ops against the dense reference, itself computed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import blocks, ops, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from a1jax.analysis import collectives, hlo_text

N, D, V = 37, 16, 103

topk = jax.jit(ops.topk, static_argnames=("k", "block"))  # one compilation per shape, not one per call
logsumexp = jax.jit(ops.logsumexp, static_argnames="block")
gather_logits = jax.jit(ops.gather_logits, static_argnames="slab")


def arrays(seed=0, tokens=N, width=D, vocab=V, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(tokens, width)), dtype), jnp.asarray(rng.normal(size=(vocab, width)), dtype)


def integers(seed, low=-1, high=2):
    """Small whole numbers: logits are exact in float32 and full of ties."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(low, high, (N, 4)), jnp.float32), jnp.asarray(rng.integers(low, high, (V, 4)), jnp.float32)


def float64(function, *args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(function)(*(jnp.asarray(np.asarray(a), jnp.float64) for a in args)))


@pytest.mark.parametrize(("block", "k"), [(1, 5), (8, 1), (8, 103), (102, 5), (4096, 103)])
def test_topk_equals_the_dense_form(block, k):
    hidden, unembed = arrays()
    values, ids, total = topk(hidden, unembed, k, block)
    expected = float64(lambda h, w: reference.topk(h, w, k), hidden, unembed)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_allclose(values, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, expected[2], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), block=st.sampled_from([7, 103]), k=st.just(30))
def test_topk_breaks_ties_by_the_lower_id(seed, block, k):
    hidden, unembed = integers(seed)
    values, ids, _ = topk(hidden, unembed, k, block)
    logits = np.asarray(hidden) @ np.asarray(unembed).T
    expected = np.argsort(-logits, axis=1, stable=True)[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


@pytest.mark.parametrize(("block", "by_value"), [(10, False), (10, True), (103, False)])
def test_padding_rows_are_in_nothing(block, by_value):
    hidden, unembed = arrays()
    valid = np.ones(V, bool)
    valid[[0, 1, 50, 102]] = False
    valid[10:20] = False  # a whole block, and the first one it meets after it
    padding, tokens = np.flatnonzero(~valid), np.flatnonzero(valid)
    # Marked, a row that would win every top-k and every log-sum-exp; or not marked, and -inf itself.
    matrix = unembed.at[padding].set(-jnp.inf if by_value else 100.0)
    given = None if by_value else valid

    @jax.jit
    def everything(h, w):
        grads = jax.grad(lambda h, w: jnp.sum(ops.logsumexp(h, w, block, given)), (0, 1))(h, w)
        return ops.topk(h, w, 7, block, given), ops.logsumexp(h, w, block, given), grads

    got, total, grads = everything(hidden, matrix)
    values, ids, expected = float64(lambda h, w: reference.topk(h, w, 7), hidden, unembed[tokens])
    np.testing.assert_array_equal(got[1], tokens[ids])
    np.testing.assert_allclose(got[0], values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], expected, rtol=1e-6)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert np.isfinite(grads[0]).all() and not np.asarray(grads[1])[padding].any() and np.asarray(grads[1])[tokens].all()


def test_k_beyond_the_valid_ids_is_refused_where_it_can_be_known():
    hidden, unembed = arrays()
    valid = np.arange(V) < 5
    for bad, given_valid in ((0, None), (V + 1, None), (6, valid), (6, jnp.asarray(valid))):
        with pytest.raises(ValueError, match=f"k is {bad}, but the output matrix has .* valid ids"):
            ops.topk(hidden, unembed, bad, 16, given_valid)
    for block in (16, V):
        values, ids, _ = jax.jit(lambda v, b=block: topk(hidden, unembed, 6, b, v))(valid)
        np.testing.assert_array_equal(np.sort(ids[:, :5], axis=1), np.broadcast_to(np.arange(5), (N, 5)))
        assert (ids[:, 5] == -1).all() and np.isneginf(values[:, 5]).all()


def test_shapes_that_do_not_match_are_refused():
    hidden, unembed = arrays()
    with pytest.raises(ValueError, match="one width D"):
        topk(hidden[:, 1:], unembed, 3, 16)
    with pytest.raises(ValueError, match="one width D"):
        logsumexp(hidden, unembed[:, 1:], 16)
    with pytest.raises(ValueError, match="do not belong"):
        gather_logits(hidden, unembed, jnp.zeros((N + 1, 3), jnp.int32))
    with pytest.raises(ValueError, match="at least 1"):
        logsumexp(hidden, unembed, 0)


@pytest.mark.parametrize("block", [10, 103])
def test_logsumexp_and_its_gradient(block):
    hidden, unembed = arrays()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=N), jnp.float32)

    def dense(h, w, g):
        return jnp.sum(g * reference.logsumexp(h, w))

    value, grads = jax.jit(jax.value_and_grad(lambda h, w: jnp.sum(weight * logsumexp(h, w, block)), (0, 1)))(hidden, unembed)
    expected, expected_grads = float64(jax.value_and_grad(dense, (0, 1)), hidden, unembed, weight)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)


def test_gathered_logits_over_devices_meet_once_and_not_in_every_slab():
    """Tokens and the matrix's width are cut; 8 slabs on each of 4 devices. Value and gradients are those of one device."""
    hidden, unembed = arrays(tokens=64)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, V, (64, 6)), jnp.int32)

    def total(h, w):
        return jnp.sum(jnp.sin(ops.gather_logits(h, w, ids, 2 * 6 * D)))

    expected = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, unembed)
    mesh = jax.make_mesh((2, 2), ("rows", "width"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in ((hidden, P(("rows", "width"))), (unembed, P(None, "width")))
        ]
        compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*placed).compile()
        got = compiled(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    found = collectives.of_module(hlo_text.read(compiled.as_text()), dict(mesh.shape))
    assert 0 < sum(entry["count"] for entry in found) < 8


@pytest.mark.parametrize("slab", [1000, 1 << 20])
def test_gather_logits_and_its_gradient(slab):
    hidden, unembed = arrays()
    rng = np.random.default_rng(2)
    ids = jnp.asarray(rng.integers(0, V // 2, (N, 6)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(N, 6)), jnp.float32)

    def dense(h, w, g):
        return jnp.sum(g * reference.gather_logits(h, w, ids))

    @jax.jit
    def everything(h, w):
        grads = jax.grad(lambda h, w: jnp.sum(weight * ops.gather_logits(h, w, ids, slab)), (0, 1))(h, w)
        # On a CPU the gradient is the second of these, elsewhere the first.
        scattered = [f(h, ids, weight, jnp.ones((V, D)), slab) for f in (ops.scatter_by_id, ops.scatter_by_token)]
        return ops.gather_logits(h, w, ids, slab), grads, scattered

    got, grads, scattered = everything(hidden, unembed)
    np.testing.assert_allclose(got, reference.gather_logits(hidden, unembed, ids), rtol=1e-5, atol=1e-5)
    expected = float64(jax.grad(dense, (0, 1)), hidden, unembed, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected)
    assert not np.asarray(grads[1])[V // 2 :].any()
    for result in scattered:
        np.testing.assert_allclose(result, expected[1] + 1, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_are_summed_in_float32():
    hidden, unembed = arrays(dtype=jnp.bfloat16, width=256)
    ids = jnp.zeros((N, 1), jnp.int32)
    # Outside jit, where the compiler cannot skip a rounding that the code asks for.
    np.testing.assert_allclose(blocks.product(hidden, unembed), float64(reference.logits, hidden, unembed), rtol=1e-4, atol=1e-4)
    values, best, total = topk(hidden, unembed, 4, 16)
    expected = float64(lambda h, w: reference.topk(h, w, 4), hidden, unembed)
    np.testing.assert_allclose(values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(total, expected[2], rtol=1e-5)
    exact = float64(reference.logits, hidden, unembed)[:, :1]
    np.testing.assert_allclose(gather_logits(hidden, unembed, ids), exact, rtol=1e-5, atol=1e-4)
    grads = jax.jit(jax.grad(lambda h, w: jnp.sum(gather_logits(h, w, ids)), (0, 1)))(hidden, unembed)
    assert [values.dtype, best.dtype, grads[0].dtype, grads[1].dtype] == [jnp.float32, jnp.int32, jnp.bfloat16, jnp.bfloat16]


def test_no_array_of_all_tokens_over_all_ids(largest):
    hidden, unembed = arrays(tokens=512, vocab=2100, width=8)
    ids = jnp.zeros((512, 16), jnp.int32)
    limit = 512 * 2100 // 4
    cases = {
        "topk": lambda h, w: topk(h, w, 16, 64),
        "logsumexp": jax.grad(lambda h, w: jnp.sum(logsumexp(h, w, 64)), (0, 1)),
        "gather_logits": jax.grad(lambda h, w: jnp.sum(gather_logits(h, w, ids, 4096)), (0, 1)),
    }
    assert largest(jax.make_jaxpr(cases["gather_logits"])(hidden, unembed).jaxpr) < 512 * 16 * 8 // 2  # nor of all gathered rows
    for name, function in cases.items():
        assert largest(jax.make_jaxpr(function)(hidden, unembed).jaxpr) < limit, name
        assert jax.jit(function).lower(hidden, unembed).compile().memory_analysis().temp_size_in_bytes < 4 * limit, name
    dense = jax.make_jaxpr(jax.jit(lambda h, w: reference.topk(h, w, 16)))(hidden, unembed)
    assert largest(dense.jaxpr) == 512 * 2100  # the measure sees what it is meant to see


def test_sharded_tokens_change_nothing():
    hidden, unembed = arrays(tokens=64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(hidden, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    whole = jax.device_put(unembed, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def everything(h, w):
        values, ids, total = topk(h, w, 5, 16)
        grads = jax.grad(lambda h, w: jnp.sum(jnp.sin(gather_logits(h, w, ids, 512))) + jnp.sum(logsumexp(h, w, 16)), (0, 1))(h, w)
        return values, ids, total, grads

    got, expected = jax.jit(everything)(split, whole), jax.jit(everything)(hidden, unembed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize(("vocab", "block"), [(12, 4), (13, 4), (3, 8), (5, 5), (9, 8)])
def test_every_id_is_fresh_once(vocab, block):
    def body(seen, start, fresh):
        ids = start + jnp.arange(min(block, vocab))
        return seen.at[ids].add(1 if fresh is None else fresh.astype(jnp.int32))

    np.testing.assert_array_equal(blocks.each(body, jnp.zeros(vocab, jnp.int32), vocab, block), np.ones(vocab))
