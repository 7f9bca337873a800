"""The collectives of a compiled program: by kind and by the mesh axes whose devices take part together."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .hlo_text import Module, Op, size, tuple_parts

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")


def of_module(module: Module, mesh: dict[str, int]) -> list[dict]:
    """One entry for each kind and mesh axes, loops multiplied in: count, bytes (of results, per device), wire_bytes (what each device sends
    in a ring: all-gather and reduce-scatter (g - 1) / g of the whole, all-reduce twice that, all-to-all as all-gather), largest: the most
    bytes of one and the scope that it comes from. axes joined by "+"; "other" for groups that no axes make, "" without a mesh."""
    found: dict[tuple[str, str], dict] = {}
    for computation, ops in module.computations.items():
        runs = module.trips[computation]
        for op in ops:
            kind = op.kind.removesuffix("-start")
            if not runs or kind not in KINDS:
                continue
            group, axes = groups(op, mesh)
            moved = result_bytes(op, kind)
            entry = found.setdefault(
                (kind, axes), {"kind": kind, "axes": axes, "count": 0, "bytes": 0, "wire_bytes": 0, "largest": (0, "")}
            )
            entry["count"] += round(runs)
            entry["bytes"] += round(runs * moved)
            entry["wire_bytes"] += round(runs * wire(kind, moved, group))
            entry["largest"] = max(entry["largest"], (moved, op.scope))
    return sorted(found.values(), key=lambda e: -e["wire_bytes"])


def result_bytes(op: Op, kind: str) -> int:
    """Bytes of what one collective gives one device."""
    if op.kind.endswith("-start") and op.type.startswith("("):  # (operands, results, ...): the results are the larger or equal half
        parts = tuple_parts(op.type)
        if kind == "all-reduce":
            return size(op.type)
        return size(parts[1]) if len(parts) > 1 else size(op.type)
    return size(op.type)


def wire(kind: str, moved: float, group: int) -> float:
    """Bytes that a device sends, for a result of so many bytes among ``group`` devices."""
    share = (group - 1) / group if group else 0.0
    if kind == "all-reduce":
        return 2 * share * moved
    if kind == "reduce-scatter":  # its result is one part
        return share * group * moved
    return moved if kind in ("collective-permute", "collective-broadcast") else share * moved


def groups(op: Op, mesh: dict[str, int]) -> tuple[int, str]:
    """(devices that take part together, the mesh axes that make such groups). Devices are numbered in the mesh's order."""
    sizes = list(mesh.values()) or [1]
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", op.rest)
    if pairs:
        ends = np.array([[int(n) for n in p.split(",")] for p in re.findall(r"\{(\d+,\d+)\}", pairs[1])])
        places = np.stack(np.unravel_index(ends, sizes), -1)
        return len(ends), _named(mesh, (places[:, 0] != places[:, 1]).any(0))
    first = _first_group(op.rest)
    if first is None:
        return math.prod(sizes), "+".join(name for name, n in mesh.items() if n > 1)
    places = np.stack(np.unravel_index(first, sizes), -1)
    varies = (places != places[:1]).any(0)
    whole = math.prod(n for n, v in zip(sizes, varies, strict=True) if v)
    return len(first), _named(mesh, varies) if whole == len(first) else "other"


def _named(mesh: dict[str, int], which: Sequence[bool]) -> str:
    return "+".join(name for name, yes in zip(mesh, which, strict=False) if yes)


def _first_group(rest: str) -> np.ndarray | None:
    """The group of the first device, in any of the three notations; None where all devices are one group."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return np.array([int(n) for n in listed[1].split(",")])
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0]
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(?\[?[\d,]*\]?<=\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)? ?\{([^}]*)\}", rest
    )
    if named:
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(axes.values()))
        return _of_axes(ids, axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[4]))
    return None


def _iota(shape: str, order: str | None) -> np.ndarray:
    dims = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _of_axes(ids: np.ndarray, axes: dict[str, int], chosen: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """The devices of the first group over some axes, or parts of axes (name, what lies before the part, its size)."""
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, before, n in chosen:
        parts[name].append((int(before), int(n)) if n else (1, axes[name]))
    keep = []
    for name, whole in axes.items():
        at = np.arange(whole)
        free = np.zeros(whole, bool)
        free[0] = True
        for before, n in parts[name]:
            step = whole // (before * n)
            free = free | False
            moves = [i * step for i in range(n)]
            free[[a + m for a in at[free] for m in moves if a + m < whole]] = True
        keep.append(np.flatnonzero(free))
    return ids.reshape(list(axes.values()))[np.ix_(*keep)].reshape(-1)
