"""Domains and the real engine together: a model that has learnt a few runs by heart, good and bad ones, samples them again.

So that among its runs there are some that are solved, some that end wrong and some that a budget cuts, and rewards, advantages and pools
can be recomputed from what was sampled; and the same seed gives the same runs of all domains that it knows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import metrics, optim, train
from a1jax.config import bind
from a1jax.data import chat, packing
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import DOMAINS, base, solve
from a1jax.domains.base import Turn
from a1jax.domains.tool_graph import ToolGraph
from a1jax.models import config as models
from a1jax.rollout import rewards
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import experts, groups, grpo, kept_runs
from a1jax.stages.grpo import GrpoConfig
from a1jax.stages.setting import Setting
from a1jax.stages.task_pool import Pool, Tasks
from a1jax.types import FAILED, FINISHED, TRUNCATED

FAMILIES = {"tool_calling": ToolGraph(goal_calls=1), "general": DOMAINS["general"], "engineering": DOMAINS["engineering"]}
STEPS = {"tool_calling": 4, "general": 2, "engineering": 1}
LENGTH, ROWS, BLOCK, VOCABULARY, TURN = 256, 8, 1024, 960, 56
LIMITS = Limits(slots=8, max_turns=16, max_turn_tokens=TURN, max_length=LENGTH, temperature=1.0)
ADAM = bind(optim.adamw, learning_rate=0.01, warmup=0.0, final=1.0, weight_decay=0.0)
WAYS = ("solved", "solved", "wrong", "endless", "endless early")
CFG = GrpoConfig(steps=1, prompts=1, samples=8, refills=0, rows=ROWS, max_length=LENGTH, limits=LIMITS, optimizer=ADAM, vocab_block=BLOCK)


def sources(domain):
    return (experts.Prompts((STEPS[domain],)),)


def known_task(domain):
    """The first task that reinforcement draws of a domain."""
    (task,) = Tasks(FAMILIES[domain], sources(domain), 0, 0).take(0, 1)
    return task


def until(task, turns, last):
    """The expert's run, but that after so many turns it says something else."""

    def altered():
        expert, seen = task.expert(), None
        for _ in range(turns):
            seen = yield expert.send(seen)
        yield last

    return base.play(task, altered())


def example(task, way, tokenizer):
    """A run of the task: the expert's, one that ends too soon or in wrong words, or one that never ends its last turn but one or, early,
    the turn before that."""
    run = solve(task)
    turns = len(rewards.model_turns(run))
    if way == "wrong":  # the last call is left out, or the last wish is closed in other words
        late = task.domain == "general"
        other = next(text for text in task.options if text != task.answer) if late else task.answer
        run = until(task, turns - (1 if late else 2), Turn("end", answer=other))
    if way in ("solved", "wrong"):
        tokens, mask = chat.tokenize(tokenizer, list(run.messages))
        return packing.Example(tokens, mask)
    begun = until(task, turns - (3 if way == "endless early" else 2), Turn("", answer="")).messages
    begun = begun[: max(i for i, m in enumerate(begun) if m["role"] == "assistant")]
    tokens, _ = chat.tokenize(tokenizer, list(begun), add_generation_prompt=True)
    mask = np.concatenate([chat.tokenize(tokenizer, list(begun))[1], np.zeros(len(tokens))])[: len(tokens)]
    word = tokenizer.encode(" next")
    return packing.Example(np.concatenate([tokens, np.resize(word, TURN)]).astype(np.int32), np.concatenate([mask, np.ones(TURN)]))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(setting, parameters) of a model that knows runs of one task of each domain by heart."""
    folder, families = tmp_path_factory.mktemp("by_heart"), tuple(FAMILIES.values())
    texts, symbols = experts.tokenizer_texts(families, 0), experts.symbols(families, 0)
    tokenizer = train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=VOCABULARY, symbols=symbols)
    width = {"head_dim": 16, "expert_width": 32, "shared_expert_width": 32, "num_layers": 1, "full_attention_interval": 1}
    model = models.tiny(vocab_size=VOCABULARY, d_model=32, num_experts=2, **width)
    examples = [example(known_task(name), way, tokenizer) for name in ("tool_calling", "general") for way in WAYS]
    examples += [example(known_task("engineering"), "solved", tokenizer)] * 2
    batch = jax.tree.map(jnp.asarray, packing.to_batch(packing.pack_rows(examples, ROWS, LENGTH), LENGTH))
    assert batch.mask.sum() == sum(one.mask.sum() for one in examples)
    with metrics.Writer(folder) as writer:
        setting = Setting(model, tokenizer, tuple(FAMILIES), None, folder, writer, 0, families=FAMILIES)
        state = train.init_state(setting.init_params(), ADAM(setting.specs, 1), 0)
        update, logp = grpo.train_step(CFG, model), grpo.logp_step(CFG, model)
        for _ in range(80):  # with every advantage and every ratio 1 the update is that of cross-entropy
            now = logp(state.params, batch)
            state, _ = update(state, {"batch": batch, "advantages": batch.mask, "rollout_logp": now, "ref_logp": now})
        yield setting, state.params


@pytest.fixture
def seen(monkeypatch):
    """What a stage does: (tasks, runs) of every call of the engine, and the data of every step."""
    found, sample, following = {"runs": [], "data": []}, Engine.run, groups.Reinforced.next

    def run(self, params, tasks, *args, **more):
        runs, counts = sample(self, params, tasks, *args, **more)
        found["runs"].append((tasks, runs))
        return runs, counts

    def step(self, state):
        data, out = following(self, state)
        found["data"].append(data)
        return data, out

    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr(groups.Reinforced, "next", step)
    return found


def trained(known, seen, domain, **changes):
    """((tasks, runs) of the tries, of the step, its data, what was kept of the choice, the runs on disk) of one step on a pool of one."""
    setting, params = known
    after = grpo.run(dataclasses.replace(CFG, sources=sources(domain), **changes), params, setting, domain, domain)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)) > 1e-3
    choice = json.loads((setting.directory(domain) / "pool.json").read_text())
    (file,) = (setting.workdir / "rollouts" / domain).iterdir()
    return *seen["runs"], *seen["data"], choice, kept_runs.read(file)


def solved(run):
    return float(run.status == FINISHED)


def share(task, run):
    """Of the rubrics, asked anew."""
    return np.mean(task.rubrics(run.trajectory))


def by_hand(values, on):
    """(value - mean) / deviation of those that are on, 0 elsewhere."""
    found = np.zeros(len(values))
    found[on] = (values[on] - values[on].mean()) / values[on].std()
    return found


def check_batch(data, runs, expected):
    """Every token that a run wrote, cut runs too, has that run's advantage."""
    batch, gains = jax.tree.map(np.asarray, data["batch"]), np.asarray(data["advantages"])
    wanted = {run.tokens.tobytes(): gain for run, gain in zip(runs, expected, strict=True)}
    count = 0
    for row in range(ROWS):
        for s in range(1, batch.segment_ids[row].max() + 1):
            on = batch.segment_ids[row] == s
            gain = wanted[batch.tokens[row][on].astype(np.int32).tobytes()]
            np.testing.assert_allclose(gains[row][on], gain * batch.mask[row][on], rtol=1e-4, atol=1e-6)
            count += 1
    assert count == len(runs) and batch.mask.sum() == sum(run.sampled.sum() for run in runs)


def test_near_misses_and_the_asymmetric_advantage_of_sampled_runs(known, seen):
    pool = Pool(candidates=2, select="near_misses", tries=6, size=1)
    (tried, tries), (asked, runs), data, choice, kept = trained(known, seen, "tool_calling", pool=pool, advantage="papo")
    outcomes, shares = np.array([solved(r) for r in tries]).reshape(2, 6), np.array(list(map(share, tried, tries))).reshape(2, 6)
    nearness = [shares[i][outcomes[i] == 0].mean() for i in range(2)]
    assert 0 < outcomes[0].mean() <= 0.5 <= nearness[0] and nearness[1] < 0.5  # the second task is one that the model never met
    assert choice["places"] == [0] and choice["success_of_all"] == pytest.approx(outcomes.mean())
    assert [task.task_id for task in asked] == [known_task("tool_calling").task_id] * 8

    outcome, process = np.array([solved(r) for r in runs]), np.array(list(map(share, asked, runs)))
    cut = np.array([run.status == TRUNCATED for run in runs])
    assert {run.status for run in runs} == {FINISHED, FAILED, TRUNCATED} and len(set(process[cut])) > 1
    expected = by_hand(outcome, outcome >= 0) + 0.5 * by_hand(process, outcome == 0)
    check_batch(data, runs, expected)
    assert sorted(run.metadata["advantage"] for run in kept) == pytest.approx(sorted(expected), rel=1e-4)


def test_rubric_rewards_of_sampled_runs_on_tasks_that_tries_got_right_and_wrong(known, seen):
    pool, reward = Pool(candidates=2, select="mixed", tries=5), bind(rewards.rubric_reward, coefficient=0.4)
    (_, tries), (asked, runs), data, choice, kept = trained(known, seen, "general", pool=pool, reward=reward)
    right = np.array([solved(r) for r in tries]).reshape(2, 5).sum(1)
    assert 0 < right[0] < 5 and right[1] == 0 and choice["places"] == [0]
    assert [task.task_id for task in asked] == [known_task("general").task_id] * 8
    parts = [{"correctness": solved(run), "rubrics": 0.4 * share(task, run)} for task, run in zip(asked, runs, strict=True)]
    assert {run.status for run in runs} == {FINISHED, FAILED, TRUNCATED}
    assert any(run.status == TRUNCATED and part["rubrics"] > 0 for run, part in zip(runs, parts, strict=True))
    total = np.array([sum(part.values()) for part in parts])
    check_batch(data, runs, by_hand(total, total >= 0))
    assert sorted(r.metadata["reward_parts"]["rubrics"] for r in kept) == pytest.approx(sorted(part["rubrics"] for part in parts))


@pytest.mark.parametrize("domain", ["general", "engineering"])
def test_same_seed_same_runs(known, domain):
    """Programs run on threads beside decoding: which runs stand beside one then is not fixed, so its numbers may differ by a rounding."""
    setting, params = known
    todo = [known_task(domain)] * 12
    one, two, other = (Engine(setting.model, setting.tokenizer, LIMITS).run(params, todo, seed=seed)[0] for seed in (3, 3, 4))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.sampled, b.sampled)
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5 if todo[0].blocking else 0)
        assert (a.status, a.reward, a.turns, a.trajectory) == (b.status, b.reward, b.turns, b.trajectory)
    assert {a.tokens.tobytes() for a in one} != {b.tokens.tobytes() for b in other}
    assert any(solved(run) for run in one)  # so that the environment did its part: a program was run, a caller was served
