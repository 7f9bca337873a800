"""Gated delta net (arXiv 2412.06464): projections, causal convolution, the delta rule (see delta_rule.py), gated norm.

Borders: ``runs`` numbers the contiguous runs of one segment. Nothing crosses from run to run, neither in the convolution's window nor in
the state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from a1jax.models.config import ModelConfig
from a1jax.models.context import halo
from a1jax.models.delta_rule import delta_rule, delta_rule_across, exact_matmul
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
    recalled, read = jnp.moveaxis(decay[..., None, None] * exact_matmul(jnp.stack([k, q], axis=-2), state), -2, 0)
    delta = beta[..., None] * (v - recalled)
    out = read + jnp.sum(q * k, axis=-1, keepdims=True) * delta
    state = state * decay[..., None, None] + k[..., None] * delta[..., None, :]
    return output(p, out, x, cfg), window, state
