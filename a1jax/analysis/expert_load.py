"""How evenly a mixture's experts are used over a run's stages: from the lines of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

from .figures import Figure, Heat, Line, Panel

BUSIEST, LOAD = "router/max_load", "router/load"
SHOWN = 5  # stages whose experts are drawn: the first ones' and the last one's


def figure(lines: list[dict[str, Any]]) -> Figure:
    """The busiest expert's load over each stage's steps, and every expert's of every layer at a stage's last step; no panels where no stage
    has a router."""
    stages = dict.fromkeys(at["stage"] for at in lines)
    busiest = [Line(stage, *zip(*found, strict=True)) for stage in stages if (found := _busiest(lines, stage))]
    last = {at["stage"]: at for at in lines if _whole(at.get(LOAD))}
    some = list(last) if len(last) <= SHOWN else [*list(last)[: SHOWN - 1], list(last)[-1]]
    heats = [_experts(stage, last[stage]["step"], last[stage][LOAD]) for stage in some]
    unit = "busiest expert's load (1: balanced)"
    panels = [Panel("the busiest expert", "step", unit, tuple(busiest), level=(1.0, "balanced"))] if busiest else []
    caption = "An expert's load is its share of its layer's token-expert pairs times the number of experts."
    if len(some) < len(last):
        caption += f" Experts of the first {SHOWN - 1} stages and of the last."
    return Figure("expert_load", "Expert load", caption, (*panels, *heats))


def _busiest(lines: list[dict[str, Any]], stage: str) -> list[tuple[int, float]]:
    found = [(at["step"], at[BUSIEST]) for at in lines if at["stage"] == stage and BUSIEST in at]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _whole(load: Any) -> bool:
    """Whether this is a load of [layers, experts] with a number for each."""
    return bool(load) and all(row and all(math.isfinite(value) for value in row) for row in load)


def _experts(stage: str, step: int, load: list[list[float]]) -> Heat:
    experts = len(load[0])
    values = tuple(tuple(experts * share for share in row) for row in load)
    x, y = tuple(range(1, experts + 1)), tuple(range(1, len(load) + 1))
    top = max(2.0, *(value for row in values for value in row))
    ticks = {"xticks": tuple(map(str, x)), "yticks": tuple(map(str, y))} if max(len(x), len(y)) <= 12 else {}
    return Heat(f"{stage}, step {step}", "expert", "layer", "load (1: balanced)", x, y, values, limits=(0.0, top), **ticks)
