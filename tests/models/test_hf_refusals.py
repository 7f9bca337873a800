"""What is wrong with a checkpoint folder is said in one line, all of it, before any weight is read; config.json in all its forms."""

import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest

from a1jax.config import ConfigError
from a1jax.models import hf, hf_config, hf_files, hf_names
from a1jax.models.config import ModelConfig, qwen3_5_35b_a3b

TEXT = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}
PREFIX = "model.language_model.layers"


def write(folder, tensors, shard_bytes=1 << 40):
    """Tensors (numpy) as a checkpoint's shards; what this writes is read by the safetensors library in test_hf."""
    names = {dtype: code for code, dtype in hf_files.DTYPES.items()} | {np.dtype(np.int32): "I32"}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    entries = []
    for name, tensor in tensors.items():
        code = "F8_E4M3" if tensor.dtype == np.uint8 else names[tensor.dtype]
        entries.append(hf_files.Entry(name, code, tensor.shape, tensor.nbytes, lambda tensor=tensor: [tensor.tobytes()]))
    hf_files.write_folder(folder, entries, shard_bytes)


def read(folder):
    found = {}
    for name, stored in hf_files.read_folder(folder).items():
        found[name] = np.frombuffer(b"".join(map(bytes, stored.raw())), hf_files.DTYPES[stored.dtype]).reshape(stored.shape)
    return found


@pytest.fixture()
def broken(published, tmp_path, monkeypatch):
    """A copy to break; reading a weight of it is a mistake in itself."""
    monkeypatch.setattr(hf_files.Stored, "rows", lambda self, begin, end: pytest.fail(f"read {self.name}"))
    return shutil.copytree(published, tmp_path / "broken")


def complaint(folder):
    with pytest.raises(ConfigError) as caught:
        hf.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value).replace(str(folder), "")


def test_all_wrong_tensors_are_listed_at_once(broken):
    tensors = read(broken)
    for name in (f"{PREFIX}.0.linear_attn.A_log", f"{PREFIX}.2.linear_attn.A_log", "lm_head.weight"):
        del tensors[name]
    tensors["model.language_model.layers.0.mlp.gate.bias"] = np.zeros(8, np.float32)
    tensors[f"{PREFIX}.1.self_attn.k_proj.weight"] = np.zeros((16, 33), np.float32)
    tensors[f"{PREFIX}.3.self_attn.k_proj.weight"] = np.zeros((16, 33), np.float32)
    tensors[f"{PREFIX}.3.mlp.gate.weight"] = np.zeros((8, 32), np.int32)
    write(broken, tensors, 20_000)
    text = complaint(broken)
    assert f"missing: {PREFIX}.0.linear_attn.A_log, {PREFIX}.2.linear_attn.A_log, lm_head.weight" in text
    assert f"unknown: {PREFIX}.0.mlp.gate.bias" in text
    assert f"[16, 33] where config.json asks for [16, 32]: {PREFIX}.1.self_attn.k_proj.weight, {PREFIX}.3.self_attn.k_proj.weight" in text
    assert f"of type I32, which is not read: {PREFIX}.3.mlp.gate.weight" in text


def test_names_are_grouped_and_none_is_lost():
    assert hf_names.grouped(["a.0.x", "a.1.x", "a.2.x", "b"]) == ["a.{0-2}.x (3)", "b"]
    assert hf_names.grouped([f"a.{i}.b.{j}.c" for i in range(2) for j in range(3, 6)]) == ["a.{0-1}.b.{3-5}.c (6)"]
    assert hf_names.grouped(["a.0.x", "a.2.x"]) == ["a.0.x", "a.2.x"]  # a range would say that 1 is there too
    assert hf_names.grouped(["a.7.x", "linear_fc1.weight"]) == ["a.7.x", "linear_fc1.weight"]


def test_quantised_weights_are_refused_with_the_reason(broken):
    tensors = read(broken)
    name = f"{PREFIX}.1.self_attn.q_proj.weight"
    write(broken, {**tensors, name: np.zeros((64, 32), np.uint8), f"{name}_scale_inv": np.ones((1, 1), np.float32)})
    text = complaint(broken)
    assert "quantised weights are not read" in text and "F8_E4M3" in text and f"{name}_scale_inv" in text
    config = json.loads((broken / "config.json").read_text())
    for place in (config, config["text_config"]):
        place["quantization_config"] = {"quant_method": "fp8"}
        (broken / "config.json").write_text(json.dumps(config))
        assert "quantization_config (fp8)" in complaint(broken)
        del place["quantization_config"]


def test_broken_folders(broken, tmp_path):
    shard = broken / "model-00002-of-00003.safetensors"
    index = broken / hf_files.INDEX
    whole, listing = shard.read_bytes(), json.loads(index.read_text())

    shard.write_bytes(whole[:-100])
    assert f"cut off ({len(whole) - 100} of {len(whole)} bytes)" in complaint(broken)
    shard.write_bytes(whole[:100])
    assert "cut off in its header" in complaint(broken)
    shard.write_bytes(b"<html>not found</html>")
    assert "not a safetensors file" in complaint(broken)
    shard.write_bytes((5).to_bytes(8, "little") + b"hello")
    assert "not a safetensors file" in complaint(broken)
    shard.unlink()
    assert f"names files that are not there: {shard.name}" in complaint(broken)
    shard.write_bytes(whole)

    moved = {**listing["weight_map"], "lm_head.weight": shard.name, "model.visual.no": shard.name}
    index.write_text(json.dumps({"weight_map": moved}))
    text = complaint(broken)
    assert f"lm_head.weight is not in {shard.name}" in text and f"model.visual.no is not in {shard.name}" in text
    del listing["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(listing))
    assert "lm_head.weight of model-0000" in complaint(broken)
    for text in ("[]", "{", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        assert "no index of shards" in complaint(broken)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "not there: ../elsewhere.safetensors" in complaint(broken)

    index.unlink()
    assert "neither model.safetensors.index.json nor model.safetensors in it" in complaint(broken)
    for text in (b"{", b"[]", b"[1]", b"null", b'"text"', b"\xff"):
        (broken / "config.json").write_bytes(text)
        assert "not a JSON object" in complaint(broken)
    (broken / "config.json").unlink()
    assert "no config.json" in complaint(broken)
    assert "not a folder" in complaint(broken / "nowhere")
    (tmp_path / "file").write_text("")
    assert "not a folder" in complaint(tmp_path / "file")


def config_of(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return hf.read_config(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_text"}}, "model_type is 'qwen3_5_text'"),
        ({"architectures": ["Qwen3_5MoeForSequenceClassification"]}, "architectures has 'Qwen3_5MoeForSequenceClassification'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters has full_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"compression_config": {}, "quantization_config": "int8"}, r"quantization_config \(int8\)"),
        ({"layer_types": ["linear_attention", "sliding_attention"], "num_hidden_layers": 2}, "has 'sliding_attention'"),
        ({"layer_types": ["linear_attention"], "num_hidden_layers": 2}, "layer_types has 1 entries"),
        ({"num_attention_heads": 3}, "num_heads is 3"),
        ({"hidden_size": "2048"}, "hidden_size is '2048', not a number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, not a number"),
        ({"architectures": 5}, "architectures is 5, not a list of names"),
        ({"architectures": [5]}, r"architectures is \[5\], not a list of names"),
        ({"architectures": "Qwen3_5MoeForCausalLM"}, "architectures is 'Qwen3_5MoeForCausalLM', not a list of names"),
        ({"layer_types": 5}, "layer_types is 5, not a list of names"),
        ({"layer_types": ["full_attention", {}], "num_hidden_layers": 2}, r"layer_types is \['full_attention', {}\], not a list of names"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x', not an object"),
        ({"rope_scaling": [["rope_theta", 1]]}, "rope_scaling is .*, not an object"),
        ({"full_attention_interval": "4"}, "full_attention_interval is '4', not a number"),
        ({"full_attention_interval": "4", "layer_types": ["full_attention"], "num_hidden_layers": 1}, "interval is '4', not a number"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"full_attention_interval": True}, "full_attention_interval is True, not a number"),
        ({"text_config": 5}, "text_config is 5, not an object"),
        ({"text_config": [["hidden_size", 64]]}, "text_config is .*, not an object"),
        ({"text_config": None}, "text_config is None, not an object"),
        ({"text_config": {"layer_types": 5}}, "layer_types is 5, not a list of names"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"model_type": "qwen3_5_moe", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, "tie_word_embeddings"),
    ],
)
def test_other_computations_are_refused_by_key_and_value(tmp_path, change, named):
    with pytest.raises(ConfigError, match=named) as caught:
        config_of(tmp_path, **{**TEXT, **change})
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_the_defaults_are_the_references(reference, tmp_path):
    written = reference.transformers.Qwen3_5MoeTextConfig().to_dict()
    cfg = config_of(tmp_path, **{key: value for key, value in written.items() if key != "dtype"})
    assert cfg == config_of(tmp_path, **TEXT)
    assert hf_config.differences(cfg, qwen3_5_35b_a3b()) == ["rope_theta: 10000.0 -> 10000000.0"]  # the release sets its own


def test_every_form_of_one_config_reads_the_same(tmp_path):
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    kinds = (["linear_attention"] * 2 + ["full_attention"]) * 2
    sizes = {"num_hidden_layers": 6, "hidden_size": 64}
    training = {"remat": "block", "attention_chunk": 512}  # as qwen3_5_35b_a3b: at 32K tokens one layer's scores are too many
    wanted = ModelConfig(num_layers=6, d_model=64, full_attention_interval=3, rotary_fraction=0.5, compute_dtype="float32", **training)
    forms = [
        {**TEXT, **sizes, "layer_types": kinds, "rope_parameters": rope},
        {**TEXT, **sizes, "full_attention_interval": 3, "rope_theta": 10_000_000, "partial_rotary_factor": 0.5, "rope_scaling": None},
        {**TEXT, **sizes, "layer_types": kinds, "full_attention_interval": 4, "rope_parameters": rope},  # layer_types goes before
        {"model_type": "qwen3_5_moe", "text_config": {**TEXT, **sizes, "layer_types": kinds, "rope_parameters": rope}},
        {"model_type": "qwen3_5_moe", "dtype": "float32", "tie_word_embeddings": False,
         "text_config": {**sizes, "model_type": "qwen3_5_moe_text", "layer_types": kinds, "rope_theta": 1e7,
                         "rope_parameters": {"partial_rotary_factor": 0.5}}},
    ]  # fmt: skip
    for form in forms:
        assert config_of(tmp_path, **form) == ModelConfig(**{**vars(wanted), "init_std": 0.02})
    assert config_of(tmp_path, **forms[0], torch_dtype="bfloat16").param_dtype == "bfloat16"
    irregular = config_of(tmp_path, **{**forms[0], "layer_types": kinds[::-1]})
    assert irregular.layer_types == tuple(kinds[::-1]) and irregular.block_layers == 3
    linear = config_of(tmp_path, **{**forms[0], "layer_types": ["linear_attention"] * 6})
    assert not any(linear.is_full_attention(i) for i in range(6))
    for cfg in (wanted, irregular, linear):
        again = config_of(tmp_path, **hf_config.text_config(cfg))
        assert hf_config.differences(again, cfg) == [] and again.load_balance_coef == cfg.load_balance_coef


def test_keys_nobody_knows_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="a1jax"):
        config_of(tmp_path, **TEXT, hash_layers=3, bos_token_id=1)
    assert "hash_layers" in caplog.text and "bos_token_id" not in caplog.text


def test_a_file_that_shrinks_while_it_is_read(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    stored = hf_files.read_folder(folder)["lm_head.weight"]
    with open(stored.file, "r+b") as file:
        file.truncate(stored.start + 10)
    with pytest.raises(ConfigError, match="ends inside lm_head.weight"):
        list(stored.rows(0, 64))


def test_wide_types_are_aligned_in_a_shard(tmp_path):
    tensors = {"a": np.ones(3, ml_dtypes.bfloat16), "b": np.arange(5, dtype=np.float32), "c": np.zeros((0, 4), np.float32)}
    write(tmp_path, tensors)
    stored = hf_files.read_folder(tmp_path)
    assert stored["b"].start % 8 == 0 and list(stored).index("b") < list(stored).index("a")
    assert all(np.array_equal(read(tmp_path)[name], tensor) for name, tensor in tensors.items())
