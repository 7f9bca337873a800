"""Whether a run stopped too early, in time, or went on after the answer was known, told from its graph records.

The answer is known at the first record after which all of the task's evidence has been consulted. What an expert still does after that
point (reading what it found, writing a result down) is its surplus; more is going on, less without the verifier's consent is guessing.
A task without evidence (one answer under constraints, a derivation) has no such point: when its runs stopped is untold.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable

from ..types import ABORTED, FINISHED, TRUNCATED, Record, Trajectory
from .base import Task, final_answer, solve

EARLY, IN_TIME, LATE, NEVER, UNTOLD = "early", "in_time", "late", "never", "untold"
STOPS = (EARLY, IN_TIME, LATE, NEVER, UNTOLD)


def actions(trajectory: Trajectory) -> list[Record]:
    """The records of what a run did, without the verdict at its end."""
    return [r for r in trajectory.records if r.action is not None]


def known_after(evidence: Iterable[str], records: Iterable[Record]) -> int | None:
    """How many actions it took until every item of the evidence had been consulted, 0 where none is needed; None: it never was."""
    missing = set(evidence)
    if not missing:
        return 0
    for number, r in enumerate(records, start=1):
        missing -= set(r.state)
        if not missing:
            return number
    return None


def expert(task: Task) -> tuple[int, int]:
    """(actions the task's expert takes after the answer is known, actions in all)."""
    return _expert(task) if _hashable(task) else _expert.__wrapped__(task)


@functools.lru_cache(maxsize=8192)  # every model is judged on the same tasks, and some experts run code
def _expert(task: Task) -> tuple[int, int]:
    did = actions(solve(task))
    return len(did) - (known_after(task.evidence, did) or 0), len(did)


def _hashable(task: Task) -> bool:
    try:
        hash(task)
    except TypeError:
        return False
    return True


def stop(task: Task, trajectory: Trajectory) -> str:
    """One of STOPS. never: cut before it answered. early: it answered before it knew, or was refused having done less than the expert
    does after that point. late: it did more than the expert after it knew, and more in all. untold: it answered, and the task has
    no evidence that would tell when the answer is known."""
    if trajectory.status in (TRUNCATED, ABORTED) or final_answer(trajectory) is None:
        return NEVER
    if not task.evidence:
        return UNTOLD
    did = actions(trajectory)
    known = known_after(task.evidence, did)
    if known is None:
        return EARLY
    surplus, total = expert(task)
    if len(did) - known < surplus and trajectory.status != FINISHED:
        return EARLY
    return LATE if len(did) - known > surplus and len(did) > total else IN_TIME


def counts(stops: Iterable[str]) -> dict[str, int]:
    """How often each of STOPS, all of them named."""
    found = Counter(stops)
    return {name: found[name] for name in STOPS}
