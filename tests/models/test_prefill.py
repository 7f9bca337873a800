"""Many tokens at a time into many slots: equal to the full forward, whatever went before and wherever a prompt was cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params as specs
from a1jax import sharding
from a1jax.models import decode, transformer
from a1jax.models.config import qwen3_5_35b_a3b

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
VOCAB, CHUNK, PAST = 160, 8, 3  # chunk of the delta rule, tokens in the convolution's window
SLOTS, ROOM, WIDE, LONGEST = 8, 320, 40, 300
PROMPTS = (1, 2, PAST, CHUNK - 1, CHUNK, CHUNK + 1, 37, 0)


class Slots:
    """A cache and the two compiled functions that feed it; log-probabilities [B, (T,) V] of what is fed come back."""

    def __init__(self, params, cfg, slots, room, record=False):
        def head(hidden):
            return jax.nn.log_softmax(transformer.head(params, hidden, cfg), axis=-1)

        def prefill(cache, tokens, lengths, reset):
            hidden, cache, *routes = decode.prefill(params, cache, tokens, lengths, cfg, reset, record)
            return head(hidden), cache, *routes

        def step(cache, token, reset, active):
            hidden, cache, *routes = decode.step(params, cache, token, cfg, reset, active, record)
            return head(hidden), cache, *routes

        self.cache = decode.init_cache(cfg, slots, room)
        self.prefill, self.one = jit(prefill, donate_argnums=0), jit(step, donate_argnums=0)
        self.routes = None

    def feed(self, tokens, lengths, reset):
        tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
        out, self.cache, *self.routes = self.prefill(self.cache, tokens, lengths, np.asarray(reset))
        return np.asarray(out)

    def step(self, token, active, reset=None):
        reset = np.zeros(len(token), bool) if reset is None else reset
        out, self.cache, *self.routes = self.one(self.cache, np.asarray(token, np.int32), reset, np.asarray(active))
        return np.asarray(out)

    def copy(self):
        return jax.tree.map(np.array, self.cache)


@pytest.fixture(scope="module")
def full(weights, cfg):
    """Log-probabilities [B, T, V] of tokens [B, T], each row one sequence, by the model's forward pass."""

    def forward(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = transformer.apply(weights, tokens, positions, jnp.ones_like(tokens), cfg)
        return jax.nn.log_softmax(transformer.head(weights, hidden, cfg), axis=-1)

    return jit(forward)


@pytest.fixture(scope="module")
def slots(weights, cfg):
    """Attention in chunks of 16 query rows, so that a prefill of 40 has a padded one."""
    return Slots(weights, dataclasses.replace(cfg, attention_chunk=16), SLOTS, ROOM)


def same(before, after, slot):
    return all(np.array_equal(a[slot], b[slot]) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_300_steps_equal_the_full_forward_while_slots_finish_and_are_refilled(slots, full):
    """Eight slots start with prompts of eight lengths. Some then end after so many tokens and are filled with another prompt by a call
    that leaves the rest alone; the others get an observation of many tokens in the middle of their run, or rest."""
    rng = np.random.default_rng(0)
    runs, spare = [[] for _ in range(SLOTS)], []  # per slot the tokens fed and what came back; finished runs

    def prompts(lengths, reset):
        tokens = rng.integers(0, VOCAB, (SLOTS, WIDE))
        tokens[np.arange(WIDE)[None] >= lengths[:, None]] = rng.integers(-5, 10**6)  # what stands there must not matter
        before, out = slots.copy(), slots.feed(tokens, lengths, reset)
        after = slots.copy()
        for b in range(SLOTS):
            if lengths[b] == 0:
                assert same(before, after, b)
                continue
            if reset[b] and runs[b]:
                spare.append(runs[b])
                runs[b] = []
            runs[b] += zip(tokens[b, : lengths[b]], out[b, : lengths[b]], strict=True)

    prompts(np.array(PROMPTS), np.ones(SLOTS, bool))
    for t in range(LONGEST - max(PROMPTS)):
        if t % 29 == 13:
            lengths = np.where(rng.uniform(size=SLOTS) < 0.5, rng.integers(1, WIDE + 1, SLOTS), 0)
            reset = rng.uniform(size=SLOTS) < 0.5
            lengths[6], reset[6] = 0, False  # never ends
            reset |= np.array([len(run) + n > LONGEST for run, n in zip(runs, lengths, strict=True)])
            prompts(lengths, reset)
        token, active = rng.integers(0, VOCAB, SLOTS), rng.uniform(size=SLOTS) < 0.9
        active[6] = True
        active &= np.array([len(run) < LONGEST for run in runs])
        starts = active & np.array([not run for run in runs])
        out = slots.step(token, active, starts)
        for b in np.flatnonzero(active):
            runs[b].append((token[b], out[b]))
    assert len(runs[6]) == LONGEST and slots.cache["position"][6] == LONGEST and len(spare) > 5
    done = [*runs, *spare]
    tokens = np.zeros((-(-len(done) // SLOTS) * SLOTS, LONGEST), np.int32)
    for row, run in zip(tokens, done, strict=False):
        row[: len(run)] = [token for token, _ in run]
    expected = np.concatenate([full(part) for part in np.split(tokens, len(tokens) // SLOTS)])
    for run, wanted in zip(done, expected, strict=False):
        np.testing.assert_allclose([out for _, out in run], wanted[: len(run)], atol=1e-4)


def test_a_prompt_in_pieces_cut_anywhere(slots, full):
    """Every cut of 1 .. 23 of a prompt of 24, eight at a time: shorter than the window, on, before and behind a chunk's border."""
    tokens = np.random.default_rng(2).integers(0, VOCAB, (SLOTS, WIDE)).astype(np.int32)
    expected = np.asarray(full(np.pad(tokens, ((0, 0), (0, LONGEST - WIDE)))))
    for first in (1, 9, 16):
        cuts = np.arange(first, first + SLOTS)
        front = slots.feed(tokens, cuts, np.ones(SLOTS, bool))
        rest = np.stack([np.roll(row, -cut) for row, cut in zip(tokens, cuts, strict=True)])
        back = slots.feed(rest, 24 - cuts, np.zeros(SLOTS, bool))
        step = slots.step(tokens[:, 24], np.ones(SLOTS, bool))
        for b, cut in enumerate(cuts):
            np.testing.assert_allclose(front[b, :cut], expected[b, :cut], atol=1e-4)
            np.testing.assert_allclose(back[b, : 24 - cut], expected[b, cut:24], atol=1e-4)
        np.testing.assert_allclose(step, expected[:, 24], atol=1e-4)


def test_the_cache_is_that_of_as_many_steps(slots):
    """State, window, keys and values and positions, also of prompts shorter than the window and of pieces of one token."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, (SLOTS, WIDE)).astype(np.int32)
    total = np.array([1, 2, 3, 4, 8, 9, 16, 17])
    for t in range(17):
        slots.step(tokens[:, t], t < total, np.full(SLOTS, t == 0))
    stepped = slots.copy()
    front = np.array([1, 1, 2, 1, 7, 8, 3, 16])
    slots.feed(tokens, front, np.ones(SLOTS, bool))
    rest = np.stack([np.roll(row, -cut) for row, cut in zip(tokens, front, strict=True)])
    slots.feed(rest, total - front, np.ones(SLOTS, bool) & (total == front))
    fed = slots.copy()
    np.testing.assert_array_equal(fed["position"], total)
    for one, other in zip(stepped["layers"], fed["layers"], strict=True):
        for name in one:
            written = np.arange(ROOM)[None, None, :, None] < total[:, None, None, None] if name in "kv" else True
            np.testing.assert_allclose(np.where(written, one[name], 0), np.where(written, other[name], 0), atol=2e-5, err_msg=name)


def test_more_tokens_than_there_is_room_are_not_stored(weights, cfg):
    few = Slots(weights, cfg, 1, 12)
    tokens = np.random.default_rng(5).integers(0, VOCAB, (1, 16))
    few.feed(tokens, [8], [True])
    few.feed(tokens, [4], [False])
    full = few.copy()  # rows 8 to 11 hold tokens 0 to 3
    few.feed(tokens, [8], [True])
    few.feed(tokens, [16], [False])
    for before, after in zip(full["layers"], few.copy()["layers"], strict=True):
        for name in set(before) & {"k", "v"}:
            np.testing.assert_allclose(before[name], after[name], atol=1e-5)


def test_the_last_hidden_state_of_every_slot():
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(decode.last(hidden, jnp.array([1, 4])), [[0, 1, 2], [21, 22, 23]])
    assert np.isfinite(decode.last(hidden, jnp.array([0, 2]))).all()


def test_the_donated_cache_is_written_in_place(slots):
    text = slots.prefill.lower(slots.cache, *(np.zeros(s, d) for s, d in (((SLOTS, WIDE), np.int32), (SLOTS, np.int32), (SLOTS, bool))))
    text = text.compile().as_text()
    assert text.split("\n")[0].count("-alias") == len(jax.tree.leaves(slots.cache))


def test_layers_in_any_pattern(weights, cfg):
    """One irregular block of five layers, with every layer's weights its own: indices of layer, block and cache are told apart."""
    kinds = ("full_attention", "linear_attention", "full_attention", "full_attention", "linear_attention")
    cfg = dataclasses.replace(cfg, num_layers=5, layer_types=kinds, attention_chunk=3)
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), transformer.specs(cfg))
    assert cfg.block_layers == 5 and set(params["blocks"]) == set("01234")
    few, tokens = Slots(params, cfg, slots=2, room=24), rng.integers(0, VOCAB, (2, 21)).astype(np.int32)
    first = few.feed(tokens[:, :13], [13, 7], [True, True])
    second = few.feed(np.pad(tokens[:, 13:], ((0, 0), (0, 5))), [5, 0], [False, True])
    positions = jnp.broadcast_to(jnp.arange(21)[None], (2, 21))
    logits = jit(lambda tokens: transformer.logits(params, tokens, positions, jnp.ones_like(tokens), cfg))(tokens)
    expected = jax.nn.log_softmax(logits, axis=-1)
    np.testing.assert_allclose(first[0, :13], expected[0, :13], atol=1e-4)
    np.testing.assert_allclose(first[1, :7], expected[1, :7], atol=1e-4)
    np.testing.assert_allclose(second[0, :5], expected[0, 13:18], atol=1e-4)
    np.testing.assert_allclose(few.step(tokens[[0, 1], [18, 7]], [True, True]), expected[[0, 1], [18, 7]], atol=1e-4)


def test_bfloat16_is_close_and_finite(weights, cfg, full):
    low = Slots(weights, dataclasses.replace(cfg, compute_dtype="bfloat16"), 2, 48)
    tokens = np.random.default_rng(7).integers(0, VOCAB, (2, 40)).astype(np.int32)
    got = np.concatenate([low.feed(tokens[:, :20], [20, 20], [True, True]), low.feed(tokens[:, 20:], [20, 20], [False, False])], axis=1)
    assert low.cache["layers"][1]["k"].dtype == jnp.bfloat16 and low.cache["layers"][0]["state"].dtype == jnp.float32
    expected = np.asarray(full(np.pad(tokens, ((0, SLOTS - 2), (0, LONGEST - 40)))))[:2, :40]
    assert np.isfinite(got).all() and 0 < np.median(np.abs(got - expected)) < 0.03 * np.std(expected)


def test_only_the_ten_attention_layers_of_the_base_model_grow_with_the_context():
    """20,480 bytes per token of context: 10 layers x (keys and values) x 2 heads x 256 x 2 bytes."""
    cfg = qwen3_5_35b_a3b()

    def sizes(length):
        cache = jax.eval_shape(lambda: decode.init_cache(cfg, 1, length))
        return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer)) for layer in cache["layers"]]

    short, long = sizes(1024), sizes(262_144)
    grown = np.subtract(long, short) / (262_144 - 1024)
    np.testing.assert_array_equal(grown, [2048 if i % 4 == 3 else 0 for i in range(40)])
    assert grown.sum() == 20_480 and short[0] == long[0] == 3 * 8192 * 2 + 32 * 128 * 128 * 4


def test_under_a_mesh_nothing_changes(weights, cfg, slots):
    """Also with a length that context does not divide."""
    mesh = sharding.make_mesh({"expert": 2, "context": 2, "tensor": 2})
    placed = jax.device_put(weights, specs.shardings(transformer.specs(cfg), mesh))
    tokens = np.random.default_rng(8).integers(0, VOCAB, (SLOTS, WIDE)).astype(np.int32)
    lengths = np.array(PROMPTS)
    with jax.set_mesh(mesh):
        many = Slots(placed, cfg, SLOTS, ROOM)
        got = many.feed(tokens[:, : WIDE - 1], lengths, np.ones(SLOTS, bool)), many.step(tokens[:, 0], np.ones(SLOTS, bool), lengths == 0)
    expected = slots.feed(tokens, lengths, np.ones(SLOTS, bool)), slots.step(tokens[:, 0], np.ones(SLOTS, bool), lengths == 0)
    fed = np.arange(WIDE - 1)[None] < lengths[:, None]
    np.testing.assert_allclose(got[0][fed], expected[0][:, : WIDE - 1][fed], atol=1e-4)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-4)
