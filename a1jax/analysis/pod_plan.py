"""Reports of `a1jax compile` in a notebook: memory by part, what is sent between chips, mesh shapes beside each other."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ..config import ConfigError
from . import made
from .compile_text import bytes_text
from .figures import Bars, Figure
from .shown import Drawn, Markup, Table, text

MISSING = (
    "The TPU compiler is not installed, so there is nothing to show: pip install libtpu (no TPU is needed), or give a folder of reports."
)
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
PARTS = ("arguments", "temporaries", "outputs", "code", "beside")


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program as ``compile_report`` tells it, with the topology and the mesh it was compiled for. name: of its file."""

    name: str
    topology: str
    mesh: dict[str, int]
    program: dict[str, Any]

    @property
    def label(self) -> str:
        shape = " ".join(f"{axis}={n}" for axis, n in self.mesh.items()) or "one device"
        return f"{self.program['stage']} {self.program['program']}, {shape}"


@dataclasses.dataclass(frozen=True)
class Plans:
    """reports: every program of every mesh shape that was compiled. impossible: (topology, mesh, reason). note: why there are none."""

    reports: tuple[Report, ...]
    impossible: tuple[tuple[str, dict[str, int], str], ...] = ()
    note: str = ""


def plans(
    given: str | pathlib.Path | None,
    experiment: str,
    topology: str,
    shapes: Sequence[dict[str, int]],
    into: str | pathlib.Path,
    stage: str = "sft",
    changes: Sequence[str] = (),
) -> Plans:
    """The reports in the folder or file ``given``; None: of a stage of ``experiment`` compiled for ``topology`` under each of ``shapes``,
    kept in ``into``. Without the TPU compiler there are none, which ``note`` says."""
    if given is not None:
        return read(pathlib.Path(given))
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        return Plans((), note=MISSING)
    words = ["compile", str(experiment), "--topology", topology, "--stage", stage, "--sweep", json.dumps(list(shapes)), "--json"]
    words += ["--set", *changes] if changes else []
    name = f"{pathlib.Path(experiment.partition(':')[0]).stem}-{stage}-{topology.replace(':', '-')}.json"
    return parsed(name, made.saved(pathlib.Path(into) / name, words, good=(0, 1)))


def read(path: pathlib.Path) -> Plans:
    """Of what `a1jax compile ... --json` printed into a file, or into the *.json files of a folder; sweeps and single reports alike.

    Raises ConfigError for a path without any, and for a file that is no report."""
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise ConfigError(f"{path}: no *.json there; save what `a1jax compile FILE --topology NAME --json` prints")
    found = []
    for file in files:
        try:
            printed = json.loads(file.read_text())
            found.append(parsed(file.stem, printed.get("printed", printed)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}: no report of `a1jax compile --json` ({type(error).__name__}: {error})") from None
    return Plans(tuple(r for p in found for r in p.reports), tuple(i for p in found for i in p.impossible))


def parsed(name: str, printed: dict[str, Any]) -> Plans:
    """One printed object: a report, or the rows of a sweep."""
    topology, reports, impossible = printed["topology"], [], []
    for row in printed.get("sweep", [printed]):
        if "reason" in row:
            impossible.append((topology, row["mesh"], row["reason"]))
        else:
            reports += [Report(name, topology, row["mesh"], program) for program in row["programs"]]
    return Plans(tuple(reports), tuple(impossible))


def parts(program: dict[str, Any]) -> dict[str, int]:
    """Bytes per device by part, which add up to the peak. outputs: those that are not written over arguments. beside: what the stage keeps
    besides the program."""
    outputs = program["output_bytes"] - program["aliased_bytes"]
    values = (program["argument_bytes"], program["temp_bytes"], outputs, program["code_bytes"], program["beside_bytes"])
    return dict(zip(PARTS, values, strict=True))


def memory(found: Plans) -> Table:
    """Bytes per device by part, and whether they fit; number: of the bar in ``memory_figure``."""
    rows = []
    for number, r in enumerate(found.reports, start=1):
        p = r.program
        rows.append(
            (
                number,
                r.topology,
                r.label,
                *map(bytes_text, parts(p).values()),
                bytes_text(p["peak_bytes"]),
                bytes_text(p["hbm_bytes"]),
                p["fits"],
            )
        )
    return Table("Memory per device", ("number", "topology", "program", *PARTS, "peak", "HBM", "fits"), tuple(rows), found.note)


def memory_figure(found: Plans) -> Drawn:
    """The same as bars, numbered as there; a panel for each topology."""
    by: dict[str, list[Report]] = {}
    for r in found.reports:
        by.setdefault(r.topology, []).append(r)
    number = {id(r): str(i) for i, r in enumerate(found.reports, start=1)}
    panels = []
    for topology, reports in by.items():
        unit, size = next((u, n) for u, n in UNITS if max(r.program["peak_bytes"] for r in reports) >= n)
        each = [parts(r.program) for r in reports]
        heights = {name: tuple(p[name] / size for p in each) for name in PARTS}
        hbm = bytes_text(max(r.program["hbm_bytes"] for r in reports))
        panels.append(Bars(f"{topology}: {hbm} of HBM a device", f"{unit} per device", tuple(number[id(r)] for r in reports), heights))
    caption = "As the compiler has laid them out; numbers as in the table. outputs: those that do not take the place of arguments; "
    caption += "beside: what the stage keeps besides."
    return Drawn(Figure("memory", "Memory by part", found.note or caption, tuple(panels)))


def collectives(found: Plans) -> Table:
    """What is sent between chips in one call of each program, by kind and mesh axes."""
    rows = [
        (r.label, c["kind"], c["axes"], c["count"], bytes_text(c["bytes"]), bytes_text(c["wire_bytes"]))
        for r in found.reports
        for c in r.program["collectives"]
    ]
    return Table("Between chips, per device and call", ("program", "kind", "axes", "count", "result", "sent"), tuple(rows), found.note)


def shapes(found: Plans) -> Table:
    """Mesh shapes by estimated speed, the fastest first; those that are impossible with their reason."""
    rows = []
    order = sorted(found.reports, key=lambda r: (not r.program["fits"], -r.program["estimate"]["tokens_per_second_per_chip"]))
    for r in order:
        e = r.program["estimate"]
        rows.append(
            (
                r.topology,
                r.label,
                e["tokens_per_second_per_chip"],
                e["bound_by"],
                bytes_text(r.program["peak_bytes"]),
                r.program["fits"],
                "",
            )
        )
    for topology, mesh, reason in found.impossible:
        rows.append((topology, " ".join(f"{axis}={n}" for axis, n in mesh.items()), None, None, None, None, reason))
    columns = ("topology", "program and mesh", "tokens/s a chip", "bound by", "peak", "fits", "why not")
    note = found.note or (f"Times are {found.reports[0].program['estimate']['assumption']}." if found.reports else "")
    return Table("Mesh shapes", columns, tuple((*row[:2], None if row[2] is None else round(row[2]), *row[3:]) for row in rows), note)


def largest(found: Plans, count: int = 5) -> Table:
    """The largest temporaries and arguments of each program, and what would help one that does not fit."""
    rows = []
    for r in found.reports:
        p = r.program
        rows += [(r.label, "temporary", bytes_text(b["bytes"]), b["shape"], b["scope"]) for b in p["largest_buffers"][:count]]
        rows += [(r.label, "argument", bytes_text(b["bytes"]), b["shape"], b["name"]) for b in p["largest_arguments"][:count]]
        rows += [(r.label, "would help", "", "", line) for line in p["help"]]
    return Table("What takes the most", ("program", "what", "bytes", "shape", "where"), tuple(rows), found.note)


def programs(found: Plans) -> Markup:
    """Everything that is known of each program, as `a1jax compile` prints it."""
    from . import compile_text

    return text("\n\n".join(compile_text.program(r.program) for r in found.reports) or found.note)
