"""`a1jax compile` with the real TPU compiler and no TPU, in a process of its own: numbers, what does not fit, sweeps, mistakes."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from a1jax import config, sharding
from a1jax.analysis import chips, compile_advice, compile_sweep
from a1jax.models import transformer

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESH = {"fsdp": 2, "expert": 2}
EXPERIMENT = '''"""Small, with every stage, for compiling only."""
import dataclasses

from a1jax import optim
from a1jax.analysis import report
from a1jax.config import bind
from a1jax.models import config as models
from a1jax.rollout.agent import Limits
from a1jax.stages import distill, evaluate, experts, grpo, pipeline, setting, sft, teacher


def get_config(arg=""):
    model = models.tiny(vocab_size=256, d_model=128, num_layers=1, full_attention_interval=1, head_dim=64, expert_width=128,
                        shared_expert_width=128, moe="ragged", compute_dtype="bfloat16")
    limits = Limits(slots=8, max_length=128, feed_tokens=16)
    reinforced = grpo.GrpoConfig(steps=2, rows=8, max_length=128, limits=limits)
    return pipeline.Experiment(
        name="small", main=bind(report.run), model=model, domains=("search",), runs={"search": experts.Runs({1: 1})},
        sft=sft.SftConfig(steps=10, rows=8, max_length=128, microbatches=1, optimizer=bind(optim.adamw)),
        teachers={"search": teacher.TeacherConfig((reinforced,))},
        distill=distill.DistillConfig(rows=8, max_length=128, limits=limits), evaluation=evaluate.Evaluation({1: 1}),
        admission=evaluate.Evaluation({1: 1}), tokenizer=pipeline.TokenizerConfig(path="is/not/here"), limits=limits,
        mesh=setting.MeshConfig({"fsdp": 2, "expert": 2}),
    )
'''  # fmt: skip


def run(commands: list[list[str]], timeout: int = 300) -> list[list]:
    """[exit code, stdout, stderr] of each, in one new process whose devices nobody has touched."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    script = str(ROOT / "tests/analysis/run_commands.py")
    done = subprocess.run([sys.executable, script, json.dumps(commands)], capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(EXPERIMENT)
    return str(path)


@pytest.fixture(scope="module")
def trials(file):
    """Every command that needs the compiler, in one process."""
    shapes = json.dumps([{"fsdp": 4}, {"fsdp": 3}, {"fsdp": 2, "tensor": 2}, {"context": 4, "expert": 64}])
    base = ["compile", file, "--topology", "v5p:2x2x1"]
    names = {
        "sft": [*base, "--stage", "sft", "--json"],
        "huge": [
            *base,
            "--stage",
            "sft",
            "--json",
            "--set",
            "sft.rows=512",
            "sft.max_length=16384",
            'model.moe="dense"',
            'model.attention="chunked"',
        ],
        "sweep": [*base, "--stage", "rollout", "--sweep", shapes, "--json"],
        "text": [*base, "--stage", "rollout"],
    }
    return dict(zip(names, run(list(names.values())), strict=True))


def test_the_sft_step(trials, file):
    code, out, _ = trials["sft"]
    found = json.loads(out)
    assert code == 0 and found["fits"] is True and found["chips"] == 4 and found["mesh"] == MESH
    assert [p["program"] for p in found["programs"]] == ["train_step"]
    keys = {"argument_bytes", "temp_bytes", "peak_bytes", "hbm_bytes", "fits", "flops_per_token", "collectives", "seconds_to_compile"}
    assert keys <= set(found) and keys <= set(found["programs"][0])

    # By hand: a parameter and AdamW's two moments lie together, cut by 4 where a logical axis is cut over fsdp x expert.
    cfg = config.load(file)
    cut = {axis for axis, axes in sharding.RULES.items() if set(axes) & set(MESH)}
    specs = jax.tree.leaves(transformer.specs(cfg.model))
    part = sum(math.prod(s.shape) * 4 // (4 if set(s.axes) & cut else 1) for s in specs)
    scalars = 4 + 8 + 4 + (4 + 4 + 4 + 4 + 8)  # step, key, adam's count, and the schedule's count, steps, warm-up, final, two rates
    batch = 6 * 8 * 128 * 4 // 4
    assert found["argument_bytes_unpadded"] == 3 * part + scalars + batch
    # What the compiler takes more is the padding of small arrays to tiles of at least 512 bytes; the batch's domains it does not read.
    less = len(specs) * 3 * 512 + 11 * 512
    assert found["argument_bytes_unpadded"] - batch // 6 <= found["argument_bytes"] <= found["argument_bytes_unpadded"] + less
    assert found["beside_bytes"] == part
    assert (
        found["peak_bytes"] == sum(found[f"{n}_bytes"] for n in ("argument", "temp", "output", "code", "beside")) - found["aliased_bytes"]
    )
    assert found["aliased_bytes"] > 0.9 * found["argument_bytes"] - batch  # the state is donated
    assert found["hbm_bytes"] == int(95.73 * 2**30)

    kinds = {(c["kind"], c["axes"]) for c in found["collectives"]}
    assert {axes for _, axes in kinds} <= {"fsdp", "expert", "fsdp+expert"} and {"all-gather", "all-to-all"} <= {k for k, _ in kinds}
    assert found["unknown_loops"] == 2 and found["compiler"]["flops"] > 0  # rounds of the exchange, forward and backward
    estimate = found["estimate"]
    assert estimate["step_seconds"] == max(estimate[f"{n}_seconds"] for n in ("compute", "hbm", "ici")) > 0
    assert estimate["tokens_per_second"] == pytest.approx(8 * 128 / estimate["step_seconds"])
    assert estimate["hbm_seconds"] == pytest.approx(found["bytes_moved"] / 2765e9)
    # Every weight of the state is read and written once at least.
    assert found["bytes_moved"] > 2 * 3 * part
    assert sum(b["bytes"] for b in found["largest_buffers"]) <= found["temp_bytes"]
    assert found["largest_arguments"][0]["name"].endswith("experts/gate_up_proj")


def test_what_does_not_fit_has_exit_code_1_the_largest_buffers_and_three_settings(trials):
    code, out, _ = trials["huge"]
    found = json.loads(out)
    assert code == 1 and found["fits"] is False and "HBM" in found["refused"] and found["peak_bytes"] > found["hbm_bytes"]
    buffers = found["largest_buffers"]
    assert len(buffers) >= 3 and buffers[0]["bytes"] >= buffers[-1]["bytes"] and sum(b["bytes"] for b in buffers) <= found["temp_bytes"]
    # The scores of attention are the largest by far: rows 128 x heads 2 x 16,384 x 16,384 in float32.
    assert buffers[0]["bytes"] == 128 * 2 * 16_384**2 * 4 and "attention" in buffers[0]["scope"]
    assert len(found["help"]) == 3 and "model.attention_chunk=512" in found["help"][0]
    assert all(re.match(r"--set '[\w.]+=.*' +\(saves about .* GB per device\)$", text) for text in found["help"])
    assert any("sft.microbatches=2" in text for text in found["help"])
    stated = float(re.search(r"\(([\d.]+)G\)", found["refused"])[1]) * 2**30
    assert found["temp_bytes"] == pytest.approx(stated, rel=0.01)  # of what the refusal says, in its three digits


def test_a_sweep_sorts_and_tells_what_is_impossible(trials):
    code, out, err = trials["sweep"]
    rows = json.loads(out)["sweep"]
    assert code == 0 and len(rows) == 4 and err.count("compiling for mesh") == 4
    possible = [r for r in rows if "reason" not in r]
    assert [set(r["mesh"]) for r in rows[2:]] == [{"fsdp"}, {"context", "expert"}] and all("reason" in r for r in rows[2:])
    assert "needs 3 devices, here are 4" in rows[2]["reason"] and len(possible) == 2
    rates = [r["tokens_per_second_per_chip"] for r in possible]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    names = [[p["program"] for p in r["programs"]] for r in possible]
    assert names == [["decode/distill", "prefill/distill"]] * 2  # the other stages decode by the same programs


def test_the_report_for_reading(trials):
    code, out, err = trials["text"]
    assert code == 0 and err == ""
    for words in (
        "rollout: decode/distill",
        "rollout: prefill/distill",
        "peak",
        "fits",
        "10^9 FLOPs per token",
        "an estimate",
        "all-gather",
    ):
        assert words in out


def test_mistakes_are_one_line(file):
    base = ["compile", file, "--stage", "sft", "--topology"]
    commands = [
        [*base, "v9:2x2"],
        [*base, "v5e:3x5"],
        [*base, "v5p:2x2x1", "--set", "mesh.shape={}"],
        [*base, "v5p:2x2x1", "--set", 'mesh.shape={"fsdp": 3}'],
        [*base, "v5p:2x2x1", "--set", "sft.rows=6"],
        [*base, "v5p:2x2x1", "--sweep", "{}"],
    ]
    wanted = [
        "v5p:4x4x8",
        "v5p:4x4x8",
        '"fsdp": 4',
        "needs 3 devices, here are 4",
        "cannot be cut over fsdp x expert = 4",
        "list of mesh shapes",
    ]
    for (code, out, err), words in zip(run(commands), wanted, strict=True):
        assert code == 2 and out == "" and err.count("\n") == 1 and words in err, err


def test_without_the_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(chips, "_installed", lambda: False)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda *_: (_ for _ in ()).throw(RuntimeError("no plugin")))
    with pytest.raises(config.ConfigError, match="pip install libtpu"):
        chips.devices("v5p:2x2x1")


def test_sensible_shapes(file):
    cfg = config.load(file)  # 8 experts, 2 key/value heads
    found = compile_sweep.sensible(4, cfg)
    assert {"fsdp": 4} in found and {"fsdp": 2, "context": 2} in found and {"expert": 2, "tensor": 2} in found
    assert all(math.prod(shape.values()) == 4 and shape.get("tensor", 1) <= 2 for shape in found)
    assert len({json.dumps(s, sort_keys=True) for s in found}) == len(found)
    many = compile_sweep.sensible(32, cfg)
    assert many and all(math.prod(s.values()) == 32 and s["data"] == 4 for s in many)  # ... of which 4 x 8 have an expert each


def test_an_estimate_is_its_slowest_part():
    chip = chips.Chip("none", 100.0, 1, 10.0, 5.0, 2)
    found = chips.estimate(chip, 4, tokens=8, passes=30.0, moved=20.0, sent=5.0)
    assert found["compute_seconds"] == pytest.approx(8 * 30 / (4 * 100 * chips.MATRIX)) and found["hbm_seconds"] == 2.0
    assert (found["ici_seconds"], found["bound_by"], found["step_seconds"]) == (1.0, "hbm", 2.0)
    assert found["tokens_per_second"] == 4.0 and found["tokens_per_second_per_chip"] == 2.0  # 4 devices are 2 chips


@pytest.mark.parametrize(
    ("scope", "kind"),
    [
        ("jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/layer0/moe/experts/shard_map/gather", "experts"),
        ("jit(step)/jvp()/while/body/closed_call/layer0/gated_delta/shard_map/delta_rule/while/body/dot_general", "delta"),
        ("jit(step)/jvp()/while/body/closed_call/layer3/attention/shard_map/dot_general", "attention"),
        ("jit(step)/jvp()/while/body/dynamic_update_slice", "activations"),
        ("jit(step)/jvp()/while/body/closed_call/dot_general", "logits"),
        ("jit(step)/add", "update"),
    ],
)
def test_buffers_are_known_by_their_scope(scope, kind):
    assert compile_advice.kind_of(scope) == kind
