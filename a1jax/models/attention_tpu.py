"""Full attention on TPU: jax's splash attention kernel, told which blocks of scores a packed row needs.

The kernel takes per block of scores whether it is computed, and per query its place; jax's own constructors fill both from a mask that is
known when compiling. Here they are filled from the runs and places of this batch and this shard: blocks between runs cost nothing, any
order of queries is exact, and one program serves all shards. Scores live in VMEM only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from a1jax.models import context
from a1jax.sharding import platform

LANES = 128  # blocks are multiples of this
BLOCK_Q, BLOCK_KV, BLOCK_COMPUTE = 1024, 1024, 512
NAME = "attention"  # of the kernel's results (output, log of the sum) for checkpoint policies: kept, the forward kernel runs once


def splash_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    runs: Int[Array, "B T"],
    key_runs: Int[Array, "B S"],
    places: Int[Array, " T"],
) -> Float[Array, "B T HF"]:
    """Attention to earlier tokens of the same run: q [B, T, H, F], k and v [B, S, K, F], runs [B, T], key_runs [B, S] -> [B, T, H * F].

    places [T]: where the queries stand among the S keys, in any order. Every query finds its own key there. key_runs do not fall along a
    row. T and S need not be multiples of a block. Off TPU the kernel is interpreted, slowly: for tests.
    """
    (b, t, h, f), s = q.shape, k.shape[1]
    scale = 4 // max(q.dtype.itemsize, 2)  # float32 blocks have half the rows, for the same VMEM
    bq, bkv = _block(t, BLOCK_Q * scale // 2), _block(s, BLOCK_KV * scale // 2)
    q = (q.astype(jnp.float32) * f**-0.5).astype(q.dtype)  # the kernel does not scale; exact in bfloat16 when F is a power of 4
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    # A padded query is one more copy of the last one, with zero gradient; a padded key is in no run.
    q, runs, places = _pad(q, bq, 1), _pad(runs, bq, 1, mode="edge"), _pad(places.astype(jnp.int32), bq, 0, mode="edge")
    k, v, key_runs = _pad(k, bkv, 1), _pad(v, bkv, 1), _pad(key_runs, bkv, 1, constant_values=-1)

    def row(xs):
        q, k, v, runs, key_runs = xs
        return _kernel(places, runs, key_runs, bq, bkv)(q, k, v, splash.SegmentIds(runs, key_runs))

    xs = *(jnp.moveaxis(x, 2, 1) for x in (q, k, v)), runs, key_runs
    # Row after row: every row has its own blocks, and the kernel takes one table of them.
    out = row([x[0] for x in xs])[None] if b == 1 else jax.lax.map(row, xs)
    return jnp.moveaxis(out, 1, 2)[:, :t].reshape(b, t, h * f)


def over_context(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    runs: Int[Array, "B T"],
    key_runs: Int[Array, "B S"],
    axes: context.Axes,
) -> Float[Array, "B T HF"]:
    """splash_attention of a shard that holds T consecutive queries of the row and all S keys, with even work for all shards.

    The queries of a later shard see more keys: of n shards the last does 2 - 1/n times the mean, and all wait. So every shard sends half
    of its queries away and computes for an early and a late piece; the results travel back. T must be even.
    """
    q, runs = (context.balance(x, axes) for x in (q, runs))
    return context.restore(splash_attention(q, k, v, runs, key_runs, context.balanced_places(q.shape[1], axes)), axes)


def _block(length: int, most: int) -> int:
    """Rows of a block: length is cut into as few even pieces as there must be."""
    pieces = -(-length // most)
    return -(-length // (pieces * LANES)) * LANES


def _pad(x: jax.Array, block: int, axis: int, **how) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = 0, -x.shape[axis] % block
    return jnp.pad(x, pad, **how)


def needed_blocks(
    places: Int[Array, " T"], runs: Int[Array, " T"], key_runs: Int[Array, " S"], bq: int, bkv: int
) -> Bool[Array, "blocks_q blocks_kv"]:
    """Blocks of scores in which some query may see some key: all such blocks, and where the queries of a block are neighbours no others."""
    last, run = jnp.max(places.reshape(-1, bq), axis=1), jnp.min(runs.reshape(-1, bq), axis=1)
    first_key, last_run = jnp.arange(0, key_runs.shape[0], bkv), jnp.max(key_runs.reshape(-1, bkv), axis=1)
    return (first_key[None] <= last[:, None]) & (last_run[None] >= run[:, None])


def _next(needed: jax.Array, axis: int) -> jax.Array:
    """Index along the axis of the block to fetch at each step: a step that is skipped names its needed neighbour, so nothing is fetched."""
    count = needed.shape[axis]
    low = jnp.argmax(needed, axis=axis, keepdims=True)
    high = count - 1 - jnp.argmax(jnp.flip(needed, axis), axis=axis, keepdims=True)
    return jnp.clip(jax.lax.broadcasted_iota(jnp.int32, needed.shape, axis), low, high).astype(jnp.int32)


def _not_later(place: jax.Array, key: jax.Array) -> jax.Array:
    return place >= key


def _kernel(places: jax.Array, runs: jax.Array, key_runs: jax.Array, bq: int, bkv: int) -> splash.SplashAttentionKernel:
    needed = needed_blocks(places, runs, key_runs, bq, bkv)
    computed = needed.astype(jnp.int32)[None]  # 1: mask inside, by _not_later and runs

    def info(axis):
        return MaskInfo(_next(needed, axis)[None], None, computed, None, places)

    compute = next(size for size in (BLOCK_COMPUTE, 256, LANES) if bkv % size == 0)
    # Not the fused backward kernel: it writes a whole gradient of q for every block of keys, [S / bkv, H, T, F].
    blocks = splash.BlockSizes(
        block_q=bq, block_kv=bkv, block_kv_compute=compute,
        block_q_dkv=bq, block_kv_dkv=bkv, block_kv_dkv_compute=compute,
        block_q_dq=bq, block_kv_dq=bkv,
    )  # fmt: skip
    return splash.SplashAttentionKernel(
        info(1), info(1), info(0), block_sizes=blocks, is_mqa=False, save_residuals=False, mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None, residual_checkpoint_name=NAME, mask_function=_not_later, interpret=platform() != "tpu",
    )  # fmt: skip
