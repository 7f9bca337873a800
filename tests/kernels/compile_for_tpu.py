"""Run as a script, not a test: compiles aligned top-k for TPUs that are not here and prints one line of JSON per program.

    python tests/kernels/compile_for_tpu.py TOPOLOGY VOCABULARY WHAT ...      (three words per program)

WHAT: kernel (alone), all (with the choice of k and the repair of doubtful rows) or sliced (all, with row slices, cap and temperature).
"""

import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
# Only compiling: no chip is taken, so another process that compiles at the same time is no reason to refuse.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from a1jax.kernels.vocab_align import aligned, kernel, layout, tuning  # noqa: E402
from jax.experimental import topologies  # noqa: E402

T, D, K = 4096, 2048, 128


def every_kind(vocab: int) -> np.ndarray:
    """A map with units of every fan-in and a residual."""
    units = np.arange(vocab) // 2
    for fan_in, start in ((4, 20_000), (8, 60_000), (16, 90_000), (20, 120_000), (6_000, 150_000)):
        units[start : start + 9_000] = 200_000 + start + np.arange(9_000) // fan_in
    units[:10_000] = 500_000 + np.arange(10_000)
    units[-2_500:] = -1
    return units.astype(np.int32)


def compile_one(topology: str, vocab: int, what: str) -> dict:
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    planned = layout.identity(vocab) if vocab % 128 == 0 else layout.build(every_kind(vocab))
    arranged = jax.eval_shape(lambda w: layout.arrange(w, planned), jax.ShapeDtypeStruct((vocab, D), jnp.bfloat16))
    tiles = tuning.tiles_for(device.device_kind, planned.block, D, K)
    sliced = what == "sliced"
    options = {"soft_cap": 30.0, "temperature": 0.7} if sliced else {"soft_cap": None, "temperature": 1.0}

    def program(hidden, arranged, between):
        if what == "kernel":
            return kernel.candidates(hidden, arranged, tiles, between, interpret=False, **options)
        return aligned.aligned_topk(hidden, arranged, K, between=between, implementation="pallas", tiles=tiles, **options)

    between = (jax.ShapeDtypeStruct((T,), jnp.int32),) * 2 if sliced else None
    on_device = jax.sharding.SingleDeviceSharding(device)
    args = (jax.ShapeDtypeStruct((T, D), jnp.bfloat16), arranged, between)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), args)
    lowered = jax.jit(program).lower(*args)
    memory = lowered.compile().memory_analysis()
    return {
        "device": device.device_kind,
        "kinds": len(planned.runs),
        "custom_calls": lowered.as_text().count("tpu_custom_call"),
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "logits": T * vocab * 4,
        "matrix": planned.source.size * D * 2,
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    for topology, vocab, what in zip(words[::3], words[1::3], words[2::3], strict=True):
        print(json.dumps(compile_one(topology, int(vocab), what)), flush=True)
