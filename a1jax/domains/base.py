"""The knowledge-action graph of one domain (arXiv 2606.30616, section 2.2): corpus, actions, observations, verifiers.

A domain proposes tasks and knows an expert; a task is an environment in pure functions (``reset``, ``step``) with its verifier.
Everything is seeded: the same (seed, steps, split) gives the same task on every machine. To add a domain: one module with a
``Task`` and a ``Domain`` subclass, one line in ``domains/__init__.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from collections.abc import Generator, Sequence
from typing import Any, Literal

from ..types import FAILED, FINISHED, Record, Trajectory

Split = Literal["train", "heldout"]
State = Any
SAY = "say"
HELDOUT_SHARE = 5  # one ordered pair of entities in five belongs to the held-out split


@dataclasses.dataclass(frozen=True)
class Call:
    """An action: the tool's name and its arguments as parsed from what the model wrote."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a tool answered. error: the call was wrong; the text then says why. refs: corpus items it showed."""

    text: str
    error: bool = False
    refs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A verifier's verdict on a run. reward is 1.0 or 0.0; reason is one line."""

    accepted: bool
    reward: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of an expert: a thought, then either a call or text, which is the answer unless the task's user replies to it."""

    thought: str
    call: Call | None = None
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """x = (q, d, y*, E_q, V_q): question, domain, answer, evidence needed; the verifier is the method ``verify``.

    steps: hops or operations an expert needs, the length knob. chain: the ordered entity pairs the task walks; pairs of the
    train split and of the held-out split are disjoint, so held-out tasks share no part of a chain with training ones.
    """

    domain: str
    task_id: str
    steps: int
    question: str
    answer: str
    evidence: tuple[str, ...]
    chain: tuple[tuple[str, str], ...]

    tools = ()
    blocking = False  # its methods may take long: a rollout then calls them on a thread of their own
    options = ()  # answers that the question lists, the right one among others
    final_request = ""  # protocol: at the turn limit the last turn is taken back, and this asks for the answer instead; "": the run is cut
    answer_decides = True  # an answer that says what ``answer`` says is right, in any words; False: a state or rules for texts decide
    premises = ()  # of a self-contained task: the parts of its question that the answer rests on, word for word

    @property
    def self_contained(self) -> bool:
        """Whether the question holds all that the answer rests on, so that tools, if any, only calculate."""
        return not self.tools

    @property
    def content(self) -> str:
        """What makes the task, without its seed: tasks of equal content are one task. Families whose hidden state is not told by question,
        answer and chain, or whose question can say one thing in several ways, say their own. The same on every machine."""
        return repr((self.question, self.answer, self.chain))

    def recompute(self, question: str) -> str | None:
        """Of a self-contained task: the answer by a question alone, which may lack premises; None: by it there is none. By default every
        premise is needed and nothing else is known."""
        return self.answer if all(premise in question for premise in self.premises) else None

    def careless(self) -> tuple[str, ...]:
        """Answers of somebody who heeds nothing that is asked, where the task can tell: none may be accepted."""
        return ()

    def messages(self) -> tuple[dict[str, Any], ...]:
        return ({"role": "user", "content": self.question},)

    def reset(self) -> State:
        raise TypeError(f"{type(self).__name__} must define reset")

    def step(self, state: State, call: Call) -> tuple[State, Observation]:
        raise TypeError(f"{type(self).__name__} must define step")

    def reply(self, state: State, text: str) -> tuple[State, Observation | None]:
        """What a simulated user says to a turn without a call, or None where that turn was the answer: the run is over."""
        return state, None

    def expert(self) -> Generator[Turn, Observation, None]:
        raise TypeError(f"{type(self).__name__} must define expert")

    def verify(self, trajectory: Trajectory) -> Outcome:
        raise TypeError(f"{type(self).__name__} must define verify")

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """Verdicts on parts of a run, for process rewards; by default the verifier's alone."""
        return (self.verify(trajectory).accepted,)

    def check_call(self, call: Call) -> str | None:
        """One line saying what is wrong with a call by the tools' schemas, or None."""
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.tools}
        if call.name not in schemas:
            return f"error: no tool '{quotable(call.name)}'; tools are {', '.join(sorted(schemas))}"
        properties = schemas[call.name]["properties"]
        for name in schemas[call.name]["required"]:
            if name not in call.arguments:
                return f"error: {call.name} needs argument '{name}'"
        for name, value in call.arguments.items():
            if name not in properties:
                return f"error: {call.name} has no argument '{quotable(name)}'; it takes {', '.join(properties)}"
            if not isinstance(value, _JSON_TYPES[properties[name]["type"]]) or isinstance(value, bool):
                return f"error: {call.name}: argument '{name}' must be a {properties[name]['type']}"
        return None


def quotable(text: str) -> str:
    """What a model wrote, as an error may quote it: cut, on one line, and as UTF-8 can hold it."""
    return " ".join(text[:60].split()).encode("utf-8", "replace").decode("utf-8")


_JSON_TYPES = {"string": str, "integer": int, "number": (int, float), "object": dict, "array": list}


@dataclasses.dataclass(frozen=True)
class Domain:
    """A family of tasks. Subclasses add their knobs as fields and define ``propose``."""

    name: str = ""

    def propose(self, seed: int, steps: int, split: Split = "train") -> Task:
        raise TypeError(f"{type(self).__name__} must define propose")

    def scaffold(self) -> tuple[str, ...]:
        """Strings its runs repeat word for word; a small tokenizer may give each a symbol of its own."""
        return ()


def tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """An OpenAI-style tool schema; arguments maps each (required) argument to its JSON type."""
    parameters = {"type": "object", "properties": {k: {"type": v} for k, v in arguments.items()}, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def in_split(a: str, b: str, split: Split) -> bool:
    """Whether the ordered pair (a, b) belongs to a split. Fixed for ever by the names, whatever the seed."""
    heldout = zlib.crc32(f"{a}>{b}".encode()) % HELDOUT_SHARE == 0
    return heldout == (split == "heldout")


def call_message(turn_number: int, thought: str, call: Call) -> dict[str, Any]:
    """The assistant message of a turn that calls a tool."""
    calls = [{"id": f"call_{turn_number}", "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}]
    return {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": calls}


def tool_message(turn_number: int, name: str, observation: Observation) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{turn_number}", "name": name, "content": observation.text}


def user_message(observation: Observation) -> dict[str, Any]:
    return {"role": "user", "content": observation.text}


def said(text: str, observation: Observation) -> Record:
    """The linked record of a turn that a simulated user replied to; its action is named SAY, which no tool may be."""
    return Record(observation.refs, {"name": SAY, "arguments": {"text": text}}, observation.text, None)


def was_said(r: Record) -> bool:
    """Whether a record is of a turn that a simulated user replied to; a call that a model named SAY was refused like any unknown one."""
    return r.action is not None and r.action["name"] == SAY and r.outcome is None


def record(call: Call, observation: Observation) -> Record:
    """The linked record of one call: state refs are what the arguments and the answer point to in the corpus."""
    outcome = "schema: refused" if observation.error else None
    return Record(observation.refs, {"name": call.name, "arguments": dict(call.arguments)}, observation.text, outcome)


def final_answer(trajectory: Trajectory) -> str | None:
    """The text of the last message when it is an assistant's without a call."""
    last = trajectory.messages[-1] if trajectory.messages else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return None
    return (last.get("content") or "").strip()


def solve(task: Task) -> Trajectory:
    """Let the task's expert act in the real environment; the verifier then judges the run like any other."""
    return play(task, task.expert())


def play(task: Task, turns: Generator[Turn, Observation, None]) -> Trajectory:
    """Take turns in the real environment, whatever it answers, and judge the run. It ends with them, or where the task's user ends it."""
    state, messages, records, observation = task.reset(), list(task.messages()), [], None
    for number in itertools.count():
        try:
            turn = turns.send(observation)
        except StopIteration:
            break
        if turn.call is None:
            messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.thought})
            state, observation = task.reply(state, turn.answer)
            if observation is None:
                break
            messages.append(user_message(observation))
            records.append(said(turn.answer, observation))
        else:
            messages.append(call_message(number, turn.thought, turn.call))
            state, observation = task.step(state, turn.call)
            messages.append(tool_message(number, turn.call.name, observation))
            records.append(record(turn.call, observation))
    return judge(task, Trajectory(task.domain, task.task_id, tuple(messages), task.tools, tuple(records)))


def judge(task: Task, trajectory: Trajectory) -> Trajectory:
    """The run with the verifier's verdict written into its last record, reward and status, and metadata: "steps", "rubrics", a list of
    bools. Failed runs are kept too."""
    outcome = task.verify(trajectory)
    records = (*trajectory.records, Record(tuple(task.evidence), None, None, outcome.reason))
    status = FINISHED if outcome.accepted else FAILED
    metadata = {**trajectory.metadata, "steps": task.steps, "rubrics": list(task.rubrics(trajectory))}
    return dataclasses.replace(trajectory, records=records, reward=outcome.reward, status=status, metadata=metadata)


def consulted(trajectory: Trajectory) -> set[str]:
    """Every corpus item some observation of the run showed."""
    return {ref for r in trajectory.records if r.action is not None for ref in r.state}


def fingerprint(tasks: Sequence[Task]) -> str:
    """A short digest of a list of tasks, to prove that two machines evaluate the same ones."""
    text = json.dumps([(t.task_id, t.question, t.answer) for t in tasks])
    return f"{zlib.crc32(text.encode()):08x}"
