"""Stage 2: one specialised teacher per domain, by its own recipe of SFT and reinforcement; and the admission of teachers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from .. import distributed
from ..config import ConfigError
from ..data.packing import Example
from ..domains import Domain
from ..types import Params
from . import experts, grpo, sft, verdicts
from .grpo import GrpoConfig
from .setting import Setting


@dataclasses.dataclass(frozen=True)
class SftPhase:
    """SFT on the domain's own runs."""

    runs: experts.Runs | tuple[experts.Runs, ...]  # expert runs that the student never sees
    sft: sft.SftConfig  # how it is trained on them
    own: bool = True  # and on the domain's runs of stage 1; those only, where ``runs`` is empty


Phase = SftPhase | GrpoConfig


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    recipe: tuple[Phase, ...]  # its phases in order, the first from the stage-1 parameters; at most ten

    def __post_init__(self):
        if not 1 <= len(self.recipe) <= 10:
            raise ConfigError(f"TeacherConfig.recipe has {len(self.recipe)} phases; it must have 1 to 10")

    def families(self) -> list[experts.Runs | experts.Prompts]:
        """All that its data are drawn from."""
        return [x for phase in self.recipe for x in (experts.several(phase.runs) if isinstance(phase, SftPhase) else phase.sources)]


def check(cfg: TeacherConfig, family: Domain) -> None:
    """Raises ConfigError where a phase's judge is none for the tasks of the domain, before anything is trained."""
    for phase in cfg.recipe:
        if isinstance(phase, GrpoConfig) and phase.judge is not None:
            verdicts.check(phase.judge, [(source.family or family).propose(0, source.lengths[0]) for source in phase.sources])


def run(
    cfg: TeacherConfig, params: Params, data: Sequence[tuple[int, Example]], setting: Setting, domain: str, show_tools: bool = False
) -> Params:
    """The teacher of ``domain``: the stage-1 parameters after every phase of the recipe. Resumable.

    data: the domain's runs of stage 1. Every phase is a stage with a folder of its own (``phase_names``); no two draw the same tasks.
    """
    done = setting.finished(stage_name(domain))
    if done is not None:
        return done
    skip, names = 0, phase_names(cfg, domain)
    for lane, (phase, name) in enumerate(zip(cfg.recipe, names, strict=True)):
        if isinstance(phase, GrpoConfig):
            params = grpo.run(phase, params, setting, domain, name, lane)
            continue
        params = _supervised(phase, params, data if phase.own else (), setting, domain, name, show_tools, skip)
        skip += experts.taken(phase.runs)
    if len(names) > 1:
        _stand(setting, domain, names)
    return params


def _supervised(
    phase: SftPhase, params: Params, own: Sequence, setting: Setting, domain: str, name: str, show_tools: bool, skip: int
) -> Params:
    done = setting.finished(name)
    if done is not None:  # before its runs are made
        return done
    family, index = setting.families[domain], setting.domains.index(domain)
    extra = experts.examples(family, index, phase.runs, "teacher", setting.seed, setting.tokenizer, show_tools, skip)
    if not (own or extra):
        raise ConfigError(f"{name}: no runs to train on; give SftPhase.runs, or set SftPhase.own = True")
    return sft.run(phase.sft, params, sft.Curriculum(phase.sft, [*own, *extra], setting), setting, stage=name)


def _stand(setting: Setting, domain: str, names: Sequence[str]) -> None:
    """The last phase's parameters stand as the teacher's, by a link: they are not stored twice. The facts are those of all phases."""
    directory, last = setting.directory(stage_name(domain)), setting.directory(names[-1])

    def link() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        params = directory / "params"
        if not params.is_symlink():
            params.symlink_to(os.path.relpath(last / "params", directory), target_is_directory=True)

    distributed.by_first(link)
    facts = [setting.facts(name) for name in names]
    setting.conclude(stage_name(domain), {"phases": list(names), **{k: sum(f[k] for f in facts) for k in ("steps", "seconds")}})


def stage_name(domain: str) -> str:
    return f"teacher_{domain}"


def phase_names(cfg: TeacherConfig, domain: str) -> list[str]:
    """The stages of a recipe: teacher_search where there is one phase, else teacher_search_1_sft, teacher_search_2_grpo, ..."""
    if len(cfg.recipe) == 1:
        return [stage_name(domain)]
    kinds = ["grpo" if isinstance(phase, GrpoConfig) else "sft" for phase in cfg.recipe]
    return [f"{stage_name(domain)}_{i}_{kind}" for i, kind in enumerate(kinds, start=1)]


def admitted(teacher: dict, student: dict, domain: str) -> bool:
    """A teacher is admitted where it beats the model the student starts from, on tasks held out for this purpose alone.

    A teacher's faults are copied within a dozen steps, so one that is not better must not teach.
    """
    return teacher[domain]["success"] > student[domain]["success"]
