"""The real TPU compiler takes the kernel, at the size of a real vocabulary, and makes no buffer of the size of the logits."""

import pytest

SCRIPT = "kernels/compile_for_tpu.py"
V5E, V5P, V6E = "v5e:2x2", "v5p:2x2x1", "v6e:2x2"


def check(said):
    assert said["custom_calls"] == 1
    assert said["arguments"] > said["matrix"]
    assert said["temporaries"] < 160 * 2**20 < said["logits"] / 24  # nor a second copy of the matrix, which is a GiB


def test_the_kernel_compiles_for_three_tpus(compile_for_tpu):
    *kernels, whole = compile_for_tpu(SCRIPT, (V5E, 248_320, "kernel"), (V5P, 248_320, "kernel"), (V6E, 248_077, "all"))
    assert [said["device"] for said in kernels] == ["TPU v5 lite", "TPU v5"]
    for said in kernels:
        check(said)
        assert said["temporaries"] + said["outputs"] < said["logits"] / 40  # the candidates are outputs here
    check(whole)
    assert whole["device"] == "TPU v6 lite" and whole["kinds"] == 7 and whole["outputs"] < 8 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("topology", [V5E, V5P, V6E])
def test_every_form_compiles_for_every_tpu(compile_for_tpu, topology):
    for said in compile_for_tpu(SCRIPT, (topology, 248_320, "all"), (topology, 248_077, "all"), (topology, 248_077, "sliced")):
        check(said)
