"""Budgets, stop tokens, the last turn taken back, tools beside decoding, programs that misbehave: through the whole engine."""

import dataclasses
import pathlib
import time

import jax
import numpy as np
import pytest

from a1jax import params as param_specs
from a1jax.config import ConfigError
from a1jax.data import chat
from a1jax.domains import QUICKSTART, Call, Observation, sandbox, solve
from a1jax.domains.base import call_message, tool_message
from a1jax.domains.engineering import Engineering
from a1jax.models import transformer
from a1jax.rollout.agent import Engine, Limits, together
from a1jax.types import ABORTED, FAILED, FINISHED, TRUNCATED

LIMITS = Limits(slots=1, max_turns=12, max_turn_tokens=64, max_length=256)


@pytest.fixture(scope="module")
def tokenizer(domain_tokenizer):
    return domain_tokenizer


@pytest.fixture(scope="module")
def task():
    return QUICKSTART["search"].propose(0, 3)


@pytest.fixture(scope="module")
def run_scripts(tokenizer, small_model, scripted):
    def run(limits, tasks, *scripts):
        return scripted(Engine(small_model, tokenizer, limits), *scripts).run(None, tasks, seed=0)[0]

    return run


def test_the_response_budget_counts_all_turns(tokenizer, run_scripts, task):
    tokens, mask = chat.tokenize(tokenizer, list(solve(task).messages))
    whole = int(mask.sum())
    for budget, status in ((whole, FINISHED), (whole - 1, TRUNCATED), (9, TRUNCATED)):
        limits = dataclasses.replace(LIMITS, max_response=budget)
        (run,) = run_scripts(limits, [task], [tokens])
        assert (run.status, int(run.sampled.sum())) == (status, min(budget, whole)) and run.sampled[-1] == 1
        np.testing.assert_array_equal(run.tokens, tokens[: len(run.tokens)])


def test_a_turn_that_uses_up_the_response_is_the_last_one(tokenizer, run_scripts, task):
    tokens, mask = chat.tokenize(tokenizer, list(solve(task).messages))
    first = int(np.flatnonzero(np.diff(mask) < 0)[0]) + 1  # tokens up to the first turn's end
    limits = dataclasses.replace(LIMITS, max_response=int(mask[:first].sum()))
    (run,) = run_scripts(limits, [task], [tokens])
    assert (run.status, run.turns, len(run.tokens)) == (TRUNCATED, 1, first)


def test_a_stop_token_ends_a_turn_and_the_turn_is_closed(tokenizer, small_model, run_scripts, task):
    tokens, mask = chat.tokenize(tokenizer, list(solve(task).messages))
    ends = np.flatnonzero((tokens == tokenizer.eos_id) & (mask > 0))
    script = np.insert(tokens, ends, tokenizer.pad_id)  # <|endoftext|> before each turn's end
    limits = dataclasses.replace(LIMITS, stop=("<|endoftext|>",))
    (run,) = run_scripts(limits, [task], [script])
    assert run.status == FINISHED
    np.testing.assert_array_equal(run.tokens, script[: len(run.tokens)])
    assert run.tokens[-1] == tokenizer.pad_id and (run.sampled[run.tokens == tokenizer.eos_id] == 0).all()
    assert (run.sampled[run.tokens == tokenizer.pad_id] == 1).all()
    with pytest.raises(ConfigError, match="'no such token', which is"):
        Engine(small_model, tokenizer, dataclasses.replace(LIMITS, stop=("no such token",)))


@pytest.mark.parametrize("max_turns", [1, 3])
def test_at_the_turn_limit_the_last_turn_is_taken_back_and_an_answer_asked_for(tokenizer, run_scripts, task, max_turns):
    messages = list(solve(task).messages)
    tokens, _ = chat.tokenize(tokenizer, messages)
    kept = [*messages[: 1 + 2 * (max_turns - 1)], {"role": "user", "content": "Answer now."}]
    wanted, mask = chat.tokenize(tokenizer, [*kept, {"role": "assistant", "content": task.answer}])
    limits = dataclasses.replace(LIMITS, max_turns=max_turns, final_request="Answer now.")
    (run,) = run_scripts(limits, [task], [tokens, wanted])
    n = len(run.tokens)
    np.testing.assert_array_equal(run.tokens, wanted[:n])
    np.testing.assert_array_equal(run.sampled, mask[:n])
    assert mask[n:].sum() == 0 and (run.logp == -0.5 * run.sampled).all()
    assert run.status == FAILED and run.turns == max_turns and run.trajectory.metadata["forced"] is True  # right, but not all was read
    assert len(run.trajectory.messages) == len(kept) + 1 and len(run.trajectory.records) == max_turns
    tight = dataclasses.replace(limits, max_length=len(run.tokens) - 10, final_request="Answer now. " * 60)
    (run,) = run_scripts(tight, [task], [tokens])
    assert run.status == TRUNCATED and run.trajectory.metadata == {}  # no room to ask


SAID, PROTOCOL = "Answer now.", QUICKSTART["search"].propose(0, 3).final_request
BY_PROTOCOL = [("search", None, PROTOCOL), ("search", "", ""), ("search", SAID, SAID)]
BY_PROTOCOL += [("tool_calling", None, ""), ("tool_calling", "", ""), ("tool_calling", SAID, SAID)]


@pytest.mark.parametrize(("domain", "limit", "words"), BY_PROTOCOL)
def test_the_task_says_who_is_asked_for_an_answer_unless_the_limits_do(tokenizer, run_scripts, domain, limit, words):
    task = QUICKSTART[domain].propose(0, 3)
    messages = list(solve(task).messages)
    tokens, _ = chat.tokenize(tokenizer, messages)
    asked = [*messages[:3], {"role": "user", "content": words}, {"role": "assistant", "content": task.answer}]
    scripts = [tokens, chat.tokenize(tokenizer, asked)[0]] if words else [tokens]
    (run,) = run_scripts(dataclasses.replace(LIMITS, max_turns=2, final_request=limit), [task], scripts)
    assert (run.status, run.trajectory.metadata.get("forced", False)) == ((FAILED, True) if words else (TRUNCATED, False))
    assert [m["content"] for m in run.trajectory.messages if m["role"] == "user"][1:] == [words] * bool(words)
    enough = run_scripts(dataclasses.replace(LIMITS, final_request=limit), [task], [tokens])[0]  # far from its limit nobody is asked
    assert enough.status == FINISHED and "forced" not in enough.trajectory.metadata
    np.testing.assert_array_equal(enough.tokens, tokens[: len(enough.tokens)])


STRICT = """{% for m in messages %}{% if m.role == 'user' and not loop.first %}{{ raise_exception('roles must alternate') }}{% endif %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_that_lets_nobody_ask_costs_the_run_alone(tokenizer, small_model, scripted, task, caplog):
    strict = dataclasses.replace(tokenizer, chat_template=STRICT)
    engine = Engine(small_model, strict, dataclasses.replace(LIMITS, max_turns=1))
    prompt = engine.prompt(task, task.messages())
    call = tokenizer.encode(chat.turn_text(solve(task).messages[1]))
    script = [0] * (len(prompt) - 1) + [*call, tokenizer.eos_id]
    runs = scripted(engine, [script, script]).run(None, [task, task], seed=0)[0]
    assert [(run.status, run.turns, run.trajectory.metadata) for run in runs] == [(TRUNCATED, 1, {})] * 2
    assert "cannot be asked for its answer, so it is TRUNCATED: the chat template refuses" in caplog.text


def test_a_small_tokenizer_can_spell_the_protocol(tokenizer):
    assert PROTOCOL and not any(tokenizer.spelling[i].startswith("<0x") for i in tokenizer.encode(PROTOCOL))


@dataclasses.dataclass(frozen=True)
class Talking:
    """A task whose user answers three times, after a while, and then breaks or lets the verifier judge."""

    task: object
    seconds: float = 0.0
    breaks: int = 0
    broken: list = dataclasses.field(default_factory=list)
    blocking: bool = False

    def __getattr__(self, name):
        return getattr(self.task, name)

    def reply(self, state, text):
        time.sleep(self.seconds)
        state = state or 0
        if state == 2 and len(self.broken) < self.breaks:
            self.broken.append(text)
            raise OSError("connection lost")
        return (state + 1, Observation(f"start next {state}" * (state + 3))) if state < 3 else (state, None)


@pytest.fixture(scope="module")
def talk(tokenizer, small_model):
    """talk(tasks, **limits): rollouts of a model one token in six of which ends a turn."""
    params = param_specs.init(transformer.specs(small_model), jax.random.key(0))

    def run(tasks, **limits):
        engine = Engine(small_model, tokenizer, dataclasses.replace(LIMITS, **{"slots": 4, "feed_tokens": 4, **limits}))
        engine.stops[100::6] = True
        return engine.run(params, tasks, seed=5)

    return run


def assert_same(ones, others):
    for a, b in zip(ones, others, strict=True):
        assert (a.task_id, a.status, a.turns, a.trajectory.messages) == (b.task_id, b.status, b.turns, b.trajectory.messages)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.sampled, b.sampled)
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_tools_beside_decoding_change_nothing_but_the_time(talk):
    plain = [QUICKSTART["search"].propose(i, 1 + i) for i in range(6)]
    quick, _ = talk([Talking(t) for t in plain])
    slow, counts = talk([Talking(t, 0.003 * (i % 3), blocking=True) for i, t in enumerate(plain)])
    reverse, _ = talk([Talking(t, 0.003 * (2 - i % 3), blocking=True) for i, t in enumerate(plain)], slots=3)
    assert sum(run.turns >= 3 for run in quick) >= 3 and counts["tool_seconds"] > 0
    assert_same(quick, slow)
    assert_same(quick, reverse)


@dataclasses.dataclass(frozen=True)
class Slow:
    """A task that takes its time over an answer."""

    task: object
    seconds: float
    blocking = True

    def __getattr__(self, name):
        return getattr(self.task, name)

    def reply(self, state, text):
        time.sleep(self.seconds)
        return self.task.reply(state, text)


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_the_last_token_has_no_routes_however_long_its_tool_took(tokenizer, small_model, scripted, task, seconds):
    tokens, _ = chat.tokenize(tokenizer, list(solve(task).messages))
    engine = scripted(Engine(small_model, tokenizer, dataclasses.replace(LIMITS, record_routes=True)), [tokens])
    written, taken = engine.advance, np.zeros((1, small_model.num_layers, small_model.num_experts_active), np.int16)
    engine.advance = lambda *call: (*written(*call), taken)
    (run,) = engine.run(None, [Slow(task, seconds)], seed=0)[0]
    assert run.status == FINISHED and (run.routes[:-1] == 0).all() and (run.routes[-1] == -1).all()


def test_known_tokens_in_pieces_or_one_by_one_give_the_same_runs(talk):
    plain = [Talking(QUICKSTART["search"].propose(i, 1 + i % 5)) for i in range(6)]
    one, single = talk(plain, feed_tokens=0)
    for pieces in (3, 16):
        many, counts = talk(plain, feed_tokens=pieces)
        assert counts["feed_steps"] > 0 == single["feed_steps"]
        assert_same(one, many)
    assert 0 <= counts["idle_share"] < 1 and counts["sampled_tokens"] == sum(int(r.sampled.sum()) for r in many)


def test_an_aborted_run_begins_anew_and_its_group_keeps_its_samples(talk):
    group = [QUICKSTART["search"].propose(0, 2)] * 4
    calm, _ = talk([Talking(t) for t in group])
    assert len({run.tokens.tobytes() for run in calm}) == 4
    which = next(i for i, run in enumerate(calm) if run.turns >= 3)
    for breaks, gone in ((1, False), (9, True)):
        tasks = [Talking(t, breaks=breaks if i == which else 0) for i, t in enumerate(group)]
        done, counts = talk(tasks)
        assert_same(calm[:which] + calm[which + 1 :], done[:which] + done[which + 1 :])
        assert counts["interruptions"] >= 1 and done[which].tokens.tobytes() != calm[which].tokens.tobytes()
        assert gone or done[which].status != ABORTED


PROGRAMS = {
    "    while True: pass\n": "too long",
    "    import os\n    while True: os.fork()\n": "PermissionError",
    "    x = [0]\n    while True: x = x + x\n": "MemoryError",
    "    open('/tmp/a1jax-outside', 'w').write('x')\n    return t\n": "FileNotFoundError",
    "    import socket\n    socket.socket()\n    return t\n": "No module named 'socket'",
}


def test_programs_that_misbehave_are_stopped_and_the_others_go_on(tokenizer, run_scripts, task):
    """Each is written, run, and followed by a turn that never ends; an expert of another domain finishes beside them."""
    bad = Engineering(limits=sandbox.Limits(seconds=2.0, cpu_seconds=1)).propose(0, 1)
    scripts = []
    for body in PROGRAMS:
        write, execute = Call("write_full_code", {"code": "def solve(t):\n" + body}), Call("execute_code", {})
        _, seen = bad.step(bad.reset(), write)
        messages = [*bad.messages(), call_message(0, "", write), tool_message(0, write.name, seen), call_message(1, "", execute)]
        scripts.append([chat.tokenize(tokenizer, messages)[0]])
    scripts.append([chat.tokenize(tokenizer, list(solve(task).messages))[0]])
    limits = dataclasses.replace(LIMITS, slots=len(scripts), max_turn_tokens=200, max_length=640)
    *done, other = run_scripts(limits, [*[bad] * len(PROGRAMS), task], *scripts)
    for program, run in zip(PROGRAMS, done, strict=True):
        assert (run.status, run.turns) == (TRUNCATED, 3) and PROGRAMS[program] in run.trajectory.messages[-1]["content"], program
    assert bad.blocking and other.status == FINISHED and not pathlib.Path("/tmp/a1jax-outside").exists()


def test_counts_of_several_runs_are_those_of_one():
    one = {"slot_steps": 60, "idle_share": 0.4, "sampled_tokens": 30, "engine_seconds": 2.0, "tokens_per_second": 15.0, "interruptions": 1}
    two = {"slot_steps": 90, "idle_share": 0.1, "sampled_tokens": 60, "engine_seconds": 1.0, "tokens_per_second": 60.0, "interruptions": 0}
    both = together([one, two])
    assert both == {**both, "slot_steps": 150, "sampled_tokens": 90, "engine_seconds": 3.0, "interruptions": 1}
    np.testing.assert_allclose([both["idle_share"], both["tokens_per_second"]], [0.25, 30.0])
