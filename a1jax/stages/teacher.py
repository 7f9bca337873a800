"""Stage 2: one specialised teacher per domain. Here: SFT on one domain from the stage-1 parameters, and the admission of teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..data.packing import Example
from ..types import Params
from . import experts, sft
from .setting import Setting


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    runs: experts.Runs  # extra expert runs of its own domain, which the student never sees
    sft: sft.SftConfig  # how it is trained on them


def run(cfg: TeacherConfig, params: Params, data: Sequence[tuple[int, Example]], setting: Setting, domain: str) -> Params:
    """The teacher of ``domain``: the stage-1 parameters trained on this domain's runs only. Resumable."""
    return sft.run(cfg.sft, params, sft.Curriculum(cfg.sft, data, setting), setting, stage=stage_name(domain))


def stage_name(domain: str) -> str:
    return f"teacher_{domain}"


def admitted(teacher: dict, student: dict, domain: str) -> bool:
    """A teacher is admitted where it beats the model the student starts from, on tasks held out for this purpose alone.

    A teacher's faults are copied within a dozen steps, so one that is not better must not teach.
    """
    return teacher[domain]["success"] > student[domain]["success"]
