"""The routed experts over a mesh: every pair of token and expert travels to the device that owns the expert, and its result back.

No pair is dropped, whatever the imbalance, and no buffer is sized for the worst of it: pairs travel in rounds, in each of which a device
sends up to `room` of them to every other one, and there are as many rounds as the fullest pair of devices needs. An all-gather of tokens
would send every token to all owners instead of the few that want it, and would need room for all of their pairs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from a1jax.models.experts import glu, permute

ROOM = 16_384  # rows of one round on a device, all its senders together: 67 MB of bfloat16 at width 2048


class Pairs(NamedTuple):
    """Pairs of token and expert, pair i of token i // A, grouped by the device they go to. P devices, c places from each to each."""

    order: Int[Array, " pairs"]  # pairs by destination; those that go nowhere last
    first: Int[Array, " P"]  # a destination's first place in order
    count: Int[Array, " P"]  # its number of pairs
    local: Int[Array, " pairs"]  # the expert, as its owner counts them
    rounds: Int[Array, ""]  # of all devices, the most that one needs


def room_for(tokens: int, devices: int, active: int, experts: int) -> int:
    """Places from one device to another in one round: no more than pairs can be (a token has at most one for each expert)."""
    return max(1, min(ROOM // devices, tokens * min(active, experts)))


def places(sizes: dict[str, int], travelled: tuple[str, ...], experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(rank along the axes travelled, rank along the other ones) of the owner of every expert, int32 [experts] each.

    sizes: the axes that cut the experts, in their order, with their sizes."""
    owner = np.arange(experts) // (experts // int(np.prod(list(sizes.values()))))
    at = dict(zip(sizes, np.unravel_index(owner, tuple(sizes.values())), strict=True))

    def rank(axes):
        return np.int32(np.ravel_multi_index([at[a] for a in axes], [sizes[a] for a in axes])) if axes else np.zeros(experts, np.int32)

    return rank(travelled), rank(tuple(axis for axis in sizes if axis not in travelled))


def group(destination: Int[Array, " pairs"], local: Int[Array, " pairs"], devices: int, room: int, everyone: tuple[str, ...]) -> Pairs:
    """Pairs with a destination from 0 to devices - 1 (devices: nowhere). everyone: the axes of all devices that must agree on rounds."""
    count = jnp.sum(destination[:, None] == jnp.arange(devices)[None], axis=0, dtype=jnp.int32)
    rounds = -(-jnp.max(count) // room)
    rounds = jax.lax.pmax(rounds, everyone) if everyone else rounds
    return Pairs(jnp.argsort(destination, stable=True), jnp.cumsum(count) - count, count, local, rounds)


def of_round(index: jax.Array, pairs: Pairs, room: int) -> tuple[jax.Array, jax.Array]:
    """(pair, is there one), int32 and bool [P, room]: what goes where in round `index`."""
    place = index * room + jnp.arange(room)[None]
    at = jnp.minimum(pairs.first[:, None] + place, pairs.order.shape[0] - 1)
    return pairs.order[at], place < pairs.count[:, None]


def swap(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[P, ...] from every device -> [P, ...]: entry p goes to device p, entry p comes from device p. Its own inverse."""
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True) if axes else x


def own_experts(
    x: Float[Array, "rows D"], weight: Float32[Array, " rows"], expert: Int[Array, " rows"], gate_up: jax.Array, down: jax.Array
) -> Float[Array, "rows D"]:
    """weight * expert(x) for rows in any order; expert = the number of experts here: no row, 0. The weight multiplies the F columns
    inside the expert and not the D columns behind it: its gradient then needs no second computation of the output."""
    e, f, _ = down.shape
    if e == 1:  # a row that is none has x = 0 and weight 0
        return (glu(x @ gate_up[0], f) * weight[:, None].astype(x.dtype)) @ down[0]
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(e)[None], axis=0, dtype=jnp.int32)
    real = (jnp.arange(expert.shape[0]) < jnp.sum(sizes))[:, None]  # what lies behind the last group is undefined: never let it through
    h = jnp.where(real, jax.lax.ragged_dot(permute(x, order, place), gate_up, sizes), 0)
    h = glu(h, f) * permute(weight, order, place)[:, None].astype(x.dtype)
    return permute(jnp.where(real, jax.lax.ragged_dot(h, down, sizes), 0), place, order)


def send(index: jax.Array, x: jax.Array, weight: jax.Array, pairs: Pairs, experts: int, room: int, axes: tuple[str, ...]):
    """Round `index`: (rows received [P * room, columns of x], weights, experts) and, of what was sent, (token, pair), N or more: none."""
    active = pairs.order.shape[0] // x.shape[0]
    pair, there = of_round(index, pairs, room)
    token = jnp.where(there, pair // active, x.shape[0])
    rows = swap(x.at[token].get(mode="fill", fill_value=0), axes)
    label = jnp.stack([jnp.where(there, weight[pair], 0), jnp.where(there, pairs.local[pair], experts).astype(jnp.float32)], axis=-1)
    label = swap(label, axes).reshape(-1, 2)  # one exchange for both: an expert's number is exact in float32
    received = rows.reshape(-1, x.shape[1]), label[:, 0], label[:, 1].astype(jnp.int32)
    return received, (token, jnp.where(there, pair, pairs.order.shape[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def exchange(
    x: Float[Array, "N D"],
    weight: Float32[Array, " pairs"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    pairs: Pairs,
    room: int,
    axes: tuple[str, ...],
) -> Float[Array, "N D"]:
    """Inside shard_map: for every token here, the sum over its pairs of weight * expert(token), wherever the expert lies along `axes`.

    x [N, D], weight [N * A], gate_up and down of the experts here. Sums over pairs are float32, and so are the gradients of weights, over
    rounds. The backward pass makes the rounds again and with them the experts' inner activations: nothing but the arguments is kept.
    """
    own = gate_up.astype(x.dtype), down.astype(x.dtype)

    def step(state):
        index, total = state
        (rows, w, expert), (token, _) = send(index, x, weight, pairs, down.shape[0], room, axes)
        y = swap(own_experts(rows, w, expert, *own).reshape(-1, room, x.shape[1]), axes)
        return index + 1, total.at[token].add(y.astype(jnp.float32), mode="drop")

    zero = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.while_loop(lambda state: state[0] < pairs.rounds, step, (jnp.int32(0), zero))[1].astype(x.dtype)


def _forward(x, weight, gate_up, down, pairs, room, axes):
    return exchange(x, weight, gate_up, down, pairs, room, axes), (x, weight, gate_up, down, pairs)


def _backward(room, axes, residual, g):
    x, weight, gate_up, down, pairs = residual
    d, own = x.shape[1], (gate_up.astype(x.dtype), down.astype(x.dtype))
    both = jnp.concatenate([x, g.astype(x.dtype)], axis=1)  # token and gradient travel together

    def step(state):
        index, dx, dw, *dweights = state
        (rows, w, expert), (token, pair) = send(index, both, weight, pairs, down.shape[0], room, axes)
        _, pull = jax.vjp(lambda rows, w, *own: own_experts(rows, w, expert, *own), rows[:, :d], w, *own)
        drows, dlabel, *new = pull(rows[:, d:])
        dx = dx.at[token].add(swap(drows.reshape(-1, room, d), axes).astype(jnp.float32), mode="drop")
        dw = dw.at[pair].set(swap(dlabel.reshape(-1, room), axes), mode="drop")
        return index + 1, dx, dw, *(total + y.astype(jnp.float32) for total, y in zip(dweights, new, strict=True))

    start = (jnp.int32(0), *(jnp.zeros(y.shape, jnp.float32) for y in (x, weight, gate_up, down)))
    _, dx, dw, *dweights = jax.lax.while_loop(lambda state: state[0] < pairs.rounds, step, start)
    dweights = (y.astype(w.dtype) for y, w in zip(dweights, (gate_up, down), strict=True))
    return dx.astype(x.dtype), dw, *dweights, None


exchange.defvjp(_forward, _backward)
