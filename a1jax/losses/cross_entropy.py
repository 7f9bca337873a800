"""Cross-entropy from hidden states and an output matrix, without the logits of all tokens over all ids.

At 64K tokens and a vocabulary of 152K those logits are 28 GB (../shared/design/pitfalls.md, 4). Here they exist one tile at
a time. The loss is linear in its cotangent, so its gradients are formed together with its value and only scaled later:
a vocabulary of one block then costs three matrix products like the dense form, a larger one four (logits are made twice).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from a1jax.kernels.vocab_align import blocks
from a1jax.types import Metrics


def blocked_cross_entropy(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, weights: jax.Array, block: int, tile: int | None = None
) -> tuple[jax.Array, Metrics]:
    """sum over n of weights[n] * (logsumexp(logits[n]) - logits[n, targets[n]]), float32, with logits = hidden @ unembed.T.

    hidden [N, D] and unembed [V, D], float32 or bfloat16 (their products are summed in float32); targets int32 [N];
    weights float32 [N], from ``masked.token_weights``: no gradient to them; a token of weight 0 has no gradient, whatever
    its target is. A target outside the vocabulary at a token that has a weight makes the loss infinite.
    block: ids per step, memory is N * block floats; the value does not depend on it.
    tile: None, or tokens per step: tokens of weight 0 are sorted to the end and their tiles skipped, memory is tile * block
    floats. 256 wins on one CPU core even with nothing to skip. Leave it None where N is sharded: sorting crosses shards.

    Metrics over the tokens with a weight: ce/loss (their plain mean), ce/accuracy (the target is the argmax, on equal
    logits the lowest id), ce/tokens (their number). To join micro-batches weigh the first two by the third.
    Raises ValueError for shapes that do not belong together.
    """
    tokens = hidden.shape[0]
    if hidden.ndim != 2 or unembed.ndim != 2 or hidden.shape[1] != unembed.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and unembed {unembed.shape} must be [N, D] and [V, D] of one width D")
    if targets.shape != (tokens,) or weights.shape != (tokens,):
        raise ValueError(f"targets {targets.shape} and weights {weights.shape} must be [{tokens}], one per hidden state")
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    loss, sums = _loss(hidden, unembed, targets, weights, block, tile)
    total, correct, count = lax.stop_gradient(sums)
    some = jnp.maximum(count, 1.0)
    return loss, {"ce/loss": total / some, "ce/accuracy": correct / some, "ce/tokens": count}


def _statistics(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, block: int) -> tuple[tuple, jax.Array, jax.Array]:
    """((maximum, sum of exp(logit - maximum)), target's logit, 1.0 where the target is the argmax), float32 [N] each."""

    def body(carry, start, fresh):
        running, target, lower = carry
        logits = blocks.mask(blocks.product(hidden, blocks.rows(unembed, start, block)), fresh)
        running = blocks.add_logsumexp(running, logits)
        local = targets - start
        picked = jnp.take_along_axis(logits, jnp.clip(local, 0, logits.shape[1] - 1)[:, None], axis=1)[:, 0]
        target = jnp.where((local >= 0) & (local < logits.shape[1]), jnp.maximum(target, picked), target)
        # The best logit of a lower id decides ties. An argmax would be exact too, but costs as much as a matrix product here.
        columns = jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :]
        lower = jnp.maximum(lower, jnp.max(jnp.where(columns < local[:, None], logits, -jnp.inf), axis=1))
        return running, target, lower

    nothing = jnp.full(hidden.shape[:1], -jnp.inf, jnp.float32)
    start = (blocks.start_logsumexp(hidden.shape[0]), nothing, nothing)
    running, target, lower = blocks.each(body, start, unembed.shape[0], block)
    return running, target, ((target >= running[0]) & (target > lower)).astype(jnp.float32)


def _sums(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, weights: jax.Array, block: int):
    """(weighted loss, (plain loss, correct, count)) summed over tokens with a weight; and the running log-sum-exp."""
    running, target, correct = _statistics(hidden, unembed, targets, block)
    counts = weights != 0
    # A masked token's target may be any number; its loss may then be infinite, and infinity times 0 is no number.
    loss = jnp.where(counts, blocks.finish_logsumexp(running) - target, 0.0)
    of = counts.astype(jnp.float32)
    return (jnp.sum(weights * loss), (jnp.sum(loss), jnp.sum(correct * of), jnp.sum(of))), running


def _gradients(gradients, hidden, unembed, targets, weights, running, block):
    """Adds d loss / d (hidden [N, D], unembed [V, D]) to float32 ``gradients``: (softmax - one_hot) * weight, block by block."""
    maximum, total = running
    share = (weights / total)[:, None]

    def body(gradients, start, fresh):
        matrix = blocks.rows(unembed, start, block)
        logits = blocks.mask(blocks.product(hidden, matrix), fresh)
        at = jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :] == (targets - start)[:, None]
        if fresh is not None:
            at = at & fresh[None, :]
        grad = jnp.exp(logits - maximum[:, None]) * share - jnp.where(at, weights[:, None], 0.0)
        return blocks.accumulate(gradients, grad, hidden, matrix, start)

    return blocks.each(body, gradients, unembed.shape[0], block)


def _over_tiles(body: Callable, carry: Any, arrays: tuple[jax.Array, ...], weights: jax.Array, tile: int | None):
    """``carry, rows = body(carry, *arrays, weights)``, over tiles of the tokens that have a weight where ``tile`` is given.

    rows: float32 [N, .] in the order of the tokens; skipped ones get zeros. The number of steps follows the data, shapes do not.
    """
    tokens = weights.shape[0]
    if tile is None:
        return body(carry, *arrays, weights)
    tile = min(tile, tokens)
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.concatenate([order, jnp.full((-tokens % tile,), tokens, order.dtype)])  # one past the end: reads 0, writes nothing
    steps = (jnp.sum(weights != 0) + tile - 1) // tile

    def step(state):
        index, carry, rows = state
        chosen = lax.dynamic_slice_in_dim(order, index * tile, tile)
        part = [x.at[chosen].get(mode="fill", fill_value=0) for x in (*arrays, weights)]
        carry, new = body(carry, *part)
        rows = jax.tree.map(lambda all_rows, some: all_rows.at[chosen].set(some, mode="drop", unique_indices=True), rows, new)
        return index + 1, carry, rows

    shapes = jax.eval_shape(body, carry, *arrays, weights)[1]
    rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.while_loop(lambda state: state[0] < steps, step, (jnp.zeros_like(steps), carry, rows))[1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(hidden, unembed, targets, weights, block, tile):
    def body(total, hidden, targets, weights):
        return jax.tree.map(jnp.add, total, _sums(hidden, unembed, targets, weights, block)[0]), ()

    zero = jnp.float32(0)
    return _over_tiles(body, (zero, (zero, zero, zero)), (hidden, targets), weights, tile)[0]


def _loss_forward(hidden, unembed, targets, weights, block, tile):
    def body(carry, hidden, targets, weights):
        total, d_unembed = carry
        sums, running = _sums(hidden, unembed, targets, weights, block)
        start = (jnp.zeros(hidden.shape, jnp.float32), d_unembed)
        d_hidden, d_unembed = _gradients(start, hidden, unembed, targets, weights, running, block)
        return (jax.tree.map(jnp.add, total, sums), d_unembed), d_hidden

    zero = jnp.float32(0)
    start = ((zero, (zero, zero, zero)), jnp.zeros(unembed.shape, jnp.float32))
    (sums, d_unembed), d_hidden = _over_tiles(body, start, (hidden, targets), weights, tile)
    return sums, (d_hidden.astype(hidden.dtype), d_unembed.astype(unembed.dtype))


def _loss_backward(block, tile, saved, cotangents):
    d_hidden, d_unembed = saved
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_unembed * scale).astype(d_unembed.dtype), None, None


_loss.defvjp(_loss_forward, _loss_backward)
