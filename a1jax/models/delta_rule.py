"""The gated delta rule (arXiv 2412.06464) in chunks (UT transform, arXiv 2406.06484): on one device, from a state, across shards.

Per head and token: S <- exp(g) S; S <- S + beta k (v - k^T S)^T; o = S^T q, q being scaled already.
Borders: ``runs`` numbers the contiguous runs of one segment. Nothing crosses from run to run: not the pairs inside a chunk, and the state
a chunk starts from is read and kept only by tokens of the run that was open there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from a1jax.models.context import Axes, chain, shift

SPAN = 512  # tokens


def exactly(function: Callable) -> Callable:
    """function with its matrix products, and those of its gradient, in full float32 also where the default is fewer bits: a state rounded
    to bfloat16 at every chunk would not be the one that decoding keeps. By count 6 passes of a TPU where 1 would do, for a few percent
    of a large model's products."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run


@jax.custom_vjp
def unit_lower_inverse(a: Float32[Array, "*lead C C"]) -> Float32[Array, "*lead C C"]:
    """(I + a)^-1 for strictly lower triangular a [..., C, C], C a power of two.

    Doubles the inverted diagonal blocks: for [[P, 0], [R, Q]] the inverse has -Q^-1 R P^-1 below, so log2(C) - 1 steps of two
    full matmuls do it. As many as squaring (I - a)(I + a^2)(I + a^4)..., whose powers cancel catastrophically for similar keys.
    """
    c = a.shape[-1]
    row, column = jnp.arange(c)[:, None], jnp.arange(c)[None]

    def below(size):  # the lower left quarter of every diagonal block of 2 * size
        inside = (row // (2 * size) == column // (2 * size)) & (row // size % 2 == 1) & (column // size % 2 == 0)
        return jnp.where(inside.reshape((1,) * (a.ndim - 2) + (c, c)), a, 0)

    inverse = jnp.broadcast_to(jnp.eye(c, dtype=a.dtype), a.shape)
    size = 1
    while size < c:
        update = below(size) if size == 1 else exact_matmul(exact_matmul(inverse, below(size)), inverse)
        inverse, size = inverse - update, 2 * size
    return inverse


def exact_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full float32, also where the default is bfloat16 passes: errors of the inverse reach every later token of the run."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(a):
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse, cotangent):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-exact_matmul(exact_matmul(transposed, cotangent), transposed),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


class Chunks(NamedTuple):
    """The delta rule, chunk by chunk, as maps of the state S that a chunk starts from. [N, B, H, rows, columns] each, float32.

    new = written - erased @ S; out = read @ S + within @ new; next S = carried * S + kept @ new.
    """

    written: Float32[Array, "N B H C DV"]
    erased: Float32[Array, "N B H C DK"]
    read: Float32[Array, "N B H C DK"]
    within: Float32[Array, "N B H C C"]
    kept: Float32[Array, "N B H DK C"]
    carried: Float32[Array, "N B H 1 1"]


@exactly
def prepare(
    q: Float32[Array, "B T HK DK"],
    k: Float32[Array, "B T HK DK"],
    v: Float32[Array, "B T H DV"],
    g: Float32[Array, "B T H"],
    beta: Float32[Array, "B T H"],
    runs: Int[Array, "B T"],
    chunk: int,
    open_run: Int[Array, " B"] | None = None,
) -> Chunks:
    """Everything that no state is needed for. T is padded up to a multiple of chunk, a power of two; padding leaves the state alone.

    open_run int32 [B]: the run that the state before the first token belongs to; only tokens of that run see it. None: nobody does.
    """
    b, t, heads, _ = v.shape
    repeat = heads // k.shape[2]
    n = -(-t // chunk)
    extra = n * chunk - t

    def chunks(x):  # [B, T, heads, ...] -> [N, B, heads, C, ...]: every matmul below then has its batch in front
        x = jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2)).reshape(b, n, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    def per_head(x):
        return x if repeat == 1 else jnp.repeat(x, repeat, axis=2)

    q, k, v, g, beta = chunks(q), chunks(k), chunks(v), chunks(g), chunks(beta)
    padded = jnp.pad(runs, ((0, 0), (0, extra)), mode="edge")  # decay 1, strength 0, key 0: the last run goes on unchanged
    runs = jnp.moveaxis(padded.reshape(b, n, chunk), 1, 0)[:, :, None]  # [N, B, 1, C]
    first = jnp.full_like(runs[:1, ..., -1:], -2) if open_run is None else open_run[None, :, None, None]
    before = jnp.concatenate([first, runs[:-1, ..., -1:]])  # run open at the chunk's start
    is_open = (runs == before).astype(jnp.float32)

    lower = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None, None]
    visible = (runs[..., :, None] == runs[..., None, :]) & lower  # [N, B, 1, C, C]
    total = jnp.matmul(visible.astype(jnp.float32), g[..., None])[..., 0]  # log decay since the run (or the chunk) began
    pair = jnp.exp(jnp.where(visible, total[..., :, None] - total[..., None, :], -jnp.inf))
    keys_t = jnp.swapaxes(k, -1, -2)
    inverse = unit_lower_inverse(jnp.where(jnp.eye(chunk, dtype=bool)[None, None, None], 0, per_head(k @ keys_t) * pair) * beta[..., None])
    within = per_head(q @ keys_t) * pair
    q, k = per_head(q), per_head(k)
    from_state = (jnp.exp(total) * is_open)[..., None]
    return Chunks(
        written=inverse @ (v * beta[..., None]),
        erased=inverse @ (k * (beta[..., None] * from_state)),
        read=q * from_state,
        within=within,
        kept=jnp.swapaxes(k * pair[..., -1, :, None], -1, -2),  # the last row of pair: decay to the chunk's end, 0 for closed runs
        carried=from_state[..., -1:, :],
    )


@exactly
def play(chunks: Chunks, state: Float32[Array, "B H DK DV"]) -> tuple[Float32[Array, "B H DK DV"], Float32[Array, "N B H C DV"]]:
    """The chunks in their order, from a state: (state after the last, outputs)."""

    def step(state, c: Chunks):
        new = c.written - c.erased @ state
        return c.carried * state + c.kept @ new, c.read @ state + c.within @ new

    return jax.lax.scan(step, state, chunks)


Inputs = tuple[jax.Array, ...]
"""q, k, v, g, beta, runs: what prepare() takes in front; perhaps a gradient g before them."""


def span_of(t: int, chunk: int) -> tuple[int, int]:
    """(spans in a row of T tokens, chunks' tokens in each): about SPAN tokens; a row of two is one."""
    n = -(-t // max(SPAN, chunk))
    n = 1 if n <= 2 else n
    return n, -(-t // (n * chunk)) * chunk


def spans(inputs: Inputs, chunk: int) -> Inputs:
    """[B, T, ...] -> [n, B, span, ...] each, padded as prepare() pads."""
    (b, t), (n, span) = inputs[-1].shape, span_of(inputs[-1].shape[1], chunk)

    def split(x, mode="constant"):
        x = jnp.pad(x, ((0, 0), (0, n * span - t)) + ((0, 0),) * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(b, n, span, *x.shape[2:]), 1, 0)

    return (*map(split, inputs[:-1]), split(inputs[-1], "edge"))


@exactly
def effect(inputs: Inputs, open_run: Int[Array, " B"], chunk: int) -> tuple[Float32[Array, "B H DK DK"], Float32[Array, "B H DK DV"]]:
    """What all the tokens do to the state, S -> transfer @ S + gain, in one pass: they play for the identity and for zero side by side."""
    (b, _, heads, dv), dk = inputs[2].shape, inputs[1].shape[-1]
    both = jnp.zeros((b, heads, dk, dk + dv), jnp.float32).at[..., :dk].set(jnp.eye(dk)[None, None])

    def step(both, c: Chunks):
        new = jnp.pad(c.written, ((0, 0), (0, 0), (0, 0), (dk, 0))) - c.erased @ both
        return c.carried * both + c.kept @ new, None

    def span(carry, xs):
        both, open_run = carry
        return (jax.lax.scan(step, both, prepare(*xs, chunk, open_run))[0], xs[-1][:, -1]), None

    both = jax.lax.scan(span, (both, open_run), spans(inputs, chunk))[0][0]
    return both[..., :dk], both[..., dk:]


@exactly
def effect_backward(inputs: Inputs, open_run: Int[Array, " B"], chunk: int, g: Float32[Array, "B T H DV"]) -> Float32[Array, "B H DK DV"]:
    """Gradient by the state before the tokens, for the gradient g of their outputs and none of the state behind them."""
    (b, _, heads, dv), dk = g.shape, inputs[1].shape[-1]

    def step(state, xs):
        c, g = xs
        new = jnp.swapaxes(c.kept, -1, -2) @ state + jnp.swapaxes(c.within, -1, -2) @ g
        return c.carried * state + jnp.swapaxes(c.read, -1, -2) @ g - jnp.swapaxes(c.erased, -1, -2) @ new, None

    def span(state, xs):
        (g, *rest), before = xs
        g = jnp.moveaxis(g.reshape(b, -1, chunk, heads, dv), (1, 3), (0, 2))
        return jax.lax.scan(step, state, (prepare(*rest, chunk, before), g), reverse=True)[0], None

    xs = spans((g, *inputs), chunk)
    before = jnp.concatenate([open_run[None], xs[-1][:-1, :, -1]])
    return jax.lax.scan(span, jnp.zeros((b, heads, dk, dv), jnp.float32), (xs, before), reverse=True)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def play_across(inputs: Inputs, open_run: Int[Array, " B"], chunk: int, context: Axes) -> Float32[Array, "B T H DV"]:
    """Outputs of this shard's tokens, played from the state that the shards before it leave.

    A shard is an affine map of the state, and the gradient goes back through the same maps transposed. So both directions take a short
    pass for the map, exchange maps, and then run as on one device; autodiff would keep a [DK, DK + DV] state for every chunk.
    """
    return _across_forward(inputs, open_run, chunk, context)[0]


def _across_forward(inputs, open_run, chunk, context):
    transfer, gain = effect(inputs, open_run, chunk)
    *arrays, runs = inputs

    def from_state(arrays, state):
        return delta_rule(*arrays, runs, chunk, state, open_run)

    (out, _), pull = jax.vjp(from_state, arrays, chain(transfer, gain, context))
    return out, (inputs, open_run, transfer, pull)


def _across_backward(chunk, context, residual, g):
    inputs, open_run, transfer, pull = residual
    gain = effect_backward(inputs, open_run, chunk, g)
    behind = chain(jnp.swapaxes(transfer, -1, -2), gain, context, reverse=True)
    return (*pull((g, behind))[0], None), None  # the gradient of the state before is in the other shards' gain already


play_across.defvjp(_across_forward, _across_backward)


def join(out: Float32[Array, "N B H C DV"], length: int) -> Float32[Array, "B T H DV"]:
    """Chunks' outputs in a row, without the padding."""
    out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), 2, 3)  # [B, N, C, H, value dim]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def delta_rule(
    q: Float32[Array, "B T HK DK"],
    k: Float32[Array, "B T HK DK"],
    v: Float32[Array, "B T H DV"],
    g: Float32[Array, "B T H"],
    beta: Float32[Array, "B T H"],
    runs: Int[Array, "B T"],
    chunk: int,
    state: Float32[Array, "B H DK DV"] | None = None,
    open_run: Int[Array, " B"] | None = None,
) -> tuple[Float32[Array, "B T H DV"], Float32[Array, "B H DK DV"]]:
    """The gated delta rule in chunks, float32, state zero at the start of every run: (out [B, T, H, value dim], state after T).

    q, k [B, T, key heads, key dim], v [B, T, H, value dim], g, beta [B, T, H], runs int32 [B, T]. Value heads h of one key head are
    consecutive. state and open_run: what went before, for tokens of the run numbered open_run [B]; None: nothing did.
    Longer rows go in spans of about SPAN tokens, each prepared again in the backward pass: memory beyond the inputs is one span's and
    a state for each, and a CPU finds it in its cache.
    """
    (b, t, heads, _), dk = v.shape, k.shape[-1]
    state = jnp.zeros((b, heads, dk, v.shape[-1]), jnp.float32) if state is None else state
    open_run = jnp.full((b,), -2, jnp.int32) if open_run is None else open_run
    n, span = span_of(t, chunk)
    if n == 1:
        state, out = play(prepare(q, k, v, g, beta, runs, chunk, open_run), state)
        return join(out, t), state

    def step(carry, xs):
        state, open_run = carry
        state, out = play(prepare(*xs, chunk, open_run), state)
        return (state, xs[-1][:, -1]), join(out, span)

    xs = spans((q, k, v, g, beta, runs), chunk)
    (state, _), out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), (state, open_run), xs)
    return jnp.moveaxis(out, 0, 1).reshape(b, n * span, heads, -1)[:, :t], state


def delta_rule_across(
    q: Float32[Array, "B T HK DK"],
    k: Float32[Array, "B T HK DK"],
    v: Float32[Array, "B T H DV"],
    g: Float32[Array, "B T H"],
    beta: Float32[Array, "B T H"],
    runs: Int[Array, "B T"],
    chunk: int,
    context: Axes,
) -> Float32[Array, "B T H DV"]:
    """delta_rule of whole rows, inside sharding.over_shards: every argument is this shard's part, and so is the result."""
    open_run = shift(runs[:, -1], 1, context)  # 0 before the first shard, perhaps its own run: the state is zero there
    return play_across((q, k, v, g, beta, runs), open_run, chunk, context)
