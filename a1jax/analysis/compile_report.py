"""`a1jax compile`: the real programs of a stage, compiled for TPUs that need not be here, and what they take."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from ..config import ConfigError
from ..sharding import make_mesh
from ..stages import programs
from ..stages.pipeline import Experiment
from . import chips


def run(cfg: Experiment, topology: str, stages: tuple[str, ...], as_json: bool) -> int:
    """Prints the report of every program of the stages; the exit code is 1 where one does not fit."""
    devices, chip = chips.devices(topology)
    found = [measure(p, chip) for stage in stages for p in programs.of_stage(cfg, stage, place(cfg.mesh.shape, devices))]
    fits = all(p["fits"] for p in found)
    if as_json:
        worst = max(found, key=lambda p: p["peak_bytes"])
        print(json.dumps({"topology": topology, "chips": len(devices), "mesh": cfg.mesh.shape, **worst, "fits": fits, "programs": found}))
    else:
        for p in found:
            print(text(p))
    return 0 if fits else 1


def place(shape: dict[str, int], devices: list) -> programs.Place:
    """The mesh of that shape over all of the devices. Raises ConfigError for one of another size."""
    if not shape and len(devices) == 1:
        return programs.Place(None, devices[0])
    if not shape:
        raise ConfigError(f"mesh.shape is empty, the topology has {len(devices)} devices: --set 'mesh.shape={{\"fsdp\": {len(devices)}}}'")
    return programs.Place(make_mesh(shape, devices), devices[0])


def measure(program: programs.Program, chip: chips.Chip, mesh: Any = None) -> dict:
    """Compiles one program: what it takes, or that it does not fit."""
    import jax

    began = time.perf_counter()
    out: dict[str, Any] = {"stage": program.stage, "program": program.name, "hbm_bytes": chip.hbm, "tokens": program.tokens}
    leaf = next(x for x in jax.tree.leaves(program.args) if hasattr(x, "sharding"))
    on = programs.Place(getattr(leaf.sharding, "mesh", None), None)
    try:
        with on.on():
            compiled = program.fn.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - began
        wanted = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", str(error)) or re.search(r"Used ([\d.]+)([KMGT])", str(error))
        size = int(float(wanted[1]) * 1024 ** "_KMGT".index(wanted[2] or "_")) if wanted else 0
        refused = {"argument_bytes": None, "temp_bytes": size, "peak_bytes": size, "fits": False, "refused": str(error).splitlines()[0]}
        return out | refused | {"seconds_to_compile": seconds}
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + fresh + memory.temp_size_in_bytes
    return out | {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": peak,
        "fits": peak <= chip.hbm,
        "seconds_to_compile": time.perf_counter() - began,
    }


def text(p: dict) -> str:
    """The report of one program."""
    lines = [f"{p['stage']}/{p['program']}: {p['tokens']} tokens, compiled in {p['seconds_to_compile']:.0f} s"]
    if p["argument_bytes"] is None:
        lines.append(f"  refused: {p['refused']}")
    else:
        names = ("argument_bytes", "temp_bytes", "output_bytes", "aliased_bytes", "peak_bytes", "hbm_bytes")
        lines += [f"  {name.removesuffix('_bytes'):10} {p[name] / 1e9:10.3f} GB per chip" for name in names]
    return "\n".join([*lines, f"  {'fits' if p['fits'] else 'DOES NOT FIT'}"])
