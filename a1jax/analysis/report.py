"""What a run ends with: the table, report.md, report.html, results.json and the picture of its curves."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from .. import distributed, metrics, provenance
from ..config import Binding
from ..stages import pipeline
from ..stages.pipeline import Experiment
from . import findings as goals
from . import page as pages
from . import plots


def run(cfg: Experiment, workdir: pathlib.Path, targets: Binding | None = None) -> dict[str, Any]:
    """``pipeline.run`` and its report. A finished run says so and prints its table again; a killed one goes on.

    targets: a function of the results that returns the lines of what was to be shown; None: ``findings.quickstart``."""
    workdir = pathlib.Path(workdir)
    finished = workdir / "results.json"
    results = distributed.from_first(json.loads(finished.read_text()) if distributed.is_first() and finished.exists() else None)
    if results is not None:
        print(f"{workdir} is finished; its table:\n")
    else:
        results = pipeline.run(cfg, workdir)
        seconds = results["wall_seconds"] + sum(start.get("seconds", 0.0) for start in provenance.read(workdir).get("earlier", []))
        results = {**results, "wall_seconds": seconds, "findings": (targets or goals.quickstart)(results)}
        distributed.by_first(lambda: write(workdir, results))
    print(table(results))
    return results


def page(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html of a run, finished or still running, and its CSV files; the page's path."""
    return pages.write(pathlib.Path(workdir))


def findings(results: dict[str, Any]) -> list[str]:
    """The lines of the run's targets; of results from before they were kept, the quickstart's."""
    return results["findings"] if "findings" in results else goals.quickstart(results)


WIDE = 3  # domains from which on a table has one column for each domain's own teacher


def columns(results: dict[str, Any], domain: str | None = None) -> list[str]:
    """Models of the table, or with many domains those of one domain's row."""
    domains = list(results["domains"])
    teachers = [f"teacher_{d}" for d in domains] if len(domains) < WIDE else [f"teacher_{domain}" if domain else "teacher"]
    return ["base", "sft", "sft_continued", *teachers, "student"]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Header, then per domain one row over all lengths with 95 % intervals and one row per length. Percent."""
    out = [["domain", "n", *columns(results)]]
    for domain, facts in results["domains"].items():
        scores = [results["scores"][c][domain] for c in columns(results, domain)]
        out.append([domain, str(facts["n"]), *(f"{100 * s['success']:.1f} [{100 * s['low']:.0f}-{100 * s['high']:.0f}]" for s in scores)])
        for length in scores[0]["by_steps"]:
            cells = [s["by_steps"][length] for s in scores]
            out.append([f"  {length} step{'s' if length != '1' else ''}", str(cells[0][1]), *(f"{100 * w / n:.0f}" for w, n in cells)])
    return out


def table(results: dict[str, Any]) -> str:
    """The table as aligned text, followed by the sentences that the run set out to make true, with their numbers."""
    cells = rows(results)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    lines.insert(1, "-" * len(lines[0]))
    head = "Success on held-out tasks in percent, greedy, with 95 % Wilson intervals."
    return "\n".join([head, "", *lines, "", *findings(results), f"Wall clock: {results['wall_seconds']:.0f} s."])


def markdown(results: dict[str, Any], run: dict[str, Any]) -> str:
    """report.md: the table with where its numbers come from."""
    cells = rows(results)
    body = [
        "| " + " | ".join(cells[0]) + " |",
        "|---|" + "--:|" * (len(cells[0]) - 1),
        *("| " + " | ".join(row) + " |" for row in cells[1:]),
    ]
    machine = run.get("machine", {})
    changed = " with uncommitted changes" if run.get("uncommitted_changes") else ""
    source = (
        f"`{run.get('command', '?')}`, commit {run.get('commit', '?')}{changed}, seed {results['seed']}, {machine.get('cores', '?')} cores "
        f"({machine.get('processor', '?')}), jax {run.get('versions', {}).get('jax', '?')}, {results['wall_seconds']:.0f} s"
    )
    stages = [f"- {name}: {facts['steps']} steps, {facts['seconds']:.0f} s" for name, facts in results["stages"].items()]
    sizes = results["parameters"]
    return "\n".join(
        [
            "# Success on held-out tasks, percent",
            "",
            *body,
            "",
            "Greedy decoding, 95 % Wilson intervals; indented rows are single lengths.",
            "",
            *(f"- {text}" for text in findings(results)),
            "",
            f"Model: {sizes['total']:,} parameters, {sizes['active']:,} active per token.",
            "",
            "## Stages",
            "",
            *stages,
            "",
            f"From {source}.",
            "",
            "More, with figures and their numbers: [report.html](report.html).",
            "",
            "![curves](curves.png)",
            "",
        ]
    )


def write(workdir: pathlib.Path, results: dict[str, Any]) -> None:
    """curves.png, report.md, results.json, which marks the run as finished, and the page, which needs it."""
    plots.curves(metrics.read(workdir), results, workdir / "curves.png")
    (workdir / "report.md").write_text(markdown(results, provenance.read(workdir)))
    part = workdir / "results.part"
    part.write_text(json.dumps(results, indent=1))
    part.rename(workdir / "results.json")
    pages.write(workdir, provenance.devices())
