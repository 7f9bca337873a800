"""Which tasks a stage of reinforcement rolls out: fresh ones for ever, or a finite pool that is chosen once and reused in epochs.

A pool is chosen by tries of the model that the stage starts from: tasks it both solved and missed, or those it nearly solved. The
expected number of runs per task is steps * prompts * samples / tasks, a metric of the stage.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .. import distributed, metrics
from ..config import Binding, ConfigError
from ..domains.base import Domain, Task
from ..rollout import sampler, selection
from ..rollout.agent import Engine
from ..rollout.rewards import rubric_fraction
from ..types import ABORTED, Params, Rollout, Trajectory
from . import experts, verdicts


@dataclasses.dataclass(frozen=True)
class Pool:
    candidates: int  # tasks that are tried, or taken as they are ("all")
    select: Literal["all", "mixed", "near_misses"] = "all"  # mixed: solved and missed; near_misses: seldom solved, most rubrics met
    tries: int = 5  # runs of the starting model per candidate; "all" needs none
    size: int = 0  # tasks kept at most, the first (near_misses: the nearest) of those selected; 0: all of them

    def __post_init__(self):
        if self.candidates < 1 or self.tries < 1 or self.size < 0:
            raise ConfigError(
                f"Pool: candidates {self.candidates} and tries {self.tries} must be at least 1, size {self.size} not negative"
            )
        if self.select == "mixed" and self.tries < 2:
            raise ConfigError("Pool.select is 'mixed' and Pool.tries 1; one try cannot be both right and wrong: try at least twice")
        if self.select == "near_misses" and self.size < 1:
            raise ConfigError("Pool.select is 'near_misses'; say how many in Pool.size (the paper takes 64)")


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The tasks of one stage as an endless row. places: None draws fresh ones; else those of the pool, in another order every epoch."""

    family: Domain
    sources: tuple[experts.Prompts, ...]
    seed: int
    lane: int
    places: tuple[int, ...] | None = None

    def take(self, first: int, number: int) -> list[Task]:
        """Tasks first .. first + number - 1 of the row: a function of their numbers, so that a resumed stage goes on where it was."""
        row = range(first, first + number)
        if self.places is not None:
            n = len(self.places)
            row = [self.places[int(np.random.default_rng([self.seed, self.lane, i // n]).permutation(n)[i % n])] for i in row]
        return experts.drawn(self.family, self.sources, row, self.seed, self.lane)


def rubrics(task: Task, trajectory: Trajectory) -> tuple[bool, ...]:
    """The verdicts on the parts of a run; of one that a budget cut nobody has asked for them yet."""
    found = trajectory.metadata.get("rubrics")
    return tuple(task.rubrics(trajectory)) if found is None else tuple(found)


def choose(cfg: Pool, tasks: Tasks, engine: Engine, params: Params, path: pathlib.Path, name: str, judge: Binding | None = None) -> Tasks:
    """``tasks`` narrowed to a pool. The choice is kept at ``path``, so that a resumed stage neither tries again nor chooses otherwise.
    judge: who says which tries were right, see ``verdicts``.

    A try that the system interrupted says nothing: another try of its task stands in for it, and a task without any is left out.
    Raises ConfigError where nothing is selected.
    """
    known = distributed.from_first(json.loads(path.read_text())["places"] if distributed.is_first() and path.exists() else None)
    if known is not None:
        return dataclasses.replace(tasks, places=tuple(known))
    places = np.arange(cfg.candidates)
    facts = {"select": cfg.select, "candidates": cfg.candidates}
    if cfg.select != "all":
        outcomes, shares, valid = _try(cfg, tasks, engine, params, name, judge)
        places, outcomes, shares = places[valid], outcomes[valid], shares[valid]
        near = cfg.select == "near_misses"
        chosen = selection.near_misses(outcomes, shares, cfg.size) if near else selection.mixed_tasks(outcomes, outcomes.shape[1])
        facts |= {"tries": cfg.tries, "tried": len(places), "selected": len(chosen), "success_of_all": float(outcomes.mean())}
        places = places[np.asarray(chosen, np.int64)]
    places = places[: cfg.size or None].tolist()
    if not places:
        raise ConfigError(
            f"{name}: none of {cfg.candidates} candidates is selected by '{cfg.select}'; raise Pool.candidates or Pool.tries, or choose "
            "lengths the starting model can solve now and then"
        )
    distributed.by_first(lambda: _write(path, {**facts, "places": places}))
    return dataclasses.replace(tasks, places=tuple(places))


def _write(path: pathlib.Path, facts: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1))
    part.rename(path)


def _try(
    cfg: Pool, tasks: Tasks, engine: Engine, params: Params, name: str, judge: Binding | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outcome 0 or 1, share of rubrics met), float [candidates, tries], and bool [candidates]: has a try that was not interrupted."""
    candidates = tasks.take(0, cfg.candidates)
    repeated = [task for task in candidates for _ in range(cfg.tries)]
    with metrics.progress(f"{name}: tries", total=len(repeated)) as bar:
        runs, _ = engine.run(params, repeated, seed=sampler.seed_of(tasks.seed, f"{name}: tries", 0), on_done=bar.add)
    runs = verdicts.by_judge(judge, repeated, runs)
    groups = [_stand_in(runs[i : i + cfg.tries]) for i in range(0, len(runs), cfg.tries)]
    valid = np.asarray([bool(group) for group in groups])
    shape = (len(groups), cfg.tries)
    outcomes, shares = np.zeros(shape), np.zeros(shape)
    for i, (task, group) in enumerate(zip(candidates, groups, strict=True)):
        for j, run in enumerate(group):
            outcomes[i, j] = float(run.reward >= 1.0)
            if cfg.select == "near_misses":
                shares[i, j] = rubric_fraction(rubrics(task, run.trajectory))
    return outcomes, shares, valid


def _stand_in(group: Sequence[Rollout]) -> list[Rollout]:
    """The tries of one task, the first that was not interrupted in place of each that was; none where all were."""
    sound = [run for run in group if run.status != ABORTED]
    return [run if run.status != ABORTED else sound[0] for run in group] if sound else []
