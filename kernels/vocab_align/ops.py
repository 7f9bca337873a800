"""top-k, log-sum-exp and gathered logits over a vocabulary, in plain XLA, block by block; see ../README.md.

Letters: N tokens, D width, V vocabulary, k ids kept. Logits are float32 whatever the inputs are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import blocks, over_devices

SLAB = 1 << 20  # elements of gathered rows alive at once: near a CPU's cache; an accelerator wants about 1 << 26


def topk(
    hidden: jax.Array, unembed: jax.Array, k: int, block: int, valid: jax.Array | np.ndarray | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k largest logits of every token, exactly, and the log-sum-exp of all of them.

    hidden [N, D]; unembed [V, D]; valid [V] bool or None: which rows are tokens. Returns (values float32 [N, k] in falling
    order, ids int32 [N, k], logsumexp float32 [N]). Equal logits: the lower id first. No gradient.
    Raises ValueError when k is below 1 or above the number of valid ids. Where ``valid`` is traced its count is unknown, and
    so are rows that hold -inf: places that no id can take then come back as value -inf, id -1.
    """
    _check(hidden, unembed)
    vocab = unembed.shape[0]
    known = vocab if valid is None or isinstance(valid, jax.core.Tracer) else int(np.count_nonzero(np.asarray(valid)))
    if not 1 <= k <= known:
        raise ValueError(f"k is {k}, but the output matrix has {known} valid ids of {vocab}: choose k from 1 to {known}")
    hidden, unembed = lax.stop_gradient((hidden, unembed))
    tokens = hidden.shape[0]

    def body(carry, start, fresh):
        values, ids, running = carry
        logits, _ = _logits(hidden, unembed, start, fresh, valid, block)
        running = blocks.add_logsumexp(running, logits)
        if block >= vocab:  # the only block: nothing to merge with
            values, ids = lax.top_k(logits, k)
            return values, jnp.where(jnp.isneginf(values), -1, ids), running
        # What is kept stands before the block: on equal logits top_k takes the earlier place, here always the lower id.
        # One selection over both is faster than selecting in the block first: the kept values weed out most of it.
        values, place = lax.top_k(jnp.concatenate([values, logits], axis=1), k)
        kept = jnp.take_along_axis(ids, jnp.minimum(place, k - 1), axis=1)
        return values, jnp.where(place < k, kept, start + place - k), running

    empty = (jnp.full((tokens, k), -jnp.inf, jnp.float32), jnp.full((tokens, k), -1, jnp.int32), blocks.start_logsumexp(tokens))
    values, ids, running = blocks.each(body, empty, vocab, block)
    return values, ids, blocks.finish_logsumexp(running)


def logsumexp(hidden: jax.Array, unembed: jax.Array, block: int, valid: jax.Array | np.ndarray | None = None) -> jax.Array:
    """float32 [N]: log-sum-exp over the vocabulary of hidden [N, D] times unembed [V, D] transposed.

    Has a gradient to both (softmax-weighted rows), computed block by block from logits made again. ``valid`` as in ``topk``.
    """
    _check(hidden, unembed)
    return _logsumexp(hidden, unembed, valid, block)


def gather_logits(hidden: jax.Array, unembed: jax.Array, ids: jax.Array, slab: int = SLAB) -> jax.Array:
    """float32 [N, k]: the logits of hidden [N, D] at ids int32 [N, k]: k rows of unembed [V, D] per token, not V.

    Gradient to hidden: the same rows gathered again; to unembed: a scatter-add, summed in float32, zero outside ids.
    slab: elements of gathered rows [., k, D] alive at once; it bounds memory and changes nothing else. Under a mesh the tokens are cut over
    all its devices, each with a copy of unembed, see ``over_devices``; the gradient to unembed is summed over them once.
    """
    _check(hidden, unembed)
    if ids.ndim != 2 or ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"ids {ids.shape} do not belong to hidden {hidden.shape}: ids must be [{hidden.shape[0]}, k]")
    return over_devices.by_rows(lambda rows, matrix: _gather(rows[0], matrix, rows[1], slab), (hidden, ids), unembed)


def _check(hidden: jax.Array, unembed: jax.Array) -> None:
    if hidden.ndim != 2 or unembed.ndim != 2 or hidden.shape[1] != unembed.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and unembed {unembed.shape} must be [N, D] and [V, D] of one width D")


def _logits(hidden, unembed, start, fresh, valid, block):
    """One block: logits [N, block] with -inf at ids that do not count, and its rows [block, D] with zeros there."""
    matrix = blocks.rows(unembed, start, block)
    token = jnp.logical_not(jnp.any(jnp.isneginf(matrix), axis=1))
    if valid is not None:
        token = token & lax.dynamic_slice_in_dim(jnp.asarray(valid), start, matrix.shape[0])
    if fresh is not None:
        token = token & fresh
    matrix = jnp.where(token[:, None], matrix, 0)  # 0 times -inf is no number, also in the gradient
    return blocks.mask(blocks.product(hidden, matrix), token), matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logsumexp(hidden, unembed, valid, block):
    def body(running, start, fresh):
        return blocks.add_logsumexp(running, _logits(hidden, unembed, start, fresh, valid, block)[0])

    return blocks.finish_logsumexp(blocks.each(body, blocks.start_logsumexp(hidden.shape[0]), unembed.shape[0], block))


def _logsumexp_forward(hidden, unembed, valid, block):
    total = _logsumexp(hidden, unembed, valid, block)
    return total, (hidden, unembed, valid, total)


def _logsumexp_backward(block, saved, cotangent):
    hidden, unembed, valid, total = saved

    def body(gradients, start, fresh):
        logits, matrix = _logits(hidden, unembed, start, fresh, valid, block)
        grad = jnp.exp(logits - total[:, None]) * cotangent[:, None]
        return blocks.accumulate(gradients, grad, hidden, matrix, start)

    d_hidden, d_unembed = blocks.each(body, blocks.zero_gradients(hidden, unembed), unembed.shape[0], block)
    return d_hidden.astype(hidden.dtype), d_unembed.astype(unembed.dtype), None


_logsumexp.defvjp(_logsumexp_forward, _logsumexp_backward)


def into_slabs(x: jax.Array, slabs: int) -> jax.Array:
    """[N, ...] -> [slabs, ceil(N / slabs), ...], zero padded. Token n goes to slab n % slabs: a slab then has tokens of every
    shard of N, so walking the slabs moves nothing between devices."""
    x = jnp.pad(x, [(0, -x.shape[0] % slabs)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(x.shape[0] // slabs, slabs, *x.shape[1:]).swapaxes(0, 1)


def from_slabs(x: jax.Array, tokens: int) -> jax.Array:
    """Undoes ``into_slabs``."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:tokens]


def slab_count(tokens: int, k: int, width: int, slab: int) -> int:
    """Slabs so that the gathered rows of one, [N / slabs, k, D], stay within ``slab`` elements, but at least a token each."""
    return max(1, min(tokens, -(-tokens * k * width // slab)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(hidden, unembed, ids, slab):
    slabs = slab_count(*ids.shape, hidden.shape[1], slab)

    def one(part):
        vectors, chosen = part
        return jnp.einsum("nd,nkd->nk", vectors, unembed[chosen], preferred_element_type=jnp.float32)

    return from_slabs(lax.map(one, (into_slabs(hidden, slabs), into_slabs(ids, slabs))), hidden.shape[0])


def _gather_forward(hidden, unembed, ids, slab):
    return _gather(hidden, unembed, ids, slab), (hidden, unembed, ids)


def _gather_backward(slab, saved, cotangent):
    hidden, unembed, ids = saved
    slabs = slab_count(*ids.shape, hidden.shape[1], slab)

    def one(part):
        grad, chosen = part
        return jnp.einsum("nk,nkd->nd", grad, unembed[chosen].astype(jnp.float32))

    d_hidden = from_slabs(lax.map(one, (into_slabs(cotangent, slabs), into_slabs(ids, slabs))), hidden.shape[0])
    d_unembed = scatter(hidden, ids, cotangent, jnp.zeros(unembed.shape, jnp.float32), slab)
    return d_hidden.astype(hidden.dtype), d_unembed.astype(unembed.dtype), None


_gather.defvjp(_gather_forward, _gather_backward)


def scatter(hidden: jax.Array, ids: jax.Array, grad: jax.Array, into: jax.Array, slab: int) -> jax.Array:
    """``scatter_by_id`` or ``scatter_by_token``, whichever suits the device: the same sum, added in another order."""
    # On a CPU a sort of N k ids costs more than all the rest of the step; elsewhere unsorted adds collide, in any order.
    orders = {"cpu": functools.partial(scatter_by_token, slab=slab), "default": functools.partial(scatter_by_id, slab=slab)}
    return lax.platform_dependent(hidden, ids, grad, into, **orders)


def scatter_by_id(hidden: jax.Array, ids: jax.Array, grad: jax.Array, into: jax.Array, slab: int) -> jax.Array:
    """into [V, D] float32 plus, for every token n and place j, grad[n, j] * hidden[n] at row ids[n, j], in order of the ids."""
    tokens, k = ids.shape
    place = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], (tokens, k))
    ids, place, grad = lax.sort((ids.reshape(-1), place.reshape(-1), grad.reshape(-1)), num_keys=1, is_stable=True)
    slabs = slab_count(tokens, k, hidden.shape[1], slab)
    size = -(-tokens * k // slabs)
    pad = size * slabs - tokens * k  # the last slab is filled with zeros added to the last id, which keeps it sorted
    parts = [jnp.pad(x, (0, pad), mode=mode).reshape(slabs, size) for x, mode in ((ids, "edge"), (place, "edge"), (grad, "constant"))]

    def one(total, part):
        chosen, token, weight = part
        return total.at[chosen].add(weight[:, None] * hidden[token].astype(jnp.float32), indices_are_sorted=True), None

    return lax.scan(one, into, tuple(parts))[0]


def scatter_by_token(hidden: jax.Array, ids: jax.Array, grad: jax.Array, into: jax.Array, slab: int) -> jax.Array:
    """The same sum in order of the tokens: no sort. 10 to 25 times faster on a CPU."""
    slabs = slab_count(*ids.shape, hidden.shape[1], slab)

    def one(total, part):
        vectors, chosen, weight = part
        rows = weight[:, :, None] * vectors.astype(jnp.float32)[:, None, :]
        return total.at[chosen.reshape(-1)].add(rows.reshape(-1, rows.shape[-1])), None

    return lax.scan(one, into, (into_slabs(hidden, slabs), into_slabs(ids, slabs), into_slabs(grad, slabs)))[0]
