"""The blocked cross-entropy against optax's dense one in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax.losses.cross_entropy import blocked_cross_entropy

N, D, V = 96, 12, 103


def arrays(dtype=jnp.float32, tokens=N, vocab=V, width=D):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    unembed = jnp.asarray(rng.normal(size=(vocab, width)), dtype)
    weights = np.where(rng.random(tokens) < 0.4, rng.random(tokens), 0).astype(np.float32)
    return hidden, unembed, jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32), jnp.asarray(weights)


@functools.cache
def ours(block, tile):
    def function(hidden, unembed, targets, weights):
        return blocked_cross_entropy(hidden, unembed, targets, weights, block, tile)

    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))


def dense(hidden, unembed, targets, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ unembed.T, targets)
    return jnp.sum(jnp.where(weights != 0, weights * losses, 0))


REFERENCE = jax.jit(jax.value_and_grad(dense, (0, 1)))


def float64(hidden, unembed, targets, weights):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, unembed, weights)]
        return jax.tree.map(np.asarray, REFERENCE(*wide[:2], jnp.asarray(targets), wide[2]))


def close(got, expected, tolerance=1e-4):
    """Relative to the largest element of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("block", "tile"), [(20, None), (103, None), (20, 16), (102, 7), (4096, 1000)])
def test_equals_the_dense_form(block, tile):
    (loss, metrics), grads = ours(block, tile)(*arrays())
    expected, expected_grads = float64(*arrays())
    close(loss, expected, 1e-5)
    close(grads, expected_grads)
    hidden, unembed, targets, weights = (np.asarray(x) for x in arrays())
    on = weights != 0
    logits = hidden @ unembed.T
    plain = np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, targets[:, None], 1)[:, 0]
    np.testing.assert_allclose(metrics["ce/loss"], plain[on].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ce/accuracy"], (logits.argmax(1) == targets)[on].mean(), rtol=1e-6)
    assert metrics["ce/tokens"] == on.sum()


def test_the_value_alone_is_the_same():
    value, _ = jax.jit(lambda *a: blocked_cross_entropy(*a, 20, 16))(*arrays())  # not differentiated: another path
    np.testing.assert_allclose(value, ours(20, 16)(*arrays())[0][0], rtol=1e-6)


def test_value_by_hand():
    # logits (0, ln 2, ln 5) and (ln 6, ln 2, 0): losses ln 8 - ln 2 and ln 9 - ln 6
    hidden, unembed = jnp.eye(2), jnp.log(jnp.asarray([[1.0, 6.0], [2.0, 2.0], [5.0, 1.0]]))
    (loss, metrics), _ = ours(2, None)(hidden, unembed, jnp.asarray([1, 0]), jnp.asarray([0.25, 0.5]))
    np.testing.assert_allclose(loss, 0.25 * np.log(4) + 0.5 * np.log(1.5), rtol=1e-6)
    np.testing.assert_allclose(metrics["ce/loss"], (np.log(4) + np.log(1.5)) / 2, rtol=1e-6)
    assert metrics["ce/accuracy"] == 0.5


@pytest.mark.parametrize("block", [2, 9])
def test_accuracy_breaks_ties_by_the_lowest_id(block):
    unembed = jnp.asarray([0.0, 1, 1, 0, 1, 0, 1, 0, 0])[:, None]  # ids 1, 2, 4 and 6 are all best
    targets = jnp.asarray([1, 2, 4, 6, 0])
    _, metrics = jax.jit(blocked_cross_entropy, static_argnums=4)(jnp.ones((5, 1)), unembed, targets, jnp.ones(5), block)
    np.testing.assert_allclose(metrics["ce/accuracy"], 0.2)


@pytest.mark.parametrize("tile", [None, 16])
def test_masked_tokens_have_no_gradient_whatever_their_target(tile):
    hidden, unembed, targets, weights = arrays()
    clean = ours(20, tile)(hidden, unembed, targets, weights)
    wild = ours(20, tile)(hidden, unembed, jnp.where(weights == 0, -100, targets), weights)
    jax.tree.map(np.testing.assert_array_equal, wild, clean)
    assert not np.asarray(clean[1][0])[np.asarray(weights) == 0].any()
    assert np.asarray(clean[1][0])[np.asarray(weights) != 0].all()
    assert np.isinf(ours(20, tile)(hidden, unembed, targets.at[jnp.argmax(weights)].set(V), weights)[0][0])  # a real one is loud


@pytest.mark.parametrize("tile", [None, 16])
def test_nothing_masked_in(tile):
    hidden, unembed, targets, weights = arrays()
    (loss, metrics), grads = ours(20, tile)(hidden, unembed, targets, 0 * weights)
    assert loss == 0 and not any(np.asarray(g).any() for g in grads) and metrics["ce/tokens"] == 0 and metrics["ce/loss"] == 0


def test_micro_batches_add_up():
    batch = arrays()
    (loss, _), grads = ours(20, None)(*batch)
    parts = [ours(20, 16)(x[0], batch[1], *x[1:]) for x in zip(*(np.split(batch[i], 3) for i in (0, 2, 3)), strict=True)]
    np.testing.assert_allclose(sum(p[0][0] for p in parts), loss, rtol=1e-6)
    close((jnp.concatenate([p[1][0] for p in parts]), sum(p[1][1] for p in parts)), jax.tree.map(np.asarray, grads), 1e-5)


def test_bfloat16_inputs():
    batch = arrays(jnp.bfloat16, width=256)
    (loss, _), grads = ours(40, 32)(*batch)
    expected, expected_grads = float64(*batch)
    close(loss, expected)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16] and loss.dtype == jnp.float32
    close(grads, expected_grads, 2**-8)  # the accumulation is exact to float32; what is left is the rounding of the result


def test_the_cotangent_scales_the_gradient():
    batch = arrays()
    scaled = jax.jit(jax.grad(lambda h: jnp.sin(3 * blocked_cross_entropy(h, *batch[1:], 20)[0])))(batch[0])
    (loss, _), grads = ours(20, None)(*batch)
    close(scaled, np.asarray(grads[0]) * 3 * np.cos(3 * float(loss)))


@pytest.mark.parametrize("tile", [None, 64])
def test_no_array_of_all_tokens_over_all_ids(largest, tile):
    batch = arrays(tokens=512, vocab=2100, width=8)

    def run(*batch):
        return ours(64, tile)(*batch)

    assert largest(jax.make_jaxpr(run)(*batch).jaxpr) < 512 * 2100 // 8
    if tile is not None:
        return  # its compiled form is one of smaller tiles
    assert jax.jit(run).lower(*batch).compile().memory_analysis().temp_size_in_bytes < 4 * 512 * 2100 // 4
    assert largest(jax.make_jaxpr(jax.jit(dense))(*batch).jaxpr) >= 512 * 2100  # the measure sees what it is meant to see


def test_sharded_tokens_change_nothing():
    batch = arrays()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = [jax.sharding.PartitionSpec(*a) for a in (("data",), (), ("data",), ("data",))]
    split = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip(batch, specs, strict=True)]
    got, expected = ours(20, None)(*split), ours(20, None)(*batch)
    close(got, jax.tree.map(np.asarray, expected), 1e-5)


def test_shapes_that_do_not_match_are_refused():
    hidden, unembed, targets, weights = arrays()
    with pytest.raises(ValueError, match="one width D"):
        blocked_cross_entropy(hidden[:, 1:], unembed, targets, weights, 16)
    with pytest.raises(ValueError, match="one per hidden state"):
        blocked_cross_entropy(hidden, unembed, targets[1:], weights, 16)
