import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import optim, params
from a1jax.config import ConfigError, bind
from a1jax.models import config as models
from a1jax.models import transformer

SPECS = {
    "w": params.ParamSpec((4, 3), ("embed", "heads"), params.normal(0.1)),
    "b": params.ParamSpec((3,), ("norm",), params.constant(1.0)),
}


def rates(tx, steps, name):
    """The size of every update of a parameter whose gradient is one."""
    tree = params.init(SPECS, jax.random.key(0))
    state, out = tx.init(tree), []
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, tree), state, tree)
        out.append(float(-updates[name].ravel()[0]))
    return out


def test_schedule_by_hand():
    tx = optim.scheduled(SPECS, 10, learning_rate=-2.0, table_learning_rate=-1.0, warmup=0.2, final=0.1)
    expected = [1 / 3, 2 / 3] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates(tx, 10, "w"), 2.0 * np.array(expected), rtol=1e-6)
    np.testing.assert_allclose(rates(tx, 10, "b"), expected, rtol=1e-6)


def test_adamw_first_update_is_the_rate_and_constant_rates_stay():
    tx = optim.adamw(SPECS, 100, learning_rate=0.01, warmup=0.0, final=1.0, weight_decay=0.0, clip=1e9)
    np.testing.assert_allclose(rates(tx, 5, "b"), 0.01, rtol=1e-4)


def test_weight_decay_spares_norms():
    tree = params.init(SPECS, jax.random.key(0))
    tx = optim.adamw(SPECS, 10, learning_rate=0.1, warmup=0.0, final=1.0, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    np.testing.assert_allclose(updates["w"], -0.05 * tree["w"], rtol=1e-5)
    assert (updates["b"] == 0).all()


def test_muon_orthogonalises_every_matrix_of_a_stack_and_nothing_else():
    cfg = models.tiny()
    specs = transformer.specs(cfg)
    tree = params.init(specs, jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), tree)
    tx = optim.muon(specs, 1, learning_rate=1.0, table_learning_rate=0.0, warmup=0.0, clip=1e9)
    updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
    matrices = 0
    for spec, update in zip(jax.tree.leaves(specs), jax.tree.leaves(updates), strict=True):
        if optim.is_matrix(spec):
            matrices += 1
            values = np.linalg.svd(np.asarray(update, np.float64).reshape(-1, *spec.shape[-2:]), compute_uv=False)
            scale = max(1.0, spec.shape[-1] / spec.shape[-2]) ** 0.5
            # Newton-Schulz brings singular values near 1; the few that are almost 0 need more of its five steps
            assert (values < 1.6 * scale).all() and np.mean(values > 0.4 * scale) > 0.9
        else:
            assert (update == 0).all()
    assert matrices >= 10 and not optim.is_matrix(specs["embed_tokens"])


def test_stages_that_differ_in_rates_and_length_share_a_program():
    one, two = bind(optim.muon, learning_rate=0.1, warmup=0.2), bind(optim.muon, learning_rate=0.3, final=0.5)
    names = [optim.program(o, n) for o, n in ((one, 5), (two, 9), (bind(optim.muon, clip=2.0), 5), (bind(optim.adamw), 5))]
    assert names[0] == names[1] != names[2] != names[3] and len({*names}) == 3
    tree = params.init(SPECS, jax.random.key(0))
    made = [optim.muon(SPECS, n, learning_rate=r) for n, r in ((5, 0.1), (9, 0.2))]
    text = [jax.jit(tx.update).lower(tree, tx.init(tree), tree).as_text() for tx in made]
    assert text[0] == text[1]


def straight_down(specs, steps, *, rate):
    """An optimizer of a user's own, with its schedule in its program."""
    del specs
    return optax.sgd(optax.linear_schedule(rate, 0.0, steps))


def test_another_optimizer_keeps_its_schedule():
    mine = bind(straight_down, rate=1.0)
    one, two = optim.program(mine, 4), optim.program(mine, 8)
    assert one != two and one == optim.program(mine, 4) and hash(one) == hash(optim.program(mine, 4))
    tx, weight = one(SPECS, 1), {"w": jnp.ones(2)}
    state, found = tx.init(weight), []
    for _ in range(5):
        updates, state = tx.update(weight, state, weight)
        found.append(float(updates["w"][0]))
    np.testing.assert_allclose(found, [-1.0, -0.75, -0.5, -0.25, 0.0])


@pytest.mark.parametrize("changes", [{"steps": 0}, {"warmup": 1.0}, {"final": 2.0}])
def test_impossible_schedules_are_refused(changes):
    with pytest.raises(ConfigError, match="schedule"):
        optim.adamw(SPECS, **{"steps": 5, **changes})


def test_configs_are_hashable_keys_of_compiled_programs():
    assert hash(models.tiny()) == hash(dataclasses.replace(models.tiny()))
