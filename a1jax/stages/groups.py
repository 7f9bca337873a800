"""Groups of runs for reinforcement: P prompts times G runs of the model that learns, their rewards, their advantages, one packed batch."""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ConfigError
from ..data import packing
from ..domains.base import Task
from ..losses import advantages
from ..rollout import rewards, sampler
from ..rollout.agent import Engine, together
from ..types import ABORTED, FINISHED, Batch, Metrics, Rollout, TrainState
from . import kept_runs, verdicts
from .distill import pack_domain, rollout_metrics
from .setting import Setting
from .task_pool import Tasks, rubrics

if TYPE_CHECKING:
    from .grpo import GrpoConfig, Scorer


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Groups:
    """n groups of G runs, in the order of their tasks; what each got is in its trajectory's metadata too ("reward_parts", "advantage").
    rewards: one per run, None for an ABORTED one. The arrays are [n, G], kept [n].

    advantages: 0 where the run is not valid. looked: the loss reads the run's tokens. kept: the group teaches something."""

    runs: list[Rollout]
    rewards: list[rewards.Reward | None]
    advantages: np.ndarray
    looked: np.ndarray
    kept: np.ndarray


def judge(cfg: GrpoConfig, tasks: list[Task], runs: list[Rollout]) -> Groups:
    """Rewards and advantages of the runs, ``cfg.samples`` in a row for each task, after the verdicts of ``cfg.judge``. Raises JudgeError
    where that gives none, ConfigError for a reward that is no number, and under "papo" for one that is neither 0 nor 1."""
    n, g = len(tasks), cfg.samples
    runs = verdicts.by_judge(cfg.judge, [task for task in tasks for _ in range(g)], runs)
    with ThreadPoolExecutor(cfg.limits.workers, "rubrics") as pool:  # those of programs run them
        runs = list(pool.map(_with_rubrics, (task for task in tasks for _ in range(g)), runs))
    found = [None if run.status == ABORTED else cfg.reward(run.trajectory) for run in runs]
    statuses = [[run.status for run in runs[i * g : (i + 1) * g]] for i in range(n)]
    valid, looked = advantages.counted(statuses, cfg.overlong == "mask")
    total = np.asarray([0.0 if reward is None else reward.total for reward in found], np.float32).reshape(n, g)
    if not np.isfinite(total).all():
        raise ConfigError(f"GrpoConfig.reward gave {total[~np.isfinite(total)][0]} for a run of {tasks[0].domain}; it must be a number")
    if cfg.advantage == "papo":
        if not np.isin(total, (0.0, 1.0)).all():
            wrong = total[~np.isin(total, (0.0, 1.0))][0]
            raise ConfigError(
                f"GrpoConfig.advantage 'papo' wants rewards of 0 or 1 and got {wrong}; use rewards.outcome_reward without bonus"
            )
        met = [0.0 if run.status == ABORTED else rewards.rubric_fraction(run.trajectory.metadata["rubrics"]) for run in runs]
        process = np.asarray(met, np.float32).reshape(n, g)
        scale = {"coefficient": cfg.process_coefficient, "deviation": cfg.deviation}
        gains = advantages.papo_advantages(total, process, valid, **scale)
        mixed = advantages.mixed(total, valid) | advantages.mixed(process, valid & (total == 0))
    else:
        gains = advantages.group_advantages(total, valid, deviation=cfg.deviation)
        mixed = advantages.mixed(total, valid)
    kept = np.asarray(mixed) if cfg.drop_equal else valid.any(1)
    gains = np.asarray(gains)
    runs = [
        run if reward is None else _noted(run, reward_parts=reward.parts, advantage=gain)
        for run, reward, gain in zip(runs, found, gains.ravel().tolist(), strict=True)
    ]
    return Groups(runs, found, gains, looked, kept)


def _noted(run: Rollout, **facts: Any) -> Rollout:
    """The run with facts in its trajectory's metadata, for whoever reads it later."""
    trajectory = dataclasses.replace(run.trajectory, metadata={**run.trajectory.metadata, **facts})
    return dataclasses.replace(run, trajectory=trajectory)


def _with_rubrics(task: Task, run: Rollout) -> Rollout:
    """Any reward may read rubrics: a run that a budget cut gets them too. That costs no more than the verdict on a run that ended."""
    return run if run.status == ABORTED else _noted(run, rubrics=list(rubrics(task, run.trajectory)))


def _looked(groups: Groups, i: int) -> list[tuple[Rollout, float]]:
    """The runs of group i that the loss reads, and their advantages."""
    g = groups.looked.shape[1]
    each = zip(groups.runs[i * g : (i + 1) * g], groups.advantages[i].tolist(), groups.looked[i], strict=True)
    return [(run, gain) for run, gain, looked in each if looked]


def per_token(batch: Batch, runs: tuple[Rollout, ...], rows: tuple[int, ...], starts: tuple[int, ...], values: list[Any]) -> np.ndarray:
    """float32 [B, T] laid out like ``Batch.mask``: where position t predicts token t + 1 of a run stands that token's value.

    values: per run one number for all its tokens, or one per token of the run. 0 elsewhere."""
    out = np.zeros(batch.tokens.shape, np.float32)
    for run, row, start, value in zip(runs, rows, starts, values, strict=True):
        n = len(run.tokens)
        out[row, start : start + n - 1] = np.broadcast_to(np.asarray(value, np.float32), (n,))[1:]
    return out * batch.mask


class Reinforced:
    """A train.Source that samples groups from the model it trains. Its state is how many prompts it has drawn: what was trained on.

    A batch is None where no group teaches anything: that step changes nothing."""

    def __init__(self, cfg: GrpoConfig, setting: Setting, engine: Engine, tasks: Tasks, index: int, scorer: Scorer, stage: str = "grpo"):
        self.cfg, self.setting, self.engine, self.tasks, self.stage, self.index = cfg, setting, engine, tasks, stage, index
        self.scorer = scorer
        self.drawn = 0

    def next(self, state: TrainState) -> tuple[dict[str, Any] | None, Metrics]:
        began = time.perf_counter()
        found, counts = self._sample(state)
        sampled = time.perf_counter()
        kept_runs.keep_some(self.setting.workdir, self.stage, [run for g in found for run in g.runs], int(state.step), self.cfg.save_every)
        data, packed = self._pack(state, found)
        out = {**packed, "rollout/seconds": sampled - began, "score/seconds": time.perf_counter() - sampled}
        return data, {**out, **{f"rollout/{name}": value for name, value in counts.items()}, **self._report(found)}

    def _sample(self, state: TrainState) -> tuple[list[Groups], dict[str, Any]]:
        """Groups of ``cfg.prompts`` prompts, and of as many more as were dropped, ``cfg.refills`` times at most; counts of the engine."""
        cfg, found, counts = self.cfg, [], []
        for attempt in range(1 + cfg.refills):
            missing = cfg.prompts - sum(int(groups.kept.sum()) for groups in found)
            if missing == 0:
                break
            tasks = self.tasks.take(self.drawn, missing)
            self.drawn += missing
            seed = sampler.seed_of(self.setting.seed, self.stage, int(state.step) * (1 + cfg.refills) + attempt)
            runs, new = self.engine.run(state.params, [task for task in tasks for _ in range(cfg.samples)], seed=seed)
            found.append(judge(cfg, tasks, runs))
            counts.append(new)
        return found, together(counts)

    def _pack(self, state: TrainState, found: list[Groups]) -> tuple[dict[str, Any] | None, Metrics]:
        cfg, setting = self.cfg, self.setting
        chosen = [_looked(groups, i) for groups in found for i in np.flatnonzero(groups.kept)]
        room = packing.fitting([[len(run.tokens) for run, _ in group] for group in chosen], cfg.rows, cfg.max_length)
        gains = {id(run): gain for group in chosen[:room] for run, gain in group}
        replay = setting.model if cfg.replay_routes else None
        placed = pack_domain([run for group in chosen[:room] for run, _ in group], self.index, cfg.rows, cfg.max_length, replay)
        where = (placed.batch, placed.runs, placed.row, placed.start)
        arrays = {
            "advantages": per_token(*where, [gains[id(run)] for run in placed.runs]),
            "rollout_logp": per_token(*where, [run.logp for run in placed.runs]),
        }
        left_out = sum(map(len, chosen)) - len(placed.runs)
        out = {"tokens": int((placed.batch.segment_ids > 0).sum()), "rollout/left_out": left_out}
        if not placed.batch.mask.any():
            at, many = int(state.step) + 1, sum(len(groups.kept) for groups in found)
            log.warning("step %d changes nothing: in none of %d groups were runs worth different rewards; choose other tasks", at, many)
            return None, out
        batch = setting.put(placed.batch)
        data = {
            "batch": batch,
            **{n: setting.put_tokens(x) for n, x in arrays.items()},
        }
        return {**data, **self.scorer(state.params, batch)}, out

    def _report(self, found: list[Groups]) -> Metrics:
        """Means over all runs that count, those of dropped groups too: what the model can do, not what it learns from."""
        cfg = self.cfg
        runs = [run for groups in found for run in groups.runs]
        got = [reward for groups in found for reward in groups.rewards if reward is not None]
        sound = [run for run in runs if run.status != ABORTED]
        kept, groups = sum(int(g.kept.sum()) for g in found), sum(len(g.kept) for g in found)
        out = {
            "grpo/groups": kept,
            "grpo/dropped_groups": groups - kept,
            "grpo/refills": groups - cfg.prompts,
            "grpo/reward": float(np.mean([reward.total for reward in got])) if got else 0.0,
            "grpo/success": float(np.mean([run.status == FINISHED and run.reward >= 1.0 for run in sound])) if sound else 0.0,
        }
        for name in sorted({name for reward in got for name in reward.parts}):
            out[f"grpo/reward/{name}"] = float(np.mean([reward.parts.get(name, 0.0) for reward in got]))
        if self.tasks.places is not None:
            out["grpo/runs_per_task"] = self.drawn * cfg.samples / len(self.tasks.places)
        return {**out, **rollout_metrics(runs)}

    def get_state(self) -> dict:
        return {"drawn": self.drawn}

    def set_state(self, state: dict) -> None:
        self.drawn = state["drawn"]
