"""The smallest faithful model: two blocks of one gated delta net and one attention layer, grouped heads in both, chunks of 8."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax.models import transformer
from a1jax.models.config import tiny

# Optimisation level 0: what is tested is the program, and it compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def cfg():
    return tiny(
        vocab_size=160, d_model=16, num_layers=4, full_attention_interval=2, num_heads=4, num_kv_heads=2, head_dim=8, rotary_fraction=0.5,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=4, num_experts=8,
        num_experts_active=2, expert_width=12, shared_expert_width=8, delta_chunk=8,
    )  # fmt: skip


@pytest.fixture(scope="session")
def weights(cfg):
    """Random parameters, also those that start constant, so that no test passes because a weight is 0 or 1. Decays from 1 to 30 tokens."""
    rng = np.random.default_rng(0)

    def draw(path, spec):
        std = spec.shape[-2] ** -0.5 if len(spec.shape) > 2 else 0.3  # matrices of all blocks; vectors and the embedding
        shift = -2.0 if path[-1].key == "A_log" else 0.0
        return jnp.asarray(shift + std * rng.standard_normal(spec.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, transformer.specs(cfg))


@pytest.fixture(scope="session")
def hidden(cfg):
    """Jitted (params, tokens, positions, segment_ids, cfg) -> hidden states; one compilation per shape and configuration."""
    return jit(lambda p, tokens, positions, segments, cfg: transformer.apply(p, tokens, positions, segments, cfg)[0], static_argnums=4)


def rows_of(lengths: list[list[int]], length: int) -> tuple[jax.Array, jax.Array]:
    """Segment lengths of each row -> (positions, segment_ids), int32 [B, length]; what is left over is padding."""
    positions, segments = np.zeros((2, len(lengths), length), np.int32)
    for b, row in enumerate(lengths):
        start = 0
        for i, n in enumerate(row):
            positions[b, start : start + n], segments[b, start : start + n] = np.arange(n), i + 1
            start += n
    return jnp.asarray(positions), jnp.asarray(segments)


@pytest.fixture(scope="session")
def rows():
    return rows_of


class Reference:
    """transformers' Qwen3.5-MoE text model in float32 on the CPU, its own code throughout (no fused kernels)."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the two packages' own modules, while they are imported
            import torch
            import transformers
            from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self.torch, self.transformers, self.modeling = torch, transformers, modeling

    def model(self, seed: int, **sizes):
        """A model with every parameter random, also those that start constant, so that no test passes because a weight is 0 or 1."""
        config = self.transformers.Qwen3_5MoeTextConfig(**sizes)
        model = self.modeling.Qwen3_5MoeForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
        rng = np.random.default_rng(seed)
        with self.torch.no_grad():
            for name, weight in model.named_parameters():
                drawn = rng.standard_normal(tuple(weight.shape))
                if name.endswith("A_log"):
                    drawn = 0.7 * drawn - 1.5  # memories of one to thirty tokens
                elif weight.ndim == 1:
                    drawn = 0.4 * drawn + (1.0 if name.endswith("linear_attn.norm.weight") else 0.0)
                elif name.endswith("mlp.gate.weight"):
                    drawn = 2.0 * drawn * weight.shape[-1] ** -0.5  # a router that decides: see the margins in test_parity
                elif name.endswith("conv1d.weight"):
                    drawn = 0.5 * drawn
                elif not name.endswith("embed_tokens.weight"):
                    drawn = drawn * weight.shape[-1] ** -0.5
                weight.copy_(self.torch.tensor(drawn))
        return model.float().eval()


@pytest.fixture(scope="session")
def reference():
    return Reference()
