"""What cannot be cut is refused by its name, with the nearest shape, before anything is written."""

import ast
import dataclasses
import pathlib

import jax
import pytest

from a1jax import config, main, mesh_shapes
from a1jax.config import ConfigError
from a1jax.models import config as models
from a1jax.models import transformer
from a1jax.stages import fitting_mesh, folders
from a1jax.stages.fitting_mesh import demands, violations
from a1jax.stages.scoring import Checkpoint
from a1jax.stages.setting import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "experiments/quickstart.py")
CHANGES = ("sft.rows=16", "distill.rows=16", "model.num_experts=8")


def refusal(shape: dict, *assignments: str) -> str:
    cfg = config.override(config.load(QUICKSTART), [*CHANGES, f"mesh.shape={shape}", *assignments])
    with pytest.raises(ConfigError) as error:
        make_mesh(cfg.mesh, demands(cfg))
    assert "\n" not in str(error.value)
    return str(error.value)


CASES = [
    (
        {"data": 3, "fsdp": 2, "tensor": 2},
        (),
        "mesh data 3 x fsdp 2 x tensor 2 needs 12 devices, here are 8",
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    ({"data": 8}, ("sft.rows=12",), "sft.rows = 12 cannot be cut over data 8: it must be a multiple of 8", {"data": 4, "context": 2}),
    (
        {"slice": 2, "data": 2, "fsdp": 2},
        ("distill.rows=20",),
        "distill.rows = 20 cannot be cut over slice 2 x data 2 x fsdp 2 = 8",
        {"slice": 2, "data": 2, "fsdp": 1, "context": 2},
    ),
    (
        {"data": 4},
        ("sft.rows=24", "sft.microbatches=4"),
        "sft.rows / microbatches = 6 cannot be cut over data 4",
        {"data": 2, "context": 2},
    ),
    (
        {"context": 8},
        ("sft.max_length=260",),
        "sft.max_length = 260 cannot be cut over context 8: it must be a multiple of 8 (best of 128: whole chunks of the delta rule)",
        {"data": 2, "context": 4},
    ),
    (
        {"expert": 4, "fsdp": 2},
        ("model.num_experts=4",),
        "model.num_experts (parameter blocks/0/mlp/experts/down_proj) = 4 cannot be cut over expert 4 x fsdp 2 = 8",
        {"data": 2, "fsdp": 2, "expert": 2},
    ),
    (
        {"fsdp": 2, "context": 4},
        ("model.num_experts=4",),
        "model.num_experts (parameter blocks/0/mlp/experts/down_proj) = 4 cannot be cut over fsdp 2 x context 4 = 8",
        {"data": 2, "fsdp": 2, "context": 2},
    ),
    ({"tensor": 4}, ("model.num_heads=6",), "model.num_heads = 6 cannot be cut over tensor 4", {"data": 2, "tensor": 2}),
    (
        {"tensor": 4},
        ("model.num_heads=4", "model.linear_num_value_heads=6"),
        "model.linear_num_value_heads (parameter blocks/0/linear_attn/A_log) = 6 cannot be cut over tensor 4",
        {"data": 2, "tensor": 2},
    ),
    (
        {"tensor": 4},
        ("model.num_heads=4", "model.linear_num_value_heads=4", "model.num_kv_heads=1", "model.head_dim=42"),
        "parameter blocks/1/self_attn/k_proj, its kv_heads = 42 cannot be cut over tensor 4",
        {"data": 2, "tensor": 2},
    ),
    (
        {"tensor": 2},
        ("model.vocab_size=641", "tokenizer.vocab_size=641"),
        "model.vocab_size (parameter embed_tokens) = 641 cannot be cut over tensor 2",
        {"data": 2, "tensor": 1},
    ),
    (
        {"fsdp": 4},
        ("model.d_model=66",),
        "model.d_model (parameter blocks/0/linear_attn/in_proj_a) = 66 cannot be cut over fsdp 4",
        {"data": 2, "fsdp": 2},
    ),
    ({"data": 8}, ("limits.slots=20",), "limits.slots = 20 cannot be cut over data 8", {"data": 4, "context": 2}),
    (
        {"data": 4},
        ("limits.feed_tokens=16", "limits.slots=48"),
        "limits.slots / 8, which are fed pieces of feed_tokens, = 6 cannot be cut over data 4",
        {"data": 2, "context": 2},
    ),
]


@pytest.mark.parametrize(("shape", "change", "reason", "nearest"), CASES)
def test_every_reason_has_its_name_and_a_way_out(shape, change, reason, nearest):
    said = refusal(shape, *change)
    assert reason in said
    found = ast.literal_eval(said.rpartition("; nearest possible: mesh.shape=")[2])
    assert found == nearest
    wanted = config.override(config.load(QUICKSTART), [*CHANGES, f"mesh.shape={found}", *change])
    assert make_mesh(wanted.mesh, demands(wanted)).size == mesh_shapes.size(nearest)  # the way out is one


def test_a_shape_that_fits_needs_no_advice():
    for shape in ({"data": 2, "fsdp": 2, "context": 2}, {"slice": 2, "expert": 2, "tensor": 2}, {"context": 8}, {"expert": 4}):
        cfg = config.override(config.load(QUICKSTART), [*CHANGES, f"mesh.shape={shape}"])
        mesh = make_mesh(cfg.mesh, demands(cfg))
        assert {name: size for name, size in mesh.shape.items() if size > 1} == shape
    assert make_mesh(MeshConfig()) is None


def test_where_nothing_fits_it_says_so():
    said = refusal({"tensor": 8}, "model.num_heads=3", "model.num_kv_heads=3", "sft.rows=5", "sft.max_length=255")
    assert said.endswith("; no mesh of 8 devices would do")
    assert said.startswith("mesh.shape={'tensor': 8}: model.num_heads = 3 cannot be cut over tensor 8: it must be a multiple of 8; ")
    many = ("model.vocab_size=641", "tokenizer.vocab_size=641", "model.shared_expert_width=9")
    said = refusal({"tensor": 8}, "model.num_heads=3", "model.num_kv_heads=3", "sft.rows=5", "sft.max_length=255", *many)
    assert said.count("cannot be cut") == 3 and said.endswith("; and 1 more; no mesh of 8 devices would do")


def test_teachers_distillation_and_reinforcement_are_asked_too(small_model, tmp_path):
    cfg = config.load(str(ROOT / "experiments/six_domains.py"))
    paths = {demand.what for demand in demands(cfg)}
    assert {"sft.rows", "distill.rows", "distill.max_length", "distill.limits.slots", "limits.slots"} <= paths
    assert {"distill.rows_of.search", "distill.rows_of.engineering"} <= paths
    assert "teachers.tool_calling.recipe.1.rows" in paths
    assert any(path.startswith("teachers.") and path.endswith(".limits.slots") for path in paths)
    assert violations({"data": 4}, demands(cfg)) != []  # its odd numbers of rows
    some = dataclasses.replace(cfg.distill, rows=4, rows_of={"search": 1, "science": 4}, microbatches=3)
    assert {d.what: d for d in demands(dataclasses.replace(cfg, distill=some))}["distill.rows x 6 domains / microbatches"].size == 21 // 3
    with pytest.raises(ConfigError, match="distill.microbatches is 4; the rows of all domains, 21, must be a multiple"):
        dataclasses.replace(cfg, distill=dataclasses.replace(some, microbatches=4))
    distill = dataclasses.replace(some, rows_of={})
    whole = {d.what: d for d in demands(dataclasses.replace(cfg, distill=distill))}
    assert whole["distill.rows x 6 domains / microbatches"].size == 8
    by_domain = dataclasses.replace(distill, rows=6, mode="full", limits=dataclasses.replace(distill.limits, max_length=512))
    assert {d.what: d.size for d in demands(dataclasses.replace(cfg, distill=by_domain))}["distill.rows / microbatches"] == 2
    found = {d.what: d for d in demands(dataclasses.replace(cfg, distill=dataclasses.replace(distill, rows=1, microbatches=6)))}
    one = found["distill.rows x 6 domains / microbatches"]
    assert one.size == 1 and violations({"data": 4}, [one]) == []  # a row alone is copied, not cut

    folder = tmp_path / "teacher"
    (folder / "params").mkdir(parents=True)
    folders.write_model(folder, dataclasses.replace(small_model, d_model=20), {})
    given = dataclasses.replace(cfg, checkpoints={"search": Checkpoint(str(folder))})
    said = violations({"fsdp": 8}, demands(given))
    assert any(line.startswith("checkpoints.search: model.d_model") and "= 20 cannot be cut over fsdp 8" in line for line in said)


def test_real_runs_are_asked_for_their_held_out_rows():
    cfg = config.load(str(ROOT / "experiments/real_trajectories.py"))
    cfg = dataclasses.replace(cfg, sft=dataclasses.replace(cfg.sft, rows=4), mesh=MeshConfig({"fsdp": 4}))
    with pytest.raises(
        ConfigError, match="data.heldout_rows = 1 cannot be cut over fsdp 4.*nearest possible: mesh.shape={'fsdp': 1, 'context': 4}$"
    ):
        make_mesh(cfg.mesh, demands(cfg))
    make_mesh(MeshConfig({"context": 4}), demands(cfg))


def test_every_parameter_and_every_cut_axis_is_asked_for():
    """What ``params.shardings`` would refuse, or a constraint inside the model, is known before."""
    model = models.tiny(tie_embeddings=False)
    asked = {(demand.axis, demand.size) for demand in fitting_mesh.of_model(model)}
    for spec in jax.tree.leaves(transformer.specs(model)):
        assert {(axis, size) for axis, size in zip(spec.axes, spec.shape, strict=True) if fitting_mesh.sharding.RULES[axis]} <= asked


def test_a_refused_run_leaves_nothing(tmp_path, capsys):
    words = ["run", QUICKSTART, "--workdir", str(tmp_path / "run"), "--set", "mesh.shape={'fsdp': 8}"]
    assert main.main(words) == 2
    assert capsys.readouterr().err == (
        "a1jax: mesh.shape={'fsdp': 8}: distill.rows = 14 cannot be cut over fsdp 8: it must be a multiple of 8; "
        "nearest possible: mesh.shape={'fsdp': 2, 'context': 4}\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pod", ["v5p-256", "v6e-256"])
def test_the_35b_fits_its_pods(pod):
    cfg = config.load(f"{ROOT}/experiments/agents_a1_35b.py:{pod}")
    config.check(cfg)
    assert violations(cfg.mesh.shape, demands(cfg)) == []
    assert violations({**cfg.mesh.shape, "context": 64}, demands(cfg)) != []  # 1,024 devices for 256 experts
