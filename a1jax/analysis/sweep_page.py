"""report.html of a sweep, finished or running: its cells, what they say and the figures, with every number as CSV in ``report/``, and the
whole sweep as one file that ``sweep.load`` reads. Of such a file, NAME.jsonl.gz, it is NAME.report.html with NAME.report/ beside it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from .. import provenance
from ..config import ConfigError
from . import ablation_differences, ablation_plots, figures, horizon, horizon_plots, law_plots, page, training_plots
from . import sweep as sweeps
from .sweep import Cell, Sweep

PLAN = "sweep.json"
TOLD = {  # table behind the findings -> what stands over it
    "law": "Success by size, horizon, domain and task length, observed and by the law:",
    "differences": ablation_differences.HOW,
}
TRAINED = ("tokens", "supervised", "flops", "longest_piece", "mean_piece", "feedback")
PACKED = ".jsonl.gz"


def is_sweep(place: pathlib.Path) -> bool:
    """Whether it is the folder of a sweep, or a file, which can be nothing else."""
    place = pathlib.Path(place)
    return place.is_file() or (place / PLAN).is_file()


def write(place: pathlib.Path) -> pathlib.Path:
    """Writes the page and its CSV files; the page's path. place: a sweep's folder or file.

    Raises ConfigError where it is none, and for one without a finished cell."""
    place = pathlib.Path(place)
    sweep, packed = sweeps.load(place), place.is_file()
    folder = place.parent if packed else place
    before = f"{place.name.removesuffix(PACKED)}." if packed else ""
    tables_in = f"{before}{page.FOLDER}"
    if not sweep.cells:
        why = f"; {sweep.failed[0].name} failed: {sweep.failed[0].error}" if sweep.failed else ""
        count = len(sweep.failed) + len(sweep.missing)
        raise ConfigError(f"{place}: none of the sweep's {count} cells is finished, there is nothing to report yet{why}")
    findings, drawn, refused, behind = _of(sweep)
    tables = {"cells": cell_rows(sweep), "points": horizon_plots.points(sweep), **{f.name: figures.rows(f) for f in drawn}}
    tables |= behind
    for name, table in tables.items():
        page.put(folder / tables_in / f"{name}.csv", figures.to_csv(table))
    if not packed:
        sweeps.pack(folder, folder / page.FOLDER / f"sweep{PACKED}")
    text = page.template("sweep.html.jinja").render(
        name=sweep.name,
        axes=sweep.axes,
        rows=tables["cells"],
        finished=len(sweep.cells),
        failed=len(sweep.failed),
        missing=len(sweep.missing),
        unlisted=sweep.unlisted,
        findings=_grouped(findings),
        refused=refused,
        behind={name: TOLD[name] for name in behind},
        figures=[(figure, page.image(figure)) for figure in drawn],
        told={} if packed else provenance.read(folder),
        packed=packed,
        origins=sweeps.origins(sweep.cells, 1 if packed else 2),
        results={},
        folder=tables_in,
    )
    page.put(folder / f"{before}{page.FILE}", text)
    return folder / f"{before}{page.FILE}"


def _of(sweep: Sweep) -> tuple[list[str], list[figures.Figure], tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    """(findings, figures, one line for each part of the sweep that no law could be fitted to, tables behind the findings by name)."""
    if not horizon_plots.has_horizons(sweep.axes):
        return _of_ablations(sweep)
    fitted, rows = law_plots.fit(sweep), horizon_plots.points(sweep)
    isolines = {values: law_plots.isolines(law) for values, law in fitted.laws.items()}
    curves = {values: law_plots.curves(law, [row for row in rows if fitted.of(row) == values]) for values, law in fitted.laws.items()}
    first, *rest = horizon_plots.figures(sweep, isolines, curves)
    rate = law_plots.exchange_rate(rows, fitted)
    trained = training_plots.figures(sweep, (*fitted.over, horizon_plots.SIZE), (horizon_plots.HORIZON,))
    drawn = [first, rest[0], *([rate] if rate.panels else []), *rest[1:], *trained]
    findings = horizon.summary(sweep) if fitted.laws else []
    return findings, drawn, fitted.refused, {"law": horizon.rows(sweep)} if findings else {}


def _of_ablations(sweep: Sweep) -> tuple[list[str], list[figures.Figure], tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    drawn, table = ablation_plots.figures(sweep), ablation_differences.rows(sweep)
    if not table:
        return [], drawn, (), {}
    return ablation_differences.sentences(table), [ablation_differences.figure(table), *drawn], (), {"differences": table}


def _grouped(findings: list[str]) -> dict[str, list[str]]:
    """Lines by the part of the sweep they are about, "" for all of it: "[budget tokens] The law ..."."""
    out: dict[str, list[str]] = {}
    for line in findings:
        head, found, text = line.partition("] ")
        of_part = found and head.startswith("[")
        out.setdefault(head[1:] if of_part else "", []).append(text if of_part else line)
    return out


def cell_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """A row per planned cell in the order of the plan: "cell", "state" (finished, failed, not run yet), its axes and what it has; "" for
    what it has not. "error": of a failed one."""
    finished, failed = {cell.name: cell for cell in sweep.cells}, {cell.name: cell for cell in sweep.failed}
    return [_row(name, finished.get(name), failed.get(name), list(sweep.axes)) for name in _planned(sweep)]


def _planned(sweep: Sweep) -> list[str]:
    if sweep.folder is None or sweep.folder.is_file():
        return [*(cell.name for cell in sweep.cells), *(cell.name for cell in sweep.failed), *sweep.missing]
    return json.loads((sweep.folder / PLAN).read_text())["cells"]


def _row(name: str, cell: Cell | None, failed: sweeps.Failure | None, axes: list[str]) -> dict[str, Any]:
    found = cell.axes if cell else failed.axes if failed else {}
    row = {"cell": name, "state": "finished" if cell else "failed" if failed else "not run yet", **{a: found.get(a, "") for a in axes}}
    train, seconds = (cell.train, cell.seconds) if cell else ({}, {})
    row |= {key: cell.parameters[key] if cell else "" for key in ("active", "total")}
    row |= {"train_steps": train.get("steps", ""), **{key: train.get(key, "") for key in TRAINED}}
    wins = sweeps.rate(sum(t["success"] for t in cell.tasks), len(cell.tasks)) if cell else {}
    row |= {key: wins.get(key, "") for key in ("wins", "n", "success", "low", "high")}
    row |= {f"seconds_{key}": seconds.get(key, "") for key in ("train", "evaluate")}
    return row | {"error": failed.error if failed else ""}
