"""Search: relation chains over a generated wiki-like graph, read one page at a time.

Corpus: pages with a title, a description and a few labelled links. Tools: ``search`` (description -> title) and ``read_page``
(title -> links). A question masks the first page behind its description and names the relations to follow; the answer is the
title at the end of the chain. Every task has a graph of its own, so titles say nothing until a page was read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Generator

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, consulted, final_answer, in_split, quotable, tool

ONSETS = ("Bel", "Cor", "Dan", "Fen", "Gal", "Hul", "Jor", "Kem")
ENDINGS = ("ado", "bin", "cas", "dur", "eth", "fil", "gor", "hax")
ADJECTIVES = ("red", "blue", "old", "tall", "grey", "north", "calm", "lost")
NOUNS = ("tower", "harbour", "valley", "abbey", "bridge", "mill", "garden", "fort")
RELATIONS = ("river", "king", "ally", "rival", "port", "founder", "patron", "twin")
CORE = len(ONSETS) * len(ENDINGS)

FINAL_REQUEST = "No turns left: answer now."

TOOLS = (
    tool("search", "Find the page that a description belongs to.", query="string"),
    tool("read_page", "Read a page: its labelled links.", title="string"),
)


def title(i: int) -> str:
    """The i-th title: 64 short names, then the same with a number."""
    return "@" + ONSETS[i % CORE // len(ENDINGS)] + ENDINGS[i % len(ENDINGS)] + (f"-{i // CORE + 1}" if i >= CORE else "")


@dataclasses.dataclass(frozen=True)
class Graph:
    """The corpus of one task: ``size`` pages, each with ``degree`` links. Pages are made when asked for, by seed and title."""

    seed: int
    size: int
    degree: int
    split: Split

    def description(self, i: int) -> str:
        stride = next(m for m in (5, 7, 11, 13, 17, 19, 23) if math.gcd(m, self.size) == 1)  # coprime: one page per description
        j = (i * stride + self.seed) % self.size
        number = f" {j // CORE + 1}" if j >= CORE else ""
        return f"the {ADJECTIVES[j % CORE // len(NOUNS)]} {NOUNS[j % len(NOUNS)]}{number}"

    def links(self, i: int) -> dict[str, int]:
        """Relation -> page, only along pairs of the graph's own split."""
        rng = np.random.default_rng([self.seed, i, zlib.crc32(self.split.encode())])
        names = [RELATIONS[r] for r in sorted(rng.choice(len(RELATIONS), self.degree, replace=False))]
        targets: list[int] = []
        while len(targets) < self.degree:
            j = int(rng.integers(self.size))
            if j != i and j not in targets and in_split(title(i), title(j), self.split):
                targets.append(j)
        return dict(zip(names, targets, strict=True))

    def text(self, i: int) -> str:
        return title(i) + ":" + "".join(f" {name}{title(j)}" for name, j in self.links(i).items())


@functools.lru_cache(maxsize=64)
def _indices(size: int) -> dict[str, int]:
    return {title(i): i for i in range(size)}


@dataclasses.dataclass(frozen=True)
class SearchTask(Task):
    graph: Graph = None
    start: int = 0
    relations: tuple[str, ...] = ()
    first: int = 1  # number of the first relation

    tools = TOOLS
    final_request = FINAL_REQUEST

    def reset(self):
        return ()

    def step(self, state, call: Call):
        problem = self.check_call(call)
        if problem:
            return state, Observation(problem, error=True)
        if call.name == "search":
            query = call.arguments["query"].strip()
            found = [i for i in range(self.graph.size) if self.graph.description(i) == query]
            if not found:
                return state, Observation(f"error: nothing found for '{quotable(query)}'", error=True)
            return state, Observation(title(found[0]), refs=(title(found[0]),))
        name = call.arguments["title"].strip()
        i = _indices(self.graph.size).get(name)
        if i is None:
            return state, Observation(f"error: no page '{quotable(name)}'", error=True)
        return (*state, name), Observation(self.graph.text(i), refs=(name,))

    def expert(self) -> Generator[Turn, Observation, None]:
        found = yield Turn("find", Call("search", {"query": self.graph.description(self.start)}))
        page = found.text
        thought = f"start{page} next {self.first}"
        for number, relation in enumerate(self.relations, self.first):
            seen = yield Turn(thought, Call("read_page", {"title": page}))
            page = "@" + seen.text.split(f" {relation}@")[1].split(" ")[0]
            following = f" {number + 1}" if number < self.first + self.steps - 1 else " end"
            thought = f"step {number} {relation}{page} next{following}"
        yield Turn(thought, answer=page)

    def verify(self, trajectory: Trajectory) -> Outcome:
        answer = final_answer(trajectory)
        if answer is None:
            return Outcome(False, 0.0, "answer: none given")
        if answer != self.answer:
            return Outcome(False, 0.0, "answer: wrong")
        read = {str(r.action["arguments"].get("title")).strip() for r in trajectory.records if r.action and r.action["name"] == "read_page"}
        read &= consulted(trajectory)
        missing = [e for e in self.evidence if e not in read]
        if missing:
            return Outcome(False, 0.0, f"evidence: {missing[0]} was never read")
        return Outcome(True, 1.0, "answer and evidence: accepted")


@dataclasses.dataclass(frozen=True)
class Search(Domain):
    name: str = "search"
    degree: int = 3  # links per page: more make pages longer and guessing harder
    pages: int = (
        0  # per graph, whatever the length; 0: more for longer chains. Up to 64 all titles are short, in long runs as in short ones
    )
    numbers: int = 0  # relations get consecutive numbers of 1 .. numbers, begun anywhere: short runs then show them all; 0: begun at 1

    def __post_init__(self):
        if not 1 <= self.degree <= len(RELATIONS):
            raise ConfigError(f"search.degree is {self.degree}; it must be between 1 and {len(RELATIONS)}")
        if self.numbers < 0 or not (self.pages == 0 or self.pages > 2 * self.degree):
            raise ConfigError(f"search.numbers is {self.numbers} and pages {self.pages}; give 0, or more than twice the degree of pages")

    def propose(self, seed: int, steps: int, split: Split = "train") -> SearchTask:
        """A controlled random walk without revisits; a walk that ends in a dead end is begun anew.

        Raises ConfigError when steps is less than 1, or more than ``numbers`` or three quarters of ``pages`` allow.
        """
        if steps < 1:
            raise ConfigError(f"search: a task needs at least 1 step, got {steps}")
        if (self.numbers and steps > self.numbers) or (self.pages and 4 * steps > 3 * self.pages):
            raise ConfigError(f"search: {steps} steps need as many numbers ({self.numbers}) and a third more pages ({self.pages})")
        size = self.pages or CORE * max(1, -(-4 * steps // CORE))
        graph = Graph(seed, size, self.degree, split)
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        walk: list[int] = []
        while len(walk) <= steps:
            walk, relations = [int(rng.integers(size))], []
            while len(walk) <= steps:
                links = {name: j for name, j in graph.links(walk[-1]).items() if j not in walk}
                if not links:
                    break
                relations.append(sorted(links)[int(rng.integers(len(links)))])
                walk.append(links[relations[-1]])
        titles = [title(i) for i in walk]
        first = 1 + int(rng.integers(self.numbers - steps + 1)) if self.numbers else 1
        plan = "".join(f" {number} {relation}" for number, relation in enumerate(relations, first))
        return SearchTask(
            domain=self.name,
            task_id=f"search-{split}-{steps}-{seed}",
            steps=steps,
            question=f"Find {graph.description(walk[0])}, then follow{plan} end.",
            answer=titles[-1],
            evidence=tuple(titles[:-1]),
            chain=tuple(zip(titles[:-1], titles[1:], strict=True)),
            graph=graph,
            start=walk[0],
            relations=tuple(relations),
            first=first,
        )

    def scaffold(self) -> tuple[str, ...]:
        words = [f" {w}" for w in (*ADJECTIVES, *NOUNS, *RELATIONS)]
        titles = [title(i) for i in range(CORE)]
        return (
            "Find the",
            ", then follow",
            "find",
            "start",
            '{"name": "search", "arguments": {"query": "the',
            '{"name": "read_page", "arguments": {"title": "',
            *words,
            *titles,
        )
