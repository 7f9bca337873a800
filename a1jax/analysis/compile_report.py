"""`a1jax compile`: the real programs of a stage, compiled for TPUs that need not be here, and what they take.

As JSON, one object: "topology", "chips", "devices", "mesh", "fits" (of all programs), "programs" (a list) and, at the top, the keys of the
program with the highest peak. A program has "stage", "program", "settings" (the field its sizes come from), "tokens" (per call), and

    argument_bytes, temp_bytes, output_bytes, aliased_bytes, code_bytes     per device, as the compiler has laid them out
    argument_bytes_unpadded         arguments by their shapes and shardings alone: small ones are filled up to whole tiles
    host_bytes                      in the host's memory, per device
    beside, beside_bytes            what the stage keeps in HBM besides
    peak_bytes                      arguments + outputs that are no arguments + temporaries + code + beside
    hbm_bytes, fits, refused        fits: not refused by the compiler, and peak_bytes at most hbm_bytes; refused: its line, or null
    flops_per_token                 forward and backward by formula (models.flops); flops: its parts, and what is computed again
    compiler                        its own counts of operations and bytes, with a note on what they leave out
    bytes_moved                     through HBM per call, per device, loops multiplied in (compiled.bytes_moved)
    collectives                     by kind and mesh axes (collectives.of_module); unknown_loops: loops counted once
    estimate                        step time and tokens per second (chips.estimate), with its assumption
    largest_buffers, largest_arguments, help      help: settings that would save most, where it does not fit
    seconds_to_compile
"""

from __future__ import annotations

import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from ..config import ConfigError
from ..sharding import make_mesh
from ..stages import programs
from ..stages.pipeline import Experiment
from . import chips, collectives, compile_advice, compiled, hlo_text

NOTE = (
    "bodies of loops counted once whatever their trips, kernels (custom calls) not at all: too low by about the number of layers and blocks"
)


def report(cfg: Experiment, topology: str, stages: tuple[str, ...]) -> dict[str, Any]:
    """Everything about the programs of these stages. Raises ConfigError for an unknown topology, and for sizes the mesh cannot cut."""
    devices, chip = chips.devices(topology)
    where = place(cfg.mesh.shape, devices)
    todo = [p for stage in stages for p in programs.of_stage(cfg, stage, where)]
    found = [measure(p, where, chip, len(devices), cfg) for p in todo]
    head = {"topology": topology, "chips": len(devices) // chip.cores, "devices": len(devices), "mesh": cfg.mesh.shape}
    worst = max(found, key=lambda p: (not p["fits"], p["peak_bytes"]))
    return {**head, **worst, "fits": all(p["fits"] for p in found), "programs": found}


def place(shape: dict[str, int], devices: list) -> programs.Place:
    """The mesh of that shape over all of the devices. Raises ConfigError for one of another size."""
    if not shape and len(devices) == 1:
        return programs.Place(None, devices[0])
    if not shape:
        raise ConfigError(f"mesh.shape is empty, the topology has {len(devices)} devices: --set 'mesh.shape={{\"fsdp\": {len(devices)}}}'")
    return programs.Place(make_mesh(shape, devices), devices[0])


def measure(program: programs.Program, where: programs.Place, chip: chips.Chip, count: int, cfg: Experiment) -> dict[str, Any]:
    """Compiles one program: what it takes, or that it does not fit and why."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, where.on():
        lowered = program.fn.lower(*program.args)
        try:
            # The dump and not compiled.as_text(): it is also there for a program that is refused, and for some that cannot be printed.
            done, refused = lowered.compile(compiler_options={"xla_dump_to": folder}), None
        except jax.errors.JaxRuntimeError as error:
            done, refused = None, str(error).splitlines()[0]
        seconds = time.perf_counter() - began
        path = pathlib.Path(folder)
        try:
            module = hlo_text.read(compiled.newest(path, "after_optimizations.txt").read_text())
            buffers, temporaries = compiled.largest_buffers(path, module), compiled.temporary_bytes(path)
        except FileNotFoundError:  # refused before memory was assigned: nothing is known but the reason
            if refused is None:
                raise
            raise ConfigError(f"{program.stage} {program.name}: the compiler refuses it: {refused}") from None
    moved, mesh = compiled.bytes_moved(module), dict(where.mesh.shape) if where.mesh is not None else {}
    exchanged = collectives.of_module(module, mesh)
    cost = program.cost
    out: dict[str, Any] = {"stage": program.stage, "program": program.name, "settings": program.settings, "tokens": program.tokens}
    out |= _memory(program, done, temporaries, chip)
    out |= {
        "refused": refused,
        "fits": refused is None and out["peak_bytes"] <= chip.hbm,
        "flops_per_token": cost.model,
        "flops": {"forward": cost.forward, "backward": cost.backward, "recomputed": cost.recomputed, "parts": cost.parts},
        "compiler": _counts(done),
        "bytes_moved": moved,
        "collectives": exchanged,
        "unknown_loops": len(module.unknown),
        "estimate": chips.estimate(chip, count, program.tokens, cost.passes, moved, sum(c["wire_bytes"] for c in exchanged)),
        "largest_buffers": buffers,
        "largest_arguments": _arguments(program),
        "seconds_to_compile": seconds,
    }
    return out | {"help": [] if out["fits"] else compile_advice.three(cfg, program, out, mesh)}


def _memory(program: programs.Program, done: Any, temporaries: int, chip: chips.Chip) -> dict[str, Any]:
    """Bytes per device. Of a program that was refused: arguments by their shapes, temporaries by the compiler's assignment."""
    beside = {name: programs.held_bytes(tree) for name, tree in program.beside.items()}
    if done is None:
        parts = {"argument": programs.held_bytes(program.args), "temp": temporaries, "output": 0, "aliased": 0, "code": 0, "host": 0}
    else:
        m = done.memory_analysis()
        host = m.host_argument_size_in_bytes + m.host_output_size_in_bytes - m.host_alias_size_in_bytes + m.host_temp_size_in_bytes
        sizes = (m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes)
        parts = dict(zip(("argument", "temp", "output", "aliased"), sizes, strict=True))
        parts |= {"code": m.generated_code_size_in_bytes, "host": host}
    peak = parts["argument"] + parts["output"] - parts["aliased"] + parts["temp"] + parts["code"] + sum(beside.values())
    sized = {f"{name}_bytes": value for name, value in parts.items()} | {"argument_bytes_unpadded": programs.held_bytes(program.args)}
    return {**sized, "beside": beside, "beside_bytes": sum(beside.values()), "peak_bytes": peak, "hbm_bytes": chip.hbm}


def _counts(done: Any) -> dict[str, Any]:
    if done is None:
        return {"note": "refused"}
    found = done.cost_analysis() or {}
    return {"flops": found.get("flops", 0.0), "bytes": found.get("bytes accessed", 0.0), "note": NOTE}


def _arguments(program: programs.Program, count: int = 8) -> list[dict[str, Any]]:
    """The largest arguments: name, shape of the whole, bytes per device."""
    leaves = jax.tree_util.tree_flatten_with_path(tuple(program.args))[0]
    sized = sorted(
        ((programs.held_bytes(x), jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves), key=lambda s: -s[0]
    )
    return [{"bytes": n, "name": re.sub(r"^\d+/", "", name), "shape": f"{x.dtype}{list(x.shape)}"} for n, name, x in sized[:count]]
