"""Search over a real corpus: chains of links between the pages of a file, found by their words (arXiv 2606.30616, section 2.2).

A chain is a controlled random walk over the link graph. Its question is written backwards from the last page, all names masked: a page
is described by distinctive words of its own text. The index itself proves that the words are enough: those of the first page have
it as their first hit, those of a later page have it alone of the links of the page before among their hits. The answer is the last id.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Generator

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from . import sandbox
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, consulted, final_answer, in_split, tool
from .corpus import Corpus, load

TOOLS = (
    tool("search", "The pages that match words best: id, title and a piece of the text.", query="string"),
    tool("read_page", "Read a piece of a page, pieces count from 1; the first shows the ids of its links.", page="string", piece="integer"),
    tool("code", "Run a Python program; the file page.txt holds the text of the page read last.", program="string"),
)
FINAL_REQUEST = "No turns left: answer now, with the id of the page alone."
SHOWN_LINKS = 128
BETWEEN = " | "
QUERY_CHARS = 1000  # of a query that are read
CODE_CHARS = 200_000  # of page.txt
STARTS = 24  # walks begun before a corpus is given up
VISITS = 16  # pages per hop that one walk may try


@dataclasses.dataclass(frozen=True)
class CorpusSearchTask(Task):
    """queries: the words of the first page, then of every later one. hits: pages per search; piece: characters of a page at a time."""

    corpus: str = ""
    queries: tuple[str, ...] = ()
    hits: int = 5
    piece: int = 2000

    tools = TOOLS
    final_request = FINAL_REQUEST
    blocking = True  # a program takes its time: the rollout engine must not wait for it

    def reset(self):
        """The state is the id of the page read last."""
        return ""

    def step(self, state: str, call: Call) -> tuple[str, Observation]:
        problem = self.check_call(call)
        if problem:
            return state, Observation(problem, error=True)
        if call.name == "search":
            return state, _search(self.corpus, call.arguments["query"], self.hits)
        if call.name == "read_page":
            seen = _read(load(self.corpus), call.arguments["page"].strip(), call.arguments["piece"], self.piece)
            return seen.refs[0] if seen.refs else state, seen
        return state, _run(call.arguments["program"], load(self.corpus).pages[state].text if state else "")

    def expert(self) -> Generator[Turn, Observation, None]:
        found = yield Turn("find the first page", Call("search", {"query": self.queries[0]}))
        page = found.refs[0]
        for number, query in enumerate(self.queries[1:], 1):
            seen = yield Turn(f"hop {number} of {self.steps}: links of {page}", Call("read_page", {"page": page, "piece": 1}))
            links = set(seen.text.split("\n")[1].removeprefix("links: ").split(BETWEEN))
            found = yield Turn(f"hop {number} of {self.steps}: which link has {query}", Call("search", {"query": query}))
            page = next(hit for hit in found.refs if hit in links)
        yield Turn(f"the last page is {page}", answer=page)

    def verify(self, trajectory: Trajectory) -> Outcome:
        answer = final_answer(trajectory)
        if answer is None:
            return Outcome(False, 0.0, "answer: none given")
        if answer != self.answer:
            return Outcome(False, 0.0, "answer: wrong")
        read = {ref for r in trajectory.records if r.action and r.action["name"] == "read_page" for ref in r.state}
        missing = [page for page in self.evidence[:-1] if page not in read]
        if missing:
            return Outcome(False, 0.0, f"evidence: {missing[0]} was never read")
        if self.answer not in consulted(trajectory):
            return Outcome(False, 0.0, f"evidence: {self.answer} was never found")
        return Outcome(True, 1.0, "answer and evidence: accepted")


def _search(path: str, query: str, hits: int) -> Observation:
    corpus = load(path)
    found = corpus.search(query[:QUERY_CHARS], hits)
    if not found:
        return Observation(f"error: nothing found for {query[:60]!r}; use other words", error=True)
    lines = [f"{hit.id}{BETWEEN}{corpus.pages[hit.id].title}{BETWEEN}{hit.snippet}" for hit in found]
    return Observation("\n".join(lines), refs=tuple(hit.id for hit in found))


def _read(corpus: Corpus, name: str, number: int, size: int) -> Observation:
    page = corpus.pages.get(name)
    if page is None:
        return Observation(f"error: no page {name[:60]!r}; search gives ids", error=True)
    count = max(1, -(-len(page.text) // size))
    if not 1 <= number <= count:
        return Observation(f"error: {name} has pieces 1 to {count}", error=True)
    head = [f"{page.title}{BETWEEN}piece {number} of {count}"]
    if number == 1:
        more = f"{BETWEEN}and {len(page.links) - SHOWN_LINKS} more" if len(page.links) > SHOWN_LINKS else ""
        head.append(f"links: {BETWEEN.join(page.links[:SHOWN_LINKS])}{more}")
    return Observation("\n".join([*head, page.text[(number - 1) * size : number * size]]), refs=(name,))


def _run(program: str, page: str) -> Observation:
    try:
        done = sandbox.run(program, files={"page.txt": page[:CODE_CHARS]})
    except ConfigError as error:
        return Observation(f"error: no program can be run here ({error})", error=True)
    if done.status != "ok":
        return Observation(f"error: {done.error}\n{done.output}".strip(), error=True)
    return Observation(done.output.strip() or "it printed nothing")


@dataclasses.dataclass(frozen=True)
class CorpusSearch(Domain):
    name: str = "search"
    corpus: str = ""  # a JSONL file of pages, see ``corpus``
    hits: int = 5  # pages per search
    piece: int = 2000  # characters of a page at a time
    least_links: int = 2  # pages with fewer are only ever the last of a chain
    most_links: int = 64  # pages with more are hubs, and left out

    def __post_init__(self):
        for name in ("hits", "piece", "least_links"):
            if getattr(self, name) < 1:
                raise ConfigError(f"search.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.least_links <= self.most_links <= SHOWN_LINKS:
            raise ConfigError(f"search.most_links is {self.most_links}; it must be between least_links and {SHOWN_LINKS}")

    def propose(self, seed: int, steps: int, split: Split = "train") -> CorpusSearchTask:
        """A walk of ``steps`` links. Raises ConfigError when steps is less than 1, for a bad corpus file, or one without such a walk."""
        if steps < 1:
            raise ConfigError(f"search: a task needs at least 1 step, got {steps}")
        corpus = load(self.corpus)
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        edges = functools.cache(functools.partial(self._edges, corpus, split))
        starts = [page for page in corpus.ids if self._passable(corpus, page)]
        for start in rng.permutation(len(starts))[: STARTS if steps < len(corpus.ids) else 0]:
            page = starts[int(start)]
            if corpus.first(page) is None:
                continue
            walk = _walk(rng, corpus, page, steps, edges)
            task = walk and self._task(corpus, walk, f"search-{split}-{steps}-{seed}")
            if task:
                return task
        raise ConfigError(f"{self.corpus}: no chain of {steps} links was found among the {split} pairs; ask for fewer steps, or more pages")

    def _passable(self, corpus: Corpus, page: str) -> bool:
        return self.least_links <= len(corpus.pages[page].links) <= self.most_links

    def _edges(self, corpus: Corpus, split: Split, page: str, last: bool) -> list[str]:
        """Pages that a walk may go on to: pairs of the split, with a way on unless it is the last."""
        links = corpus.pages[page].links
        return [
            to for to in links if in_split(page, to, split) and (last or self._passable(corpus, to)) and corpus.hop(page, to, self.hits)
        ]

    def _task(self, corpus: Corpus, walk: list[str], task_id: str) -> CorpusSearchTask | None:
        """None where the answer happens to stand in the question."""
        pairs = tuple(zip(walk[:-1], walk[1:], strict=True))
        queries = (corpus.first(walk[0]), *(corpus.hop(a, b, self.hits) for a, b in pairs))
        asked = question(queries)
        if re.search(rf"(?<!\w){re.escape(walk[-1])}(?!\w)", asked, re.IGNORECASE):
            return None
        return CorpusSearchTask(
            **{"domain": self.name, "task_id": task_id, "steps": len(pairs), "question": asked, "answer": walk[-1]},
            **{"evidence": tuple(walk), "chain": pairs, "corpus": self.corpus, "queries": queries, "hits": self.hits, "piece": self.piece},
        )


def question(queries: tuple[str, ...]) -> str:
    """From the last page back to the first."""
    first, *later = queries
    links = " that is a link of a page that has ".join(f"the words {query}" for query in reversed(later))
    return (
        f"Which page has {links} that is a link of the page found by: {first}? "
        "Of the links of a page, the one meant is found best by its words. Answer with its id alone."
    )


def _walk(rng: np.random.Generator, corpus: Corpus, start: str, steps: int, edges) -> list[str] | None:
    """``steps`` links from ``start`` without a page or nearly a title seen before. At a dead end it goes back; None: too often."""
    walk, left = [start], VISITS * steps

    def ahead() -> list[str]:
        found = [to for to in edges(walk[-1], len(walk) == steps) if not any(to == seen or corpus.alike(to, seen) for seen in walk)]
        return [found[int(i)] for i in rng.permutation(len(found))]

    options = [ahead()]
    while len(walk) <= steps and left:
        if options[-1]:
            walk.append(options[-1].pop())
            left -= 1
            if len(walk) <= steps:
                options.append(ahead())
        else:
            options.pop()
            walk.pop()
            if not walk:
                return None
    return walk if len(walk) == steps + 1 else None
