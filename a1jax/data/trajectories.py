"""Trajectories on disk: our own JSONL form, and reading whatever runs there are.

A file is read record by record. A record that cannot be a Trajectory is reported with its file and line, counted by reason and skipped;
with ``strict`` the first one raises.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import gzip
import json
import lzma
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from a1jax.data import readers
from a1jax.data.errors import DataError
from a1jax.data.linking import ROLES, Unusable
from a1jax.types import STATUSES, Record, Trajectory

FORMAT = "a1jax.trajectory/1"
FORMATS = ("a1jax", *readers.READERS)
_SUFFIXES = (".jsonl", ".json", ".traj")
_PACKED = (".gz", ".xz")


def to_json(trajectory: Trajectory) -> str:
    """One line of ASCII JSON. Raises DataError when the trajectory holds values JSON has no form for."""
    try:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(trajectory)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"trajectory {trajectory.task_id!r} has a value that JSON cannot hold ({error}): keep plain values in it") from None


def from_json(text: str | dict[str, Any]) -> Trajectory:
    """The trajectory ``to_json`` wrote, from its line or its decoded object. Raises DataError for anything else."""
    try:
        record = json.loads(text) if isinstance(text, str) else dict(text)
        messages = tuple(record["messages"])
        records = tuple(Record(**{**r, "state": tuple(r.get("state", ()))}) for r in record.get("records", ()))
        role = next((m.get("role") for m in messages if m.get("role") not in ROLES), ROLES[0])
        status, reward = record.get("status"), record.get("reward")
        if role not in ROLES or status not in (None, *STATUSES) or not (reward is None or isinstance(reward, (int, float))):
            raise ValueError(f"role {role!r}, status {status!r} or reward {reward!r} is none")
        return Trajectory(
            domain=str(record["domain"]), task_id=str(record["task_id"]), messages=messages, tools=tuple(record.get("tools", ())),
            records=records, reward=reward, status=status, metadata=dict(record.get("metadata", {})),
        )  # fmt: skip
    except KeyError as error:
        raise DataError(f"not a trajectory: no {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a trajectory: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def write(path: str | pathlib.Path, trajectories: Iterable[Trajectory]) -> int:
    """Write JSONL (gzip when the name ends in .gz); the number written. The file appears only when all of it is there."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    count = 0
    try:
        with gzip.open(part, "wt") if path.suffix == ".gz" else open(part, "w") as file:
            for trajectory in trajectories:
                file.write(to_json(trajectory) + "\n")
                count += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


@dataclasses.dataclass
class SourceReport:
    """One source (the folder a file lies in): runs read and records skipped, by reason and place (file, line, reason, detail)."""

    runs: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    where: list[tuple[str, int, str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class ReadReport:
    """What reading did, per source; complete once the iterator is exhausted."""

    sources: dict[str, SourceReport] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> int:
        return sum(source.runs for source in self.sources.values())

    @property
    def skipped(self) -> int:
        return sum(source.skipped.total() for source in self.sources.values())

    def lines(self) -> list[str]:
        """``file:line: reason: detail`` of every skipped record."""
        places = (place for source in self.sources.values() for place in source.where)
        return [f"{file}:{line}: {reason}" + (f": {detail}" if detail else "") for file, line, reason, detail in places]

    def __str__(self) -> str:
        rows = []
        for name, source in self.sources.items():
            why = "; ".join(f"{n} x {reason}" for reason, n in source.skipped.most_common())
            rows.append(f"{name}: {source.runs} runs, {source.skipped.total()} skipped" + (f" ({why})" if why else ""))
        return "\n".join(rows)


def read(
    paths: str | pathlib.Path | Sequence[str | pathlib.Path], strict: bool = False, format: str | None = None, domain: str | None = None
) -> tuple[Iterator[Trajectory], ReadReport]:
    """Trajectories of files, folders (searched for .jsonl, .json, .traj, also .gz and .xz) and globs; and the report they fill.

    format: one of FORMATS for every record; None tells it from each record's structure. domain: put on every run; None: the run's own.
    ``metadata`` gets source, file and line. Raises DataError when a path has nothing, and with ``strict`` on the first bad record.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"unknown trajectory format {format!r}: use one of {', '.join(FORMATS)}")
    report = ReadReport()
    files = files_of([paths] if isinstance(paths, (str, pathlib.Path)) else paths)
    return (t for file in files for t in _read_file(file, report, strict, format, domain)), report


def read_all(paths, strict: bool = False, format: str | None = None, domain: str | None = None) -> tuple[list[Trajectory], ReadReport]:
    """``read`` to its end."""
    trajectories, report = read(paths, strict, format, domain)
    return list(trajectories), report


def files_of(paths: Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
    """The files ``paths`` name, sorted within each path, none twice. Raises DataError for a path that names none."""
    files: dict[pathlib.Path, None] = {}
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file() and _bare(file).suffix in _SUFFIXES]
        else:
            found = [path] if path.is_file() else [pathlib.Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"no trajectory files at {path}: give a file, a folder with .jsonl, .json or .traj files, or a glob")
        files |= dict.fromkeys(found)
    return list(files)


def _bare(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix("") if file.suffix in _PACKED else file


def _read_file(file: pathlib.Path, report: ReadReport, strict: bool, format: str | None, domain: str | None) -> Iterator[Trajectory]:
    name = file.resolve().parent.name
    source = report.sources.setdefault(name, SourceReport())
    place = readers.Place(_bare(file).stem, 0)
    for line, record in _records(file):
        try:
            if isinstance(record, Unusable):
                raise record
            trajectory = _trajectory(record, dataclasses.replace(place, line=line), format)
        except Unusable as error:
            if strict:
                raise DataError(f"{file}:{line}: {error}") from None
            source.skipped[error.reason] += 1
            source.where.append((str(file), line, error.reason, str(error).partition(": ")[2]))
            continue
        source.runs += 1
        metadata = {**trajectory.metadata, "source": name, "file": file.name, "line": line}
        yield dataclasses.replace(trajectory, domain=domain or trajectory.domain, metadata=metadata)


def _trajectory(record: Any, place: readers.Place, format: str | None) -> Trajectory:
    kind = format or readers.recognise(record)
    if kind is None or not isinstance(record, dict):
        keys = ", ".join(sorted(map(str, record))[:3]) if isinstance(record, dict) else type(record).__name__
        raise Unusable("no known trajectory format", keys[:60])
    try:
        return from_json(record) if kind == "a1jax" else readers.READERS[kind](record, place)
    except DataError as error:
        raise Unusable("not our schema", str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise Unusable("malformed record", f"{type(error).__name__}: {error}") from None


def _records(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """(line, decoded record or Unusable) of a file: JSON lines, one JSON array of records, or one JSON object."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    try:
        with opened(file, "rb") as stream:
            if _bare(file).suffix != ".jsonl":
                text = stream.read().decode("utf-8")
                yield from _document(text)
                return
            line = 0
            while True:
                line += 1
                raw = stream.readline()
                if not raw:
                    return
                if raw.strip():
                    yield line, _decoded(raw)
    except UnicodeDecodeError as error:
        yield 1, Unusable("not UTF-8", str(error))
    except (OSError, EOFError, lzma.LZMAError, gzip.zlib.error) as error:
        yield 1, Unusable("unreadable file", str(error))


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unusable("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Unusable("broken JSON", str(error).splitlines()[0])


def _document(text: str) -> Iterator[tuple[int, Any]]:
    """Records of a .json or .traj file; a file that is neither an array nor one value is read as lines."""
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        try:
            yield 1, json.loads(text)
        except (ValueError, RecursionError):
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield number, _decoded(line.encode("utf-8"))
        return
    decoder, at, counted, line = json.JSONDecoder(), start + 1, 0, 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line += text.count("\n", counted, at)
        counted = at
        if text.startswith("]", at):
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, Unusable("broken JSON", f"{str(error).splitlines()[0]}; the rest of the array is lost")
            return
        yield line, record
