import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from a1jax import params, sharding
from a1jax.models import experts, moe
from a1jax.models.config import tiny

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T = 8, 6
MESHES = [
    {"expert": 8}, {"data": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2},
    {"context": 2, "expert": 4}, {"data": 2, "context": 2, "tensor": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """Widths that occur nowhere else, so that a shape in a compiled program tells what it is."""
    return tiny(d_model=16, expert_width=12, shared_expert_width=10, moe="ragged")


@pytest.fixture(scope="module")
def layer(small):
    return jit(lambda key: params.init(moe.specs(small), key))(jax.random.key(0))


def x_of(kind, d=16):
    """Random tokens; "one": all alike, so that two experts get every token and six none; "two": half of them one token, half another."""
    x = jax.random.normal(jax.random.key(1), (B, T, d))
    if kind == "one":
        return jnp.broadcast_to(x[:1, :1], x.shape)
    return jnp.where(jnp.arange(T)[None, :, None] < 3, x[:1, :1], x[1:2, 1:2]) + jnp.zeros_like(x) if kind == "two" else x


def test_route_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    expected = [[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]]  # ties go to the lower index
    np.testing.assert_allclose(jit(moe.route, static_argnums=1)(logits, 2), expected, rtol=1e-6)


def test_many_experts_choose_as_few_do():
    logits = jnp.round(jax.random.normal(jax.random.key(0), (20, 70)), 1)  # rounded: with ties
    few, many = (jit(moe.chosen_experts, static_argnums=1)(logits[:, :n], 6) for n in (64, 70))
    for chosen, n in ((few, 64), (many, 70)):
        index = jax.lax.top_k(logits[:, :n], 6)[1]
        np.testing.assert_array_equal(chosen, np.any(np.asarray(index)[..., None] == np.arange(n), axis=1))


def naive(p, x, active):
    """float64, token by token, expert by expert."""
    p, x = jax.tree.map(lambda w: np.asarray(w, np.float64), p), np.asarray(x, np.float64)

    def silu(a):
        return a / (1 + np.exp(-a))

    out = np.zeros_like(x)
    for i in np.ndindex(x.shape[:-1]):
        logits = x[i] @ p["gate"]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        top = np.argsort(-probs, kind="stable")[:active]
        for e in top:
            gate, up = np.split(x[i] @ p["experts"]["gate_up_proj"][e], 2)
            out[i] += probs[e] / probs[top].sum() * ((silu(gate) * up) @ p["experts"]["down_proj"][e])
        shared = p["shared_expert"]
        h = (silu(x[i] @ shared["gate_proj"]) * (x[i] @ shared["up_proj"])) @ shared["down_proj"]
        out[i] += h / (1 + np.exp(-x[i] @ p["shared_expert_gate"]))
    return out


def loss(p, x, cfg):
    y, aux = moe.apply(p, x, jnp.ones((B, T), bool), cfg)
    return jnp.sum(jnp.sin(y) * jnp.arange(16.0)[None, None]) + aux["load_balance"], y


gradient = jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)


@pytest.fixture(scope="module")
def one_device(small, layer):
    return {kind: gradient(layer, x_of(kind), small) for kind in ("random", "one", "two")}


def assert_same(got, expected):
    got, expected = jax.tree_util.tree_leaves_with_path(jax.device_get(got)), jax.tree.leaves(jax.device_get(expected))
    for (path, a), b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


def test_dense_ragged_blocked_and_the_definition_agree(small, layer, one_device, monkeypatch):
    dense, blocked = (dataclasses.replace(small, moe=form, expert_block=8) for form in ("dense", "blocked"))
    for kind, expected in one_device.items():
        np.testing.assert_allclose(expected[1], naive(layer, x_of(kind), 2), atol=1e-5)
        assert_same(gradient(layer, x_of(kind), dense), expected)
        assert_same(gradient(layer, x_of(kind), blocked), expected)
    monkeypatch.setattr(experts, "DENSE_ROWS", 7)  # 48 tokens: six full steps and a padded one
    for kind in ("random", "one"):
        assert_same(jit(lambda p, x: jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x, dense))(layer, x_of(kind)), one_device[kind])
    idle = np.asarray(one_device["one"][0][0]["experts"]["down_proj"])
    assert (np.abs(idle).max((1, 2)) > 0).sum() == 2  # six experts without a token


@pytest.mark.parametrize("i", range(len(MESHES)))
def test_every_mesh_equals_one_device(i, small, layer, one_device, monkeypatch):
    """Outputs and gradients, the forms in turn, with idle experts and with two experts that get everything."""
    cfg = dataclasses.replace(small, moe=("ragged", "dense", "blocked")[i % 3])
    check_mesh(MESHES[i], cfg, layer, one_device, monkeypatch)


def test_tokens_may_be_gathered_along_the_length_too(small, layer, one_device, monkeypatch):
    """Context cuts experts as well: the forms for CPUs then gather pieces of rows."""
    cfg = dataclasses.replace(small, moe="dense")
    check_mesh({"expert": 2, "context": 2, "tensor": 2}, cfg, layer, one_device, monkeypatch)


def check_mesh(shape, cfg, layer, one_device, monkeypatch):
    monkeypatch.setattr(experts, "DENSE_ROWS", 3)
    mesh = sharding.make_mesh(shape)
    placed = jax.device_put(layer, params.shardings(moe.specs(cfg), mesh))
    rows = NamedSharding(mesh, sharding.partition_spec(("batch", "length", "hidden"), mesh))
    run = jit(lambda p, x: jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x, cfg))
    with jax.set_mesh(mesh):
        compiled = run.lower(placed, jax.device_put(x_of("random"), rows)).compile()
        for kind, expected in one_device.items():
            assert_same(compiled(placed, jax.device_put(x_of(kind), rows)), expected)
    forbid_moving_experts(compiled.as_text(), shape)


def forbid_moving_experts(text, mesh):
    """Nothing as wide as an expert is gathered or exchanged; gradients may be summed over devices that hold the same expert."""
    moved = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    assert not [shape for shape, _ in moved if re.search(r"\b(24|12)\b", shape)]
    assert moved or mesh.get("fsdp", mesh.get("expert", 1)) == 1  # tokens do move


def test_gradients_of_experts_are_summed_in_the_type_they_are_stored_in(small, layer, monkeypatch):
    """bfloat16 activations: the weights' gradients are as close to float32's after 128 steps of rows as after one. A sum in bfloat16 would
    be off by three times as much."""
    monkeypatch.setattr(experts, "DENSE_ROWS", 8)
    cfg = dataclasses.replace(small, moe="dense")
    x = jax.random.normal(jax.random.key(4), (1, 1024, 16)) + 1

    def total(p, x):
        return jnp.sum(jnp.sin(moe.apply(p, x, jnp.ones((1, x.shape[1]), bool), cfg)[0].astype(jnp.float32)))

    gradients = [jit(jax.grad(total))(layer, x.astype(dtype))["experts"] for dtype in (jnp.float32, jnp.bfloat16)]
    for exact, low in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert low.dtype == jnp.float32
        assert 0 < np.linalg.norm(low - exact) < 0.006 * np.linalg.norm(exact)


statistics_of = jit(moe.router_statistics)


def test_statistics_by_hand_without_padding():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])) + jnp.array([[0.0], [1.0], [5.0]])
    statistics = statistics_of(logits[None], moe.route(logits, 1)[None], jnp.array([[True, True, False]]))
    assert statistics["load_balance"] == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.45), rel=1e-5)
    assert statistics["z"] == pytest.approx((0 + 1) / 2, abs=1e-5)
    np.testing.assert_allclose(statistics["load"], [0.5, 0.5, 0.0], rtol=1e-6)
    expected = -np.mean([np.sum(p * np.log(p)) for p in np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])])
    assert statistics["entropy"] == pytest.approx(expected, rel=1e-5)
    nothing = statistics_of(logits[None], moe.route(logits, 1)[None], jnp.zeros((1, 3), bool))
    assert all(np.all(value == 0) for value in nothing.values())


def test_balanced_routing_has_a_loss_of_the_active_experts():
    logits = 1e-3 * jnp.eye(4)  # every expert chosen equally often
    logits = jnp.concatenate([logits + jnp.roll(logits, 1, axis=1)])
    statistics = statistics_of(logits[None], moe.route(logits, 2)[None], jnp.ones((1, 4), bool))
    assert statistics["load_balance"] == pytest.approx(2, rel=1e-4)


def test_padding_reaches_no_expert(small, layer):
    """Its output is the shared expert's alone, as if experts wrote nothing; a sharded layer therefore has no pair of it to send."""
    x, valid = x_of("random"), jnp.arange(T)[None] < jnp.arange(B)[:, None]
    out = jit(moe.apply, static_argnums=3)(layer, x, valid, small)[0]
    silent = {**layer, "experts": {**layer["experts"], "down_proj": jnp.zeros_like(layer["experts"]["down_proj"])}}
    alone = jit(moe.apply, static_argnums=3)(silent, x, valid, small)[0]
    np.testing.assert_allclose(out[~valid], alone[~valid], atol=1e-6)
    assert np.abs(out - alone)[np.asarray(valid)].max(axis=-1).min() > 1e-4
