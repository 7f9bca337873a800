"""config.json of a Hugging Face checkpoint <-> ModelConfig. What this model would compute differently is refused, not ignored."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

from a1jax.config import ConfigError
from a1jax.models.config import ModelConfig

LOG = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]

SIZES = {  # ours: theirs; the defaults of the two are the same
    "vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads", "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim", "conv_width": "linear_conv_kernel_dim", "num_experts": "num_experts",
    "num_experts_active": "num_experts_per_tok", "expert_width": "moe_intermediate_size",
    "shared_expert_width": "shared_expert_intermediate_size",
}  # fmt: skip
NUMBERS = {"norm_eps": "rms_norm_eps", "load_balance_coef": "router_aux_loss_coef", "init_std": "initializer_range"}
ONLY = {  # the values that this model computes; a missing key means the first
    "hidden_act": ("silu", "swish"), "attention_bias": (False, None), "attention_dropout": (0, None), "attn_output_gate": (True, None),
    "output_gate_type": ("swish", "silu", None), "norm_topk_prob": (True, None), "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None), "use_sliding_window": (False, None), "sliding_window": (None,), "rope_interleaved": (False, None),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "router_jitter_noise": (0, None), "mlp_bias": (False, None),
}  # fmt: skip
ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}  # m: equal for text
READ = {"layer_types", "full_attention_interval", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
        "tie_word_embeddings", "model_type", "architectures", "text_config", "dtype", "torch_dtype",
        "quantization_config", "compression_config"}  # fmt: skip
WITHOUT_EFFECT = {"bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id", "vision_start_token_id",
                  "vision_end_token_id", "vision_config", "transformers_version", "use_cache", "max_position_embeddings",
                  "output_router_logits", "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings",
                  "language_model_only", "intermediate_size", "_name_or_path"}  # fmt: skip
ROOTS = ("qwen3_5_moe", "qwen3_5_moe_text")
HEADS = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
TYPES = {  # of the keys that are looked into; null is as good as missing, but for text_config
    "text_config": (dict, "an object"), "rope_parameters": (dict, "an object"), "rope_scaling": (dict, "an object"),
    "architectures": (list, "a list of names"), "layer_types": (list, "a list of names"), "tie_word_embeddings": (bool, "true or false"),
}  # fmt: skip
MADE_TO_TRAIN: dict[str, Any] = {"remat": "block", "attention_chunk": 512}  # see read_config
TRAINING = ("load_balance_coef", "z_loss_coef", "remat", "delta_chunk", "attention_chunk", "moe", "compute_dtype", "param_dtype",
            "init_std", "conv_init", "decay_init", "q_norm_scale", "scale_output_init")  # fmt: skip


def read_config(path: PathLike) -> ModelConfig:
    """The model that a checkpoint folder's config.json describes, in the precision it names (float32 where it names none of ours).

    What no checkpoint says is set for training at the published sizes, as models.config.qwen3_5_35b_a3b does: remat="block" and
    attention_chunk=512, without which the scores of one layer at 32K tokens are [B, H, T, T]. Both change speed and memory alone.
    Raises ConfigError, one line, where there is none, or naming key and value of what this model would compute differently.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.parent.is_dir():
        raise ConfigError(f"{path}: not a folder")
    if not file.is_file():
        raise ConfigError(f"{path}: no config.json in it")
    try:
        root = json.loads(file.read_text())
    except ValueError:
        root = None
    if not isinstance(root, dict):
        raise ConfigError(f"{file}: not a JSON object; fetch it again")
    _check_types(file, root)
    text = {**root, **root.get("text_config", {})}
    _check_types(file, text)
    _refuse(file, root, text)
    fields: dict[str, Any] = {ours: _number(file, text, theirs, int) for ours, theirs in SIZES.items() if theirs in text}
    fields |= {ours: float(_number(file, text, theirs, (int, float))) for ours, theirs in NUMBERS.items() if theirs in text}
    fields |= _rope(file, text) | _pattern(file, text, fields.get("num_layers", ModelConfig.num_layers))
    dtype = text.get("dtype") or text.get("torch_dtype")
    dtype = dtype if dtype in ("float32", "bfloat16") else "float32"
    try:
        tied = bool(text.get("tie_word_embeddings", False))
        return ModelConfig(**fields, **MADE_TO_TRAIN, tie_embeddings=tied, param_dtype=dtype, compute_dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _check_types(file: pathlib.Path, part: dict) -> None:
    """Raises ConfigError where a key that is looked into, not only compared, holds another kind of value than it may."""
    for key, (kinds, what) in TYPES.items():
        value = part.get(key)
        absent = value is None and (key != "text_config" or key not in part)
        wrong = not isinstance(value, kinds) or (kinds is list and not all(isinstance(item, str) for item in value))
        if wrong and not absent:
            raise ConfigError(f"{file}: {key} is {value!r}, not {what}; fetch the file again or correct it")


def _number(file: pathlib.Path, text: dict, key: str, kind: type | tuple) -> Any:
    if not isinstance(text[key], kind) or isinstance(text[key], bool):
        raise ConfigError(f"{file}: {key} is {text[key]!r}, not a number")
    return text[key]


def _refuse(file: pathlib.Path, root: dict, text: dict) -> None:
    """Raises ConfigError for the first key whose value means another computation; names in the log the keys nobody here knows."""
    if root.get("model_type") not in ROOTS or text.get("model_type") not in ROOTS:
        kind = root.get("model_type") if root.get("model_type") not in ROOTS else text.get("model_type")
        raise ConfigError(f"{file}: model_type is {kind!r}; this model reads {', '.join(ROOTS)}")
    for name in root.get("architectures") or ():
        if name not in HEADS:
            raise ConfigError(f"{file}: architectures has {name!r}; this model reads {', '.join(HEADS)}")
    for key in ("quantization_config", "compression_config"):
        if text.get(key):
            method = text[key].get("quant_method", "") if isinstance(text[key], dict) else text[key]
            raise ConfigError(f"{file}: {key} ({method}): quantised weights are not read; use the bf16 or float32 checkpoint")
    for key, allowed in ONLY.items():
        if text.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{file}: {key} is {text[key]!r}; this model computes {key} = {allowed[0]!r} only")
    inner, outer = (part.get("tie_word_embeddings") for part in (root.get("text_config", root), root))
    if None not in (inner, outer) and bool(inner) != bool(outer):
        raise ConfigError(f"{file}: tie_word_embeddings is {outer!r} but {inner!r} in text_config; make them equal")
    known = {*SIZES.values(), *NUMBERS.values(), *ONLY, *READ, *WITHOUT_EFFECT}
    unknown = sorted(key for key in text if key not in known)
    if unknown:
        LOG.warning("%s: nothing is known of %s; the model is computed as if they were not there", file, ", ".join(unknown))


def _rope(file: pathlib.Path, text: dict) -> dict[str, float]:
    """rope_theta and rotary_fraction, from rope_parameters (or its old name rope_scaling) or from the top level."""
    outer = {key: text[key] for key in ("rope_theta", "partial_rotary_factor") if key in text}
    rope = {**outer, **(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ConfigError(f"{file}: rope_type is {kind!r}; this model computes rope_type = 'default' only")
    other = {key: value for key, value in rope.items() if key not in ROPE}
    if other:
        raise ConfigError(
            f"{file}: rope_parameters has {next(iter(other))} = {next(iter(other.values()))!r}, which this model does not compute"
        )
    rope = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25, **rope}  # the reference's defaults
    names = {"rope_theta": "rope_theta", "rotary_fraction": "partial_rotary_factor"}
    return {ours: float(_number(file, rope, theirs, (int, float))) for ours, theirs in names.items()}


def _pattern(file: pathlib.Path, text: dict, layers: int) -> dict[str, Any]:
    """The interval where the layers follow one, else every layer's type. layer_types goes before full_attention_interval, as there."""
    interval = 4 if text.get("full_attention_interval") is None else _number(file, text, "full_attention_interval", int)
    kinds = text.get("layer_types")
    if kinds is None:
        return {"full_attention_interval": interval}
    if len(kinds) == layers:  # before as many lists are made
        for n in (max(1, interval), *range(1, layers + 1)):
            if kinds == interval_types(layers, n):
                return {"full_attention_interval": n}
    return {"layer_types": tuple(kinds)}


def interval_types(layers: int, interval: int) -> list[str]:
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]


def text_config(cfg: ModelConfig) -> dict[str, Any]:
    """config.json of the text model alone, as transformers' Qwen3_5MoeForCausalLM reads it. dtype: that of the matrices.

    Raises ConfigError where their model has no such thing.
    """
    if cfg.scale_embeddings:
        raise ConfigError("scale_embeddings: the Hugging Face model does not scale embeddings")
    kinds = ["full_attention" if cfg.is_full_attention(i) else "linear_attention" for i in range(cfg.num_layers)]
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "dtype": cfg.param_dtype,
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "rms_norm_eps": cfg.norm_eps,
        "router_aux_loss_coef": cfg.load_balance_coef,
        "initializer_range": cfg.init_std or 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta, "partial_rotary_factor": cfg.rotary_fraction},
        "layer_types": kinds,
        "full_attention_interval": cfg.full_attention_interval,
        "tie_word_embeddings": cfg.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 262_144,  # of the published model; the rotation itself has no end
    }


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """'field: one -> other' for every field in which two configurations are different models; fields of training and speed may differ."""
    lines = []
    for field in dataclasses.fields(ModelConfig):
        if field.name in TRAINING or field.name in ("full_attention_interval", "layer_types"):
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a != b:
            lines.append(f"{field.name}: {a!r} -> {b!r}")
    kinds = [[cfg.is_full_attention(i) for i in range(cfg.num_layers)] for cfg in (one, other)]
    if len(kinds[0]) == len(kinds[1]) and kinds[0] != kinds[1]:
        shown = ([i for i, full in enumerate(side) if full] for side in kinds)
        lines.append("full attention in layers: " + " -> ".join(map(str, shown)))
    return lines
