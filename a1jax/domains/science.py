"""Science: chains of physical formulas, each step giving a quantity with its unit from the one before and one out of a table.

Corpus: a table of objects with two properties each, of which a step needs one; some are given in a scaled unit (cm, mA, L). Tools:
``lookup`` and ``calculator``; without tools the table stands in the question and the run is one derivation. Each step can be
checked by itself: a run states its results as ``force=48 N``. Every task has a table of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Generator, Iterator
from fractions import Fraction

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, consulted, final_answer, in_split, quotable, tool
from .science_formulas import SMALLER, UNIT, Step, row, walk
from .science_units import Unreadable, calculate, near, quantity, show
from .search import CORE, title

TOOLS = (
    tool("lookup", "Show the properties of an object.", object="string"),
    tool("calculator", "Value of an expression of numbers, + - * / ^ and brackets.", expression="string"),
)
_STATED = re.compile(r"\b([a-z]+) ?= ?([-+]?[\d.,]+(?:e[-+]?\d+)?) ?([A-Za-z][A-Za-z/*^\d]*)")


@dataclasses.dataclass(frozen=True)
class ScienceTask(Task):
    table: tuple[tuple[str, str], ...] = ()  # name, its row
    start: str = ""  # the first quantity, of the object evidence[0]
    first: Fraction = Fraction(0)
    path: tuple[Step, ...] = ()

    tools = TOOLS

    @property
    def content(self) -> str:
        """The question names objects and quantities; the numbers are the table's."""
        return repr((self.question, self.first, [step.shown for step in self.path]))

    @functools.cached_property
    def _rows(self) -> dict[str, str]:
        return dict(self.table)

    def reset(self):
        return ()

    def step(self, state, call: Call):
        problem = self.check_call(call)
        if problem:
            return state, Observation(problem, error=True)
        if call.name == "calculator":
            return state, answer_calculator(call.arguments["expression"])
        name = call.arguments["object"].strip()
        text = self._rows.get(name)
        if text is None:
            return state, Observation(f"error: lookup: no object '{quotable(name)}'", error=True)
        return state, Observation(text, refs=(name,))

    def results(self) -> tuple[tuple[str, Fraction], ...]:
        """(quantity, SI value) after the start and after every step."""
        return ((self.start, self.first), *((step.result, step.value) for step in self.path))

    def expert(self) -> Generator[Turn, Observation, None]:
        yield Turn(f"start{self.evidence[0]}", Call("lookup", {"object": self.evidence[0]}))
        value, thought = self.first, stated(self.start, self.first)
        for number, step in enumerate(self.path, 1):
            ask = Call("lookup", {"object": step.name})
            yield Turn(f"{thought} next {number} {step.result} with {step.property}{step.name}", ask)
            seen = yield Turn(f"{step.property}={step.shown}", Call("calculator", {"expression": step.expression(value)}))
            value = Fraction(seen.text)
            thought = stated(step.result, value)
        yield Turn(f"{thought} end", answer=f"{show(value)} {UNIT[self.path[-1].result]}")

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """For every step whether the run states its result, ``force=48 N`` or the same in another unit, in the order of the steps."""
        found = iter(list(_statements(trajectory)))
        met = []
        for name, value in self.results()[1:]:
            left = list(found)
            at = next((i for i, (n, text) in enumerate(left) if n == name and _is(text, value, name)), None)
            met.append(at is not None)
            found = iter(left if at is None else left[at + 1 :])
        return tuple(met)

    def verify(self, trajectory: Trajectory) -> Outcome:
        answer = final_answer(trajectory)
        if answer is None:
            return Outcome(False, 0.0, "answer: none given")
        got, wanted = quantity(answer), quantity(self.answer)
        if got is None:
            return Outcome(False, 0.0, "answer: not a number with a unit")
        if got.dimension != wanted.dimension:
            return Outcome(False, 0.0, "answer: the unit is of another quantity")
        if not near(got.value, wanted.value):
            return Outcome(False, 0.0, "answer: wrong")
        looked = {str(r.action["arguments"].get("object")).strip() for r in trajectory.records if r.action and r.action["name"] == "lookup"}
        looked &= consulted(trajectory)
        missing = [name for name in self.evidence if name not in looked]
        if missing and self.tools:
            return Outcome(False, 0.0, f"evidence: {missing[0]} was never looked up")
        return Outcome(True, 1.0, "answer and evidence: accepted" if self.tools else "answer: accepted")


@dataclasses.dataclass(frozen=True)
class DerivationTask(ScienceTask):
    """The same without tools: the table stands in the question, and the expert derives all in one turn."""

    tools = ()

    def expert(self) -> Generator[Turn, Observation, None]:
        lines = [stated(self.start, self.first), *(f"{stated(step.result, step.value)} with {step.shown}" for step in self.path)]
        yield Turn(" ".join(lines) + " end", answer=self.answer)


def stated(name: str, value: Fraction) -> str:
    return f"{name}={show(value)} {UNIT[name]}"


def answer_calculator(expression: str) -> Observation:
    try:
        return Observation(show(calculate(expression)))
    except Unreadable as error:
        return Observation(f"error: calculator: {error}", error=True)


def _statements(trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    for message in trajectory.messages:
        if message.get("role") == "assistant":
            for key in ("reasoning_content", "content"):
                for name, value, unit_text in _STATED.findall(message.get(key) or ""):
                    yield name, f"{value} {unit_text}"


def _is(text: str, value: Fraction, name: str) -> bool:
    got = quantity(text)
    return got is not None and got.dimension == quantity(f"1 {UNIT[name]}").dimension and near(got.value, value)


@dataclasses.dataclass(frozen=True)
class Science(Domain):
    name: str = "science"
    tools: bool = True  # False: the table stands in the question, and there are no tools
    conversions: float = 0.25  # probability that a property is given in a smaller unit

    def __post_init__(self):
        if not 0.0 <= self.conversions <= 1.0:
            raise ConfigError(f"science.conversions is {self.conversions}; it is a probability")

    def propose(self, seed: int, steps: int, split: Split = "train") -> ScienceTask:
        """A walk over formulas whose numbers stay between 0.05 and 999 with at most two decimals, and over objects without revisits.

        Raises ConfigError when steps is less than 1.
        """
        if steps < 1:
            raise ConfigError(f"science: a task needs at least 1 step, got {steps}")
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        names: list[str] = []
        while len(names) <= steps:
            names = _names(rng, steps, split)
        path: list[Step] = []
        while len(path) < steps:
            start, first = sorted(UNIT)[int(rng.integers(len(UNIT)))], Fraction(int(rng.integers(2, 13)))
            path = walk(rng, start, first, names[1:], self.conversions)
        given, value = path[-1].result, path[-1].value
        rows = [(names[0], start, f"{show(first)} {UNIT[start]}"), *((step.name, step.property, step.shown) for step in path)]
        table = tuple((name, row(rng, name, wanted, shown)) for name, wanted, shown in sorted(rows))
        plan = "".join(f" {number} {step.result} with {step.property}{step.name}" for number, step in enumerate(path, 1))
        question = f"Take {start}{names[0]}, then find{plan} end. Answer with the unit."
        return (ScienceTask if self.tools else DerivationTask)(
            domain=self.name,
            task_id=f"science-{split}-{steps}-{seed}" + ("" if self.tools else "-derivation"),
            steps=steps,
            question=question if self.tools else "\n".join((question, *(text for _, text in table))),
            answer=f"{show(value)} {UNIT[given]}",
            evidence=tuple(names) if self.tools else (),
            chain=tuple(zip(names[:-1], names[1:], strict=True)),
            table=table,
            start=start,
            first=first,
            path=tuple(path),
        )

    def scaffold(self) -> tuple[str, ...]:
        words = [f" {w}" for w in UNIT] + [f"{w}=" for w in UNIT]
        units = [f" {u}" for u in (*UNIT.values(), *(small for small, _ in SMALLER.values()))]
        calls = ('{"name": "lookup", "arguments": {"object": "', '{"name": "calculator", "arguments": {"expression": "')
        return (
            "Take",
            ", then find",
            "end. Answer with the unit.",
            " with",
            " next",
            "start",
            " end",
            *calls,
            *words,
            *units,
            *map(title, range(CORE)),
        )


def _names(rng: np.random.Generator, steps: int, split: Split) -> list[str]:
    """Objects along pairs of the split; at a dead end fewer than were asked for."""
    everything = [title(i) for i in range(CORE * max(1, -(-4 * steps // CORE)))]
    names = [everything[int(rng.integers(len(everything)))]]
    for _ in range(200 + 20 * steps):  # one name in five fits the held-out split
        name = everything[int(rng.integers(len(everything)))]
        if len(names) <= steps and name not in names and in_split(names[-1], name, split):
            names.append(name)
    return names
