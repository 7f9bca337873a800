"""The teachers' recipes of arXiv 2606.30616, section 4.2, as functions of sizes: what follows what, by which reward, filter, advantage.

An experiment gives runs, lengths and settings of its own scale; what the paper says of a recipe is set here and nowhere else. Of the
engineering and the general agentic teacher it gives the data and no recipe: theirs, SFT and then GRPO, is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..config import Binding, ConfigError, bind
from ..rollout import rewards
from . import experts
from .grpo import GrpoConfig
from .sft import SftConfig
from .task_pool import Pool
from .teacher import SftPhase, TeacherConfig

Runs = experts.Runs | tuple[experts.Runs, ...]
Sources = tuple[experts.Prompts, ...]
SEARCH_REWARD = bind(rewards.search_reward)


def search(
    runs: Runs,
    sft: SftConfig,
    grpo: GrpoConfig,
    sources: Sources,
    *,
    candidates: int,
    questions: int = 2000,
    tries: int = 5,
    reward: Binding = SEARCH_REWARD,
) -> TeacherConfig:
    """SFT on search runs only, then GRPO on questions that ``tries`` tries of the SFT model got both right and wrong.

    candidates: questions tried. questions: kept at most; the paper keeps about 2,000. reward: correctness less efficiency and repetition
    penalties, plus format; the paper gives none of its numbers.
    """
    pool = Pool(candidates=candidates, select="mixed", tries=tries, size=questions)
    return TeacherConfig((SftPhase(runs, sft), dataclasses.replace(grpo, sources=sources, pool=pool, reward=reward)))


def science(without_tools: Runs, first: SftConfig, with_tools: Runs, second: SftConfig) -> TeacherConfig:
    """Two SFT stages: reasoning without tools, then with them. The families of the runs say which is which, so they must differ."""
    _must_differ("science", "without_tools", experts.several(without_tools), "with_tools", experts.several(with_tools))
    return TeacherConfig((SftPhase(without_tools, first, own=False), SftPhase(with_tools, second)))


def instruction_following(rules: GrpoConfig, constraints: Sources, long: GrpoConfig, questions: Sources) -> TeacherConfig:
    """GRPO twice: constraints that rules verify, then answers matched over long contexts. Groups whose rewards are all equal are dropped,
    the reward is correctness. The families of the two say which is which, so they must differ."""
    _must_differ("instruction_following", "constraints", constraints, "questions", questions)
    phases = ((rules, constraints), (long, questions))
    return TeacherConfig(tuple(dataclasses.replace(grpo, sources=sources, drop_equal=True) for grpo, sources in phases))


def _must_differ(recipe: str, one: str, first: Sequence, other: str, second: Sequence) -> None:
    """Raises ConfigError where both are drawn from the same families: the second phase would be the first one again."""
    a, b = ([source.family for source in sources] for sources in (first, second))
    if all(family in b for family in a) and all(family in a for family in b):
        named = ", ".join("the domain's own" if family is None else repr(family) for family in a) or "none"
        raise ConfigError(
            f"recipes.{recipe}: {one} and {other} are drawn from the same families ({named}), so the second phase would be the first one "
            "again; set the family of one of them"
        )


def tool_calling(
    runs: Runs, sft: SftConfig, grpo: GrpoConfig, sources: Sources, *, candidates: int, tasks: int = 64, tries: int = 5
) -> TeacherConfig:
    """SFT, then GRPO with the asymmetric advantage on ``tasks`` hard near misses of the SFT model, reused.

    A task is run about grpo.steps * grpo.prompts * grpo.samples / tasks times. The reward is the outcome, 0 or 1; failed runs are also
    compared by the share of rubrics met, at half weight.
    """
    pool = Pool(candidates=candidates, select="near_misses", tries=tries, size=tasks)
    asymmetric = {"advantage": "papo", "process_coefficient": 0.5, "reward": bind(rewards.outcome_reward)}
    return TeacherConfig((SftPhase(runs, sft), dataclasses.replace(grpo, sources=sources, pool=pool, **asymmetric)))


def sft_then_grpo(runs: Runs, sft: SftConfig, grpo: GrpoConfig, sources: Sources) -> TeacherConfig:
    """For domains whose recipe the paper does not give (engineering, general agentic): SFT on their runs, then GRPO on fresh tasks with
    the reward and advantage that ``grpo`` names."""
    return TeacherConfig((SftPhase(runs, sft), dataclasses.replace(grpo, sources=sources)))
