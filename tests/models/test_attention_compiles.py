"""The real TPU compiler takes the attention kernel at 131,072 tokens, four shards to a row, and makes no buffer of scores."""

import pytest

SCRIPT = "models/compile_attention_for_tpu.py"


def check(said):
    assert [name.split("_")[2] for name in said["kernels"]] == ["dkv", "dq", "fwd"]
    assert said["scores"] == []
    assert "collective-permute" in said["moved"]  # the queries that make the shards even


def test_the_kernel_is_in_the_program_for_a_pod_and_scores_are_not(compile_for_tpu):
    """attention="auto" on a machine without a TPU. One chip's scores would be [16, 32768, 131072]: 128 GiB in bfloat16."""
    (said,) = compile_for_tpu(SCRIPT, "v5p:2x2x1 context=4 layer auto 1 131072".split())
    check(said)
    assert said["device"] == "TPU v5" and said["temporaries"] < 3.5e9  # queries of a row are 0.27e9 bytes, their float32 sums 0.54e9


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x2"])
def test_the_kernel_compiles_for_other_tpus(compile_for_tpu, topology):
    auto, chunked = compile_for_tpu(
        SCRIPT, f"{topology} context=4 layer auto 1 131072".split(), f"{topology} context=4 layer chunked 1 131072".split()
    )
    check(auto)
    assert chunked["kernels"] == [] and chunked["scores"] and auto["temporaries"] < chunked["temporaries"] / 2
