"""The sandbox of a tool-calling task: what every relation says of everybody, and what calls change."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib

from .base import Call, Observation, quotable
from .search import CORE, title
from .store import KEYS, VALUES, cell
from .tool_graph_catalogue import Catalogue, Tool

CATALOGUE = Catalogue()
KINDS = {"@": "person", "$": "box", "#": "number"}
NUMBER = re.compile(r"#\d{1,6}", flags=re.ASCII)


def symbol(kind: str, i: int) -> str:
    return title(i) if kind == "person" else cell(i) if kind == "box" else f"#{i}"


def pool(kind: str, steps: int) -> int:
    """How many names of a kind a task of that length draws from: at least four times as many as it can use; numbers are always 64."""
    core = {"person": CORE, "box": len(KEYS)}.get(kind)
    return VALUES if core is None else core * max(1, -(-4 * steps // core))


@functools.lru_cache(maxsize=64)
def names(kind: str, steps: int) -> dict[str, int]:
    return {symbol(kind, i): i for i in range(pool(kind, steps))}


@dataclasses.dataclass
class State:
    """Relations that calls have set, and predicates that hold: both by subject. Never changed in place."""

    values: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    holds: frozenset[tuple[str, str]] = frozenset()


@dataclasses.dataclass(frozen=True)
class World:
    """facts: ((relation, subject), value), what the plan meets. Everything else is made when asked for, and leads to persons, boxes
    and (while the plan uses at most half of them) numbers that are not ``named``, those of the plan: from a wrong turn no way leads back
    to a right name, so the plan's lookups have no short cut."""

    seed: int
    steps: int
    facts: tuple[tuple[tuple[str, str], str], ...] = ()
    named: tuple[str, ...] = ()

    @functools.cached_property
    def _facts(self) -> dict[tuple[str, str], str]:
        return dict(self.facts)

    @functools.cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(self.named)

    def initial(self, relation: str, subject: str) -> str:
        fact = self._facts.get((relation, subject))
        if fact is not None:
            return fact
        kind = CATALOGUE.relations[relation]
        size = pool(kind, self.steps)
        i = zlib.crc32(f"{self.seed}/{relation}{subject}".encode()) % size
        while symbol(kind, i) in self._named:
            i = (i + 1) % size
        return symbol(kind, i)

    def value(self, state: State, relation: str, subject: str) -> str:
        found = state.values.get((relation, subject))
        return self.initial(relation, subject) if found is None else found

    def act(self, state: State, call: Call) -> tuple[State, Observation]:
        """One call whose arguments follow its schema. A refused call changes nothing."""
        made = CATALOGUE.by_name[call.name]
        values = [call.arguments[name].strip() for name, _ in made.arguments]
        problem = self._problem(state, made, values)
        if problem:
            return state, Observation(f"error: {made.name}: {problem}", error=True)
        subject, ref = values[0], made.name + values[0]
        holds = state.holds
        if made.adds or made.drops:
            holds = holds - {(p, subject) for p in made.drops} | {(p, subject) for p in made.adds}
        if made.writes:
            return State({**state.values, (made.writes, subject): values[-1]}, holds), Observation("ok", refs=(ref,))
        after = State(state.values, holds) if holds is not state.holds else state
        text = subject + self.value(state, made.reads, subject) if made.reads else "ok"
        return after, Observation(text, refs=(ref,))

    def _problem(self, state: State, made: Tool, values: list[str]) -> str | None:
        for value, (_, kind) in zip(values, made.arguments, strict=True):
            if kind in ("number", "code"):
                if not NUMBER.fullmatch(value):
                    return f"{kind} must be '#' and a number, got '{quotable(value)}'"
            elif value not in names(kind, self.steps):
                return f"no {kind} '{quotable(value)}'"
        subject = values[0]
        for need in made.needs:
            if (need, subject) not in state.holds:
                return f"{subject} is not {need}" if need.endswith("ed") else f"{subject} is not {need}; open it first"
        for value, (name, _) in zip(values, made.arguments, strict=True):
            relation = dict(made.proofs).get(name)
            if relation and value != self.value(state, relation, subject):
                return f"{quotable(value)} is not the {relation} of {subject}"
        return None
