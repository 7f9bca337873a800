"""Floating-point operations per token, by formula: matrix products of every part, attention's causal half, the chunked delta rule.

A product [m, k] @ [k, n] is 2 m k n. Left out: norms, softmax, gates, routing, sampling and the optimizer, which are not matrix products
and a percent or two of the whole. Forward and backward are what the mathematics needs (backward twice the forward); what is computed again
to save memory is counted apart (``recomputed``). The delta rule is counted as its chunked form computes it (arXiv 2406.06484); across
shards of a row (mesh axis context) it takes a second, short pass, which is not in here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from a1jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Per token. parts: the forward pass by part. exact: of all of forward + backward + recomputed, those in full float32 (the delta rule),
    which a TPU makes in 6 passes."""

    forward: float
    backward: float
    recomputed: float
    exact: float
    parts: dict[str, float]

    @property
    def model(self) -> float:
        """Without what is computed again: the number to compare models by."""
        return self.forward + self.backward

    @property
    def passes(self) -> float:
        """As bfloat16 passes of a TPU's matrix unit, everything included."""
        return self.model + self.recomputed + 5 * self.exact


def total(several: Sequence[Flops]) -> Flops:
    """Of passes one after the other over the same tokens."""
    sums = {name: sum(getattr(one, name) for one in several) for name in ("forward", "backward", "recomputed", "exact")}
    return Flops(**sums, parts={name: sum(one.parts.get(name, 0.0) for one in several) for one in several for name in one.parts})


def linear_parts(cfg: ModelConfig) -> dict[str, float]:
    """Products with weights, per token of a forward pass over all layers, without the output matrix."""
    d = cfg.d_model
    full = _full(cfg)
    heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    qkv, value = 2 * cfg.linear_key_dim + cfg.linear_value_dim, cfg.linear_value_dim
    delta = d * (qkv + value + 2 * cfg.linear_num_value_heads) + value * d + cfg.conv_width * qkv
    return {
        "attention projections": 2.0 * full * (d * (2 * heads + 2 * kv) + heads * d),  # queries bring their gate
        "delta projections": 2.0 * (cfg.num_layers - full) * delta,
        "router": 2.0 * cfg.num_layers * d * cfg.num_experts,
        "experts": 2.0 * cfg.num_layers * cfg.num_experts_active * 3 * d * cfg.expert_width,
        "shared expert": 2.0 * cfg.num_layers * (3 * d * cfg.shared_expert_width + d),
    }


def head(cfg: ModelConfig) -> float:
    """The output matrix, per token whose logits are made."""
    return 2.0 * cfg.d_model * cfg.vocab_size


def attention(cfg: ModelConfig, keys: float | int) -> float:
    """Scores and mixing of all full-attention layers, per query that sees so many keys."""
    full = _full(cfg)
    return 4.0 * full * cfg.num_heads * cfg.head_dim * keys


def delta_chunked(cfg: ModelConfig) -> float:
    """The gated delta rule of all its layers in chunks of C tokens, per token: pairs inside a chunk, the inverse of a triangle by doubling,
    and five products with states or written values."""
    c, dk, dv = cfg.delta_chunk, cfg.linear_key_head_dim, cfg.linear_value_head_dim
    per_key_head = 2 * (2.0 * c * dk)  # keys with keys, queries with keys
    inverse = 2 * max(0, math.log2(c) - 1) * 2.0 * c * c
    decays = 2.0 * c
    per_head = decays + inverse + 2.0 * c * dv + 2.0 * c * dk + 3 * 2.0 * dk * dv + 2.0 * c * dv
    return (cfg.num_layers - _full(cfg)) * (cfg.linear_num_key_heads * per_key_head + cfg.linear_num_value_heads * per_head)


def delta_step(cfg: ModelConfig) -> float:
    """One token of decoding: what the key recalls, what the query reads, and the outer product that is written."""
    per_head = 3 * 2.0 * cfg.linear_key_head_dim * cfg.linear_value_head_dim
    return (cfg.num_layers - _full(cfg)) * cfg.linear_num_value_heads * per_head


def _full(cfg: ModelConfig) -> int:
    return sum(cfg.is_full_attention(i) for i in range(cfg.num_layers))


def training(cfg: ModelConfig, length: int, head_forward: float = 1.0, head_backward: float = 2.0, head_again: float = 0.0) -> Flops:
    """A train step's cost per token, every row one run of ``length`` tokens (shorter runs cost less: this is the most).

    head_forward, head_backward, head_again: what the loss makes of the output matrix, in products with all of it: forward, in the
    gradient, and once more to save memory (a loss in blocks of the vocabulary makes logits twice).
    Recomputation: any cfg.remat but "none" is counted as the whole of every block once more, attention in chunks once more by itself.
    """
    parts = {**linear_parts(cfg), "attention": attention(cfg, (length + 1) / 2), "delta rule": delta_chunked(cfg)}
    blocks, logits = sum(parts.values()), head(cfg)
    again = blocks if cfg.remat != "none" else 0.0
    chunked = parts["attention"] if 0 < cfg.attention_chunk < length else 0.0
    spans = parts["delta rule"] if length > 1024 else 0.0  # models.delta_rule prepares spans of 512 tokens again
    return Flops(
        forward=blocks + head_forward * logits,
        backward=2 * blocks + head_backward * logits,
        recomputed=again + chunked + spans + head_again * logits,
        exact=parts["delta rule"] * (3 + (cfg.remat != "none")) + spans,
        parts={**parts, "output matrix": head_forward * logits},
    )


def forward(cfg: ModelConfig, length: int, heads: float = 1.0) -> Flops:
    """Reading runs of ``length`` tokens without a gradient; heads: share of the tokens whose logits are made."""
    parts = {**linear_parts(cfg), "attention": attention(cfg, (length + 1) / 2), "delta rule": delta_chunked(cfg)}
    parts["output matrix"] = heads * head(cfg)
    return Flops(sum(parts.values()), 0.0, 0.0, parts["delta rule"], parts)


def decoding(cfg: ModelConfig, keys: float | int) -> Flops:
    """One token with so many keys in the cache; the step multiplies with all places of the cache, masked or not."""
    parts = {**linear_parts(cfg), "attention": attention(cfg, keys), "delta rule": delta_step(cfg), "output matrix": head(cfg)}
    return Flops(sum(parts.values()), 0.0, 0.0, parts["delta rule"], parts)
