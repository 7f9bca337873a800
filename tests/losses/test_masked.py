"""Token weights: values by hand, and what must not change them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.losses.masked import token_weights

weigh = jax.jit(token_weights, static_argnames=("num_domains", "reduction"))
REDUCTIONS = ("token_mean", "sample_mean", "domain_mean")


ROWS, LENGTH = 8, 40  # one shape for all tests, so that each reduction compiles once


def pack(samples, rows):
    """samples: (mask list, domain) each, into rows given as lists of sample indices. Returns mask, segments, domains, places."""
    mask, segments, domains = np.zeros((ROWS, LENGTH), np.float32), *np.zeros((2, ROWS, LENGTH), np.int32)
    place = {}
    for b, row in enumerate(rows):
        start = 0
        for number, index in enumerate(row):
            m, domain = samples[index]
            here = (b, slice(start, start + len(m)))
            mask[here], segments[here], domains[here], place[index] = m, number + 1, domain, here
            start += len(m)
    return mask, segments, domains, place


SAMPLES = [([0, 1, 1], 2), ([1], 0), ([0, 0, 1, 1, 1, 1], 0), ([0, 0], 1), ([1, 0, 1], 2), ([1, 1, 1], 0)]
# masked tokens 2, 1, 4, 0, 2, 3; the sample without any does not exist, and so neither does domain 1


def test_values_by_hand():
    mask, segments, domains, place = pack(SAMPLES, [[0, 1, 3], [2], [4, 5]])
    by_hand = {
        "token_mean": [1 / 12, 1 / 12, 1 / 12, 0, 1 / 12, 1 / 12],
        "sample_mean": [1 / 10, 1 / 5, 1 / 20, 0, 1 / 10, 1 / 15],
        # domain 0 has samples of 1, 4 and 3 tokens, domain 2 two of 2: 1/2 * 1/samples * 1/tokens
        "domain_mean": [1 / 8, 1 / 6, 1 / 24, 0, 1 / 8, 1 / 18],
    }
    for reduction, values in by_hand.items():
        weights = np.asarray(weigh(mask, segments, domains, 3, reduction))
        expected = np.zeros_like(mask)
        for index, value in enumerate(values):
            expected[place[index]] = value * np.asarray(SAMPLES[index][0])
        np.testing.assert_allclose(weights, expected, rtol=1e-6, err_msg=reduction)
        assert weights.dtype == np.float32


def random_batch(seed, rows=ROWS, length=LENGTH):
    rng = np.random.default_rng(seed)
    mask, segments, domains = np.zeros((rows, length), np.float32), *np.zeros((2, rows, length), np.int32)
    for b in range(rows):
        cuts = [0, *np.sort(rng.choice(np.arange(1, length), 5, replace=False))]
        for number, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):  # the rest of the row is padding
            segments[b, start:end], domains[b, start:end] = number + 1, rng.integers(3)
            mask[b, start:end] = rng.random(end - start) < 0.5
    return mask, segments, domains


@pytest.mark.parametrize("seed", range(4))
def test_sums(seed):
    mask, segments, domains = random_batch(seed)
    for reduction in REDUCTIONS:
        weights = np.asarray(weigh(mask, segments, domains, 3, reduction))
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
        assert ((weights > 0) == (mask > 0)).all()
    present = np.unique(domains[mask > 0])
    for domain in present:
        np.testing.assert_allclose(weights[domains == domain].sum(), 1 / len(present), rtol=1e-5)


def test_packing_rows_and_mesh_change_no_bit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    packings = [[[0, 1, 3], [2], [4, 5]], [[5, 3, 2], [4, 0, 1], []], [[i] for i in range(6)], [[0], [1], [2], [3], [4], [5], [], []]]
    for reduction in REDUCTIONS:
        found = []
        for rows in packings:
            mask, segments, domains, place = pack(SAMPLES, rows)
            arrays = (mask, segments, domains)
            if len(rows) == ROWS and reduction == "domain_mean":
                split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
                arrays = jax.device_put(arrays, split)
            weights = np.asarray(weigh(*arrays, 3, reduction))
            found.append([weights[place[i]] for i in range(6)])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=reduction)


def test_micro_batches_add_up():
    mask, segments, domains = random_batch(7)
    losses = np.random.default_rng(8).normal(size=mask.shape).astype(np.float32)
    sample_means = {}
    for b in range(mask.shape[0]):
        for s in range(1, segments[b].max() + 1):
            at = (segments[b] == s) & (mask[b] > 0)
            if at.any():
                sample_means.setdefault(int(domains[b][at][0]), []).append(losses[b][at].mean(dtype=np.float64))
    expected = np.mean([np.mean(v) for v in sample_means.values()])
    weights = np.asarray(weigh(mask, segments, domains, 3, "domain_mean"))
    for parts in (1, 2, 4, 8):
        total = sum((w * x).sum(dtype=np.float64) for w, x in zip(np.split(weights, parts), np.split(losses, parts), strict=True))
        np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_nothing_masked_in_gives_zeros_and_padding_never_counts():
    zeros = np.zeros((ROWS, LENGTH), np.int32)
    for reduction in REDUCTIONS:
        assert not np.asarray(weigh(np.zeros((ROWS, LENGTH), np.float32), zeros + 1, zeros, 3, reduction)).any()
        assert not np.asarray(weigh(np.ones((ROWS, LENGTH), np.float32), zeros, zeros, 3, reduction)).any()


def test_weights_carry_no_gradient():
    mask, segments, domains = random_batch(3)
    grad = jax.jit(jax.grad(lambda m: jnp.sum(token_weights(m, segments, domains, 3, "domain_mean") ** 2)))(jnp.asarray(mask))
    assert not np.asarray(grad).any()


def test_a_domain_out_of_range_is_loud():
    mask, segments, domains = random_batch(1)
    for bad in (3, -1):
        assert np.isnan(np.asarray(weigh(mask, segments, np.where(domains == 2, bad, domains), 3, "domain_mean"))).all()
    assert not np.isnan(np.asarray(weigh(mask, segments, np.where(mask > 0, domains, 9), 3, "domain_mean"))).any()  # not looked at


def test_wrong_arguments_are_refused():
    mask, segments, domains = random_batch(0)
    unchecked = inspect.unwrap(token_weights)  # as outside the tests, where nothing checks that a Literal is one
    with pytest.raises(ValueError, match="choose one of token_mean"):
        unchecked(mask, segments, domains, 3, "mean")
    with pytest.raises(ValueError, match=r"must be \[B, T\] alike"):
        token_weights(mask[:1], segments, domains, 3, "token_mean")
    with pytest.raises(ValueError, match="num_domains is 0"):
        token_weights(mask, segments, domains, 0, "domain_mean")
