"""Mixture of experts: float32 router, top-k of the softmax renormalised, a shared expert behind a sigmoid gate.

No token is dropped, whatever the imbalance. Under a mesh every device owns whole experts, gathers the tokens of its group, computes
those pairs of token and expert that are its own, and the sum goes back to where each token came from: see experts_sharded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32

from a1jax.models.config import ModelConfig
from a1jax.models.experts import experts_local
from a1jax.models.layers import linear, matrix, silu, weight_init
from a1jax.params import ParamSpec
from a1jax.sharding import is_sharded, mesh_axes


def specs(cfg: ModelConfig) -> dict:
    """HF `mlp.gate.weight`, `mlp.shared_expert*.weight` are these transposed; `mlp.experts.gate_up_proj` [E, 2 F, D] and `down_proj`
    [E, D, F] are these with the last two axes swapped (gate in the first half of 2 F, up in the second, as in HF)."""
    d, e, f, shared = cfg.d_model, cfg.num_experts, cfg.expert_width, cfg.shared_expert_width
    axes = ("experts", "expert_in", "expert_out")
    return {
        "gate": matrix(cfg, (d, e), ("embed", "router")),
        "experts": {
            "gate_up_proj": ParamSpec((e, d, 2 * f), axes, weight_init(cfg, d), cfg.param_dtype),
            "down_proj": ParamSpec((e, f, d), axes, weight_init(cfg, f, to_residual=True), cfg.param_dtype),
        },
        "shared_expert": {
            "gate_proj": matrix(cfg, (d, shared), ("embed", "shared_width")),
            "up_proj": matrix(cfg, (d, shared), ("embed", "shared_width")),
            "down_proj": matrix(cfg, (shared, d), ("shared_width", "embed"), to_residual=True),
        },
        "shared_expert_gate": matrix(cfg, (d, 1), ("embed", "single")),
    }


def route(logits: Float32[Array, "*lead E"], active: int) -> Float32[Array, "*lead E"]:
    """Router weights of float32 logits: the softmax on its `active` largest entries, renormalised, 0 elsewhere.

    Ties go to the lower index, as in jax.lax.top_k. Counting the larger entries costs E^2 comparisons but no sort and no scatter in
    the backward pass; from 64 experts on, top_k is cheaper.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    chosen = jax.lax.stop_gradient(chosen_experts(probs, active))
    kept = jnp.where(chosen, probs, 0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def chosen_experts(probs: jax.Array, active: int) -> jax.Array:
    """bool [..., E]: the `active` largest of probs [..., E], ties to the lower index."""
    e = probs.shape[-1]
    if e > 64:
        index = jax.lax.top_k(probs, active)[1]
        return jnp.any(index[..., None] == jnp.arange(e).reshape((1,) * index.ndim + (e,)), axis=-2)
    mine, other = probs[..., :, None], probs[..., None, :]
    earlier = (jnp.arange(e)[None] < jnp.arange(e)[:, None]).reshape((1,) * (probs.ndim - 1) + (e, e))
    return jnp.sum((other > mine) | ((other == mine) & earlier), axis=-1) < active


def experts_sharded(
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """experts_local over the mesh: x [B, T, D] and weights [B, T, E] cut over the data axes, experts over RULES["experts"].

    Tokens and their weights are gathered over the axes that cut both tokens and experts, and outputs summed and scattered back over
    them; an axis that cuts experts only (tensor) sums. Expert weights never move.
    """
    rows, columns, owners = mesh_axes("batch"), mesh_axes("length"), mesh_axes("experts")
    gathered = tuple(axis for axis in rows if axis in owners)
    summed = tuple(axis for axis in owners if axis not in rows)
    replicated = tuple(axis for axis in (*rows, *columns) if axis not in owners)  # expert weights are copied over these

    def local(x, weights, gate_up, down):
        # A custom gradient does not sum over the devices that share its argument; the gradient of this cast does.
        if summed:
            x, weights = (jax.lax.pcast(y, summed, to="varying") for y in (x, weights))
        if replicated:
            gate_up, down = (jax.lax.pcast(y, replicated, to="varying") for y in (gate_up, down))
        for axis in reversed(gathered):
            x, weights = (jax.lax.all_gather(y, axis, tiled=True) for y in (x, weights))
        first = jnp.int32(0)
        for axis in owners:
            first = first * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        weights = jax.lax.dynamic_slice_in_dim(weights, first * down.shape[0], down.shape[0], axis=2)
        y = experts_local(x, weights, gate_up, down, cfg)
        y = jax.lax.psum(y, summed) if summed else y
        for axis in gathered:
            y = jax.lax.psum_scatter(y, axis, tiled=True)
        return y

    tokens, experts = P(rows or None, columns or None), P(owners or None)
    return jax.shard_map(local, in_specs=(tokens, tokens, experts, experts), out_specs=tokens)(x, weights, gate_up, down)


def apply(
    p: dict, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], cfg: ModelConfig
) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """x [B, T, D], valid bool [B, T] (False: padding, not counted) -> (out [B, T, D], router statistics of router_statistics)."""
    with jax.named_scope("router"):
        # float32: two experts a rounding apart would swap between rollout and training
        logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), p["gate"].astype(jnp.float32))
        weights = route(logits, cfg.num_experts_active)
        aux = router_statistics(logits, weights, valid)
    with jax.named_scope("experts"):
        run = experts_sharded if is_sharded() else experts_local
        out = run(x, weights, *(p["experts"][name].astype(x.dtype) for name in ("gate_up_proj", "down_proj")), cfg)
    with jax.named_scope("shared_expert"):
        shared = p["shared_expert"]
        h = linear(silu(linear(x, shared["gate_proj"])) * linear(x, shared["up_proj"]), shared["down_proj"])
        out = out + jax.nn.sigmoid(linear(x, p["shared_expert_gate"])) * h
    return out, aux


def router_statistics(logits: Float32[Array, "B T E"], weights: Float32[Array, "B T E"], valid: Bool[Array, "B T"]) -> dict[str, jax.Array]:
    """Of logits and weights [B, T, E] over the valid tokens [B, T]:

    load_balance: E * sum_e (pairs of e / tokens) * (mean probability of e), arXiv 2101.03961 eq. 4 with the reference's scale (A when
    balanced); z: mean logsumexp^2 (arXiv 2202.08906); load [E]: share of pairs per expert, 1 / E when balanced; entropy: mean, nats.
    """
    valid = valid.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(valid), 1.0)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)

    def mean(x):
        return jnp.tensordot(valid, x, axes=2) / tokens

    pairs = mean((weights > 0).astype(jnp.float32))
    return {
        "load_balance": logits.shape[-1] * jnp.sum(pairs * mean(probs)),
        "z": mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
        "load": pairs / jnp.maximum(jnp.sum(pairs), 1e-9),
        "entropy": mean(-jnp.sum(probs * log_probs, axis=-1)),
    }
