"""Packing examples of unequal length into rows of one length, and THE shift of tokens against targets.

Best-fit decreasing: longest pieces first, each into the fullest row that still takes it. Rows keep whole examples apart by segment
ids and restarting positions, so nothing is ever attended or carried across a border.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from a1jax.data.errors import DataError
from a1jax.types import Batch

POLICIES = ("split", "drop")

Row = tuple["Example", ...]
"""Examples that share a row; their lengths add up to at most the row's length."""

Span = tuple[int, int, int]
"""(example index, start, stop): tokens [start, stop) of one example."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised run. tokens: int32 [T]. mask: float32 [T], 1 on tokens the model wrote. domain: index of its domain.
    routes: int16 [T, L, A], the experts recorded while it was sampled (types.Rollout.routes), or None."""

    tokens: np.ndarray
    mask: np.ndarray
    domain: int = 0
    routes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What packing did. Tokens of dropped examples are not in ``tokens``; a split example keeps all its tokens."""

    rows: int  # rows made
    slots: int  # rows * max_length
    tokens: int  # tokens in the rows
    examples: int  # examples given
    split: int  # examples longer than max_length, cut into pieces
    split_tokens: int  # their tokens (all kept)
    dropped: int  # examples left out for their length
    dropped_tokens: int  # their tokens
    empty: int  # examples without a token, left out

    @property
    def efficiency(self) -> float:
        """Share of slots that hold a token; 1.0 when there is no row."""
        return self.tokens / self.slots if self.slots else 1.0

    def __str__(self) -> str:
        return (
            f"{self.examples} examples in {self.rows} rows, {self.tokens} of {self.slots} slots used ({self.efficiency:.2%}); "
            f"split {self.split} ({self.split_tokens} tokens), dropped {self.dropped} ({self.dropped_tokens} tokens), empty {self.empty}"
        )


def pack(examples: Iterable[Example], max_length: int, policy: str = "split") -> tuple[list[Row], PackingReport]:
    """Rows of at most ``max_length`` tokens, in a fixed order given the examples, and what was done.

    policy: what happens to examples longer than ``max_length``: "split" cuts them into pieces of max_length that become segments of
    their own (the first token of a later piece is nobody's target), "drop" leaves them out. Both are counted. O(n log n).
    Raises DataError for a bad length or policy, or an example whose mask or routes do not fit its tokens.
    """
    examples = list(examples)
    bad = next((i for i, example in enumerate(examples) if len(example) != len(example.mask)), None)
    if bad is not None:
        raise DataError(f"example {bad} has {len(examples[bad])} tokens but a mask of {len(examples[bad].mask)}: both must be [T]")
    bad = next((i for i, example in enumerate(examples) if example.routes is not None and len(example) != len(example.routes)), None)
    if bad is not None:
        raise DataError(f"example {bad} has {len(examples[bad])} tokens but routes {examples[bad].routes.shape}: they must be [T, L, A]")
    spans, report = plan([len(example) for example in examples], max_length, policy)
    return [tuple(cut(examples[i], start, stop) for i, start, stop in row) for row in spans], report


def cut(example: Example, start: int, stop: int) -> Example:
    """Tokens [start, stop) of an example; the example itself when that is all of it."""
    if start == 0 and stop == len(example):
        return example
    routes = None if example.routes is None else example.routes[start:stop]
    return Example(example.tokens[start:stop], example.mask[start:stop], example.domain, routes)


def plan(lengths: Sequence[int], max_length: int, policy: str = "split") -> tuple[list[list[Span]], PackingReport]:
    """``pack`` on lengths alone: per row the spans (example index, start, stop) that go into it."""
    if max_length < 1:
        raise DataError(f"max_length is {max_length}: a row needs at least one token")
    if policy not in POLICIES:
        raise DataError(f"packing policy {policy!r} is unknown: use one of {', '.join(POLICIES)}")
    long = [length for length in lengths if length > max_length]
    split, dropped = (long, []) if policy == "split" else ([], long)
    spans = [
        (i, start, min(start + max_length, length))
        for i, length in enumerate(lengths)
        if length <= max_length or policy == "split"
        for start in range(0, length, max_length)
    ]
    sizes = [stop - start for _, start, stop in spans]
    rows = [[spans[i] for i in row] for row in best_fit_decreasing(sizes, max_length)]
    report = PackingReport(
        rows=len(rows), slots=len(rows) * max_length, tokens=sum(sizes), examples=len(lengths), split=len(split),
        split_tokens=sum(split), dropped=len(dropped), dropped_tokens=sum(dropped), empty=sum(length == 0 for length in lengths),
    )  # fmt: skip
    return rows, report


def fitting(groups: Sequence[Sequence[int]], rows: int, max_length: int) -> int:
    """How many of the groups find room, the first ones, whole; at least one. groups: the lengths of each one's runs, in tokens.

    Packing by itself would leave out the shortest runs of all groups. Those are no fair sample: a run may be short because it was right,
    and what is left of its group would be pushed away without what it was compared with.
    """
    lengths: list[int] = []
    for number, group in enumerate(groups):
        lengths += group
        if len(plan(lengths, max_length)[0]) > rows:
            return max(number, 1)
    return len(groups)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` per bin of ``capacity``; ties by index, so the result is a function of the lengths alone."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    bins: list[list[int]] = []
    room: list[int] = []  # the distinct amounts of room that open bins have, ascending
    with_room: dict[int, list[int]] = {}  # room -> bins with exactly that room
    for i in order.tolist():
        length = lengths[i]
        at = bisect.bisect_left(room, length)
        if at == len(room):
            bins.append([i])
            chosen, left = len(bins) - 1, capacity - length
        else:
            size = room[at]
            chosen, left = with_room[size].pop(), size - length
            if not with_room[size]:
                del with_room[size], room[at]
            bins[chosen].append(i)
        if left > 0:
            if left not in with_room:
                bisect.insort(room, left)
                with_room[left] = []
            with_room[left].append(chosen)
    return bins


def to_batch(rows: Sequence[Sequence[Example]], length: int, pad_id: int = 0, routes: tuple[int, int] | None = None) -> Batch:
    """Batch of numpy arrays [B, T] = [len(rows), length]; a row's segments stand in their order, the rest is padding.

    Here, and nowhere else, tokens are shifted against targets: within a segment ``targets[t] = tokens[t + 1]`` and ``mask[t]`` says
    whether the model wrote ``tokens[t + 1]``. The last position of a segment predicts nothing: target ``pad_id``, mask 0.
    routes: (layers, active experts), to lay out recorded routes where the tokens that took them are, -1 where there is no record.
    Raises DataError when a row is longer than ``length``.
    """
    shape = (len(rows), length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    mask = np.zeros(shape, np.float32)
    positions, segment_ids, domains = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
        total = sum(map(len, row))
        if total > length:
            raise DataError(f"row {b} has {total} tokens, more than its length {length}: pack with max_length={length}")
        at = 0
        for segment, example in enumerate(row, start=1):
            end = at + len(example)
            tokens[b, at:end] = example.tokens
            targets[b, at : end - 1] = example.tokens[1:]
            mask[b, at : end - 1] = example.mask[1:]
            positions[b, at:end] = np.arange(end - at, dtype=np.int32)
            segment_ids[b, at:end] = segment
            domains[b, at:end] = example.domain
            at = end
    taken = None if routes is None else to_routes(rows, length, routes)
    return Batch(tokens, targets, mask, positions, segment_ids, domains, taken)


def to_routes(rows: Sequence[Sequence[Example]], length: int, shape: tuple[int, int]) -> np.ndarray:
    """int16 [B, T, L, A]: the examples' routes laid out like ``Batch.tokens``, not shifted; -1 in padding and where none were recorded.

    Raises DataError when an example's routes are not [T, *shape].
    """
    out = np.full((len(rows), length, *shape), -1, np.int16)
    for b, row in enumerate(rows):
        at = 0
        for example in row:
            if example.routes is not None:
                if example.routes.shape[1:] != shape:
                    raise DataError(f"row {b} has routes {example.routes.shape}: they must be [T, {shape[0]}, {shape[1]}], as the model's")
                out[b, at : at + len(example)] = example.routes
            at += len(example)
    return out


def pack_rows(examples: Sequence[Example], rows: int, length: int) -> list[Row]:
    """Exactly ``rows`` rows of at most ``length`` tokens that hold all ``examples`` whole (rollouts of one update); some may be empty.

    Raises DataError, with the numbers, when an example is longer than ``length`` or best-fit decreasing needs more rows.
    """
    return [tuple(examples[i] for i in row) for row in place([len(example) for example in examples], rows, length)]


def place(lengths: Sequence[int], rows: int, length: int) -> list[list[int]]:
    """``pack_rows`` on lengths: which example goes into which row, in order."""
    long = next((i for i, n in enumerate(lengths) if n > length), None)
    if long is not None:
        raise DataError(f"example {long} has {lengths[long]} tokens, rows have {length}: raise the length or cut the run earlier")
    placed = best_fit_decreasing(lengths, length)
    if len(placed) > rows:
        raise DataError(
            f"{len(lengths)} runs of {sum(lengths)} tokens need {len(placed)} rows of {length}, {rows} are given: raise rows or length"
        )
    return placed + [[] for _ in range(rows - len(placed))]


def to_targets(rows: Sequence[Sequence[int]], values: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Per-token values laid out like ``Batch.mask``: float32 [B, T], where position t holds the value of the token it predicts.

    rows: indices into ``values`` per row, as ``place`` gives them. values: one [T] array per example (sampled log-probabilities,
    advantages). The last position of a segment and padding hold 0.
    """
    out = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            out[b, at : at + len(values[i]) - 1] = values[i][1:]
            at += len(values[i])
    return out
