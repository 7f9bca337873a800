"""Small layers every block shares: norms, rotation, the causal convolution, the embedding."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from a1jax.models.config import ModelConfig
from a1jax.params import Initializer, ParamSpec, constant, normal, uniform
from a1jax.sharding import constrain, mesh_axes


def matrix(cfg: ModelConfig, shape: tuple[int, int], axes: tuple[str, str], to_residual: bool = False) -> ParamSpec:
    """Spec of a weight matrix (in, out). to_residual: its product is added to the residual stream."""
    return ParamSpec(shape, axes, weight_init(cfg, shape[0], to_residual), cfg.param_dtype)


def weight_init(cfg: ModelConfig, fan_in: int, to_residual: bool = False) -> Initializer:
    std = cfg.init_std or 1 / math.sqrt(fan_in)
    return normal(std / math.sqrt(2 * cfg.num_layers) if to_residual and cfg.scale_output_init else std)


def norm_weight(cfg: ModelConfig, width: int, scale: float = 1.0) -> ParamSpec:
    """Weight of rms_norm, stored zero-centred: the norm multiplies by 1 + weight."""
    return ParamSpec((width,), ("norm",), constant(scale - 1.0), cfg.param_dtype)


def conv_weight(cfg: ModelConfig, channels: int, axis: str) -> ParamSpec:
    taps = uniform(-0.5, 0.5) if cfg.conv_init == "uniform" else normal(cfg.init_std or 0.02)
    return ParamSpec((cfg.conv_width, channels), ("tap", axis), taps, cfg.param_dtype)


@jax.custom_vjp
def linear(x: Float[Array, "*lead rows"], w: Float[Array, "rows columns"]) -> Float[Array, "*lead columns"]:
    """x [..., in] @ w (in, out) in x's type; the gradient of w is summed in float32.

    jax transposes this matmul to (gradient^T x)^T, for which a CPU first rewrites the wide gradient column by column; x^T gradient
    needs none of that.
    """
    return x @ w.astype(x.dtype)


def _linear_backward(residual, g):
    x, w = residual
    lead = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(x, g, ((lead, lead), ((), ())), preferred_element_type=jnp.float32)
    return g @ w.astype(g.dtype).T, dw.astype(w.dtype)


linear.defvjp(lambda x, w: (linear(x, w), (x, w)), _linear_backward)


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x), by tanh: the same to a rounding, and a third cheaper than exp and division on a CPU."""
    return x * (0.5 * jnp.tanh(0.5 * x) + 0.5)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * (1 + weight) over the last axis; the reference's zero-centred RMSNorm. float32 inside: a sum of squares in
    bfloat16 keeps three digits."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return (h * along_last(1.0 + weight.astype(jnp.float32), h)).astype(x.dtype)


def rms_norm_gated(x: jax.Array, weight: jax.Array, gate: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight * silu(gate) over the last axis; plain weight, norm before gate, as the reference's RMSNormGated."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return (h * along_last(weight.astype(jnp.float32), h) * silu(gate.astype(jnp.float32))).astype(gate.dtype)


def along_last(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight [n] with as many leading dimensions as x has: rank promotion stays an error elsewhere."""
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def l2_normalise(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(|x|^2 + eps) over the last axis, in float32; eps as in the reference."""
    h = x.astype(jnp.float32)
    return h * jax.lax.rsqrt(jnp.sum(h * h, axis=-1, keepdims=True) + eps)


def rotary_angles(positions: jax.Array, rotary_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., rotary_dim / 2] of integer positions [...], float32: an angle needs its position exactly."""
    frequencies = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles = positions[..., None].astype(jnp.float32) * along_last(frequencies, positions[..., None])
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding (arXiv 2104.09864) of the leading part of the last axis: x [..., heads, F], cos and sin [..., rotary_dim / 2].

    Pairs are (i, i + rotary_dim / 2), the reference's halves; the rest of the head passes unchanged.
    """
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]  # float32, because cos is
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)


def causal_conv(x: Float[Array, "B T channels"], taps: Float[Array, "W channels"], runs: Int[Array, "B T"]) -> Float[Array, "B T channels"]:
    """Depthwise causal convolution and silu: x [B, T, channels], taps [W, channels], runs int32 [B, T].

    out[t] = silu(sum_i taps[i] x[t - (W - 1) + i]) over those tokens that belong to t's run, so no window crosses a border.
    """
    return silu(_conv(x, taps, same_run(runs, taps.shape[0])))


def same_run(runs: jax.Array, width: int) -> jax.Array:
    """bool [W, B, T]: does token t - back (back = 0 .. W - 1) exist and belong to t's run?"""
    t = runs.shape[1]
    padded = jnp.pad(runs, ((0, 0), (width - 1, 0)), constant_values=-1)
    return jnp.stack([padded[:, width - 1 - back :][:, :t] == runs for back in range(width)])


@jax.custom_vjp
def _conv(x, taps, same):
    width, t = taps.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    weight = jnp.where(same[..., None], taps[::-1].astype(x.dtype)[:, None, None], 0)
    return sum(weight[back] * padded[:, width - 1 - back :][:, :t] for back in range(width))


def _conv_backward(residual, g):
    # Written out: autodiff pads and adds once per tap, four times the memory traffic.
    x, taps, same = residual
    width, t = taps.shape[0], x.shape[1]
    before, after = (jnp.pad(y, ((0, 0), pad, (0, 0))) for y, pad in ((x, (width - 1, 0)), (g, (0, width - 1))))
    later = jnp.pad(same, ((0, 0), (0, 0), (0, width - 1)))
    weight = taps[::-1].astype(x.dtype)[:, None, None]
    dx = sum(jnp.where(later[back, :, back:][:, :t, None], after[:, back:][:, :t], 0) * weight[back] for back in range(width))
    products = (jnp.where(same[back][..., None], before[:, width - 1 - back :][:, :t] * g, 0) for back in range(width))
    dtaps = jnp.stack([jnp.sum(y, axis=(0, 1), dtype=jnp.float32) for y in products])[::-1]
    return dx, dtaps.astype(taps.dtype), None


_conv.defvjp(lambda x, taps, same: (_conv(x, taps, same), (x, taps, same)), _conv_backward)


def conv_step(window: jax.Array, x: jax.Array, taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token of causal_conv: window [B, W - 1, channels] of the inputs before x [B, channels] -> (out, next window)."""
    inputs, taps = jnp.concatenate([window, x[:, None]], axis=1), taps.astype(x.dtype)
    return silu(sum(inputs[:, i] * taps[i][None] for i in range(taps.shape[0]))), inputs[:, 1:]


def own_heads(x: Float[Array, "B T K F"], heads: int, of: int, axis: str) -> Float[Array, "B T own F"]:
    """Inside sharding.over_shards: of x [B, T, K, F], which every device has whole, the heads that this device's `heads` heads read.

    `of` heads are cut over the logical axis `axis`, and K divides `of`: head h reads h // (of / K). One head comes back where one is
    enough, else one for each of the device's heads.
    """
    group, first = of // x.shape[2], jax.lax.axis_index(mesh_axes(axis)) * heads
    if group % heads == 0:
        return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=2)
    return jnp.take(x, (first + jnp.arange(heads)) // group, axis=2)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "*lead"], cfg: ModelConfig) -> Float[Array, "*lead D"]:
    """Rows of the table [V, D] in the compute type, times sqrt(D) if the configuration says so: tokens [B] or [B, T] -> [..., D].

    Under a mesh every device looks up its part of the width for all the tokens that share it, and two exchanges, along the length and
    along the rows, turn parts of the width into whole tokens; the table itself stays where it lies.
    """
    lookup, length = ("width_length",) * (tokens.ndim - 1), ("length",) * (tokens.ndim - 1)
    tokens = constrain(tokens, "width_rows", *lookup)
    x = constrain(table[tokens].astype(cfg.dtype), "width_rows", *lookup, "embed")
    x = constrain(x, "width_rows", *length, "width")
    x = constrain(x, "batch", *length, "hidden")
    return x * math.sqrt(cfg.d_model) if cfg.scale_embeddings else x
