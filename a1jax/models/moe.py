"""Mixture of experts: float32 router, top-k of the softmax renormalised, a shared expert behind a sigmoid gate.

No token is dropped, whatever the imbalance. Under a mesh every device owns whole experts, gathers the tokens of its group, computes
those pairs of token and expert that are its own, and the sum goes back to where each token came from: see experts_sharded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from a1jax.models.config import ModelConfig
from a1jax.models.layers import linear, matrix, silu, weight_init
from a1jax.params import ParamSpec
from a1jax.sharding import activation_spec, is_sharded, mesh_axes

DENSE_ROWS = 256  # tokens per step of experts_dense: [rows, E * F] float32 is half a megabyte for the tiny configurations

TOKENS, EXPERTS = ("batch", "length", "hidden"), ("experts", "expert_in", "expert_out")


def specs(cfg: ModelConfig) -> dict:
    """HF `mlp.gate.weight`, `mlp.shared_expert*.weight` are these transposed; `mlp.experts.gate_up_proj` [E, 2 F, D] and `down_proj`
    [E, D, F] are these with the last two axes swapped (gate in the first half of 2 F, up in the second, as in HF)."""
    d, e, f, shared = cfg.d_model, cfg.num_experts, cfg.expert_width, cfg.shared_expert_width
    return {
        "gate": matrix(cfg, (d, e), ("embed", "router")),
        "experts": {
            "gate_up_proj": ParamSpec((e, d, 2 * f), EXPERTS, weight_init(cfg, d), cfg.param_dtype),
            "down_proj": ParamSpec((e, f, d), EXPERTS, weight_init(cfg, f, to_residual=True), cfg.param_dtype),
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


def glu(x: jax.Array, width: int) -> jax.Array:
    """silu(gate) * up of the two halves of the last axis."""
    return silu(x[..., :width]) * x[..., width:]


def experts_dense(
    x: Float[Array, "T D"], weights: Float32[Array, "T E"], gate_up: Float[Array, "E D F2"], down: Float[Array, "E F D"]
) -> Float[Array, "T D"]:
    """Every expert on every token: x [T, D], weights [T, E], gate_up [E, D, 2 F], down [E, F, D] -> [T, D]. Three plain matmuls.

    DENSE_ROWS tokens at a time, computed again in the backward pass: the wide activations then stay in a core's cache, which more
    than pays for the second computation.
    """
    (e, f, d), t = down.shape, x.shape[0]
    if t <= DENSE_ROWS:  # a decoding step: one matmul into all experts, one out of them
        h = (x @ jnp.moveaxis(gate_up, 0, 1).reshape(d, -1)).reshape(t, e, 2 * f)
        return (glu(h, f) * weights[..., None].astype(x.dtype)).reshape(t, -1) @ down.reshape(e * f, d)
    gate, up = (jnp.moveaxis(half, 0, 1).reshape(d, e * f) for half in jnp.split(gate_up, 2, axis=-1))
    down = down.reshape(e * f, d)

    def rows(x, weights):
        h = silu(linear(x, gate)) * linear(x, up)
        h = h.reshape(-1, e, f) * weights[..., None].astype(x.dtype)
        return linear(h.reshape(-1, e * f), down)

    n = -(-t // DENSE_ROWS)
    x, weights = (jnp.pad(y, ((0, n * DENSE_ROWS - t), (0, 0))).reshape(n, DENSE_ROWS, -1) for y in (x, weights))
    return jax.lax.map(lambda xs: jax.checkpoint(rows, prevent_cse=False)(*xs), (x, weights)).reshape(-1, d)[:t]


@jax.custom_vjp
def gather_pairs(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """x [T, D] -> [T * A, D], row i the token of pair order[i]; place is order's inverse. Its gradient is a gather too, not a scatter."""
    return x[order // (order.shape[0] // x.shape[0])]


gather_pairs.defvjp(
    lambda x, order, place: (gather_pairs(x, order, place), (place, x.shape[0])),
    lambda residual, g: (jnp.sum(g[residual[0]].reshape(residual[1], -1, g.shape[-1]), axis=1), None, None),
)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], with x's gradient by the inverse permutation."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))


def experts_ragged(
    x: Float[Array, "T D"], weights: Float32[Array, "T E"], gate_up: Float[Array, "E D F2"], down: Float[Array, "E F D"], active: int
) -> Float[Array, "T D"]:
    """Pairs of token and expert sorted by expert, then grouped matmuls; arguments as experts_dense, weights with at most `active`
    entries above 0 per token. There is room for T * active pairs, so nothing can be dropped; missing pairs lie behind the last group."""
    e, f, _ = down.shape
    weight, expert = jax.lax.top_k(weights, active)
    expert = jnp.where(weight > 0, expert, e).reshape(-1)  # e: no expert here
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(e)[None], axis=0, dtype=jnp.int32)
    real = (jnp.arange(expert.shape[0]) < jnp.sum(sizes))[:, None]  # rows behind the last group are undefined: never let them through
    h = jnp.where(real, gather_pairs(x, order, place), 0)
    h = jnp.where(real, glu(jax.lax.ragged_dot(h, gate_up, sizes), f), 0)
    y = jnp.where(real, jax.lax.ragged_dot(h, down, sizes), 0)
    y = permute(y, place, order).reshape(x.shape[0], active, -1)
    return jnp.sum(y * weight[..., None].astype(y.dtype), axis=1)


def experts_local(
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """The routed experts here: x [B, T, D], weights [B, T, E] -> [B, T, D], by the form that cfg.moe names."""
    flat, per_token = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    if cfg.moe == "dense":
        return experts_dense(flat, per_token, gate_up, down).reshape(x.shape)
    return experts_ragged(flat, per_token, gate_up, down, min(cfg.num_experts_active, down.shape[0])).reshape(x.shape)


def experts_sharded(
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """experts_local over the mesh: x [B, T, D] and weights [B, T, E] cut over the data axes and context, experts over RULES["experts"].

    Tokens and their weights are gathered over the axes that cut both tokens and experts, and outputs summed and scattered back over
    them; an axis that cuts experts only (tensor) sums; one that cuts tokens only (data, context) has copies of the experts and adds up
    their gradients. Expert weights never move.
    """
    (b, t, d), e = x.shape, weights.shape[2]
    rows, columns, owners = mesh_axes("batch", b), mesh_axes("length", t), mesh_axes("experts", e)
    gathered = [(axis, dimension) for dimension, axes in ((0, rows), (1, columns)) for axis in axes if axis in owners]
    summed = tuple(axis for axis in owners if axis not in (*rows, *columns))
    replicated = tuple(axis for axis in (*rows, *columns) if axis not in owners)

    def local(x, weights, gate_up, down):
        # A custom gradient does not sum over the devices that share its argument; the gradient of this cast does.
        if summed:
            x, weights = (jax.lax.pcast(y, summed, to="varying") for y in (x, weights))
        if replicated:
            gate_up, down = (jax.lax.pcast(y, replicated, to="varying") for y in (gate_up, down))
        for axis, dimension in reversed(gathered):
            x, weights = (jax.lax.all_gather(y, axis, axis=dimension, tiled=True) for y in (x, weights))
        first = jnp.int32(0)
        for axis in owners:
            first = first * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        weights = jax.lax.dynamic_slice_in_dim(weights, first * down.shape[0], down.shape[0], axis=2)
        y = experts_local(x, weights, gate_up, down, cfg)
        y = jax.lax.psum(y, summed) if summed else y
        for axis, dimension in gathered:
            y = jax.lax.psum_scatter(y, axis, scatter_dimension=dimension, tiled=True)
        return y

    tokens, experts = (activation_spec(shape, axes) for shape, axes in (((b, t, d), TOKENS), (down.shape, EXPERTS)))
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
