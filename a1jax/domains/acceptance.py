"""Which proposed tasks are kept: the five rules of arXiv 2606.30616, section 2.2, each applied by acting in the task's environment.

Rules, in the order they are tried, since the first broken one is named:
- verifiable: two runs of the expert get the same verdict, and the verifier refuses what is no answer: nothing, or words that say nothing.
- valid: the expert's run is accepted.
- process-informative: no one-shot lookup: the answer alone is refused and, of more than one step, the answer after any single call.
- evidence-covering: every evidence item was shown by some observation of the expert's run; of more than one step there is one.
- unambiguous: the answer does not stand in the question (unless that lists every answer there may be), and a run that leaves out an
  evidence item is refused.
Where the question holds all that the answer rests on, its premises (``Task.premises``) are the evidence and nobody acts:
- process-informative: no single premise is enough, and a text that heeds nothing (``Task.careless``) is refused.
- evidence-covering: every premise stands in the question, and there is one.
- unambiguous: the question's text alone (``Task.recompute``) leads to the answer, and without any one premise to another one, or none.
What is not seen: a run of more than TRIED calls or evidence items is cut at TRIED places, spread evenly, so a short cut past another one
stays; and two or more calls that are enough together, where the expert makes more, are not looked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from ..types import Trajectory
from . import base
from .base import Call, Task, Turn, consulted, solve

RULES = ("verifiable", "valid", "process-informative", "evidence-covering", "unambiguous")
NO_ANSWERS = ("", "none of these is it")
TRIED = 12  # runs that are cut down per rule, all where there are no more; a run of hundreds of calls has hundreds of cuts


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """rule: the first that is broken, None when accepted; reason: one line; trajectory: the expert's judged run."""

    accepted: bool
    rule: str | None
    reason: str
    trajectory: Trajectory


def accept(task: Task) -> Acceptance:
    """Run a task for real and say whether it is kept. Costs two expert runs and at most 27 more, shorter or as long."""
    run = solve(task)
    for rule, check in zip(RULES, (_verifiable, _valid, _informative, _covering, _unambiguous), strict=True):
        reason = check(task, run)
        if reason:
            return Acceptance(False, rule, reason, run)
    return Acceptance(True, None, "accepted", run)


def turns_of(task: Task, run: Trajectory) -> list[Turn]:
    """What the model did in a run, turn by turn, without what was observed."""
    turns = []
    for message in run.messages[len(task.messages()) :]:
        if message["role"] != "assistant":
            continue
        thought, calls = message.get("reasoning_content", ""), message.get("tool_calls")
        if calls:
            turns.append(Turn(thought, Call(calls[0]["function"]["name"], dict(calls[0]["function"]["arguments"]))))
        else:
            turns.append(Turn(thought, answer=message["content"]))
    return turns


def play(task: Task, turns: Sequence[Turn]) -> Trajectory:
    """``base.play`` of turns that were chosen beforehand."""
    return base.play(task, (turn for turn in turns))


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 .. count - 1, evenly, first and last among them."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _verifiable(task: Task, run: Trajectory) -> str:
    if solve(task) != run:
        return "two runs of the expert differ"
    turns = turns_of(task, run)
    for text in NO_ANSWERS:
        if _passes(task, [*turns[:-1], Turn("", answer=text)]):
            return f"the answer {text!r} is accepted"
    return ""


def _valid(task: Task, run: Trajectory) -> str:
    return "" if run.reward == 1.0 else f"the expert's run is refused: {run.records[-1].outcome}"


def _informative(task: Task, run: Trajectory) -> str:
    if task.self_contained:
        return _informative_question(task)
    *turns, answer = turns_of(task, run)
    if _passes(task, [answer]):
        return "the answer alone is accepted"
    calls = [turn for turn in turns if turn.call] if task.steps > 1 else []
    for i in spread(len(calls), TRIED):
        if _passes(task, [calls[i], answer]):
            return f"one call of {calls[i].call.name} is enough"
    return ""


def _informative_question(task: Task) -> str:
    for text in task.careless():
        if _passes(task, [Turn("", answer=text)]):
            return f"{text[:60]!r}, which heeds nothing, is accepted"
    for i in spread(len(task.premises), TRIED) if len(task.premises) > 1 else []:
        if task.recompute(_without(task, *task.premises[:i], *task.premises[i + 1 :])) == task.answer:
            return f"{task.premises[i]!r} alone is enough"
    return ""


def _covering(task: Task, run: Trajectory) -> str:
    if task.self_contained:
        missing = [premise for premise in task.premises if premise not in task.question]
        if missing:
            return f"{missing[0]!r} does not stand in the question"
        return "" if task.premises else "no premise is named"
    shown = consulted(run)
    missing = [item for item in task.evidence if item not in shown]
    if missing:
        return f"the expert never consulted {missing[0]!r}"
    return "" if task.evidence or task.steps < 2 else "no evidence is named"


def _unambiguous(task: Task, run: Trajectory) -> str:
    if task.self_contained:
        if task.recompute(task.question) != task.answer:
            return "the question does not lead to the answer"
        for i in spread(len(task.premises), TRIED):
            if task.recompute(_without(task, task.premises[i])) == task.answer:
                return f"the answer is the same without {task.premises[i]!r}"
        return ""
    if _stands(task.answer, task.question) and not (len(task.options) > 1 and all(_stands(o, task.question) for o in task.options)):
        return f"the answer {task.answer[:60]!r} stands in the question"
    turns = turns_of(task, run)
    shown = [set(r.state) for r in run.records if r.action is not None]
    for i in spread(len(task.evidence), TRIED):
        kept = [turn for k, turn in enumerate(turns) if k >= len(shown) or task.evidence[i] not in shown[k]]
        if _passes(task, kept):
            return f"a run without {task.evidence[i]!r} is accepted"
    return ""


def _stands(answer: str, question: str) -> bool:
    return bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", question) is not None


def _without(task: Task, *premises: str) -> str:
    """The question without some of its premises."""
    text = task.question
    for premise in premises:
        text = text.replace(premise, "", 1)
    return text


def _passes(task: Task, turns: Sequence[Turn]) -> bool:
    return play(task, turns).reward == 1.0
