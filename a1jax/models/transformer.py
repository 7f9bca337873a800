"""The whole model: specs of its parameters, the forward pass to hidden states, and logits where someone asks for them.

Parameters (HF names in brackets; HF linear weights are [out, in], ours (in, out)):

    embed_tokens [V, D]                       [model.embed_tokens.weight]
    blocks.<j>.<name>  leaf [N, ...]          [model.layers.<n * cfg.block_layers + j>.<name>]; j in 0 .. cfg.block_layers - 1
        input_layernorm, post_attention_layernorm [D]; linear_attn.* or self_attn.*; mlp.*: see specs() of those modules
    norm [D]                                  [model.norm.weight]
    lm_head [V, D], only when not tied        [lm_head.weight]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from a1jax.models import attention, gated_delta, moe
from a1jax.models.config import ModelConfig
from a1jax.models.layers import embed, norm_weight, rms_norm, rotary_angles
from a1jax.params import ParamSpec, count, normal, stack
from a1jax.sharding import constrain


def specs(cfg: ModelConfig) -> dict:
    """Tree of ParamSpec for params.init, abstract, shardings and count."""
    table = ParamSpec((cfg.vocab_size, cfg.d_model), ("vocab", "embed"), normal(cfg.init_std or cfg.d_model**-0.5), cfg.param_dtype)
    blocks = {str(j): stack(layer_specs(cfg, cfg.is_full_attention(j)), cfg.num_blocks) for j in range(cfg.block_layers)}
    tree = {"embed_tokens": table, "blocks": blocks, "norm": norm_weight(cfg, cfg.d_model)}
    return tree if cfg.tie_embeddings else {**tree, "lm_head": table}


def layer_specs(cfg: ModelConfig, full_attention: bool) -> dict:
    mixer = {"self_attn": attention.specs(cfg)} if full_attention else {"linear_attn": gated_delta.specs(cfg)}
    norms = {"input_layernorm": norm_weight(cfg, cfg.d_model), "post_attention_layernorm": norm_weight(cfg, cfg.d_model)}
    return {**norms, **mixer, "mlp": moe.specs(cfg)}


def parameter_counts(cfg: ModelConfig) -> tuple[int, int]:
    """(all parameters, parameters a token uses): the second without the experts it is not routed to, embeddings included."""
    total, expert = count(specs(cfg)), count(moe.specs(cfg)["experts"]) // cfg.num_experts
    return total, total - cfg.num_layers * (cfg.num_experts - cfg.num_experts_active) * expert


def number_runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """int32 [B, T]: numbers contiguous runs of one segment id 0, 1, ... along a row. Padding (id 0) is a run like any other, so an id
    that comes back, or padding in the middle, joins nothing."""
    segment_ids = constrain(segment_ids, "batch", None)  # counting needs the whole row
    border = segment_ids[:, 1:] != segment_ids[:, :-1]
    return constrain(jnp.pad(jnp.cumsum(border, axis=1, dtype=jnp.int32), ((0, 0), (1, 0))), "batch", "length")


def apply(
    params: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cfg: ModelConfig,
    routes: Int[Array, "B T L A"] | None = None,
) -> tuple[Float[Array, "B T D"], dict]:
    """Forward pass: tokens, positions, segment_ids int32 [B, T] -> (hidden [B, T, D] after the final norm, aux).

    aux: "loss" float32, the router losses times their coefficients, to be added to the loss; "router/load_balance", "router/z",
    "router/entropy" (nats), means over layers; "router/max_load", the busiest expert's load over the balanced one; "load" [L, E], share
    of pairs per expert. Padding (segment 0) counts in none of them.
    routes [B, T, L, A]: experts recorded while sampling (decode.step with record=True), used in place of the router's own choice with
    this forward's probabilities renormalised on them (router replay, arXiv 2510.11370); -1: choose freely. None: no replay.
    """
    runs, valid = number_runs(segment_ids), segment_ids > 0
    cos, sin = rotary_angles(positions, cfg.rotary_dim, cfg.rope_theta)
    with jax.named_scope("embed"):
        x = embed(params["embed_tokens"], tokens, cfg)

    if routes is not None:
        routes = jnp.moveaxis(routes.reshape(*tokens.shape, cfg.num_blocks, cfg.block_layers, -1), (2, 3), (0, 1))

    def block(x, xs):
        return apply_block(xs[0], x, runs, valid, cos, sin, cfg, xs[1])

    if cfg.remat == "block":
        # The scan keeps forward and backward apart already, so the barrier against common subexpressions would only cost.
        block = jax.checkpoint(block, prevent_cse=False)
    x, statistics = jax.lax.scan(block, x, (params["blocks"], routes))
    with jax.named_scope("norm"):
        hidden = rms_norm(x, params["norm"], cfg.norm_eps)
    return hidden, summarise(statistics, cfg)


def apply_block(
    p: dict,
    x: Float[Array, "B T D"],
    runs: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    cfg: ModelConfig,
    routes: Int[Array, "layers B T A"] | None = None,
) -> tuple[Float[Array, "B T D"], dict]:
    """One block of cfg.block_layers layers: x [B, T, D] -> (x, router statistics, [block_layers, ...] each)."""
    statistics = []

    def again(part, weights, norm, x):
        """The part on the normed stream; with remat "layer" only the stream is kept for its gradient."""
        run = lambda weights, norm, x: part(weights, rms_norm(x, norm, cfg.norm_eps))  # noqa: E731
        return (jax.checkpoint(run) if cfg.remat == "layer" else run)(weights, norm, x)

    for j in range(cfg.block_layers):
        layer = p[str(j)]
        with jax.named_scope(f"layer{j}"):
            if cfg.is_full_attention(j):
                with jax.named_scope("attention"):
                    x = x + again(lambda p, h: attention.apply(p, h, runs, cos, sin, cfg), layer["self_attn"], layer["input_layernorm"], x)
            else:
                with jax.named_scope("gated_delta"):
                    x = x + again(lambda p, h: gated_delta.apply(p, h, runs, cfg), layer["linear_attn"], layer["input_layernorm"], x)
            with jax.named_scope("moe"):
                replay = None if routes is None else routes[j]
                h, aux = again(
                    lambda p, h, replay=replay: moe.apply(p, h, valid, cfg, replay), layer["mlp"], layer["post_attention_layernorm"], x
                )
            x = constrain(x + h, "batch", "length", "hidden")
        statistics.append(aux)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics)


def summarise(statistics: dict, cfg: ModelConfig) -> dict:
    """Router statistics, leaves [N, block_layers, ...] -> the aux of apply()."""
    means = {f"router/{name}": jnp.mean(statistics[name]) for name in ("load_balance", "z", "entropy")}
    load = statistics["load"].reshape(cfg.num_layers, cfg.num_experts)
    loss = cfg.load_balance_coef * means["router/load_balance"] + cfg.z_loss_coef * means["router/z"]
    return {**means, "router/max_load": cfg.num_experts * jnp.max(load), "load": load, "loss": loss}


def unembed(params: dict, cfg: ModelConfig) -> jax.Array:
    """[V, D], rows against which hidden states are multiplied: logits = hidden @ unembed.T."""
    return params["embed_tokens" if cfg.tie_embeddings else "lm_head"]


def head(params: dict, hidden: Float[Array, "*lead D"], cfg: ModelConfig) -> Float[Array, "*lead V"]:
    """Logits float32 [..., V] of hidden [..., D]. Large: ask for it on the rows that need it only."""
    table = unembed(params, cfg).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def logits(
    params: dict, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cfg: ModelConfig
) -> Float[Array, "B T V"]:
    """Logits float32 [B, T, V] of every position: for looking at a model. Losses take hidden states and ``unembed`` instead."""
    return head(params, apply(params, tokens, positions, segment_ids, cfg)[0], cfg)
