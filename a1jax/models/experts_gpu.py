"""Grouped matmuls on a Hopper GPU by the kernels that jax carries for it (Pallas, Mosaic GPU), with their gradients.

XLA has no fast form of jax.lax.ragged_dot there (jax 0.11.2, cuDNN below 9.22): it writes the rows out once per group, zero where they are
not its own, and multiplies everything, num_experts times the work and memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from a1jax.config import ConfigError

ROWS, COLUMNS, DEPTH, STEPS = 128, 128, 64, 4  # tile of the result, slice of the sum, slices in flight: 4 * 32 + 32 KiB of shared memory
TILES = {"block_m": ROWS, "block_n": COLUMNS, "block_k": DEPTH, "max_concurrent_steps": STEPS, "grid_block_n": 1}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(x: Float[Array, "P D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"], kernels: bool = True) -> Float[Array, "P F"]:
    """x[rows of group e] @ w[e], bfloat16 on the kernels: x [P, D] sorted by group, sizes int32 [E] rows each; rows behind the last group
    come back undefined. Gradients: to x the same kernel on w transposed; to w a sum over each group's rows in float32, rounded once.

    Rows behind the last group must be finite, here and in the gradient. kernels: False computes all three by jax.lax.ragged_dot, for
    a machine without such a GPU.
    Raises ConfigError for widths that are no multiples of the kernels' tiles.
    """
    return _dot(x, w, sizes, kernels, transposed=False)


def _dot(x, w, sizes, kernels, transposed):
    """x [P, D] times w [E, D, F], or x [P, F] times w transposed."""
    if not kernels:
        return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2) if transposed else w, sizes)
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    for width in w.shape[1:]:
        if width % COLUMNS:
            raise ConfigError(f"moe 'grouped': an expert's matrix is {w.shape[1:]}: make d_model and expert_width multiples of {COLUMNS}")
    return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, transpose_rhs=transposed, **TILES)


def _forward(x, w, sizes, kernels):
    return grouped_dot(x, w, sizes, kernels), (x, w, sizes)


def _backward(kernels, residual, g):
    x, w, sizes = residual
    dx = _dot(g, w, sizes, kernels, transposed=True)
    if not kernels:
        shape = jax.lax.RaggedDotDimensionNumbers(((((0,), (0,))), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
        return dx, jax.lax.ragged_dot_general(x, g, sizes, shape).astype(w.dtype), None
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    return dx, transposed_ragged_dot_mgpu.transposed_ragged_dot(x, g, group_sizes=sizes, **TILES), None


grouped_dot.defvjp(_forward, _backward)
