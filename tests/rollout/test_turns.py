"""Turns of a run without a model: any string is answered, a turn taken back leaves no trace."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a1jax.domains import DOMAINS, solve
from a1jax.rollout import turns
from a1jax.types import FINISHED, TRUNCATED

TASKS = {name: family.propose(1, 1) for name, family in DOMAINS.items()}
TOOLS = sorted({tool["function"]["name"] for task in TASKS.values() for tool in task.tools})
PIECES = [*"<think> </think> <tool_call> </tool_call> <|im_end|> @Belado".split(), "\n", '{"name": "', '", "arguments": {', "}", '"a": 1']


def begun(task, forced=False):
    run = turns.Run(0, 0, task, task.reset(), list(task.messages()), [], forced=forced)
    run.begin_turn(9)
    return run


def call(name, arguments="{}"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


STRINGS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=10).map("".join),
    st.builds(call, st.sampled_from(TOOLS), st.sampled_from(["{}", '{"query": 3}', '{"title": "\\ud800"}', '{"key": []}', "[]", "{"])),
)


@pytest.mark.parametrize("name", sorted(TASKS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(text=STRINGS)
def test_every_domain_answers_any_string(name, text):
    run = begun(TASKS[name])
    before = len(run.messages)
    verdict, wrong = turns.act(run, text)
    assert run.messages[before]["role"] == "assistant" and wrong >= 0
    if verdict is None:
        assert len(run.messages) > before + 1 and all(m["role"] in ("tool", "user") for m in run.messages[before + 1 :])
    else:
        assert verdict.status in ("FINISHED", "FAILED") and verdict.records[-1].outcome


def test_a_turn_taken_back_leaves_no_trace():
    task = TASKS["search"]
    run = begun(task)
    start = (run.state, list(run.messages))
    for end in (20, 40):
        turns.act(run, call("read_page", '{"title": "@Belado"}'))
        if end == 20:
            first = (run.state, list(run.messages), list(run.records))
            run.begin_turn(end)
    assert len(run.state) == 2 and len(run.records) == 2
    asked = run.taken_back("Answer now.")
    assert (asked.state, asked.messages, asked.records) == (first[0], [*first[1], {"role": "user", "content": "Answer now."}], first[2])
    assert (asked.turns, asked.end, asked.start, asked.forced) == (1, 9, 2, True) and run.turns == 2 and len(run.records) == 2
    once = begun(task)
    turns.act(once, call("read_page", '{"title": "@Belado"}'))
    asked = once.taken_back("Answer now.")
    assert (asked.state, asked.messages[:-1], asked.records, asked.end) == (*start, [], 0)


@pytest.mark.parametrize("text", [call("read_page", '{"title": "@Belado"}'), "<think>open"])
def test_a_forced_turn_may_only_answer(text):
    run = begun(TASKS["search"], forced=True)
    verdict, _ = turns.act(run, text)
    assert verdict.status == TRUNCATED and verdict.metadata == {"forced": True}
    assert len(verdict.messages) == 2 and not verdict.records  # nothing was run, nothing came back


def test_a_forced_answer_goes_to_the_verifier():
    task = TASKS["search"]
    done = solve(task)
    run = begun(task, forced=True)
    run.records = list(done.records[:-1])
    verdict, wrong = turns.act(run, task.answer)
    assert (verdict.status, verdict.reward, wrong) == (FINISHED, 1.0, 0) and verdict.metadata["forced"] is True
    assert dataclasses.replace(verdict, metadata={}).messages[-1]["content"] == task.answer
