"""Success of a model on held-out tasks, closed loop: the model acts in the real environments, the verifiers judge."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from .. import distributed, metrics
from ..domains import stopping
from ..domains.base import Domain, Task, fingerprint
from ..rollout.agent import Engine
from ..types import FINISHED, Params, Rollout, Trajectory
from . import experts, kept_runs

REFUSED = "schema: refused"  # what ``domains.base.record`` writes of a call that was wrong
PARSER = "parser"  # who answers a turn that could not be read, in ``rollout.agent``


@dataclasses.dataclass(frozen=True)
class Evaluation:
    counts: dict[int, int]  # steps -> held-out tasks of that length, for every domain that ``of`` does not name
    seed: int = 0  # which held-out tasks: the same for every column of the table
    of: dict[str, tuple[experts.Runs, ...]] = dataclasses.field(default_factory=dict)  # domain -> its own held-out tasks

    def tasks(self, domain: str, family: Domain, use: str) -> list[Task]:
        """Distinct tasks of a use of ``experts.JUDGED``: fewer than were asked for where the family has no more."""
        return experts.judged(family, self.of.get(domain, (experts.Runs(self.counts),)), use, self.seed)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), z = 1.96 for 95 %. n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def score(rollouts: Sequence[Rollout], steps: Sequence[int], stops: Sequence[str] = ()) -> dict:
    """Of one domain's runs: {"success", "low", "high", "n", "by_steps": {steps: [successes, n]}, "statuses": {status: runs}, "tokens",
    "tokens_p90", "turns", "tool_errors" (means a run, but for the 90th percentile)}, and with ``stops`` "stopping": {stop: runs}."""
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
        "tokens_p90": float(np.percentile([len(r.tokens) for r in rollouts] or [0], 90)),
        "turns": sum(r.turns for r in rollouts) / n,
        "tool_errors": sum(tool_errors(r.trajectory) for r in rollouts if r.trajectory is not None) / n,
        **({"stopping": stopping.counts(stops)} if stops else {}),
    }


def tool_errors(trajectory: Trajectory) -> int:
    """Calls that a schema or a tool refused, and turns that the parser could not read. No tool is named PARSER: a call of one is refused
    and its answer counted with the parser's."""
    refused = [r.action for r in trajectory.records if r.action is not None and (r.outcome or "").startswith(REFUSED)]
    unread = sum(m.get("role") == "tool" and m.get("name") == PARSER for m in trajectory.messages)
    return sum(action["name"] != PARSER for action in refused) + unread


def run(
    cfg: Evaluation, params: Params, engine: Engine, families: dict[str, Domain], name: str, path: pathlib.Path | None, use: str = "heldout"
) -> dict:
    """{domain: score(...)} of a model; read back from ``path`` when it was computed before, else written there in one move, after the
    runs themselves (``runs_of``). Of several processes the first reads and writes, and what it counted holds for all."""
    done = distributed.from_first(json.loads(path.read_text()) if path is not None and distributed.is_first() and path.exists() else None)
    if done is not None:
        return done
    lists = {d: cfg.tasks(d, family, use) for d, family in families.items()}
    everything = [task for d in families for task in lists[d]]
    with metrics.progress(f"evaluate {name}", total=len(everything)) as bar:
        rollouts, _ = engine.run(params, everything, seed=cfg.seed, on_done=bar.add)
    stops = [stopping.stop(task, rollout.trajectory) for task, rollout in zip(everything, rollouts, strict=True)]
    out, at = {}, 0
    for d in families:
        here = slice(at, at + len(lists[d]))
        out[d] = {**score(rollouts[here], [t.steps for t in lists[d]], stops[here]), "tasks": fingerprint(lists[d])}
        at += len(lists[d])
    out = distributed.from_first(out)
    if path is not None:
        each = zip(rollouts, everything, stops, strict=True)
        kept = (kept_runs.to_trajectory(r, model=name, steps=t.steps, stop=s) for r, t, s in each)
        distributed.by_first(lambda: _write(path, out, kept))
    return out


def _write(path: pathlib.Path, out: dict, runs: Iterable[Trajectory]) -> None:
    kept_runs.write(runs_of(path), runs)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(out, indent=1))
    part.rename(path)


def runs_of(path: pathlib.Path) -> pathlib.Path:
    """Where the runs behind an evaluation's JSON are kept."""
    return path.with_name(path.name.removesuffix(".json") + kept_runs.SUFFIX)


def score_again(path: pathlib.Path) -> dict[str, dict]:
    """domain -> score(...) of the runs kept in a file: what the evaluation's JSON says, but for the tasks' fingerprint."""
    by_domain = defaultdict(list)
    for kept in kept_runs.read(path):
        by_domain[kept.domain].append(kept)
    return {
        d: score([kept_runs.to_rollout(k) for k in several], [k.metadata["steps"] for k in several], [k.metadata["stop"] for k in several])
        for d, several in by_domain.items()
    }
