"""Tool calling: goals in an office of persons and boxes, reached by chains of typed calls over shared state.

The tools and what makes one of them possible: ``tool_graph_catalogue``. Tasks are found by search over that graph (``tool_graph_search``)
and screened (``tool_graph_screen``). A question names goals and the relations that lead to them, never a value on the way, nor the
calls that prepare one (a box wants its code and has to be opened): "Do 1 boss@Belado 2 badge&1 3 send@Danfil with&2 end." where &1 is
what part 1 found. The verifier replays the run's calls and compares the state, part by part.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Generator

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer
from .search import CORE, title
from .store import KEYS, VALUES, cell
from .tool_graph_catalogue import TOOLS, Catalogue
from .tool_graph_screen import Step, screen
from .tool_graph_search import Shapes, search
from .tool_graph_world import CATALOGUE, State, World

REFERENCES = 32  # references &1, &2, ... with a symbol of their own; later ones are spelled


@dataclasses.dataclass(frozen=True)
class ToolGraphTask(Task):
    plan: tuple[Step, ...] = ()
    world: World = None

    tools = tuple(one.schema for one in TOOLS)
    answer_decides = False

    def reset(self) -> State:
        return State()

    def step(self, state: State, call: Call) -> tuple[State, Observation]:
        problem = self.check_call(call)
        if problem:
            return state, Observation(problem, error=True)
        return self.world.act(state, call)

    @functools.cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the calls of each part of the question: preparations, then the one that the question names."""
        ends = [i for i, step in enumerate(self.plan) if step.named]
        return tuple(tuple(range(start, end + 1)) for start, end in zip([0, *(e + 1 for e in ends[:-1])], ends, strict=True))

    def expert(self) -> Generator[Turn, Observation, None]:
        part_of = {calls[-1]: number for number, calls in enumerate(self.parts, 1)}
        found: dict[int, str] = {}  # call -> what it showed
        note = "start"
        for number, calls in enumerate(self.parts, 1):
            for at, i in enumerate(calls):
                step = self.plan[i]
                values = [found[s] if isinstance(s, int) else s for s in step.sources]
                target, *others = [f"&{part_of[s]}{v}" if s in part_of else v for s, v in zip(step.sources, values, strict=True)]
                if step.named:
                    begin = f"now {number}" if at else f"{note} next {number}"
                    thought = f"{begin} {step.tool}{target}" + "".join(f" with{other}" for other in others)
                elif at == 0:
                    end = self.plan[calls[-1]]
                    thought = f"{note} next {number} {end.tool}{target} first {step.tool}{''.join(values[1:])}"
                else:
                    thought = f"then {step.tool}{''.join(values)}"
                seen = yield Turn(thought, called(step.tool, values))
                found[i] = seen.text.removeprefix(values[0])
            note = f"got&{number}{found[i]}" if step.result else f"did {number}"
        yield Turn(f"{note} end", answer=self.answer)

    def replay(self, trajectory: Trajectory) -> tuple[State, set[tuple[str, str, str]]]:
        """The state after a run's calls, and every (tool, subject, result) that its lookups showed."""
        state, shown = self.reset(), set()
        for r in trajectory.records:
            if r.action is not None:
                call = Call(r.action["name"], r.action["arguments"])
                state, seen = self.step(state, call)
                made = CATALOGUE.by_name.get(call.name)
                if made is not None and made.reads and not seen.error:
                    subject = seen.refs[0].removeprefix(made.name)
                    shown.add((made.name, subject, seen.text.removeprefix(subject)))
        return state, shown

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """For every part of the question whether it was met: its result was looked up, or its effect holds in the end."""
        state, shown = self.replay(trajectory)
        return tuple(self._met(self.plan[calls[-1]], state, shown) for calls in self.parts)

    def _met(self, step: Step, state: State, shown: set[tuple[str, str, str]]) -> bool:
        if step.result:
            return (step.tool, step.arguments[0], step.result) in shown
        return self.world.value(state, CATALOGUE.by_name[step.tool].writes, step.arguments[0]) == step.arguments[-1]

    def verify(self, trajectory: Trajectory) -> Outcome:
        answer = final_answer(trajectory)
        if answer != self.answer:
            return Outcome(False, 0.0, "answer: none given" if answer is None else "answer: wrong")
        state, shown = self.replay(trajectory)
        goals = set()
        for number, calls in enumerate(self.parts, 1):
            step = self.plan[calls[-1]]
            if not step.result:
                relation, subject = CATALOGUE.by_name[step.tool].writes, step.arguments[0]
                goals.add((relation, subject))
                if not self._met(step, state, shown):
                    holds = self.world.value(state, relation, subject)
                    return Outcome(False, 0.0, f"goal: part {number}: {relation} of {subject} is {holds}, should be {step.arguments[-1]}")
        for (relation, subject), value in state.values.items():
            if (relation, subject) not in goals and value != self.world.initial(relation, subject):
                return Outcome(False, 0.0, f"state: {relation} of {subject} became {value}, which nobody asked for")
        for step in self.plan:
            if step.result and not self._met(step, state, shown):
                return Outcome(False, 0.0, f"evidence: {step.tool} of {step.arguments[0]} was never looked up")
        return Outcome(True, 1.0, "goals, state and evidence: accepted")


def called(name: str, values: list[str]) -> Call:
    return Call(name, {argument: value for (argument, _), value in zip(CATALOGUE.by_name[name].arguments, values, strict=True)})


def question(plan: tuple[Step, ...]) -> str:
    numbers: dict[int, int] = {}  # call -> part
    words = ["Do"]
    for i, step in enumerate(plan):
        if step.named:
            numbers[i] = len(numbers) + 1
            target, *others = [f"&{numbers[s]}" if isinstance(s, int) else s for s in step.sources]
            words.append(f"{numbers[i]} {step.tool}{target}" + "".join(f" with{other}" for other in others))
    return " ".join([*words, "end."])


def pairs(plan: tuple[Step, ...]) -> tuple[tuple[str, str], ...]:
    """(subject, value) of every call; one without a value has that of the call that it prepares."""
    found: list[tuple[str, str]] = []
    for step in reversed(plan):
        value = step.result or (step.arguments[-1] if len(step.arguments) > 1 else found[-1][1])
        found.append((step.arguments[0], value))
    return tuple(reversed(found))


@dataclasses.dataclass(frozen=True)
class ToolGraph(Domain):
    name: str = "tool_calling"
    goal_calls: int = 6  # most calls a single goal takes, preparations included; with 1 nothing is ever looked up
    reuse: float = 0.4  # probability that an argument is something met before, or a lookup shows what an earlier goal wrote

    def __post_init__(self):
        if not 0.0 <= self.reuse <= 1.0:
            raise ConfigError(f"tool_calling.reuse is {self.reuse}; it is a probability")
        if self.goal_calls < 1:
            raise ConfigError(f"tool_calling.goal_calls is {self.goal_calls}; a goal takes at least 1 call")

    @functools.cached_property
    def _shapes(self) -> Shapes:
        return Shapes(Catalogue())

    def propose(self, seed: int, steps: int, split: Split = "train") -> ToolGraphTask:
        """A task that takes exactly ``steps`` calls, none of them useless, and of more than one call one that looks something up.

        Raises ConfigError when steps is less than 1.
        """
        if steps < 1:
            raise ConfigError(f"tool_calling: a task needs at least 1 step, got {steps}")
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/graph/{split}".encode())])
        while True:
            draft = search(rng, self._shapes, seed, steps, split, self.reuse, self.goal_calls)
            plan, world = tuple(draft.plan), draft.world()
            looks = any(step.result for step in plan) or steps == 1 or self.goal_calls == 1
            if looks and screen(plan, world, CATALOGUE) is None:
                break
        return ToolGraphTask(
            domain=self.name,
            task_id=f"tool_calling-graph-{split}-{steps}-{seed}",
            steps=steps,
            question=question(plan),
            answer="done",
            evidence=tuple(dict.fromkeys(step.tool + step.arguments[0] for step in plan if step.result)),
            chain=pairs(plan),
            plan=plan,
            world=world,
        )

    def scaffold(self) -> tuple[str, ...]:
        words = [f" {one.name}" for one in TOOLS]
        heads = ['{"name": "' + one.name + '", "arguments": {"' + one.arguments[0][0] + '": "' for one in TOOLS]
        seconds = [f'", "{argument}": "' for argument in dict.fromkeys(one.arguments[1][0] for one in TOOLS if len(one.arguments) > 1)]
        small = ("Do", "start", "got", "did", "now", "then", "open", "ok", "done", "end", " with", " first")
        references = [f"&{i}" for i in range(1, REFERENCES + 1)]
        names = [*map(title, range(CORE)), *map(cell, range(len(KEYS))), *(f"#{i}" for i in range(VALUES))]
        return (*small, *words, *heads, *seconds, *references, *names)
