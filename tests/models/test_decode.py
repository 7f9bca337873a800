import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.models import decode, transformer

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SLOTS, STEPS, ROOM = 4, 26, 12


@pytest.fixture(scope="module")
def played(weights, cfg):
    """A random schedule of inactive slots and resets, played step by step: tokens, active, reset, hidden [steps, slots, ...],
    caches, compiled text."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 160, (STEPS, SLOTS)).astype(np.int32)
    active = rng.uniform(size=(STEPS, SLOTS)) < 0.75
    reset = rng.uniform(size=(STEPS, SLOTS)) < 0.12
    active[:, 0], reset[:, 0] = True, np.arange(STEPS) % 9 == 0  # a slot that never rests
    fed = np.zeros(SLOTS, int)
    for t in range(STEPS):  # nobody outgrows the cache
        fed = np.where(active[t], np.where(reset[t], 0, fed) + 1, fed)
        reset[t] |= active[t] & (fed > ROOM)
        fed = np.where(reset[t] & active[t], 1, fed)
    cache, outs, caches = decode.init_cache(cfg, SLOTS, ROOM), [], []
    params = decode.unstack(weights, cfg)  # test_prefill has them stacked
    step = jit(lambda p, cache, tokens, reset, active: decode.step(p, cache, tokens, cfg, reset, active), donate_argnums=1)
    step = step.lower(params, cache, tokens[0], reset[0], active[0]).compile()
    for t in range(STEPS):
        out, cache = step(params, cache, tokens[t], reset[t], active[t])
        outs.append(np.asarray(out))
        caches.append(jax.tree.map(np.array, cache))
    return tokens, active, reset, np.stack(outs), caches, step.as_text()


def test_steps_equal_the_full_forward_with_resets_and_rests(played, weights, hidden, cfg):
    tokens, active, reset, outs, *_ = played
    assert (reset & active).sum() > 6 and (~active).sum() > 10
    rows, positions, segments = np.zeros((3, SLOTS, STEPS), np.int32)
    for b in range(SLOTS):
        times = np.flatnonzero(active[:, b])
        starts = reset[times, b]
        rows[b, : len(times)] = tokens[times, b]
        segments[b, : len(times)] = np.cumsum(starts) + 1
        first = np.maximum.accumulate(np.where(starts, np.arange(len(times)), 0))
        positions[b, : len(times)] = np.arange(len(times)) - first
    full = hidden(weights, jnp.asarray(rows), jnp.asarray(positions), jnp.asarray(segments), cfg)
    for b in range(SLOTS):
        times = np.flatnonzero(active[:, b])
        pair = outs[times, b], full[b, : len(times)]
        got, expected = (jax.nn.log_softmax(transformer.head(weights, jnp.asarray(x), cfg)) for x in pair)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_an_inactive_slot_keeps_its_cache_bit_for_bit(played):
    _, active, _, _, caches, _ = played
    for t in range(1, STEPS):
        for before, after in zip(jax.tree.leaves(caches[t - 1]), jax.tree.leaves(caches[t]), strict=True):
            np.testing.assert_array_equal(before[~active[t]], after[~active[t]])
        assert np.all(caches[t]["position"][active[t]] >= 1)


def test_the_donated_cache_is_written_in_place(played, cfg):
    """Every buffer of the cache comes back as the same memory, and keys and values are neither copied nor transposed on the way."""
    *_, caches, text = played
    assert text.split("\n")[0].count("-alias") == len(jax.tree.leaves(caches[0]))
    kv = f"f32[{SLOTS},{cfg.num_kv_heads},{ROOM},{cfg.head_dim}]"
    lines = [line for line in text.splitlines() if f"= {kv}" in line]
    assert lines and not [line for line in lines if " copy(" in line or " transpose(" in line]
