"""Tasks by constrained search over the tool graph: backwards from a goal for its shape, forwards for names that fit.

A goal is an action; each argument is given, an earlier result, or looked up, and so on down to what is given. ``Shapes`` says which
types can be had by exactly so many calls and draws only such; ``Draft`` then puts in names so that no lookup has a short cut, every
pair of names is of the task's split, and later goals take up what earlier ones found or left behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .base import Split, in_split
from .store import VALUES
from .tool_graph_catalogue import GIVEN, Catalogue, Tool
from .tool_graph_screen import Step
from .tool_graph_world import World, names, pool, symbol

Shape = tuple[Tool, tuple] | None  # a tool and the shapes of its arguments; None: nothing to call


class DeadEnd(Exception):
    """No name fits: the search goes back to before the goal."""


@dataclasses.dataclass
class Shapes:
    """Which goals take exactly a number of calls, preparations included."""

    catalogue: Catalogue
    known: dict = dataclasses.field(default_factory=dict)

    def cost(self, tool: Tool) -> int:
        return 1 + len(self.catalogue.preparation(tool))

    def lookups(self, kind: str, calls: int) -> tuple[Tool, ...]:
        """The tools that end a search for a value of that type of exactly ``calls`` calls."""
        if (kind, calls) not in self.known:
            tools = [t for t in self.catalogue.tools if t.result == kind and kind in GIVEN and calls >= self.cost(t)]
            self.known[kind, calls] = tuple(t for t in tools if self.possible(t.arguments[0][1], calls - self.cost(t)))
        return self.known[kind, calls]

    def possible(self, kind: str, calls: int) -> bool:
        return kind in GIVEN if calls == 0 else bool(self.lookups(kind, calls))

    def splits(self, tool: Tool, calls: int) -> list[tuple[int, int]]:
        """How an action's calls can be shared out between what it acts on and its value."""
        left, kinds = calls - self.cost(tool), [kind for _, kind in tool.arguments]
        return [(a, left - a) for a in range(left + 1) if self.possible(kinds[0], a) and self.possible(kinds[1], left - a)]

    def goal(self, rng: np.random.Generator, calls: int) -> Shape:
        """An action of exactly ``calls`` calls; there is one for any number from 1."""
        tool = _pick(rng, [t for t in self.catalogue.tools if t.writes and self.splits(t, calls)])
        counts = _pick(rng, self.splits(tool, calls))
        return tool, tuple(self._draw(rng, kind, n) for (_, kind), n in zip(tool.arguments, counts, strict=True))

    def _draw(self, rng: np.random.Generator, kind: str, calls: int) -> Shape:
        if calls == 0:
            return None
        tool = _pick(rng, [t for t in self.lookups(kind, calls) for _ in range(self.cost(t))])  # by cost: what fits seldom is not rare
        return tool, (self._draw(rng, tool.arguments[0][1], calls - self.cost(tool)),)


@dataclasses.dataclass
class Draft:
    """A task in the making: its plan so far, and what the plan knows, has set and has looked up."""

    rng: np.random.Generator
    catalogue: Catalogue
    seed: int
    steps: int  # of the whole task: the size of the pools
    split: Split
    reuse: float
    plan: list[Step] = dataclasses.field(default_factory=list)
    source: dict[str, int | str] = dataclasses.field(default_factory=dict)  # every person and box met -> where it comes from
    numbers: list[tuple[int, str]] = dataclasses.field(default_factory=list)  # (call, number), codes left out
    facts: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    written: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    looked: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    used: set[str] = dataclasses.field(default_factory=set)  # numbers met or given; kept apart while there are enough of them

    def copy(self) -> Draft:
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Draft(**{name: part.copy() if isinstance(part, list | dict | set) else part for name, part in parts.items()})

    def world(self) -> World:
        numbers = self.used if len(self.used) <= VALUES // 2 else ()
        return World(self.seed, self.steps, tuple(sorted(self.facts.items())), tuple(sorted({*self.source, *numbers})))

    def goal(self, shape: Shape) -> None:
        """Add the calls of a goal: first its value, then what it acts on, then its preparation. Raises DeadEnd."""
        tool, (target, value) = shape
        (_, target_kind), (_, value_kind) = tool.arguments
        value_source, value = self._argument(value, value_kind, lambda name: True)
        initial = World(self.seed, self.steps, tuple(self.facts.items())).initial

        def fits(name: str) -> bool:
            free = (tool.writes, name) not in self.written and in_split(name, value, self.split)
            return free and name != value and initial(tool.writes, name) != value

        target_source, target = self._argument(target, target_kind, fits)
        self._prepare(tool, target_source, target)
        self.plan.append(Step(tool.name, (target_source, value_source), True, (target, value)))
        self.written[tool.writes, target] = value
        self.looked.discard((tool.writes, target))

    def _argument(self, shape: Shape, kind: str, fits: Callable[[str], bool]) -> tuple[int | str, str]:
        """(source, name) of a value that fits: given or met before, or at the end of the shape's lookups."""
        if shape is None:
            return self._known(kind, fits)
        tool, (child,) = shape
        left = [s for (r, s), v in self.written.items() if r == tool.reads and (r, s) not in self.looked and fits(v)]
        if child is None and left and self.rng.random() < self.reuse:
            subject = _pick(self.rng, left)
            source = self.source[subject]
        else:
            source, subject = self._argument(child, tool.arguments[0][1], lambda name: (tool.reads, name) not in self.looked)
        self._prepare(tool, source, subject)
        return self._look(tool, source, subject, fits, named=True)

    def _known(self, kind: str, fits: Callable[[str], bool]) -> tuple[int | str, str]:
        """A name that needs no call: with probability ``reuse`` one met before, else a new one that the question gives."""
        met = self.numbers if kind == "number" else [(s, n) for n, s in self.source.items() if n in names(kind, self.steps)]
        met = [(source, name) for source, name in met if fits(name)]
        if met and self.rng.random() < self.reuse:
            return _pick(self.rng, met)
        name = self._new(kind, fits)
        if kind != "number":
            self.source[name] = name
        return name, name

    def _new(self, kind: str, fits: Callable[[str], bool]) -> str:
        size = pool(kind, self.steps)
        for i in self.rng.integers(size, size=100):  # one name in five or in twenty-five fits the held-out split
            name = symbol(kind, int(i))
            taken = name in (self.used if kind == "number" and len(self.used) < VALUES // 2 else self.source)
            if not taken and fits(name):
                if kind == "number":
                    self.used.add(name)
                return name
        raise DeadEnd

    def _look(self, tool: Tool, source: int | str, subject: str, fits: Callable[[str], bool], named: bool) -> tuple[int, str]:
        """A lookup: what an earlier goal wrote, or a new name that becomes a fact of the world."""
        pair, kind = (tool.reads, subject), tool.result
        found = self.written.get(pair)
        if pair in self.looked or found and not fits(found):
            raise DeadEnd
        if found is None:
            self.facts[pair] = found = self._new(
                "number" if kind == "code" else kind, lambda n: in_split(subject, n, self.split) and fits(n)
            )
        self.plan.append(Step(tool.name, (source,), named, (subject,), found))
        self.looked.add(pair)
        if kind == "number":
            self.numbers.append((len(self.plan) - 1, found))
        elif kind != "code":
            self.source.setdefault(found, len(self.plan) - 1)
        return len(self.plan) - 1, found

    def _prepare(self, tool: Tool, source: int | str, subject: str) -> None:
        shown: dict[str, tuple[int, str]] = {}  # relation -> (call, value)
        for made in self.catalogue.preparation(tool):
            if made.reads:
                known = next((i for i, s in enumerate(self.plan) if (s.tool, s.arguments[0]) == (made.name, subject)), None)
                if known is None:
                    shown[made.reads] = self._look(made, source, subject, lambda name: True, named=False)
                else:  # for an earlier goal: this one takes a call less
                    shown[made.reads] = known, self.plan[known].result
                continue
            more = [shown[relation] for _, relation in made.proofs]
            self.plan.append(Step(made.name, (source, *(i for i, _ in more)), False, (subject, *(value for _, value in more))))


def search(rng: np.random.Generator, shapes: Shapes, seed: int, steps: int, split: Split, reuse: float, longest: int) -> Draft:
    """A plan of exactly ``steps`` calls in goals of at most ``longest``; a goal that comes to a dead end is drawn anew.

    A goal may take fewer calls than its shape, where an earlier one has met its needs: the loop fills up what is left.
    """
    draft = Draft(rng, shapes.catalogue, seed, steps, split, reuse)
    while len(draft.plan) < steps:
        most = min(longest, steps - len(draft.plan))
        calls = int(rng.integers(min(2, most), most + 1))  # a single call, which looks nothing up, only where no more are left
        attempt = draft.copy()
        try:
            attempt.goal(shapes.goal(rng, calls))
        except DeadEnd:
            continue
        draft = attempt
    return draft


def _pick(rng: np.random.Generator, several):
    return several[int(rng.integers(len(several)))]
