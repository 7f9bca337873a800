"""From trajectories to tokenised examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from a1jax.data import chat, domain_names
from a1jax.data.errors import DataError
from a1jax.data.packing import Example
from a1jax.data.tokenizer import Tokenizer
from a1jax.data.trajectories import ReadReport, SourceReport
from a1jax.types import TRUNCATED, Trajectory

CHUNK = 32
"""Runs tokenised at a time: enough for batched encoding, little enough to stream."""


def tokenized(
    trajectories: Iterable[Trajectory], tokenizer: Tokenizer, report: ReadReport | None = None, strict: bool = False
) -> Iterator[tuple[Trajectory, Example]]:
    """Every run with its tokens, mask and domain index, in order.

    The last turn of a TRUNCATED run was cut off by a budget: it is a valid prefix, so it ends with its last written character and no
    turn-end token is taught there. A run the template refuses, or of an unknown domain, is skipped and moved from ``report``'s runs to
    its skipped ones (DataError at once with ``strict`` or without a report).
    """
    stream = iter(trajectories)
    while chunk := list(itertools.islice(stream, CHUNK)):
        try:
            yield from _encode(chunk, tokenizer)
        except DataError as error:
            if strict or report is None:
                raise
            if len(chunk) == 1:
                _skip(chunk[0], error, report)
                continue
            for one in chunk:
                yield from tokenized([one], tokenizer, report)


def _encode(chunk: list[Trajectory], tokenizer: Tokenizer) -> list[tuple[Trajectory, Example]]:
    domains = [domain_names.index(t.domain) for t in chunk]
    cut = [t.status == TRUNCATED for t in chunk]
    arrays = chat.tokenize_many(tokenizer, [(t.messages, t.tools) for t in chunk], cut=cut)
    return [(t, Example(tokens, mask, d)) for t, (tokens, mask), d in zip(chunk, arrays, domains, strict=True)]


def _skip(trajectory: Trajectory, error: DataError, report: ReadReport) -> None:
    meta = trajectory.metadata
    source = report.sources.setdefault(meta.get("source", ""), SourceReport())
    reason = "unknown domain" if "unknown domain" in str(error) else "cannot be rendered"
    source.runs -= 1
    source.skipped[reason] += 1
    source.where.append((str(meta.get("file", trajectory.task_id)), int(meta.get("line", 0)), reason, str(error)))
