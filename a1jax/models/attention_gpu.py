"""Full attention on an NVIDIA GPU by library kernels that never hold the scores: cuDNN's, or the Triton one that jax carries.

Both take packed rows: a query sees earlier tokens of its own run only. cuDNN's (Hopper or later, cuDNN 9.6 or later, bfloat16, head_dim a
multiple of 8 up to 256) gets the runs as sequences of their own and does no work between them, so a row of many short runs costs as
little as the runs; it takes grouped heads as they are. Triton's reads all earlier keys and masks, and wants keys and values repeated for
every query head: the way out where cuDNN refuses. jax calls that module deprecated and names no other within jax itself.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from a1jax.config import ConfigError

KERNELS = ("cudnn", "triton")
TILE = 128  # query rows per program of the Triton kernel; rows are padded up to a multiple of it


def flash_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T K F"],
    v: Float[Array, "B T K F"],
    runs: Int[Array, "B T"],
    kernel: str = "cudnn",
    most_runs: int = 64,
    interpret: bool = False,
) -> Float[Array, "B T HF"]:
    """softmax(q k / sqrt(F)) v over earlier tokens of the same run, with its gradient: q [B, T, H, F], k and v [B, T, K, F] -> [B, T, H F].

    runs [B, T]: 0, 1, ... along a row, as transformer.number_runs gives them. most_runs: places for runs per row in cuDNN's arguments,
    a static size (its statistics take most_runs * H * T floats per row); a row with more runs comes back as nan, because attending
    across borders in silence would be worse. interpret: the Triton kernel's body anywhere, slowly.
    Raises ConfigError for a kernel that is none; jax's own errors where the device or cuDNN refuses.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"flash_attention: kernel is {kernel!r}: choose one of {', '.join(KERNELS)}")
    out = _cudnn(q, k, v, runs, most_runs) if kernel == "cudnn" else _triton(q, k, v, runs, interpret)
    return out.reshape(*q.shape[:2], -1)


def run_lengths(runs: Int[Array, "B T"], most_runs: int) -> tuple[Int[Array, "B M1"], Int[Array, "B M"]]:
    """Where every run of a row starts, [B, most_runs + 1], and its length, [B, most_runs], int32; -1 in places without a run."""
    numbers = jnp.arange(most_runs + 1, dtype=runs.dtype)
    before = jax.vmap(lambda row: jnp.searchsorted(row, numbers))(runs).astype(jnp.int32)  # tokens of lower runs
    lengths = jnp.diff(jnp.concatenate([before, jnp.full_like(before[:, :1], runs.shape[1])], axis=1), axis=1)
    some = lengths > 0
    return jnp.where(some, before, -1), jnp.where(some, lengths, -1)[:, :most_runs]


def _cudnn(q, k, v, runs, most_runs):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # the public jax.nn.dot_product_attention has no packed rows

    starts, lengths = run_lengths(runs, most_runs)
    packed = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts}
    out = cudnn.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL, **packed)
    fits = (runs[:, -1] < most_runs)[:, None, None, None]
    return jnp.where(fits, out, jnp.nan).astype(q.dtype)


def _triton(q, k, v, runs, interpret):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as pallas_attention

    t, f, repeat = q.shape[1], q.shape[3], q.shape[2] // k.shape[2]
    pad = ((0, 0), (0, -t % TILE))
    q, k, v = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (q, k, v))
    runs = jnp.pad(runs, pad, mode="edge")  # padding stands behind every real query and is cut off
    # Forward: a tile of queries and two of keys and values in flight, 64 + 4 * 32 KiB of shared memory at F = 256, of 228 on Hopper.
    # Backward: two float32 accumulators of block x F per program have to stay in registers, 32 rows at F = 256.
    small = 32 if f > 128 else 64
    sizes = pallas_attention.BlockSizes(TILE, 64, small, small, small, small)
    k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    return pallas_attention.mha(q, k, v, runs, f**-0.5, True, sizes, interpret=interpret)[:, :t]
