"""Tool calling at its smallest: chains of typed calls over a small stateful store (quickstart; the six domains use ``tool_graph``).

The store holds cells; each operation of a task copies one cell into another, which takes two calls: ``get`` shows a value that
nothing else reveals, ``put`` writes it. Later operations read what earlier ones wrote, so a slip spreads. The verifier replays
the run's calls on the initial store and compares the final state.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Generator

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer, in_split, quotable, tool

KEYS = (
    "amber",
    "basil",
    "cedar",
    "daisy",
    "elder",
    "fern",
    "grape",
    "hazel",
    "iris",
    "jade",
    "kiwi",
    "lemon",
    "maple",
    "nutmeg",
    "olive",
    "pearl",
    "quartz",
    "rose",
    "sage",
    "thyme",
    "umber",
    "violet",
    "walnut",
    "xenon",
    "yarrow",
    "zinc",
    "aspen",
    "birch",
    "clover",
    "dahlia",
    "ebony",
    "flint",
)
VALUES = 64
TOOLS = (
    tool("get", "Show the value of a cell.", key="string"),
    tool("put", "Write a value, such as #7, into a cell.", key="string", value="string"),
)


def cell(i: int) -> str:
    """The i-th cell's name: 32 short names, then the same with a number."""
    return "$" + KEYS[i % len(KEYS)] + (f"-{i // len(KEYS) + 1}" if i >= len(KEYS) else "")


@dataclasses.dataclass(frozen=True)
class StoreTask(Task):
    store: tuple[tuple[str, str], ...] = ()  # initial cells and values
    operations: tuple[tuple[str, str], ...] = ()  # (source, target) in order

    tools = TOOLS

    @property
    def content(self) -> str:
        return repr((self.question, self.store))

    def reset(self) -> dict[str, str]:
        return dict(self.store)

    def step(self, state: dict[str, str], call: Call):
        problem = self.check_call(call)
        if problem:
            return state, Observation(problem, error=True)
        key = call.arguments["key"].strip()
        if key not in state:
            return state, Observation(f"error: no cell '{quotable(key)}'", error=True)
        if call.name == "get":
            return state, Observation(key + state[key], refs=(key,))
        value = call.arguments["value"].strip()
        if not re.fullmatch(r"#\d{1,6}", value, flags=re.ASCII):
            return state, Observation(f"error: put: value must be '#' and a number, got '{quotable(value)}'", error=True)
        return {**state, key: value}, Observation("ok", refs=(key,))

    def expert(self) -> Generator[Turn, Observation, None]:
        for number, (source, target) in enumerate(self.operations, 1):
            seen = yield Turn(f"step {number} copy{source}", Call("get", {"key": source}))
            value = seen.text.removeprefix(source)
            following = f" {number + 1}" if number < self.steps else " end"
            yield Turn(f"from{source} into{target}{value} next{following}", Call("put", {"key": target, "value": value}))
        yield Turn("end", answer=self.answer)

    def verify(self, trajectory: Trajectory) -> Outcome:
        if final_answer(trajectory) != self.answer:
            return Outcome(False, 0.0, "answer: none given" if final_answer(trajectory) is None else "answer: wrong")
        state, shown = self.reset(), set()
        for r in trajectory.records:
            if r.action is not None:
                state, seen = self.step(state, Call(r.action["name"], r.action["arguments"]))
                shown |= set(seen.refs) if r.action["name"] == "get" else set()
        wanted = self.reset()
        for source, target in self.operations:
            wanted[target] = wanted[source]
        wrong = [key for key in wanted if state[key] != wanted[key]]
        if wrong:
            return Outcome(False, 0.0, f"state: {wrong[0]} holds {state[wrong[0]]}, should be {wanted[wrong[0]]}")
        missing = [key for key in self.evidence if key not in shown]
        if missing:
            return Outcome(False, 0.0, f"evidence: {missing[0]} was never looked at")
        return Outcome(True, 1.0, "state and evidence: accepted")


@dataclasses.dataclass(frozen=True)
class Store(Domain):
    name: str = "tool_calling"
    reuse: float = 0.5  # probability that an operation reads a cell an earlier one wrote

    def __post_init__(self):
        if not 0.0 <= self.reuse <= 1.0:
            raise ConfigError(f"tool_calling.reuse is {self.reuse}; it is a probability")

    def propose(self, seed: int, steps: int, split: Split = "train") -> StoreTask:
        """``steps`` copies; no cell is read twice or written twice, and an operation never undoes what a later check needs.

        Raises ConfigError when steps is less than 1.
        """
        if steps < 1:
            raise ConfigError(f"tool_calling: a task needs at least 1 step, got {steps}")
        size = len(KEYS) * max(1, -(-4 * steps // len(KEYS)))
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        operations: list[tuple[str, str]] = []
        while len(operations) < steps:
            operations = self._operations(rng, size, steps, split)
        used = sorted({key for pair in operations for key in pair})
        store = tuple((key, f"#{int(rng.integers(VALUES))}") for key in used)
        plan = "".join(f" {number} copy{source} into{target}" for number, (source, target) in enumerate(operations, 1))
        return StoreTask(
            domain=self.name,
            task_id=f"tool_calling-{split}-{steps}-{seed}",
            steps=steps,
            question=f"Do{plan} end.",
            answer="done",
            evidence=tuple(source for source, _ in operations),
            chain=tuple(operations),
            store=store,
            operations=tuple(operations),
        )

    def _operations(self, rng: np.random.Generator, size: int, steps: int, split: Split) -> list[tuple[str, str]]:
        operations: list[tuple[str, str]] = []
        cells = [cell(i) for i in range(size)]
        read, written = set(), set()
        for _ in range(steps):
            again = sorted(written - read)
            fresh = [c for c in cells if c not in read and c not in written]
            sources = again if again and rng.random() < self.reuse else fresh
            source = sources[int(rng.integers(len(sources)))] if sources else None
            targets = [c for c in cells if c not in written and c != source and source and in_split(source, c, split)]
            if not targets:
                break  # a dead end: the caller begins anew
            operations.append((source, targets[int(rng.integers(len(targets)))]))
            read.add(source)
            written.add(operations[-1][1])
        return operations

    def scaffold(self) -> tuple[str, ...]:
        cells = [cell(i) for i in range(len(KEYS))]
        values = [f"#{i}" for i in range(VALUES)]
        return (
            "Do",
            "from",
            " copy",
            " into",
            '{"name": "get", "arguments": {"key": "',
            '{"name": "put", "arguments": {"key": "',
            '", "value": "',
            "ok",
            "end",
            "done",
            *cells,
            *values,
        )
