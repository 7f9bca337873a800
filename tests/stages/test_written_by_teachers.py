"""Runs that the teachers write: the same batches where the teacher is the student, the teachers' own where it is not."""

import dataclasses

import jax
import numpy as np
import pytest

from a1jax import optim, train
from a1jax.config import ConfigError, bind
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import distill, scoring
from a1jax.stages.distill import DistillConfig
from a1jax.stages.written_by_teachers import TeachersEngine

LIMITS = Limits(slots=3, max_turns=3, max_turn_tokens=8, max_length=80, temperature=1.0)
CFG = DistillConfig(
    steps=1, prompts=3, lengths=(1, 2), rows=3, max_length=80, k=8, optimizer=bind(optim.adamw, learning_rate=1e-3), limits=LIMITS,
    vocab_block=256,
)  # fmt: skip


@pytest.fixture()
def models(setting):
    """The student, and as many teachers that differ from it."""
    student = setting.init_params()
    noisy = [jax.tree.map(lambda p, i=i: p + 0.3 * jax.random.normal(jax.random.key(i), p.shape), student) for i in (1, 2)]
    made = [scoring.Teacher(p, setting.model, setting.tokenizer) for p in (student, *noisy)]
    return student, dict.fromkeys(setting.domains, made[0]), dict(zip(setting.domains, made[1:], strict=True))


def batch(cfg, setting, student, teachers, writer):
    scorers, _ = distill.make_scorers(cfg, teachers, setting)
    state = train.init_state(student, optim.adamw(setting.specs, 1), 0)
    return distill.OnPolicy(cfg, setting, writer, scorers).next(state)


def test_a_student_that_is_its_own_teacher_gets_the_same_batches(setting, models):
    student, itself, _ = models
    engine = Engine(setting.model, setting.tokenizer, LIMITS)
    own, counts = batch(CFG, setting, student, itself, engine)
    theirs, other = batch(CFG, setting, student, itself, TeachersEngine(itself, setting.tokenizer, LIMITS))
    for name in ("tokens", "targets", "mask", "positions", "segment_ids", "domains"):
        np.testing.assert_array_equal(getattr(theirs["batch"], name), getattr(own["batch"], name))
    np.testing.assert_array_equal(theirs["support"], own["support"])
    np.testing.assert_allclose(theirs["teacher_logits"], own["teacher_logits"], atol=1e-6)
    assert other["rollout/sampled_tokens"] == counts["rollout/sampled_tokens"] > 0


def test_every_domains_runs_are_its_own_teachers(setting, models):
    """What each teacher writes alone, wherever the other's runs stand; the log-probabilities are the writer's."""
    student, _, teachers = models
    tasks = [setting.families[d].propose(seed, 1) for d in setting.domains for seed in range(3)]
    engine = Engine(setting.model, setting.tokenizer, LIMITS)
    found, _ = TeachersEngine(teachers, setting.tokenizer, LIMITS).run(student, tasks, seed=5)
    assert [r.task_id for r in found] == [t.task_id for t in tasks]
    for index, domain in enumerate(setting.domains):
        alone, _ = engine.run(teachers[domain].params, tasks, seed=5)
        here = slice(3 * index, 3 * index + 3)
        for a, b in zip(found[here], alone[here], strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
    students, _ = engine.run(student, tasks, seed=5)
    assert any(len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(found, students, strict=True))


def test_the_stage_trains_on_them(setting, models, monkeypatch):
    student, _, teachers = models
    monkeypatch.setattr(distill, "train_stage", lambda *a: a[-1]())  # the source that it would train from
    for rollouts, kind in (("teacher", TeachersEngine), ("student", Engine)):
        source = distill.run(dataclasses.replace(CFG, rollouts=rollouts), student, teachers, setting)
        assert type(source.engine) is kind and source.cfg.rollouts == rollouts


def test_what_a_teacher_cannot_write_is_one_line(setting, models):
    with pytest.raises(ConfigError, match="mode 'sampled', an estimate from what the student wrote"):
        DistillConfig(rollouts="teacher", mode="sampled")
    with pytest.raises(ConfigError, match="replay_routes, of what the student wrote"):
        DistillConfig(rollouts="teacher", replay_routes=True, limits=Limits(record_routes=True))
    student, _, teachers = models
    stranger = {d: dataclasses.replace(t, vocab_map=object()) for d, t in teachers.items()}
    with pytest.raises(ConfigError, match="the teacher of search has another tokenizer than .*set rollouts='student'"):
        TeachersEngine(stranger, setting.tokenizer, LIMITS)
    tasks = [setting.families[d].propose(0, 1) for d in (*setting.domains, setting.domains[0])]
    with pytest.raises(ValueError, match="domain by domain"):
        TeachersEngine(teachers, setting.tokenizer, LIMITS).run(student, tasks, seed=0)
