"""Success of a model on held-out tasks, closed loop: the model acts in the real environments, the verifiers judge."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections import Counter, defaultdict

from .. import metrics
from ..domains.base import Domain, Task, fingerprint
from ..rollout.agent import Engine
from ..types import FINISHED, Params, Rollout
from . import experts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    counts: dict[int, int]  # steps -> held-out tasks of that length, for every domain that ``of`` does not name
    seed: int = 0  # which held-out tasks: the same for every column of the table
    of: dict[str, tuple[experts.Runs, ...]] = dataclasses.field(default_factory=dict)  # domain -> its own held-out tasks

    def tasks(self, domain: str, family: Domain, use: str) -> list[Task]:
        sources = self.of.get(domain, (experts.Runs(self.counts),))
        return [task for source in sources for task in experts.tasks(source.family or family, source.counts, use, self.seed)]


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), z = 1.96 for 95 %. n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def score(rollouts: list[Rollout], steps: list[int]) -> dict:
    """{"success", "low", "high", "n", "by_steps": {steps: [successes, n]}, "statuses", "tokens", "turns"} of one domain's runs."""
    wins, by_steps = 0, defaultdict(lambda: [0, 0])
    for run, length in zip(rollouts, steps, strict=True):
        won = run.status == FINISHED and run.reward >= 1.0
        wins += won
        by_steps[length][0] += int(won)
        by_steps[length][1] += 1
    low, high = wilson(wins, len(rollouts))
    n = max(1, len(rollouts))
    return {
        "success": wins / n,
        "low": low,
        "high": high,
        "n": len(rollouts),
        "by_steps": {str(k): v for k, v in sorted(by_steps.items())},
        "statuses": dict(sorted(Counter(r.status for r in rollouts).items())),
        "tokens": sum(len(r.tokens) for r in rollouts) / n,
        "turns": sum(r.turns for r in rollouts) / n,
    }


def run(
    cfg: Evaluation, params: Params, engine: Engine, families: dict[str, Domain], name: str, path: pathlib.Path | None, use: str = "heldout"
) -> dict:
    """{domain: score(...)} of a model; read back from ``path`` when it was computed before, else written there in one move."""
    if path is not None and path.exists():
        return json.loads(path.read_text())
    lists = {d: cfg.tasks(d, family, use) for d, family in families.items()}
    everything = [task for d in families for task in lists[d]]
    with metrics.progress(f"evaluate {name}", total=len(everything)) as bar:
        finished = 0

        def on_done(number: int):
            nonlocal finished
            finished += number
            bar.update(finished)

        rollouts, _ = engine.run(params, everything, seed=cfg.seed, on_done=on_done)
    out, at = {}, 0
    for d in families:
        chunk = rollouts[at : at + len(lists[d])]
        out[d] = {**score(chunk, [t.steps for t in lists[d]]), "tasks": fingerprint(lists[d])}
        at += len(lists[d])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(out, indent=1))
        part.rename(path)
    return out
