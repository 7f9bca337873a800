"""The smallest faithful model: two blocks of one gated delta net and one attention layer, grouped heads in both, chunks of 8."""

import dataclasses
import functools
import json
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
def untied(cfg):
    """The same with an unembedding of its own and router losses that count."""
    return dataclasses.replace(cfg, load_balance_coef=0.3, z_loss_coef=0.1, tie_embeddings=False)


@pytest.fixture(scope="session")
def free(weights):
    """Parameters of ``untied``."""
    return {**weights, "lm_head": weights["embed_tokens"][::-1]}


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
            import safetensors.torch
            import torch
            import transformers
            from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self.torch, self.transformers, self.modeling = torch, transformers, modeling
        self.small_text = SMALL_TEXT
        self.save_file, self.load_file = safetensors.torch.save_file, safetensors.torch.load_file

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

    def tensors(self, folder):
        """Every tensor of a checkpoint folder, read by the safetensors library."""
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = self.load_file(file)
            assert not set(part) & set(found)
            found |= part
        return found

    def logits(self, folder, tokens, kind="Qwen3_5MoeForCausalLM"):
        """float32 logits of the checkpoint as transformers loads it; every tensor must find its place."""
        model, info = getattr(self.modeling, kind).from_pretrained(folder, dtype=self.torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        with self.torch.no_grad():
            return model.eval()(self.torch.tensor(tokens), use_cache=False).logits.numpy()


@pytest.fixture(scope="session")
def reference():
    return Reference()


SMALL_TEXT = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=8, shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"] * 2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
)  # fmt: skip
SMALL_VISION = dict(
    depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16, patch_size=2
)  # fmt: skip


@pytest.fixture(scope="session")
def published(reference, tmp_path_factory):
    """A checkpoint as published: multimodal names and config, fused experts, bfloat16 with some float32, vision tower and multi-token
    prediction in it, three shards with an index, tokenizer and template beside. Not to be written to."""
    torch, folder = reference.torch, tmp_path_factory.mktemp("published")
    config = reference.transformers.Qwen3_5MoeConfig(text_config=SMALL_TEXT, vision_config=SMALL_VISION)
    torch.manual_seed(0)
    model = reference.modeling.Qwen3_5MoeForConditionalGeneration(config)
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["architectures"] = ["Qwen3_5MoeForConditionalGeneration"]
    written["text_config"] |= {"attn_output_gate": True, "mtp_num_hidden_layers": 1, "mamba_ssm_dtype": "float32", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written))

    tensors = {name: weight.detach() + 0.1 * torch.randn(weight.shape) for name, weight in model.named_parameters()}
    wide = ("A_log", "linear_attn.norm.weight")
    tensors = {name: weight if name.endswith(wide) else weight.bfloat16() for name, weight in tensors.items()}
    tensors |= {f"mtp.layers.0.mlp.experts.{e}.{p}_proj.weight": torch.randn(8, 32).bfloat16() for e in range(8) for p in ("gate", "up")}
    tensors |= {"mtp.fc.weight": torch.randn(32, 64).bfloat16(), "mtp.norm.weight": torch.randn(32)}
    names, places = list(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::3]}
        reference.save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'{{"this is": "{name}"}}')
    (folder / "README.md").write_text("not part of the model")
    return folder
