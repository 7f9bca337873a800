"""The text of a compiled program (HLO), read: computations, their operations, and how often each runs.

Loops: a while runs as often as its backend_config says, else as its condition tells (a counter compared with a constant, counted from the
constant it starts from). Loops whose number of trips is not in the text count once and are reported. Of the branches of a conditional every
one counts, which is the most that can happen.
"""

from __future__ import annotations

import dataclasses
import math
import re

WIDTH = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?(%[\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|true_computation=(%[\w.\-]+), false_computation=(%[\w.\-]+))")
_NAME = re.compile(r"%[\w.\-]+")


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation. type: as written; rest: everything behind its operands."""

    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    root: bool
    inside: str

    @property
    def scope(self) -> str:
        """Where it comes from in the program, as named scopes tell; empty where the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(%[\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: name -> operations in order; trips: computation -> how often it runs in one call; unknown: loops without a count."""

    computations: dict[str, list[Op]]
    entry: str
    trips: dict[str, float]
    unknown: tuple[str, ...]


def arrays(type_text: str) -> list[tuple[str, tuple[int, ...], int]]:
    """(element type, shape, memory space) of every array of a type, of tuples too. Space 0 is HBM, 1 VMEM, 5 the host."""
    out = []
    for kind, shape, layout in _ARRAY.findall(type_text):
        if kind in WIDTH:
            space = re.search(r"S\((\d+)\)", layout)
            out.append((kind, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n), int(space[1]) if space else 0))
    return out


def size(type_text: str, spaces: tuple[int, ...] | None = None) -> int:
    """Bytes of a type's arrays, without padding; spaces: only of those in these memories."""
    found = ((kind, shape) for kind, shape, space in arrays(type_text) if spaces is None or space in spaces)
    return sum(math.ceil(WIDTH[kind] * math.prod(shape)) for kind, shape in found)


def tuple_parts(text: str) -> list[str]:
    """The types that a tuple's type consists of."""
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (depth == 0 and letter == ")"):
            parts.append(text[start:i].strip())
            start = i + 1
    return parts


def read(text: str) -> Module:
    """Raises ValueError for a text without an entry computation."""
    computations: dict[str, list[Op]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if line[:1] in ("%", "E") and line.rstrip().endswith("{"):
            head = line.removeprefix("ENTRY ")
            current = head.split(" ", 1)[0]
            entry = current if line.startswith("ENTRY ") else entry
            computations[current] = []
        elif line.startswith("  ") and current:
            op = _op(line.strip(), current)
            if op is not None:
                computations[current].append(op)
    if not entry:
        raise ValueError("no ENTRY computation in this text: is it a compiled program?")
    trips, unknown = _trips(computations, entry)
    return Module(computations, entry, trips, unknown)


def _op(line: str, inside: str) -> Op | None:
    root, line = line.startswith("ROOT "), line.removeprefix("ROOT ")
    name, separator, rest = line.partition(" = ")
    if not separator or not name.startswith("%"):
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    kind, _, rest = rest.partition("(")
    stop = _closing("(" + rest, 0) - 1
    operands = tuple(_NAME.findall(rest[:stop]))
    return Op(name, type_text, kind, operands, rest if kind in ("constant", "parameter") else rest[stop:], root, inside)


def _closing(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _trips(computations: dict[str, list[Op]], entry: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Every computation's runs. One that is called stands before its caller in the text."""
    runs, unknown = dict.fromkeys(computations, 0.0), []
    runs[entry] = 1.0
    for name in reversed([*(n for n in computations if n != entry), entry]):
        for op in computations[name]:
            often = runs[name]
            if op.kind in ("async-update", "async-done") or not often:
                continue
            if op.kind == "while":
                count = loop_trips(op, computations)
                if count is None:
                    unknown.append(op.name)
                often *= 1 if count is None else count
            branches = _BRANCHES.search(op.rest)
            called = _CALLED.findall(op.rest) + (_NAME.findall(branches[0]) if branches else [])
            for other in called:
                if other in runs:
                    runs[other] += often
    return runs, tuple(unknown)


def loop_trips(loop: Op, computations: dict[str, list[Op]]) -> int | None:
    """How often a loop's body runs, None where its text does not say."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = {op.name: op for op in computations.get(loop.attribute("condition") or "", ())}
    root = next((op for op in condition.values() if op.root), None)
    if root is None:
        return None
    test, sides = root, [condition.get(name) for name in root.operands]
    if root.kind == "fusion":
        test = next((op for op in computations.get(root.attribute("calls") or "", ()) if op.root), root)
    limit = next((int(m[1]) for op in sides if op and op.kind == "constant" and (m := _constant(op))), None)
    counter = next((op for op in sides if op and op.kind == "get-tuple-element"), None)
    if test.kind != "compare" or "direction=LT" not in test.rest or limit is None or counter is None:
        return None
    start = _start(loop, int(re.search(r"index=(\d+)", counter.rest)[1]), computations)
    return max(0, limit - start)


def _start(loop: Op, index: int, computations: dict[str, list[Op]]) -> int:
    """The constant that a loop's counter starts from; 0, as jax's loops do, where it is not written as one."""
    around = {op.name: op for op in computations[loop.inside]}
    carried = around.get(loop.operands[0])
    if carried is None or carried.kind != "tuple" or index >= len(carried.operands):
        return 0
    at = around.get(carried.operands[index])
    while at is not None and at.kind in ("copy", "bitcast", "convert"):
        at = around.get(at.operands[0])
    found = _constant(at) if at is not None and at.kind == "constant" else None
    return int(found[1]) if found else 0


def _constant(op: Op) -> re.Match | None:
    return re.match(r"(-?\d+)\)", op.rest)  # what stands between a constant's brackets is its value
