"""One token at a time for many slots in lockstep, equal to the full forward pass.

Each slot has its own position. Attention layers keep keys and values [B, K, S, F]; gated delta nets keep the convolution's window and the
recurrent state. Blocks are unrolled and every layer has buffers of its own: with the cache donated, XLA then writes one row in place where
a scan over stacked caches would copy all of them at every token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from a1jax.models import attention, gated_delta, moe
from a1jax.models.config import ModelConfig
from a1jax.models.layers import embed, rms_norm, rotary_angles


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


def step(
    params: dict, cache: dict, tokens: Int[Array, " B"], cfg: ModelConfig, reset: Bool[Array, " B"], active: Bool[Array, " B"]
) -> tuple[Float[Array, "B D"], dict]:
    """Feeds one token to every active slot: tokens int32 [B], reset and active bool [B] -> (hidden [B, D] after the final norm, cache).

    reset: the slot starts a new sequence with this token, whatever it held. An inactive slot keeps cache and position as they are (a
    reset of it does nothing) and its hidden state means nothing. A slot must not be fed more than max_length tokens: further ones are
    not stored. Donate the cache (jax.jit(..., donate_argnames="cache")) or every call copies it.
    """
    reset = reset & active
    position = jnp.where(reset, 0, cache["position"])
    cos, sin = rotary_angles(position, cfg.rotary_dim, cfg.rope_theta)
    x = embed(params["embed_tokens"], tokens, cfg)
    layers = []
    for i, layer_cache in enumerate(cache["layers"]):
        n, j = divmod(i, cfg.block_layers)
        p = jax.tree.map(lambda w, n=n: w[n], params["blocks"][str(j)])
        h = rms_norm(x, p["input_layernorm"], cfg.norm_eps)
        if cfg.is_full_attention(i):
            h, layer_cache = attention_step(p["self_attn"], h, layer_cache, position, active, cos, sin, cfg)
        else:
            h, layer_cache = gated_delta_step(p["linear_attn"], h, layer_cache, reset, active, cfg)
        x = x + h
        h, _ = moe.apply(p["mlp"], rms_norm(x, p["post_attention_layernorm"], cfg.norm_eps)[:, None], active[:, None], cfg)
        x = x + h[:, 0]
        layers.append(layer_cache)
    hidden = rms_norm(x, params["norm"], cfg.norm_eps)
    return hidden, {"position": jnp.where(active, position + 1, cache["position"]), "layers": layers}


def attention_step(p: dict, x: jax.Array, cache: dict, position, active, cos, sin, cfg: ModelConfig) -> tuple[jax.Array, dict]:
    """x [B, D] -> [B, D]; writes key and value at each active slot's position, reads up to it."""
    q, k, v, gate = attention.project(p, x, cos, sin, cfg)
    b, length = x.shape[0], cache["k"].shape[2]
    row = jnp.where(active, position, length)  # out of range: dropped
    cache = {name: cache[name].at[jnp.arange(b), :, row].set(new, mode="drop") for name, new in (("k", k), ("v", v))}
    q = q.reshape(b, cfg.num_kv_heads, -1, cfg.head_dim)
    # The keys are the left operand: as the right one a CPU would transpose the whole cache at every token.
    scores = jnp.matmul(cache["k"], jnp.swapaxes(q, 2, 3), preferred_element_type=jnp.float32) * cfg.head_dim**-0.5  # [B, K, S, R]
    seen = (jnp.arange(length)[None] <= position[:, None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, jnp.swapaxes(scores, 2, 3), attention.MASKED), axis=-1).astype(x.dtype)
    mixed = jnp.matmul(weights, cache["v"])
    return attention.output(p, mixed.reshape(b, -1), gate), cache


def gated_delta_step(p: dict, x: jax.Array, cache: dict, reset, active, cfg: ModelConfig) -> tuple[jax.Array, dict]:
    """x [B, D] -> [B, D]; a reset slot starts from zero, an inactive slot keeps what it had."""
    window = jnp.where(reset[:, None, None], 0, cache["window"])
    out, window, state = gated_delta.step(p, x, window, cache["state"], reset, active, cfg)
    return out, {"window": jnp.where(active[:, None, None], window, cache["window"]), "state": state}
