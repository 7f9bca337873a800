"""Runs kept to be read and counted again: a JSONL line a run in the project's trajectory schema, with ids and log-probabilities.

``metadata["rollout"]``: tokens (ids), sampled ([start, stop] of each stretch the model wrote), logp (of those, four decimals), turns.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import distributed
from ..data import trajectories
from ..data.errors import DataError
from ..types import Rollout, Trajectory

KEY, SUFFIX = "rollout", ".runs.jsonl.gz"
FOLDER = "rollouts"  # of a run's folder: rollouts/<stage>/step_000012.runs.jsonl.gz


def spans(sampled: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of every stretch of ones: the model's turns, the one that was cut included."""
    edges = np.diff(np.concatenate([[0], (np.asarray(sampled) > 0).astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def to_trajectory(run: Rollout, **facts: Any) -> Trajectory:
    """The run with its arrays, and ``facts``, in the metadata. Routes are not kept. A run without a trajectory gets an empty one."""
    kept = {
        "tokens": np.asarray(run.tokens).tolist(),
        "sampled": [list(span) for span in spans(run.sampled)],
        "logp": [round(float(x), 4) for x in np.asarray(run.logp)[np.asarray(run.sampled) > 0]],
        "turns": run.turns,
    }
    base = run.trajectory or Trajectory(run.domain, run.task_id, ())
    metadata = {**base.metadata, **facts, KEY: kept}
    return dataclasses.replace(base, reward=float(run.reward), status=run.status, metadata=metadata)


def to_rollout(kept: Trajectory) -> Rollout:
    """What ``to_trajectory`` was given, log-probabilities to four decimals. Raises KeyError for a trajectory that holds no arrays."""
    found = kept.metadata[KEY]
    tokens = np.asarray(found["tokens"], np.int32)
    sampled, logp = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
    for start, stop in found["sampled"]:
        sampled[start:stop] = 1.0
    logp[sampled > 0] = found["logp"]
    return Rollout(kept.task_id, kept.domain, tokens, sampled, logp, kept.status, kept.reward, found["turns"], kept)


def write(path: pathlib.Path, runs: Iterable[Trajectory]) -> int:
    """Writes in one move; the number written."""
    return trajectories.write(path, runs)


def scan(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(task id, line) of every run of a file, without reading what else is in the line. Raises DataError for a damaged file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                match = _TASK.search(line)
                if match:
                    yield json.loads(match[1]), line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: unreadable file: {error}") from None


_TASK = re.compile(r'"task_id": ("(?:[^"\\]|\\.)*")')  # ``trajectories.to_json`` writes it before everything that is long


def read(path: pathlib.Path) -> list[Trajectory]:
    """Every run of a file, in order. Raises DataError for a line that is none."""
    return list(trajectories.read(path, strict=True)[0])


def keep(
    folder: pathlib.Path, rollouts: Sequence[Rollout], step: int, most: int = 8, files: int = 32, facts: Sequence[dict[str, Any]] = ()
) -> pathlib.Path:
    """Keeps up to ``most`` of a step's runs, as many kinds of (domain, status) as there are, as folder/step_<step>.runs.jsonl.gz.

    facts: for each rollout what else to keep of it, e.g. {"reward_parts": {name: number}, "advantage": number}. Bounded: where that makes
    more than ``files`` files, steps that are no multiple of the next power of two go, so the old ones thin out; the newest stays. A
    stage that is resumed writes over the steps it takes again.
    """
    path = folder / f"step_{step:06d}{SUFFIX}"
    more = facts or [{}] * len(rollouts)
    write(path, [to_trajectory(rollouts[i], step=step, **more[i]) for i in chosen(rollouts, most)])
    kept = steps_of(folder)
    stride = 1
    while sum(s % stride == 0 for s in kept) > files:
        stride *= 2
    for number, file in kept.items():
        if number % stride and number != max(kept):
            file.unlink()
    return path


def keep_some(workdir: pathlib.Path, stage: str, rollouts: Sequence[Rollout], step: int, every: int) -> None:
    """``keep`` in the folder of a stage that samples, at every ``every``-th of its steps. Of several processes the first one's."""
    if step % every == 0 and distributed.is_first():
        keep(workdir / FOLDER / stage, rollouts, step)


def chosen(rollouts: Sequence[Rollout], most: int) -> list[int]:
    """Indices of up to ``most`` runs, one of each (domain, status) in turn, in the order given."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for i, run in enumerate(rollouts):
        kinds.setdefault((run.domain, run.status), []).append(i)
    rounds = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [i for several in rounds for i in several if i is not None][:most]


def steps_of(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """step -> file of the runs kept in a folder, in order."""
    found = {re.fullmatch(r"step_(\d+)", file.name.removesuffix(SUFFIX)): file for file in sorted(folder.glob(f"step_*{SUFFIX}"))}
    return {int(match[1]): file for match, file in found.items() if match}
