"""Recipes: what the paper says of them, phase after phase each in its own folder, the last one's parameters the teacher's."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import config, main
from a1jax.config import ConfigError
from a1jax.domains import Search
from a1jax.domains.long_context import LongContext
from a1jax.domains.science import Science
from a1jax.models import hf
from a1jax.rollout import rewards
from a1jax.stages import experts, grpo, recipes, sft, teacher
from a1jax.stages.experts import Prompts, Runs
from a1jax.stages.grpo import GrpoConfig
from a1jax.stages.sft import SftConfig
from a1jax.stages.task_pool import Pool
from a1jax.stages.teacher import SftPhase, TeacherConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS, SOURCES = Runs({1: 3, 2: 2}), (Prompts((1, 2)),)
SFT, GRPO = SftConfig(steps=7), GrpoConfig(steps=5, prompts=2, samples=4, rows=4)


def test_search_keeps_what_five_tries_got_both_right_and_wrong():
    first, second = recipes.search(RUNS, SFT, GRPO, SOURCES, candidates=100).recipe
    assert first == SftPhase(RUNS, SFT) and second.sources == SOURCES and second.steps == 5
    assert second.pool == Pool(candidates=100, select="mixed", tries=5, size=2000)
    assert second.reward.fn is rewards.search_reward and second.advantage == "group"


def test_science_learns_without_tools_first():
    without, with_tools = Runs({1: 2}, Science(tools=False)), Runs({1: 2})
    recipe = recipes.science(without, SFT, with_tools, SFT).recipe
    assert [phase.runs for phase in recipe] == [without, with_tools] and [phase.own for phase in recipe] == [False, True]
    assert recipes.science((without, with_tools), SFT, with_tools, SFT) and recipes.science(without, SFT, (without, with_tools), SFT)
    for first, second in ((RUNS, with_tools), (without, (without, without)), ((without, RUNS), (with_tools, without))):
        with pytest.raises(ConfigError, match=r"recipes.science: without_tools and with_tools are drawn from the same families \("):
            recipes.science(first, SFT, second, SFT)


def test_instruction_following_is_reinforced_twice():
    questions = (Prompts((1,), LongContext()),)
    first, second = recipes.instruction_following(dataclasses.replace(GRPO, drop_equal=False), SOURCES, GRPO, questions).recipe
    assert (first.sources, second.sources) == (SOURCES, questions) and first.drop_equal and second.drop_equal
    with pytest.raises(
        ConfigError, match=r"constraints and questions are drawn from the same families \(the domain's own\), so"
    ) as refused:
        recipes.instruction_following(GRPO, SOURCES, GRPO, (Prompts((5,)),))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("arg", ["v5p-256", "smoke"])
def test_the_35b_follows_the_paper(arg):
    """Derivations before tools, constraints before long contexts, also in stages 1 and 3; its budgets (4.2)."""
    cfg = config.load(f"{ROOT}/experiments/agents_a1_35b.py:{arg}")

    def kinds(sources):
        found = [x.family for x in (sources if isinstance(sources, tuple) else (sources,))]
        return {"long" if isinstance(f, LongContext) else "derivations" if f == Science(tools=False) else f for f in found}

    def phases(domain):
        return [kinds(phase.runs if isinstance(phase, SftPhase) else phase.sources) for phase in cfg.teachers[domain].recipe]

    assert phases("science") == [{"derivations"}, {None}] and phases("instruction_following") == [{None}, {"long"}]
    for of in (cfg.runs, cfg.distill.of):
        assert (kinds(of["science"]), kinds(of["instruction_following"])) == ({None, "derivations"}, {None, "long"})
    assert kinds(cfg.evaluation.of["instruction_following"]) == kinds(cfg.admission.of["instruction_following"]) == {None, "long"}
    for domain in cfg.domains:
        for source in (*experts.several(cfg.runs[domain]), *cfg.teachers[domain].families()):
            task = (source.family or cfg.family(domain)).propose(0, 1)
            assert len(task.question) < 2 * cfg.limits.max_length  # what is asked leaves room: no two ids a character
    sampling = [p.limits for t in cfg.teachers.values() for p in t.recipe if isinstance(p, GrpoConfig)] + [cfg.distill.limits]
    if arg != "smoke":
        own = {"slots": 256, "feed_tokens": 2048, "workers": 64, "show_tools": True}
        assert len(sampling) == 7 and all(limits == dataclasses.replace(grpo.PAPER_LIMITS, **own) for limits in sampling)
        assert (sampling[0].max_turns, sampling[0].max_turn_tokens, sampling[0].max_length) == (300, 4096, 131072)


def test_tool_calling_reuses_near_misses_under_the_asymmetric_advantage():
    _, second = recipes.tool_calling(RUNS, SFT, GRPO, SOURCES, candidates=300).recipe
    assert second.pool == Pool(candidates=300, select="near_misses", tries=5, size=64)
    assert (second.advantage, second.process_coefficient, second.reward.fn) == ("papo", 0.5, rewards.outcome_reward)


def test_a_recipe_is_a_config_like_any_other(tmp_path):
    cfg = recipes.sft_then_grpo((RUNS, Runs({1: 1}, Search(degree=2))), SFT, GRPO, SOURCES)
    config.check(cfg)
    changed = config.override(cfg, ["recipe.1.objective.clip_high=0.3", "recipe.0.sft.steps=9"])
    assert changed.recipe[1].objective.clip_high == 0.3 and changed.recipe[0].sft.steps == 9
    assert [type(x) for x in cfg.families()] == [Runs, Runs, Prompts] and cfg.families()[1].family == Search(degree=2)
    with pytest.raises(ConfigError, match="0 phases"):
        TeacherConfig(())


@pytest.fixture()
def phases(setting, monkeypatch):
    """Phases that only leave their marks: each adds its steps to every parameter. What they were given is in the list."""
    given = []

    def mark(cfg, params, stage, **facts):
        done = setting.finished(stage)
        if done is not None:
            return done
        given.append({"stage": stage, **facts})
        return setting.finish(stage, jax.tree.map(lambda p: p + cfg.steps, params), {"steps": cfg.steps, "seconds": 1.0})

    monkeypatch.setattr(sft, "run", lambda cfg, params, source, setting, stage: mark(cfg, params, stage, data=source))
    monkeypatch.setattr(sft, "Curriculum", lambda cfg, data, setting: data)
    monkeypatch.setattr(grpo, "run", lambda cfg, params, setting, domain, stage, lane: mark(cfg, params, stage, domain=domain, lane=lane))
    return given


def lengths(data):
    return sorted(steps for steps, _ in data)


def test_phases_follow_one_another_and_the_last_stands_as_the_teacher(setting, data, phases, tmp_path):
    cfg = TeacherConfig((SftPhase(RUNS, SFT), SftPhase((Runs({1: 1}), Runs({2: 1})), SFT, own=False), GRPO))
    start = setting.init_params()
    names = ["teacher_search_1_sft", "teacher_search_2_sft", "teacher_search_3_grpo"]
    assert teacher.phase_names(cfg, "search") == names

    made = teacher.run(cfg, start, data[:4], setting, "search")
    assert [phase["stage"] for phase in phases] == names and phases[2]["lane"] == 2
    assert lengths(phases[0]["data"]) == [1] * 4 + [1, 1, 1, 2, 2] and lengths(phases[1]["data"]) == [1, 2]
    texts = [e.tokens.tobytes() for phase in phases[:2] for _, e in phase["data"]]
    assert len(set(texts)) == len(texts)  # no run comes twice, in whatever phase
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(a, b + 19, rtol=1e-6)
    facts = setting.facts("teacher_search")
    assert facts == {"phases": names, "steps": 19, "seconds": 3.0}
    assert (setting.directory("teacher_search") / "params").is_symlink()

    again = teacher.run(cfg, None, None, setting, "search")  # finished: nothing is looked at
    assert len(phases) == 3 and jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), again, made))
    shutil.copytree(setting.workdir, tmp_path / "moved", symlinks=True)  # a run may be moved
    for stage in ("teacher_search", "teacher_search_3_grpo"):
        assert main.main(["export", str(tmp_path / "moved"), str(tmp_path / f"hf_{stage}"), "--stage", stage]) == 0
    a, b = (hf.load(tmp_path / f"hf_{stage}")[0] for stage in ("teacher_search", "teacher_search_3_grpo"))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))


def test_a_killed_recipe_goes_on_with_the_phase_it_was_in(setting, data, phases, monkeypatch):
    cfg, marking = recipes.sft_then_grpo(RUNS, SFT, GRPO, SOURCES), grpo.run
    monkeypatch.setattr(grpo, "run", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.run(cfg, setting.init_params(), data, setting, "search")
    assert setting.finished("teacher_search") is None
    monkeypatch.setattr(grpo, "run", marking)
    teacher.run(cfg, setting.init_params(), data, setting, "search")
    assert [phase["stage"] for phase in phases] == ["teacher_search_1_sft", "teacher_search_2_grpo"]
    assert json.loads((setting.directory("teacher_search") / "done.json").read_text())["steps"] == 12


def test_a_recipe_of_one_phase_is_the_teachers_own_stage(setting, data, phases):
    teacher.run(TeacherConfig((SftPhase(RUNS, SFT),)), setting.init_params(), data, setting, "tool_calling")
    assert [phase["stage"] for phase in phases] == ["teacher_tool_calling"] and setting.facts("teacher_tool_calling")["steps"] == 7
    with pytest.raises(ConfigError, match="no runs to train on"):
        teacher.run(TeacherConfig((SftPhase((), SFT, own=False),)), {}, data, setting, "search")


def test_runs_of_several_families_take_no_seed_twice(tokenizer):
    both = (Runs({1: 2, 2: 3}), Runs({1: 2}, Search(degree=2)))
    found = experts.examples(Search(), 1, both, "sft", 0, tokenizer, False)
    assert [steps for steps, _ in found] == [1, 1, 2, 2, 2, 1, 1] and experts.taken(both) == 5
    alone = experts.examples(Search(), 1, both[0], "sft", 0, tokenizer, False)
    for (_, a), (_, b) in zip(found, alone, strict=False):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    skipped = experts.examples(Search(degree=2), 1, Runs({1: 2}), "sft", 0, tokenizer, False, skip=3)
    for (_, a), (_, b) in zip(found[5:], skipped, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
