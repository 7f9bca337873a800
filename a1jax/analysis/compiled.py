"""The memory of a compiled program: bytes through HBM, and its largest temporaries by name."""

from __future__ import annotations

import pathlib
import re

from .hlo_text import Module, Op, size, tuple_parts

NOT_MOVED = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all", "partition-id",
             "async-update", "optimization-barrier", "iota"}  # fmt: skip
NOTHING = ('custom_call_target="AllocateBuffer"', 'custom_call_target="AssumeGatherIndicesInBound"')


def bytes_moved(module: Module) -> int:
    """Bytes through HBM in one call: operands and results of every operation outside fusions, loops multiplied in. Of what a fusion only
    slices it reads the slice, of what it updates in place it writes the update; a kernel reads and writes its arguments once."""
    inside = ("fusion", "async-start")
    fused = {op.attribute("calls") for ops in module.computations.values() for op in ops if op.kind in inside}
    total = 0.0
    for name, ops in module.computations.items():
        if module.trips[name] and name not in fused:
            types = {op.name: op.type for op in ops}
            total += module.trips[name] * sum(_moved(op, types, module) for op in ops)
    return round(total)


def _moved(op: Op, types: dict[str, str], module: Module) -> int:
    if op.kind in NOT_MOVED or op.kind.endswith("-done") or any(target in op.rest for target in NOTHING):
        return 0
    if op.kind == "async-start":  # a gather beside the program: ((what is read from, indices), result, ...)
        return 2 * _held(tuple_parts(op.type)[1])
    if op.kind.endswith("-start"):  # (result, operand, ...)
        return sum(_held(part) for part in tuple_parts(op.type)[:2])
    if op.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * _held(op.type)
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2 * _held(types.get(op.operands[1 if op.kind == "dynamic-update-slice" else -1], ""))
    inside = op.attribute("calls") if op.kind == "fusion" else None
    if inside not in module.computations:
        return _held(op.type) + sum(_held(types.get(name, "")) for name in op.operands)
    read = sum(min(_held(types.get(name, "")), _read(inside, i, module)) for i, name in enumerate(op.operands))
    parts = tuple_parts(op.type) if op.type.startswith("(") else [op.type]
    return read + sum(min(_held(part), new) for part, new in zip(parts, _written(inside, module), strict=False))


def _held(text: str) -> int:
    return size(text, spaces=(0,))


def _read(computation: str, index: int, module: Module) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    inner = module.computations[computation]
    parameter = next((p for p in inner if p.kind == "parameter" and p.rest.startswith(f"{index})")), None)
    if parameter is None:
        return 0
    total, whole = 0, size(parameter.type)
    for user, name in _readers(parameter.name, inner):
        first = user.operands[0] == name
        if user.kind == "dynamic-slice" and first:
            total += size(user.type)
        elif user.kind == "fusion":
            total += sum(_read(user.attribute("calls"), i, module) for i, other in enumerate(user.operands) if other == name)
        elif not (user.kind == "dynamic-update-slice" and first):
            total += whole
    return min(total, whole)


def _written(computation: str, module: Module) -> list[int]:
    """Bytes that a fusion writes of each of its results: all of it, or the update where a parameter is updated in place."""
    inner = {op.name: op for op in module.computations[computation]}
    root = next(op for op in inner.values() if op.root)
    out = []
    for name in root.operands if root.kind == "tuple" else (root.name,):
        op = _source(inner, name)
        if op.kind == "fusion":
            out.append(_written(op.attribute("calls"), module)[0])
        elif op.kind == "dynamic-update-slice" and _source(inner, op.operands[0]).kind == "parameter":
            out.append(size(inner[op.operands[1]].type))
        else:
            out.append(size(op.type))
    return out


def _source(inner: dict[str, Op], name: str) -> Op:
    op = inner[name]
    return _source(inner, op.operands[0]) if op.kind == "bitcast" and op.operands[0] in inner else op


def _readers(name: str, inner: list[Op]) -> list[tuple[Op, str]]:
    """Who reads a value inside a fusion, through bitcasts, and under which name."""
    out: list[tuple[Op, str]] = []
    for op in inner:
        if name in op.operands:
            out += _readers(op.name, inner) if op.kind == "bitcast" else [(op, name)]
    return out


def largest_buffers(folder: pathlib.Path, module: Module, count: int = 8) -> list[dict]:
    """The largest pieces of the temporary memory, none of which overlap: bytes, shape, and the scope of what lies there (of the largest of
    those that take turns). From the compiler's own assignment of buffers, which it also writes for a program that it refuses."""
    scopes = _scopes(module)
    value = re.compile(r" value: <\d+ (\S+?)(?:\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\w+\[\S*)")
    found, reading = [], False
    for line in newest(folder, "after_optimizations-buffer-assignment.txt").read_text().splitlines():
        if line.startswith("allocation "):
            reading = _is_temporary(line)
        elif reading and (m := value.match(line)):
            found.append((int(m[2]), int(m[3]), "%" + m[1], m[4]))
    taken: list[tuple[int, int]] = []
    out = []
    for bytes_, at, name, shape in sorted(found, key=lambda f: (-f[0], f[2].startswith("%while"))):
        if len(out) == count:
            break
        if all(at + bytes_ <= start or at >= stop for start, stop in taken):
            taken.append((at, at + bytes_))
            out.append({"bytes": bytes_, "shape": shape.split("{")[0], "scope": (scopes.get(name) or name).replace("\\", "")})
    return out


def temporary_bytes(folder: pathlib.Path) -> int:
    """Bytes of HBM for temporaries, as assigned."""
    text = newest(folder, "after_optimizations-buffer-assignment.txt").read_text()
    lines = (line for line in text.splitlines() if line.startswith("allocation ") and _is_temporary(line))
    return sum(int(re.search(r"size (\d+)", line)[1]) for line in lines)


def _is_temporary(line: str) -> bool:
    return "preallocated-temp" in line and (", color " not in line or ", color 0," in line)


def _scopes(module: Module) -> dict[str, str]:
    """Scope of every operation; one that the compiler made has that of who reads it, or of who calls the computation it stands in."""
    callers = {op.attribute("calls"): op.name for ops in module.computations.values() for op in ops if op.attribute("calls")}
    scopes: dict[str, str] = {}
    for ops in module.computations.values():
        for op in reversed(ops):
            own = op.scope or scopes.get(op.name, "")
            scopes[op.name] = own
            for name in op.operands if op.kind not in ("while", "tuple") else ():
                scopes[name] = scopes.get(name) or own
    for computation, ops in module.computations.items():
        for op in ops:
            scopes[op.name] = scopes[op.name] or scopes.get(callers.get(computation, ""), "")
    return scopes


def newest(folder: pathlib.Path, ending: str) -> pathlib.Path:
    """The last file of a dump with that ending. Raises FileNotFoundError where the compiler wrote none."""
    files = sorted(folder.glob(f"*.{ending}"))
    if not files:
        raise FileNotFoundError(f"the compiler wrote no {ending}")
    return files[-1]
