"""Runs that the teachers write in the student's place: stage 3 off-policy, to be compared with the paper's on-policy stage.

Tasks, seeds, budgets, loss and scores stay those of ``distill``; only who samples differs. A student that is its own teacher therefore
gets the same batches either way.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ConfigError
from ..data.tokenizer import Tokenizer
from ..domains.base import Task
from ..rollout import agent
from ..rollout.agent import Engine, Limits
from ..types import Params, Rollout
from .scoring import Teacher


class TeachersEngine:
    """In the place of an ``Engine``: every domain's tasks are played by its teacher. They have to stand domain by domain.

    Raises ConfigError for a teacher of another tokenizer, whose ids are not the student's."""

    def __init__(self, teachers: dict[str, Teacher], student: Tokenizer, limits: Limits):
        for domain, teacher in teachers.items():
            if teacher.vocab_map is not None:
                raise ConfigError(
                    f"distill.rollouts is 'teacher', and the teacher of {domain} has another tokenizer than {student.path}: its runs are "
                    "not in the student's tokens, set rollouts='student'"
                )
        engines = {t.model: Engine(t.model, student, limits) for t in teachers.values()}  # one for each architecture
        self.each = {d: (t.params, engines[t.model]) for d, t in teachers.items()}

    def run(self, params: Params, tasks: Sequence[Task], seed: int) -> tuple[list[Rollout], dict]:
        """As ``Engine.run``; the student's ``params`` are not read."""
        del params
        rollouts, counts = [], []
        for domain in dict.fromkeys(task.domain for task in tasks):
            here = [task for task in tasks if task.domain == domain]
            teacher, engine = self.each[domain]
            runs, count = engine.run(teacher, here, seed=seed, first=len(rollouts))
            rollouts += runs
            counts.append(count)
        if [r.task_id for r in rollouts] != [t.task_id for t in tasks]:
            raise ValueError("the tasks of a step must stand domain by domain")
        return rollouts, agent.together(counts)
