"""The real TPU compiler takes the attention kernel at 131,072 tokens, four shards to a row, and makes no buffer of scores."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")


def compiled(*programs):
    """What compile_attention_for_tpu says of each program, in a process that sees no device but the CPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/models/compile_attention_for_tpu.py"), *(word for program in programs for word in program.split())],
        capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(programs)
    return lines


def check(said):
    assert [name.split("_")[2] for name in said["kernels"]] == ["dkv", "dq", "fwd"]
    assert said["scores"] == []
    assert "collective-permute" in said["moved"]  # the queries that make the shards even


def test_the_kernel_is_in_the_program_for_a_pod_and_scores_are_not():
    """attention="auto" on a machine without a TPU. One chip's scores would be [16, 32768, 131072]: 128 GiB in bfloat16."""
    (said,) = compiled("v5p:2x2x1 context=4 layer auto 1 131072")
    check(said)
    assert said["device"] == "TPU v5" and said["temporaries"] < 3.5e9  # queries of a row are 0.27e9 bytes, their float32 sums 0.54e9


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x2"])
def test_the_kernel_compiles_for_other_tpus(topology):
    auto, chunked = compiled(f"{topology} context=4 layer auto 1 131072", f"{topology} context=4 layer chunked 1 131072")
    check(auto)
    assert chunked["kernels"] == [] and chunked["scores"] and auto["temporaries"] < chunked["temporaries"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
def test_a_train_step_of_four_layers_has_the_kernel(topology):
    (said,) = compiled(f"{topology} fsdp=16,context=4 step auto 16 32768")
    check(said)
