"""The Triton kernel's body in interpret mode against the definition; cuDNN's arguments by hand. No GPU is here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import sharding
from a1jax.config import ConfigError
from a1jax.models import attention, attention_gpu
from a1jax.models.config import tiny

T, H, K, F = 150, 4, 2, 16  # no multiple of the kernel's tile
LENGTHS = (70, 1, 60, 19)  # borders inside tiles; a run of one token
RUNS = np.repeat(np.arange(4), LENGTHS)[None].astype(np.int32)


def test_triton_values_and_gradients_of_a_packed_row():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, heads, F)), jnp.float32) for heads in (H, K, K))
    g = jnp.asarray(rng.standard_normal((1, T, H * F)), jnp.float32)

    def both(function):
        return jax.jit(lambda *x: (function(*x), jax.grad(lambda *y: jnp.sum(function(*y) * g), (0, 1, 2))(*x)))(q, k, v)

    runs = jnp.asarray(RUNS)
    got = both(lambda *x: attention_gpu.flash_attention(*x, runs, "triton", interpret=True))
    expected = both(lambda *x: attention.causal_attention(*x, runs, 0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, expected)


def test_the_runs_as_cudnn_wants_them():
    runs = jnp.asarray(np.concatenate([RUNS, np.zeros_like(RUNS)]))
    starts, lengths = attention_gpu.run_lengths(runs, 5)
    np.testing.assert_array_equal(starts, [[0, 70, 71, 131, -1, -1], [0, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[70, 1, 60, 19, -1], [T, -1, -1, -1, -1]])
    np.testing.assert_array_equal(attention_gpu.run_lengths(runs, 4)[1][0], LENGTHS)  # as many places as runs


def test_cudnn_gets_packed_rows_and_too_many_runs_are_nan(monkeypatch):
    """What is handed over, caught before it reaches a library that is not here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def caught(q, k, v, *, scale, mask_type, q_seqlen, kv_seqlen, q_offsets, kv_offsets):
        assert (scale, mask_type) == (F**-0.5, cudnn.MaskType.PADDING_CAUSAL)
        np.testing.assert_array_equal(q_seqlen, kv_seqlen)
        np.testing.assert_array_equal(q_offsets, kv_offsets)
        assert q_offsets.shape[1] == q_seqlen.shape[1] + 1 and q_seqlen.dtype == jnp.int32
        return q

    monkeypatch.setattr(cudnn, "dot_product_attention", caught)
    q, kv = jnp.ones((1, T, H, F), jnp.bfloat16), jnp.ones((1, T, K, F), jnp.bfloat16)
    fits = attention_gpu.flash_attention(q, kv, kv, jnp.asarray(RUNS), most_runs=4)
    assert fits.shape == (1, T, H * F) and fits.dtype == jnp.bfloat16 and bool(jnp.all(fits == 1))
    assert bool(jnp.all(jnp.isnan(attention_gpu.flash_attention(q, kv, kv, jnp.asarray(RUNS), most_runs=3))))


def test_refusals():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ConfigError, match="kernel is 'cutlass': choose one of cudnn, triton"):
        attention_gpu.flash_attention(x, x, x, jnp.zeros((1, 8), jnp.int32), "cutlass")
    assert tiny(attention="flash_triton").attention == "flash_triton"
    with jax.set_mesh(sharding.make_mesh({"data": 8})), pytest.raises(ConfigError, match="one GPU without a mesh"):
        attention.attend_earlier(x, x, x, jnp.zeros((1, 8), jnp.int32), tiny(attention="flash"))
