"""Stages of many runs that differ late: what two runs have in common is trained once, in a folder named by all that it depends on.

    <root>/sft-<hash>/                tokenizer, stages/sft
    <root>/teachers-<hash>/           stages/teacher_<domain>, admission/
    <root>/student-<hash>/            stages/distill
    <root>/sft_continued-<hash>/      stages/sft_continued

Whoever needs a stage first trains it under a lock on its folder; others, also other processes on machines that see the folder and lock
files on it, wait and read, or do something else as long as it is ``busy``. A stage that was stopped goes on from its last checkpoint.
The code is not in the names: after a change of it take another folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Literal

from .. import interruption, metrics
from ..types import Params
from . import distill, pipeline, teacher
from .pipeline import Experiment
from .scoring import Teacher
from .setting import Setting

Judged = Literal["sft", "teachers", "sft_continued", "student"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """setting: of the last stage. models: name in the table -> parameters. stages: name -> the folder it lies in, in the order in which
    they were trained. given, chosen: teachers that are checkpoints, and domain -> who teaches it, as in ``pipeline``."""

    setting: Setting
    models: dict[str, Params]
    stages: dict[str, pathlib.Path]
    given: dict[str, Teacher] = dataclasses.field(default_factory=dict)
    chosen: dict[str, str] = dataclasses.field(default_factory=dict)


def folder_of(cfg: Experiment, judged: Judged, root: pathlib.Path) -> pathlib.Path:
    """Where a model is trained: the same for all experiments that say the same of it, the mesh included. Of files (tokenizer, initial
    parameters, checkpoints) their paths count, not what lies there."""
    parts: dict[str, Any] = {
        name: getattr(cfg, name) for name in ("model", "tokenizer", "domains", "runs", "sft", "mesh", "seed", "initial")
    }
    parts |= {"families": [cfg.family(d) for d in cfg.domains], "every": cfg.every_family(), "tools": cfg.limits.show_tools}
    if judged in ("teachers", "student"):
        parts |= {"teachers": cfg.teachers, "checkpoints": cfg.checkpoints, "admission": cfg.admission, "limits": cfg.limits}
        parts |= {"length": cfg.distill.teacher_max_length}  # how long a checkpoint's runs may be when it is admitted
    if judged == "student":
        parts["distill"] = cfg.distill
    if judged == "sft_continued":
        parts["control"] = pipeline.control_config(cfg)
    return root / f"{judged}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile: waits for who does, and can be told to stop in that time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                interruption.point()
                time.sleep(0.2)
        yield


def taken(folder: pathlib.Path) -> bool:
    """Whether somebody is alone in this folder at this moment."""
    try:
        with open(folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def busy(cfg: Experiment, judged: Judged, root: pathlib.Path) -> bool:
    """Whether somebody is at this model or at one that it is trained from, so that ``train`` would wait."""
    before = {"sft": (), "student": ("sft", "teachers")}.get(judged, ("sft",))
    return any(taken(folder_of(cfg, name, root)) for name in (*before, judged))


def train(cfg: Experiment, judged: Judged, root: pathlib.Path) -> Trained:
    """The stages up to the model that is judged: "sft" (stage 1), "teachers" (2), "student" (3), "sft_continued" (the control).

    Raises what the stages raise."""
    where = folder_of(cfg, judged, root)
    if judged == "sft":
        return _sft(cfg, where)
    before = train(cfg, "teachers" if judged == "student" else "sft", root)
    with alone(where), metrics.Writer(where) as writer:
        setting = dataclasses.replace(before.setting, workdir=where, writer=writer)
        if judged == "teachers":
            return _teachers(cfg, setting, before)
        if judged == "student":
            teachers = pipeline.teachers_of(cfg, setting, before.models, before.given, before.chosen)
            models = {judged: distill.run(cfg.distill, before.models["sft"], teachers, setting)}
        else:
            models = {judged: pipeline.train_control(cfg, setting, before.models["sft"], pipeline.stage_data(cfg, setting))}
    stage = "distill" if judged == "student" else judged
    return dataclasses.replace(before, setting=setting, models=before.models | models, stages=before.stages | {stage: where})


def _sft(cfg: Experiment, where: pathlib.Path) -> Trained:
    with alone(where), metrics.Writer(where) as writer:
        setting = pipeline.open_setting(cfg, where, writer)
        params = setting.finished("sft")
        if params is None:
            with setting.on_mesh():
                base = setting.init_params()
            params = pipeline.train_sft(cfg, setting, base, pipeline.stage_data(cfg, setting))
    return Trained(setting, {"sft": params}, {"sft": where})


def _teachers(cfg: Experiment, setting: Setting, before: Trained) -> Trained:
    given = pipeline.open_checkpoints(cfg, setting)
    names = [teacher.stage_name(d) for d in cfg.domains if d not in cfg.checkpoints]
    ready = {name: setting.finished(name) for name in names}
    if None in ready.values():
        ready = pipeline.train_teachers(cfg, setting, before.models["sft"], pipeline.stage_data(cfg, setting), given)
    models = before.models | ready
    chosen = pipeline.admit(cfg, setting, models, given)
    return Trained(setting, models, before.stages | dict.fromkeys(names, setting.workdir), given, chosen)
