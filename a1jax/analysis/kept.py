"""Finding runs to read: those a run folder keeps (of evaluations, of stages that sample), or those of a trajectory file."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import pathlib
from collections.abc import Iterator

from .. import provenance
from ..config import ConfigError
from ..data import tokenizer as tokenizers
from ..data import trajectories
from ..data.tokenizer import Tokenizer
from ..stages import kept_runs
from ..types import Trajectory

log = logging.getLogger(__name__)
FIRST = "student"  # whose run is shown where no model is named
PLACES = ("evaluations", "admission", kept_runs.FOLDER)


@dataclasses.dataclass(frozen=True)
class Kept:
    """model: the evaluation's name, admission/<name>, or <stage>@<step>; "" for a plain file."""

    model: str
    run: Trajectory


def files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """model -> file of the runs a run folder keeps, the student's first, sampled ones last."""
    out = {}
    for place in PLACES:
        for file in sorted((folder / place).rglob(f"*{kept_runs.SUFFIX}")):
            name = file.name.removesuffix(kept_runs.SUFFIX)
            where = str(file.parent.relative_to(folder / place))
            if place == kept_runs.FOLDER:
                out[f"{where}@{int(name.removeprefix('step_'))}"] = file
            else:
                out[name if place == "evaluations" else f"{place}/{name}"] = file
    return dict(sorted(out.items(), key=lambda item: item[0] != FIRST))


def every(path: pathlib.Path, model: str | None = None) -> Iterator[Kept]:
    """All runs of a run folder or of trajectory files. Raises ConfigError for a model that is not there, DataError for no files at all.

    Records of trajectory files that are no runs are skipped, which the log says."""
    found = _of_model(path, model)
    if not found:
        runs, report = trajectories.read(path)
        yield from (Kept("", run) for run in runs)
        if report.skipped:
            log.warning("records that could not be read: %d (%s)", report.skipped, "; ".join(report.lines()[:3]))
    for name, file in found.items():
        yield from (Kept(name, run) for run in kept_runs.read(file))


def of_task(path: pathlib.Path, task: str, model: str | None = None) -> list[Kept]:
    """The runs of one task, in the order of ``files``. Raises ConfigError with near matches where there is none."""
    ids: dict[str, None] = {}
    out: list[Kept] = []
    found = _of_model(path, model)
    for name, file in found.items():
        for other, line in kept_runs.scan(file):
            ids[other] = None
            if other == task:
                out.append(Kept(name, trajectories.from_json(line)))
    if not found:
        for run in trajectories.read(path)[0]:
            ids[run.task_id] = None
            out += [Kept("", run)] if run.task_id == task else []
    if not out:
        near = difflib.get_close_matches(task, ids, n=3, cutoff=0.4) or list(ids)[:3]
        told = f"of {len(ids)} tasks the nearest are {', '.join(near)} (--list has all)" if ids else "there are no runs"
        raise ConfigError(f"{path}: no run of task '{task}'; {told}")
    return out


def tokenizer_of(path: pathlib.Path) -> Tokenizer | None:
    """The tokenizer a run folder keeps, None where there is none."""
    found = [file for name in ("tokenizer.model", "tokenizer.json") if (file := path / name).is_file()]
    return tokenizers.load(found[0]) if found else None


def _of_model(path: pathlib.Path, model: str | None) -> dict[str, pathlib.Path]:
    if not path.exists():
        raise ConfigError(f"{path}: nothing there; give the folder of a run or a trajectory file")
    found = files(path) if path.is_dir() else {}
    if not found and (path / provenance.FILE).is_file():
        raise ConfigError(f"{path}: no runs are kept here; each model leaves its own when it is judged")
    if model is None:
        return found
    if model not in found:
        models = ", ".join(found) if found else "none: it is no folder of a run that keeps its runs"
        raise ConfigError(f"{path}: no runs of model '{model}'; there are {models}")
    return {model: found[model]}
