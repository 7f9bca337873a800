"""Cutting long runs to a horizon: what a model trains on that never sees more than so many tokens of one run.

A *consult* is a piece of a run with its question in front and everything between the two dropped, as an agent with a sliding context sees
it. The turn before it stands in front of a piece, to be read only, where there is room: what an agent says from memory of its last turn,
such as the number of its step, can then be known. What hangs on a turn or a question for which there was no room cannot be known, and is
a target all the same: ``turn_before`` and ``question`` say which pieces that concerns.
Pieces are examples of their own: packed into one row they do not see each other (segments), nor anything that was dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from a1jax.data.errors import DataError
from a1jax.data.packing import Example

Arm = Literal["consults", "solvable"]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A part of one run. places: int32 [T], where in the run each token stood. turns: model turns that it has as targets and end in it.
    question: it has the run's question in front. turn_before: the turn before its first target is in it, or there is none. observations:
    numbers (from 0, in the run) of those that it has, whole or in part; demanded: how many the whole run has."""

    example: Example
    places: np.ndarray
    turns: int
    question: bool
    turn_before: bool
    observations: tuple[int, ...]
    demanded: int

    def __len__(self) -> int:
        return len(self.example)


def cut(run: Example, horizon: int, arm: Arm = "consults") -> list[Piece]:
    """The pieces of at most ``horizon`` tokens that a run gives, in its order.

    A run that fits is one piece, whole. Of a longer one "solvable" gives nothing, and "consults" the following. The run is seen as its
    question (all before the model's first token) and steps: a turn of the model with what came before it, the observation. A piece is the
    question, the turn before (for context: mask 0) and as many steps in a row as fit; the next piece begins at the next step. What is
    dropped from it: all before that turn, which itself is left out where no step fits beside it. Where not even one step fits behind the
    question, the piece is steps alone, behind the turn before them if that fits. A step that does not fit alone loses the beginning of its
    observation (the first one that of the question); a turn that does not fit alone is cut into windows, each with the token before it
    for context. Every token that the model wrote is the target of exactly one piece; a dropped turn leaves no trace but the prompt's end,
    after which the observation follows.
    Raises DataError for a horizon below 2 tokens.
    """
    if horizon < 2:
        raise DataError(f"a horizon of {horizon} tokens holds no token and the one it predicts: use at least 2")
    ends = turn_ends(run.mask)
    if len(run) <= horizon:
        return [_piece(run, np.arange(len(run)), len(ends), True)]
    if arm == "solvable" or not len(ends):
        return []
    question = int(np.argmax(run.mask > 0))
    starts = [question, *ends[:-1]]
    ends = [*ends[:-1], len(run)]  # what follows the last turn (a line's end) stays with it
    pieces, at = [], 0
    while at < len(starts):
        step = ends[at] - starts[at]
        front = question if question + step <= horizon else 0
        if step > horizon or (at == 0 and not front):
            pieces += _windows(run, starts[at], ends[at], horizon)
            at += 1
            continue
        before = np.arange(*_turn(run, starts[at - 1], ends[at - 1])) if at else np.arange(0)
        if front + len(before) + step > horizon:
            before = before[:0]
        last = at
        while last + 1 < len(starts) and front + len(before) + ends[last + 1] - starts[at] <= horizon:
            last += 1
        places = np.concatenate([np.arange(front), before, np.arange(starts[at], ends[last])])
        pieces.append(_piece(run, places, last - at + 1, front > 0, before))
        at = last + 1
    return pieces


def turn_ends(mask: np.ndarray) -> list[int]:
    """Where the model's turns end: the places after the last token of every stretch of mask 1."""
    return (np.flatnonzero(np.diff(np.append(mask > 0, False).astype(np.int8)) < 0) + 1).tolist()


def _turn(run: Example, start: int, end: int) -> tuple[int, int]:
    """Where the model's turn of a step begins and ends."""
    return start + int(np.argmax(run.mask[start:end] > 0)), end


def _windows(run: Example, start: int, end: int, horizon: int) -> list[Piece]:
    """Pieces of one step that is longer than the horizon: windows that end where it ends, the earliest of them from before its turn.
    The first turn has no observation, but the end of the question."""
    first, end = _turn(run, start, end)
    floor = start if first > start else 0
    spans, stop = [(max(end - horizon, floor), end)], end
    while spans[0][0] >= first:
        stop = spans[0][0] + 1
        spans.insert(0, (max(stop - horizon, floor), stop))
    return [
        _piece(run, np.arange(begin, stop), int(stop == end), False, np.arange(begin, begin + (begin >= first)))  # that token is the last
        for begin, stop in spans  # one of the window before, and nobody's target here
    ]


def _piece(run: Example, places: np.ndarray, turns: int, question: bool, context: Sequence[int] | np.ndarray = ()) -> Piece:
    """context: the places of tokens that are there to be read only."""
    mask = np.where(np.isin(places, context), np.float32(0), run.mask[places])
    routes = None if run.routes is None else run.routes[places]
    example = Example(run.tokens[places], mask, run.domain, routes)
    begun = places[1:][mask[1:] > 0][:1]  # the first token that is to be predicted
    ended = [end for end in turn_ends(run.mask) if begun.size and end <= begun[0]]
    before = not ended or ended[-1] - 1 in places
    return Piece(example, places.astype(np.int32), turns, question, before, _observed(run, places), _demanded(run))


def _demanded(run: Example) -> int:
    return len(_observed(run, np.arange(len(run))))


def _observed(run: Example, places: np.ndarray) -> tuple[int, ...]:
    """Numbers of the observations that some of these places belong to: what stands between two turns of the model."""
    written = run.mask > 0
    number = np.cumsum(np.diff(written.astype(np.int8), prepend=0) < 0)  # turns that have ended before, or here
    between = ~written & (number > 0) & (number < number[-1] + written[-1])
    return tuple((np.unique(number[places][between[places]]) - 1).tolist())


def square_length(lengths: list[int]) -> float:
    """The length whose runs cost attention per token what these pieces do on average: sum of squares over sum."""
    return sum(n * n for n in lengths) / max(1, sum(lengths))
