"""A sweep's folder, read: its finished cells, those that failed and those that are missing; success by axes and task length.

FOLDER/sweep.json              {"format": "a1jax.sweep/1", "name", "axes": {axis: [values in order]}, "cells": [names in order]}
FOLDER/cells/NAME/cell.json    {"format": "a1jax.cell/1", "name", "axes", "parameters", "train", "tasks", ...} of a finished cell
FOLDER/cells/NAME/failed.json  {"name", "axes", "error", "traceback"} of one that failed

Or one file (``pack``), lines of JSON in gzip: sweep.json, then every finished cell without its curves. Measured sweeps are kept so.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..config import ConfigError
from ..config_types import fit, suggest
from ..stages.evaluate import wilson

SWEEP, CELL = "a1jax.sweep/1", "a1jax.cell/1"
OF_TASKS = ("domain", "steps")  # what success may be told by beside a cell's axes: fields of its tasks
_NEEDED = {"name": str, "axes": dict[str, Any], "parameters": dict[str, int], "train": dict[str, Any], "tasks": list}
_OPTIONAL = {"curves": dict[str, list], "seconds": dict[str, float], "machine": str, "commit": str, "against": dict[str, Any]}
_TASK = {"domain": str, "steps": int, "task_id": str, "success": int}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One trained and judged model. axes: axis -> value. parameters: "total", "active" (used per token). train: "steps", "tokens",
    "flops", "longest_piece", "mean_piece", "feedback", ... tasks: one {"domain", "steps", "task_id", "success": 0 or 1, "status",
    "tokens"} per held-out task. curves: metric -> [[step, value], ...]. seconds: {"train", "evaluate"}. against: of an ablation's cell,
    {"value": the one it is compared with, "unchanged": whether that one leaves the experiment as it is}."""

    name: str
    axes: dict[str, Any]
    parameters: dict[str, int]
    train: dict[str, Any]
    tasks: tuple[dict[str, Any], ...]
    curves: dict[str, list] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    machine: str = ""
    commit: str = ""
    against: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A cell that failed and has not succeeded since. error: one line."""

    name: str
    axes: dict[str, Any]
    error: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    """axes: axis -> values, in order. cells: the finished ones, in order. missing: names of those neither finished nor failed.
    unlisted: finished cells in the folder that sweep.json does not name; they are not among ``cells``."""

    name: str
    axes: dict[str, list[Any]]
    cells: tuple[Cell, ...]
    failed: tuple[Failure, ...] = ()
    missing: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    folder: pathlib.Path | None = None


def load(folder: str | pathlib.Path) -> Sweep:
    """A sweep's folder, or its file. Raises ConfigError, one line, where there is none and for what is unreadable or of another format."""
    folder = pathlib.Path(folder)
    if folder.is_file():
        return _unpack(folder)
    written = _plan(folder)
    cells, failed, missing = [], [], []
    for name in written["cells"]:
        done, broken = folder / "cells" / name / "cell.json", folder / "cells" / name / "failed.json"
        if done.is_file():
            cell = from_json(_read(done, CELL), done)
            if cell.name != name:
                raise ConfigError(f"{done}: it calls itself {cell.name!r}; a cell lies in the folder of its name")
            cells.append(cell)
        elif broken.is_file():
            found = _read(broken, None)
            failed.append(Failure(name, dict(found.get("axes", {})), str(found.get("error", "it does not say"))))
        else:
            missing.append(name)
    listed = set(written["cells"])
    unlisted = sorted(path.parent.name for path in folder.glob("cells/*/cell.json") if path.parent.name not in listed)
    return Sweep(written["name"], written["axes"], tuple(cells), tuple(failed), tuple(missing), tuple(unlisted), folder)


def _plan(folder: pathlib.Path) -> dict[str, Any]:
    plan = folder / "sweep.json"
    if not plan.is_file():
        raise ConfigError(f"{folder}: no sweep.json in it; give the folder of a sweep")
    return _planned(_read(plan, SWEEP), plan)


def _planned(written: dict[str, Any], place: Any) -> dict[str, Any]:
    for key, kind in (("name", str), ("axes", dict[str, list]), ("cells", list[str])):
        _field(written, key, kind, place)
    return written


def pack(folder: str | pathlib.Path, file: str | pathlib.Path) -> pathlib.Path:
    """Writes a sweep's folder, finished or not, as one small file that ``load`` reads: all but the cells' curves and what failed."""
    folder, file = pathlib.Path(folder), pathlib.Path(file)
    lines = [_plan(folder)]
    for cell in load(folder).cells:
        lines.append(_read(folder / "cells" / cell.name / "cell.json", CELL))
        lines[-1].pop("curves", None)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(gzip.compress(text.encode(), mtime=0))  # equal sweeps give equal bytes
    part.replace(file)
    return file


def _unpack(file: pathlib.Path) -> Sweep:
    try:
        first, *rest = (json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines())
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{file}: no sweep in one file ({str(error).splitlines()[0]}); give what pack wrote, or a folder") from None
    if not isinstance(first, dict) or first.get("format") != SWEEP:
        raise ConfigError(f"{file}: its first line is no plan of format {SWEEP!r}; give what pack wrote, or a folder")
    written = _planned(first, file)
    cells = [from_json(line, f"{file}: line {number}") for number, line in enumerate(rest, 2)]
    done = {cell.name for cell in cells}
    missing = tuple(name for name in written["cells"] if name not in done)
    return Sweep(written["name"], written["axes"], tuple(cells), (), missing, (), file)


def from_json(written: dict[str, Any], place: Any) -> Cell:
    """The cell of a decoded cell.json; place: what an error names. Raises ConfigError for what a cell must have and it has not."""
    if written.get("format") != CELL:
        raise ConfigError(f"{place}: format {written.get('format')!r}, expected {CELL!r}")
    fields = {key: _field(written, key, kind, place) for key, kind in _NEEDED.items()}
    fields |= {key: _field(written, key, kind, place) for key, kind in _OPTIONAL.items() if written.get(key) is not None}
    for key in ("total", "active"):
        if fields["parameters"].get(key, 0) < 1:
            raise ConfigError(f"{place}: parameters.{key} is {fields['parameters'].get(key)}; a model has at least 1")
    for number, task in enumerate(fields["tasks"]):
        for key, kind in _TASK.items():
            if not isinstance(task, dict) or type(task.get(key)) is not kind:
                _field(task, key, kind, f"{place}: tasks.{number}")
        if task["success"] not in (0, 1):
            raise ConfigError(f"{place}: tasks.{number}.success is {task['success']}; it is 0 or 1")
    return Cell(**{**fields, "tasks": tuple(fields["tasks"])})


def _read(path: pathlib.Path, wanted: str | None) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to have it made again") from None
    if not isinstance(written, dict):
        raise ConfigError(f"{path}: holds a {type(written).__name__}, not an object; delete it to have it made again")
    if wanted is not None and written.get("format") != wanted:
        raise ConfigError(f"{path}: format {written.get('format')!r}, expected {wanted!r}")
    return written


def _field(written: dict[str, Any], key: str, kind: Any, place: Any) -> Any:
    if not isinstance(written, dict):
        raise ConfigError(f"{place}: got {written!r}, expected an object")
    if key not in written:
        raise ConfigError(f"{place}: no {key!r} in it")
    return fit(written[key], kind, f"{place}: {key}")


def where(cells: Iterable[Cell], **axes: Any) -> tuple[Cell, ...]:
    """The cells whose axes have these values; a list or tuple means any of them: ``where(cells, budget="tokens", size=("s", "m"))``.

    Raises ConfigError for an axis that no cell has; a value that no cell has gives no cells."""
    cells = tuple(cells)
    known = list(dict.fromkeys(axis for cell in cells for axis in cell.axes))
    for axis in axes:
        if cells and axis not in known:
            raise ConfigError(f"no cell has an axis {axis!r}{suggest(axis, known)}; axes are {', '.join(known)}")
    wanted = {axis: value if isinstance(value, (list, tuple)) else (value,) for axis, value in axes.items()}
    return tuple(cell for cell in cells if all(axis in cell.axes and cell.axes[axis] in values for axis, values in wanted.items()))


def origins(cells: Sequence[Cell], least: int = 2) -> str:
    """Which commits and machines cells come from, with their counts, most first: one sentence; "" where there are fewer than ``least`` of
    each. A cell that does not say is of an unknown one."""
    told = []
    for kind, plural, values in (("commit", "commits", [c.commit[:7] for c in cells]), ("machine", "machines", [c.machine for c in cells])):
        counts = Counter(value or "unknown" for value in values).most_common()
        if len(counts) >= least:
            each = "; ".join(f"{n} of {value}" for value, n in counts)
            told.append(f"{len(counts)} {plural if len(counts) > 1 else kind} ({each})")
    return f"Cells come from {' and '.join(told)}." if told else ""


def rates(cells: Iterable[Cell], by: Sequence[str] = ("size", "horizon", *OF_TASKS)) -> list[dict[str, Any]]:
    """One row per combination of ``by`` (axes of cells, and "domain" and "steps" of tasks) that occurs, in the order met:
    {**combination, "wins", "n", "success", "low", "high"}, pooled over all else with Wilson's interval as if runs were independent.

    A cell without one of the axes has None there."""
    found: dict[tuple, list[int]] = {}
    for cell in cells:
        for task in cell.tasks:
            key = tuple(task[name] if name in OF_TASKS else cell.axes.get(name) for name in by)
            count = found.setdefault(key, [0, 0])
            count[0] += task["success"]
            count[1] += 1
    return [{**dict(zip(by, key, strict=True)), **rate(wins, n)} for key, (wins, n) in found.items()]


def rate(wins: int, n: int) -> dict[str, Any]:
    """{"wins", "n", "success", "low", "high"} with Wilson's interval; n = 0 has success nan."""
    low, high = wilson(wins, n)
    return {"wins": wins, "n": n, "success": wins / n if n else float("nan"), "low": low, "high": high}
