"""The model's configuration: every size, every switch, and the configurations that have a name."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp

from a1jax.config import ConfigError

CHOICES = {
    "remat": ("none", "block", "layer"),
    "moe": ("dense", "ragged", "blocked", "grouped"),
    "attention": ("auto", "chunked", "splash", "flash", "flash_triton"),
    "conv_init": ("normal", "uniform"),
    "decay_init": ("reference", "spread"),
    "compute_dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}
LAYER_TYPES = ("linear_attention", "full_attention")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes default to Qwen3.5-35B-A3B (config.json of the HF release). Raises ConfigError when sizes do not fit together."""

    vocab_size: int = 248_320  # ids; rows of the embedding and of the unembedding
    d_model: int = 2048  # width of the residual stream
    num_layers: int = 40  # layers, each a mixer (gated delta net or full attention) and a mixture of experts
    full_attention_interval: int = 4  # every n-th layer is full attention, the others are gated delta nets; 1: attention only
    layer_types: tuple[str, ...] = ()  # "linear_attention" or "full_attention" per layer, any pattern; (): by full_attention_interval
    num_heads: int = 16  # query heads of full attention
    num_kv_heads: int = 2  # key/value heads; divides num_heads; the cache grows with it
    head_dim: int = 256  # width of one attention head
    rotary_fraction: float = 0.25  # leading part of the head that rotates with the position; the rest is position-free
    rope_theta: float = 1e7  # longest wavelength of the rotation, in positions / (2 pi)
    linear_num_key_heads: int = 16  # query and key heads of the gated delta net
    linear_num_value_heads: int = 32  # value heads, one recurrent state each; a multiple of the key heads
    linear_key_head_dim: int = 128  # rows of one recurrent state
    linear_value_head_dim: int = 128  # columns of one recurrent state
    conv_width: int = 4  # taps of the causal convolution before the delta rule: the token itself and width - 1 before it
    num_experts: int = 256  # routed experts per layer; a multiple of expert x fsdp x tensor of the mesh
    num_experts_active: int = 8  # routed experts per token
    expert_width: int = 512  # hidden width of one routed expert
    shared_expert_width: int = 512  # hidden width of the expert every token uses, behind a sigmoid gate
    norm_eps: float = 1e-6  # added to the mean square before the root
    tie_embeddings: bool = False  # True: the embedding is also the unembedding, no lm_head
    scale_embeddings: bool = False  # True: token embeddings times sqrt(d_model), for tied tables drawn with std 1/sqrt(d_model)
    load_balance_coef: float = 1e-3  # weight of the load-balance loss in aux["loss"]; balanced routing has a loss of num_experts_active
    z_loss_coef: float = 0.0  # weight of mean(logsumexp(router logits)^2) in aux["loss"]; holds the router logits small
    remat: str = "none"  # "block": keep only block inputs and compute each block again in the backward pass; "layer": inputs of every
    # mixer and mixture, eight times as many in the reference pattern, but only one is computed again at a time: long rows on one device
    delta_chunk: int = 64  # tokens per chunk of the delta rule, a power of two; 16 is best on CPU at short lengths
    attention: str = "auto"  # full attention: "chunked" by XLA, "splash" by the TPU kernel; "auto": splash on TPU, chunked elsewhere
    # ... and on one NVIDIA GPU "flash" by cuDNN's kernel, "flash_triton" by Pallas'
    attention_chunk: int = 0  # query rows per step of chunked attention, bounds scores to [B, H, chunk, S]; 0: all rows at once
    flash_runs: int = 64  # most runs per row that "flash" has room for; rows with more come back as nan
    moe: str = "ragged"  # "ragged": sort by expert, grouped matmul; on a CPU "dense", every expert on every token, below 16, else "blocked"
    # ... and "grouped": "ragged" by jax's kernels for Hopper GPUs, where XLA's ragged_dot multiplies every row with every expert
    expert_block: int = 64  # pairs of token and expert per block of moe "blocked": every block reads its expert's weights; 512 on a GPU
    compute_dtype: str = "bfloat16"  # of activations and matmuls; softmax, router, norms and recurrence stay float32
    param_dtype: str = "float32"  # of stored parameters and their gradients
    init_std: float = 0.02  # std of weight matrices and of the embedding; 0: 1/sqrt(fan in), which small models need
    conv_init: str = "normal"  # taps: "normal" with init_std (0.02 when that is 0), as the reference; "uniform" on (-0.5, 0.5)
    decay_init: str = "reference"  # A uniform on (0.01, 16), dt bias 1; "spread": A from 0.002 to 0.2, dt bias 0: long memories
    q_norm_scale: float = 1.0  # initial scale of normalised queries; 1.5 sharpens attention of small models from the start
    scale_output_init: bool = False  # True: matrices that write to the residual stream start smaller by sqrt(2 L)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "attention_chunk" and value < 1:
                raise ConfigError(f"ModelConfig.{field.name} is {value}: give a number of at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"ModelConfig.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise ConfigError(f"ModelConfig.layer_types has {kind!r}: choose from {', '.join(LAYER_TYPES)}")
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ConfigError(
                f"ModelConfig.layer_types has {len(self.layer_types)} entries: give one for each of num_layers = {self.num_layers}"
            )
        for whole, part in (("num_heads", "num_kv_heads"), ("linear_num_value_heads", "linear_num_key_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(f"ModelConfig.{whole} is {getattr(self, whole)}: make it a multiple of {part} = {getattr(self, part)}")
        if self.num_experts_active > self.num_experts:
            raise ConfigError(f"ModelConfig.num_experts_active is {self.num_experts_active}: at most num_experts = {self.num_experts}")
        if self.delta_chunk & (self.delta_chunk - 1):
            raise ConfigError(f"ModelConfig.delta_chunk is {self.delta_chunk}: make it a power of two")
        if self.attention_chunk < 0:
            raise ConfigError(f"ModelConfig.attention_chunk is {self.attention_chunk}: give 0 (all rows at once) or a number of rows")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_dim % 2:
            width = f"rotary width {self.rotary_dim} of head_dim {self.head_dim}"
            raise ConfigError(f"ModelConfig.rotary_fraction is {self.rotary_fraction}: {width} must be even and above 0")

    @property
    def block_layers(self) -> int:
        """Layers per block: the shortest pattern of layer types that, repeated, gives the whole model. Blocks are scanned over."""
        kinds = [self.is_full_attention(i) for i in range(self.num_layers)]
        fits = (n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0)
        return next(n for n in fits if kinds == kinds[:n] * (self.num_layers // n))

    @property
    def num_blocks(self) -> int:
        return self.num_layers // self.block_layers

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    @property
    def linear_key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    def is_full_attention(self, layer: int) -> bool:
        if self.layer_types:
            return self.layer_types[layer] == "full_attention"
        return (layer + 1) % self.full_attention_interval == 0


def qwen3_5_35b_a3b(**changes) -> ModelConfig:
    """Qwen3.5-35B-A3B, text part: the base model of Agents-A1."""
    return dataclasses.replace(ModelConfig(remat="block", attention_chunk=512), **changes)


def _small(**changes) -> ModelConfig:
    """The faithful layers with the initialisation and chunk that let a small model learn in minutes on a CPU."""
    return dataclasses.replace(
        ModelConfig(
            vocab_size=768,
            d_model=64,
            num_layers=2,
            full_attention_interval=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            rope_theta=1e4,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            num_experts=8,
            num_experts_active=2,
            expert_width=64,
            shared_expert_width=64,
            tie_embeddings=True,
            scale_embeddings=True,
            load_balance_coef=1e-2,
            delta_chunk=16,
            moe="dense",
            compute_dtype="float32",
            init_std=0.0,
            conv_init="uniform",
            decay_init="spread",
            q_norm_scale=1.5,
            scale_output_init=True,
        ),  # fmt: skip
        **changes,
    )


def tiny(**changes) -> ModelConfig:
    """One gated delta net and one attention layer at width 64: learns the built-in domains in minutes on one core."""
    return _small(**changes)


NANO_WIDTHS = (16, 32, 48, 80, 128)
"""Of the members that ``nano`` makes: from the first to the last 31 times the active parameters, 59 times without the embedding."""


def nano(width: int, **changes) -> ModelConfig:
    """``tiny`` at another width, a multiple of 16: the same two layers, heads and experts, everything inside as wide as the stream.

    At 608 ids, parameters used by a token with the embedding and without: width 16: 17,548 and 7,820; 32: 49,428 and 29,972; 48: 95,644
    and 66,460; 80: 231,084 and 182,444; 128: 541,764 and 463,940.
    """
    sizes = {"d_model": width, "head_dim": width // 2, "linear_key_head_dim": width // 2, "linear_value_head_dim": width // 2,
             "expert_width": width, "shared_expert_width": width, "vocab_size": 608}  # fmt: skip
    return _small(**{**sizes, **changes})


def tiny_deep(**changes) -> ModelConfig:
    """The reference's pattern of three gated delta nets and one attention layer, at width 64."""
    return _small(**{"num_layers": 4, "full_attention_interval": 4, **changes})


def small(**changes) -> ModelConfig:
    """Width 128, four layers, twice the heads: for the question whether size or training length sets the horizon."""
    sizes = {"d_model": 128, "num_layers": 4, "num_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "expert_width": 128,
             "shared_expert_width": 128}  # fmt: skip
    return _small(**{**sizes, **changes})


def medium(**changes) -> ModelConfig:
    """Width 256, eight layers in the reference's pattern, grouped heads and 16 experts: the largest that trains on a CPU in hours."""
    sizes = {"d_model": 256, "num_layers": 8, "full_attention_interval": 4, "num_heads": 8, "linear_num_key_heads": 4,
             "linear_num_value_heads": 8, "num_experts": 16, "expert_width": 256, "shared_expert_width": 256, "moe": "blocked"}  # fmt: skip
    return _small(**{**sizes, **changes})


def one_billion(**changes) -> ModelConfig:
    """The reference's layers and pattern at width 1,024: 995,218,304 parameters, 290,575,232 of them used by a token.

    For one GPU: heads of 256 and states of 128 x 128 as in the 35B, 32 experts of its width, 4 a token, a table of 32,768 ids.
    """
    sizes = {"vocab_size": 32_768, "d_model": 1024, "num_layers": 16, "num_heads": 8, "linear_num_key_heads": 8,
             "linear_num_value_heads": 16, "num_experts": 32, "num_experts_active": 4, "tie_embeddings": True, "remat": "block",
             "attention_chunk": 512}  # fmt: skip
    return dataclasses.replace(ModelConfig(), **{**sizes, **changes})


NAMED = {
    "qwen3_5_35b_a3b": qwen3_5_35b_a3b,
    "one_billion": one_billion,
    **{f"nano_{width}": functools.partial(nano, width) for width in NANO_WIDTHS},
    "tiny": tiny,
    "tiny_deep": tiny_deep,
    "small": small,
    "medium": medium,
}
