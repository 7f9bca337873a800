"""The real TPU compiler takes the kernel, at the size of a real vocabulary, and makes no buffer of the size of the logits."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
V5E, V5P, V6E = "v5e:2x2", "v5p:2x2x1", "v6e:2x2"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")


def compiled(*programs):
    """What ``compile_for_tpu`` says of each (topology, vocabulary, what), in a process that sees no device but the CPU."""
    words = [str(word) for program in programs for word in program]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/kernels/compile_for_tpu.py"), *words],
        capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(programs)
    return lines


def check(said):
    assert said["custom_calls"] == 1
    assert said["arguments"] > said["matrix"]
    assert said["temporaries"] < 160 * 2**20 < said["logits"] / 24  # nor a second copy of the matrix, which is a GiB


def test_the_kernel_compiles_for_three_tpus():
    kernels = compiled((V5E, 248_320, "kernel"), (V5P, 248_320, "kernel"))
    assert [said["device"] for said in kernels] == ["TPU v5 lite", "TPU v5"]
    for said in kernels:
        check(said)
        assert said["temporaries"] + said["outputs"] < said["logits"] / 40  # the candidates are outputs here
    (whole,) = compiled((V6E, 248_077, "all"))
    check(whole)
    assert whole["device"] == "TPU v6 lite" and whole["kinds"] == 7 and whole["outputs"] < 8 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("topology", [V5E, V5P, V6E])
def test_every_form_compiles_for_every_tpu(topology):
    for said in compiled((topology, 248_320, "all"), (topology, 248_077, "all"), (topology, 248_077, "sliced")):
        check(said)
