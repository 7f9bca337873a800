"""A judge in the verifier's place: whom it is asked about, what its verdicts change, what refuses it, and an endpoint that goes down."""

import dataclasses
import pathlib
import threading

import numpy as np
import pytest

from a1jax import config
from a1jax.config import ConfigError, bind
from a1jax.domains import DOMAINS, base
from a1jax.rollout.judges import JudgeError, Verdict, by_rules, exact_match, number_match
from a1jax.rollout.remote_judge import RemoteJudge
from a1jax.stages import evaluate, experts, groups, task_pool, verdicts
from a1jax.stages.grpo import GrpoConfig
from a1jax.types import ABORTED, FAILED, FINISHED, TRUNCATED, Rollout, Trajectory
from tests.rollout.judge_endpoint import says

ROOT = pathlib.Path(__file__).resolve().parents[2]
CFG = GrpoConfig(prompts=1, samples=4)
NONE = np.zeros(2, np.float32)


def answered(task, answer, status=None):
    """A run of the task that ended with an answer and was verified, or one of another status."""
    turns = () if answer is None else ({"role": "assistant", "content": answer},)
    bare = Trajectory(task.domain, task.task_id, (*task.messages(), *turns), reward=0.0, status=status)
    found = base.judge(task, bare) if status is None else bare
    return Rollout(task.task_id, task.domain, NONE.astype(np.int32), NONE, NONE, found.status, found.reward, 1, found)


def asking(case, *, seen: list, right: str = "4"):
    seen.append(case)
    return Verdict((case.answer == right,), f"{right} is wanted")


def asked_of(task, runs, right="4"):
    """The runs after a judge that wants another answer than the task does, and what it was asked."""
    seen = []
    return verdicts.by_judge(bind(asking, seen=seen, right=right), [task] * len(runs), runs), seen


def test_whom_a_judge_is_asked_about_and_what_it_changes(guess):
    task = guess().propose(1, 1)
    statuses = [(None, ABORTED), ("4", TRUNCATED), ("4", None), ("3", None), (None, TRUNCATED), ("4", None)]
    runs = [answered(task, *s) for s in statuses]
    assert [run.reward for run in runs] == [0, 0, 0, 1, 0, 0]
    found, seen = asked_of(task, runs)
    assert sorted((case.question, case.answer, case.expected, case.rubrics) for case in seen) == [("step", a, "3", ()) for a in ("3", "4")]
    assert [run.status for run in found] == [ABORTED, TRUNCATED, FINISHED, FAILED, TRUNCATED, FINISHED]
    assert [run.reward for run in found] == [0, 0, 1, 0, 0, 1]
    assert [found[i] is runs[i] for i in range(6)] == [True, True, False, False, True, False]
    for run, before in zip(found, runs, strict=True):
        assert (run.trajectory.reward, run.trajectory.status) == (run.reward, run.status)
        assert run.trajectory.messages == before.trajectory.messages and run.trajectory.metadata == before.trajectory.metadata
    assert [r.outcome for r in found[2].trajectory.records] == ["wrong", "judge: 4 is wanted"]  # the verifier's word stays
    assert verdicts.by_judge(None, [task] * 6, runs) == runs


@pytest.mark.parametrize("name", ["search", "science"])
def test_a_right_answer_whose_evidence_was_never_read_stays_refused(name):
    task = DOMAINS[name].propose(1, 2)
    read, unread = base.solve(task), answered(task, task.answer)
    assert unread.status == FAILED and read.status == FINISHED
    whole = dataclasses.replace(unread, trajectory=read, status=read.status, reward=read.reward)
    found, seen = asked_of(task, [unread, whole], right=task.answer)
    assert len(seen) == 1 and [(run.status, run.reward) for run in found] == [(FAILED, 0.0), (FINISHED, 1.0)]
    assert found[0].trajectory.records[-1].outcome.startswith(f"judge: {task.answer} is wanted; the verifier: ")


def test_verdicts_are_the_correctness_that_groups_are_made_of(guess):
    task = guess().propose(1, 1)
    runs = [answered(task, text) for text in ("4", "3", "2", "1")]
    plain = groups.judge(CFG, [task], runs)
    other = groups.judge(dataclasses.replace(CFG, judge=bind(asking, seen=[])), [task], runs)
    np.testing.assert_allclose(plain.advantages[0], np.array([-1, 3, -1, -1]) / 3**0.5, rtol=1e-5)
    np.testing.assert_allclose(other.advantages[0], np.array([3, -1, -1, -1]) / 3**0.5, rtol=1e-5)
    assert [run.status for run in other.runs] == [FINISHED, FAILED, FAILED, FAILED]
    assert [reward.parts["correctness"] for reward in other.rewards] == [1, 0, 0, 0]


@pytest.mark.parametrize("wanted", ["3", "12.5"])
def test_exact_match_is_the_verdict_of_a_task_that_compares_texts(guess, wanted):
    task = guess(answer=wanted).propose(1, 1)
    runs = [answered(task, text) for text in (wanted, "1", f"{wanted} {wanted}", "", "?", "-3")] + [answered(task, None, TRUNCATED)]
    cfg = dataclasses.replace(CFG, samples=len(runs))
    plain, judged = (groups.judge(dataclasses.replace(cfg, judge=judge), [task], runs) for judge in (None, bind(exact_match)))
    assert [(run.status, run.reward) for run in judged.runs] == [(run.status, run.reward) for run in plain.runs]
    np.testing.assert_array_equal(judged.advantages, plain.advantages)
    assert judged.rewards == plain.rewards and judged.kept.tolist() == plain.kept.tolist() == [True]


class Recorded:
    """An engine that gives the runs it was told, whatever it is asked."""

    def __init__(self, of):
        self.of = of

    def run(self, params, tasks, seed, on_done=None):
        return [self.of(i, task) for i, task in enumerate(tasks)], {}


def test_pools_are_chosen_by_the_judges_verdicts(guess, tmp_path):
    """Tries that say 3 and 1 are mixed for the tasks' verifier; for a judge that wants 1 those are that say 1 and 2."""
    texts = ("3", "1", "3", "3", "1", "2")
    engine = Recorded(lambda i, task: answered(task, texts[i]))
    tasks = task_pool.Tasks(guess(), CFG.sources, 0, 0)
    pool = task_pool.Pool(candidates=3, select="mixed", tries=2)
    judge = bind(asking, seen=[], right="1")
    assert task_pool.choose(pool, tasks, engine, {}, tmp_path / "plain.json", "t").places == (0,)
    assert task_pool.choose(pool, tasks, engine, {}, tmp_path / "judged.json", "t", judge).places == (0, 2)


def test_an_evaluation_counts_by_its_judge_but_where_more_than_the_answer_decides(guess, tmp_path):
    families = {"search": guess(), "tool_calling": DOMAINS["tool_calling"]}
    engine = Recorded(lambda i, task: answered(task, "4" if task.domain == "search" else task.answer))
    cfg = evaluate.Evaluation({1: 3}, judge=bind(asking, seen=[]))
    path = tmp_path / "judged.json"
    found = evaluate.run(cfg, {}, engine, families, "judged", path)
    assert {d: found[d]["success"] for d in found} == {"search": 1.0, "tool_calling": 0.0}  # "done", and nothing was
    assert evaluate.score_again(evaluate.runs_of(path))["search"]["success"] == 1.0
    plain = evaluate.run(dataclasses.replace(cfg, judge=None), {}, engine, families, "plain", tmp_path / "plain.json")
    assert plain["search"]["success"] == 0.0


def test_a_judge_of_answers_is_refused_where_the_answer_does_not_decide():
    for name, decides in {"search": True, "science": True, "general": False, "engineering": False}.items():
        task = DOMAINS[name].propose(1, 1)
        assert task.answer_decides is decides
        verdicts.check(None, [task])
        if decides:
            verdicts.check(bind(exact_match), [task])
        else:
            with pytest.raises(ConfigError, match=f"GrpoConfig.judge: a task of {name} .* leave judge = None"):
                verdicts.check(bind(exact_match), [task])
    assert not any(DOMAINS[name].propose(1, 1).answer_decides for name in ("instruction_following", "tool_calling"))


def test_an_experiment_refuses_it_before_anything_is_trained():
    cfg = config.load(f"{ROOT}/experiments/six_domains.py")
    judged = [GrpoConfig(judge=bind(exact_match))]
    recipes = {d: dataclasses.replace(cfg.teachers[d], recipe=(*cfg.teachers[d].recipe, *judged)) for d in ("science", "general")}
    dataclasses.replace(cfg, teachers={**cfg.teachers, "science": recipes["science"]})
    with pytest.raises(ConfigError, match="GrpoConfig.judge: a task of general"):
        dataclasses.replace(cfg, teachers={**cfg.teachers, **recipes})


REMOTE = bind(RemoteJudge, base_url="http://localhost:1/v1", model="grader")


def test_a_judge_in_a_config_is_saved_loaded_overridden_and_checked(tmp_path):
    cfg = dataclasses.replace(config.load(f"{ROOT}/experiments/quickstart.py"), evaluation=evaluate.Evaluation({1: 1}, judge=REMOTE))
    cfg = config.override(cfg, ["evaluation.judge.timeout=5", "evaluation.judge.model=other"])
    config.check(cfg)
    assert cfg.evaluation.judge() == RemoteJudge("http://localhost:1/v1", "other", timeout=5)
    config.save(cfg, tmp_path / "config.py")
    assert config.load(str(tmp_path / "config.py")) == cfg
    for make in (GrpoConfig, lambda judge: evaluate.Evaluation({1: 1}, judge=judge)):
        assert make(judge=REMOTE).judge == REMOTE
        with pytest.raises(ConfigError, match="bind what RemoteJudge needs: .*'model'"):
            make(judge=bind(RemoteJudge, base_url="http://x"))
        with pytest.raises(ConfigError, match="base_url 'x' must start with http"):
            make(judge=bind(RemoteJudge, base_url="x", model="m"))
        with pytest.raises(ConfigError, match="bind what by_rules needs: .*'rules'"):
            make(judge=bind(by_rules))


def remote(server, **more):
    return bind(RemoteJudge, base_url=server.url, model="grader", **{"timeout": 5.0, "retries": 1, "backoff": 0.0, **more})


def test_an_endpoint_is_asked_for_a_batch_at_once(guess, server):
    """No answer comes before four are waited for."""
    together = threading.Barrier(4, timeout=5)

    def of(handler):
        together.wait()
        return says(handler.body["messages"][1]["content"].find('"answer": "4"') > 0)

    server.answers = [of]
    tasks = experts.drawn(guess(), CFG.sources, range(2), 0)
    runs = [answered(task, text) for task in tasks for text in ("1", "2", "3", "4")]
    found = groups.judge(dataclasses.replace(CFG, judge=remote(server)), tasks, runs)
    np.testing.assert_allclose(found.advantages, np.array([[-1, -1, -1, 3]] * 2) / 3**0.5, rtol=1e-5)
    assert len(server.seen) == 4  # both tasks ask the same: equal cases are asked about once


def test_what_gives_no_verdict_is_one_line_of_a_judge(guess, server):
    task = guess(answer="three").propose(1, 1)
    server.answers = [(503, b"down", {})]
    with pytest.raises(JudgeError, match="no verdict in 2 tries; the last: HTTP 503 Service Unavailable: down"):
        verdicts.by_judge(remote(server), [task], [answered(task, "3")])
    with pytest.raises(JudgeError, match="the reference answer 'three' has no number"):
        verdicts.by_judge(bind(number_match), [task], [answered(task, "3")])
