"""The table of a cross-tokenizer run: what each alignment keeps of the gain that a teacher of the student's own tokenizer gives."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from .. import provenance
from ..stages import cross_tokenizer
from ..stages.cross_tokenizer import CrossTokenizer
from ..stages.evaluate import wilson

KEPT = 0.95  # the share of the gain that two-sided alignment is meant to keep


def run(cfg: CrossTokenizer, workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
    """``cross_tokenizer.run``, its table printed and written to ``workdir``/report.md, its numbers to results.json."""
    workdir = pathlib.Path(workdir)
    results = cross_tokenizer.run(cfg, workdir)
    text = table(cfg, results)
    print(text)
    told = provenance.read(workdir)
    source = f"`{told.get('command', '?')}`, commit {told.get('commit', '?')}, seeds {', '.join(map(str, results))}"
    (workdir / "report.md").write_text(f"# Teachers of other tokenizers\n\nFrom {source}.\n\n```\n{text}\n```\n")
    (workdir / "results.json").write_text(json.dumps({str(seed): r for seed, r in results.items()}, indent=1))
    return results


def success(results: dict[int, dict[str, Any]], model: str, domain: str | None = None) -> list[float]:
    """Per seed, the success of a model on one domain, or the mean of all."""
    picked = []
    for r in results.values():
        scores = r["scores"][model]
        rows = [scores[domain]] if domain else list(scores.values())
        picked.append(sum(s["success"] for s in rows) / len(rows))
    return picked


def teachers_success(results: dict[int, dict[str, Any]], family: str, domain: str) -> list[float]:
    return success(results, f"{family}/teacher_{domain}", domain)


def kept(cfg: CrossTokenizer, results: dict[int, dict[str, Any]], arm: str, domain: str | None = None) -> float:
    """The arm's gain over the student before distillation, as a share of the first arm's, both summed over seeds."""
    before = success(results, f"{next(iter(cfg.families))}/sft", domain)
    gains = [sum(success(results, name, domain)) - sum(before) for name in (arm, next(iter(cfg.arms)))]
    return gains[0] / gains[1] if gains[1] > 0 else float("nan")


def table(cfg: CrossTokenizer, results: dict[int, dict[str, Any]]) -> str:
    """Aligned text: a row per model, success per domain pooled over seeds with Wilson intervals; shares of the gain kept."""
    own, first = next(iter(cfg.families)), next(iter(cfg.arms))
    head = ["student after", *(f"{d} [95 %]" for d in cfg.domains), "mean", "by seed", "gain kept", *(f"of it {d}" for d in cfg.domains)]
    rows = [head]
    for label, model in (("no distillation", f"{own}/sft"), *((name, name) for name in cfg.arms)):
        means = success(results, model)
        shares = ["", *("" for _ in cfg.domains)]
        if model in cfg.arms:
            shares = [f"{100 * kept(cfg, results, model, d):.0f} %" for d in (None, *cfg.domains)]
        cells = [_pooled(results, model, d) for d in cfg.domains]
        rows.append([label, *cells, f"{100 * sum(means) / len(means):.1f}", " ".join(f"{100 * x:.1f}" for x in means), *shares])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += ["", "teachers on their own domain:"]
    for family in cfg.families:
        found = [f"{d} {' '.join(f'{100 * x:.1f}' for x in teachers_success(results, family, d))}" for d in cfg.domains]
        lines.append(f"  {family:10} {'   '.join(found)}")
    lines += ["", f"positions of the student's tokens, means over steps and seeds (first arm, {first}, needs no alignment):"]
    for arm in cfg.arms:
        shares = [r["align"][arm] for r in results.values()]
        names = [n for n in ("align/straddled", "align/chained", "align/masked") if all(n in s for s in shares)]
        if names:
            found = [f"{n.removeprefix('align/')} {100 * sum(s[n] for s in shares) / len(shares):.1f} %" for n in names]
            lines.append(f"  {arm:20} {'   '.join(found)}")
    return "\n".join([*lines, "", *findings(cfg, results), f"{sum(r['seconds'] for r in results.values()):.0f} s in all."])


def _pooled(results: dict[int, dict[str, Any]], model: str, domain: str) -> str:
    scores = [r["scores"][model][domain] for r in results.values()]
    n = sum(s["n"] for s in scores)
    wins = round(sum(s["success"] * s["n"] for s in scores))
    low, high = wilson(wins, n)
    return f"{100 * wins / n:.1f} [{100 * low:.0f}-{100 * high:.0f}]"


def findings(cfg: CrossTokenizer, results: dict[int, dict[str, Any]]) -> list[str]:
    """The targets as lines, met or not: per family, two-sided against the first arm and against its own other alignments."""
    out = []

    def line(met: bool, text: str):
        out.append(f"[{'met' if met else 'MISSED'}] {text}")

    by_family: dict[str, dict[str, str]] = {}
    for name, arm in cfg.arms.items():
        if arm.alignment:
            by_family.setdefault(arm.family, {})[arm.alignment] = name
    for family, arms in by_family.items():
        best = arms.get("two_sided")
        if best is None:
            continue
        share = kept(cfg, results, best)
        line(share >= KEPT, f"{family}: two-sided keeps {100 * KEPT:.0f} % of the same-tokenizer teacher's gain: {100 * share:.0f} %")
        for other in ("one_sided", "shared"):
            if other in arms:
                for d in (None, *cfg.domains):
                    ours, theirs = (sum(success(results, n, d)) / len(results) for n in (best, arms[other]))
                    where = d or "mean of the domains"
                    line(ours > theirs, f"{family}, {where}: two-sided above {other}: {100 * ours:.1f} against {100 * theirs:.1f}")
    return out
