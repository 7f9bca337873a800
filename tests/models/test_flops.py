"""FLOPs by formula: against hand-computed values, against the model's own program, and the published 3B of the 35B."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params as param_specs
from a1jax.models import config, decode, flops, transformer
from a1jax.models.delta_rule import delta_rule


def products(jaxpr, times=1.0) -> float:
    """FLOPs of every matrix product in a program, loops multiplied in, custom gradients and grouped products included."""
    total = 0.0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            total += times * 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[i] for i in contracted)
        elif e.primitive.name.startswith("ragged_dot"):
            rows, inner = e.invars[0].aval.shape
            total += times * 2 * rows * inner * e.invars[1].aval.shape[-1]
        often = times * e.params["length"] if e.primitive.name == "scan" else times
        for name, value in e.params.items():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and "bwd" not in name:
                    total += products(inner, often)
    return total


@pytest.fixture
def cfg():
    """Sizes that differ, so that a swapped one shows; grouped heads in both mixers; three gated delta nets to one attention."""
    return config.tiny_deep(
        vocab_size=96, d_model=24, num_heads=4, num_kv_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=6,
        linear_key_head_dim=8, linear_value_head_dim=12, num_experts=8, num_experts_active=3, expert_width=20, shared_expert_width=28,
        delta_chunk=8, moe="ragged",
    )  # fmt: skip


def means(cfg) -> float:
    """The router's statistics are sums over tokens by a product with ones: of two [E] and two scalars a layer."""
    return 2.0 * cfg.num_layers * (2 * cfg.num_experts + 2)


def test_by_hand():
    cfg = config.tiny(
        vocab_size=10, d_model=4, num_layers=2, full_attention_interval=2, num_heads=2, num_kv_heads=1, head_dim=4, linear_num_key_heads=1,
        linear_num_value_heads=2, linear_key_head_dim=3, linear_value_head_dim=5, conv_width=4, num_experts=6, num_experts_active=2,
        expert_width=7, shared_expert_width=8, delta_chunk=4, rotary_fraction=1.0,
    )  # fmt: skip
    parts = flops.linear_parts(cfg)
    # queries and gates 4 x 16, keys 4 x 4, values 4 x 4, out 8 x 4
    assert parts["attention projections"] == 2 * (64 + 16 + 16 + 32)
    # q, k, v 4 x (3 + 3 + 10), z 4 x 10, two gates 4 x 2 each, out 10 x 4, 4 taps on 16 channels
    assert parts["delta projections"] == 2 * (64 + 40 + 16 + 40 + 64)
    assert parts["router"] == 2 * 2 * (4 * 6)
    assert parts["experts"] == 2 * 2 * 2 * (4 * 14 + 7 * 4)
    assert parts["shared expert"] == 2 * 2 * (4 * 8 * 3 + 4)
    assert flops.head(cfg) == 2 * 4 * 10
    # 5 tokens see 1 + 2 + 3 + 4 + 5 keys: 3 each; scores and mixing are 2 products of 8 columns
    assert flops.attention(cfg, 3.0) == flops.attention(cfg, (5 + 1) / 2) == 2 * 2 * 8 * 3
    assert flops.delta_step(cfg) == 2 * 3 * 2 * 3 * 5


def test_a_forward_pass_by_formula_is_the_program_that_runs(cfg):
    b, t = 2, 32
    shapes = [jax.ShapeDtypeStruct((b, t), jnp.int32)] * 3
    jaxpr = jax.make_jaxpr(lambda p, *x: transformer.logits(p, *x, cfg))(param_specs.abstract(transformer.specs(cfg)), *shapes).jaxpr
    found = flops.forward(cfg, t)
    taps = 2 * 3 * cfg.conv_width * (2 * cfg.linear_key_dim + cfg.linear_value_dim)  # the convolution is no matrix product of the program
    square = flops.attention(cfg, t) - found.parts["attention"]  # the program multiplies the masked half too
    assert products(jaxpr) / (b * t) == found.forward - taps + square + means(cfg)


def test_a_decoding_step_by_formula_is_the_program_that_runs(cfg):
    slots, length = 3, 16
    cache = jax.eval_shape(lambda: decode.init_cache(cfg, slots, length))
    flags = [jax.ShapeDtypeStruct((slots,), jnp.bool_)] * 2

    def step(params, cache, tokens, reset, active):
        return transformer.head(params, decode.step(params, cache, tokens, cfg, reset, active)[0], cfg)

    abstract = param_specs.abstract(transformer.specs(cfg))
    jaxpr = jax.make_jaxpr(step)(abstract, cache, jax.ShapeDtypeStruct((slots,), jnp.int32), *flags).jaxpr
    taps = 2 * 3 * cfg.conv_width * (2 * cfg.linear_key_dim + cfg.linear_value_dim)
    outer = 2 * 3 * cfg.linear_num_value_heads * cfg.linear_key_head_dim * cfg.linear_value_head_dim  # written as a broadcast product
    assert products(jaxpr) / slots == flops.decoding(cfg, length).forward - taps - outer + means(cfg)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_the_chunked_delta_rule_by_formula_is_the_program_that_runs(cfg, chunk):
    cfg = dataclasses.replace(cfg, delta_chunk=chunk)
    b, t = 2, 32
    keys = jax.ShapeDtypeStruct((b, t, cfg.linear_num_key_heads, cfg.linear_key_head_dim), jnp.float32)
    values = jax.ShapeDtypeStruct((b, t, cfg.linear_num_value_heads, cfg.linear_value_head_dim), jnp.float32)
    gates = jax.ShapeDtypeStruct((b, t, cfg.linear_num_value_heads), jnp.float32)
    runs = jax.ShapeDtypeStruct((b, t), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda *x: delta_rule(*x, chunk)[0])(keys, keys, values, gates, gates, runs).jaxpr
    assert products(jaxpr) / (b * t) == flops.delta_chunked(cfg) / 3  # three such layers


def test_the_35b_has_its_published_three_billion_active():
    cfg = config.qwen3_5_35b_a3b()
    active = (sum(flops.linear_parts(cfg).values()) + flops.head(cfg)) / 2
    assert 2.9e9 < active < 3.0e9
    # The same from the parameters themselves: all that a token uses but the embedding's table and the vectors.
    leaves = jax.tree_util.tree_flatten_with_path(transformer.specs(cfg))[0]
    vectors = sum(math.prod(s.shape) for _, s in leaves if not (len(s.axes) > 1 and s.axes[-2] != "layers") and "vocab" not in s.axes)
    assert active == transformer.parameter_counts(cfg)[1] - cfg.vocab_size * cfg.d_model - vectors


def test_training_is_three_forward_passes_and_what_is_computed_again(cfg):
    plain, length = dataclasses.replace(cfg, remat="none"), 64
    once, found = flops.forward(plain, length).forward, flops.training(plain, length)
    assert found.model == 3 * once and found.recomputed == 0 and found.parts == flops.forward(plain, length).parts
    assert found.exact == 3 * flops.delta_chunked(plain) and found.passes == found.model + 5 * found.exact
    again = flops.training(dataclasses.replace(cfg, remat="block"), length)
    assert again.model == found.model and again.recomputed == once - flops.head(cfg)
    assert flops.training(plain, length, head_again=1.0).recomputed == flops.head(cfg)
    chunked = flops.training(dataclasses.replace(plain, attention_chunk=16), length)
    assert chunked.recomputed == found.parts["attention"]
    assert flops.training(plain, 2048).recomputed == flops.delta_chunked(plain)  # spans


def test_only_attention_grows_with_the_length():
    cfg = config.qwen3_5_35b_a3b()
    short, long = flops.training(cfg, 4096), flops.training(cfg, 131_072)
    assert long.model - short.model == 3 * 4 * 10 * 16 * 256 * (131_072 - 4096) / 2
    np.testing.assert_allclose(long.model / short.model, 2.609, atol=1e-3)
