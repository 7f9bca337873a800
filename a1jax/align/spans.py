"""Positions: which teacher tokens every student token of one generated turn lies in. Byte-exact, linear, vectorised, on the host.

The student's ids are as sampled. A turn is a byte frame of its own: prompts, tool results and template text never get here.
Notation as in ``../shared/design/vocabulary_alignment.md``, section 2: student token i covers [b_i, e_i), teacher token j [a_j, c_j).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from a1jax.align.matching import common_stretches
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap
from a1jax.align.vocab_map_build import FIRST_CONTROL
from a1jax.config import ConfigError

Ids = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """One entry per student token [T]. Masked ones have NONE in ``teacher`` and ``last`` and 0 elsewhere."""

    teacher: np.ndarray  # int32: j, the teacher token in which the student's begins
    offset: np.ndarray  # int32: d = b_i - a_j; 0 synchronised, else straddled, with the first d bytes of teacher token j pending
    last: np.ndarray  # int32: m, the teacher token in which it ends; above j: chained
    reach: np.ndarray  # int32: e_i - a_m, bytes of teacher token m that are written when it ends
    complete: np.ndarray  # bool: it ends where teacher token m does
    masked: np.ndarray  # bool

    @property
    def straddled(self) -> np.ndarray:
        """bool [T]."""
        return self.offset > 0

    @property
    def chained(self) -> np.ndarray:
        """bool [T]."""
        return self.last > self.teacher

    def report(self) -> dict[str, float]:
        """positions (a count), and the shares of them that are straddled, chained and masked; 0 for an empty turn."""
        count = len(self.teacher)
        shares = {name: float(np.mean(getattr(self, name))) if count else 0.0 for name in ("straddled", "chained", "masked")}
        return {"positions": float(count)} | shares


def align(student_ids: Ids, teacher_ids: Ids, vocab_map: VocabMap, text: str | bytes | None = None, teacher_prefix: bytes = b"") -> Spans:
    """Aligns the two tokenisations of one turn.

    student_ids [T], teacher_ids [T_T]: the turn alone, with its end token where there is one. text: what the turn says (control tokens
    left out); bytes of either side that differ from it are masked too. teacher_prefix: virtual bytes that the teacher's ids begin with
    and the turn does not: b" " for a SentencePiece dummy prefix (where both sides have one, give none).

    Where the bytes differ, the smallest span between two common token borders is masked; so is a student token without counterpart.
    Raises ConfigError for an id out of range, and for a teacher_prefix that the teacher's ids do not begin with.
    """
    ours = _Frame.of(student_ids, vocab_map.student_symbols, vocab_map.student_starts, "student")
    theirs = _Frame.of(teacher_ids, vocab_map.teacher_symbols, vocab_map.teacher_starts, "teacher")
    skip = len(teacher_prefix)
    if skip and len(theirs.symbols) and theirs.symbols[:skip].tolist() != list(teacher_prefix):
        raise ConfigError(f"the teacher's ids begin with {theirs.symbols[:skip].tolist()}, not with teacher_prefix {teacher_prefix!r}: "
                          "leave teacher_prefix out for a tokenizer that adds none")  # fmt: skip
    skip = min(skip, len(theirs.symbols))
    rows = common_stretches(ours.symbols, theirs.symbols[skip:])
    rows[:, 1] += skip
    if text is not None:
        raw = np.frombuffer(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text, np.uint8).astype(np.uint32)
        rows = _without(rows, _differences(ours.symbols, raw), column=0)
        rows = _without(rows, _differences(theirs.symbols[skip:], raw) + skip, column=1)
    return _spans(ours, theirs, rows, len(student_ids))


@dataclasses.dataclass(frozen=True, eq=False)
class _Frame:
    symbols: np.ndarray  # uint32 [L]
    index: np.ndarray  # int64 [N]: place in the ids of every token that has symbols
    begin: np.ndarray  # int64 [N]: where its symbols begin
    end: np.ndarray  # int64 [N]

    @classmethod
    def of(cls, ids: Ids, symbols: np.ndarray, starts: np.ndarray, side: str) -> _Frame:
        ids = np.asarray(ids, np.int64)
        wrong = np.flatnonzero((ids < 0) | (ids >= len(starts) - 1))
        if len(wrong):
            raise ConfigError(f"{side}_ids[{wrong[0]}] is {ids[wrong[0]]}, and the map's {side} has ids 0 to {len(starts) - 2}: "
                              "align with the map of the tokenizers that made these ids")  # fmt: skip
        index = np.flatnonzero(starts[ids + 1] > starts[ids])
        first = starts[ids[index]]
        lengths = starts[ids[index] + 1] - first
        end = np.cumsum(lengths)
        begin = end - lengths
        places = np.repeat(first - begin, lengths) + np.arange(int(lengths.sum()))
        return cls(symbols[places], index, begin, end)


def _spans(ours: _Frame, theirs: _Frame, rows: np.ndarray, count: int) -> Spans:
    """Spans of ``count`` student tokens from the common stretches of the two frames."""
    token = np.flatnonzero(~_in_differences(ours, theirs, rows))
    row = np.searchsorted(rows[:, 0], ours.begin[token], side="right") - 1
    shift = rows[row, 1] - rows[row, 0]
    begin, end = ours.begin[token] + shift, ours.end[token] + shift
    j = np.searchsorted(theirs.begin, begin, side="right") - 1
    m = np.searchsorted(theirs.begin, end, side="left") - 1
    # A control token of the teacher's inside the student's token: no chain leads over it.
    whole = theirs.index[m] - theirs.index[j] == m - j
    token, begin, end, j, m = token[whole], begin[whole], end[whole], j[whole], m[whole]
    made = {name: np.zeros(count, np.int32) for name in ("offset", "reach")}
    made |= {name: np.full(count, NONE, np.int32) for name in ("teacher", "last")}
    complete, masked = np.zeros(count, bool), np.ones(count, bool)
    at = ours.index[token]
    made["teacher"][at], made["offset"][at] = theirs.index[j], begin - theirs.begin[j]
    made["last"][at], made["reach"][at] = theirs.index[m], end - theirs.begin[m]
    complete[at], masked[at] = end == theirs.end[m], False
    return Spans(**made, complete=complete, masked=masked)


def _in_differences(ours: _Frame, theirs: _Frame, rows: np.ndarray) -> np.ndarray:
    """bool [N]: student tokens between the last common border before a difference and the first one after it."""
    if len(rows) == 1:
        return np.zeros(len(ours.index), bool)
    row, place = _common_borders(ours, theirs, rows)
    gaps = np.arange(len(rows) - 1)
    before = place[np.searchsorted(row, gaps, side="right") - 1]
    after = place[np.searchsorted(row, gaps + 1, side="left")]
    change = np.zeros(len(ours.index) + 1, np.int64)
    first = np.searchsorted(ours.begin, before, side="left")
    stop = np.searchsorted(ours.end, after, side="right")
    some = stop > first
    np.add.at(change, first[some], 1)
    np.add.at(change, stop[some], -1)
    return np.cumsum(change)[:-1] > 0


def _common_borders(ours: _Frame, theirs: _Frame, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stretch, place in the student's frame) of every token border that both sides have, in order; the turn's own ends are two."""
    is_border = np.zeros(len(theirs.symbols) + 1, bool)
    is_border[theirs.begin] = is_border[theirs.end] = True
    borders = np.append(ours.begin, ours.end[-1:])
    ends = rows[:, 0] + rows[:, 2]
    found = [(np.array([0, len(rows) - 1]), np.array([0, len(ours.symbols)]))]
    for row in (np.searchsorted(rows[:, 0], borders, side="right") - 1, np.searchsorted(ends, borders, side="left")):
        row = np.minimum(row, len(rows) - 1)
        place = borders - rows[row, 0]
        inside = (place >= 0) & (place <= rows[row, 2])
        inside[inside] = is_border[(place + rows[row, 1])[inside]]
        found.append((row[inside], borders[inside]))
    row, place = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((place, row))
    return row[order], place[order]


def _differences(symbols: np.ndarray, text: np.ndarray) -> np.ndarray:
    """int64 [K, 2]: ranges of ``symbols`` that differ from ``text``, empty where only the text has more; control symbols are no text."""
    places = np.flatnonzero(symbols < FIRST_CONTROL)
    rows = common_stretches(symbols[places], text)
    begin, stop = rows[:-1, 0] + rows[:-1, 2], rows[1:, 0]
    low = np.append(places, len(symbols))[begin]
    high = np.where(stop > begin, np.append(places, 0)[stop - 1] + 1, low)
    return np.stack([low, high], axis=1)


def _without(rows: np.ndarray, differences: np.ndarray, column: int) -> np.ndarray:
    """The stretches, cut at ranges of the student's (column 0) or the teacher's (1) frame; the first and the last row stay, even empty."""
    if not len(differences):
        return rows
    kept = []
    for row in rows.tolist():
        start, stop = row[column], row[column] + row[2]
        at = start
        some = slice(np.searchsorted(differences[:, 1], start, side="left"), np.searchsorted(differences[:, 0], stop, side="right"))
        for low, high in [*differences[some].tolist(), (stop, stop)]:
            size = min(low, stop) - at
            if size > 0:
                kept.append((row[0] + at - start, row[1] + at - start, size))
            at = max(at, min(high, stop))
    first, last = rows[0].tolist(), rows[-1].tolist()
    end = (last[0] + last[2], last[1] + last[2], 0)
    head = [] if kept and kept[0][:2] == tuple(first[:2]) else [(first[0], first[1], 0)]
    tail = [] if kept and (kept[-1][0] + kept[-1][2], kept[-1][1] + kept[-1][2]) == end[:2] else [end]
    return np.array([*head, *kept, *tail], np.int64)
