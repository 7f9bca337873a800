"""What evaluations and metrics say of the models' behaviour, as figures and tables: from scores and from lines of metrics.jsonl."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

from ..domains.stopping import STOPS
from ..stages.evaluate import wilson
from ..types import STATUSES
from . import expert_load
from .figures import Bars, Figure, Groups, Line, Panel, Rate

FIRST, TEACHER, LAST = ("base", "sft", "sft_continued"), "teacher_", "student"
SHARES = (-0.03, 1.03)
CURVES = (  # title, unit, names of metrics (the first word a pattern with *), limits; a panel exists where a stage has one of them
    ("Reward and its parts", "reward (mean of runs)", ("grpo/reward", "grpo/reward/*"), None),
    ("Success while sampling", "share of training runs", ("grpo/success", "grpo/success/*", "rollout/success/*"), SHARES),
    ("Divergence", "nats per model token", ("grpo/kl", "distill/kl", "distill/kl/*", "distill/kl_*"), None),
    ("Coverage of S", "share of the student's probability", ("distill/coverage", "distill/coverage/*"), None),
    ("Entropy", "nats per model token", ("grpo/entropy", "distill/*entropy", "rollout/entropy*"), None),
    ("How runs ended", "share of training runs", tuple(f"rollout/{s.lower()}" for s in STATUSES if s != "ABORTED"), SHARES),
    ("Tokens clipped or truncated", "share of model tokens", ("grpo/clipped*", "grpo/truncated"), None),
    ("Groups", "groups a step", ("grpo/groups", "grpo/dropped_groups", "grpo/refills"), None),
)


def domains_of(scores: dict[str, dict]) -> list[str]:
    return list(dict.fromkeys(d for of_model in scores.values() for d in of_model))


def models_of(scores: dict[str, dict], domain: str) -> list[str]:
    """The models to show for a domain: those judged on it but for other domains' teachers; controls first, the student last."""
    others = tuple(TEACHER + d for d in domains_of(scores) if d != domain)
    found = [m for m in scores if domain in scores[m] and m not in others]
    middle = sorted(m for m in found if m not in FIRST and m != LAST)
    return [m for m in FIRST if m in found] + middle + [m for m in (LAST,) if m in found]


def _own(model: str, domain: str) -> str:
    """A domain's own teacher is called so in every domain's panel."""
    return "teacher" if model == TEACHER + domain else model


def success_rows(scores: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per domain and model, every judged pair: success with its Wilson interval and n."""
    keys = ("n", "success", "low", "high")
    return [{"domain": d, "model": m, **{k: scores[m][d][k] for k in keys}} for d in domains_of(scores) for m in scores if d in scores[m]]


def behaviour_rows(scores: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per domain and model: means a run of tokens, turns and tool errors; runs by status and by how they stopped."""
    out = []
    for d in domains_of(scores):
        for m in models_of(scores, d):
            s = scores[m][d]
            facts = {k: s.get(k, "") for k in ("n", "tokens", "tokens_p90", "turns", "tool_errors")}
            stops = s.get("stopping", {})
            shown = {**{k: s["statuses"].get(k, 0) for k in STATUSES}, **{k: stops.get(k, 0) if stops else "" for k in STOPS}}
            out.append({"domain": d, "model": m, **facts, **shown})
    return out


def by_length(scores: dict[str, dict]) -> Figure:
    panels = []
    for d in domains_of(scores):
        lines = []
        for m in models_of(scores, d):
            cells = sorted((int(k), w, n) for k, (w, n) in scores[m][d]["by_steps"].items() if n)
            ends = [wilson(w, n) for _, w, n in cells]
            y = tuple(w / n for _, w, n in cells)
            lines.append(Line(_own(m, d), tuple(k for k, _, _ in cells), y, tuple(e[0] for e in ends), tuple(e[1] for e in ends)))
        n = max(scores[m][d]["n"] for m in models_of(scores, d))
        panels.append(Panel(f"{d} (n = {n})", "task length (steps)", "success (held-out tasks)", tuple(lines), limits=SHARES, whole=True))
    caption = "Runs on held-out tasks, greedy unless the experiment says otherwise; bars are 95 % Wilson intervals."
    return Figure("success_by_length", "Success by task length", caption, tuple(panels))


def by_domain(scores: dict[str, dict]) -> Figure:
    """Every domain's base, SFT, SFT continued, own teacher and student side by side, as table 4 of arXiv 2606.30616 has them."""
    domains = domains_of(scores)
    found = {d: {_own(m, d): scores[m][d] for m in models_of(scores, d)} for d in domains}
    shown = [m for m in (*FIRST, "teacher", LAST) if any(m in of_domain for of_domain in found.values())]
    rates = {m: tuple(_rate(found[d].get(m)) for d in domains) for m in shown}
    ns = sorted({bar.n for bars in rates.values() for bar in bars if bar})
    title = f"n = {ns[0]} runs a bar" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]} runs a bar" if ns else ""
    caption = "Success on all held-out tasks of a domain; teacher: the domain's own. Bars are 95 % Wilson intervals."
    panel = Groups(title, "domain", "success (held-out tasks)", tuple(domains), rates)
    return Figure("success_by_domain", "Success by domain", caption, (panel,) if shown else ())


def _rate(score: dict[str, Any] | None) -> Rate | None:
    return Rate(score["success"], score["low"], score["high"], score["n"]) if score and score["n"] else None


def statuses(scores: dict[str, dict]) -> Figure:
    caption = "FINISHED: the verifier said yes; FAILED: it said no; TRUNCATED: a budget cut the run; ABORTED: its environment broke."
    return _stacked(scores, "statuses", "How runs ended", caption, STATUSES)


def stops(scores: dict[str, dict]) -> Figure:
    caption = (
        "The answer is known once all of the task's evidence has been consulted. early: answered before that, or refused with less done "
        "than the expert does after it; late: more done after it than the expert does, and more in all; never: cut before it answered; "
        "untold: its task has no evidence that would tell."
    )
    return _stacked(scores, "stopping", "When runs stopped", caption, STOPS)


def _stacked(scores: dict[str, dict], key: str, title: str, caption: str, names: tuple[str, ...]) -> Figure:
    panels = []
    for d in domains_of(scores):
        models = [m for m in models_of(scores, d) if scores[m][d].get(key) and scores[m][d]["n"]]
        parts = {k: tuple(scores[m][d][key].get(k, 0) / scores[m][d]["n"] for m in models) for k in names}
        if models:
            n = max(scores[m][d]["n"] for m in models)
            panels.append(Bars(f"{d} (n = {n})", "share of runs", tuple(_own(m, d) for m in models), parts))
    return Figure(key, title, caption, tuple(panels))


def series(lines: list[dict[str, Any]], stage: str, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(steps, values) of one metric of one stage, in order; what is not finite is left out."""
    found = [(at["step"], at[name]) for at in lines if at["stage"] == stage and name in at]
    found = [(s, v) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)]
    return tuple(s for s, _ in found), tuple(v for _, v in found)


def losses(lines: list[dict[str, Any]]) -> Figure:
    """Cross-entropy of every stage that has one."""
    stages = [s for s in dict.fromkeys(at["stage"] for at in lines) if series(lines, s, "ce")[0]]
    curves = tuple(Line(s, *series(lines, s, "ce")) for s in stages)
    panel = Panel("supervised stages", "optimizer step", "cross-entropy (nats per model token)", curves, log=True)
    return Figure("loss", "Loss", "On the training runs of each stage.", (panel,) if curves else ())


def curves(lines: list[dict[str, Any]]) -> list[Figure]:
    """A figure for each stage that samples its own runs, with a panel for each group in CURVES of which it has metrics."""
    out = []
    for stage in dict.fromkeys(at["stage"] for at in lines):
        names = list(dict.fromkeys(name for at in lines if at["stage"] == stage for name in at))
        panels = []
        for title, unit, patterns, limits in CURVES:
            shown = list(dict.fromkeys(n for p in patterns for n in names if fnmatch.fnmatchcase(n, p)))
            found = [Line(_short(n), *series(lines, stage, n)) for n in shown if series(lines, stage, n)[0]]
            if found:
                panels.append(Panel(title, "step", unit, tuple(found), limits=limits))
        if panels:
            out.append(Figure(f"stage_{stage}", f"Stage {stage}", "On the training tasks drawn at each step.", tuple(panels)))
    return out


def _short(name: str) -> str:
    """rollout/success/search -> search; grpo/reward/format -> format; distill/kl stays."""
    parts = name.split("/")
    return parts[2] if len(parts) > 2 else name


def figures(scores: dict[str, dict], lines: list[dict[str, Any]]) -> list[Figure]:
    """All that there is something to show in, in the order of the page."""
    judged = [by_domain(scores), by_length(scores), statuses(scores), stops(scores)] if scores else []
    return [f for f in (*judged, losses(lines), *curves(lines), expert_load.figure(lines)) if f.panels]
