"""Pairs of token and expert that travel in rounds: many rounds, uneven ones and idle devices change nothing; what travels is counted."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from a1jax import params, sharding
from a1jax.analysis import hlo_text
from a1jax.models import exchange, moe
from a1jax.models.config import tiny

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, D, F = 8, 8, 16, 12


def loss(p, x, cfg):
    y, aux = moe.apply(p, x, jnp.ones((B, T), bool), cfg)
    return jnp.sum(jnp.sin(y) * jnp.arange(float(D))[None, None]) + aux["load_balance"], y


@pytest.fixture(scope="module")
def cfg():
    return tiny(d_model=D, expert_width=F, shared_expert_width=10, moe="ragged")


@pytest.fixture(scope="module")
def layer(cfg):
    return jit(lambda key: params.init(moe.specs(cfg), key))(jax.random.key(0))


def inputs():
    """Random tokens, and tokens that are all alike, so that two experts get every pair and six none."""
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    return {"random": x, "alike": jnp.broadcast_to(x[:1, :1], x.shape)}


@pytest.fixture(scope="module")
def one_device(cfg, layer):
    run = jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    return {name: jax.device_get(run(layer, x, cfg)) for name, x in inputs().items()}


def compiled_on(shape, cfg, layer):
    mesh = sharding.make_mesh(shape)
    placed = jax.device_put(layer, params.shardings(moe.specs(cfg), mesh))
    tokens = NamedSharding(mesh, sharding.partition_spec(("batch", "length", "hidden"), mesh))
    with jax.set_mesh(mesh):
        run = jit(lambda p, x: jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x, cfg))
        return run.lower(placed, jax.device_put(inputs()["random"], tokens)).compile(), placed, tokens


@pytest.mark.parametrize(
    ("shape", "room"),
    [({"fsdp": 2, "expert": 2, "context": 2}, 8), ({"fsdp": 2, "context": 2, "tensor": 2}, 12), ({"data": 2, "context": 4}, 20)],
)
def test_many_rounds_equal_one_device(shape, room, cfg, layer, one_device, monkeypatch):
    """With room for one to five pairs at a time the fullest way needs up to 16 rounds: value and every gradient as on one device."""
    monkeypatch.setattr(exchange, "ROOM", room)
    compiled, placed, tokens = compiled_on(shape, cfg, layer)
    for name, x in inputs().items():
        got = jax.tree_util.tree_leaves_with_path(jax.device_get(compiled(placed, jax.device_put(x, tokens))))
        for (path, a), b in zip(got, jax.tree.leaves(one_device[name]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=f"{name} {jax.tree_util.keystr(path)}")


def test_what_travels(cfg):
    """Forward: tokens, labels, results. Backward: tokens with gradients, labels, two gradients back. No expert, no gather of tokens."""
    cfg = dataclasses.replace(cfg, num_experts=16)
    layer = jit(lambda key: params.init(moe.specs(cfg), key))(jax.random.key(0))
    module = hlo_text.read(compiled_on({"fsdp": 2, "context": 4}, cfg, layer)[0].as_text())
    ops = [op for name, ops in module.computations.items() if module.trips[name] for op in ops]
    sent = sorted(hlo_text.size(op.type) for op in ops if op.kind == "all-to-all")
    places = 8 * 16  # 8 devices; a device's 8 tokens have room for two pairs each, with both experts of another one
    assert sent == sorted(4 * places * width for width in (D, 2, D, 2 * D, 2, 1, D))
    gathered = [shape for op in ops if op.kind == "all-gather" for _, shape, _ in hlo_text.arrays(op.type)]
    assert gathered and all(len(shape) == 2 and math.prod(shape) <= D * 16 < B * T * D for shape in gathered)  # the router's and smaller


def test_places_by_hand():
    """Experts are cut over fsdp, context and tensor in this order; pairs travel along fsdp and context, tensor is summed over."""
    rank, part = exchange.places({"fsdp": 2, "context": 3, "tensor": 2}, ("fsdp", "context"), 24)
    assert rank.tolist() == [i // 4 for i in range(24)] and part.tolist() == [i // 2 % 2 for i in range(24)]
    rank, part = exchange.places({"fsdp": 2, "tensor": 2}, (), 4)
    assert rank.tolist() == [0, 0, 0, 0] and part.tolist() == [0, 1, 2, 3]


def test_rounds_by_hand():
    """Seven pairs, three destinations, one pair that goes nowhere, room for two: the fullest destination needs two rounds."""
    destination = jnp.array([2, 0, 2, 3, 1, 2, 0])
    pairs = exchange.group(destination, destination, 3, 2, ())
    assert (pairs.count.tolist(), pairs.first.tolist(), int(pairs.rounds)) == ([2, 1, 3], [0, 2, 3], 2)
    sent = []
    for index in range(2):
        pair, there = exchange.of_round(jnp.int32(index), pairs, 2)
        sent.append([pair[p][there[p]].tolist() for p in range(3)])
    assert sent == [[[1, 6], [4], [0, 2]], [[], [], [5]]]


def test_room_is_no_more_than_pairs_can_be():
    assert exchange.room_for(4096, 64, 8, 4) == exchange.ROOM // 64
    assert exchange.room_for(4, 2, 8, 4) == 16  # a token has at most one pair for each expert there
    assert exchange.room_for(4096, 2 * exchange.ROOM, 8, 1) == 1
