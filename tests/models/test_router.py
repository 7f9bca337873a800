"""The router of the base model's size, 256 experts of which 8 are used, against float64 and by hand; replayed routes in one layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from a1jax import params, sharding
from a1jax.config import ConfigError
from a1jax.models import moe
from a1jax.models.config import tiny

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
E, A = 256, 8
statistics_of = jit(lambda logits, valid: moe.router_statistics(logits, moe.route(logits, A), valid))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_weights_and_statistics_of_256_experts_in_float64():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((3, 40, E)).astype(np.float32)
    valid = rng.uniform(size=(3, 40)) < 0.7
    weights, got = jit(lambda x: moe.route(x, A))(logits), statistics_of(logits, valid)
    probs = softmax(np.float64(logits))
    top = np.argsort(-probs, axis=-1)[..., :A]
    expected = np.zeros_like(probs)
    np.put_along_axis(expected, top, np.take_along_axis(probs, top, -1), -1)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-9)
    counts = np.bincount(top[valid].ravel(), minlength=E)
    np.testing.assert_allclose(got["load"], counts / counts.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["load_balance"], E * (counts / valid.sum() * probs[valid].mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(got["z"], (np.log(np.exp(np.float64(logits)).sum(-1))[valid] ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(got["entropy"], -(probs * np.log(probs)).sum(-1)[valid].mean(), rtol=1e-5)
    assert {x.dtype for x in jax.tree.leaves((weights, got))} == {jnp.dtype(jnp.float32)}


def test_by_hand():
    """Eight experts with odds 1 .. 8, the other 248 with odds that together are 1.24: everybody goes to the same eight."""
    at = np.arange(5, 5 + 8 * 30, 30)
    odds = np.full(E, 0.005)
    odds[at] = np.arange(1, 9)
    logits = jnp.broadcast_to(jnp.asarray(np.log(odds), jnp.float32), (2, 3, E))
    weights = moe.route(logits, A)
    np.testing.assert_allclose(weights[0, 0][at], np.arange(1, 9) / 36, rtol=1e-5)
    assert (weights > 0).sum() == 2 * 3 * 8
    got, total = statistics_of(logits, jnp.ones((2, 3), bool)), 36 + 1.24
    assert got["load_balance"] == pytest.approx(256 * 36 / total, rel=1e-5)  # balanced: 8
    assert got["z"] == pytest.approx(np.log(total) ** 2, rel=1e-5)
    np.testing.assert_allclose(got["load"][at], 1 / 8, rtol=1e-6)
    share = odds / total
    assert got["entropy"] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-4)


@pytest.fixture(scope="module")
def cfg():
    return tiny(d_model=16, expert_width=4, shared_expert_width=4, num_experts=10, num_experts_active=3, moe="ragged")


@pytest.fixture(scope="module")
def layer(cfg):
    return jit(lambda key: params.init(moe.specs(cfg), key))(jax.random.key(0))


@pytest.fixture(scope="module")
def routes(cfg):
    """Different experts in every row; the third token of every row chooses freely."""
    rng = np.random.default_rng(1)
    out = np.stack([rng.permutation(cfg.num_experts)[: cfg.num_experts_active] for _ in range(8 * 5)]).reshape(8, 5, -1)
    out[:, 2] = -1
    return out.astype(np.int16)


X = jax.random.normal(jax.random.key(1), (8, 5, 16))


def total(p, x, routes, cfg):
    out, aux = moe.apply(p, x, jnp.ones(x.shape[:2], bool), cfg, routes)
    return jnp.sum(out * jnp.arange(16.0)[None, None]), (out, aux)


gradient = jit(jax.value_and_grad(total, has_aux=True), static_argnums=3)


def by_definition(p, x, routes, active):
    """float64, token by token: this router's probabilities renormalised on the experts that are said, or on its own largest."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape[:-1]):
        probs = softmax(x[i] @ p["gate"])
        chosen = np.argsort(-probs)[:active] if routes[i][0] < 0 else routes[i]
        for e in chosen:
            gate, up = np.split(x[i] @ p["experts"]["gate_up_proj"][e], 2)
            out[i] += probs[e] / probs[chosen].sum() * ((gate / (1 + np.exp(-gate)) * up) @ p["experts"]["down_proj"][e])
        shared = p["shared_expert"]
        gate, up = x[i] @ shared["gate_proj"], x[i] @ shared["up_proj"]
        out[i] += (gate / (1 + np.exp(-gate)) * up) @ shared["down_proj"] / (1 + np.exp(-x[i] @ p["shared_expert_gate"]))
    return out


def test_forced_experts_equal_the_definition_and_the_router_learns(cfg, layer, routes):
    (_, (out, aux)), grads = gradient(layer, X, jnp.asarray(routes), cfg)
    p, x = jax.tree.map(lambda w: np.asarray(w, np.float64), (layer, X))
    np.testing.assert_allclose(out, by_definition(p, x, routes, 3), atol=1e-5)
    assert np.abs(out - by_definition(p, x, np.full_like(routes, -1), 3)).max() > 0.01  # the routes are not the router's own
    direction, eps = np.random.default_rng(2).standard_normal(p["gate"].shape), 1e-5
    ends = [by_definition({**p, "gate": p["gate"] + s * eps * direction}, x, routes, 3) @ np.arange(16.0) for s in (1, -1)]
    slope = (ends[0].sum() - ends[1].sum()) / (2 * eps)
    assert abs(slope) > 0.1 and (np.asarray(grads["gate"]) * direction).sum() == pytest.approx(slope, rel=1e-3)
    recorded = routes[routes[..., 0] >= 0]
    free = np.argsort(-(x[:, 2] @ p["gate"]), axis=-1)[:, :3]
    counts = np.bincount(np.r_[recorded.ravel(), free.ravel()], minlength=10)
    np.testing.assert_allclose(aux["load"], counts / counts.sum(), rtol=1e-5)  # of the experts that were used


def test_every_form_replays_alike(cfg, layer, routes):
    """Dense experts, and experts over a mesh."""
    expected = gradient(layer, X, jnp.asarray(routes), cfg)

    def check(got):
        for a, b in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))

    check(gradient(layer, X, jnp.asarray(routes), dataclasses.replace(cfg, moe="dense")))
    mesh = sharding.make_mesh({"data": 4, "expert": 2})
    rows = NamedSharding(mesh, sharding.partition_spec(("batch",), mesh))
    with jax.set_mesh(mesh):
        placed = jax.device_put(layer, params.shardings(moe.specs(cfg), mesh))
        check(gradient(placed, jax.device_put(X, rows), jax.device_put(routes, rows), cfg))


def test_a_record_is_what_was_used(cfg, layer):
    valid = jnp.arange(5)[None] < jnp.arange(8)[:, None]
    _, aux = jit(lambda x: moe.apply(layer, x, valid, cfg, record=True))(X)
    top = np.argsort(-(np.float64(X) @ np.float64(layer["gate"])), axis=-1)[..., :3]
    assert aux["routes"].dtype == jnp.int16
    np.testing.assert_array_equal(aux["routes"], np.where(valid[..., None], top, -1))  # largest weight first


def test_an_expert_named_twice_counts_once_and_none_at_all_shows():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]] * 3))
    weights = moe.route(logits, 2, jnp.array([[2, 2], [0, 9], [9, 8]]))
    np.testing.assert_allclose(weights[:2], [[0, 0, 1, 0], [1, 0, 0, 0]], rtol=1e-6)
    assert np.isnan(weights[2]).all()


def test_routes_that_do_not_fit_are_refused(cfg):
    good = np.full((4, 2, 3), -1, np.int16)
    good[:3] = [[0, 9, 4], [1, 2, 3]]
    moe.check_routes(good, cfg)
    for wrong in ([4, 4, 1], [0, 1, 10], [-1, 2, 3], [2, -1, 3]):
        bad = good.copy()
        bad[1, 1] = wrong
        with pytest.raises(ConfigError, match="3 different experts below 10"):
            moe.check_routes(bad, cfg)
    for shape in ((4, 2, 2), (4, 3, 3)):
        with pytest.raises(ConfigError, match=r"\[..., 2, 3\]"):
            moe.check_routes(np.zeros(shape, np.int16), cfg)


def test_the_router_computes_in_float32_whatever_the_rest_does(cfg, layer):
    """Ten experts whose logits differ by less than bfloat16 can tell: the last three are the largest. Others' default precision
    of a float32 matmul is fewer bits, so the program has to ask for all of them."""
    low = dataclasses.replace(cfg, compute_dtype="bfloat16")
    gate = jnp.broadcast_to(0.25 * (1 + 1e-4 * jnp.arange(10.0))[None], (16, 10))
    x = jnp.ones((8, 5, 16), jnp.bfloat16)

    def run(p, x):
        out, aux = moe.apply({**p, "gate": gate}, x, jnp.ones((8, 5), bool), low, record=True)
        return out, aux

    out, aux = jit(run)(layer, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.sort(aux["routes"], axis=-1), np.broadcast_to([7, 8, 9], (8, 5, 3)))
    assert aux["entropy"].dtype == aux["load"].dtype == jnp.float32
    text = jax.jit(run).lower(layer, x).as_text()
    matmuls = [line for line in text.splitlines() if "dot_general" in line and "tensor<16x10x" in line]
    assert len(matmuls) == 1 and "tensor<16x10xf32>" in matmuls[0] and "precision = [HIGHEST, HIGHEST]" in matmuls[0]
