"""Sweeps: many small independent runs, the cells of a grid, each of which leaves one JSON file.

    <workdir>/sweep.json                {"format": "a1jax.sweep/1", "name", "axes": {axis: [values in order]}, "cells": [names in order]}
    <workdir>/cells/NAME/cell.json      a finished cell: {"format": "a1jax.cell/1", "name", "axes", ...what its function returned,
                                        "machine", "commit"}
    <workdir>/cells/NAME/failed.json    one that failed: {"name", "axes", "error", "traceback"}; tried again at the next start

A start runs the cells of its shard that have no cell.json, one after the other. Shards share nothing but the folder: they may run side
by side on machines that see it, or one after the other, also cut in another number of shards than before. A cell that was stopped goes on
as its function knows how to, from what lies in cells/NAME.
Several starts on one machine need no shards: each takes the next cell that no living process holds (cells/NAME/.lock). Cells that would
wait for what another process is making are put off for as long as there are others.
A finished cell is not run again after a change of code; its commit is in it, and what reads a sweep says how many cells are of which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
import pathlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from .. import interruption, provenance
from ..config import Binding, ConfigError

FORMAT, CELL_FORMAT = "a1jax.sweep/1", "a1jax.cell/1"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell to be run. run(config, axes, workdir) -> what is written of it but name, axes, machine and commit; it may keep in workdir what
    it wants to go on from, in a folder ``stages``, which is removed in the end. cost: in any unit, to foretell the time that is left.
    busy(config, workdir): whether run would wait for another process now; None: it never does."""

    name: str
    axes: dict[str, Any]
    config: Any
    run: Callable[[Any, dict[str, Any], pathlib.Path], dict[str, Any]]
    cost: float = 1.0
    busy: Callable[[Any, pathlib.Path], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Sweep:
    name: str  # default run directory: runs/<name>
    main: Binding  # what a run does with this config: a function of (cfg, workdir), such as ``run``
    cells: Binding  # a function of nothing that returns the cells (Planned), in the order in which they are run
    shard: str = "0/1"  # i/n: this start runs every n-th cell, from the i-th; may differ from start to start
    only: tuple[str, ...] = ()  # patterns of cell names, such as ("nano_16-*",): this start runs no others; may differ from start to start
    keep_stages: bool = False  # keep parameters and checkpoints of finished cells

    def __post_init__(self):
        shard_of(self.shard)


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ConfigError for anything but 0 <= i < n."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ConfigError(f"shard is '{text}'; write i/n with i from 0 to n - 1, such as 0/2 and 1/2")
    return int(i), int(n)


def run(cfg: Sweep, workdir: pathlib.Path) -> dict[str, list[str]]:
    """Runs what this shard has not finished yet; {"finished": names, "failed": names} of the whole sweep afterwards.

    Whatever a cell raises is written down and the next one begins, but for a request to stop. Raises ConfigError for cells that share a
    name, or for a folder that holds other cells."""
    if jax.process_count() > 1:
        raise ConfigError("a sweep's cells run in one process each: start it without --coordinator, several times, or as shards")
    workdir, planned = pathlib.Path(workdir), list(cfg.cells())
    write_plan(cfg.name, planned, workdir)
    i, n = shard_of(cfg.shard)
    asked = [cell for cell in planned if not cfg.only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in cfg.only)]
    if not asked:
        raise ConfigError(f"only: no cell has a name like {' or '.join(cfg.only)}; the first one is {planned[0].name}")
    mine = [cell for cell in asked[i::n] if not _file(workdir, cell).exists()]
    entry = provenance.collect([], None)
    facts = {"machine": _machine(entry), "commit": entry["commit"]}
    started, began = time.time(), time.perf_counter()
    print(f"{cfg.name}, shard {cfg.shard}: {len(mine)} of {len(asked[i::n])} cells to run", flush=True)
    waiting = list(mine)
    for number in range(1, len(mine) + 1):
        cell = waiting.pop(_next(waiting, workdir))
        since = time.perf_counter()
        with claim(workdir, cell) as free:
            if not free or _failed_since(workdir, cell, started):
                continue
            outcome = run_cell(cell, workdir, facts, cfg.keep_stages)
        now = time.perf_counter()
        print(
            f"{number}/{len(mine)} {cell.name}: {outcome}, {now - since:.0f} s; {_time_left(workdir, mine, now - began, started)}",
            flush=True,
        )
        interruption.point()
    return summary(planned, workdir)


def _time_left(workdir: pathlib.Path, mine: Sequence[Planned], seconds: float, started: float) -> str:
    """By what has been finished of these cells, or failed, in the seconds since the start, whoever did it."""
    left = sum(cell.cost for cell in mine if not (_file(workdir, cell).exists() or _failed_since(workdir, cell, started)))
    done = sum(cell.cost for cell in mine) - left
    return f"about {seconds / done * left / 60:.0f} min left" if done else "nothing finished yet"


def _next(waiting: Sequence[Planned], workdir: pathlib.Path) -> int:
    """Which of them is to be run: the first that need not wait, else the first, which then waits."""
    return next((i for i, cell in enumerate(waiting) if not (cell.busy and cell.busy(cell.config, _file(workdir, cell).parent))), 0)


def _failed_since(workdir: pathlib.Path, cell: Planned, started: float) -> bool:
    """Whether another process has tried it in the meantime: it is tried once a start."""
    file = _file(workdir, cell).with_name("failed.json")
    return file.exists() and file.stat().st_mtime > started


@contextlib.contextmanager
def claim(workdir: pathlib.Path, cell: Planned) -> Iterator[bool]:
    """Whether the cell is ours to run: nobody has finished it, and no living process of this machine is at it. Held until the end of the
    block; a process that dies lets go."""
    file = _file(workdir, cell).with_name(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not _file(workdir, cell).exists()


def run_cell(cell: Planned, workdir: pathlib.Path, facts: dict[str, Any], keep_stages: bool = False) -> str:
    """Runs one cell and writes its cell.json, or failed.json; one line on how it went."""
    folder = workdir / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    head = {"name": cell.name, "axes": cell.axes}
    try:
        found = cell.run(cell.config, cell.axes, folder)
        write_json(folder / "cell.json", {"format": CELL_FORMAT, **head, **found, **facts})
    except Exception as error:  # a stop is none
        line = " ".join(f"{type(error).__name__}: {error}".split())
        write_json(folder / "failed.json", {**head, "error": line, "traceback": traceback.format_exc()})
        return f"failed, {line[:200]}"
    (folder / "failed.json").unlink(missing_ok=True)
    if not keep_stages:
        shutil.rmtree(folder / "stages", ignore_errors=True)
    return str(found.get("summary", "finished"))


def write_plan(name: str, planned: Sequence[Planned], workdir: pathlib.Path) -> None:
    """sweep.json. Raises ConfigError where two cells share a name, or where the folder holds a sweep of other cells."""
    names = [cell.name for cell in planned]
    if not names:
        raise ConfigError(f"sweep {name} has no cells; give every axis a value")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"sweep {name} has several cells named {twice[0]}; a name must say all that differs")
    plan = {"format": FORMAT, "name": name, "axes": axes_of(planned), "cells": names}
    file = workdir / "sweep.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before["cells"] != names:
            gone = [n for n in before["cells"] if n not in names] or [n for n in names if n not in before["cells"]] or names
            raise ConfigError(f"{workdir}: holds a sweep of other cells ({gone[0]} is in one of the two only); choose another --workdir")
        return
    write_json(file, plan)


def axes_of(planned: Sequence[Planned]) -> dict[str, list[Any]]:
    """Axis -> its values: numbers ascending, others in the order of their first cell."""
    axes: dict[str, list[Any]] = {}
    for cell in planned:
        for axis, value in cell.axes.items():
            values = axes.setdefault(axis, [])
            if value not in values:
                values.append(value)
    return {axis: values if any(isinstance(v, str) for v in values) else sorted(values) for axis, values in axes.items()}


def summary(planned: Sequence[Planned], workdir: pathlib.Path) -> dict[str, list[str]]:
    """Of the whole sweep, whoever ran it; also printed."""
    finished = [cell.name for cell in planned if _file(workdir, cell).exists()]
    failed = [cell.name for cell in planned if cell.name not in finished and _file(workdir, cell).with_name("failed.json").exists()]
    rest = len(planned) - len(finished) - len(failed)
    print(f"{len(finished)} of {len(planned)} cells finished, {len(failed)} failed, {rest} to come", flush=True)
    for name in failed[:5]:
        print(f"failed: {name}: {json.loads((workdir / 'cells' / name / 'failed.json').read_text())['error'][:300]}", flush=True)
    return {"finished": finished, "failed": failed}


def write_json(path: pathlib.Path, value: Any) -> None:
    """In one move: a reader sees all of it or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def _file(workdir: pathlib.Path, cell: Planned) -> pathlib.Path:
    return workdir / "cells" / cell.name / "cell.json"


def _machine(entry: dict[str, Any]) -> str:
    machine = entry["machine"]
    return f"{machine['cores']} cores, {machine['processor']}, {provenance.devices()}"
