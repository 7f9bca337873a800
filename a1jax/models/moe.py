"""Mixture of experts: float32 router, top-k of the softmax renormalised, a shared expert behind a sigmoid gate.

No token is dropped, whatever the imbalance, and under a mesh no expert ever moves. Every device owns whole experts; with moe "ragged"
every pair of token and expert travels to its owner and back (exchange.py), with the forms for CPUs all tokens of a group are gathered
where their experts are (experts_gathered).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from a1jax.config import ConfigError
from a1jax.models import exchange
from a1jax.models.config import ModelConfig
from a1jax.models.experts import experts_local
from a1jax.models.layers import linear, matrix, silu, weight_init
from a1jax.params import ParamSpec
from a1jax.sharding import activation_spec, is_sharded, mesh_axes, over_shards

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


def route(logits: Float32[Array, "*lead E"], active: int, routes: Int[Array, "*lead A"] | None = None) -> Float32[Array, "*lead E"]:
    """Router weights of float32 logits: the softmax on its `active` largest entries, renormalised, 0 elsewhere.

    Ties go to the lower index, as in jax.lax.top_k. Counting the larger entries costs E^2 comparisons but no sort and no scatter in
    the backward pass; from 64 experts on, top_k is cheaper.
    routes: experts chosen elsewhere (router replay, arXiv 2510.11370), which take the place of the largest entries; the weights stay
    this softmax's own, so gradients flow. -1 in the first entry: no record, choose freely. The entries are a set: an expert named
    twice counts once, and a row that names no expert of 0 .. E - 1 has weights nan (check_routes refuses both).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    chosen = jax.lax.stop_gradient(chosen_experts(probs, active))
    if routes is not None:
        chosen = jnp.where(routes[..., :1] < 0, chosen, any_of(routes, probs.shape[-1]))
    kept = jnp.where(chosen, probs, 0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def chosen_experts(probs: jax.Array, active: int) -> jax.Array:
    """bool [..., E]: the `active` largest of probs [..., E], ties to the lower index."""
    e = probs.shape[-1]
    if e > 64:
        return any_of(jax.lax.top_k(probs, active)[1], e)
    mine, other = probs[..., :, None], probs[..., None, :]
    earlier = (jnp.arange(e)[None] < jnp.arange(e)[:, None]).reshape((1,) * (probs.ndim - 1) + (e, e))
    return jnp.sum((other > mine) | ((other == mine) & earlier), axis=-1) < active


def any_of(index: jax.Array, e: int) -> jax.Array:
    """bool [..., E]: is the expert one of index [..., A]?"""
    return jnp.any(index[..., None] == jnp.arange(e).reshape((1,) * index.ndim + (e,)), axis=-2)


def routes_of(weights: Float32[Array, "*lead E"], valid: Bool[Array, "*lead"], active: int) -> Int[Array, "*lead A"]:
    """The experts of router weights [..., E] as a record for replay: int16 [..., A], largest weight first; -1 where not valid."""
    return jnp.where(valid[..., None], jax.lax.top_k(weights, active)[1], -1).astype(jnp.int16)


def check_routes(routes: np.ndarray, cfg: ModelConfig) -> None:
    """Raises ConfigError unless routes, integers [..., L, A], fit the model: rows of different experts, or all -1."""
    shape = (cfg.num_layers, cfg.num_experts_active)
    if routes.shape[-2:] != shape:
        raise ConfigError(
            f"recorded routes are {routes.shape}: this model needs [..., layers, active experts] = [..., {shape[0]}, {shape[1]}]"
        )
    routes = np.sort(routes, axis=-1)
    free = (routes == -1).all(-1)
    fits = (routes[..., 0] >= 0) & (routes[..., -1] < cfg.num_experts) & (np.diff(routes, axis=-1) > 0).all(-1)
    if not (free | fits).all():
        row = routes[~(free | fits)][0].tolist()
        raise ConfigError(f"recorded routes have {row}: give {shape[1]} different experts below {cfg.num_experts}, or -1 for no record")


def experts_gathered(
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """experts_local over the mesh: x [B, T, D] and weights [B, T, E] cut over the data axes and context, experts over RULES["experts"].

    Tokens and their weights are gathered over the axes that cut both tokens and experts, and outputs summed and scattered back over
    them; an axis that cuts experts only (tensor) sums; one that cuts tokens only (data) has copies of the experts and adds up their
    gradients. Expert weights never move.
    """
    if cfg.moe == "grouped":
        raise ConfigError("moe 'grouped' is for one GPU without a mesh: set model.moe = 'ragged'")
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


def experts_exchanged(
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T E"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    cfg: ModelConfig,
) -> Float[Array, "B T D"]:
    """experts_gathered by exchange.exchange. Along axes that cut both tokens and experts pairs travel; an axis that cuts experts only
    (tensor) sums; one that cuts tokens only (data) has copies of the experts and adds up their gradients."""
    (b, t, d), e, active = x.shape, weights.shape[2], cfg.num_experts_active
    owners, cut = mesh_axes("experts", e), (*mesh_axes("batch", b), *mesh_axes("length", t))
    axes, summed = tuple(a for a in owners if a in cut), tuple(a for a in owners if a not in cut)
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: mesh.shape[axis] for axis in owners}
    rank, part = exchange.places(sizes, axes, e)
    devices, here = math.prod(sizes[a] for a in axes), e // math.prod(sizes.values())

    def local(x, weights, gate_up, down):
        flat = x.reshape(-1, d)
        weight, expert = jax.lax.top_k(weights.reshape(-1, e), active)
        weight, expert = weight.reshape(-1), expert.reshape(-1)
        mine = weight > 0
        if summed:
            mine = mine & (jnp.asarray(part)[expert] == jax.lax.axis_index(summed))
        room = exchange.room_for(flat.shape[0], devices, active, here)
        pairs = exchange.group(jnp.where(mine, jnp.asarray(rank)[expert], devices), expert % here, devices, room, mesh.axis_names)
        y = exchange.exchange(flat, weight, gate_up, down, pairs, room, axes).reshape(x.shape)
        return jax.lax.psum(y, summed) if summed else y

    return over_shards(local, [(x, TOKENS), (weights, TOKENS), (gate_up, EXPERTS), (down, EXPERTS)], (b, t, d), TOKENS)


def apply(
    p: dict,
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    cfg: ModelConfig,
    routes: Int[Array, "B T A"] | None = None,
    record: bool = False,
) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """x [B, T, D], valid bool [B, T] (False: padding, not counted; no expert but the shared one sees it) -> (out [B, T, D], router
    statistics of router_statistics).

    routes: the experts to use, see route. record: also "routes" int16 [B, T, A], the experts used, -1 where not valid.
    """
    with jax.named_scope("router"):
        # float32 in earnest (by default some devices multiply float32 in fewer bits): two experts a rounding apart would swap between
        # rollout and training
        gate, exact = p["gate"].astype(jnp.float32), jax.lax.Precision.HIGHEST
        logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), gate, precision=exact)
        weights = route(logits, cfg.num_experts_active, routes)
        aux = router_statistics(logits, weights, valid)
        if record:
            aux["routes"] = routes_of(weights, valid, cfg.num_experts_active)
    with jax.named_scope("experts"):
        # Padding is one token over and over: its pairs would all go to the same experts, and all devices wait for the fullest of them.
        weights = jnp.where(valid[..., None], weights, 0.0)
        sharded = experts_exchanged if cfg.moe == "ragged" else experts_gathered
        out = (sharded if is_sharded() else experts_local)(x, weights, p["experts"]["gate_up_proj"], p["experts"]["down_proj"], cfg)
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
