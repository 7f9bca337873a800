"""Parameters folders: import, export, a run that starts from one; through the command line as a user gives it."""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import checkpoint, config, main, params
from a1jax.config import ConfigError
from a1jax.models import hf, transformer
from a1jax.stages import folders, pipeline
from a1jax.stages.setting import Setting

SMOKE = "experiments/quickstart.py:smoke"


def equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


@pytest.fixture(scope="module", autouse=True)
def light():
    """Damaged files make the reader collect garbage: what earlier files of tests left behind is not looked through again each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(small_model):
    return dataclasses.replace(small_model, scale_embeddings=False, tie_embeddings=False)


@pytest.fixture(scope="module")
def release(model, tmp_path_factory):
    """A Hugging Face folder of that model, in bfloat16, and its parameters."""
    cfg = dataclasses.replace(model, param_dtype="bfloat16")
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), params.abstract(transformer.specs(cfg)))
    weights["blocks"]["0"]["linear_attn"]["A_log"] = weights["blocks"]["0"]["linear_attn"]["A_log"].astype(jnp.bfloat16)
    folder = tmp_path_factory.mktemp("release") / "hf"
    hf.save(folder, weights, cfg)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("template")
    return folder, weights


@pytest.fixture(scope="module")
def imported(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "base"
    assert main.main(["import", str(release[0]), str(folder)]) == 0
    return folder


def refused(capsys, *words):
    """The one line on stderr of a command that must fail with exit code 2."""
    assert main.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("a1jax: ")
    return lines[0]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_import_then_export_gives_the_same_files(release, imported, tmp_path, capsys):
    assert {path.name for path in imported.iterdir()} == {"params", "model.json", "tokenizer.json", "chat_template.jinja"}
    assert main.main(["export", str(imported), str(tmp_path / "plain")]) == 0
    total, active = transformer.parameter_counts(folders.read_model(imported)[0])
    tensors = len(json.loads((release[0] / "model.safetensors.index.json").read_text())["weight_map"])
    assert f"exported {total:,} parameters ({active:,} active), {tensors} tensors, 0." in capsys.readouterr().out
    assert files(tmp_path / "plain") == files(release[0])
    assert main.main(["export", str(imported), str(tmp_path / "sourced"), "--source", str(release[0])]) == 0
    assert files(tmp_path / "sourced") == files(release[0])


def test_import_converts_when_asked_and_names_what_it_skips(release, tmp_path, capsys):
    folder = tmp_path / "hf"
    cfg = hf.read_config(release[0])
    hf.save(folder, release[1], cfg)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"mtp.fc.weight": "extra.safetensors", "model.visual.blocks.0.norm1.bias": "extra.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    header = {
        name: {"dtype": "BF16", "shape": [2], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(list(index["weight_map"])[-2:])
    }
    text = json.dumps(header).encode()
    (folder / "extra.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"12345678")
    assert main.main(["import", str(folder), str(tmp_path / "base"), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("imported ") and "skipped 2 tensors (0.00 MB)" in out and "\n  mtp.fc.weight\n" in out
    cfg, facts = folders.read_model(tmp_path / "base")
    assert cfg.param_dtype == "float32" and facts["source"] == str(folder) and len(facts["skipped"]) == 2
    equal(folders.load(tmp_path / "base", params.abstract(transformer.specs(cfg))), jax.tree.map(lambda x: x.astype("float32"), release[1]))
    assert main.main(["export", str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    assert f"left out 2 tensors that are not the text model's, --source {folder} keeps them" in capsys.readouterr().out


def test_mistakes_are_one_line_and_write_nothing(release, imported, tmp_path, capsys):
    assert "not a folder" in refused(capsys, "import", tmp_path / "nowhere", tmp_path / "out")
    assert "no config.json" in refused(capsys, "import", tmp_path, tmp_path / "out")
    assert "not an empty folder" in refused(capsys, "import", release[0], imported)
    assert "not an empty folder" in refused(capsys, "export", imported, release[0])
    assert "no such folder" in refused(capsys, "export", tmp_path / "nowhere", tmp_path / "out")
    assert "no parameters in it" in refused(capsys, "export", release[0], tmp_path / "out")
    assert "no config.json" in refused(capsys, "export", imported, tmp_path / "out", "--source", tmp_path)
    assert "not a folder" in refused(capsys, "import", tmp_path / "nowhere", tmp_path / "a" / "b" / "c")
    assert "no config.json" in refused(capsys, "export", imported, tmp_path / "a" / "b" / "c", "--source", tmp_path)
    line = refused(capsys, "export", imported, tmp_path / "out", "--stage", "sft")
    assert "a parameters folder, it has no stages; leave out --stage sft" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_places_where_no_folder_can_be_made(release, imported, tmp_path, capsys, monkeypatch, command):
    source = release[0] if command == "import" else imported
    monkeypatch.setattr(checkpoint, "load_params", lambda *args: pytest.fail("weights were read before the destination was looked at"))
    (tmp_path / "file").write_text("mine")
    for place in ("/proc/foo", "/proc/foo/bar", tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        assert f"{place}: no folder can be made there" in refused(capsys, command, source, place)
    assert "exists and is not an empty folder" in refused(capsys, command, source, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_current_folder_may_be_empty_and_is_filled(release, imported, tmp_path, monkeypatch):
    for name, command, source in (("base", "import", release[0]), ("out", "export", imported)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert main.main([command, str(source), "."]) == 0
    assert files(tmp_path / "out") == files(release[0])
    equal(folders.load(tmp_path / "base", params.abstract(transformer.specs(folders.read_model(imported)[0]))), release[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone"])
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a slow machine's threads
def test_damaged_parameters_are_one_line(imported, tmp_path, capsys, name, damage):
    folder = shutil.copytree(imported, tmp_path / "in")
    file = folder / "params" / "params" / name
    text = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(text[:-20] if damage == "cut" else b"")
    line = refused(capsys, "export", folder, tmp_path / "out")
    assert f"{folder}/params/params: no readable parameters, a file in it is missing or damaged" in line
    with pytest.raises(ConfigError, match="missing or damaged"):
        checkpoint.stored_params(folder / "params")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_damaged_arrays_are_found_when_they_are_read(imported, tmp_path):
    """In a process of its own: threads that read the other arrays may complain after the one line."""
    folder = shutil.copytree(imported, tmp_path / "in")
    for file in (folder / "params").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if file.stat().st_size > 10_000 else file.read_bytes())
    line = [sys.executable, "-c", "from a1jax.main import main; raise SystemExit(main())", "export", str(folder), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("a1jax: ")]
    assert done.returncode == 2 and len(lines) == 1 and "missing or damaged" in lines[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_model_file_that_is_no_text(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "model.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="model.json: not the model"):
        folders.read_model(tmp_path)


@pytest.fixture()
def setting(model, domain_tokenizer, imported, tmp_path):
    return Setting(model, domain_tokenizer, ("search",), None, tmp_path / "run", None, 0, str(imported))


def test_a_stage_leaves_a_folder_that_can_be_exported_and_started_from(setting, release, imported, model, tmp_path, capsys):
    weights = setting.init_params()
    assert weights["blocks"]["0"]["linear_attn"]["A_log"].dtype == jnp.float32  # stored as bfloat16, no digit lost
    equal(weights, jax.tree.map(lambda x: x.astype("float32"), release[1]))
    setting.finish("sft", weights, {"steps": 3})
    assert main.main(["export", str(setting.workdir), str(tmp_path / "only")]) == 0  # the one stage there is
    equal(hf.load(tmp_path / "only")[0], weights)
    assert (tmp_path / "only" / "tokenizer.json").exists()  # of the folder that the run started from
    assert main.main(["export", str(setting.directory("sft")), str(tmp_path / "sourced"), "--source", str(release[0])]) == 0
    assert files(tmp_path / "sourced") == files(release[0])

    done = setting.directory("student") / "done.json"
    setting.finish("student", jax.tree.map(lambda x: 2 * x, weights), {"steps": 3})
    facts = done.read_text()
    done.unlink()  # killed before it
    assert folders.find(setting.workdir) == setting.directory("sft")
    assert "no finished stage 'student'" in refused(capsys, "export", setting.workdir, tmp_path / "out", "--stage", "student")
    done.write_text(facts)
    assert "2 finished stages; give --stage, one of sft, student" in refused(capsys, "export", setting.workdir, tmp_path / "out")
    line = refused(capsys, "export", setting.workdir, tmp_path / "out", "--stage", "teacher")
    assert "no finished stage 'teacher'; give --stage, one of sft, student" in line
    assert main.main(["export", str(setting.workdir), str(tmp_path / "student"), "--stage", "student"]) == 0
    equal(hf.load(tmp_path / "student")[0]["embed_tokens"], 2 * weights["embed_tokens"])
    next_run = dataclasses.replace(setting, initial=str(setting.directory("student")))
    equal(next_run.init_params()["norm"], 2 * weights["norm"])


def smoke(**changes):
    return dataclasses.replace(config.load(SMOKE), **changes)


def test_a_run_starts_from_the_folder(imported, model, domain_tokenizer, release, tmp_path, monkeypatch):
    """train_all's base model is what the folder holds; under a mesh as well."""
    started = []
    monkeypatch.setattr(pipeline.sft, "run", lambda cfg, params, *rest, **more: started.append(params) or 1 / 0)
    monkeypatch.setattr(pipeline, "open_tokenizer", lambda cfg, workdir: domain_tokenizer)
    for mesh in ({}, {"fsdp": 2}):
        cfg = smoke(model=dataclasses.replace(model, remat="block", delta_chunk=8), initial=str(imported))
        with pytest.raises(ZeroDivisionError):
            pipeline.run(dataclasses.replace(cfg, mesh=pipeline.MeshConfig(mesh)), tmp_path / str(len(started)))
        equal(started[-1], jax.tree.map(lambda x: x.astype("float32"), release[1]))
    assert len(started[-1]["embed_tokens"].sharding.device_set) == 2


def test_a_folder_of_another_model_is_refused(imported, model, tmp_path):
    other = smoke(model=dataclasses.replace(model, num_experts=4, norm_eps=1e-5, remat="block"), initial=str(imported))
    with pytest.raises(ConfigError, match=r"num_experts: 2 -> 4; norm_eps: 1e-06 -> 1e-05; set cfg.model") as caught:
        pipeline.open_setting(other, tmp_path, None)
    assert "remat" not in str(caught.value)
    for broken in ("{", '{"format": "a1jax.model/1", "model": {"layer_types": [], "width": 3}, "facts": {}}', '{"format": "other"}'):
        (tmp_path / "params").mkdir(exist_ok=True)
        (tmp_path / "model.json").write_text(broken)
        with pytest.raises(ConfigError, match="model.json: not the model"):
            folders.read_model(tmp_path)


def test_a_missing_folder_is_found_before_anything_is_written(tmp_path, capsys):
    line = refused(capsys, "run", SMOKE, "--workdir", tmp_path / "run", "--set", f"initial={tmp_path / 'nowhere'}")
    assert "nowhere: no such folder" in line and list(tmp_path.iterdir()) == []
    line = refused(capsys, "run", SMOKE, "--workdir", tmp_path / "run", "--set", f"initial={tmp_path}")
    assert "no parameters folder (model.json and params/)" in line and list(tmp_path.iterdir()) == []
