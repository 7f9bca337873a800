"""A corpus of linked pages from a file, its BM25 index and its link graph: what the search domain's real pages rest on.

File: JSONL, also as .gz or .xz, one page a line: {"id": text, "title": text, "text": text, "links": [ids]}. Read and indexed once per
path and time of change; every query is answered once.
"""

from __future__ import annotations

import collections
import functools
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..config import ConfigError

WORD = re.compile(r"[^\W_]+")
PLAIN = re.compile(r"[a-z]{3,}")  # words that a description may use
QUERY_WORDS = 32  # of a query that count
TOP_WORDS = 24  # distinctive words kept per page
SNIPPET = 80  # characters
SAME_TITLE = 0.8  # share of common words from which two titles are nearly the same
EVERYWHERE = 0.5  # a word in more than this share of the titles says nothing
OPEN = {".gz": gzip.open, ".xz": lzma.open}


class Page(NamedTuple):
    id: str
    title: str
    text: str
    links: tuple[str, ...]


class Hit(NamedTuple):
    id: str
    snippet: str


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def load(path: str) -> Corpus:
    """The corpus in a file. Raises ConfigError, in one line that names the file, the line and what is wrong."""
    if not path:
        raise ConfigError("search.corpus is not set: name a JSONL file of pages with --set corpus=PATH")
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no corpus can be read there ({error}); set search.corpus to a JSONL file") from None
    return _load(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _load(path: str, mtime: int, size: int) -> Corpus:
    pages: dict[str, Page] = {}
    for number, record in _records(path):
        where, page = f"{path}, line {number}", _page(record)
        if isinstance(page, str):
            raise ConfigError(f'{where}: {page}; a page is {{"id": text, "title": text, "text": text, "links": [ids]}}')
        if page.id in pages:
            raise ConfigError(f"{where}: the id {page.id[:60]!r} was given to an earlier page; ids must differ")
        pages[page.id] = page
    if not any(words(page.text) for page in pages.values()):
        raise ConfigError(f"{path}: there is no page with any text; the file must hold one page a line")
    return Corpus(pages)


def _records(path: str) -> Iterator[tuple[int, object]]:
    number = 0
    try:
        with OPEN.get(os.path.splitext(path)[1], open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ConfigError(f"{path}, line {number}: not JSON ({error}); every line must be one object") from None
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{path}, after line {number}: cannot be read ({error}); is it whole, and named as it is packed?") from None


def _page(record: object) -> Page | str:
    """The page, or what is wrong with it."""
    if not isinstance(record, dict):
        return "no JSON object"
    for key, kind in (("id", str), ("title", str), ("text", str), ("links", list)):
        if key not in record:
            return f"no {key!r}"
        if not isinstance(record[key], kind):
            return f"{key!r} is no {'list' if kind is list else 'text'}"
    if not all(isinstance(link, str) for link in record["links"]):
        return "'links' holds what is no text"
    name = _encodable(record["id"])
    if not name.strip() or name != name.strip() or "|" in name or len(name.splitlines()) != 1:
        return f"the id {name[:60]!r} is empty, has spaces around it, '|' or line breaks"
    links = tuple(dict.fromkeys(_encodable(link) for link in record["links"]))
    return Page(name, " ".join(_encodable(record["title"]).split()), _encodable(record["text"]), links)


def _encodable(text: str) -> str:
    """JSON can hold half a character, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Corpus:
    """pages: id -> page, links only to pages that exist. dropped: how many links were not. Read only, but for its answered queries."""

    def __init__(self, pages: dict[str, Page]):
        import bm25s  # here: its import starts a JAX backend, which must not happen before the process is configured

        self.ids = tuple(pages)
        self.pages = {p.id: p._replace(links=tuple(i for i in p.links if i in pages and i != p.id)) for p in pages.values()}
        self.dropped = sum(link not in pages for p in pages.values() for link in p.links)
        self._index = bm25s.BM25()
        self._index.index([words(f"{p.title} {p.text}") for p in pages.values()], show_progress=False)
        self._places = {name: i for i, name in enumerate(self.ids)}
        self._lower = {p.id: p.text.lower() for p in pages.values()}
        self._titles = _title_words(list(pages.values()))
        self.names = {p.id.lower() for p in pages.values()}
        self._top: dict[str, tuple[str, ...]] = {}
        self.search = functools.lru_cache(maxsize=1 << 16)(self._search)
        self.hop = functools.cache(self._hop)
        self.first = functools.cache(self._first)

    def _search(self, query: str, best: int) -> tuple[Hit, ...]:
        """The ``best`` pages by BM25, best first, equal ones in the order of the file; pages without any word of the query are none."""
        asked = list(dict.fromkeys(words(query)))[:QUERY_WORDS]
        return tuple(Hit(self.ids[i], self._snippet(self.ids[i], asked)) for i in self._best(asked, best))

    def _best(self, asked: list[str], best: int) -> list[int]:
        known = self._index.get_tokens_ids(asked)
        if not known:
            return []
        scores = self._index.get_scores_from_ids(known)
        if best < len(scores):
            rest = np.flatnonzero(scores >= max(np.partition(scores, -best)[-best], 0))
        else:
            rest = np.arange(len(scores))
        order = rest[np.argsort(-scores[rest], kind="stable")][:best]
        return [int(i) for i in order if scores[i] > 0]

    def _snippet(self, page: str, asked: list[str]) -> str:
        """Around the first place of the first word of the query that the page has, else the page's beginning."""
        text, lower = self.pages[page].text, self._lower[page]
        at = next((at for w in asked if (at := _place(lower, w)) >= 0), 0)
        start = max(0, at - SNIPPET // 4)
        return " ".join(text[start : start + SNIPPET].split())

    def alike(self, a: str, b: str) -> bool:
        """Whether two titles are nearly the same, but for the words that most titles have."""
        one, two = self._titles[a], self._titles[b]
        return one == two or len(one & two) >= SAME_TITLE * len(one | two)

    def top_words(self, page: str) -> tuple[str, ...]:
        """The page's most distinctive words, by weight; none that its title or id has, nor any page's id."""
        if not self._top:
            self._top = self._all_top_words()
        return self._top[page]

    def _all_top_words(self) -> dict[str, tuple[str, ...]]:
        vocabulary = np.empty(len(self._index.scores["indptr"]), dtype=object)
        for word, i in self._index.vocab_dict.items():
            vocabulary[i] = word
        starts, found = self._index.scores["indptr"], collections.defaultdict(list)
        shared = np.flatnonzero(np.diff(starts) > 1)  # a word of one page alone would be a name for it
        for i in shared.tolist():
            word = vocabulary[i]
            if isinstance(word, str) and PLAIN.fullmatch(word) and word not in self.names:
                part = slice(starts[i], starts[i + 1])
                pages, weights = (self._index.scores[key][part].tolist() for key in ("indices", "data"))
                for page, weight in zip(pages, weights, strict=True):
                    found[page].append((-weight, word))
        return {name: self._not_named(name, sorted(found[i])) for i, name in enumerate(self.ids)}

    def _not_named(self, page: str, weighed: list[tuple[float, str]]) -> tuple[str, ...]:
        named = [w for w in words(f"{self.pages[page].title} {page}") if len(w) > 2]
        kept: list[str] = []
        for _, word in weighed:
            if len(kept) == TOP_WORDS:
                break
            if not any(word in w or w in word for w in named):
                kept.append(word)
        return tuple(kept)

    def _first(self, page: str) -> str | None:
        """Three words of a page whose first hit, of all pages, is that page; None where there are none."""
        top, i = self.top_words(page), self._places[page]
        tries = [[top[k] for k in range(at, at + 3)] for at in range(len(top) - 2)]
        return next((" ".join(asked) for asked in tries if self._best(asked, 1) == [i]), None)

    def _hop(self, page: str, link: str, best: int) -> str | None:
        """Two words of ``link`` that tell it from the other links of ``page``: it alone of them is among the ``best`` hits.

        Words whose first hit is another page are preferred: without the page before, they do not say which one is meant.
        """
        top, around, spare = self.top_words(link)[:10], set(self.pages[page].links), None
        for b in range(1, len(top)):
            for a in range(b):
                hits = [self.ids[i] for i in self._best([top[a], top[b]], best)]
                if [hit for hit in hits if hit in around] == [link]:
                    if hits[0] != link:
                        return f"{top[a]} {top[b]}"
                    spare = spare or f"{top[a]} {top[b]}"
        return spare


def _place(text: str, word: str) -> int:
    """Where the word first stands, as a word; -1: nowhere."""
    at = text.find(word)
    while at >= 0:
        before, after = text[at - 1 : at] if at else " ", text[at + len(word) : at + len(word) + 1]
        if not before.isalnum() and not after.isalnum():
            return at
        at = text.find(word, at + 1)
    return -1


def _title_words(pages: list[Page]) -> dict[str, frozenset[str]]:
    split = {p.id: frozenset(words(p.title)) for p in pages}
    seen = collections.Counter(w for found in split.values() for w in found)
    common = {w for w, n in seen.items() if n > max(1, EVERYWHERE * len(pages))}
    return {name: found - common for name, found in split.items()}
