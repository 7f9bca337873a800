"""The routed experts of one device, in forms that give the same numbers: dense, ragged (grouped: by other kernels), blocked.

x [T, D], router weights [T, E] (at most A above 0 per token), gate_up [E, D, 2 F], down [E, F, D] -> [T, D]. No form drops a token.
Weights come in the type they are stored in and are cast where they multiply: their gradients are then summed, over rows and devices, in
the stored type (float32) and not in the type of the activations.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from a1jax.models.config import ModelConfig
from a1jax.models.experts_gpu import grouped_dot
from a1jax.models.layers import linear, silu

DENSE_ROWS = 256  # tokens per step of experts_dense: [rows, E * F] float32 is half a megabyte for the tiny configurations


def experts_local(
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """The routed experts here: x [B, T, D], weights [B, T, E] -> [B, T, D], by the form that cfg.moe names."""
    flat, per_token = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    (rows, e), active = per_token.shape, min(cfg.num_experts_active, down.shape[0])
    # A decoding step: filling up the blocks, and copying weights for them (as dear as their matmul), would cost more than all experts
    # on all tokens.
    few = rows * e <= 2 * (rows * active + e * cfg.expert_block)
    if cfg.moe == "dense" or (cfg.moe == "blocked" and few):
        return experts_dense(flat, per_token, gate_up, down).reshape(x.shape)
    if cfg.moe == "blocked":
        return experts_blocked(flat, per_token, gate_up, down, active, cfg.expert_block).reshape(x.shape)
    dot = jax.lax.ragged_dot if cfg.moe == "ragged" else grouped_dot
    return experts_ragged(flat, per_token, gate_up, down, active, dot).reshape(x.shape)


def glu(x: jax.Array, width: int) -> jax.Array:
    """silu(gate) * up of the two halves of the last axis."""
    return silu(x[..., :width]) * x[..., width:]


def experts_dense(
    x: Float[Array, "T D"], weights: Float32[Array, "T E"], gate_up: Float[Array, "E D F2"], down: Float[Array, "E F D"]
) -> Float[Array, "T D"]:
    """Every expert on every token: x [T, D], weights [T, E], gate_up [E, D, 2 F], down [E, F, D] -> [T, D]. Three plain matmuls.

    DENSE_ROWS tokens at a time, computed again in the backward pass: the wide activations then stay in a core's cache, which more
    than pays for the second computation.
    """
    (e, f, d), t = down.shape, x.shape[0]
    if t <= DENSE_ROWS:  # a decoding step: one batched matmul into the experts, one matmul out of all of them
        h = glu(jnp.matmul(jnp.broadcast_to(x[None], (e, t, d)), gate_up.astype(x.dtype)), f) * weights.T[..., None].astype(x.dtype)
        return linear(jnp.moveaxis(h, 0, 1).reshape(t, -1), down.reshape(e * f, d))
    gate, up = (jnp.moveaxis(half, 0, 1).reshape(d, e * f) for half in jnp.split(gate_up, 2, axis=-1))
    down = down.reshape(e * f, d)

    def rows(x, weights):
        h = silu(linear(x, gate)) * linear(x, up)
        h = h.reshape(-1, e, f) * weights[..., None].astype(x.dtype)
        return linear(h.reshape(-1, e * f), down)

    n = -(-t // DENSE_ROWS)
    x, weights = (jnp.pad(y, ((0, n * DENSE_ROWS - t), (0, 0))).reshape(n, DENSE_ROWS, -1) for y in (x, weights))
    return jax.lax.map(lambda xs: jax.checkpoint(rows, prevent_cse=False)(*xs), (x, weights)).reshape(-1, d)[:t]


@jax.custom_vjp
def gather_pairs(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """x [T, D] -> [T * A, D], row i the token of pair order[i]; place is order's inverse. Its gradient is a gather too, not a scatter."""
    return x[order // (order.shape[0] // x.shape[0])]


gather_pairs.defvjp(
    lambda x, order, place: (gather_pairs(x, order, place), (place, x.shape[0])),
    lambda residual, g: (jnp.sum(g[residual[0]].reshape(residual[1], -1, g.shape[-1]), axis=1), None, None),
)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], with x's gradient by the inverse permutation."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))


def experts_ragged(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    active: int,
    dot: Callable = jax.lax.ragged_dot,
) -> Float[Array, "T D"]:
    """Pairs of token and expert sorted by expert, then grouped matmuls; arguments as experts_dense, weights with at most `active`
    entries above 0 per token. There is room for T * active pairs, so nothing can be dropped; missing pairs lie behind the last group.
    dot(rows, stack of matrices, rows per group): the grouped matmul."""
    e, f, _ = down.shape
    weight, expert = jax.lax.top_k(weights, active)
    expert = jnp.where(weight > 0, expert, e).reshape(-1)  # e: no expert here
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(e)[None], axis=0, dtype=jnp.int32)
    real = (jnp.arange(expert.shape[0]) < jnp.sum(sizes))[:, None]  # rows behind the last group are undefined: never let them through
    h = jnp.where(real, gather_pairs(x, order, place), 0)
    h = jnp.where(real, glu(dot(h, gate_up.astype(h.dtype), sizes), f), 0)
    y = jnp.where(real, dot(h, down.astype(h.dtype), sizes), 0)
    y = permute(y, place, order).reshape(x.shape[0], active, -1)
    return jnp.sum(y * weight[..., None].astype(y.dtype), axis=1)


def experts_blocked(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    active: int,
    block: int = 64,
) -> Float[Array, "T D"]:
    """Pairs sorted by expert, every expert's pairs filled up to whole blocks of ``block``, one batched matmul over the blocks.

    For CPUs and GPUs, whose ragged_dot costs as much as all experts on all tokens and more. Every block has a copy of its expert's
    weights, and a gradient of them: large experts want large blocks, which cost num_experts half-filled ones.
    """
    (e, _, d), t = down.shape, x.shape[0]
    weight, expert = jax.lax.top_k(weights, active)
    expert = jnp.where(weight > 0, expert, e).reshape(-1)  # e: no expert here
    chosen = (expert[:, None] == jnp.arange(e)[None]).astype(jnp.int32)
    blocks = -(-jnp.sum(chosen, axis=0) // block)  # per expert
    ends = jnp.cumsum(blocks)
    n = -(-t * active // block) + e  # enough for any imbalance
    owner = jnp.minimum(jnp.sum(jnp.arange(n)[:, None] >= ends[None], axis=1), e - 1)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=1)  # place among the pairs of the same expert
    first = jnp.append((ends - blocks) * block, n * block)
    row = jnp.where(expert < e, first[expert] + rank, n * block)  # pair -> row of the blocks; beyond them: none
    pair = jnp.full((n * block,), t * active, jnp.int32).at[row].set(jnp.arange(t * active, dtype=jnp.int32), mode="drop")
    h = take_rows(jnp.repeat(x, active, axis=0), pair, row).reshape(n, block, d)
    h = glu(grouped_matmul(h, gate_up, owner), gate_up.shape[-1] // 2)
    y = take_rows(grouped_matmul(h, down, owner).reshape(-1, d), row, pair).reshape(t, active, d)
    return jnp.sum(y * weight[..., None].astype(y.dtype), axis=1)


@jax.custom_vjp
def take_rows(x: Float[Array, "rows D"], index: Int[Array, " out"], inverse: Int[Array, " rows"]) -> Float[Array, "out D"]:
    """x[index], 0 where index is no row. inverse: where each row of x went (beyond the end: nowhere), so that the gradient is a gather."""
    return jnp.where((index < x.shape[0])[:, None], x[jnp.minimum(index, x.shape[0] - 1)], 0)


take_rows.defvjp(
    lambda x, index, inverse: (take_rows(x, index, inverse), (index, inverse)), lambda r, g: (take_rows(g, r[1], r[0]), None, None)
)


@jax.custom_vjp
def grouped_matmul(x: Float[Array, "N C D"], w: Float[Array, "E D F"], owner: Int[Array, " N"]) -> Float[Array, "N C F"]:
    """x[n] @ w[owner[n]] in x's type. Its gradient sums blocks by a matmul with their owners: a CPU's scatter takes ten times as long."""
    return jnp.matmul(x, w[owner].astype(x.dtype))


def _grouped_backward(residual, g):
    x, w, owner = residual
    per_block = jnp.matmul(jnp.swapaxes(x, 1, 2), g, preferred_element_type=jnp.float32)
    owns = (jnp.arange(w.shape[0])[:, None] == owner[None]).astype(jnp.float32)
    dw = (owns @ per_block.reshape(per_block.shape[0], -1)).reshape(w.shape)
    return jnp.matmul(g, jnp.swapaxes(w[owner].astype(g.dtype), 1, 2)), dw.astype(w.dtype), None


grouped_matmul.defvjp(lambda x, w, owner: (grouped_matmul(x, w, owner), (x, w, owner)), _grouped_backward)
