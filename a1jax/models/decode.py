"""Sequences that grow in many slots at once, equal to the full forward pass: one token (step) or many (prefill) per slot and call.

Each slot has its own position. Attention layers keep keys and values [B, K, S, F]; gated delta nets keep the convolution's window and the
recurrent state, whatever the length: only attention layers grow with the context. Blocks are unrolled and every layer has buffers of its
own: with the cache donated, XLA then writes rows in place where a scan over stacked caches would copy all of them at every token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from a1jax.models import attention, gated_delta, moe
from a1jax.models.config import ModelConfig
from a1jax.models.delta_rule import delta_rule
from a1jax.models.layers import causal_conv, embed, linear, rms_norm, rotary_angles
from a1jax.sharding import if_even, shards


def init_cache(cfg: ModelConfig, batch: int, max_length: int) -> dict:
    """Empty cache for `batch` slots of at most `max_length` tokens: {"position": int32 [B], "layers": [one dict per layer]}."""
    channels = 2 * cfg.linear_key_dim + cfg.linear_value_dim
    kv = (batch, cfg.num_kv_heads, max_length, cfg.head_dim)
    state = (batch, cfg.linear_num_value_heads, cfg.linear_key_head_dim, cfg.linear_value_head_dim)

    def layer(i):
        if cfg.is_full_attention(i):
            return {"k": jnp.zeros(kv, cfg.dtype), "v": jnp.zeros(kv, cfg.dtype)}
        return {"window": jnp.zeros((batch, cfg.conv_width - 1, channels), cfg.dtype), "state": jnp.zeros(state, jnp.float32)}

    return {"position": jnp.zeros((batch,), jnp.int32), "layers": [layer(i) for i in range(cfg.num_layers)]}


def cache_axes(cfg: ModelConfig, max_length: int) -> dict:
    """The logical axes of init_cache's arrays on the current mesh: slots over the data axes, heads over tensor and the places of
    attention over context where they divide."""
    kv = ("batch", if_even("kv_heads", cfg.num_kv_heads), if_even("length", max_length), None)
    state = ("batch", "linear_heads", None, None)

    def layer(i):
        return {"k": kv, "v": kv} if cfg.is_full_attention(i) else {"window": ("batch", None, "linear_qkv"), "state": state}

    return {"position": ("batch",), "layers": [layer(i) for i in range(cfg.num_layers)]}


def layer_params(params: dict, layer: int, cfg: ModelConfig) -> dict:
    """The parameters of one layer."""
    n, j = divmod(layer, cfg.block_layers)
    return jax.tree.map(lambda w: w[n], params["blocks"][str(j)])


def unstack(params: dict, cfg: ModelConfig) -> dict:
    """The same parameters, layer by layer under "layers", for step and prefill: a layer cut out of the stacked ones inside a step is
    copied at every step on a CPU. Costs a second copy of them."""
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    return {**rest, "layers": [layer_params(params, i, cfg) for i in range(cfg.num_layers)]}


def step(
    params: dict,
    cache: dict,
    tokens: Int[Array, " B"],
    cfg: ModelConfig,
    reset: Bool[Array, " B"],
    active: Bool[Array, " B"],
    record: bool = False,
) -> tuple[Float[Array, "B D"], dict] | tuple[Float[Array, "B D"], dict, Int[Array, "B L A"]]:
    """Feeds one token to every active slot: tokens int32 [B], reset and active bool [B] -> (hidden [B, D] after the final norm, cache).

    reset: the slot starts a new sequence with this token, whatever it held. An inactive slot keeps cache and position as they are (a
    reset of it does nothing) and its hidden state means nothing. A slot must not be fed more than max_length tokens: further ones are
    not stored. Donate the cache (jax.jit(..., donate_argnames="cache")) or every call copies it.
    record (static): also the experts each token took, int16 [B, L, A] for transformer.apply's routes; -1 where inactive.
    """
    reset = reset & active
    position = jnp.where(reset, 0, cache["position"])

    def attend(p, x, layer, cos, sin):
        return attention_step(p, x, layer, position, active, cos, sin, cfg)

    def recur(p, x, layer):
        return gated_delta_step(p, x, layer, reset, active, cfg)

    hidden, layers, routes = through_layers(params, cache["layers"], tokens, position, active, attend, recur, cfg, record)
    cache = {"position": jnp.where(active, position + 1, cache["position"]), "layers": layers}
    return (hidden, cache, routes) if record else (hidden, cache)


def prefill(
    params: dict,
    cache: dict,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cfg: ModelConfig,
    reset: Bool[Array, " B"],
    record: bool = False,
) -> tuple[Float[Array, "B T D"], dict] | tuple[Float[Array, "B T D"], dict, Int[Array, "B T L A"]]:
    """Feeds the first lengths[b] of tokens [B, T] to slot b, in parallel over T: lengths[b] calls of step, to a rounding.

    Returns (hidden [B, T, D] after the final norm, cache); `last` picks each slot's newest hidden state. A slot goes on from what it
    holds, so a prompt may come in pieces and a long observation in one call; reset as in step, before the first of these tokens.
    Length 0: the slot is inactive, kept bit for bit. What stands behind a slot's length reaches nothing, and hidden means nothing there.
    record (static): also the experts taken, int16 [B, T, L, A], -1 behind a slot's length. Donate the cache, as for step.
    """
    t, fed = tokens.shape[1], lengths > 0
    tokens = jnp.pad(tokens, ((0, 0), (0, -t % shards("length", t))))  # any T may be fed, also under a mesh that cuts it
    reset, valid = reset & fed, jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    start = jnp.where(reset, 0, cache["position"])
    position = start[:, None] + jnp.arange(tokens.shape[1])[None]

    def attend(p, x, layer, cos, sin):
        return attention_prefill(p, x, layer, position, valid, cos, sin, cfg)

    def recur(p, x, layer):
        return gated_delta_prefill(p, x, layer, reset, lengths, valid, cfg)

    hidden, layers, routes = through_layers(params, cache["layers"], tokens, position, valid, attend, recur, cfg, record)
    cache = {"position": jnp.where(fed, start + lengths, cache["position"]), "layers": layers}
    return (hidden[:, :t], cache, routes[:, :t]) if record else (hidden[:, :t], cache)


def last(hidden: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    """Hidden state of the last token each slot was fed by prefill; means nothing where lengths is 0."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def through_layers(
    params: dict,
    layers: list[dict],
    tokens: Int[Array, "*lead"],
    positions: Int[Array, "*lead"],
    valid: Bool[Array, "*lead"],
    attend: Callable,
    recur: Callable,
    cfg: ModelConfig,
    record: bool,
) -> tuple[Float[Array, "*lead D"], list[dict], Int[Array, "*lead L A"] | None]:
    """(hidden after the final norm, caches of the layers, experts taken or None) of tokens [B] or [B, T] with these positions.

    attend(p, x, cache, cos, sin) and recur(p, x, cache), each -> (out, cache), are the two mixers; valid: tokens that are fed.
    """
    cos, sin = rotary_angles(positions, cfg.rotary_dim, cfg.rope_theta)
    x = embed(params["embed_tokens"], tokens, cfg)
    caches, routes = [], []
    for i, cache in enumerate(layers):
        p = params["layers"][i] if "layers" in params else layer_params(params, i, cfg)
        h = rms_norm(x, p["input_layernorm"], cfg.norm_eps)
        h, cache = attend(p["self_attn"], h, cache, cos, sin) if cfg.is_full_attention(i) else recur(p["linear_attn"], h, cache)
        x = x + h
        h = rms_norm(x, p["post_attention_layernorm"], cfg.norm_eps).reshape(x.shape[0], -1, x.shape[-1])
        h, aux = moe.apply(p["mlp"], h, valid.reshape(h.shape[:2]), cfg, record=record)
        x = x + h.reshape(x.shape)
        caches.append(cache)
        routes.append(aux.get("routes"))
    taken = jnp.stack(routes, axis=2).reshape(*tokens.shape, cfg.num_layers, -1) if record else None
    return rms_norm(x, params["norm"], cfg.norm_eps), caches, taken


def write(cache: dict, k: jax.Array, v: jax.Array, position: jax.Array, valid: jax.Array) -> dict:
    """Keys and values [B, (T,) K, F] into the rows position [B, (T)] of each slot; those that are not valid nowhere."""
    b, length = cache["k"].shape[0], cache["k"].shape[2]
    row = jnp.where(valid, position, length)  # out of range: dropped
    slot = jnp.arange(b).reshape((b,) + (1,) * (row.ndim - 1))
    return {name: cache[name].at[slot, :, row].set(new, mode="drop") for name, new in (("k", k), ("v", v))}


def attention_step(p: dict, x: jax.Array, cache: dict, position, active, cos, sin, cfg: ModelConfig) -> tuple[jax.Array, dict]:
    """x [B, D] -> [B, D]; writes key and value at each active slot's position, reads up to it."""
    q, k, v, gate = attention.project(p, x, cos, sin, cfg)
    b, length = x.shape[0], cache["k"].shape[2]
    cache = write(cache, k, v, position, active)
    q = q.reshape(b, cfg.num_kv_heads, -1, cfg.head_dim)
    # The keys are the left operand: as the right one a CPU would transpose the whole cache at every token.
    scores = jnp.matmul(cache["k"], jnp.swapaxes(q, 2, 3), preferred_element_type=jnp.float32) * cfg.head_dim**-0.5  # [B, K, S, R]
    seen = (jnp.arange(length)[None] <= position[:, None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, jnp.swapaxes(scores, 2, 3), attention.MASKED), axis=-1).astype(x.dtype)
    mixed = jnp.matmul(weights, cache["v"])
    return attention.output(p, mixed.reshape(b, -1), gate), cache


def attention_prefill(p: dict, x: jax.Array, cache: dict, position, valid, cos, sin, cfg: ModelConfig) -> tuple[jax.Array, dict]:
    """x [B, T, D] -> [B, T, D]; writes keys and values of valid tokens [B, T], each reads up to its own position.

    cfg.attention_chunk > 0: that many query rows at a time, so that scores never exceed [B, H, chunk, S].
    """
    q, k, v, gate = attention.project(p, x, cos, sin, cfg)
    cache = write(cache, k, v, position, valid)
    k, v = (jnp.moveaxis(cache[name], 1, 2) for name in ("k", "v"))
    columns = jnp.arange(k.shape[1])

    def rows(q, position):
        return attention.attend(q, k, v, columns[None, None] <= position[..., None])

    (b, t), chunk = x.shape[:2], cfg.attention_chunk
    if not chunk or chunk >= t:
        return attention.output(p, rows(q, position), gate), cache
    n = -(-t // chunk)

    def split(y):
        y = jnp.pad(y, ((0, 0), (0, n * chunk - t)) + ((0, 0),) * (y.ndim - 2))
        return jnp.moveaxis(y.reshape(b, n, chunk, *y.shape[2:]), 1, 0)

    mixed = jax.lax.map(lambda xs: rows(*xs), (split(q), split(position)))
    return attention.output(p, jnp.moveaxis(mixed, 0, 1).reshape(b, n * chunk, -1)[:, :t], gate), cache


def gated_delta_step(p: dict, x: jax.Array, cache: dict, reset, active, cfg: ModelConfig) -> tuple[jax.Array, dict]:
    """x [B, D] -> [B, D]; a reset slot starts from zero, an inactive slot keeps what it had."""
    window = jnp.where(reset[:, None, None], 0, cache["window"])
    out, window, state = gated_delta.step(p, x, window, cache["state"], reset, active, cfg)
    return out, {"window": jnp.where(active[:, None, None], window, cache["window"]), "state": state}


def gated_delta_prefill(p: dict, x: jax.Array, cache: dict, reset, lengths, valid, cfg: ModelConfig) -> tuple[jax.Array, dict]:
    """x [B, T, D] -> [B, T, D] in chunks, from the slot's window and state (zero where reset) to those after its length."""
    window, state = (jnp.where(reset.reshape(-1, *(1,) * (y.ndim - 1)), 0, y) for y in (cache["window"], cache["state"]))
    past, t = window.shape[1], x.shape[1]
    inputs = jnp.concatenate([window, linear(x, p["in_proj_qkv"])], axis=1)
    runs = jnp.zeros(inputs.shape[:2], jnp.int32)  # one run: no token and a zero are the same to the convolution
    q, k, v = gated_delta.split_heads(causal_conv(inputs, p["conv1d"], runs)[:, past:], cfg)
    g, beta = (jnp.where(valid[..., None], y, 0) for y in gated_delta.gates(p, x))  # decay 1, strength 0: the state stays
    chunk = min(cfg.delta_chunk, 1 << (t - 1).bit_length())
    out, state = delta_rule(q, k, v, g, beta, runs[:, past:], chunk, state, open_run=runs[:, 0])
    newest = (lengths[:, None] + jnp.arange(past)[None])[..., None]  # also shorter than the window: then it is part of the old one
    return gated_delta.output(p, out, x, cfg), {"window": jnp.take_along_axis(inputs, newest, axis=1), "state": state}
