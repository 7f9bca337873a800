"""Gated delta net (arXiv 2412.06464): projections, causal convolution, the delta rule in chunks, gated norm.

Per head and token: S <- exp(g) S; S <- S + beta k (v - k^T S)^T; o = S^T q / sqrt(key dim). Chunks: arXiv 2406.06484 (UT transform).
Borders: ``runs`` numbers the contiguous runs of one segment. Nothing crosses from run to run: not the convolution's window, not the
pairs inside a chunk, and the state a chunk starts from is read and kept only by tokens of the run that was open there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from a1jax.models.config import ModelConfig
from a1jax.models.context import Axes, chain, halo, shift
from a1jax.models.layers import causal_conv, conv_step, conv_weight, l2_normalise, linear, matrix, own_heads, rms_norm_gated
from a1jax.params import ParamSpec, constant, log_spread, log_uniform
from a1jax.sharding import if_even, is_sharded, mesh_axes, over_shards


def specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """HF `linear_attn.*`: projections are these transposed, `conv1d.weight` [channels, 1, W] is conv1d [W, channels] transposed,
    the others are the same. in_proj_qkv and the convolution hold q, k, v side by side, as in HF. The recurrence's own vectors are float32
    whatever param_dtype is: a log decay of three digits is another memory after a thousand tokens."""
    heads, channels = cfg.linear_num_value_heads, 2 * cfg.linear_key_dim + cfg.linear_value_dim
    spread = cfg.decay_init == "spread"
    return {
        "in_proj_qkv": matrix(cfg, (cfg.d_model, channels), ("embed", "linear_qkv")),
        "in_proj_z": matrix(cfg, (cfg.d_model, cfg.linear_value_dim), ("embed", "linear_heads")),
        "in_proj_b": matrix(cfg, (cfg.d_model, heads), ("embed", "linear_heads")),
        "in_proj_a": matrix(cfg, (cfg.d_model, heads), ("embed", "linear_heads")),
        "conv1d": conv_weight(cfg, channels, "linear_qkv"),
        "dt_bias": ParamSpec((heads,), ("linear_heads",), constant(0.0 if spread else 1.0)),
        "A_log": ParamSpec((heads,), ("linear_heads",), log_spread(0.002, 0.2) if spread else log_uniform(0.01, 16.0)),
        "norm": ParamSpec((cfg.linear_value_head_dim,), ("norm",), constant(1.0)),
        "out_proj": matrix(cfg, (cfg.linear_value_dim, cfg.d_model), ("linear_heads", "embed"), to_residual=True),
    }


def split_qkv(x: jax.Array, cfg: ModelConfig) -> list[jax.Array]:
    """The columns [..., channels] of q, of k and of v."""
    return jnp.split(x, [cfg.linear_key_dim, 2 * cfg.linear_key_dim], axis=-1)


def split_heads(qkv: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., channels] -> q and k [..., key heads, key dim], l2-normalised, q over sqrt(key dim); v [..., H, value dim]; all float32."""
    return into_heads(*split_qkv(qkv, cfg), cfg)


def into_heads(q: jax.Array, k: jax.Array, v: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """split_heads of columns that are apart already, of any number of heads."""
    q, k = (x.reshape(*x.shape[:-1], -1, cfg.linear_key_head_dim) for x in (q, k))
    v = v.reshape(*v.shape[:-1], -1, cfg.linear_value_head_dim)
    return l2_normalise(q) * cfg.linear_key_head_dim**-0.5, l2_normalise(k), v.astype(jnp.float32)


def gates(p: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D] -> log decay g <= 0 and write strength beta in (0, 1), both float32 [..., H]: decays multiply over thousands of tokens."""
    a = linear(x, p["in_proj_a"]).astype(jnp.float32)
    b = linear(x, p["in_proj_b"]).astype(jnp.float32)
    lead = (1,) * (x.ndim - 1) + (-1,)
    g = -jnp.exp(p["A_log"].astype(jnp.float32)).reshape(lead) * jax.nn.softplus(a + p["dt_bias"].astype(jnp.float32).reshape(lead))
    return g, jax.nn.sigmoid(b)


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
        update = below(size) if size == 1 else _matmul(_matmul(inverse, below(size)), inverse)
        inverse, size = inverse - update, 2 * size
    return inverse


def _matmul(a, b):
    # Full float32 also where the default is bfloat16 passes: errors of the inverse reach every later token of the run.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(a):
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse, cotangent):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-_matmul(_matmul(transposed, cotangent), transposed),)


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


def play(chunks: Chunks, state: Float32[Array, "B H DK DV"]) -> tuple[Float32[Array, "B H DK DV"], Float32[Array, "N B H C DV"]]:
    """The chunks in their order, from a state: (state after the last, outputs)."""

    def step(state, c: Chunks):
        new = c.written - c.erased @ state
        return c.carried * state + c.kept @ new, c.read @ state + c.within @ new

    return jax.lax.scan(step, state, chunks)


def effect(chunks: Chunks) -> tuple[Float32[Array, "B H DK DK"], Float32[Array, "B H DK DV"]]:
    """What all the chunks do to the state, S -> transfer @ S + gain, in one pass: they play for the identity and for zero side by side."""
    dk = chunks.erased.shape[-1]
    both = jnp.zeros((*chunks.kept.shape[1:4], dk + chunks.written.shape[-1]), jnp.float32)
    both = both.at[..., :dk].set(jnp.eye(dk)[None, None])

    def step(both, c: Chunks):
        new = jnp.pad(c.written, ((0, 0), (0, 0), (0, 0), (dk, 0))) - c.erased @ both
        return c.carried * both + c.kept @ new, None

    both, _ = jax.lax.scan(step, both, chunks)
    return both[..., :dk], both[..., dk:]


def effect_backward(chunks: Chunks, g: Float32[Array, "N B H C DV"]) -> Float32[Array, "B H DK DV"]:
    """Gradient by the state before the chunks, for the gradient g of their outputs and none of the state behind them."""

    def step(state, xs):
        c, g = xs
        new = jnp.swapaxes(c.kept, -1, -2) @ state + jnp.swapaxes(c.within, -1, -2) @ g
        return c.carried * state + jnp.swapaxes(c.read, -1, -2) @ g - jnp.swapaxes(c.erased, -1, -2) @ new, None

    start = jnp.zeros((*chunks.kept.shape[1:4], g.shape[-1]), jnp.float32)
    return jax.lax.scan(step, start, (chunks, g), reverse=True)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def play_across(chunks: Chunks, context: Axes) -> Float32[Array, "N B H C DV"]:
    """Outputs of this shard's chunks, played from the state that the shards before it leave.

    A shard is an affine map of the state, and the gradient goes back through the same maps transposed. So both directions take a short
    pass for the map, exchange maps, and then run as on one device; autodiff would keep a [DK, DK + DV] state for every chunk.
    """
    return _across_forward(chunks, context)[0]


def _across_forward(chunks, context):
    transfer, gain = effect(chunks)
    (_, out), pull = jax.vjp(play, chunks, chain(transfer, gain, context))
    return out, (chunks, transfer, pull)


def _across_backward(context, residual, g):
    chunks, transfer, pull = residual
    gain = effect_backward(chunks, g)
    behind = chain(jnp.swapaxes(transfer, -1, -2), gain, context, reverse=True)
    return (pull((behind, g))[0],)


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
    """
    b, t, heads, _ = v.shape
    if state is None:
        state = jnp.zeros((b, heads, k.shape[-1], v.shape[-1]), jnp.float32)
    state, out = play(prepare(q, k, v, g, beta, runs, chunk, open_run), state)
    return join(out, t), state


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
    return join(play_across(prepare(q, k, v, g, beta, runs, chunk, open_run), context), v.shape[1])


def output(p: dict, out: jax.Array, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Norm per head gated by x's z projection, then the output projection: out [..., H, value dim], x [..., D] -> [..., D]."""
    z = linear(x, p["in_proj_z"]).reshape(out.shape)
    out = rms_norm_gated(out.astype(x.dtype), p["norm"], z, cfg.norm_eps)
    return linear(out.reshape(*x.shape[:-1], -1), p["out_proj"])


def mix(p: dict, x: Float[Array, "B T D"], runs: Int[Array, "B T"], cfg: ModelConfig) -> Float32[Array, "B T H DV"]:
    """Projections, convolution, delta rule, on one device."""
    with jax.named_scope("conv"):
        q, k, v = split_heads(causal_conv(linear(x, p["in_proj_qkv"]), p["conv1d"], runs), cfg)
    g, beta = gates(p, x)
    with jax.named_scope("delta_rule"):
        return delta_rule(q, k, v, g, beta, runs, cfg.delta_chunk)[0]


def mix_sharded(p: dict, x: Float[Array, "B T D"], runs: Int[Array, "B T"], cfg: ModelConfig) -> Float32[Array, "B T H DV"]:
    """mix() over the mesh: rows over the data axes, heads over tensor, the length over context, where the convolution gets the inputs
    before each shard and the delta rule the state.

    q, k and v are projected apart, so that tensor can cut each by its heads. Where it does not cut the key heads evenly, every device
    has all of them and picks those that its value heads read.
    """
    (b, t, _), heads = x.shape, cfg.linear_num_value_heads
    context, keys = mesh_axes("length", t), if_even("linear_heads", cfg.linear_num_key_heads)
    columns = [linear(x, w) for w in split_qkv(p["in_proj_qkv"], cfg)]
    g, beta = gates(p, x)

    def local(q, k, v, tap_q, tap_k, tap_v, g, beta, runs):
        with jax.named_scope("conv"):
            past = cfg.conv_width - 1 if context else 0
            around = jnp.concatenate([halo(runs, past, context), runs], axis=1) if past else runs
            with_past = ((jnp.concatenate([halo(y, past, context), y], axis=1) if past else y) for y in (q, k, v))
            q, k, v = (causal_conv(y, w, around)[:, past:] for y, w in zip(with_past, (tap_q, tap_k, tap_v), strict=True))
            q, k, v = into_heads(q, k, v, cfg)
        if keys is None:
            q, k = (own_heads(y, v.shape[2], heads, "linear_heads") for y in (q, k))
        with jax.named_scope("delta_rule"):
            if context:
                return delta_rule_across(q, k, v, g, beta, runs, cfg.delta_chunk, context)
            return delta_rule(q, k, v, g, beta, runs, cfg.delta_chunk)[0]

    by_head = keys, keys, "linear_heads"
    arguments = [(y, ("batch", "length", axis)) for y, axis in zip(columns, by_head, strict=True)]
    arguments += [(y, ("tap", axis)) for y, axis in zip(split_qkv(p["conv1d"], cfg), by_head, strict=True)]
    arguments += [(y, ("batch", "length", "linear_heads")) for y in (g, beta)] + [(runs, ("batch", "length"))]
    return over_shards(local, arguments, (b, t, heads, cfg.linear_value_head_dim), ("batch", "length", "linear_heads", None))


def apply(p: dict, x: Float[Array, "B T D"], runs: Int[Array, "B T"], cfg: ModelConfig) -> Float[Array, "B T D"]:
    """x [B, T, D], runs int32 [B, T] -> [B, T, D]."""
    return output(p, (mix_sharded if is_sharded() else mix)(p, x, runs, cfg), x, cfg)


def step(
    p: dict,
    x: Float[Array, "B D"],
    window: Float[Array, "B past channels"],
    state: Float32[Array, "B H DK DV"],
    reset: Bool[Array, " B"],
    active: Bool[Array, " B"],
    cfg: ModelConfig,
) -> tuple[Float[Array, "B D"], Float[Array, "B past channels"], Float32[Array, "B H DK DV"]]:
    """One token: x [B, D], window [B, W - 1, channels], state float32 [B, H, key dim, value dim] -> (out [B, D], window, state).

    reset and active, bool [B], act through decay and write strength, so that the state is passed over once: decay 0 forgets it, decay 1
    with strength 0 keeps it bit for bit.
    """
    qkv, window = conv_step(window, linear(x, p["in_proj_qkv"]), p["conv1d"])
    q, k, v = split_heads(qkv, cfg)
    g, beta = gates(p, x)
    decay = jnp.where(active[:, None], jnp.where(reset[:, None], 0.0, jnp.exp(g)), 1.0)
    beta = jnp.where(active[:, None], beta, 0.0)
    repeat = v.shape[1] // k.shape[1]
    q, k = (y if repeat == 1 else jnp.repeat(y, repeat, axis=1) for y in (q, k))
    # What k recalls and what q reads, both from the old state in one pass over it: q^T (decay S + k delta^T) = decay q^T S + (q k) delta^T.
    recalled, read = jnp.moveaxis(decay[..., None, None] * _matmul(jnp.stack([k, q], axis=-2), state), -2, 0)
    delta = beta[..., None] * (v - recalled)
    out = read + jnp.sum(q * k, axis=-1, keepdims=True) * delta
    state = state * decay[..., None, None] + k[..., None] * delta[..., None, :]
    return output(p, out, x, cfg), window, state
