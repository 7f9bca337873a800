"""Run as a script, not a test: compiles full attention of the 35B's widths for TPUs that are not here, prints one line of JSON per program.

    python tests/models/compile_attention_for_tpu.py TOPOLOGY MESH WHAT KERNEL ROWS LENGTH ...      (six words per program)

MESH: fsdp=16,context=4. WHAT: layer (one attention layer, forward and gradient) or step (the SFT gradient of a model of 4 layers,
recomputed by block). KERNEL: splash, chunked or auto.
"""

import json
import os
import re
import sys
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
# Only compiling: no chip is taken, so another process that compiles at the same time is no reason to refuse.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from a1jax import params, sharding, types  # noqa: E402
from a1jax.models import attention, config, transformer  # noqa: E402
from a1jax.stages import sft  # noqa: E402


def lowered(cfg, what, mesh, rows, length):
    """The program's gradient, lowered for abstract arguments that lie as the table says."""
    specs = transformer.specs(cfg) if what == "step" else attention.specs(cfg)
    placed = params.shardings(specs, mesh)
    weights = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params.abstract(specs), placed)

    def array(dtype, *more):
        axes = ("batch", "length", *[None] * len(more))
        where = jax.NamedSharding(mesh, sharding.activation_spec((rows, length, *more), axes))
        return jax.ShapeDtypeStruct((rows, length, *more), dtype, sharding=where)

    ids, real = array(jnp.int32), array(jnp.float32)
    if what == "layer":
        angles = array(jnp.float32, cfg.rotary_dim // 2)

        def total(p, x, runs, cos, sin, g):
            return jnp.sum((attention.apply(p, x, runs, cos, sin, cfg) * g).astype(jnp.float32))

        x = array(cfg.dtype, cfg.d_model)
        return jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=(placed, x.sharding)).lower(weights, x, ids, angles, angles, x)
    batch = types.Batch(tokens=ids, targets=ids, positions=ids, segment_ids=ids, mask=real, domains=ids)

    def total(p, batch, weights):
        return sft.loss(p, {"batch": batch, "weights": weights}, 1.0, cfg, 8192, None)

    return jax.jit(jax.grad(total, has_aux=True), out_shardings=(placed, None)).lower(weights, batch, real)


def compile_one(topology, axes, what, kernel, rows, length):
    shape = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    devices = list(topologies.get_topology_desc(topology, "tpu").devices)
    mesh = sharding.make_mesh(shape, devices)
    cfg = config.qwen3_5_35b_a3b(num_layers=4, attention=kernel)
    with jax.set_mesh(mesh):
        start, program = time.time(), lowered(cfg, what, mesh, rows, length)
        try:
            compiled = program.compile()
        except jax.errors.JaxRuntimeError as error:
            if "HbmOom" not in str(error):
                raise
            return {"device": devices[0].device_kind, "too_large": str(error).split(". HLO module")[0]}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    t, s = length // shape.get("context", 1), length
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", text)}
    return {
        "device": devices[0].device_kind,
        "kernels": sorted(set(re.findall(r"splash_mha_\w+?_(?:no_)?residuals", text))),
        "scores": sorted(dims for dims in arrays if len(dims) > 1 and s in dims and max(t // 8, 512) in dims),
        "moved": sorted(set(re.findall(r"\b(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text))),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "seconds": round(time.time() - start, 1),
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    for *names, rows, length in zip(*(words[i::6] for i in range(6)), strict=True):
        print(json.dumps(compile_one(*names, int(rows), int(length))), flush=True)
