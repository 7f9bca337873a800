"""Groups of runs: what they are worth, which are dropped and replaced, where their numbers stand in the batch, which tasks come again."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from a1jax import train
from a1jax.config import ConfigError, bind
from a1jax.data import packing
from a1jax.rollout import rewards
from a1jax.rollout.agent import Limits
from a1jax.stages import distill, experts, groups, task_pool
from a1jax.stages.grpo import GrpoConfig
from a1jax.stages.task_pool import Pool, Tasks
from a1jax.types import ABORTED, FAILED, FINISHED, TRUNCATED, Rollout, Trajectory

LIMITS = Limits(slots=4, max_turns=1, max_turn_tokens=8, max_length=32)
CFG = GrpoConfig(steps=4, prompts=2, samples=4, sources=(experts.Prompts((1,)),), rows=4, max_length=32, limits=LIMITS)


def run(task, status, rubrics=None, n=8):
    """A run of n tokens, the last half written by the model; token i of run has log-probability -i."""
    metadata = {} if rubrics is None else {"rubrics": list(rubrics)}
    reward = float(status == FINISHED)
    trajectory = Trajectory(
        task.domain, task.task_id, ({"role": "user", "content": "step"},), reward=reward, status=status, metadata=metadata
    )
    sampled = np.r_[np.zeros(n // 2), np.ones(n - n // 2)].astype(np.float32)
    return Rollout(task.task_id, task.domain, np.arange(n, dtype=np.int32), sampled, -np.arange(n) * sampled, status, reward, 1, trajectory)


class Script:
    """An engine whose runs of a task are what ``of(task)`` says, in turn."""

    def __init__(self, of):
        self.of, self.asked, self.seeds = of, [], []

    def run(self, params, tasks, seed, on_done=None):
        self.asked.append([task.task_id for task in tasks])
        self.seeds.append(seed)
        seen, out = {}, []
        for task in tasks:
            at = seen[task.task_id] = seen.get(task.task_id, -1) + 1
            out.append(run(task, *self.of(task)[at % len(self.of(task))]))
        return out, {"decode_steps": 10, "slot_steps": 8, "idle_share": 0.2, "sampled_tokens": 4, "engine_seconds": 1.0}


MIXED = [(FINISHED, (1, 1)), (FAILED, (1, 0)), (FAILED, (0, 0)), (FAILED, (0, 0))]


def number(task):
    return int(task.task_id.rpartition("-")[2])


@pytest.fixture()
def source(setting, guess):
    """source(engine, cfg, **of Tasks): what ``grpo.run`` trains on."""

    def make(engine, cfg=CFG, **more):
        tasks = Tasks(guess(), cfg.sources, 0, 0, **more)
        return groups.Reinforced(cfg, setting, engine, tasks, 0, lambda params, batch: {})

    return make


@pytest.fixture()
def state():
    return train.TrainState(np.int32(0), {}, (), None)


def judged(cfg, guess, *statuses):
    """One group of the given (status, rubrics)."""
    task = guess().propose(1, 1)
    return groups.judge(dataclasses.replace(cfg, samples=len(statuses)), [task], [run(task, *s) for s in statuses])


def test_group_advantages_leave_out_what_was_interrupted(guess):
    found = judged(CFG, guess, (FINISHED,), (FAILED,), (FAILED,), (ABORTED,))
    # mean 1/3, deviation sqrt(2)/3 of the three that count
    np.testing.assert_allclose(found.advantages, [[2 / 2**0.5, -1 / 2**0.5, -1 / 2**0.5, 0]], rtol=1e-5)
    assert (
        found.runs[0].trajectory.metadata["reward_parts"] == {"correctness": 1.0} and found.runs[0].trajectory.metadata["advantage"] > 1.4
    )
    assert found.kept.tolist() == [True] and found.looked.tolist() == [[True, True, True, False]] and found.rewards[3] is None
    plain = judged(dataclasses.replace(CFG, deviation=False), guess, (FINISHED,), (FAILED,), (FAILED,), (ABORTED,))
    np.testing.assert_allclose(plain.advantages, [[2 / 3, -1 / 3, -1 / 3, 0]], rtol=1e-5)


def test_equal_groups_are_dropped_only_where_asked(guess):
    same = [(FAILED,), (FAILED,), (ABORTED,), (TRUNCATED,)]
    assert not judged(CFG, guess, *same).kept[0] and not judged(CFG, guess, *[(ABORTED,)] * 2).kept[0]
    kept = judged(dataclasses.replace(CFG, drop_equal=False), guess, *same)
    assert kept.kept[0] and not kept.advantages.any()


def test_a_truncated_run_counts_in_its_group_and_is_learnt_from_only_where_kept(guess):
    statuses = [(FINISHED,), (TRUNCATED,)]
    for overlong, looked in (("keep", [True, True]), ("mask", [True, False])):
        found = judged(dataclasses.replace(CFG, overlong=overlong), guess, *statuses)
        assert found.looked[0].tolist() == looked
        np.testing.assert_allclose(found.advantages, [[1, -1]], rtol=1e-5)


def test_papo_grades_failures_by_their_process(guess):
    cfg = dataclasses.replace(CFG, advantage="papo")
    found = judged(cfg, guess, (FINISHED, (1, 1)), (FAILED, (1, 0)), (FAILED, (0, 0)), (FAILED, (0, 0)))
    # outcome: mean 1/4, deviation sqrt(3)/4; process of the failures 1/2, 0, 0: mean 1/6, deviation sqrt(2)/6; half of it is added
    outcome, process = np.array([3, -1, -1, -1]) / 3**0.5, np.array([0, 2, -1, -1]) / 2**0.5
    np.testing.assert_allclose(found.advantages[0], outcome + 0.5 * process, rtol=1e-4)
    failures = judged(cfg, guess, (FAILED, (1, 0)), (FAILED, (0, 0)))  # nobody was right, yet one came nearer
    assert failures.kept[0]
    np.testing.assert_allclose(failures.advantages, [[0.5, -0.5]], rtol=1e-5)
    assert not judged(CFG, guess, (FAILED, (1, 0)), (FAILED, (0, 0))).kept[0]
    assert not judged(cfg, guess, (FINISHED, (1, 1)), (FINISHED, (1, 0))).kept[0]  # a success is never graded by its process
    cut = judged(cfg, guess, (FAILED, (1, 0)), (TRUNCATED,))  # nobody judged the second: its task is asked now
    np.testing.assert_allclose(cut.advantages, [[0.5, -0.5]], rtol=1e-5)
    with pytest.raises(ConfigError, match="rewards of 0 or 1"):
        judged(dataclasses.replace(cfg, reward=bind(rewards.rubric_reward)), guess, (FAILED, (1, 0)), (FAILED, (0, 0)))


def test_rewards_may_count_rubrics(guess):
    cfg = dataclasses.replace(CFG, reward=bind(rewards.rubric_reward, coefficient=0.4))
    found = judged(cfg, guess, (FINISHED, (1, 1)), (FAILED, (1, 0)), (TRUNCATED,))
    assert [reward.total for reward in found.rewards] == [1.4, 0.2, 0.0]
    with pytest.raises(ConfigError, match="must be a number"):
        judged(dataclasses.replace(CFG, reward=bind(not_a_number)), guess, (FAILED,), (FAILED,))


def test_any_reward_may_read_rubrics_of_any_run(guess):
    found = judged(dataclasses.replace(CFG, reward=bind(half_of_what_was_met)), guess, (FINISHED, (1, 1)), (TRUNCATED,), (ABORTED,))
    assert [reward and reward.total for reward in found.rewards] == [0.5, 0.0, None]
    assert [run.trajectory.metadata.get("rubrics") for run in found.runs] == [[1, 1], [False, False], None]


def half_of_what_was_met(trajectory):
    return rewards.Reward(0.5 * rewards.rubric_fraction(trajectory.metadata["rubrics"]), {})


def not_a_number(trajectory):
    return rewards.Reward(float("nan"), {})


def test_numbers_stand_where_their_token_is_predicted(guess):
    task = guess().propose(1, 1)
    runs = (run(task, FAILED, n=6), run(task, FAILED, n=4))
    batch = packing.to_batch([[packing.Example(r.tokens, r.sampled) for r in runs]], 12)
    got = groups.per_token(batch, runs, (0, 0), (0, 6), [r.logp for r in runs])
    np.testing.assert_array_equal(got, [[0, 0, -3, -4, -5, 0, 0, -2, -3, 0, 0, 0]])
    np.testing.assert_array_equal(got[batch.mask > 0], -batch.targets[batch.mask > 0])
    np.testing.assert_array_equal(groups.per_token(batch, runs, (0, 0), (0, 6), [2.0, 5.0]), [[0, 0, 2, 2, 2, 0, 0, 5, 5, 0, 0, 0]])


def test_dropped_groups_are_replaced_by_further_prompts_and_contribute_nothing(source, state, caplog):
    first = number(Tasks(source(None).tasks.family, CFG.sources, 0, 0).take(0, 1)[0])
    engine = Script(lambda task: [(FAILED, (0, 0))] if number(task) < first + 1 else MIXED)
    made = source(engine)
    data, out = made.next(state)
    assert [len(asked) for asked in engine.asked] == [8, 4] and len(set(engine.seeds)) == 2
    assert made.drawn == 3 and not set(engine.asked[1]) & set(engine.asked[0])
    assert (out["grpo/groups"], out["grpo/dropped_groups"], out["grpo/refills"]) == (2, 1, 1)
    assert out["grpo/reward"] == out["grpo/success"] == out["grpo/reward/correctness"] == pytest.approx(2 / 12)
    assert out["rollout/decode_steps"] == 20 and out["rollout/left_out"] == 0
    assert data["batch"].mask.sum() == 8 * 4  # four written tokens of each of the eight runs kept
    gains = np.asarray(data["advantages"])[np.asarray(data["batch"].mask) > 0]
    np.testing.assert_allclose(np.sort(gains), [-1 / 3**0.5] * 24 + [3**0.5] * 8, rtol=1e-5)
    nothing = source(Script(lambda task: [(FAILED, (0, 0))]), dataclasses.replace(CFG, refills=2))
    data, out = nothing.next(state)
    assert "step 1 changes nothing: in none of 6 groups" in caplog.text
    assert data is None and nothing.drawn == 6 and out["grpo/groups"] == 0 and out["grpo/dropped_groups"] == 6


def test_runs_that_find_no_room_are_counted_and_take_their_group_along(source, state):
    data, out = source(Script(lambda task: MIXED), dataclasses.replace(CFG, rows=1)).next(state)
    assert out["rollout/left_out"] == 4 and data["batch"].tokens.shape == (1, 32) and data["batch"].mask.sum() == 4 * 4
    first = number(Tasks(source(None).tasks.family, CFG.sources, 0, 0).take(0, 1)[0])
    short, long = ([(status, rubrics, n) for status, rubrics in MIXED] for n in (6, 10))
    made = source(Script(lambda task: short if number(task) == first else long), dataclasses.replace(CFG, rows=2))
    data, out = made.next(state)  # three long runs fill a row but for two places: with both groups the last short run has no room
    gains, looked = np.asarray(data["advantages"]), np.asarray(data["batch"].mask) > 0
    assert out["rollout/left_out"] == 4 and looked.sum() == 4 * 3
    np.testing.assert_allclose(gains[looked].sum(), 0, atol=1e-5)


def test_groups_find_room_in_their_order_and_whole():
    assert packing.fitting([[6] * 4, [10] * 4, [2]], 2, 32) == 1 and packing.fitting([[6] * 4, [10] * 4, [2]], 3, 32) == 3
    assert packing.fitting([[10] * 4], 1, 32) == 1 and packing.fitting([], 1, 32) == 0  # what is too large by itself is cut after all


def test_a_source_goes_on_where_it_was(source, state):
    """What is saved is what was drawn: dropped groups and refills make that another number than the step's."""
    of = Script(lambda task: MIXED if number(task) % 3 else [(FAILED, (0, 0))])
    whole = source(of)
    for _ in range(3):
        whole.next(state)
    saved = whole.get_state()
    expected = whole.next(state.replace(step=np.int32(3)))[0]
    resumed = source(of)
    resumed.set_state(json.loads(json.dumps(saved)))
    got = resumed.next(state.replace(step=np.int32(3)))[0]
    assert saved["drawn"] > 6
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_no_stage_samples_with_the_numbers_of_another(source, setting, state, guess, tmp_path):
    seeds = {}
    for stage in ("teacher_search_1_grpo", "teacher_search_2_grpo"):
        for step in (0, 1):
            made = source(Script(lambda task: MIXED))
            made.stage = stage
            made.next(state.replace(step=np.int32(step)))
            seeds[stage, step] = made.engine.seeds
        tries = Script(lambda task: [(FINISHED,), (FAILED,)])
        tasks = Tasks(guess(), CFG.sources, 0, 0)
        task_pool.choose(Pool(candidates=2, select="mixed", tries=2), tasks, tries, {}, tmp_path / f"{stage}.json", stage)
        seeds[stage, "tries"] = tries.seeds
        asked = []
        engine = SimpleNamespace(run=lambda params, tasks, seed, asked=asked: asked.append(seed) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill.OnPolicy(distill.DistillConfig(lengths=(1,), prompts=1), setting, engine, {}, stage).next(state)
        seeds[stage, "distill"] = asked
    assert [len(found) for found in seeds.values()] == [1] * 8
    assert len({seed for found in seeds.values() for seed in found}) == 6  # of one name a stage is either GRPO or distillation
    assert all(seeds[stage, "distill"] == seeds[stage, 0] for stage, _ in seeds)


def test_a_pool_is_reused_in_epochs_and_fresh_tasks_never_come_again(source, state):
    pool = source(Script(lambda task: MIXED), places=(4, 7, 9))
    ids = [task.task_id for task in pool.tasks.take(0, 12)]
    assert all(ids.count(one) == 4 for one in set(ids)) and len(set(ids)) == 3
    assert all(len(set(ids[i : i + 3])) == 3 for i in range(0, 12, 3)) and len({tuple(ids[i : i + 3]) for i in range(0, 12, 3)}) > 1
    assert [t.task_id for n in range(12) for t in pool.tasks.take(n, 1)] == ids  # in whatever portions
    for _ in range(3):
        out = pool.next(state)[1]
    assert out["grpo/runs_per_task"] == 3 * 2 * 4 / 3  # rounds x batch x samples / tasks
    fresh = source(None).tasks
    assert len({t.task_id for t in fresh.take(0, 50)}) == 50
    other = dataclasses.replace(fresh, lane=1)
    assert not {t.task_id for t in other.take(0, 50)} & {t.task_id for t in fresh.take(0, 50)}


def test_sources_and_lengths_come_in_equal_shares(guess):
    sources = (experts.Prompts((1, 2)), experts.Prompts((3,), guess(answer="4")))
    found = Tasks(guess(), sources, 0, 0).take(0, 12)
    assert sorted(t.steps for t in found) == [1] * 3 + [2] * 3 + [3] * 6
    assert all((t.answer == "4") == (t.steps == 3) for t in found)


def choose(pool, of, guess, path):
    engine = Script(of)
    return task_pool.choose(pool, Tasks(guess(), CFG.sources, 0, 0), engine, {}, path / "pool.json", "teacher"), engine


def test_a_pool_keeps_what_the_starting_model_both_solved_and_missed(guess, tmp_path):
    first = number(Tasks(guess(), CFG.sources, 0, 0).take(0, 1)[0])
    kinds = {
        0: [(FINISHED,)],  # always
        1: [(FAILED,)],  # never
        2: [(FINISHED,), (FAILED,)],  # now and then
        3: [(ABORTED,), (FINISHED,)],  # an interrupted try is no miss
        4: [(ABORTED,)],  # nothing is known
        5: [(FAILED,), (ABORTED,), (FINISHED,)],
    }
    pool = Pool(candidates=6, select="mixed", tries=3)
    tasks, engine = choose(pool, lambda task: kinds[number(task) - first], guess, tmp_path)
    assert tasks.places == (2, 5) and len(engine.asked[0]) == 18
    assert json.loads((tmp_path / "pool.json").read_text())["success_of_all"] == pytest.approx((3 + 0 + 2 + 3 + 1) / 15, abs=0.07)
    again, engine = choose(pool, lambda task: [(FAILED,)], guess, tmp_path)
    assert again == tasks and engine.asked == []  # the choice was kept


def test_a_pool_of_near_misses_and_one_of_all(guess, tmp_path):
    first = number(Tasks(guess(), CFG.sources, 0, 0).take(0, 1)[0])
    kinds = {0: [(FAILED, (0, 0))], 1: [(FAILED, (1, 0))], 2: [(FINISHED, (1, 1))], 3: [(FAILED, (1, 0))]}
    pool = Pool(candidates=4, select="near_misses", tries=2, size=2)
    assert choose(pool, lambda task: kinds[number(task) - first], guess, tmp_path)[0].places == (1, 3)
    tasks, engine = choose(Pool(candidates=5, size=3), None, guess, tmp_path / "all")
    assert tasks.places == (0, 1, 2) and engine.asked == []
    with pytest.raises(ConfigError, match="none of 4 candidates is selected by 'mixed'"):
        choose(Pool(candidates=4, select="mixed"), lambda task: [(FAILED,)], guess, tmp_path / "none")


REFUSED = (
    {"samples": 1},
    {"rows": 3, "microbatches": 2},
    {"max_length": 16},
    {"sources": ()},
    {"steps": 50_001},  # of 2 prompts: more fresh tasks than a lane has
    {"replay_routes": True},
    {"limits": dataclasses.replace(LIMITS, temperature=0.0)},
)


@pytest.mark.parametrize("changes", REFUSED)
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ConfigError, match="GrpoConfig"):
        dataclasses.replace(CFG, **changes)
    assert dataclasses.replace(CFG, steps=50_000) and dataclasses.replace(CFG, steps=50_001, pool=Pool(candidates=9))
    with pytest.raises(ConfigError, match="say how many"):
        Pool(candidates=3, select="near_misses")
    with pytest.raises(ConfigError, match="at least twice"):
        Pool(candidates=3, select="mixed", tries=1)
    for lengths in ((), (2, 0)):
        with pytest.raises(ConfigError, match="Prompts.lengths"):
            experts.Prompts(lengths)
