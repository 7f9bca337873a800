import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from a1jax import params, sharding
from a1jax.models import transformer

T = 20


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(7), (8, T), 0, 48)


def loss(p, tokens, positions, segments, cfg):
    """A loss with a term per position, its router losses, and all logits."""
    hidden, aux = transformer.apply(p, tokens, positions, segments, cfg)
    logits = transformer.logits(p, hidden, cfg)
    per_token = jnp.sum(jnp.sin(logits) * jnp.arange(48.0)[None, None] / 48, axis=-1)
    return jnp.sum(per_token * (segments > 0)) + aux["loss"], (logits, aux)


value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=4)


def assert_close(got, expected, tolerance=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(jax.device_get(got)), jax.tree.leaves(jax.device_get(expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device(weights, tokens, rows, cfg):
    """Values and gradients of eight packed rows with padding."""
    positions, segments = rows([[20], [5, 14], [1, 1, 1, 16], [3, 2, 9], [8, 8, 4], [7], [19, 1], [10, 10]], T)
    cfg = dataclasses.replace(cfg, load_balance_coef=0.3, z_loss_coef=0.1)
    return cfg, positions, segments, value_and_gradient(weights, tokens, positions, segments, cfg)


def test_a_packed_row_equals_its_segments_alone(weights, tokens, rows, cfg, one_device):
    """Logits and the parameters' gradient: rows of several segments against one row per segment, without the router's losses, which
    are means over all tokens."""
    cfg = dataclasses.replace(cfg, load_balance_coef=0.0, z_loss_coef=0.0)
    packed_lengths = [[3, 2, 9, 6], [1, 7, 12]]
    pieces = [(row, sum(lengths[:i]), n) for row, lengths in enumerate(packed_lengths) for i, n in enumerate(lengths)]
    alone = np.zeros((8, T), np.int32)
    for i, (row, start, n) in enumerate(pieces):
        alone[i, :n] = tokens[row, start : start + n]
    packed = np.zeros((8, T), np.int32)
    packed[:2] = tokens[:2]
    (_, (a, _)), gradient = value_and_gradient(weights, jnp.asarray(packed), *rows([*packed_lengths, *[[]] * 6], T), cfg)
    (_, (b, _)), gradients = value_and_gradient(weights, jnp.asarray(alone), *rows([*([n] for *_, n in pieces), []], T), cfg)
    for i, (row, start, n) in enumerate(pieces):
        np.testing.assert_allclose(a[row, start : start + n], b[i, :n], atol=1e-5)
    assert_close(gradient, gradients)


def test_runs_count_from_border_to_border():
    runs = transformer.number_runs(jnp.array([[1, 1, 2, 0, 0, 1], [0, 0, 1, 1, 1, 1]]))
    np.testing.assert_array_equal(runs, [[0, 0, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1]])


def test_no_position_sees_a_later_one_or_another_segment(weights, tokens, rows, cfg):
    """The gradient of each position's output by each position's embedding is exactly zero where nothing may flow. The embedding of every
    position is made its own by giving every position its own token."""
    positions, segments = rows([[9, 2, 7]], T)
    own = jnp.arange(T, dtype=jnp.int32)[None]

    def outputs(table):
        return jnp.sum(transformer.apply({**weights, "embed_tokens": table}, own, positions, segments, cfg)[0][0], axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(weights["embed_tokens"])[:, :T]  # [T out, T in, D]
    flows = np.abs(jacobian).max(-1)
    may = np.tril(np.ones((T, T), bool)) & np.asarray(segments[0][:, None] == segments[0][None])
    assert np.all(flows[~may] == 0)
    assert np.all(flows[may] > 0)


def test_remat_computes_again_and_changes_nothing(weights, tokens, one_device):
    cfg, positions, segments, expected = one_device
    again = dataclasses.replace(cfg, remat="block", attention_chunk=8)
    assert_close(value_and_gradient(weights, tokens, positions, segments, again), expected)

    def matmuls(cfg):
        return value_and_gradient.lower(weights, tokens, positions, segments, cfg).as_text().count("stablehlo.dot_general")

    forward = jax.jit(loss, static_argnums=4).lower(weights, tokens, positions, segments, cfg).as_text().count("stablehlo.dot_general")
    extra = matmuls(dataclasses.replace(cfg, remat="block")) - matmuls(cfg)
    assert extra > 0.6 * forward  # all but the last matmuls of a block, whose results no gradient needs, and the logits


def test_aux_by_its_parts_and_without_padding(weights, tokens, rows, cfg, one_device):
    coefficients, positions, segments, ((_, (_, aux)), _) = one_device
    assert aux["loss"] == pytest.approx(0.3 * aux["router/load_balance"] + 0.1 * aux["router/z"], rel=1e-6)
    assert aux["load"].shape == (4, 8)
    np.testing.assert_allclose(aux["load"].sum(1), 1, rtol=1e-5)
    assert aux["router/max_load"] == pytest.approx(8 * aux["load"].max(), rel=1e-6)
    padding = np.asarray(segments) == 0
    assert padding.any()
    other = value_and_gradient(weights, jnp.where(padding, 5, tokens), positions, segments, coefficients)
    assert_close(other[0][1][1], aux, 1e-6)
    assert_close(other[1], one_device[3][1], 1e-6)  # what padding holds reaches no gradient either


@pytest.mark.parametrize(
    ("shape", "changes"),
    [({"data": 2, "expert": 2, "tensor": 2}, {}), ({"fsdp": 4, "expert": 2}, {"moe": "ragged", "remat": "block", "attention_chunk": 8})],
)
def test_eight_devices_equal_one(weights, tokens, one_device, shape, changes):
    cfg, positions, segments, expected = one_device
    cfg, mesh = dataclasses.replace(cfg, **changes), sharding.make_mesh(shape)
    placed = jax.device_put(weights, params.shardings(transformer.specs(cfg), mesh))
    rows = NamedSharding(mesh, sharding.partition_spec(("batch", "length"), mesh))
    with jax.set_mesh(mesh):
        lowered = value_and_gradient.lower(placed, *(jax.device_put(x, rows) for x in (tokens, positions, segments)), cfg)
        # Optimisation level 0: the partitioned program is what is tested, and it compiles in half the time.
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
        got = compiled(placed, *(jax.device_put(x, rows) for x in (tokens, positions, segments)))
    assert_close(got, expected)


def test_specs_follow_the_configuration(cfg):
    tied, free = transformer.specs(cfg), transformer.specs(dataclasses.replace(cfg, tie_embeddings=False))
    assert "lm_head" not in tied and free["lm_head"].shape == (48, 16)
    assert set(tied["blocks"]["0"]) ^ set(tied["blocks"]["1"]) == {"linear_attn", "self_attn"}
    values = params.init(tied, jax.random.key(0))
    attention = values["blocks"]["1"]["self_attn"]
    np.testing.assert_allclose(1 + attention["q_norm"], 1.5)
    assert np.std(attention["q_proj"]) == pytest.approx(16**-0.5, rel=0.1)
    assert np.std(attention["o_proj"]) == pytest.approx(32**-0.5 / 8**0.5, rel=0.1)  # 4 layers: over sqrt(8)
    assert transformer.unembed(values, cfg) is values["embed_tokens"]


def test_bfloat16_stays_near_float32(weights, tokens, hidden, rows, cfg):
    where = rows([[20]] * 8, T)
    low = hidden(weights, tokens, *where, dataclasses.replace(cfg, compute_dtype="bfloat16"))
    assert low.dtype == jnp.bfloat16
    high = hidden(weights, tokens, *where, cfg)
    assert np.median(np.abs(low.astype(jnp.float32) - high)) < 0.03
