"""``a1jax prepare``: runs in any known format, tokenised once, kept as a tensorflow-datasets data set of array_record files.

Everything is made in a hidden folder beside the target and moved there in one step, with the report as the last file written, so what
stands at the target is complete or is not there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from a1jax.data import domain_names, statistics, trajectories
from a1jax.data import tokenizer as tokenizers
from a1jax.data.errors import DataError
from a1jax.data.examples import tokenized
from a1jax.data.packing import Example
from a1jax.data.tokenizer import Tokenizer
from a1jax.types import Trajectory

REPORT = "report.json"
LENGTHS = "lengths.npy"


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did. domains: name -> runs. read: per source, as in trajectories.ReadReport."""

    runs: int
    tokens: int
    supervised: int
    domains: dict[str, int]
    read: trajectories.ReadReport
    rows: list[statistics.Row]  # token statistics per source

    def __str__(self) -> str:
        share = self.supervised / self.tokens if self.tokens else 0.0
        domains = ", ".join(f"{name} {n}" for name, n in self.domains.items())
        return f"{statistics.table(self.rows)}\n{self.runs} runs, {self.tokens} tokens, {share:.1%} written by the model ({domains})"


def prepare(
    sources: str | pathlib.Path | Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    tokenizer_path: str | pathlib.Path,
    strict: bool = False,
    format: str | None = None,
    domain: str | None = None,
) -> PrepareReport:
    """Read ``sources`` (see ``trajectories.read``), tokenise with the tokenizer at ``tokenizer_path``, write the data set to ``out``.

    Raises DataError when ``out`` holds anything already, when no run is usable, or with ``strict`` at the first bad record.
    """
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty: give a new folder, or remove it first")
    tokenizer = tokenizers.load(tokenizer_path)
    runs, read = trajectories.read(sources, strict, format, domain)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        rows: list[tuple[str, str, int, int]] = []
        _build(part, (_row(t, e, rows) for t, e in tokenized(runs, tokenizer, read, strict)), rows)
        by_source: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
        for source, _, total, supervised in rows:
            by_source[source].append((total, supervised))
        report = PrepareReport(
            runs=len(rows), tokens=sum(n for *_, n, _ in rows), supervised=sum(n for *_, n in rows),
            domains={d: n for d in domain_names.DOMAINS if (n := sum(own == d for _, own, _, _ in rows))}, read=read,
            rows=statistics.of_counts(by_source, read),
        )  # fmt: skip
        np.save(part / LENGTHS, np.asarray([n for *_, n, _ in rows], np.int64))
        summary = {"tokenizer": str(tokenizer_path), "fingerprint": tokenizer.fingerprint, "skipped": read.lines()}
        summary["statistics"] = statistics.table(report.rows)
        numbers = {key: getattr(report, key) for key in ("runs", "tokens", "supervised", "domains")}
        (part / REPORT).write_text(json.dumps(numbers | summary, indent=1) + "\n")
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return report


def _row(trajectory: Trajectory, example: Example, rows: list[tuple[str, str, int, int]]) -> dict[str, Any]:
    supervised = int(example.mask.sum())
    rows.append((statistics.by_source(trajectory), trajectory.domain, len(example), supervised))
    return {
        "domain": trajectory.domain, "task_id": trajectory.task_id, "status": trajectory.status or "", "tokens": example.tokens,
        "mask": example.mask.astype(np.uint8), "reward": np.float32(math.nan if trajectory.reward is None else trajectory.reward),
        "total": len(example), "supervised": supervised,
    }  # fmt: skip


def _build(folder: pathlib.Path, examples: Iterator[dict[str, Any]], rows: list[Any]) -> None:
    first = next(examples, None)
    if first is None:
        raise DataError("no usable run in these sources: read them with strict to see why")
    tfds, builder = _tfds()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself there
        builder.PreparedRuns(data_dir=folder, rows=lambda: _chain(first, examples)).download_and_prepare()
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _tfds() -> tuple[Any, Any]:
    """tensorflow-datasets, imported only where it is used (half a second), without its progress bars."""
    import tensorflow_datasets

    from a1jax.data import prepared_runs

    tensorflow_datasets.disable_progress_bar()
    return tensorflow_datasets, prepared_runs


class PreparedSource:
    """Random access to the Examples of a prepared data set; ``batches.loader`` reads ``lengths`` from it without touching the runs."""

    def __init__(self, path: pathlib.Path, summary: dict[str, Any], records: Any, lengths: np.ndarray, domains: Sequence[str]):
        self.path, self.summary, self.lengths, self.domains = path, summary, lengths, tuple(domains)
        self._records = records

    def __len__(self) -> int:
        return len(self.lengths)

    def record(self, index: int) -> dict[str, Any]:
        """Everything about a run: domain, task_id, status, tokens, mask, reward (NaN when unknown), total, supervised."""
        raw = self._records[index]
        return {key: value.decode("utf-8") if isinstance(value, bytes) else value for key, value in raw.items()}

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"run {index} of {len(self)}")
        record = self.record(index)
        domain = domain_names.index(record["domain"], self.domains)
        return Example(np.asarray(record["tokens"], np.int32), np.asarray(record["mask"], np.float32), domain)


def open_prepared(
    path: str | pathlib.Path, tokenizer: Tokenizer | None = None, domains: Sequence[str] = domain_names.DOMAINS
) -> PreparedSource:
    """The data set ``prepare`` wrote. domains: names that ``Example.domain`` counts.

    Raises DataError when it is missing or incomplete, or was tokenised with another vocabulary than ``tokenizer``'s.
    """
    path = pathlib.Path(path)
    try:
        summary = json.loads((path / REPORT).read_text())
        lengths = np.load(path / LENGTHS)
    except (OSError, ValueError):
        raise DataError(f"{path} is no complete prepared data set: make it with a1jax prepare SRC --out {path}") from None
    if tokenizer is not None and tokenizer.fingerprint != summary["fingerprint"]:
        raise DataError(f"{path} was tokenised with {summary['tokenizer']}, not with {tokenizer.path}: prepare it again")
    tfds, builder = _tfds()
    folder = path / builder.PreparedRuns.name / str(builder.PreparedRuns.VERSION)
    records = tfds.builder_from_directory(folder).as_data_source(split="train")
    if len(records) != len(lengths):
        raise DataError(f"{path} has {len(records)} runs, its report {len(lengths)}: prepare it again")
    return PreparedSource(path, summary, records, lengths, domains)
