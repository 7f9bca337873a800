"""Figures of one run, drawn from its metrics.jsonl and results.json. Colour-blind safe (Okabe and Ito 2008)."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a run has no display
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def series(lines: list[dict[str, Any]], stage: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric of one stage."""
    found = [(line["step"], line[name]) for line in lines if line["stage"] == stage and name in line]
    return [s for s, _ in found], [v for _, v in found]


def curves(lines: list[dict[str, Any]], results: dict[str, Any], path: pathlib.Path) -> None:
    """One PNG: training losses, distillation (KL, coverage, success while sampling), success by task length per domain."""
    domains = list(results["domains"])
    count = 3 + len(domains)
    across = count if count <= 5 else 3
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(4.2 * across, 3.6 * down), layout="constrained")
    axes = axes.flat[:count]
    stages = list(dict.fromkeys(line["stage"] for line in lines if "ce" in line))
    for colour, stage in zip(itertools.cycle(COLOURS), stages, strict=False):
        axes[0].plot(*series(lines, stage, "ce"), color=colour, label=stage)
    axes[0].set(title="Supervised stages", xlabel="optimizer step", ylabel="cross-entropy (nats per model token)", yscale="log")
    axes[1].plot(*series(lines, "distill", "distill/kl"), color=COLOURS[0], label="KL on S (nats per model token)")
    axes[1].plot(*series(lines, "distill", "distill/coverage"), color=COLOURS[1], label="coverage of S")
    axes[1].set(title="Distillation: KL and coverage", xlabel="distillation step", ylabel="nats; share of mass")
    for colour, domain in zip(COLOURS, domains, strict=False):
        axes[2].plot(*series(lines, "distill", f"rollout/success/{domain}"), color=colour, label=domain)
    axes[2].set(title="Success while sampling", xlabel="distillation step", ylabel="success (training tasks)", ylim=(-0.03, 1.03))
    for axis, domain in zip(axes[3:], domains, strict=True):
        _by_length(axis, domain, results)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    part.rename(path)
    plt.close(figure)


def _by_length(axis, domain: str, results: dict[str, Any]) -> None:
    """Success over task length of every model that is a column of the table."""
    names = ["base", "sft", "sft_continued", f"teacher_{domain}", "student"]
    for colour, marker, name in zip(COLOURS, "osv^D", names, strict=False):
        cells = results["scores"][name][domain]["by_steps"]
        axis.plot([int(k) for k in cells], [w / n for w, n in cells.values()], color=colour, marker=marker, label=name)
    axis.set(
        title=f"{domain} (n = {results['domains'][domain]['n']})",
        xlabel="task length (steps)",
        ylabel="success (held-out tasks)",
        ylim=(-0.03, 1.03),
    )
