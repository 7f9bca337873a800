"""Run as a script, not a test: compiles parts of the 35B's SFT step for TPUs that are not here, prints one line of JSON per program.

    python tests/analysis/compile_35b_for_tpu.py TOPOLOGY MESH WHAT ROWS LENGTH ...      (five words per program)

MESH: fsdp=4,context=2. WHAT: moe (one mixture of experts, forward and gradient), loss (cross-entropy and its gradient from hidden states),
step (the whole train step with 4 layers) or gathered (moe, with the exchange of pairs turned off: what the tests must refuse). All have
the widths of experiments/agents_a1_35b.py.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
import time

from a1jax.analysis import chips

chips.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from a1jax import config, params, sharding  # noqa: E402
from a1jax.analysis import collectives, compile_report, compiled, hlo_text  # noqa: E402
from a1jax.losses import cross_entropy  # noqa: E402
from a1jax.models import moe, transformer  # noqa: E402
from a1jax.stages import programs  # noqa: E402

EXPERIMENT = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "agents_a1_35b.py"


def lowered(what, cfg, where, rows, length):
    """The program, lowered for abstract arguments that lie as the table says."""
    model, mesh = cfg.model, where.mesh
    if what == "step":
        (program,) = programs.of_stage(cfg, "sft", where)
        return program.fn.lower(*program.args)

    def weights(specs):
        shapes, placed = params.abstract(specs), params.shardings(specs, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)

    x = where.put((rows, length, model.d_model), model.dtype, ("batch", "length", "hidden"))
    if what == "loss":
        ids, some = (where.put((rows * length,), kind, ("tokens",)) for kind in (jnp.int32, jnp.float32))

        def total(table, x, targets, weights):
            hidden, block = sharding.flatten_tokens(x), cfg.sft.vocab_block
            return cross_entropy.blocked_cross_entropy(hidden, table, targets, weights, block)[0]

        table = weights(transformer.specs(model)["lm_head"])
        return jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=(table.sharding, x.sharding)).lower(table, x, ids, some)
    if what == "gathered":
        moe.experts_exchanged = moe.experts_gathered
    layer, valid = weights(moe.specs(model)), where.put((rows, length), jnp.bool_, ("batch", "length"))

    def total(p, x, valid, g):
        with jax.named_scope("moe"):
            y, aux = moe.apply(p, x, valid, model)
        return jnp.sum((y * g).astype(jnp.float32)) + aux["load_balance"]

    placed = (jax.tree.map(lambda w: w.sharding, layer), x.sharding)
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)), out_shardings=(None, placed)).lower(layer, x, valid, x)


def compile_one(topology, axes, what, rows, length):
    cfg = config.load(f"{EXPERIMENT}:v5p-256")
    model = dataclasses.replace(cfg.model, num_layers=4)
    cfg = dataclasses.replace(cfg, model=model, sft=dataclasses.replace(cfg.sft, rows=rows, max_length=length))
    where = compile_report.place({name: int(n) for name, n in (axis.split("=") for axis in axes.split(","))}, chips.devices(topology)[0])
    began = time.perf_counter()
    with where.on(), tempfile.TemporaryDirectory() as folder:
        done = lowered(what, cfg, where, rows, length).compile(compiler_options={"xla_dump_to": folder})
        module = hlo_text.read(compiled.newest(pathlib.Path(folder), "after_optimizations.txt").read_text())
    ops = [op for name, ops in module.computations.items() if module.trips[name] for op in ops]
    between = [op for op in ops if op.kind.removesuffix("-start") in collectives.KINDS]
    return {
        "device": where.device.device_kind,
        "arrays": sorted({shape for op in ops for _, shape, _ in hlo_text.arrays(op.type) if len(shape) > 1}),
        "moved": sorted({(op.kind.removesuffix("-start"), shape) for op in between for _, shape, _ in hlo_text.arrays(op.type)}),
        "collectives": collectives.of_module(module, dict(where.mesh.shape)),
        "of_experts": sorted((op.kind.removesuffix("-start"), hlo_text.size(op.type)) for op in between if "/experts/" in op.scope),
        "temporaries": done.memory_analysis().temp_size_in_bytes,
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    for *names, rows, length in zip(*(words[i::5] for i in range(5)), strict=True):
        print(json.dumps(compile_one(*names, int(rows), int(length))), flush=True)
