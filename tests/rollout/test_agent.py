"""The loop of turns: what is sampled is what the model says, budgets cut, broken environments are retried alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params as param_specs
from a1jax.config import ConfigError
from a1jax.data import chat
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import QUICKSTART, solve
from a1jax.domains.base import SAY
from a1jax.domains.general import General
from a1jax.models import decode, transformer
from a1jax.rollout.agent import Engine, Limits
from a1jax.stages import experts
from a1jax.types import ABORTED, FAILED, FINISHED, TRUNCATED

LIMITS = Limits(slots=4, max_turns=12, max_turn_tokens=24, max_length=128, temperature=1.0)
NAMES = ("search", "tool_calling")


@pytest.fixture(scope="module")
def tokenizer(domain_tokenizer):
    return domain_tokenizer


@pytest.fixture(scope="module")
def model(small_model):
    return small_model, param_specs.init(transformer.specs(small_model), jax.random.key(0))


def tasks(steps=2):
    return [QUICKSTART[name].propose(seed, steps) for name in NAMES for seed in range(4)]


@pytest.mark.parametrize("steps", [1, 3])
def test_an_experts_tokens_through_the_loop_are_the_experts_run(tokenizer, model, steps, scripted):
    engine = Engine(model[0], tokenizer, dataclasses.replace(LIMITS, slots=1, max_length=256))
    todo = tasks(steps)
    wanted = [chat.tokenize(tokenizer, list(solve(t).messages)) for t in todo]
    done, counts = scripted(engine, [w[0] for w in wanted]).run(None, todo, seed=0)
    for task, run, (tokens, mask) in zip(todo, done, wanted, strict=True):
        assert (run.task_id, run.status, run.reward) == (task.task_id, FINISHED, 1.0)
        n = len(run.tokens)  # the run ends with the model's turn, the rendering with the newline after it
        np.testing.assert_array_equal(run.tokens, tokens[:n])
        np.testing.assert_array_equal(run.sampled, mask[:n])
        assert mask[n:].sum() == 0 and (run.logp == -0.5 * run.sampled).all()
        assert run.trajectory.messages[-1]["content"] == task.answer and run.trajectory.records[-1].outcome.endswith("accepted")
    assert counts["tool_errors"] == counts["interruptions"] == 0


@pytest.fixture(scope="module")
def desk_tokenizer(tmp_path_factory):
    families = (General(),)
    path = tmp_path_factory.mktemp("desk") / "tokenizer.model"
    return train_sentencepiece(experts.tokenizer_texts(families, 0), path, vocab_size=640, symbols=experts.symbols(families, 0))


def test_a_user_replies_until_the_last_wish_is_closed(desk_tokenizer, model, scripted):
    """Turns without a call go to the simulated user, what it says comes back as a user turn that the model did not write."""
    engine = Engine(model[0], desk_tokenizer, dataclasses.replace(LIMITS, slots=1, max_length=512, max_turns=40))
    todo = [General().propose(seed, steps) for seed, steps in ((0, 1), (1, 3), (2, 4))]
    runs = [solve(t) for t in todo]
    wanted = [chat.tokenize(desk_tokenizer, list(r.messages)) for r in runs]
    done, counts = scripted(engine, [w[0] for w in wanted]).run(None, todo, seed=0)
    for expert, run, (tokens, mask) in zip(runs, done, wanted, strict=True):
        assert (run.status, run.reward) == (FINISHED, 1.0) and run.trajectory.records == expert.records
        assert run.trajectory.metadata["rubrics"] == expert.metadata["rubrics"]
        np.testing.assert_array_equal(run.tokens, tokens[: len(run.tokens)])
        np.testing.assert_array_equal(run.sampled, mask[: len(run.tokens)])
        said = [m["content"] for m in run.trajectory.messages if m["role"] == "user"][1:]
        assert said == [r.observation for r in expert.records if r.action and r.action["name"] == SAY] and said
    assert counts["tool_errors"] == counts["interruptions"] == 0


def test_a_user_hangs_up_on_a_model_that_says_nothing_of_use(desk_tokenizer, model, scripted):
    task = General().propose(0, 2)
    prompt = chat.tokenize(desk_tokenizer, list(task.messages()), add_generation_prompt=True)[0]
    engine = Engine(model[0], desk_tokenizer, dataclasses.replace(LIMITS, slots=1, max_length=512))
    done, _ = scripted(engine, [[*prompt, *[desk_tokenizer.eos_id] * 400]]).run(None, [task], seed=0)
    assert (done[0].status, done[0].turns, done[0].sampled.sum()) == (FAILED, task.patience, task.patience)
    assert done[0].trajectory.records[-1].outcome == "user: hung up on wish 1"
    assert desk_tokenizer.decode(done[0].tokens.tolist()).count("I do not understand.") == task.patience - 1


def test_log_probabilities_are_those_of_the_training_forward(tokenizer, model):
    cfg, params = model
    done, _ = Engine(cfg, tokenizer, LIMITS).run(params, tasks(), seed=3)
    for run in done:
        tokens = jnp.asarray(run.tokens)[None]
        positions = jnp.arange(tokens.shape[1])[None]
        pad = (0, LIMITS.max_length - tokens.shape[1])
        args = (jnp.pad(x, ((0, 0), pad)) for x in (tokens, positions, jnp.ones_like(tokens)))
        hidden, _ = forward(params, *args, cfg)
        logp = jax.nn.log_softmax(transformer.head(params, hidden, cfg)[0], axis=-1)
        n = len(run.tokens)
        expected = np.asarray(logp)[np.arange(n - 1), run.tokens[1:]]
        where = run.sampled[1:] > 0
        assert where.any()
        np.testing.assert_allclose(run.logp[1:][where], expected[where], atol=1e-4)


forward = jax.jit(transformer.apply, static_argnums=4)


def test_same_seed_same_rollouts_whatever_the_slots(tokenizer, model):
    cfg, params = model
    one, _ = Engine(cfg, tokenizer, LIMITS).run(params, tasks(), seed=3)
    two, _ = Engine(cfg, tokenizer, LIMITS).run(params, tasks(), seed=3)
    three, _ = Engine(cfg, tokenizer, dataclasses.replace(LIMITS, slots=7)).run(params, tasks(), seed=3)
    other, _ = Engine(cfg, tokenizer, LIMITS).run(params, tasks(), seed=4)
    for a, b, c in zip(one, two, three, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logp, b.logp)
        np.testing.assert_array_equal(a.tokens, c.tokens)
    assert any(len(a.tokens) != len(d.tokens) or (a.tokens != d.tokens).any() for a, d in zip(one, other, strict=True))


def test_recorded_routes_are_those_of_the_training_forward(tokenizer, model):
    """Eight runs in one slot, longer ones before shorter ones: nothing of an earlier run may stay behind."""
    cfg = dataclasses.replace(model[0], num_experts=6)
    params = param_specs.init(transformer.specs(cfg), jax.random.key(0))
    limits = dataclasses.replace(LIMITS, slots=1, record_routes=True)
    done, _ = Engine(cfg, tokenizer, limits).run(params, tasks(), seed=3)
    plain, _ = Engine(cfg, tokenizer, dataclasses.replace(limits, record_routes=False)).run(params, tasks(), seed=3)
    cache, fill = decode.init_cache(cfg, 1, LIMITS.max_length), jax.jit(decode.prefill, static_argnames=("cfg", "record"))
    for run, other in zip(done, plain, strict=True):
        np.testing.assert_array_equal(run.tokens, other.tokens)
        assert other.routes is None
        n = len(run.tokens)
        assert run.routes.shape == (n, cfg.num_layers, cfg.num_experts_active) and run.routes.dtype == np.int16
        assert (run.routes[n - 1] == -1).all()  # sampled, but never fed
        padded = np.pad(run.tokens, (0, LIMITS.max_length - n))[None]
        *_, routes = fill(params, cache, padded, np.array([n], np.int32), cfg=cfg, reset=np.array([True]), record=True)
        np.testing.assert_array_equal(run.routes[:-1], routes[0, : n - 1])
    assert any(len(one.tokens) > len(other.tokens) for one, other in itertools.pairwise(done))


def test_a_turn_that_never_ends_is_cut_and_kept(tokenizer, model, scripted):
    engine = Engine(model[0], tokenizer, dataclasses.replace(LIMITS, slots=1, max_turn_tokens=5))
    word = tokenizer.encode("find")[0]
    done, _ = scripted(engine, [[word] * 400]).run(None, tasks()[:1], seed=0)
    assert done[0].status == TRUNCATED and done[0].sampled.sum() == 5 and done[0].turns == 1 and done[0].reward == 0.0
    assert done[0].sampled[-5:].all()  # nothing was generated or appended after the cut


def test_the_run_stops_at_the_context_and_at_the_turn_budget(tokenizer, model, scripted):
    task = tasks(4)[0]
    tokens, mask = chat.tokenize(tokenizer, list(solve(task).messages))
    short = Engine(model[0], tokenizer, dataclasses.replace(LIMITS, slots=1, max_length=60))
    done, _ = scripted(short, [tokens]).run(None, [task], seed=0)
    assert done[0].status == TRUNCATED and len(done[0].tokens) <= 60
    np.testing.assert_array_equal(done[0].tokens, tokens[: len(done[0].tokens)])
    few = Engine(model[0], tokenizer, dataclasses.replace(LIMITS, slots=1, max_turns=2, final_request=""))
    done, _ = scripted(few, [tokens]).run(None, [task], seed=0)
    assert done[0].status == TRUNCATED and done[0].turns == 2 and done[0].sampled[-1] == 1.0


def test_a_prompt_without_room_for_an_answer_is_truncated_at_once(tokenizer, model):
    done, counts = Engine(model[0], tokenizer, dataclasses.replace(LIMITS, max_length=4)).run(model[1], tasks(), seed=0)
    assert [d.status for d in done] == [TRUNCATED] * 8 and counts["decode_steps"] == 0


def test_a_broken_call_is_answered_with_its_error_and_the_run_goes_on(tokenizer, model, scripted):
    task = tasks(1)[0]
    expert, _ = chat.tokenize(tokenizer, list(solve(task).messages))
    prompt = chat.tokenize(tokenizer, list(task.messages()), add_generation_prompt=True)[0]
    broken = [*prompt, *tokenizer.encode('<tool_call>\n{"name": }\n</tool_call>'), tokenizer.eos_id]
    engine = Engine(model[0], tokenizer, dataclasses.replace(LIMITS, slots=1, max_length=256, max_turns=2, max_turn_tokens=48))
    done, counts = scripted(engine, [np.asarray([*broken, *[tokenizer.eos_id] * 200])]).run(None, [task], seed=0)
    answer = done[0].trajectory.messages[2]
    assert answer["role"] == "tool" and answer["content"].startswith("error: ") and "\n" not in answer["content"]
    assert counts["tool_errors"] >= 1 and tokenizer.decode(done[0].tokens).count("error: ") == 1
    assert done[0].status == FAILED  # the empty second turn is a final answer, and the wrong one


@dataclasses.dataclass(frozen=True)
class Breaking:
    """A task whose environment breaks on its first ``times`` calls."""

    task: object
    broken: list
    times: int

    def __getattr__(self, name):
        return getattr(self.task, name)

    def step(self, state, call):
        if len(self.broken) < self.times:
            self.broken.append(call.name)
            raise OSError("connection lost")
        return self.task.step(state, call)


@pytest.mark.parametrize(("times", "status", "aborted"), [(1, FINISHED, 1), (5, ABORTED, 2)])
def test_a_broken_environment_aborts_its_run_alone_and_retries(tokenizer, model, times, status, aborted, scripted):
    first, second = tasks(1)[:2]
    wanted = [chat.tokenize(tokenizer, list(solve(t).messages))[0] for t in (first, second)]
    engine = scripted(Engine(model[0], tokenizer, dataclasses.replace(LIMITS, slots=1)), [wanted[0], wanted[1], wanted[0]])
    done, counts = engine.run(None, [Breaking(first, [], times), second], seed=0)
    assert (done[0].status, done[1].status) == (status, FINISHED) and counts["interruptions"] == aborted


def test_limits_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="max_turns"):
        Limits(max_turns=0)
