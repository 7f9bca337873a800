"""`a1jax compile --sweep`: the same programs under many mesh shapes.

As JSON: {"topology", "chips", "devices", "sweep": [row, ...]}, a row with "mesh" and either "reason" (why the shape is impossible) or
"tokens_per_second_per_chip", "step_seconds", "bound_by", "fits", "peak_bytes", "hbm_bytes", "seconds_to_compile" and "programs" as in
``compile_report``. The programs of one shape count one call each, one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from typing import Any

from ..config import ConfigError
from ..stages import programs
from ..stages.pipeline import Experiment
from ..stages.setting import MeshConfig
from . import chips, compile_report

AXES = ("data", "fsdp", "expert", "context", "tensor")


def shapes(text: str, devices: int, cfg: Experiment) -> list[dict[str, int]]:
    """The shapes to try: the list that ``text`` is, or, where it is empty, all sensible ones. Raises ConfigError for another text."""
    if not text:
        return sensible(devices, cfg)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f'--sweep {text}: not a list of mesh shapes ({error}); write e.g. \'[{{"fsdp": 4, "expert": 2}}]\'') from None
    if (
        not isinstance(found, list)
        or not all(isinstance(s, dict) and all(isinstance(n, int) for n in s.values()) for s in found)
        or not found
    ):
        raise ConfigError(f'--sweep {text}: not a list of mesh shapes; write e.g. \'[{{"fsdp": 4, "expert": 2}}]\'')
    return found


def sensible(devices: int, cfg: Experiment) -> list[dict[str, int]]:
    """Every way to write the number of devices as fsdp x expert x context x tensor, with tensor at most the number of key/value heads
    (beyond it keys and values are copied) or 2. These axes cut the experts; where there are too few, data takes the least that is left."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    data = next(n for n in divisors if cfg.model.num_experts % (devices // n) == 0)
    out = []
    for expert, context, tensor in itertools.product(divisors, divisors, divisors):
        rest = data * expert * context * tensor
        if devices % rest or tensor > max(2, cfg.model.num_kv_heads):
            continue
        shape = dict(zip(AXES, (data, devices // rest, expert, context, tensor), strict=True))
        out.append({name: n for name, n in shape.items() if n > 1})
    return out


def sweep(cfg: Experiment, topology: str, stages: tuple[str, ...], text: str) -> dict[str, Any]:
    """Compiles the stages under every shape; one that is impossible has its reason in its place."""
    devices, chip = chips.devices(topology)
    rows = []
    for shape in shapes(text, len(devices), cfg):
        print(f"a1jax: compiling for mesh {shape}", file=sys.stderr)
        rows.append(_row(cfg, shape, devices, chip, stages))
    rows.sort(key=lambda r: ("reason" in r, not r.get("fits"), -r.get("tokens_per_second_per_chip", 0.0)))
    return {"topology": topology, "chips": len(devices) // chip.cores, "devices": len(devices), "sweep": rows}


def _row(cfg: Experiment, shape: dict[str, int], devices: list, chip: chips.Chip, stages: tuple[str, ...]) -> dict[str, Any]:
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(shape))
    try:
        where = compile_report.place(shape, devices)
        todo = [p for stage in stages for p in programs.of_stage(cfg, stage, where)]
        found = [compile_report.measure(p, where, chip, len(devices), cfg) for p in todo]
    except ConfigError as error:
        return {"mesh": shape, "reason": " ".join(str(error).split())}
    seconds = math.fsum(p["estimate"]["step_seconds"] for p in found)
    slowest = max(found, key=lambda p: p["estimate"]["step_seconds"])
    return {
        "mesh": shape,
        "fits": all(p["fits"] for p in found),
        "peak_bytes": max(p["peak_bytes"] for p in found),
        "hbm_bytes": chip.hbm,
        "step_seconds": seconds,
        "tokens_per_second_per_chip": max(p["tokens"] for p in found) / seconds * chip.cores / len(devices),
        "bound_by": slowest["estimate"]["bound_by"],
        "seconds_to_compile": sum(p["seconds_to_compile"] for p in found),
        "programs": found,
    }
