import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params
from a1jax.models import transformer

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
T = 20


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(7), (8, T), 0, 160)


def loss(p, tokens, positions, segments, weight, router, cfg):
    """Logits of every position, weighted, and the router losses times `router`."""
    hidden, aux = transformer.apply(p, tokens, positions, segments, cfg)
    logits = transformer.head(p, hidden, cfg)
    per_token = jnp.sum(jnp.sin(logits) * jnp.arange(160.0)[None, None] / 160, axis=-1)
    return jnp.sum(per_token * weight) + router * aux["loss"], (logits, aux)


value_and_gradient = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=6)


def assert_close(got, expected, tolerance=1e-5):
    got, expected = jax.tree_util.tree_leaves_with_path(jax.device_get(got)), jax.tree.leaves(jax.device_get(expected))
    for (path, a), b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device(free, tokens, rows, untied):
    """Arguments and results for eight packed rows with padding."""
    positions, segments = rows([[20], [5, 14], [1, 1, 1, 16], [3, 2, 9], [8, 8, 4], [7], [19, 1], [10, 10]], T)
    arguments = (tokens, positions, segments, (segments > 0).astype(jnp.float32), 1.0)
    return arguments, value_and_gradient(free, *arguments, untied)


def test_a_packed_row_equals_its_segments_alone(free, tokens, rows, untied):
    """Logits and every parameter's gradient: row i holds segments of i + 1 tokens, one, two (fewer than the convolution's taps) and the
    rest, so borders lie at every offset of a chunk of 8, against one row per segment. Without the router's losses, which are means over
    all tokens."""
    lengths = [[i + 1, 1, 2, T - i - 4] for i in range(8)]
    pieces = [(row, sum(lengths[row][:i]), n) for row in range(8) for i, n in enumerate(lengths[row])]
    assert untied.delta_chunk == 8 and untied.conv_width == 4

    def evaluate(ids, layout):
        positions, segments = rows(layout, T)
        weight = (segments > 0).astype(jnp.float32)
        (_, (logits, _)), gradient = value_and_gradient(free, jnp.asarray(ids), positions, segments, weight, 0.0, untied)
        return logits, gradient

    packed, gradient = evaluate(tokens, lengths)
    total = jax.tree.map(jnp.zeros_like, gradient)
    for first in range(0, len(pieces), 8):
        batch, alone = pieces[first : first + 8], np.zeros((8, T), np.int32)
        for i, (row, start, n) in enumerate(batch):
            alone[i, :n] = tokens[row, start : start + n]
        logits, part = evaluate(alone, [[n] for *_, n in batch])
        total = jax.tree.map(jnp.add, total, part)
        for i, (row, start, n) in enumerate(batch):
            np.testing.assert_allclose(packed[row, start : start + n], logits[i, :n], atol=1e-5)
    assert_close(gradient, total)


def test_runs_count_from_border_to_border():
    runs = transformer.number_runs(jnp.array([[1, 1, 2, 0, 0, 1], [0, 0, 1, 1, 1, 1]]))
    np.testing.assert_array_equal(runs, [[0, 0, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1]])


def test_no_position_sees_a_later_one_or_another_segment(free, rows, untied):
    """The gradient of an output by an embedding is exactly zero where nothing may flow. Every position of every row has a token of its
    own; row b looks at one output position, so row b of the table's gradient is that output's."""
    own = jnp.arange(8 * T, dtype=jnp.int32).reshape(8, T)
    positions, segments = rows([[9, 2, 9]] * 8, T)
    for first in (0, 6, 12):
        at = np.arange(first, first + 8)
        (_, _), gradient = value_and_gradient(free, own, positions, segments, jnp.asarray(np.eye(T, dtype=np.float32)[at]), 0.0, untied)
        flows = np.abs(gradient["embed_tokens"]).max(-1).reshape(8, T)
        may = (np.arange(T)[None] <= at[:, None]) & (np.asarray(segments[0])[None] == np.asarray(segments[0])[at][:, None])
        assert np.all(flows[~may] == 0)
        assert np.all(flows[may] > 0)


def test_remat_computes_again(free, one_device, untied):
    """In the program before any optimisation. That it changes no value: see test_parallel.py."""
    arguments, _ = one_device

    def matmuls(function, cfg):
        return jax.jit(function, static_argnums=6).lower(free, *arguments, cfg).as_text().count("stablehlo.dot_general")

    forward, backward = matmuls(loss, untied), jax.value_and_grad(loss, has_aux=True)
    extra = matmuls(backward, dataclasses.replace(untied, remat="block")) - matmuls(backward, untied)
    assert extra > 0.6 * forward  # all but the last matmuls of a block, whose results no gradient needs, and the logits


def test_remat_per_layer_changes_no_value(free, one_device, untied):
    arguments, expected = one_device
    layer = dataclasses.replace(untied, remat="layer")
    assert_close(value_and_gradient(free, *arguments, layer), expected)
    text = {
        c: jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=6).lower(free, *arguments, c).as_text() for c in (untied, layer)
    }
    more = [t.count("stablehlo.dot_general") for t in text.values()]
    assert more[1] > more[0] and text[layer].count("optimization_barrier") == 2 * untied.block_layers


def test_aux_by_its_parts_and_without_padding(free, one_device, untied):
    (tokens, positions, segments, weight, _), ((_, (_, aux)), gradient) = one_device
    assert float(aux["loss"]) == pytest.approx(float(0.3 * aux["router/load_balance"] + 0.1 * aux["router/z"]), rel=1e-6)
    assert aux["load"].shape == (4, 8)
    np.testing.assert_allclose(aux["load"].sum(1), 1, rtol=1e-5)
    assert float(aux["router/max_load"]) == pytest.approx(float(8 * aux["load"].max()), rel=1e-6)
    padding = np.asarray(segments) == 0
    assert padding.any()
    other = value_and_gradient(free, jnp.where(padding, 5, tokens), positions, segments, weight, 1.0, untied)
    assert_close(other[0][1][1], aux, 1e-6)
    assert_close(other[1], gradient, 1e-6)  # what padding holds reaches no gradient either


def test_specs_follow_the_configuration(cfg, untied):
    tied, other = transformer.specs(cfg), transformer.specs(untied)
    assert "lm_head" not in tied and other["lm_head"].shape == (160, 16)
    assert set(tied["blocks"]["0"]) ^ set(tied["blocks"]["1"]) == {"linear_attn", "self_attn"}
    attention = tied["blocks"]["1"]["self_attn"]
    attention = jit(lambda key: params.init({name: attention[name] for name in ("q_norm", "q_proj", "o_proj")}, key))(jax.random.key(0))
    np.testing.assert_allclose(1 + attention["q_norm"], 1.5)
    assert np.std(attention["q_proj"]) == pytest.approx(16**-0.5, rel=0.1)
    assert np.std(attention["o_proj"]) == pytest.approx(32**-0.5 / 8**0.5, rel=0.1)  # 4 layers: over sqrt(8)
    values = {"embed_tokens": attention["q_norm"], "lm_head": attention["q_proj"]}
    assert transformer.unembed(values, cfg) is values["embed_tokens"]
    assert transformer.unembed(values, untied) is values["lm_head"]


def test_bfloat16_stays_near_float32(free, one_device, hidden, untied):
    (tokens, positions, segments, *_), ((_, (logits, _)), _) = one_device
    cfg = dataclasses.replace(untied, compute_dtype="bfloat16")
    low = hidden(free, tokens, positions, segments, cfg)
    assert low.dtype == jnp.bfloat16
    difference = np.abs(transformer.head(free, low, cfg) - logits)
    assert 0 < np.median(difference) < 0.03 * np.std(logits)
