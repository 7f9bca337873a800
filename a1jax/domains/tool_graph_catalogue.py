"""The tool dependency graph (arXiv 2606.30616, section 2.2): tools as data, and which of them makes another one possible.

An office of persons and boxes. A lookup reads a relation of its first argument, an action writes one; a box has to be opened with
its own code before it is read or written and closes again after that; it has to be reserved before it is assigned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from .base import tool


@dataclasses.dataclass(frozen=True)
class Tool:
    """arguments: (name, type), the subject first. reads, writes: the relation of the subject that is looked up or set to the last
    argument. needs, adds, drops: predicates of the subject. proofs: (argument, relation): it must be what the relation says of the subject.
    """

    name: str
    description: str
    arguments: tuple[tuple[str, str], ...]
    result: str | None = None  # type of what a lookup gives
    reads: str = ""
    writes: str = ""
    needs: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    proofs: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        return tool(self.name, self.description, **{name: "string" for name, _ in self.arguments})


def _lookup(name: str, subject: str, result: str, description: str, **more: Any) -> Tool:
    return Tool(name, description, ((subject, subject),), result, **{"reads": name, **more})


TOOLS = (
    _lookup("boss", "person", "person", "The boss of a person."),
    _lookup("friend", "person", "person", "The friend of a person."),
    _lookup("badge", "person", "number", "The number on a person's badge."),
    _lookup("mail", "person", "number", "The number last sent to a person."),
    _lookup("box", "person", "box", "The box that belongs to a person."),
    _lookup("keeper", "box", "person", "The person a box is assigned to."),
    _lookup("code", "box", "code", "The code that opens a box."),
    _lookup("read", "box", "number", "The number in an open box; closes it.", reads="content", needs=("open",), drops=("open",)),
    Tool("open", "Open a box with its code.", (("box", "box"), ("code", "code")), adds=("open",), proofs=(("code", "code"),)),
    Tool(
        "write",
        "Put a number, such as #7, into an open box; closes it.",
        (("box", "box"), ("value", "number")),
        writes="content",
        needs=("open",),
        drops=("open",),
    ),
    Tool("send", "Send a number, such as #7, to a person.", (("person", "person"), ("value", "number")), writes="mail"),
    Tool("reserve", "Reserve a box.", (("box", "box"),), adds=("reserved",)),
    Tool(
        "assign",
        "Assign a reserved box to a person; ends the reservation.",
        (("box", "box"), ("person", "person")),
        writes="keeper",
        needs=("reserved",),
        drops=("reserved",),
    ),
)
GIVEN = ("person", "box", "number")  # types a question may name; codes are never given


@dataclasses.dataclass(frozen=True)
class Edge:
    """source makes target possible. kind: "argument" (its result is of the type of an argument), "precondition" (its effect is needed)
    or "state" (it writes the relation that target reads); what: the argument, predicate or relation."""

    source: str
    target: str
    kind: str
    what: str


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """A set of tools as a graph that can be asked."""

    tools: tuple[Tool, ...] = TOOLS

    @functools.cached_property
    def by_name(self) -> dict[str, Tool]:
        return {one.name: one for one in self.tools}

    @functools.cached_property
    def relations(self) -> dict[str, str]:
        """Relation -> type of its values."""
        return {one.reads: one.result for one in self.tools if one.reads}

    @functools.cached_property
    def edges(self) -> tuple[Edge, ...]:
        found = []
        for target in self.tools:
            found += [Edge(one.name, target.name, "argument", arg) for arg, _ in target.arguments for one in self.suppliers(target, arg)]
            found += [Edge(one.name, target.name, "precondition", need) for need in target.needs for one in self.enablers(need)]
            writers = [one for one in self.tools if one.writes and one.writes == target.reads]
            found += [Edge(one.name, target.name, "state", target.reads) for one in writers]
        return tuple(found)

    def suppliers(self, target: Tool, argument: str) -> tuple[Tool, ...]:
        """The tools whose result can be that argument; one that needs a proof takes only the relation that proves it."""
        wanted, proof = dict(target.arguments)[argument], dict(target.proofs).get(argument)
        return tuple(one for one in self.tools if one.result == wanted and proof in (None, one.reads))

    def enablers(self, predicate: str) -> tuple[Tool, ...]:
        return tuple(one for one in self.tools if predicate in one.adds)

    def reachable(self, given: Iterable[str]) -> frozenset[str]:
        """Names of the tools that can ever be called by somebody who knows one value of each type in ``given``."""
        types, predicates, names, more = set(given), set(), set(), True
        while more:
            new = [
                one
                for one in self.tools
                if one.name not in names and all(kind in types for _, kind in one.arguments) and predicates.issuperset(one.needs)
            ]
            more = bool(new)
            for one in new:
                names.add(one.name)
                types.add(one.result)
                predicates.update(one.adds)
        return frozenset(names)

    def preparation(self, target: Tool) -> tuple[Tool, ...]:
        """Calls on the same subject, in order, that meet the tool's preconditions; proofs are looked up before they are used."""
        calls: list[Tool] = []
        for need in target.needs:
            for enabler in self.enablers(need)[:1]:
                calls += [
                    *self.preparation(enabler),
                    *(one for arg, _ in enabler.proofs for one in self.suppliers(enabler, arg)[:1]),
                    enabler,
                ]
        return tuple(calls)
