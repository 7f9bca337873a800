"""Reinforcement as a stage: its loss by the formula, what must not change it, going on after a kill, and that a bandit is learnt."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import checkpoint, metrics, optim, train
from a1jax.config import ConfigError, bind
from a1jax.data import packing
from a1jax.domains.base import final_answer
from a1jax.models import transformer
from a1jax.rollout.agent import Engine, Limits
from a1jax.rollout.judges import JudgeError, exact_match
from a1jax.rollout.remote_judge import RemoteJudge
from a1jax.stages import experts, groups, grpo, kept_runs
from a1jax.stages.grpo import GrpoConfig, Objective
from a1jax.stages.setting import MeshConfig, Setting, make_mesh
from a1jax.stages.task_pool import Pool
from a1jax.types import FINISHED, TRUNCATED
from tests.rollout.judge_endpoint import says

LENGTH, ROWS, BLOCK = 48, 8, 256
LIMITS = Limits(slots=32, max_turns=1, max_turn_tokens=8, max_length=LENGTH, temperature=1.0)
ADAM = bind(optim.adamw, learning_rate=0.01, warmup=0.0, final=1.0, weight_decay=0.0)
CFG = GrpoConfig(
    steps=5,
    prompts=4,
    samples=8,
    sources=(experts.Prompts((1,)),),
    rows=ROWS,
    max_length=LENGTH,
    limits=LIMITS,
    optimizer=ADAM,
    vocab_block=BLOCK,
    save_every=2,
)


@pytest.fixture(scope="module")
def stage(tokenizer, small_model, guess, tmp_path_factory):
    """A setting of the bandit, and a model that says 1 to 4 alike.

    It learns that by the stage's own update: where every token has advantage 1 and ratio 1, that is cross-entropy on what is given."""
    shape = {"num_layers": 1, "full_attention_interval": 1}
    model = dataclasses.replace(small_model, load_balance_coef=0.0, **shape)  # the router's loss is a mean per slice by nature
    folder = tmp_path_factory.mktemp("grpo")
    with metrics.Writer(folder) as writer:
        setting = Setting(model, tokenizer, ("search",), None, folder, writer, 0, families={"search": guess()})
        examples = [e for _, e in experts.examples(guess(), 0, experts.Runs({1: 32}), "sft", 0, tokenizer, False)]
        batch = jax.tree.map(jnp.asarray, packing.to_batch(packing.pack_rows(examples, ROWS, LENGTH), LENGTH))
        logp, state = score(model), train.init_state(setting.init_params(), ADAM(setting.specs, 1), 0)
        for _ in range(80):
            now = logp(state.params, batch)
            state, _ = update(model)(state, {"batch": batch, "advantages": batch.mask, "rollout_logp": now, "ref_logp": now})
        yield setting, state.params


def update(model, microbatches=1):
    return grpo.jitted_step(model, Objective(), BLOCK, 1.0, microbatches, optim.program(ADAM, 1))


def score(model, microbatches=1):
    return grpo.jitted_logp(model, BLOCK, 1.0, microbatches)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def lines(setting, name):
    return [line for line in metrics.read(setting.workdir) if line["stage"] == name]


def test_a_bandit_is_learnt(stage):
    setting, start = stage
    grpo.run(dataclasses.replace(CFG, steps=25, save_every=25), start, setting, "search", "learnt")
    found = lines(setting, "learnt")
    success = [line["grpo/success"] for line in found]
    assert len(found) == 25 and np.mean(success[:2]) < 0.5 and np.mean(success[-5:]) > 0.9
    assert abs(found[0]["grpo/kl"]) < 1e-9 < 1e-3 < max(line.get("grpo/kl", 0) for line in found)  # the reference is what it began with
    assert abs(found[0]["grpo/ratio"] - 1) < 1e-5 and found[0]["grpo/old_kl"] < 1e-9  # one forward samples, another trains
    assert all(line["grpo/success"] == pytest.approx(line["grpo/reward"]) for line in found)
    assert any(line["grpo/dropped_groups"] > 0 for line in found) and any(line["grpo/refills"] > 0 for line in found)
    names = {"grpo/reward/correctness", "grpo/entropy", "grpo/clipped_low", "grpo/clipped_high", "rollout/finished", "router/load"}
    assert names <= set(found[0])


def test_a_killed_stage_goes_on_bitwise(stage, monkeypatch, elsewhere):
    (setting, start), here = stage, elsewhere(stage[0], "killed")
    cfg = dataclasses.replace(CFG, pool=Pool(candidates=3), refills=2)
    whole = grpo.run(cfg, start, setting, "search", "whole")
    assert not same(whole, start)
    original = groups.Reinforced.next

    def interrupted(self, state):
        if int(state.step) == 3:
            raise KeyboardInterrupt
        return original(self, state)

    monkeypatch.setattr(groups.Reinforced, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grpo.run(cfg, start, here, "search", "whole")
    monkeypatch.undo()
    assert same(grpo.run(cfg, start, here, "search", "whole"), whole)
    kept = [[(x["step"], x["loss"], x["grpo/runs_per_task"]) for x in lines(where, "whole")] for where in (setting, here)]
    assert kept[0] == kept[1] and len(kept[0]) == 5


def judged_by(server, **more):
    """One that wants a 4, whatever the task's own verifier wants."""
    server.answers = [lambda handler: says(json.loads(handler.body["messages"][1]["content"])["answer"] == "4")]
    judge = bind(RemoteJudge, base_url=server.url, model="grader", retries=1, backoff=0.0, timeout=5.0)
    return dataclasses.replace(CFG, judge=judge, **more)


def test_verdicts_of_an_endpoint_are_what_is_learnt(stage, server):
    setting, start = stage
    after = grpo.run(judged_by(server, steps=8, save_every=8), start, setting, "search", "judged")
    (file,) = (setting.workdir / "rollouts/judged").iterdir()
    for run in kept_runs.read(file):
        answer = final_answer(run)
        right = run.status == FINISHED
        assert right == (answer == "4") == (run.metadata["advantage"] > 0) and run.metadata["reward_parts"] == {"correctness": float(right)}
        assert run.status == TRUNCATED or [r.outcome for r in run.records] == ["right" if answer == "3" else "wrong", "judge: so"]
    found = [line["grpo/success"] for line in lines(setting, "judged")]
    assert found[0] < 0.5 < found[-1] and server.seen
    runs, _ = Engine(setting.model, setting.tokenizer, LIMITS).run(after, [setting.families["search"].propose(1, 1)] * 32, seed=1)
    said = [final_answer(run.trajectory) for run in runs]
    assert said.count("4") > said.count("3")


def test_an_exact_match_judge_changes_nothing_where_texts_are_compared(stage, elsewhere):
    (setting, start), there = stage, elsewhere(stage[0], "matched")
    cfg = dataclasses.replace(CFG, steps=2)
    plain = grpo.run(cfg, start, setting, "search", "verified")
    assert not same(plain, start)
    assert same(grpo.run(dataclasses.replace(cfg, judge=bind(exact_match)), start, there, "search", "verified"), plain)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_judge_that_goes_down_ends_the_run_in_one_line_and_it_goes_on(stage, server, monkeypatch, elsewhere, at):
    setting, start = stage
    here = elsewhere(setting, f"down_{at}")
    cfg, original, name = judged_by(server), groups.Reinforced.next, "judged_down"
    sound = server.answers

    def down(self, state):
        server.answers = [(503, b"out", {})] if int(state.step) == at else sound
        return original(self, state)

    monkeypatch.setattr(groups.Reinforced, "next", down)
    with pytest.raises(JudgeError) as caught:
        grpo.run(cfg, start, here, "search", name)
    monkeypatch.undo()
    saved = f"{name} is saved at step {at}" if at else f"{name} is at its beginning"
    line = f"judge {server.url}/chat/completions: no verdict in 2 tries; the last: HTTP 503 Service Unavailable: out; {saved}"
    assert str(caught.value) == f"{line}, the same command goes on from there"
    assert checkpoint.latest(here.directory(name) / "checkpoints") == (at or None)
    server.answers = sound
    after = grpo.run(cfg, start, here, "search", name)
    assert same(after, grpo.run(cfg, start, setting, "search", name))  # which is made once and then read
    assert [line["step"] for line in lines(here, name)] == [1, 2, 3, 4, 5]


def test_a_mistake_found_on_the_way_loses_no_step(stage, monkeypatch):
    (setting, start), original = stage, groups.Reinforced.next

    def mistaken(self, state):
        if int(state.step) == 3:
            raise ConfigError("GrpoConfig.reward gave nan")
        return original(self, state)

    monkeypatch.setattr(groups.Reinforced, "next", mistaken)
    with pytest.raises(ConfigError) as caught:
        grpo.run(CFG, start, setting, "search", "mistaken")
    assert str(caught.value) == "GrpoConfig.reward gave nan; mistaken is saved at step 3"
    assert checkpoint.latest(setting.directory("mistaken") / "checkpoints") == 3


def test_where_no_group_teaches_nothing_moves(stage):
    setting, start = stage
    hopeless = dataclasses.replace(setting, families={"search": type(setting.families["search"])(answer="9")})
    assert same(grpo.run(dataclasses.replace(CFG, steps=2), start, hopeless, "search", "nothing"), start)
    assert [line["grpo/dropped_groups"] for line in lines(setting, "nothing")] == [8, 8]


def test_interrupted_runs_leave_their_neighbours_alone(stage):
    setting, start = stage
    broken = dataclasses.replace(setting, families={"search": type(setting.families["search"])(broken=2)})
    grpo.run(dataclasses.replace(CFG, steps=1, refills=0, drop_equal=False), start, broken, "search", "broken")
    (line,) = lines(setting, "broken")
    assert line["grpo/groups"] >= 2 and line["grpo/tokens"] > 0
    lost = line["rollout/aborted"] * CFG.prompts * CFG.samples  # a share of all runs; each of them was begun twice
    assert 0 < lost < CFG.prompts * CFG.samples and line["rollout/interruptions"] >= (1 + LIMITS.retries) * lost
    assert 0 < line["grpo/success"] < 1


def sampled(setting, params, seed=0):
    """What an update gets: runs of the model itself, of any length, packed."""
    cfg = dataclasses.replace(CFG, drop_equal=False)
    engine = Engine(setting.model, setting.tokenizer, LIMITS)
    tasks = grpo.task_pool.Tasks(setting.families["search"], CFG.sources, seed, 0)
    source = groups.Reinforced(cfg, setting, engine, tasks, 0, grpo.Scorer(cfg, setting.model, setting.init_params()))
    return source.next(train.TrainState(jnp.int32(0), params, (), None))[0]


def noisy(params):
    """Other parameters, so that the ratio is not 1."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + 0.06 * rng.normal(size=p.shape).astype(np.float32), params)


def step_from(params, setting, data, microbatches=1):
    """What the update reports."""
    return update(setting.model, microbatches)(train.init_state(params, ADAM(setting.specs, 1), 0), data)[1]


def test_the_loss_is_the_formula_in_float64(stage):
    setting, start = stage
    data, moved = sampled(setting, start), noisy(start)
    apart = 0.4 * np.random.default_rng(2).normal(size=(ROWS, LENGTH)).astype(np.float32)  # both ends of the clip are met
    data = {**data, "rollout_logp": data["rollout_logp"] + apart * data["batch"].mask}
    out = step_from(moved, setting, data)

    batch = jax.tree.map(np.asarray, data["batch"])
    inputs = (batch.tokens, batch.positions, batch.segment_ids)
    logits = np.asarray(jax.jit(transformer.logits, static_argnums=4)(moved, *inputs, setting.model), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = -(np.exp(logp) * logp).sum(-1)
    written = np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    gain, old, reference = (np.asarray(data[name], np.float64) for name in ("advantages", "rollout_logp", "ref_logp"))
    ratio, apart = np.exp(written - old), reference - written
    policy = -np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.28) * gain)
    each = policy + 0.001 * (np.exp(apart) - 1 - apart) - 0.0001 * entropy
    runs = [(row, batch.segment_ids[row] == s) for row in range(ROWS) for s in range(1, batch.segment_ids[row].max() + 1)]
    expected = np.mean([each[row][on & (batch.mask[row] > 0)].mean() for row, on in runs])
    np.testing.assert_allclose(out["loss"], expected, rtol=1e-4)
    looked = batch.mask > 0
    np.testing.assert_allclose(out["grpo/ratio"], ratio[looked].mean(), rtol=1e-4)
    np.testing.assert_allclose(out["grpo/entropy"], entropy[looked].mean(), rtol=1e-4)
    assert out["grpo/tokens"] == looked.sum() and min(out["grpo/clipped_high"], out["grpo/clipped_low"]) > 0.05
    np.testing.assert_allclose(np.asarray(score(setting.model)(moved, data["batch"]))[looked], written[looked], atol=1e-4)


def test_neither_packing_nor_micro_batches_change_the_update(stage):
    setting, start = stage
    data, moved = sampled(setting, start), noisy(start)
    order = np.r_[3:ROWS, 0:3]  # rows in another order fall into other micro-batches
    reference = step_from(moved, setting, data)
    others = step_from(moved, setting, data, 2), step_from(moved, setting, jax.tree.map(lambda x: x[order], data), 2)
    for other in others:
        for name in ("loss", "grad_norm", "grpo/ratio", "grpo/kl", "grpo/entropy", "grpo/tokens", "grpo/clipped_low"):
            np.testing.assert_allclose(other[name], reference[name], rtol=2e-4, err_msg=name)
    whole, cut = (score(setting.model, n)(moved, data["batch"]) for n in (1, 2))
    np.testing.assert_allclose(whole, cut, atol=1e-5)


def test_several_updates_on_one_batch_of_rollouts(stage):
    setting, start = stage
    cfg = dataclasses.replace(CFG, steps=2, updates=3)
    grpo.run(cfg, start, setting, "search", "several")
    found = lines(setting, "several")
    assert [line["step"] for line in found] == [1, 2]
    assert all(abs(line["grpo/ratio"] - 1) > 1e-4 for line in found)  # of the third update: the sampler is behind by then


def test_another_optimizer_is_made_for_all_updates(stage, monkeypatch):
    (setting, start), mine, made = stage, bind(own_optimizer, rate=0.1), []
    monkeypatch.setattr(grpo, "jitted_step", lambda *args: made.append(args[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.run(dataclasses.replace(CFG, steps=3, updates=2, optimizer=mine), start, setting, "search", "own")
    assert made == [optim.program(mine, 6)] and made != [optim.program(mine, 3)]


def own_optimizer(specs, steps, *, rate):
    return optax.sgd(optax.linear_schedule(rate, 0.0, steps))


def test_log_probabilities_may_be_recomputed(stage):
    """The update is then the same where sampler and training forward agree, and corrected where they do not."""
    setting, start = stage
    data = sampled(setting, start)
    objective = Objective(old="recomputed")
    scored = grpo.Scorer(dataclasses.replace(CFG, objective=objective), setting.model, setting.init_params())(start, data["batch"])
    np.testing.assert_allclose(scored["old_logp"] * data["batch"].mask, data["rollout_logp"], atol=1e-4)
    weighed = {**grpo.weigh(data, objective), "old_logp": scored["old_logp"]}
    loss = jax.jit(functools.partial(grpo.loss, share=1.0, model=setting.model, objective=objective, block=BLOCK, temperature=1.0))
    agreed, out = loss(start, weighed)
    plain = step_from(start, setting, data)
    np.testing.assert_allclose(agreed, plain["loss"], rtol=1e-3, atol=1e-6)
    assert grpo.finish(out)["grpo/mismatch"] < 1e-4
    likelier = {**weighed, "rollout_logp": weighed["rollout_logp"] - np.log(1.5) * data["batch"].mask}
    of_policy = [float(np.sum(weighed["weights"] * weighed["advantages"])), 0.0]
    np.testing.assert_allclose(loss(start, likelier)[0] - agreed, -0.5 * of_policy[0], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_under_a_mesh_the_stage_goes_through(stage):
    """Its runs are sampled, and under a mesh with other rounding, so they are not compared; the update is, on one batch."""
    setting, start = stage
    meshed = dataclasses.replace(setting, mesh=make_mesh(MeshConfig({"data": 2, "expert": 2})))
    data = sampled(setting, start)
    plain = step_from(start, setting, data)
    with meshed.on_mesh():
        placed = jax.tree.map(lambda p, like: jax.device_put(p, like.sharding), start, meshed.abstract_params())
        put = {"batch": meshed.put(jax.tree.map(np.asarray, data["batch"]))}
        put |= {n: jax.device_put(np.asarray(x), put["batch"].mask.sharding) for n, x in data.items() if n != "batch"}
        spread = step_from(placed, setting, put)
        for name in ("loss", "grad_norm", "grpo/kl", "grpo/entropy"):
            np.testing.assert_allclose(spread[name], plain[name], rtol=2e-4, atol=1e-6, err_msg=name)
        after = grpo.run(dataclasses.replace(CFG, steps=2, microbatches=2), placed, meshed, "search", "meshed")
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(placed), strict=True)) > 1e-4


REFUSED = ({"reduction": "fixed_length"}, {"fixed_length": 8}, {"dual_clip": 0.5}, {"clip_low": 1.5}, {"kl_coefficient": -1.0})


@pytest.mark.parametrize("changes", REFUSED)
def test_objectives_that_make_no_sense_are_refused(changes):
    with pytest.raises(ConfigError, match="Objective"):
        Objective(**changes)


def test_the_paper_is_the_default():
    cfg = GrpoConfig()
    o, rate = cfg.objective, cfg.optimizer.kwargs
    assert (o.clip_low, o.clip_high, o.kl_coefficient, o.entropy_coefficient, o.old) == (0.2, 0.28, 0.001, 0.0001, "rollout")
    assert (cfg.prompts, cfg.samples, cfg.limits.temperature) == (32, 8, 1.0)
    budgets = grpo.PAPER_LIMITS  # <= 300 tool calls, responses <= 4,096, sequences <= 131,072 (4.2); a search run is asked (2.2)
    assert (budgets.max_turns, budgets.max_turn_tokens, budgets.max_length, budgets.temperature) == (300, 4096, 131072, 1.0)
    assert (budgets.max_response, budgets.final_request) == (0, None)
    assert rate["learning_rate"] == 1e-6 and rate["final"] == 1.0 and rate["warmup"] == 0.0
