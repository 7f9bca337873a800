"""Several runs of one experiment, which differ in the seed: one table, n summed over the seeds, and every seed's own value."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from .. import provenance
from ..config import ConfigError
from ..stages.evaluate import wilson
from . import behaviour, page


def read(workdirs: Sequence[pathlib.Path]) -> dict[str, dict[str, dict]]:
    """Folder of the run, in full -> model -> domain -> score. Raises ConfigError for a folder without evaluations or one given twice."""
    out: dict[str, dict[str, dict]] = {}
    for folder in map(pathlib.Path, workdirs):
        scores = page.read_scores(folder)
        if not scores:
            raise ConfigError(f"{folder}: no evaluations of a run; give the folders of runs that have judged their models")
        if str(folder.resolve()) in out:
            raise ConfigError(f"{folder}: given twice; its runs would be counted twice")
        out[str(folder.resolve())] = scores
    return out


def pooled(scores: Sequence[dict[str, dict]], model: str, domain: str) -> dict[str, Any]:
    """{"n", "success", "low", "high", "each"}: successes and n summed over the runs that judged this pair; each run's success or None.

    The interval takes every judged run for independent; seeds that share their held-out tasks are less so."""
    each = [s.get(model, {}).get(domain) for s in scores]
    found = [s for s in each if s is not None]
    n, wins = sum(s["n"] for s in found), round(sum(s["success"] * s["n"] for s in found))
    low, high = wilson(wins, n)
    return {"n": n, "success": wins / max(1, n), "low": low, "high": high, "each": [s and s["success"] for s in each]}


def rows(workdirs: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """One row per domain and model that was judged on it in any run."""
    scores = list(read(workdirs).values())
    merged: dict[str, dict] = {}
    for of_run in scores:
        for model, of_model in of_run.items():
            merged.setdefault(model, {}).update(of_model)
    pairs = [(d, m) for d in behaviour.domains_of(merged) for m in behaviour.models_of(merged, d)]
    return [{"domain": d, "model": m, **pooled(scores, m, d)} for d, m in pairs]


def table(workdirs: Sequence[pathlib.Path]) -> str:
    """Aligned text: per domain and model the pooled success in percent with its Wilson interval, then each run's. Below, the mean over
    domains of the student and of each domain's own teacher, each run's findings and where they come from."""
    found = rows(workdirs)
    cells = [["domain", "model", "n", "success [95 %]", "by run"]]
    for r in found:
        success = f"{100 * r['success']:.1f} [{100 * r['low']:.0f}-{100 * r['high']:.0f}]"
        cells.append([r["domain"], r["model"], str(r["n"]), success, "  ".join("-" if x is None else f"{100 * x:.1f}" for x in r["each"])])
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    padded = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in cells]
    lines = ["  ".join(row) for row in padded]
    lines.insert(1, "-" * len(lines[0]))
    head = "Success on held-out tasks in percent, pooled over runs; Wilson intervals as if all n were independent (seeds may share tasks)."
    return "\n".join([head, "", *lines, "", *_means(found), *_sources(workdirs)])


def _means(found: list[dict[str, Any]]) -> list[str]:
    domains = list(dict.fromkeys(r["domain"] for r in found))
    by = {(r["domain"], r["model"]): r["success"] for r in found}
    kinds = {"sft": "sft", "sft_continued": "sft_continued", "teachers": "teacher_{}", "student": "student"}
    out = []
    for label, model in kinds.items():
        values = [by[pair] for d in domains if (pair := (d, model.format(d))) in by]
        if len(values) == len(domains):
            out.append(f"mean over domains, {label}: {100 * sum(values) / len(values):.1f}")
    return out


def _sources(workdirs: Sequence[pathlib.Path]) -> list[str]:
    out = []
    for folder in map(pathlib.Path, workdirs):
        told = provenance.read(folder)
        out += ["", f"{folder}: seed {told.get('seed', '?')}, commit {(told.get('commit') or '?')[:10]}, {told.get('outcome', '?')}"]
        path = folder / "results.json"
        out += [f"  {line}" for line in json.loads(path.read_text()).get("findings", [])] if path.exists() else []
    return out
