"""Every parallel form against one device, on packed rows: outputs and gradients within 1e-5, relative to the largest entry of a leaf."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from a1jax import optim, params, sharding, train, types
from a1jax.config import ConfigError, bind
from a1jax.models import attention, context, gated_delta, layers, moe, transformer
from a1jax.stages import sft
from a1jax.stages.setting import Setting

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def assert_close(got, expected, tolerance=1e-5):
    got, expected = jax.tree_util.tree_leaves_with_path(jax.device_get(got)), jax.tree.leaves(jax.device_get(expected))
    for (path, a), b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), rtol=0, err_msg=jax.tree_util.keystr(path))


def runs_at_every_offset(length):
    """Row i: i tokens, one, two (shorter than the convolution), the rest; the last row is a single run. As many rows as 8 divides."""
    cuts = [[i, i + 1, i + 3] for i in range(length)]
    rows = [np.searchsorted(c, np.arange(length), side="right") for c in cuts]
    rows = [row - row[0] for row in rows]  # runs are counted from 0, also where the first cut is at 0
    return jnp.asarray(np.stack([*rows, *[rows[0] * 0] * (-len(rows) % 8)]), jnp.int32)


# ----------------------------------------------------------------------------------------------------------------- one layer


def mixer(kind, cfg, seed=0):
    """(parameters, function of (parameters, x, runs)) of one gated delta net or one attention layer; no weight is 0 or 1."""
    module = {"delta": gated_delta, "attention": attention}[kind]
    rng = np.random.default_rng(seed)
    p = {name: jnp.asarray(rng.standard_normal(s.shape) * (s.shape[0] ** -0.5 if len(s.shape) > 1 else 0.3), jnp.float32)
         for name, s in module.specs(cfg).items()}  # fmt: skip
    if kind == "delta":
        return {**p, "A_log": p["A_log"] - 2}, lambda p, x, runs: gated_delta.apply(p, x, runs, cfg)

    def apply(p, x, runs):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], runs.shape)  # not from the run's start: scores see distances only
        return attention.apply(p, x, runs, *layers.rotary_angles(positions, cfg.rotary_dim, cfg.rope_theta), cfg)

    return p, apply


def compare(kind, cfg, length, shape, rows=None):
    """One layer on one device and on the mesh: output, and gradients by parameters and input."""
    p, apply = mixer(kind, cfg)
    runs = runs_at_every_offset(length) if rows is None else rows
    x = jax.random.normal(jax.random.key(3), (*runs.shape, cfg.d_model))

    def loss(p, x, runs):
        y = apply(p, x, runs)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(length))[None, :, None]), y

    def run(*arguments):
        return jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arguments)

    expected, mesh = run(p, x, runs), sharding.make_mesh(shape)
    placed = jax.device_put(p, params.shardings({"delta": gated_delta, "attention": attention}[kind].specs(cfg), mesh))
    with jax.set_mesh(mesh):
        tokens = [NamedSharding(mesh, sharding.activation_spec(y.shape, ("batch", "length", None)[: y.ndim])) for y in (x, runs)]
        got = run(placed, *jax.device_put((x, runs), tuple(tokens)))
    assert_close(got, expected)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "length", "shape", "changes"),
    [
        ("delta", 48, {"context": 8}, {"delta_chunk": 4}),  # shards of 6 tokens: a whole chunk and a padded one
        ("delta", 16, {"context": 8}, {}),  # 2 tokens: the convolution looks back over two shards
        ("delta", 16, {"context": 2, "expert": 2, "tensor": 2}, {"linear_num_key_heads": 3, "linear_num_value_heads": 6}),
        pytest.param("delta", 24, {"data": 2, "context": 2, "tensor": 2}, {}, marks=SLOW),  # one key head for both halves of tensor
        pytest.param("delta", 16, {"fsdp": 2, "tensor": 4}, {"linear_num_key_heads": 4, "linear_num_value_heads": 4}, marks=SLOW),
        ("attention", 24, {"context": 4, "tensor": 2}, {"attention_chunk": 4}),  # rows in chunks of 4 of 6
        ("attention", 16, {"tensor": 8}, {"num_heads": 8}),  # 2 key/value heads for 8 devices
        pytest.param("attention", 24, {"context": 8}, {}, marks=SLOW),
        pytest.param("attention", 16, {"context": 2, "fsdp": 2, "tensor": 2}, {"num_heads": 6, "num_kv_heads": 3}, marks=SLOW),
    ],
)
def test_a_layer_with_borders_at_every_offset(cfg, kind, length, shape, changes):
    compare(kind, dataclasses.replace(cfg, **changes), length, shape)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("delta", {"context": 8}, "axis 'length' of size 12 cannot be cut over context = 8: change the mesh or the size"),
        ("delta", {"tensor": 8}, "axis 'linear_heads' of size 2 cannot be cut over tensor = 8: change the mesh or the size"),
        ("attention", {"tensor": 8}, "axis 'heads' of size 4 cannot be cut over tensor = 8: change the mesh or the size"),
        ("attention", {"context": 8}, "axis 'length' of size 12 cannot be cut over context = 8: change the mesh or the size"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(cfg, kind, shape, message):
    p, apply = mixer(kind, cfg)
    with jax.set_mesh(sharding.make_mesh(shape)), pytest.raises(ConfigError, match=f"^{message}"):
        jax.eval_shape(apply, p, jnp.zeros((8, 12, cfg.d_model)), jnp.zeros((8, 12), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "attention"])
def test_one_long_row(cfg, kind):
    """A batch of one row is not cut over the data axes: their devices do the same work."""
    compare(kind, cfg, 16, {"data": 2, "context": 4}, runs_at_every_offset(16)[6:7])


def test_halo_reaches_as_far_as_it_must():
    """Shards of two tokens: the entries before a shard come from one to all of those before it, zeros from before the row."""
    x = jnp.arange(1, 2 * 16 * 3 + 1, dtype=jnp.float32).reshape(2, 16, 3)
    mesh = sharding.make_mesh({"context": 8})
    for width in (0, 1, 3, 4, 20):
        padded = np.pad(x, ((0, 0), (width, 0), (0, 0)))
        expected = np.stack([padded[:, start : start + width] for start in range(0, 16, 2)], axis=1)

        def run(x, width=width):
            axes = ("batch", "length", None)
            part = [(x, axes)]
            return sharding.over_shards(lambda x: context.halo(x, width, ("context",))[:, None], part, (2, 8, width, 3), (*axes, None))

        with jax.set_mesh(mesh):
            got = jit(run)(x)
        np.testing.assert_array_equal(got, expected)


def test_a_token_per_row_has_no_length_to_cut(cfg, weights):
    """What decoding asks of the shared parts: embedding of [B], experts of [B, 1, D]."""
    tokens, mlp = jnp.arange(8), jax.tree.map(lambda w: w[0], weights["blocks"]["0"]["mlp"])

    def run(table, mlp, tokens):
        x = layers.embed(table, tokens, cfg)
        return x, moe.apply(mlp, x[:, None], jnp.ones((8, 1), bool), cfg)

    expected = jit(run)(weights["embed_tokens"], mlp, tokens)
    with jax.set_mesh(sharding.make_mesh({"context": 2, "expert": 2, "tensor": 2})):
        assert_close(jit(run)(weights["embed_tokens"], mlp, tokens), expected)


# ----------------------------------------------------------------------------------------------------------------- the model

T = 32  # four tokens per shard under {"context": 8}
LENGTHS = [[32], [5, 14, 13], [1, 1, 1, 16], [4, 4, 8, 16], [8, 3, 1, 1, 1, 2, 9], [7], [16, 15], [30, 2]]


def loss(p, tokens, positions, segments, weight, router, cfg):
    """Logits of every position, weighted, and the router losses times `router`."""
    hidden, aux = transformer.apply(p, tokens, positions, segments, cfg)
    logits = transformer.head(p, hidden, cfg)
    per_token = jnp.sum(jnp.sin(logits) * jnp.arange(160.0)[None, None] / 160, axis=-1)
    return jnp.sum(per_token * weight) + router * aux["loss"], (logits, aux)


value_and_gradient = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=6)


@pytest.fixture(scope="module")
def one_device(free, rows, untied):
    """Arguments and results for eight packed rows: segments over borders of shards, ending at them, several inside one, padding."""
    positions, segments = rows(LENGTHS, T)
    tokens = jax.random.randint(jax.random.key(7), (8, T), 0, 160)
    arguments = (tokens, positions, segments, (segments > 0).astype(jnp.float32), 1.0)
    return arguments, value_and_gradient(free, *arguments, untied)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"context": 8}, {"remat": "layer", "moe": "ragged"}),
        ({"context": 2, "expert": 2, "fsdp": 2}, {"moe": "ragged"}),
        pytest.param({"context": 4, "tensor": 2}, {"moe": "ragged", "attention_chunk": 3}, marks=SLOW),
        pytest.param({"data": 2, "context": 2, "tensor": 2}, {"remat": "block", "attention_chunk": 8}, marks=SLOW),
        pytest.param({"context": 2, "expert": 2, "tensor": 2}, {"moe": "ragged", "remat": "block"}, marks=SLOW),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {"moe": "ragged", "remat": "block", "attention_chunk": 8}),
        pytest.param({"data": 2, "expert": 2, "tensor": 2}, {}, marks=SLOW),
        pytest.param({"data": 2, "fsdp": 4}, {"moe": "ragged"}, marks=SLOW),
    ],
)
def test_eight_devices_equal_one(free, one_device, untied, shape, changes):
    """Logits, router statistics and all gradients, against the dense experts without remat and with attention in one piece."""
    arguments, expected = one_device
    untied, mesh = dataclasses.replace(untied, **changes), sharding.make_mesh(shape)
    placed = jax.device_put(free, params.shardings(transformer.specs(untied), mesh))
    rows = NamedSharding(mesh, sharding.partition_spec(("batch", "length"), mesh))
    with jax.set_mesh(mesh):
        arguments = (placed, *jax.device_put(arguments[:4], rows), 1.0)
        compiled = value_and_gradient.lower(*arguments, untied).compile()
        assert_close(compiled(*arguments), expected)
    if shape == {"context": 8}:
        only_keys_and_maps_travel(compiled.as_text())


def only_keys_and_maps_travel(text):
    """Weights [in, out] and integers aside, what is gathered: keys and values of whole rows, and the shards' maps of the state."""
    gathered = re.findall(r"= \(?f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    shapes = {tuple(map(int, shape.split(","))) for shape in gathered}
    assert {shape for shape in shapes if len(shape) > 2} == {(8, T, 2, 8), (8, 8, 2, 8, 8), (8, 8, 2, 8, 4)}


# ------------------------------------------------------------------------------------------------------------ a step of training


@pytest.mark.slow
def test_a_train_step_equals_one_device(cfg, rows):
    """Parameters made where they lie, the SFT loss, Adam: parameters and metrics after two steps of two micro-batches."""
    cfg = dataclasses.replace(cfg, moe="ragged", load_balance_coef=0.1)
    positions, segments = rows([LENGTHS[i % 8] for i in range(16)], T)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (16, T + 1), 0, 160), np.int32)
    batch = types.Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=np.float32(segments > 0), positions=np.asarray(positions),
        segment_ids=np.asarray(segments), domains=np.asarray(segments) % 2,
    )  # fmt: skip
    optimizer = bind(optim.adamw, learning_rate=1e-3)
    results = []
    for mesh in (None, sharding.make_mesh({"context": 2, "fsdp": 2, "expert": 2})):
        setting = Setting(model=cfg, tokenizer=None, domains=("a", "b"), mesh=mesh, workdir=None, writer=None, seed=0)
        with setting.on_mesh():
            state = train.init_state(setting.init_params(), optimizer(setting.specs, 2), 0)
            step = sft.jitted_step(cfg, 2, "domain_mean", 64, None, 2, optim.program(optimizer, 1))
            for _ in range(2):
                state, metrics = step(state, setting.put(batch))
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
        if mesh is not None:
            spread = state.opt_state, state.params["blocks"]["0"]["linear_attn"]["out_proj"]
            assert "context" in str(spread[1].sharding.spec)  # weights, and with them the optimizer's state, are cut over context too
    assert_close(results[1], results[0])
