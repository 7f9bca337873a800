"""The 35B of experiments/agents_a1_35b.py in the real TPU compiler's text: experts stay where they lie, pairs travel, and nothing is
[tokens, vocabulary]."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from a1jax.models import exchange
from a1jax.models.config import qwen3_5_35b_a3b

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = "analysis/compile_35b_for_tpu.py"
MODEL = qwen3_5_35b_a3b()
D, F, V, ACTIVE = MODEL.d_model, MODEL.expert_width, MODEL.vocab_size, MODEL.num_experts_active
MESHES = {"v5p:2x2x2": {"fsdp": 8}, "v6e:2x4": {"fsdp": 4, "context": 2}}
ROWS, LENGTH = 8, 96
SHAPE = (ROWS, LENGTH)


def words(topology, what, shape=SHAPE):
    return [topology, ",".join(f"{name}={n}" for name, n in MESHES[topology].items()), what, *shape]


@pytest.fixture(scope="module")
def programs(compile_for_tpu):
    wanted = [("v5p:2x2x2", "moe"), ("v6e:2x4", "moe"), ("v6e:2x4", "loss")]
    return dict(zip(wanted, compile_for_tpu(SCRIPT, *(words(*program) for program in wanted)), strict=True))


def experts_that_moved(said):
    """Shapes of what went between chips that are expert weights, one or many: their last two axes tell them."""
    return [shape for _, shape in said["moved"] if len(shape) > 2 and shape[-2:] in ([D, 2 * F], [F, D])]


def tokens_gathered(said, most):
    """Gathers of more rows of the model's width than ``most``, which must be more than any weight has; the compiler also writes a gather
    as the sum of parts padded with zeros."""
    gathers = ("all-gather", "all-reduce")
    return [shape for kind, shape in said["moved"] if kind in gathers and shape[-1:] == [D] and most < math.prod(shape[:-1])]


@pytest.mark.parametrize("topology", MESHES)
def test_pairs_travel_and_experts_do_not(programs, topology):
    said = programs[topology, "moe"]
    assert experts_that_moved(said) == [] and tokens_gathered(said, F) == []
    # Forward: tokens, labels, results. Backward: tokens with their gradients, labels, two gradients. Plus how many rounds all need.
    rows = 8 * exchange.room_for(ROWS * LENGTH // 8, 8, ACTIVE, MODEL.num_experts // 8)
    columns = {"tokens": 2 * D, "labels": 8, "results": 2 * D, "tokens and gradients": 4 * D, "labels again": 8, "dx": 2 * D, "dweight": 4}
    travel = [["all-to-all", rows * n] for n in columns.values()]  # bytes
    assert said["of_experts"] == sorted([*travel, ["all-reduce", 4]])
    assert {entry["axes"] for entry in said["collectives"]} == {"+".join(MESHES[topology])}


def test_the_same_words_refuse_experts_and_tokens_that_moved():
    found = {"moved": [["all-gather", [32, D, 2 * F]], ["all-gather", [ROWS, LENGTH, D]], ["all-to-all", [ROWS, LENGTH, D]]]}
    assert experts_that_moved(found) == [[32, D, 2 * F]] and tokens_gathered(found, F) == [[ROWS, LENGTH, D]]


@pytest.mark.slow
def test_the_same_words_refuse_a_program_that_gathers_tokens(compile_for_tpu):
    """The form for CPUs on the same mesh: these tests can fail."""
    (said,) = compile_for_tpu(SCRIPT, words("v6e:2x4", "gathered"))
    assert tokens_gathered(said, F) and not [kind for kind, _ in said["of_experts"] if kind == "all-to-all"]


def test_no_logits_of_all_tokens_over_the_vocabulary(programs):
    said, tokens = programs["v6e:2x4", "loss"], ROWS * LENGTH
    assert [shape for shape in said["arrays"] if shape[-1] == V or V in shape and {tokens, tokens // 8} & set(shape)] == []
    blocks = [shape for shape in said["arrays"] if shape[-1] == 8192]
    assert blocks and all(math.prod(shape) <= tokens // 8 * 8192 for shape in blocks)  # one block of ids of a chip's own tokens
    assert [V, D] not in said["arrays"]  # the table is gathered a block at a time


@pytest.mark.slow
@pytest.mark.parametrize("topology", MESHES)
def test_the_whole_step_with_four_layers(compile_for_tpu, topology):
    """pytest -m slow tests/analysis/test_35b_compiles.py -k four_layers       (5 minutes of a core each)"""
    (said,) = compile_for_tpu(SCRIPT, words(topology, "step", (8, 16_384)))
    assert experts_that_moved(said) == [] and tokens_gathered(said, 8192) == []
    assert [shape for shape in said["arrays"] if shape[-1] == V and len(shape) > 1] == []
    sent = [n for kind, n in said["of_experts"] if kind == "all-to-all"]
    assert len(sent) == 4 * 7  # four layers, forward (3) and backward (4): what is computed again stops before the experts


@pytest.mark.slow
def test_the_step_of_full_depth_takes_half_of_the_memory_of_maxtext():
    """pytest -m slow tests/analysis/test_35b_compiles.py -k full_depth       (8 minutes of a core and 4 GB)

    4,096 tokens a chip, 64 chips, against 18.99 GB of temporaries of MaxText 0.2.5 (../shared/design/platform.md)."""
    settings = ['mesh.shape={"fsdp": 64}', "sft.rows=64", "sft.max_length=4096"]
    words = ["compile", f"{ROOT}/experiments/agents_a1_35b.py:v5p-256", "--topology", "v5p:4x4x4", "--stage", "sft", "--json", "--set"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # those of the tests lower the level of optimisation
    done = subprocess.run([sys.executable, "-m", "a1jax.main", *words, *settings], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] and found["temp_bytes"] <= 18.99e9 / 2
