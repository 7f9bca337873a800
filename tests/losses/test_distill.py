"""Salient vocabulary alignment and its two siblings, against jax.grad of dense float64 forms."""

import functools
import inspect
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.losses import divergence
from a1jax.losses.distill import distill, sva, teacher_targets

N, V, D, WIDE, K = 24, 53, 8, 12, 6  # the teacher is wider than the student

TARGETS = jax.jit(teacher_targets, static_argnums=(2, 3))


def arrays(seed=0, tokens=N, vocab=V):
    """student hidden, student unembed, teacher hidden, teacher unembed, weights (some 0)."""
    rng = np.random.default_rng(seed)
    shapes = ((tokens, D), (vocab, D), (tokens, WIDE), (vocab, WIDE))
    weights = np.where(rng.random(tokens) < 0.7, rng.random(tokens), 0)
    return tuple(jnp.asarray(x, jnp.float32) for x in (*(rng.normal(size=s) * 0.7 for s in shapes), weights))


@functools.cache
def ours(mode, k=K, block=16):
    def function(sh, sw, th, tw, weights):
        return distill(sh, sw, th, tw, weights, k=k, mode=mode, block=block)

    return jax.jit(jax.value_and_grad(function, (0, 1, 2, 3), has_aux=True))


def dense(sh, sw, th, tw, weights, mode, k, divergence):
    """The definitions, over whole logits."""
    logp, logq = jax.nn.log_softmax(sh @ sw.T), jax.nn.log_softmax(th @ tw.T)
    if mode != "full":
        support = jax.lax.top_k(logq, k)[1]
        logp, logq = (jnp.take_along_axis(x, support, axis=1) for x in (logp, logq))
    if mode == "salient":
        logp, logq = jax.nn.log_softmax(logp), jax.nn.log_softmax(logq)
    if mode == "tail":
        logp, logq = (jnp.concatenate([x, jnp.log1p(-jnp.exp(x).sum(1, keepdims=True))], axis=1) for x in (logp, logq))
    p, q = jnp.exp(logp), jnp.exp(logq)
    mean = jnp.log((p + q) / 2)
    each = {
        "reverse": p * (logp - logq),
        "forward": q * (logq - logp),
        "jensen_shannon": p * (logp - mean) / 2 + q * (logq - mean) / 2,
    }[divergence]
    return jnp.sum(weights * jnp.sum(each, axis=1))


@functools.cache
def dense_reference(mode, divergence="reverse"):
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a), jnp.float64) for a in arrays())
        function = functools.partial(dense, mode=mode, k=K, divergence=divergence)
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(function, (0, 1)))(*wide))


def close(got, expected, tolerance=1e-4):
    """Relative to the largest element of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("mode", ["salient", "tail", "full"])
def test_value_and_gradient_equal_the_dense_form(mode):
    (loss, metrics), grads = ours(mode)(*arrays())
    expected, expected_grads = dense_reference(mode)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    close(grads[:2], expected_grads)
    assert not np.asarray(grads[2]).any() and not np.asarray(grads[3]).any()  # nothing to the teacher
    sh, sw, th, tw, weights = (np.asarray(x, np.float64) for x in arrays())
    on = weights != 0
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (sh @ sw.T, th @ tw.T))
    support = np.argsort(-q, axis=1)[:, :K]
    coverage, on_support = (np.take_along_axis(x, support, axis=1) for x in (p, q))
    classes = {"salient": on_support / on_support.sum(1, keepdims=True), "full": q}
    classes["tail"] = np.concatenate([on_support, 1 - on_support.sum(1, keepdims=True)], axis=1)
    entropy = -(classes[mode] * np.log(classes[mode])).sum(1)
    assert metrics["distill/tokens"] == on.sum()
    np.testing.assert_allclose(metrics["distill/teacher_entropy"], entropy[on].mean(), rtol=1e-5)
    if mode == "full":
        assert "distill/coverage" not in metrics
    else:
        np.testing.assert_allclose(metrics["distill/coverage"], coverage.sum(1)[on].mean(), rtol=1e-5)


@pytest.mark.parametrize("mode", ["salient", "tail", "full"])
def test_every_divergence_equals_the_dense_form(mode):
    names = get_args(divergence.Divergence)[1:]  # the first is tested above

    @jax.jit
    def run(sh, sw, th, tw, weights):
        def loss(sh, sw, name):
            return distill(sh, sw, th, tw, weights, k=K, mode=mode, divergence=name, block=16, coverage=False)[0]

        return {name: jax.value_and_grad(loss, (0, 1))(sh, sw, name) for name in names}

    found = run(*arrays())
    assert set(found) == {"forward", "jensen_shannon"}
    for name, (loss, grads) in found.items():
        expected, expected_grads = dense_reference(mode, name)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        close(grads, expected_grads)


def test_divergences_by_hand():
    p, q = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    found = jax.jit(lambda p, q: {name: (jnp.sum(term(p, q)), jnp.sum(term(q, p))) for name, term in divergence.TERMS.items()})(p, q)
    # Both KLs: 1/2 log 2 - 1/4 log 2. The mean is (3/8, 1/4, 3/8).
    half = (0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)) / 2
    for name, expected in {"reverse": np.log(2) / 4, "forward": np.log(2) / 4, "jensen_shannon": 2 * half}.items():
        np.testing.assert_allclose(found[name], (expected, expected), rtol=1e-6, err_msg=name)
    p, q = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
    both = (0.9 * np.log(1.8) + 0.1 * np.log(0.2), 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5))
    for name, expected in {"reverse": both, "forward": both[::-1]}.items():  # not symmetric: which is which
        term = divergence.TERMS[name]
        np.testing.assert_allclose((jnp.sum(term(p, q)), jnp.sum(term(q, p))), expected, rtol=1e-5, err_msg=name)


def test_properties_of_the_divergences():
    rng = np.random.default_rng(8)
    p, q = (jnp.asarray(rng.normal(size=(500, 9)) * rng.choice([0.1, 3, 30], (500, 1)), jnp.float32) for _ in range(2))

    @jax.jit
    def run(p, q):
        p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        sums = lambda a, b: {name: jnp.sum(term(a, b), axis=1) for name, term in divergence.TERMS.items()}  # noqa: E731
        return sums(p, q), sums(q, p), sums(p, p)

    there, back, same = jax.tree.map(np.asarray, run(p, q))
    assert all((x > 0).all() for x in there.values()) and not any(x.any() for name, x in same.items() if name != "jensen_shannon")
    np.testing.assert_allclose(there["jensen_shannon"], back["jensen_shannon"], rtol=1e-5)
    np.testing.assert_allclose(there["forward"], back["reverse"], rtol=1e-6)
    assert (there["jensen_shannon"] <= np.log(2) + 1e-6).all() and there["jensen_shannon"].max() > 0.69  # some hardly overlap
    np.testing.assert_allclose(same["jensen_shannon"], 0, atol=1e-6)


def student_and_teacher(student, teacher):
    """One token whose log-probabilities are these: hidden 1, the output matrix holds the logits."""
    student, teacher = (jnp.log(jnp.asarray(x, jnp.float32))[:, None] for x in (student, teacher))
    return jnp.ones((1, 1)), student, jnp.ones((1, 1)), teacher, jnp.ones(1)


def test_the_worked_case_of_the_design():
    # The teacher has (.5, .4) on its top two, the student 8.2e-5 on each: renormalised it looks almost right, it is not.
    case = student_and_teacher([8.2e-5, 8.2e-5, 1 - 1.64e-4], [0.5, 0.4, 0.1])
    found = jax.jit(lambda *a: {mode: distill(*a, k=2, mode=mode) for mode in ("salient", "tail", "full")})(*case)
    np.testing.assert_allclose(found["salient"][0], 0.00621, atol=1e-5)
    np.testing.assert_allclose(found["tail"][0], 2.3006, rtol=1e-4)
    np.testing.assert_allclose(found["full"][0], 2.3006, rtol=1e-4)  # one id outside S: the tail is exact
    np.testing.assert_allclose(found["salient"][1]["distill/coverage"], 1.64e-4, rtol=1e-3)
    np.testing.assert_allclose(found["salient"][1]["distill/teacher_entropy"], -(5 / 9 * np.log(5 / 9) + 4 / 9 * np.log(4 / 9)), rtol=1e-5)


def test_the_gradient_on_the_support_is_the_closed_form():
    batch = arrays()
    targets = TARGETS(batch[2], batch[3], K, 16)
    # With the identity as output matrix the hidden states are the student's logits, and their gradient is the one of the design.
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(N, V)), jnp.float32)
    weights = batch[4]
    grad = jax.jit(jax.grad(lambda x: sva(x, jnp.eye(V), targets.logits, targets.support, weights, coverage=True)[0]))(logits)
    support = np.asarray(targets.support)
    p = np.exp(np.take_along_axis(np.asarray(logits, np.float64), support, axis=1))
    q = np.exp(np.asarray(targets.logits, np.float64))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl = (p * np.log(p / q)).sum(1, keepdims=True)
    expected = np.zeros((N, V))
    np.put_along_axis(expected, support, np.asarray(weights)[:, None] * p * (np.log(p / q) - kl), axis=1)
    close(grad, expected)
    outside = np.ones((N, V), bool)
    np.put_along_axis(outside, support, False, axis=1)
    assert not np.asarray(grad)[outside].any()  # exactly zero, though coverage looked there
    assert not np.asarray(grad)[np.asarray(weights) == 0].any()


@pytest.mark.parametrize("mode", ["salient", "tail", "full"])
def test_masked_tokens_have_no_gradient(mode):
    batch = arrays()
    grads = ours(mode)(*batch)[1]
    masked = np.asarray(batch[4]) == 0
    assert masked.any() and not np.asarray(grads[0])[masked].any() and np.asarray(grads[0])[~masked].any(axis=1).all()
    (loss, metrics), grads = ours(mode)(*batch[:4], 0 * batch[4])
    assert loss == 0 and not any(np.asarray(g).any() for g in grads) and metrics["distill/kl"] == 0


def test_larger_supports():
    batch = arrays(seed=5)

    @jax.jit
    def coverages(*a):
        return [distill(*a, k=k, block=16)[1]["distill/coverage"] for k in (1, 2, 20, V)]

    found = np.asarray(coverages(*batch))
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(found[-1], 1, rtol=1e-6)


def test_the_whole_vocabulary_as_support_is_the_full_divergence():
    (full, _), full_grads = ours("full")(*arrays())
    (salient, _), grads = ours("salient", V)(*arrays())
    np.testing.assert_allclose(salient, full, rtol=1e-5)
    close(grads[:2], jax.tree.map(np.asarray, full_grads[:2]))
    tail, _ = jax.jit(functools.partial(distill, k=V, mode="tail", block=16))(*arrays())
    np.testing.assert_allclose(tail, full, rtol=1e-5)


@pytest.mark.parametrize("mode", ["salient", "tail", "full"])
def test_the_names_of_ids_do_not_matter(mode):
    sh, sw, th, tw, weights = arrays()
    order = np.random.default_rng(4).permutation(V)
    (loss, metrics), grads = ours(mode)(sh, sw, th, tw, weights)
    (again, metrics_again), grads_again = ours(mode)(sh, sw[order], th, tw[order], weights)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    close(metrics_again, jax.tree.map(np.asarray, metrics), 1e-5)
    close((grads_again[0], grads_again[1]), (np.asarray(grads[0]), np.asarray(grads[1])[order]))


def test_never_negative_and_zero_only_for_equals():
    rng = np.random.default_rng(6)
    eye = jnp.eye(V)
    support = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None, :], (1, K))

    @jax.jit
    def losses(student, teacher):  # [salient, tail] per token
        def one(pair):
            s, t = (x[None] for x in pair)
            total = jax.nn.logsumexp(t, axis=1)
            common = {"teacher_logsumexp": total, "coverage": False}
            return jnp.stack([sva(s, eye, t[:, :K], support, jnp.ones(1), mode=mode, **common)[0] for mode in ("salient", "tail")])

        return jax.lax.map(one, (student, teacher))

    student, teacher = (jnp.asarray(rng.normal(size=(200, V)) * 3, jnp.float32) for _ in range(2))
    assert (np.asarray(losses(student, teacher)) > 1e-3).all()
    np.testing.assert_allclose(losses(teacher, teacher), 0, atol=1e-6)
    shifted = np.asarray(losses(teacher.at[:, K:].add(2.0), teacher))  # the same on S up to a constant: only the tail sees it
    np.testing.assert_allclose(shifted[:, 0], 0, atol=1e-6)
    assert (shifted[:, 1] > 1e-4).all()


@pytest.mark.parametrize("mode", ["salient", "tail", "full"])
def test_blocks_and_micro_batches_change_nothing(mode):
    batch = arrays()
    (loss, _), grads = ours(mode)(*batch)
    halves = [(sh, batch[1], th, batch[3], w) for sh, th, w in zip(*(np.split(batch[i], 2) for i in (0, 2, 4)), strict=True)]
    parts = [ours(mode, block=V)(*half) for half in halves]
    np.testing.assert_allclose(sum(p[0][0] for p in parts), loss, rtol=1e-5)
    close(jnp.concatenate([p[1][0] for p in parts]), np.asarray(grads[0]))
    close(sum(p[1][1] for p in parts), np.asarray(grads[1]))


@pytest.mark.parametrize("mode", ["tail", "full"])
def test_padding_rows_count_in_nothing(mode):
    sh, sw, th, tw, weights = arrays()
    valid = np.arange(V + 7) < V
    loud = [jnp.concatenate([w, jnp.full((7, w.shape[1]), 50.0)]) for w in (sw, tw)]
    call = functools.partial(distill, k=K, mode=mode, block=16, valid=valid)
    loss, grads = jax.jit(jax.value_and_grad(lambda a, b: call(a, b, th, loud[1], weights)[0], (0, 1)))(sh, loud[0])
    (expected, _), expected_grads = ours(mode)(sh, sw, th, tw, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    close((grads[0], grads[1][:V]), jax.tree.map(np.asarray, expected_grads[:2]))
    assert not np.asarray(grads[1][V:]).any()


def test_a_place_no_id_takes_counts_nothing():
    sh, sw, th, tw, weights = arrays()
    targets = TARGETS(th, tw, K, 16)
    logits = jnp.concatenate([targets.logits, jnp.full((N, 2), -jnp.inf)], axis=1)
    support = jnp.concatenate([targets.support, jnp.full((N, 2), -1)], axis=1)
    run = jax.jit(jax.value_and_grad(lambda a, b: sva(a, b, logits, support, weights, block=16)[0], (0, 1)))
    (expected, _), grads = ours("salient")(sh, sw, th, tw, weights)
    close(run(sh, sw), jax.tree.map(np.asarray, (expected, grads[:2])), 1e-5)


@pytest.mark.parametrize("mode", ["salient", "tail", "full"])
def test_no_array_of_all_tokens_over_all_ids(largest, mode):
    batch = arrays(tokens=512, vocab=2100)
    run = ours(mode, 16, 64)
    assert largest(jax.make_jaxpr(run)(*batch).jaxpr) < 512 * 2100 // 8
    if mode != "tail":
        return  # what the others compile to is made of the same loops
    assert run.lower(*batch).compile().memory_analysis().temp_size_in_bytes < 4 * 512 * 2100 // 2


def test_without_coverage_the_vocabulary_is_not_walked(largest):
    sh, sw, th, tw, weights = arrays()
    targets = TARGETS(th, tw, K, 16)
    for coverage in (True, False):
        run = jax.make_jaxpr(lambda a, b, c=coverage: sva(a, b, targets.logits, targets.support, weights, coverage=c, block=V))
        assert (largest(run(sh, sw).jaxpr) >= N * V) == coverage


@pytest.mark.parametrize("mode", ["salient", "tail"])
def test_coverage_that_is_decided_at_run_time(mode):
    sh, sw, th, tw, weights = arrays()
    targets = TARGETS(th, tw, K, 16)

    @jax.jit
    def run(sh, sw, coverage):
        def loss(sh, sw):
            common = {"teacher_logsumexp": targets.logsumexp, "mode": mode, "block": 16}
            return sva(sh, sw, targets.logits, targets.support, weights, coverage=coverage, **common)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(sh, sw)

    (expected, metrics), grads = ours(mode)(sh, sw, th, tw, weights)
    for coverage in (True, False):
        (found, some), found_grads = run(sh, sw, coverage)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        close(found_grads, jax.tree.map(np.asarray, grads[:2]), 1e-6)
        assert some["distill/tokens"] == metrics["distill/tokens"] > 0
        assert some["distill/coverage_tokens"] == coverage * metrics["distill/tokens"]
        np.testing.assert_allclose(some["distill/coverage"], coverage * metrics["distill/coverage"], rtol=1e-6)
        assert set(some) == {*metrics, "distill/coverage_tokens"}


def test_tokens_of_low_coverage_are_compared_with_the_rest():
    sh, sw, th, tw, weights = arrays()
    targets = TARGETS(th, tw, K, 16)

    def losses(sh, sw, tail_below, mode="salient", coverage=True):
        common = {"teacher_logsumexp": targets.logsumexp, "block": 16, "coverage": coverage, "mode": mode}
        return sva(sh, sw, targets.logits, targets.support, weights, tail_below=tail_below, **common)

    run = jax.jit(jax.value_and_grad(losses, (0, 1), has_aux=True), static_argnums=(2, 3))
    covered = np.exp(jnp.take_along_axis(jax.nn.log_softmax(sh @ sw.T), targets.support, axis=1)).sum(1)
    bound = float(np.median(covered[weights > 0]))
    low = covered < bound
    assert 0 < (low & (weights > 0)).sum() < (weights > 0).sum()
    ((value, metrics), grads), expected, expected_grads = run(sh, sw, bound), 0.0, (0.0, 0.0)
    for mode, rows in (("salient", ~low), ("tail", low)):
        with jax.enable_x64(True):
            wide = (jnp.asarray(np.asarray(a), jnp.float64) for a in (sh, sw, th, tw, weights * rows))
            form = functools.partial(dense, mode=mode, k=K, divergence="reverse")
            part, part_grads = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(form, (0, 1)))(*wide))
        expected, expected_grads = expected + part, tuple(a + b for a, b in zip(expected_grads, part_grads, strict=True))
    close((value, grads), (expected, expected_grads))
    np.testing.assert_allclose(metrics["distill/tail"], low[weights > 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["distill/coverage"], covered[weights > 0].mean(), rtol=1e-5)
    close(run(sh, sw, 1.0)[0][0], np.asarray(run(sh, sw, 0.0, "tail")[0][0]), 1e-6)  # all of them
    traced, out = jax.jit(lambda c: losses(sh, sw, bound, coverage=c))(False)
    np.testing.assert_allclose(traced, value, rtol=1e-6)
    assert out["distill/coverage_tokens"] == 0 and out["distill/tail"] == metrics["distill/tail"]


def test_a_student_that_writes_what_its_teacher_never_would_pays_only_with_the_rest():
    """Nearly all of its mass lies outside S, and on S it agrees: renormalised, the loss is 0 and has no gradient to speak of."""
    case = student_and_teacher([0.002, 0.001, 0.997], [0.9999 * 2 / 3, 0.9999 / 3, 1e-4])

    def run(below):
        return jax.jit(jax.value_and_grad(lambda *a: distill(*a, k=2, tail_below=below)[0]))(*case)

    value, grad = run(0.0)
    assert abs(value) < 1e-5 and np.abs(grad).max() < 1e-5
    value, grad = run(0.5)
    np.testing.assert_allclose(value, 0.003 * np.log(0.003 / 0.9999) + 0.997 * np.log(0.997 / 1e-4), rtol=1e-3)
    assert np.abs(grad).max() > 0.01


def test_log_rest():
    mass = np.asarray([-50.0, -3.0, -0.7, -0.6, -1e-3, -1e-6])
    rest = jax.jit(jax.vmap(jax.value_and_grad(divergence.log_rest)))
    value, slope = rest(jnp.asarray(mass, jnp.float32))
    np.testing.assert_allclose(value, np.log(-np.expm1(mass)), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(slope, -np.exp(mass) / -np.expm1(mass), rtol=1e-4)
    value, slope = rest(jnp.asarray([0.0, 1e-6], jnp.float32))  # rounding may bring a whole mass above 1
    np.testing.assert_allclose(value, np.log(divergence.LEAST_REST), rtol=1e-6)
    assert not np.asarray(slope).any()


def test_wrong_arguments_are_refused():
    sh, sw, th, tw, weights = arrays()
    logits, support, _ = TARGETS(th, tw, K, 16)
    unchecked = inspect.unwrap(sva)  # as outside the tests, where nothing checks that a Literal is one
    with pytest.raises(ValueError, match="mode is 'topk', choose one of salient"):
        unchecked(sh, sw, logits, support, weights, mode="topk")
    with pytest.raises(ValueError, match="call distill"):
        sva(sh, sw, logits, support, weights, mode="full")
    for wrong in ({"mode": "tail"}, {"tail_below": 0.5}):
        with pytest.raises(ValueError, match="need teacher_logsumexp"):
            sva(sh, sw, logits, support, weights, **wrong)
    for wrong in ({"tail_below": 1.5}, {"tail_below": -0.1}, {"tail_below": 0.5, "mode": "tail"}):
        with pytest.raises(ValueError, match="tail_below is .* it is a share"):
            sva(sh, sw, logits, support, weights, teacher_logsumexp=logits[:, 0], **wrong)
    with pytest.raises(ValueError, match="must be"):
        sva(sh, sw, logits, support[:, 1:], weights)
    with pytest.raises(ValueError, match="needs one vocabulary"):
        distill(sh, sw, th, tw[1:], weights, mode="full")
    with pytest.raises(ValueError, match="k is 54"):
        distill(sh, sw, th, tw, weights, k=V + 1)
    with pytest.raises(ValueError, match="choose one of reverse"):
        inspect.unwrap(divergence.term)("jensen")
    with pytest.raises(ValueError, match="alone .* needs members"):
        sva(sh, sw, logits, support, weights, alone=jnp.zeros(N, jnp.int32))
