"""A judge's verdict in the place of the verifier's, where a config names a judge: what a run got, and whether it counts as solved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .. import distributed
from ..config import Binding, ConfigError
from ..domains.base import Outcome, Task, final_answer
from ..rollout.judges import Case, JudgeError, Verdict, judge_all, opened
from ..types import FAILED, FINISHED, Record, Rollout, Trajectory


def by_judge(judge: Binding | None, tasks: Sequence[Task], runs: Sequence[Rollout]) -> list[Rollout]:
    """The runs as the judge sees them: reward its score, FINISHED where that is 1 and FAILED elsewhere, its reason in a record behind the
    verifier's. None: the runs as they are. The judge speaks of the answer: a run that the verifier would refuse with the reference answer
    in its place, as one whose evidence was never read, stays refused.

    tasks: one per run. Asked is once for all of them, about runs that ended with an answer; TRUNCATED and ABORTED runs stay as they are,
    and those of tasks that more than the answer decides. Of several processes the first asks. Raises JudgeError, on all of them.
    """
    runs = list(runs)
    if judge is None:
        return runs
    places = [i for i, (task, run) in enumerate(zip(tasks, runs, strict=True)) if task.answer_decides and _answered(run)]
    cases = [Case(tasks[i].question, final_answer(runs[i].trajectory), tasks[i].answer) for i in places]
    for i, verdict in zip(places, _asked(judge, cases), strict=True):
        runs[i] = _judged(runs[i], verdict, _but_for_the_answer(tasks[i], runs[i].trajectory))
    return runs


def check(judge: Binding | None, tasks: Sequence[Task]) -> None:
    """Raises ConfigError where a judge of answers would be no judge of these tasks."""
    for task in tasks if judge is not None else ():
        if not task.answer_decides:
            raise ConfigError(
                f"GrpoConfig.judge: a task of {task.domain} such as {task.task_id} is not solved by its answer alone; leave judge = None"
            )


def _answered(run: Rollout) -> bool:
    return run.status in (FINISHED, FAILED) and final_answer(run.trajectory) is not None


def _asked(judge: Binding, cases: list[Case]) -> list[Verdict]:
    found: list[Verdict] = []
    try:
        distributed.by_first(lambda: found.extend(judge_all(opened(judge), cases)))
    except ConfigError as error:  # which is how the first process's JudgeError comes to the others
        raise JudgeError(str(error)) from None
    return [Verdict(tuple(met), reason) for met, reason in distributed.from_first([[v.met, v.reason] for v in found])]


def _but_for_the_answer(task: Task, run: Trajectory) -> Outcome:
    """The verifier's verdict on the run with the reference answer in the place of its own."""
    right = {**run.messages[-1], "content": task.answer}
    return task.verify(dataclasses.replace(run, messages=(*run.messages[:-1], right)))


def _judged(run: Rollout, verdict: Verdict, rest: Outcome) -> Rollout:
    score = verdict.score if rest.accepted else 0.0
    status, records = FINISHED if score >= 1.0 else FAILED, run.trajectory.records
    reason = f"judge: {verdict.reason}" + ("" if rest.accepted else f"; the verifier: {rest.reason}")
    trajectory = dataclasses.replace(run.trajectory, records=(*records, Record((), None, None, reason)), reward=score, status=status)
    return dataclasses.replace(run, trajectory=trajectory, reward=score, status=status)
