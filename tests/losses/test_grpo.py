"""The GRPO loss: values by hand, gradients in closed form, and what must change neither."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.losses.grpo import grpo, kl_estimate, policy_weights

weigh = jax.jit(policy_weights, static_argnames=("reduction", "length", "samples"))
BARE = {"kl_coefficient": 0.0, "entropy_coefficient": 0.0}


@jax.jit
def _per_token(logp, old_logp, advantages):
    return jax.vmap(lambda *x: jax.value_and_grad(lambda *y: grpo(*y, jnp.float32(1), **BARE)[0])(*x))(logp, old_logp, advantages)


def of(loss_arguments, **settings_):
    """(loss, metrics, gradient to logp) of arrays by name, computed in one program."""
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in loss_arguments.items()}

    def run(logp, rest):
        return grpo(logp, **rest, **settings_)

    rest = {name: value for name, value in arrays.items() if name != "logp"}
    (loss, metrics), grad = jax.jit(jax.value_and_grad(run, has_aux=True))(arrays["logp"], rest)
    return float(loss), {name: float(x) for name, x in metrics.items()}, np.asarray(grad)


# Every side of the clip: (ratio, advantage) -> (policy term, its gradient to logp), by hand with the paper's [0.2, 0.28].
CASES = [
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.2, 2.0, -2.4, -2.4),  # inside the upper end; with 0.2 above it would lie on it
    (1.27, 1.0, -1.27, -1.27),
    (1.5, 2.0, -2.56, 0.0),  # 1.28 * 2
    (0.5, 2.0, -1.0, -1.0),  # too unlikely and good: not held
    (0.5, -2.0, 1.6, 0.0),  # 0.8 * 2
    (0.85, -2.0, 1.7, 1.7),
    (1.5, -2.0, 3.0, 3.0),  # too likely and bad: not held without the dual clip
    (5.0, -2.0, 10.0, 10.0),
    (5.0, 0.0, 0.0, 0.0),
]


def test_every_side_of_the_clip_by_hand():
    ratio, advantage, value, gradient = np.asarray(CASES).T
    found, grads = _per_token(
        jnp.asarray(np.log(ratio) - 1.5, jnp.float32), jnp.full(len(CASES), -1.5), jnp.asarray(advantage, jnp.float32)
    )
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(grads, gradient, rtol=1e-5)


def arguments(**more):
    tokens = len(CASES)
    ratio, advantage, _, _ = np.asarray(CASES).T
    old = np.linspace(-3, -0.1, tokens)
    return {"logp": old + np.log(ratio), "old_logp": old, "advantages": advantage, "weights": np.full(tokens, 1 / tokens), **more}


def test_metrics_of_the_clip_and_the_dual_clip():
    n = len(CASES)
    loss, metrics, grad = of(arguments(), **BARE)
    np.testing.assert_allclose(loss, np.mean([c[2] for c in CASES]), rtol=1e-5)
    np.testing.assert_allclose(grad * n, [c[3] for c in CASES], rtol=1e-5)
    wanted = {"clipped_low": 1 / n, "clipped_high": 1 / n, "clipped_dual": 0, "tokens": n, "advantage": np.mean([c[1] for c in CASES])}
    wanted |= {"ratio": np.mean([c[0] for c in CASES]), "old_kl": np.mean([r - 1 - np.log(r) for r, *_ in CASES])}
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[f"grpo/{name}"], value, rtol=1e-5, err_msg=name)
    assert set(metrics) == {f"grpo/{name}" for name in wanted}
    loss, metrics, dual = of(arguments(), dual_clip=3.0, **BARE)
    values, grads = [c[2] for c in CASES], [c[3] for c in CASES]
    values[9], grads[9] = 6.0, 0.0  # 5 * 2 is held at 3 * 2; 1.5 is below 3 and stays
    np.testing.assert_allclose(loss, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(dual * n, grads, rtol=1e-5)
    np.testing.assert_allclose(metrics["grpo/clipped_dual"], 1 / n, rtol=1e-5)


def test_the_papers_settings_are_the_defaults():
    found = {name: p.default for name, p in inspect.signature(grpo).parameters.items()}
    assert (found["clip_low"], found["clip_high"]) == (0.2, 0.28)
    assert (found["kl_coefficient"], found["entropy_coefficient"]) == (0.001, 0.0001)
    n = len(CASES)
    ref, entropy = np.linspace(-1, -2, n), np.linspace(0.5, 3, n)
    loss, metrics, _ = of(arguments(ref_logp=ref, entropy=entropy))
    d = arguments()["logp"] - ref
    k3 = np.exp(-d) - 1 + d
    np.testing.assert_allclose(loss, np.mean([c[2] for c in CASES]) + 0.001 * k3.mean() - 0.0001 * entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose([metrics["grpo/kl"], metrics["grpo/entropy"]], [k3.mean(), entropy.mean()], rtol=1e-5)


def test_a_coefficient_of_zero_only_measures():
    n = len(CASES)
    plain, _, grad = of(arguments(), **BARE)
    loss, metrics, other = of(arguments(ref_logp=np.full(n, -1.0), entropy=np.full(n, 2.0)), **BARE)
    assert loss == plain and metrics["grpo/entropy"] == 2.0 and metrics["grpo/kl"] > 0
    np.testing.assert_array_equal(grad, other)


def test_entropy_is_raised_and_no_gradient_goes_to_the_fixed_arrays():
    n = len(CASES)
    names = ("entropy", "old_logp", "advantages", "weights", "ref_logp", "rollout_logp")
    rest = arguments(ref_logp=np.linspace(-1, -2, n), entropy=np.linspace(0.5, 3, n), rollout_logp=np.linspace(-2, -1, n))
    rest = {name: jnp.asarray(x, jnp.float32) for name, x in rest.items()}
    grads = jax.jit(jax.grad(lambda some, logp: grpo(logp, **some)[0]))({k: rest[k] for k in names}, rest["logp"])
    np.testing.assert_allclose(grads["entropy"], np.full(n, -0.0001 / n), rtol=1e-5)
    assert not any(np.asarray(grads[name]).any() for name in names[1:])


def test_kl_estimates_by_hand():
    d = np.array([0.0, 0.5, -0.5, 2.0, -2.0, 1e-4])
    logp, ref = jnp.asarray(d - 3, jnp.float32), jnp.full(6, -3.0)
    both = jax.jit(
        lambda x: {k: (kl_estimate(x, ref, k), jax.grad(lambda y, k=k: jnp.sum(kl_estimate(y, ref, k)))(x)) for k in ("k1", "k2", "k3")}
    )(logp)
    by_hand = {"k1": (d, np.ones(6)), "k2": (d**2 / 2, d), "k3": (np.expm1(-d) + d, -np.expm1(-d))}
    for kind, (value, gradient) in by_hand.items():
        np.testing.assert_allclose(both[kind][0], value, rtol=2e-3, atol=1e-7, err_msg=kind)  # -3 + 1e-4 is rounded
        np.testing.assert_allclose(both[kind][1], gradient, rtol=3e-3, atol=1e-7, err_msg=kind)
    np.testing.assert_allclose(both["k3"][0][1:3], [0.10653066, 0.14872127], rtol=1e-5)  # e^-.5 - .5 and e^.5 - 1.5


def test_kl_estimates_average_to_the_kl_and_only_k2_to_its_gradient():
    """Over a vocabulary of 5, in expectation under the policy: exact sums, no sampling."""
    rng = np.random.default_rng(0)
    logits, ref = jnp.asarray(rng.normal(size=5), jnp.float32), jax.nn.log_softmax(jnp.asarray(rng.normal(size=5), jnp.float32))

    @jax.jit
    def expected(x):
        p = jax.lax.stop_gradient(jax.nn.softmax(x))
        terms = {k: lambda y, k=k: jnp.sum(p * kl_estimate(jax.nn.log_softmax(y), ref, k)) for k in ("k1", "k2", "k3")}
        true = jax.value_and_grad(lambda y: jnp.sum(jax.nn.softmax(y) * (jax.nn.log_softmax(y) - ref)))(x)
        return true, {k: jax.value_and_grad(f)(x) for k, f in terms.items()}

    (value, gradient), found = expected(logits)
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(found[kind][0], value, rtol=1e-5)
    np.testing.assert_allclose(found["k2"][1], gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["k1"][1], 0, atol=1e-6)
    assert np.abs(found["k3"][1] - gradient).max() > 0.01


def test_far_apart_is_finite_and_still_pulls_back():
    n = 4
    far = {
        "logp": [-200.0, -0.1, -0.1, -200.0],
        "old_logp": [-0.1, -200.0, -200.0, -0.1],
        "advantages": [1, -1, 1, -1],
        "weights": [1.0] * n,
    }
    loss, metrics, grad = of({**far, "ref_logp": [-0.1, -200, -0.1, -0.1]}, entropy_coefficient=0.0, kl_coefficient=1.0)
    assert np.isfinite([loss, *metrics.values(), *grad]).all()
    assert grad[0] < 0 and grad[3] < 0  # far below the reference: logp is pulled up, whatever the advantage
    assert grad[1] > 0  # bad and far too likely: pushed down, not dropped as a clamp would


def test_truncated_ratio_between_sampler_and_training():
    apart = np.log([0.5, 1.0, 1.9, 2.1, 50.0])
    n = len(apart)
    base = {"logp": np.full(n, -1.0), "old_logp": np.full(n, -1.0), "advantages": [1, 2, -1, 1, -1], "weights": [1.0] * n}
    loss, metrics, grad = of({**base, "rollout_logp": -1 - apart}, **BARE)
    wanted = -np.asarray([0.5 * 1, 1 * 2, 1.9 * -1, 2 * 1, 2 * -1])
    np.testing.assert_allclose(loss, wanted.sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["grpo/truncated"], 2 / 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["grpo/mismatch"], np.abs(apart).mean(), rtol=1e-5)
    # KL and entropy are of the learning policy's own; they are not weighed by it.
    more = {"ref_logp": np.full(n, -2.0), "entropy": np.ones(n), "rollout_logp": -1 - apart}
    both, _, _ = of({**base, **more}, kl_coefficient=1.0, kl="k1", entropy_coefficient=1.0)
    np.testing.assert_allclose(both, wanted.sum() + n * 1.0 - n * 1.0, rtol=1e-5)
    higher, _, _ = of({**base, "rollout_logp": -1 - apart}, truncation=10.0, **BARE)
    np.testing.assert_allclose(higher, -(0.5 + 2 - 1.9 + 2.1 - 10), rtol=1e-5)


def test_tokens_without_weight_may_hold_anything():
    bad = {"logp": -np.inf, "old_logp": np.nan, "advantages": np.nan, "ref_logp": np.inf, "entropy": np.nan, "rollout_logp": -np.inf}
    n = len(CASES)
    full = arguments(ref_logp=np.full(n, -1.0), entropy=np.ones(n), rollout_logp=np.full(n, -1.0))
    clean = of({name: np.asarray(x)[2:] for name, x in full.items()})
    for name, value in bad.items():
        full[name] = np.concatenate([[value] * 2, np.asarray(full[name])[2:]])
    full["weights"][:2] = 0
    loss, metrics, grad = of(full)
    np.testing.assert_allclose(loss, clean[0], rtol=1e-6)
    np.testing.assert_allclose([metrics[k] for k in clean[1]], list(clean[1].values()), rtol=1e-5)
    assert not grad[:2].any()
    np.testing.assert_allclose(grad[2:], clean[2], rtol=1e-6)
    full["advantages"][5] = np.nan
    assert np.isnan(of(full)[0])  # where the loss looks, it is loud


ROWS, LENGTH = 4, 24
RUNS = [(7, 3), (5, 5), (12, 1), (4, 2), (9, 6), (3, 0)]  # (tokens, masked tokens at the end); the last run has none
BUDGET = 10


def lay(rows_of):
    """The runs in these rows: mask, segments, logp, old_logp, advantages [ROWS, LENGTH] and where each run went."""
    mask, segments = np.zeros((ROWS, LENGTH), np.float32), np.zeros((ROWS, LENGTH), np.int32)
    data, place = np.full((3, ROWS, LENGTH), np.nan, np.float32), {}
    for b, row in enumerate(rows_of):
        start = 0
        for number, index in enumerate(row):
            tokens, masked = RUNS[index]
            here = (b, slice(start, start + tokens))
            rng = np.random.default_rng(index)
            mask[here], segments[here] = np.arange(tokens) >= tokens - masked, number + 1
            logp = -rng.random(tokens) * 3
            data[:, *here] = logp, logp + rng.normal(size=tokens) * 0.3, np.full(tokens, rng.normal())
            place[index], start = here, start + tokens
    return mask, segments, data, place


PACKINGS = ([[0, 1, 2], [3, 4, 5]], [[5, 3], [4], [1, 0], [2]], [[2, 4, 5], [0], [], [1, 3]])
REDUCTIONS = {"sample_mean": {}, "token_mean": {}, "fixed_length": {"length": BUDGET}}


def test_weights_by_hand():
    mask, segments, _, place = lay(PACKINGS[0])
    by_hand = {"sample_mean": [1 / (5 * m) if m else 0 for _, m in RUNS], "token_mean": [1 / 17] * 6, "fixed_length": [1 / 50] * 6}
    for reduction, more in REDUCTIONS.items():
        weights = np.asarray(weigh(mask, segments, reduction, **more))
        for index, here in place.items():
            np.testing.assert_allclose(weights[here], by_hand[reduction][index] * mask[here], rtol=1e-6, err_msg=reduction)
        assert weights.dtype == np.float32 and not weights[segments == 0].any()
    # Two runs of six were filtered: divided by all eight, their tokens would have weighed the same.
    np.testing.assert_allclose(weigh(mask, segments, "fixed_length", length=BUDGET, samples=8), mask / 80, rtol=1e-6)
    padding = np.zeros_like(segments)
    assert not np.asarray(weigh(np.ones_like(mask), padding, "fixed_length", length=BUDGET)).any()


@jax.jit
def laid_loss(logp, old_logp, advantages, weights):
    return jax.value_and_grad(lambda x: grpo(x, old_logp, advantages, weights, **BARE)[0])(logp)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packing_and_micro_batches_change_nothing(reduction):
    values, grads = [], []
    for rows_of in PACKINGS:
        mask, segments, data, place = lay(rows_of)
        weights = weigh(mask, segments, reduction, **REDUCTIONS[reduction])
        loss, grad = laid_loss(*data, weights)
        values.append(float(loss))
        grads.append({index: np.asarray(grad)[here] for index, here in place.items()})
        for parts in (2, 4):
            pieces = [laid_loss(*[x[i::parts] for x in (*data, np.asarray(weights))]) for i in range(parts)]
            np.testing.assert_allclose(sum(float(p[0]) for p in pieces), values[-1], rtol=1e-5)
            for i, piece in enumerate(pieces):
                np.testing.assert_array_equal(piece[1], np.asarray(grad)[i::parts])
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    for other in grads[1:]:
        for index, grad in grads[0].items():
            np.testing.assert_array_equal(grad, other[index])
    # and the value is the definition: runs one by one, in float64
    per_run, masked = [], []
    for index in range(len(RUNS)):
        mask, _, data, place = lay([[index]])
        at = np.zeros_like(mask, bool)
        at[place[index]] = mask[place[index]] > 0
        logp, old, advantage = (x[at].astype(np.float64) for x in data)
        ratio = np.exp(logp - old)
        per_run.append(-np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage))
        masked.append(len(logp))
    some = [x for x in per_run if len(x)]
    definition = {
        "sample_mean": np.mean([x.mean() for x in some]),
        "token_mean": np.concatenate(some).mean(),
        "fixed_length": np.mean([x.sum() / BUDGET for x in some]),
    }
    np.testing.assert_allclose(values[0], definition[reduction], rtol=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-2, 2)), min_size=8, max_size=8))
def test_the_clip_is_pessimistic_and_on_policy_it_is_the_policy_gradient(tokens):
    apart, advantage = np.asarray(tokens, np.float32).T
    found, grads = _eight(jnp.asarray(apart), jnp.asarray(advantage))
    ratio = np.exp(apart.astype(np.float64))
    assert (found >= -ratio * advantage - 1e-4).all()  # never better than the unclipped surrogate
    wanted = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    held = np.abs(wanted + ratio * advantage) > 1e-3
    assert not np.asarray(grads)[held].any()
    _, here = _eight(jnp.zeros(8), jnp.asarray(advantage))
    np.testing.assert_allclose(here, -advantage, rtol=1e-6, atol=1e-30)  # ratio 1: REINFORCE with this advantage


@jax.jit
def _eight(apart, advantage):
    return jax.vmap(lambda d, a: jax.value_and_grad(lambda x: grpo(x, jnp.float32(0), a, jnp.float32(1), **BARE)[0])(d))(apart, advantage)


def test_wrong_arguments_are_refused():
    x, segments = np.zeros(3, np.float32), np.ones((2, 3), np.int32)
    mask = np.ones((2, 3), np.float32)
    for wrong, match in (
        ({}, "the coefficient of ref_logp is 0.001"),
        ({"ref_logp": x}, "the coefficient of entropy is 0.0001"),
        ({**BARE, "rollout_logp": x[:2]}, r"one shape: logp \(3,\).*rollout_logp \(2,\)"),
        ({**BARE, "clip_low": 1.2}, "clip_low is 1.2"),
        ({**BARE, "clip_high": -0.1}, "clip_high -0.1"),
        ({**BARE, "dual_clip": 1.0}, "dual_clip is 1.0"),
        ({**BARE, "truncation": 0.0}, "truncation is 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            grpo(x, x, x, x, **wrong)
    unchecked = inspect.unwrap(policy_weights)  # as outside the tests, where nothing checks that a Literal is one
    for wrong, match in (
        ({"reduction": "mean"}, "choose one of sample_mean"),
        ({"length": 5}, "belong to reduction 'fixed_length', not to 'sample_mean'"),
        ({"reduction": "fixed_length"}, "needs a length"),
        ({"reduction": "fixed_length", "length": 0}, "got length 0"),
        ({"reduction": "fixed_length", "length": 5, "samples": 0}, "samples 0"),
    ):
        with pytest.raises(ValueError, match=match):
            unchecked(mask, segments, **wrong)
    with pytest.raises(ValueError, match=r"must be \[B, T\] alike"):
        unchecked(mask[:1], segments)
    with pytest.raises(ValueError, match="choose one of k1, k2, k3"):
        inspect.unwrap(kl_estimate)(x, x, "k4")
