"""Gated full attention: per-head q/k norm, rotation of the first part of the head, grouped heads, sigmoid output gate."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from a1jax.models import attention_tpu
from a1jax.models.config import ModelConfig
from a1jax.models.layers import linear, matrix, norm_weight, own_heads, rms_norm, rotate
from a1jax.params import ParamSpec
from a1jax.sharding import if_even, is_sharded, mesh_axes, over_shards, platform

STAGES = 8  # pieces of a row whose queries share one length of keys
KERNELS = {"tpu": "splash"}  # what attention="auto" is on a platform; "chunked" on all others
MASKED = -1e30  # not -inf: finite arithmetic everywhere, and exp of it is exactly 0


def specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """HF `self_attn.{q,k,v,o}_proj.weight` are these transposed; q_proj's output is [heads, (query, gate), head_dim] as in HF."""
    heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    return {
        "q_proj": matrix(cfg, (cfg.d_model, 2 * heads), ("embed", "heads")),
        "k_proj": matrix(cfg, (cfg.d_model, kv), ("embed", "kv_heads")),
        "v_proj": matrix(cfg, (cfg.d_model, kv), ("embed", "kv_heads")),
        "o_proj": matrix(cfg, (heads, cfg.d_model), ("heads", "embed"), to_residual=True),
        "q_norm": norm_weight(cfg, cfg.head_dim, cfg.q_norm_scale),
        "k_norm": norm_weight(cfg, cfg.head_dim),
    }


def project(p: dict, x: jax.Array, cos: jax.Array, sin: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x [..., D] -> query [..., H, F], key and value [..., K, F], gate [..., H * F]; normed and rotated."""
    lead = x.shape[:-1]
    q, gate = jnp.split(linear(x, p["q_proj"]).reshape(*lead, cfg.num_heads, 2 * cfg.head_dim), 2, axis=-1)
    k = linear(x, p["k_proj"]).reshape(*lead, cfg.num_kv_heads, cfg.head_dim)
    v = linear(x, p["v_proj"]).reshape(*lead, cfg.num_kv_heads, cfg.head_dim)
    q = rotate(rms_norm(q, p["q_norm"], cfg.norm_eps), cos, sin)
    k = rotate(rms_norm(k, p["k_norm"], cfg.norm_eps), cos, sin)
    return q, k, v, gate.reshape(*lead, cfg.num_heads * cfg.head_dim)


def output(p: dict, mixed: jax.Array, gate: jax.Array) -> jax.Array:
    """Sigmoid gate, then the output projection: mixed and gate [..., H * F] -> [..., D]."""
    return linear(mixed * jax.nn.sigmoid(gate), p["o_proj"])


def attend(
    q: Float[Array, "B T H F"], k: Float[Array, "B S K F"], v: Float[Array, "B S K F"], mask: Bool[Array, "#B T S"]
) -> Float[Array, "B T HF"]:
    """softmax(q k / sqrt(F)) v with grouped heads: q [B, T, H, F], k and v [B, S, K, F], mask [B, T, S] -> [B, T, H * F].

    Every row of the mask must allow one key. Scores and softmax are float32: bfloat16 scores would round probabilities by a percent.
    """
    (b, t, h, f), kv = q.shape, k.shape[2]
    q = jnp.moveaxis(q.reshape(b, t, kv, h // kv, f), 1, 3).reshape(b, kv, -1, f)  # heads of a group become rows
    out = _attend(q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), mask)
    return jnp.moveaxis(out.reshape(b, kv, h // kv, t, f), 3, 1).reshape(b, t, h * f)


@jax.custom_vjp
def _attend(q, k, v, mask):
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    """q [B, K, R T, F], k and v [B, K, S, F], mask [B, T, S]. The division by the sum is left to the output: F columns, not S."""
    (b, kv, rows, f), s = q.shape, k.shape[2]
    scores = jnp.matmul(q, jnp.swapaxes(k, 2, 3), preferred_element_type=jnp.float32) * f**-0.5
    scores = jnp.where(mask[:, None, None], scores.reshape(b, kv, -1, *mask.shape[1:]), MASKED).reshape(b, kv, rows, s)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    inverse = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = (jnp.matmul(weights, v, preferred_element_type=jnp.float32) * inverse).astype(v.dtype)
    return out, (q, k, v, weights, inverse, out)


def _attend_backward(residual, g):
    # Written out for two savings: the softmax's row sum is that of g * out, F columns and not S, and every matmul that sums over rows
    # has the narrow operand on its left, which is the one a CPU transposes.
    q, k, v, weights, inverse, out = residual
    g32 = g.astype(jnp.float32) * inverse
    row_sum = jnp.sum(g32 * out.astype(jnp.float32), axis=-1, keepdims=True)
    g = g32.astype(v.dtype)
    scores = jnp.matmul(g, jnp.swapaxes(v, 2, 3), preferred_element_type=jnp.float32)
    scores = (weights * ((scores - row_sum) * q.shape[-1] ** -0.5)).astype(q.dtype)
    dk = jnp.swapaxes(jnp.matmul(jnp.swapaxes(q, 2, 3), scores), 2, 3)
    dv = jnp.swapaxes(jnp.matmul(jnp.swapaxes(g, 2, 3), weights), 2, 3)
    return jnp.matmul(scores, k), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def causal_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    runs: Int[Array, "B T"],
    chunk: int,
    key_runs: Int[Array, "B S"] | None = None,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "B T HF"]:
    """attend() to earlier tokens of the same run. chunk > 0: that many query rows at a time, computed again in the backward
    pass, so that scores never exceed [B, H, chunk, S]; T is padded up to a multiple of it.

    key_runs [B, S] and first: when the queries are a part of the row, the runs of all keys and the place of the first query among them.
    """
    t = q.shape[1]
    columns = jnp.arange(k.shape[1]) - first  # counted from the first query
    all_runs = runs if key_runs is None else key_runs

    def rows(start, q, runs_q, end=k.shape[1]):
        causal = (start + jnp.arange(q.shape[1]))[:, None] >= columns[None, :end]
        keys, values = (x[:, :end].astype(q.dtype) for x in (k, v))
        return attend(q, keys, values, causal[None] & (runs_q[:, :, None] == all_runs[:, None, :end]))

    if not chunk or chunk >= t:
        return rows(0, q, runs)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)  # so that their gradients are summed over the chunks in float32
    n = -(-t // chunk)
    pad = ((0, 0), (0, n * chunk - t))

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)

    starts = jnp.arange(n) * chunk  # a padded row sees the last run's keys: harmless, it is cut off below
    padded = starts, split(jnp.pad(q, (*pad, (0, 0), (0, 0)))), split(jnp.pad(runs, pad, mode="edge"))
    # Where the place of the queries is known when compiling, a stage reads the keys up to its own end only: 8 stages do 56 % of the work.
    stages = min(n, STAGES) if key_runs is None else 1
    borders = [n * i // stages for i in range(stages + 1)]
    out = []
    for i, j in itertools.pairwise(borders):
        part = functools.partial(rows, end=min(j * chunk, k.shape[1]) if stages > 1 else k.shape[1])
        out.append(jax.lax.map(lambda xs, part=part: jax.checkpoint(part)(*xs), [x[i:j] for x in padded]))
    return jnp.moveaxis(jnp.concatenate(out), 0, 1).reshape(q.shape[0], n * chunk, -1)[:, :t]


def attend_earlier(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    runs: Int[Array, "B T"],
    cfg: ModelConfig,
    key_runs: Int[Array, "B S"] | None = None,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "B T HF"]:
    """Attention to earlier tokens of the same run, by the kernel that the configuration and the platform ask for; arguments as in
    causal_attention. Every kernel is one branch here."""
    if chosen_kernel(cfg) == "splash":
        return attention_tpu.splash_attention(q, k, v, runs, runs if key_runs is None else key_runs, first + jnp.arange(q.shape[1]))
    return causal_attention(q, k, v, runs, cfg.attention_chunk, key_runs, first)


def chosen_kernel(cfg: ModelConfig) -> str:
    """cfg.attention, with "auto" decided for the platform that the program is traced for."""
    return KERNELS.get(platform(), "chunked") if cfg.attention == "auto" else cfg.attention


def attention_sharded(
    q: Float[Array, "B T H F"], k: Float[Array, "B T K F"], v: Float[Array, "B T K F"], runs: Int[Array, "B T"], cfg: ModelConfig
) -> Float[Array, "B T HF"]:
    """attend_earlier over the mesh: rows over the data axes, query heads over tensor, queries over context.

    Keys, values and runs of the whole row are gathered over context: they are what the row has least of. Where tensor does not cut
    the key/value heads evenly, every device has all of them and picks those that its query heads read.
    """
    (b, t, heads, f), kv_axis = q.shape, if_even("kv_heads", k.shape[2])
    context = mesh_axes("length", t)

    def local(q, k, v, runs):
        if kv_axis is None:
            k, v = (own_heads(x, q.shape[2], heads, "heads") for x in (k, v))
        if not context:
            return attend_earlier(q, k, v, runs, cfg)
        k, v, key_runs = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v, runs))
        # A kernel that skips what a query cannot see gains by an even share of the pairs; chunks of the whole row never skip.
        if chosen_kernel(cfg) == "splash" and q.shape[1] % 2 == 0:
            return attention_tpu.over_context(q, k, v, runs, key_runs, context)
        return attend_earlier(q, k, v, runs, cfg, key_runs, jax.lax.axis_index(context) * q.shape[1])

    tokens, kv = ("batch", "length"), ("batch", "length", kv_axis, None)
    arguments = [(q, (*tokens, "heads", None)), (k, kv), (v, kv), (runs, tokens)]
    return over_shards(local, arguments, (b, t, heads * f), (*tokens, "heads"))


def apply(
    p: dict,
    x: Float[Array, "B T D"],
    runs: Int[Array, "B T"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """x [B, T, D], runs int32 [B, T], cos and sin [B, T, rotary_dim / 2] -> [B, T, D]."""
    q, k, v, gate = project(p, x, cos, sin, cfg)
    mixed = attention_sharded(q, k, v, runs, cfg) if is_sharded() else attend_earlier(q, k, v, runs, cfg)
    return output(p, mixed, gate)
