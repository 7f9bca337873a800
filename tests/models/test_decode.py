import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.models import decode, transformer

SLOTS, STEPS, ROOM = 4, 26, 12


@pytest.fixture(scope="module")
def played(weights, cfg):
    """A random schedule of inactive slots and resets, played step by step: tokens, active, reset, hidden [steps, slots, ...], caches."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 48, (STEPS, SLOTS)).astype(np.int32)
    active = rng.uniform(size=(STEPS, SLOTS)) < 0.75
    reset = rng.uniform(size=(STEPS, SLOTS)) < 0.12
    active[:, 0], reset[:, 0] = True, np.arange(STEPS) % 9 == 0  # a slot that never rests
    fed = np.zeros(SLOTS, int)
    for t in range(STEPS):  # nobody outgrows the cache
        fed = np.where(active[t], np.where(reset[t], 0, fed) + 1, fed)
        reset[t] |= active[t] & (fed > ROOM)
        fed = np.where(reset[t] & active[t], 1, fed)
    step = jax.jit(decode.step, static_argnames="cfg", donate_argnames="cache")
    cache, outs, caches = decode.init_cache(cfg, SLOTS, ROOM), [], []
    for t in range(STEPS):
        out, cache = step(weights, cache, jnp.asarray(tokens[t]), cfg=cfg, reset=jnp.asarray(reset[t]), active=jnp.asarray(active[t]))
        outs.append(np.asarray(out))
        caches.append(jax.tree.map(np.array, cache))
    return tokens, active, reset, np.stack(outs), caches


def test_steps_equal_the_full_forward_with_resets_and_rests(played, weights, hidden, cfg):
    tokens, active, reset, outs, _ = played
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
        got, expected = (jax.nn.log_softmax(transformer.logits(weights, jnp.asarray(x), cfg)) for x in (outs[times, b], full[b, : len(times)]))
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_an_inactive_slot_keeps_its_cache_bit_for_bit(played):
    _, active, _, _, caches = played
    for t in range(1, STEPS):
        for before, after in zip(jax.tree.leaves(caches[t - 1]), jax.tree.leaves(caches[t]), strict=True):
            np.testing.assert_array_equal(before[~active[t]], after[~active[t]])
        assert np.all(caches[t]["position"][active[t]] >= 1)


def test_the_donated_cache_is_written_in_place(weights, cfg):
    """No copy of keys or values: every buffer of the cache comes back as the same memory."""
    cache = decode.init_cache(cfg, SLOTS, ROOM)
    arguments = (jnp.zeros(SLOTS, jnp.int32), jnp.zeros(SLOTS, bool), jnp.ones(SLOTS, bool))
    step = jax.jit(lambda p, cache, tokens, reset, active: decode.step(p, cache, tokens, cfg, reset, active), donate_argnums=1)
    text = step.lower(weights, cache, *arguments).compile().as_text()
    assert text.split("\n")[0].count("may-alias") + text.split("\n")[0].count("must-alias") == len(jax.tree.leaves(cache))
    kv = f"f32[{SLOTS},{cfg.num_kv_heads},{ROOM},{cfg.head_dim}]"
    copies = [line for line in text.splitlines() if f"= {kv}" in line and (" copy(" in line or " transpose(" in line)]
    assert not copies
