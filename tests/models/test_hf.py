"""Checkpoints in and out: bitwise round trips, what is kept and what is named, precision, shards, meshes, memory."""

import dataclasses
import json
import logging
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from a1jax import checkpoint, params, sharding
from a1jax.config import ConfigError
from a1jax.models import hf, hf_files, hf_names, transformer
from a1jax.models.config import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))


def same(torch, one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def our_logits(weights, cfg):
    cfg = dataclasses.replace(cfg, compute_dtype="float32", moe="dense")
    positions = jnp.tile(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), (2, 1))
    run = jax.jit(transformer.logits, static_argnums=4, compiler_options={"xla_backend_optimization_level": 0})
    return run(weights, jnp.asarray(TOKENS, jnp.int32), positions, jnp.ones_like(positions), cfg)


def equal_trees(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)) or (a.dtype == b.dtype or pytest.fail()), one, other
    )


def test_a_published_checkpoint_comes_back_bit_for_bit(reference, published, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="a1jax"):
        weights, cfg = hf.load(published)
    (record,) = caplog.records  # one line that names all that is left out
    for name in (
        "mtp.layers.0.mlp.experts.{0-7}.gate_proj.weight (8)",
        "mtp.fc.weight",
        "model.visual.blocks.{0-1}.attn.qkv.weight (2)",
        "model.visual.pos_embed.weight",
    ):
        assert name in record.getMessage()
    assert cfg.param_dtype == cfg.compute_dtype == "bfloat16" and cfg.num_blocks == 2 and cfg.full_attention_interval == 2
    layer = weights["blocks"]["0"]
    kinds = {str(layer[a][b].dtype) for a, b in (("linear_attn", "A_log"), ("linear_attn", "norm"))}
    assert kinds == {"float32"} and layer["linear_attn"]["dt_bias"].dtype == layer["mlp"]["gate"].dtype == jnp.bfloat16

    names = hf.save(tmp_path / "out", weights, cfg, source=published, shard_bytes=30_000)
    before, after = reference.tensors(published), reference.tensors(tmp_path / "out")
    same(reference.torch, before, after)
    assert set(names) == set(before) and any(name.startswith("model.visual.") for name in names)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()

    index = json.loads((tmp_path / "out" / hf_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 4 and {file.name for file in shards} == set(index["weight_map"].values())
    assert all(sum(tensor.nbytes for tensor in reference.load_file(file).values()) <= 30_000 for file in shards)

    wanted = reference.logits(published, TOKENS)
    np.testing.assert_array_equal(wanted, reference.logits(tmp_path / "out", TOKENS))
    multimodal = reference.logits(tmp_path / "out", TOKENS, "Qwen3_5MoeForConditionalGeneration")
    np.testing.assert_allclose(multimodal, wanted, atol=1e-5)
    np.testing.assert_allclose(our_logits(hf.load(published, dtype="float32")[0], cfg), wanted, atol=2e-4)


def test_trained_weights_take_the_types_of_the_source(reference, published, tmp_path):
    weights, cfg = hf.load(published, dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(weights)} == {"float32"} and cfg.param_dtype == "float32"
    hf.save(tmp_path / "same", weights, cfg, source=published)
    same(reference.torch, reference.tensors(published), reference.tensors(tmp_path / "same"))
    trained = jax.tree.map(lambda leaf: leaf * 1.25, weights)
    hf.save(tmp_path / "trained", trained, cfg, source=published)
    before, after = reference.tensors(published), reference.tensors(tmp_path / "trained")
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: tensor.dtype for name, tensor in after.items()}
    for name, tensor in before.items():
        factor = 1.0 if name.startswith(hf_names.SKIPPED) else 1.25
        assert reference.torch.equal((tensor.float() * factor).to(tensor.dtype), after[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_text_alone_without_a_source(reference, published, tmp_path, dtype):
    """The text model of our own layout: transformers loads it, and loading it again gives every leaf back."""
    weights, cfg = hf.load(published, dtype=dtype)
    assert weights["blocks"]["0"]["linear_attn"]["A_log"].dtype == jnp.float32  # whatever the matrices are
    names = hf.save(tmp_path / "out", weights, cfg, beside=published)
    assert "model.layers.3.mlp.experts.gate_up_proj" in names and not [name for name in names if "visual" in name or "mtp" in name]
    again, cfg_again = hf.load(tmp_path / "out")
    assert cfg_again == cfg and (tmp_path / "out" / "tokenizer.json").exists()
    equal_trees(again, weights)
    # Equal weights; torch's own sums depend on where its threads find them in memory.
    np.testing.assert_allclose(reference.logits(tmp_path / "out", TOKENS), reference.logits(published, TOKENS), rtol=1e-4, atol=1e-5)
    config = reference.transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.get_text_config().layer_types == ["linear_attention", "full_attention"] * 2 and str(config.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_experts_one_by_one_as_transformers_writes_them(reference, tmp_path, kind):
    """save_pretrained's layout, one unsharded file, tied embeddings; all three types come back bit for bit."""
    model = reference.model(1, **{**reference.small_text, "tie_word_embeddings": True})
    model.to(getattr(reference.torch, kind)).save_pretrained(tmp_path / "in")
    before = reference.tensors(tmp_path / "in")
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in before and "lm_head.weight" not in before
    weights, cfg = hf.load(tmp_path / "in")
    assert cfg.tie_embeddings and cfg.param_dtype == ("bfloat16" if kind == "bfloat16" else "float32")
    hf.save(tmp_path / "out", weights, cfg, source=tmp_path / "in")
    same(reference.torch, before, reference.tensors(tmp_path / "out"))


def test_a_scaled_embedding_is_written_as_two_tables(reference, tmp_path):
    cfg = tiny(vocab_size=64, d_model=32, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, expert_width=8, shared_expert_width=8)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), params.abstract(transformer.specs(cfg)))
    hf.save(tmp_path / "out", weights, cfg)
    np.testing.assert_allclose(reference.logits(tmp_path / "out", TOKENS), our_logits(weights, cfg), atol=2e-4)


def test_bfloat16_decays_are_read_into_float32_specs(published, tmp_path):
    """Also through our own checkpoints: what a run starts from."""
    weights, cfg = hf.load(published)
    a_log = weights["blocks"]["0"]["linear_attn"]["A_log"].astype(jnp.bfloat16)
    weights["blocks"]["0"]["linear_attn"]["A_log"] = a_log
    checkpoint.save_params(tmp_path / "params", weights)
    assert checkpoint.stored_params(tmp_path / "params")["blocks"]["0"]["linear_attn"]["A_log"].dtype == jnp.bfloat16
    got = checkpoint.load_params(tmp_path / "params", params.abstract(transformer.specs(cfg)))["blocks"]["0"]["linear_attn"]["A_log"]
    assert got.dtype == jnp.float32 and cfg.param_dtype == "bfloat16"
    np.testing.assert_array_equal(got, a_log.astype(jnp.float32))


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "fsdp": 2}])
def test_a_mesh_gets_its_slices_read_once_and_gives_them_back(reference, published, tmp_path, monkeypatch, shape):
    plain, cfg = hf.load(published)
    mesh = sharding.make_mesh(shape)
    read = []
    rows = hf_files.Stored.rows

    def counted(self, begin, end):
        read.append((self.name, (end - begin) * self.size // self.shape[0]))
        return rows(self, begin, end)

    monkeypatch.setattr(hf_files.Stored, "rows", counted)
    weights, _ = hf.load(published, mesh)
    wanted = params.shardings(transformer.specs(cfg), mesh)
    jax.tree.map(lambda leaf, place: leaf.sharding == place or pytest.fail(f"{leaf.sharding} {place}"), weights, wanted)
    equal_trees(weights, plain)
    assert dict(read) == {
        piece.name: hf.open_checkpoint(published).stored[piece.name].size for piece in hf_names.pieces(cfg, "model.language_model.")
    }
    assert len(read) == len(dict(read))  # every tensor once, whoever needs it
    hf.save(tmp_path / "out", weights, cfg, source=published)
    same(reference.torch, reference.tensors(published), reference.tensors(tmp_path / "out"))


def test_only_rows_that_a_device_holds_are_read(published, monkeypatch):
    """A process whose devices hold experts 2 and 3 and one half of the width reads these experts alone."""
    found = hf.open_checkpoint(published)
    piece = next(piece for piece in found.pieces if piece.name.endswith("layers.3.mlp.experts.down_proj"))
    chunks = []
    rows = hf_files.Stored.rows

    def counted(self, begin, end):
        chunks.append((begin, end))
        return rows(self, begin, end)

    monkeypatch.setattr(hf_files.Stored, "rows", counted)
    box = ((0, 2), (2, 4), (0, 8), (16, 32))  # blocks, experts, in, out
    buffer = np.zeros([end - begin for begin, end in box], ml_dtypes.bfloat16)
    hf._read_piece(piece, found.stored[piece.name], {box: buffer})
    assert chunks == [(2, 4)]
    whole = np.asarray(hf.load(published)[0]["blocks"]["1"]["mlp"]["experts"]["down_proj"])
    np.testing.assert_array_equal(buffer[1], whole[1, 2:4, :, 16:])
    assert not buffer[0].any()  # the other block's tensor is another piece


def test_reading_in_small_chunks_changes_nothing(published, monkeypatch):
    plain, _ = hf.load(published)
    monkeypatch.setattr(hf_files, "CHUNK", 100)
    monkeypatch.setattr(hf, "TURN_ROWS", 3)
    equal_trees(hf.load(published)[0], plain)


MEMORY = """
import pathlib, sys
import jax, numpy as np
from a1jax import sharding
from a1jax.models import hf

def peak():
    return int(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]) * 1024

if sys.argv[3] == "mesh":
    jax.config.update("jax_num_cpu_devices", 8)
mesh = sharding.make_mesh({"expert": 4, "tensor": 2}) if sys.argv[3] == "mesh" else None
jax.block_until_ready(jax.numpy.ones(3)[1:] + 1)
before = peak()
params, cfg = hf.load(sys.argv[1], mesh)
loaded = peak() - before
hf.save(sys.argv[2], params, cfg, source=sys.argv[1], shard_bytes=4e7)
held = sum(part.data.nbytes for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards)
print(loaded, peak() - before, held)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """240 MB of zeros in bfloat16, shards of 40 MB."""
    sizes = {"d_model": 512, "num_layers": 4, "full_attention_interval": 2, "num_experts": 32, "expert_width": 512, "vocab_size": 16_384}
    cfg = tiny(**sizes, param_dtype="bfloat16", scale_embeddings=False, tie_embeddings=False)
    weights = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), params.abstract(transformer.specs(cfg)))
    folder = tmp_path_factory.mktemp("large") / "model"
    hf.save(folder, weights, cfg, shard_bytes=4e7)
    return folder


@pytest.mark.parametrize("place", ["alone", "mesh"])
def test_memory_is_the_parameters_and_one_shard(large, tmp_path, place):
    """Peak resident memory of a process that loads and saves, over what it had before."""
    line = [sys.executable, "-c", MEMORY, str(large), str(tmp_path / "out"), place]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    loaded, saved, held = map(int, done.stdout.split())
    print(f"load {loaded / 1e6:.0f} MB, save {saved / 1e6:.0f} MB, parameters {held / 1e6:.0f} MB")
    shard, slack = 4e7, 3e7  # one chunk, and what malloc keeps
    assert held > 2e8 and len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    assert 0.9 * held < loaded <= held + shard + slack
    assert saved <= held + shard + slack


def test_what_goes_wrong_while_writing_leaves_nothing(published, tmp_path, monkeypatch):
    weights, cfg = hf.load(published)
    monkeypatch.setattr(hf_files.Stored, "raw", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf.save(tmp_path / "deep" / "out", weights, cfg, source=published)
    assert list(tmp_path.iterdir()) == []  # nor the parent that was made for it
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        hf.save(tmp_path / "full", weights, cfg)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.part").mkdir()  # of a process that was killed
    hf.save(tmp_path / "empty", weights, cfg)
    assert (tmp_path / "empty" / "config.json").exists() and not (tmp_path / ".empty.part").exists()


def test_an_empty_folder_stays_the_folder_it_is(published, tmp_path, monkeypatch):
    """The current folder, a mount point, the target of a link: written into, never replaced, and empty again when something goes wrong."""
    weights, cfg = hf.load(published)
    here = tmp_path / "here"
    (here / ".here.part").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "link").symlink_to(here)
    place = here.stat().st_ino
    monkeypatch.chdir(here)
    with monkeypatch.context() as failing:
        failing.setattr(hf_files.Stored, "raw", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hf.save("../link", weights, cfg, source=published)
    assert list(here.iterdir()) == []
    hf.save(".", weights, cfg)
    assert here.stat().st_ino == place and sorted(path.name for path in here.iterdir()) == [
        "config.json", "model-00001-of-00001.safetensors", hf_files.INDEX
    ]  # fmt: skip
    equal_trees(hf.load(tmp_path / "link")[0], weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]


def test_what_cannot_be_written_is_refused(published, tmp_path):
    weights, cfg = hf.load(published)
    with pytest.raises(ConfigError, match=r"num_experts_active: 2 -> 4.*full attention in layers: \[1, 3\] -> \[0, 1\]"):
        other = {"num_experts_active": 4, "layer_types": ("full_attention",) * 2 + ("linear_attention",) * 2}
        another = dataclasses.replace(cfg, **other)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), params.abstract(transformer.specs(another)))
        hf.save(tmp_path / "out", zeros, another, source=published)
    with pytest.raises(ConfigError, match=r"embed_tokens is \[64, 32\], wanted \[65, 32\].*norm is missing"):
        hf.save(tmp_path / "out", {k: v for k, v in weights.items() if k != "norm"}, dataclasses.replace(cfg, vocab_size=65))
    with pytest.raises(ConfigError, match=r"norm.weight is int32"):
        hf.save(tmp_path / "out", {**weights, "norm": weights["norm"].astype(jnp.int32)}, cfg)
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        hf.load(published, dtype="int8")
    assert list(tmp_path.iterdir()) == []
