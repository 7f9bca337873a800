"""The TPU's attention kernel, interpreted on the CPU, against float64: packed rows, grouped heads, padding, shards of a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from a1jax import sharding
from a1jax.models import attention, attention_tpu, config, context

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
H, K, F = 4, 2, 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_tpu, "BLOCK_Q", 128)
    monkeypatch.setattr(attention_tpu, "BLOCK_KV", 256)


def inputs(b, t, s, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((b, n, heads, F)), dtype) for n, heads in ((t, H), (s, K), (s, K), (t, H))]


def lengths(*each):
    return jnp.asarray(np.repeat(np.arange(len(each)), each)[None], jnp.int32)


def exact(q, k, v, g, runs, key_runs, places):
    """float64, dense: the output [B, T, H, F] and the gradients of sum(output * g) by q, k and v."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    runs, key_runs, places = map(np.asarray, (runs, key_runs, places))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h in np.ndindex(q.shape[0], H):
        n = h * K // H
        seen = (places[:, None] >= np.arange(k.shape[1])) & (runs[b][:, None] == key_runs[b])
        scores = np.where(seen, q[b, :, h] @ k[b, :, n].T / np.sqrt(F), -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out[b, :, h] = p @ v[b, :, n]
        dp = g[b, :, h] @ v[b, :, n].T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / np.sqrt(F)
        dq[b, :, h] = ds @ k[b, :, n]
        dk[b, :, n] += ds.T @ q[b, :, h]
        dv[b, :, n] += p.T @ g[b, :, h]
    return out, dq, dk, dv


def ours(q, k, v, g, runs, key_runs, places):
    def total(q, k, v, g):
        out = attention_tpu.splash_attention(q, k, v, runs, key_runs, places)
        return jnp.sum(out.astype(jnp.float32) * g.reshape(out.shape).astype(jnp.float32)), out.reshape(q.shape)

    (_, out), gradients = jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v, g)
    return out, *gradients


def assert_near(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.abs(a - b).max() < tolerance * np.abs(b).max()


# bfloat16 keeps 8 bits, a rounding of 0.4 %: of the inputs' product, of probabilities and of results.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_packed_rows_with_grouped_heads_and_padding(dtype, tolerance):
    t = 300  # three blocks of queries, two of keys, none of them full
    q, k, v, g = inputs(2, t, t, dtype=dtype)
    runs = jnp.concatenate([lengths(1, 127, 2, 130, 40), lengths(300)])
    arguments = q, k, v, g, runs, runs, jnp.arange(t)
    assert_near(ours(*arguments), exact(*arguments), tolerance)


def test_queries_of_any_place_in_any_order():
    """Shards hold a part of the queries: the first places known only when running, and two pieces apart as balance gives them."""
    s, runs = 512, lengths(100, 200, 212)
    for places in (128 + np.arange(256), np.r_[384:512, 128:256], np.r_[300:400, 0:50]):
        q, k, v, g = inputs(1, len(places), s, seed=1)
        arguments = q, k, v, g, runs[:, places], runs, jnp.asarray(places)
        assert_near(ours(*arguments), exact(*arguments), 2e-6)


def test_nothing_crosses_a_border():
    """Gradient into one run: exactly zero in all others, also within one block."""
    runs = lengths(70, 90, 140)
    q, k, v, g = inputs(1, 300, 300, seed=2)
    inside = np.asarray(runs[0] == 1)
    out, *gradients = ours(q, k, v, jnp.where(inside[None, :, None, None], g, 0), runs, runs, jnp.arange(300))
    for x in gradients:
        assert np.all(np.asarray(x)[0, ~inside] == 0) and np.all(np.any(np.asarray(x)[0, inside] != 0, axis=(1, 2)))
    changed = ours(q, jnp.where(inside[None, :, None, None], k, 7.0), v, g, runs, runs, jnp.arange(300))[0]
    assert np.array_equal(np.asarray(changed)[0, inside], np.asarray(out)[0, inside])


def test_blocks_that_nothing_needs_are_not_computed():
    """Not a number times a probability of 0 is not a number: it shows where a block is computed and masked. 4 blocks of 128 by 128."""
    runs = lengths(128, 256, 128)
    needed = attention_tpu.needed_blocks(jnp.arange(512), runs[0], runs[0], 128, 128)
    np.testing.assert_array_equal(needed, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    q, k, v, g = inputs(1, 128, 512, seed=3)
    places = jnp.arange(256, 384)  # run 1, whose keys are in the blocks of 256 with numbers 0 and 1
    runs = lengths(128, 256, 640)
    k, v = (jnp.concatenate([x, jnp.full_like(x, jnp.nan)], axis=1) for x in (k, v))
    out, *gradients = ours(q, k, v, g, runs[:, 256:384], runs, places)
    assert all(np.all(np.isfinite(x)) for x in (out, *gradients))
    assert np.any(np.isnan(ours(q, k, v, g, runs[:, 256:384], runs, places + 256)[0]))


def test_blocks_cut_a_length_evenly():
    assert [attention_tpu._block(length, 1024) for length in (5, 128, 1024, 1100, 131_072)] == [128, 128, 1024, 640, 1024]


def over(mesh, function, *arrays):
    """function on every shard of the length of the arrays [B, T, ...]."""
    specs = tuple(P(None, "context") for _ in arrays)
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, tuple(NamedSharding(mesh, spec) for spec in specs))
        return jax.jit(jax.shard_map(function, in_specs=specs, out_specs=P(None, "context"), check_vma=False))(*placed)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_balanced_shards_see_as_many_keys(n):
    """Pieces i and 2 n - 1 - i of a row of 2 n pieces: every shard's queries have as many keys before them, and all come home."""
    mesh, axes = sharding.make_mesh({"context": n, "data": 8 // n}), ("context",)
    x = jnp.arange(4 * n)[None]  # two tokens to a piece
    moved = np.asarray(over(mesh, lambda x: context.balance(x, axes), x))[0].reshape(n, 4)
    if n == 4:
        assert moved.tolist() == [[0, 1, 14, 15], [12, 13, 2, 3], [4, 5, 10, 11], [8, 9, 6, 7]]
    assert len(set(moved.sum(axis=1).tolist())) == 1
    np.testing.assert_array_equal(over(mesh, lambda x: context.balanced_places(4, axes)[None], x), moved.reshape(1, -1))
    np.testing.assert_array_equal(over(mesh, lambda x: context.restore(context.balance(x, axes), axes), x), x)
    blocks = [attention_tpu.needed_blocks(p, 0 * p, 0 * x[0], 2, 2).sum() for p in jnp.asarray(moved)]
    assert [int(b) for b in blocks] == [2 * n + 1] * n


@pytest.mark.parametrize("t", [256, 12])  # a shard's 64 tokens; its 3, which have no halves
def test_shards_of_a_row_are_one_row(t):
    q, k, v, g = inputs(2, t, t, seed=4)
    runs = jnp.asarray(np.cumsum(np.random.default_rng(5).random((2, t)) < 0.03, axis=1), jnp.int32)
    runs, cfg = runs - runs[:, :1], config.tiny(attention="splash")
    mesh = sharding.make_mesh({"context": 4, "tensor": 2})

    def total(q, k, v):
        out = attention.attention_sharded(q, k, v, runs, cfg)
        return jnp.sum(out * g.reshape(out.shape)), out.reshape(q.shape)

    with jax.set_mesh(mesh):
        (_, out), gradients = jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert_near((out, *gradients), exact(q, k, v, g, runs, runs, jnp.arange(t)), 2e-6)


def test_the_kernel_is_chosen_for_the_devices_of_the_mesh():
    chip = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    pod = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=chip)
    auto, chunked = config.tiny(), config.tiny(attention="chunked")
    assert attention.chosen_kernel(auto) == "chunked"
    with jax.sharding.use_abstract_mesh(pod):
        assert (attention.chosen_kernel(auto), attention.chosen_kernel(chunked)) == ("splash", "chunked")
