"""Router replay through the whole model: what decoding recorded, the forward pass takes again, layer by layer and token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import sharding
from a1jax.data import packing
from a1jax.models import decode, transformer

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LENGTHS, T = (20, 13, 7, 1), 20
LAYERS, ACTIVE = 4, 2


def loss(p, batch, cfg):
    hidden, aux = transformer.apply(p, batch.tokens, batch.positions, batch.segment_ids, cfg, batch.routes)
    logp = jax.nn.log_softmax(transformer.head(p, hidden, cfg), axis=-1)
    return jnp.sum(jnp.sin(hidden)) + jnp.sum(jnp.where(batch.segment_ids > 0, logp[..., 3], 0)) + aux["loss"], (hidden, aux)


value_and_gradient = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 160, (len(LENGTHS), T)).astype(np.int32)


@pytest.fixture(scope="module")
def recorded(weights, cfg, tokens):
    """Routes [B, T, L, A] recorded by prefill in two pieces, and by steps."""
    prefill = jit(lambda c, t, n, r: decode.prefill(weights, c, t, n, cfg, r, record=True), donate_argnums=0)
    step = jit(lambda c, t, r, a: decode.step(weights, c, t, cfg, r, a, record=True), donate_argnums=0)
    lengths = np.array(LENGTHS, np.int32)
    cache, pieces = decode.init_cache(cfg, len(lengths), T), []
    for start in (0, 10):
        here = np.clip(lengths - start, 0, 10)
        _, cache, routes = prefill(cache, tokens[:, start : start + 10], here, np.full(len(lengths), start == 0))
        pieces.append(routes)
    cache, steps = decode.init_cache(cfg, len(lengths), T), []
    for t in range(T):
        _, cache, routes = step(cache, tokens[:, t], np.full(len(lengths), t == 0), t < lengths)
        steps.append(routes)
    return np.concatenate(pieces, axis=1), np.stack(steps, axis=1)


@pytest.fixture(scope="module")
def batch(tokens, recorded):
    """Two rows: the second holds three runs of different lengths."""
    examples = [packing.Example(tokens[i, :n], np.ones(n, np.float32), routes=recorded[0][i, :n]) for i, n in enumerate(LENGTHS)]
    rows = [examples[:1], [examples[2], examples[3], examples[1]]]
    return packing.to_batch(rows, 24, routes=(LAYERS, ACTIVE))


@pytest.fixture(scope="module")
def free(weights, batch, cfg):
    return value_and_gradient(weights, batch.replace(routes=None), cfg)


def difference(one, other):
    leaves = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return max(np.abs(a - b).max() / max(1, np.abs(b).max()) for a, b in leaves)


def test_steps_record_what_prefill_records(recorded):
    assert recorded[0].dtype == np.int16 and recorded[0].shape == (len(LENGTHS), T, LAYERS, ACTIVE)
    np.testing.assert_array_equal(*recorded)
    for routes, n in zip(recorded[0], LENGTHS, strict=True):
        assert (routes[:n] >= 0).all() and (routes[n:] == -1).all()
    assert len({tuple(np.sort(row)) for row in recorded[0][0].reshape(-1, ACTIVE)}) > 10  # layers and tokens differ


def test_the_models_own_routes_change_nothing(weights, batch, cfg, free):
    """Within 1e-6, value, outputs and gradients: what was recorded is what the forward pass chooses."""
    assert difference(value_and_gradient(weights, batch, cfg), free) <= 1e-6
    nothing = batch.replace(routes=np.full_like(batch.routes, -1))
    assert difference(value_and_gradient(weights, nothing, cfg), free) <= 1e-6


def test_other_routes_are_taken_where_they_are_given(weights, batch, cfg, free):
    """One token's experts in one layer: nothing before it moves, it and what follows in its run does, and its load says so."""
    (_, (hidden, aux)), _ = free
    for layer in range(LAYERS):
        routes = batch.routes.copy()
        routes[0, 9, layer] = [e for e in range(8) if e not in routes[0, 9, layer]][:ACTIVE]
        (_, (other, counted)), gradient = value_and_gradient(weights, batch.replace(routes=routes), cfg)
        moved = np.abs(other - hidden).max(-1)
        assert moved[0, :9].max() < 1e-6 and moved[1].max() < 1e-6 and moved[0, 9] > 1e-3
        change = (np.asarray(counted["load"]) - aux["load"]) * sum(LENGTHS) * ACTIVE
        expected = np.bincount(routes[0, 9, layer], minlength=8) - np.bincount(batch.routes[0, 9, layer], minlength=8)
        np.testing.assert_allclose(change[: layer + 1], np.r_[np.zeros((layer, 8)), expected[None]], atol=1e-4)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_grouped_experts_and_remat_replay_alike(weights, batch, cfg):
    rng = np.random.default_rng(1)
    routes = np.stack([rng.permutation(8)[:ACTIVE] for _ in range(batch.routes[..., 0].size)]).reshape(batch.routes.shape)
    batch = batch.replace(routes=np.where(batch.routes < 0, -1, routes).astype(np.int16))
    other = dataclasses.replace(cfg, moe="ragged", remat="block", attention_chunk=8)
    assert difference(value_and_gradient(weights, batch, other), value_and_gradient(weights, batch, cfg)) < 1e-5


def test_a_perturbed_router_keeps_the_recorded_experts(weights, batch, cfg, free):
    """Loads are those of the record, whatever the router now thinks; and it still learns."""
    key = jax.random.key(3)
    noisy = jax.tree_util.tree_map_with_path(lambda path, p: p + jax.random.normal(key, p.shape) if path[-1].key == "gate" else p, weights)
    (value, (_, aux)), gradient = value_and_gradient(noisy, batch, cfg)
    (other, (_, moved)), _ = value_and_gradient(noisy, batch.replace(routes=np.full_like(batch.routes, -1)), cfg)
    np.testing.assert_array_equal(aux["load"], free[0][1][1]["load"])
    assert np.abs(moved["load"] - aux["load"]).max() > 0.05 and abs(value - other) > 0.1 and abs(value - free[0][0]) > 0.1
    assert all(np.abs(gradient["blocks"][j]["mlp"]["gate"]).max() > 1e-3 for j in "01")


def test_a_batch_lies_on_a_mesh_with_routes_and_without(batch):
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    placed = sharding.put_batch(batch, mesh)
    assert placed.routes.addressable_shards[0].data.shape == (1, 24, LAYERS, ACTIVE)
    np.testing.assert_array_equal(placed.routes, batch.routes)
    assert sharding.put_batch(batch.replace(routes=None), mesh).routes is None
