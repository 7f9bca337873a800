"""Effective feedback: the observations of a run that were valid, informative, not redundant and used later, over what its task demands.

After arXiv 2605.29682, which counts feedback of these four qualities instead of tokens and divides by the task's demand. Here all of it
is told from the graph records, by words; where this departs from the paper (read in its abstract and summaries):

- An observation counts 1 or 0; nothing is weighted or estimated by a model.
- "Informative" is: it says a word that neither the question nor the call itself said. "Not redundant": some word of it, or two in a row,
  stood in no earlier valid observation. "Used later" (the paper: retained): one of its informative words stands in the arguments of a later
  call or in the answer, or a later record refers to it. What a run weighed in its thoughts and did not write down is not seen: a user's
  "Yes." and a call's "ok" never count.
- The demand is what the task's expert gets by the same count, so that an expert's share is 1 in every domain. Tasks whose calls only
  write demand nothing.

On a piece of a run only uses inside the piece count: what a row of so many tokens cannot hold together, it cannot teach.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence

from ..types import Record, Trajectory
from .base import Task, final_answer, solve
from .stopping import actions

REFUSED = "schema: refused"  # what ``base.record`` writes of a call that was wrong
_WORD = re.compile(r"[@$#&]\w+(?:-\d+)?|\d+(?:\.\d+)?|\w+")  # names with a sign, numbers, words
_SHORT = 4  # letters from which a word without a sign or a digit says something: shorter ones are "ok", "of", "is"


@dataclasses.dataclass(frozen=True)
class Feedback:
    """Observations of a run or a piece, each count among those before it. demand: effective ones that the task asks for; None: unknown."""

    observations: int
    valid: int
    informative: int
    fresh: int  # not redundant
    effective: int  # used later
    demand: int | None = None

    @property
    def share(self) -> float:
        """Effective feedback over the demand, at most 1, and 1 where none is demanded. nan without a demand."""
        if self.demand is None:
            return float("nan")
        return min(1.0, self.effective / self.demand) if self.demand else 1.0


def words(text: str) -> frozenset[str]:
    """What a text says: names with a sign (@Belado, $fern, #7, &1), numbers, and words of four letters or more, in lower case."""
    found = (word.lower() for word in _WORD.findall(text))
    return frozenset(word for word in found if len(word) >= _SHORT or word[0] in "@$#&" or any(c.isdigit() for c in word))


def facts(text: str) -> frozenset[str | tuple[str, str]]:
    """All words of a text, short ones too, and every two in a row: "king@Galdur founder@Belfil" is other news than "founder@Galdur"."""
    found = [word.lower() for word in _WORD.findall(text)]
    return frozenset([*found, *zip(found, found[1:], strict=False)])


def effective(
    records: Sequence[Record], question: str = "", answer: str | None = None, first: int = 0, demand: int | None = None
) -> Feedback:
    """Counts over records, of a run or a slice of them; records without an action (the verdict) are passed over.

    question: what the piece shows of it, "" where it does not. answer: None where the piece ends before it. first: index in the run of
    ``records[0]``, by which references ``observation:N`` of linked runs are told.
    """
    known, said = words(question), set()
    uses = [words(json.dumps(r.action["arguments"], ensure_ascii=False)) if r.action is not None else frozenset() for r in records]
    later = [words(answer or "")]
    for used in reversed(uses):
        later.append(later[-1] | used)
    after = later[::-1][1:]  # of each record: the words of all that comes after it
    counts = [0, 0, 0, 0, 0]
    for i, r in enumerate(records):
        if r.action is None or r.observation is None:
            continue
        seen = facts(r.observation)
        own = words(r.observation) - known - uses[i]
        valid = not (r.outcome or "").startswith(REFUSED)
        reference = f"observation:{first + i}"
        used = bool(own & after[i]) or any(reference in other.state for other in records[i + 1 :])
        qualities = (True, valid, bool(own), bool(seen - said), used)
        for place in range(5):
            counts[place] += all(qualities[: place + 1])
        if valid:
            said |= seen
    return Feedback(*counts, demand=demand)


def of_run(task: Task, run: Trajectory) -> Feedback:
    """The feedback of a whole run of a task, with the task's demand."""
    return effective(run.records, asked(run), final_answer(run), demand=demand(task))


def of_piece(run: Trajectory, observations: Sequence[int], question: bool, demand: int | None = None) -> Feedback:
    """The feedback in a piece of a run: some observations in a row, each with the model's turn after it.

    observations: their numbers in the run, from 0; the turn after the last of them may use it and is all that is seen of that call.
    question: whether the piece shows the question. demand: None takes what the whole run has, right for an expert's."""
    did = actions(run)
    if demand is None:
        demand = effective(did, asked(run), final_answer(run)).effective
    if not len(observations):
        return Feedback(0, 0, 0, 0, 0, demand)
    first, last = min(observations), max(observations)
    seen = [*did[first : last + 1], *(dataclasses.replace(r, observation=None) for r in did[last + 1 : last + 2])]
    answer = final_answer(run) if last + 1 == len(did) else None
    return effective(seen, asked(run) if question else "", answer, first, demand)


def asked(run: Trajectory) -> str:
    """The text before the model's first turn: system message and question."""
    texts = []
    for message in run.messages:
        if message.get("role") == "assistant":
            break
        texts.append(str(message.get("content") or ""))
    return "\n".join(texts)


def demand(task: Task) -> int:
    """Effective feedback of the task's expert; 0 where it asks nothing of tools and users."""
    try:
        return _demand(task)
    except TypeError:  # some tasks hold what cannot be hashed
        return _demand.__wrapped__(task)


@functools.lru_cache(maxsize=8192)
def _demand(task: Task) -> int:
    run = solve(task)
    return effective(actions(run), asked(run), final_answer(run)).effective
