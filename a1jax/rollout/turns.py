"""The environment's side of a run: what a turn of the model means, what comes back, how the run ends, and how a turn is taken back.

Nothing here knows slots or caches. ``act`` touches its own run only, so that runs may act on threads of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..data import chat
from ..domains.base import Call, Observation, Task, judge, record, said, tool_message, user_message
from ..types import TRUNCATED, Record, Trajectory


@dataclasses.dataclass(frozen=True)
class Mark:
    """Where a run stood when the model began a turn: the environment's state, messages and records before it, and the tokens up to
    the end of the turn before (0: there was none) with that turn's place among the messages plus one."""

    state: Any
    messages: int
    records: int
    end: int
    start: int


@dataclasses.dataclass
class Run:
    """A run in progress. start: messages up to and with the model's last turn; end: tokens up to that turn's end; before: the mark of
    the last turn; forced: the model was asked for its final answer."""

    index: int
    attempt: int
    task: Task
    state: Any
    messages: list[dict]
    records: list[Record]
    turns: int = 0
    start: int = 0
    end: int = 0
    before: Mark | None = None
    forced: bool = False

    def begin_turn(self, end: int):
        """The model wrote a turn that ends at token ``end``."""
        self.before = Mark(self.state, len(self.messages), len(self.records), self.end, self.start)
        self.turns, self.end, self.start = self.turns + 1, end, len(self.messages) + 1

    def taken_back(self, request: str) -> Run:
        """The run without its last turn, asked for its answer instead. Environments are pure: the state goes back too."""
        mark = self.before
        messages = [*self.messages[: mark.messages], {"role": "user", "content": request}]
        place = {"state": mark.state, "messages": messages, "records": self.records[: mark.records], "start": mark.start, "end": mark.end}
        return dataclasses.replace(self, **place, turns=self.turns - 1, before=None, forced=True)

    def ended(self, status: str | None) -> Trajectory:
        metadata = {"forced": True} if self.forced else {}
        task = self.task
        return Trajectory(task.domain, task.task_id, tuple(self.messages), task.tools, tuple(self.records), 0.0, status, metadata)


def act(run: Run, text: str) -> tuple[Trajectory | None, int]:
    """Read the turn strictly, run its calls, append what came back. (the judged run when this was its end or None, wrong calls).

    A forced run ends here in any case: TRUNCATED when it answers with anything but an answer. Raises what the environment raises.
    """
    try:
        message = chat.parse_turn(text)
    except chat.ToolCallError as error:
        run.messages.append({"role": "assistant", "content": text})
        if run.forced:
            return run.ended(TRUNCATED), 1
        run.messages.append(tool_message(run.turns - 1, "parser", Observation(f"error: {error}", error=True)))
        return None, 1
    calls = message.get("tool_calls")
    if run.forced or not calls:
        run.messages.append(message)
        return (run.ended(TRUNCATED) if calls else _said(run, message["content"])), 0
    return None, _call(run, message)


def _said(run: Run, text: str) -> Trajectory | None:
    """A turn without a call: the judged run, or None where a simulated user had something to say to it."""
    if not run.forced:
        run.state, observation = run.task.reply(run.state, text)
        if observation is not None:
            run.messages.append(user_message(observation))
            run.records.append(said(text, observation))
            return None
    return judge(run.task, run.ended(None))


def _call(run: Run, message: dict[str, Any]) -> int:
    """Run the calls of a turn in their order; how many of them were wrong."""
    number, wrong = run.turns - 1, 0
    calls = [Call(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    ids = [f"call_{number}" if i == 0 else f"call_{number}_{i}" for i in range(len(calls))]
    named = [{**c, "id": name} for c, name in zip(message["tool_calls"], ids, strict=True)]
    run.messages.append({**message, "tool_calls": named})
    for name, call in zip(ids, calls, strict=True):
        run.state, observation = run.task.step(run.state, call)
        wrong += int(observation.error)
        run.messages.append({**tool_message(number, call.name, observation), "tool_call_id": name})
        run.records.append(record(call, observation))
    return wrong
