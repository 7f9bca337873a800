"""report.html of a run, finished or still running: one self-contained page, and every number on it as CSV in ``report/``."""

from __future__ import annotations

import base64
import functools
import json
import pathlib
from typing import Any

import jinja2

from .. import metrics, provenance
from ..config import ConfigError
from ..domains.stopping import STOPS
from ..stages import kept_runs
from ..types import STATUSES
from . import behaviour, drawing, figures

FILE, FOLDER = "report.html", "report"


def write(workdir: pathlib.Path, devices: str | None = None) -> pathlib.Path:
    """Writes the page and its CSV files; the page's path. Raises ConfigError where ``workdir`` is no run.

    devices: what the run that is just ending ran on; its run.json says so, and that it finished, only afterwards."""
    workdir = pathlib.Path(workdir)
    told = provenance.read(workdir)
    if devices and told.get("outcome") == "running":
        told = {**told, "outcome": "finished", "devices": devices}
    scores, lines = read_scores(workdir), metrics.read(workdir)
    if not (told or scores or lines):
        raise ConfigError(f"{workdir}: no run (no {provenance.FILE}, {metrics.FILE} or evaluations/); give the folder of one")
    drawn = behaviour.figures(scores, lines)
    tables = {
        "success": behaviour.success_rows(scores),
        "behaviour": behaviour.behaviour_rows(scores),
        **{figure.name: figures.rows(figure) for figure in drawn},
    }
    for name, table in tables.items():
        put(workdir / FOLDER / f"{name}.csv", figures.to_csv(table))
    text = template("report.html.jinja").render(
        name=workdir.resolve().name,
        told=told,
        results=_results(workdir),
        stages=read_stages(workdir),
        models=models(scores),
        domains=behaviour.domains_of(scores),
        scores=scores,
        behaviour=tables["behaviour"],
        statuses=STATUSES,
        stops=STOPS,
        figures=[(figure, image(figure)) for figure in drawn],
        kept=kept_files(workdir),
        folder=FOLDER,
    )
    put(workdir / FILE, text)
    return workdir / FILE


def read_scores(workdir: pathlib.Path) -> dict[str, dict]:
    """Model -> domain -> score, of every evaluation that is there."""
    files = sorted((workdir / "evaluations").glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def read_stages(workdir: pathlib.Path) -> dict[str, dict]:
    """Stage -> {"steps", "seconds"} of every finished one, in the order they ended."""
    files = sorted((workdir / "stages").glob("*/done.json"), key=lambda file: file.stat().st_mtime)
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def models(scores: dict[str, dict]) -> list[str]:
    """Columns of the table: controls, teachers, the student."""
    found = sorted(m for m in scores if m not in behaviour.FIRST and m != behaviour.LAST)
    return [m for m in behaviour.FIRST if m in scores] + found + [m for m in (behaviour.LAST,) if m in scores]


def kept_files(workdir: pathlib.Path) -> list[str]:
    """The files of runs that can be read with ``a1jax show``, relative to the run's folder."""
    return [str(file.relative_to(workdir)) for file in sorted(workdir.rglob(f"*{kept_runs.SUFFIX}"))]


def _results(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if "domains" in found else {}


def image(figure: figures.Figure) -> str:
    """A data address: inside an image a figure's SVG cannot meet another's names."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.draw(figure).encode()).decode()


@functools.cache
def template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    settings = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(loader=loader, **settings).get_template(name)


def put(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
