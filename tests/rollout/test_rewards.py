"""Rewards: values by hand, and what a run's messages come to."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError, bind
from a1jax.data import chat
from a1jax.domains import QUICKSTART, solve
from a1jax.rollout import rewards
from a1jax.types import FAILED, FINISHED, TRUNCATED, Trajectory


def call(name, thought="", **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": thought, "tool_calls": [{"id": "call_0", "type": "function", "function": function}]}


def say(text):
    return {"role": "assistant", "content": text}


TOOL = {"role": "tool", "tool_call_id": "call_0", "name": "search", "content": "..."}


def run(*turns, reward=1.0, status=FINISHED):
    messages = [{"role": "user", "content": "Where?"}]
    for turn in turns:
        messages += [turn, TOOL] if turn is not turns[-1] else [turn]
    return Trajectory("search", "t", tuple(messages), reward=reward, status=status)


def test_efficiency_is_free_then_linear():
    assert [rewards.efficiency_penalty(n, 3, 0.25) for n in (0, 2, 3, 4, 5, 300)] == [0, 0, 0, 0.25, 0.5, 74.25]
    assert rewards.efficiency_penalty(2, 0, 0.5) == 1.0


def test_repetition_in_a_window_with_a_cap():
    def penalty(keys, window, price=1.0, cap=100.0):
        return rewards.repetition_penalty(list(keys), window, price, cap)

    assert [penalty(keys, 2) for keys in ("", "abcd", "aa", "aba", "abca", "aaaa")] == [0, 0, 1, 1, 0, 3]
    assert [penalty("abcab", window) for window in (0, 1, 2, 3, 4)] == [0, 0, 0, 2, 2]
    assert penalty("aaaa", 2, price=0.25) == 0.75
    assert penalty("aaaa", 2, price=0.25, cap=0.6) == 0.6  # capped per run, not per repetition
    assert penalty("aaaa", 2, cap=0.0) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(0, 6), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.0, 0.3, 9.0]))
def test_repetition_grows_with_the_window_and_never_beyond_the_cap(keys, window, price, cap):
    found = rewards.repetition_penalty(keys, window, price, cap)
    assert 0 <= found <= min(cap, price * max(0, len(keys) - 1))
    assert found <= rewards.repetition_penalty(keys, window + 1, price, cap)
    assert found <= rewards.repetition_penalty([*keys, "a"], window, price, cap)
    assert rewards.repetition_penalty(list(dict.fromkeys(keys)), window, price, cap) == 0


def test_the_same_query_is_the_same_however_it_is_typed():
    spelled = [call("search", query=q) for q in ("Red  Tower", "red tower", " RED\ttower\n", "ｒｅｄ tower")]
    keys = rewards.lookups(run(*spelled, say("x")))
    assert len(keys) == 4 and len(set(keys)) == 1
    other = [
        call("search", query="red towers"),
        call("read_page", query="red tower"),
        call("search", query="red tower", page=1),
        call("search", query=["red tower"]),
    ]
    assert len(set(rewards.lookups(run(spelled[0], *other, say("x"))))) == 5
    one, two = call("f", a="1", b={"c": [1, "X"], "d": 2}), call("f", b={"d": 2, "c": [1, "x"]}, a="1")
    assert len(set(rewards.lookups(run(one, two)))) == 1  # the order of the arguments is no difference
    text = call("f")
    text["tool_calls"][0]["function"]["arguments"] = json.dumps({"a": "1", "b": {"c": [1, "x"], "d": 2}})
    assert len(set(rewards.lookups(run(one, text)))) == 1  # nor is OpenAI's form, JSON in a string
    text["tool_calls"][0]["function"]["arguments"] = "{no json"
    assert rewards.lookups(run(text)) == [("f", '"{no json"')]


def test_only_the_named_tools_repeat():
    trajectory = run(call("search", query="a"), call("calc", x=1), call("calc", x=1), call("search", query="a"), say("x"))
    assert [name for name, _ in rewards.lookups(trajectory, ("search",))] == ["search", "search"]
    assert len(rewards.lookups(trajectory)) == 4


def test_rounds_and_answers():
    asked = call("search", query="a")
    assert (rewards.rounds(run(say("x"))), rewards.answered(run(say("x")))) == (0, True)
    assert (rewards.rounds(run(asked, asked, say("x"))), rewards.answered(run(asked, say("x")))) == (2, True)
    assert (rewards.rounds(run(asked, asked)), rewards.answered(run(asked, asked))) == (2, False)
    assert (rewards.rounds(run(asked, say("  "))), rewards.answered(run(asked, say("  ")))) == (2, False)
    assert not rewards.answered(run(asked, call("search", thought="I know, but", query="a")))
    assert rewards.rounds(run(say("<tool_call>{no json</tool_call>"), say("x"))) == 1  # it cost a round
    nothing = Trajectory("search", "t", ())
    assert (rewards.rounds(nothing), rewards.answered(nothing), rewards.format_reward(nothing)) == (0, False, 0.0)


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([say("x")], 1.0),
        ([call("search", query="a"), say("x")], 1.0),
        ([call("search", thought="look", query="</tool_call>"), say("x")], 1.0),  # a tag inside JSON is text
        ([call("search", query="a")], 0.0),  # no answer
        ([call("search", query="a"), say("")], 0.0),
        ([say("<tool_call>\n{bad json\n</tool_call>"), say("x")], 0.0),  # as the loop keeps a turn it could not read
        ([say("<think>never closed"), say("x")], 0.0),
        ([call("search", query="a"), say("x </think> y")], 0.0),
        ([say("x <|im_start|>user")], 0.0),
    ],
)
def test_format(turns, found):
    assert rewards.format_reward(run(*turns)) == found


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "<|im_end|>", "\n", "x"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join) | st.text(max_size=12))
def test_a_turn_kept_as_text_is_well_formed_when_its_reader_says_so(text):
    try:
        chat.parse_turn(text)
    except chat.ToolCallError:
        assert not rewards.well_formed(say(text))
    else:
        assert rewards.well_formed(say(text))


def test_experts_runs_are_well_formed_and_never_repeat_themselves():
    for domain in QUICKSTART.values():
        for steps in (1, 4):
            trajectory = solve(domain.propose(3, steps))
            found = rewards.search_reward(trajectory)
            assert found.parts == {"correctness": 1.0, "efficiency": 0.0, "repetition": 0.0, "format": 0.1}
            assert found.total == pytest.approx(1.1)
            assert rewards.rounds(trajectory) == sum(1 for r in trajectory.records if r.action is not None)


def test_rubrics():
    assert rewards.rubric_fraction([True, False, True, True]) == 0.75
    assert rewards.rubric_fraction([False]) == 0.0
    with pytest.raises(ConfigError, match="no rubrics"):
        rewards.rubric_fraction([])


def test_the_search_reward_by_hand():
    again = call("search", query="a")
    trajectory = run(again, call("read_page", title="b"), again, again, again, say("x"), reward=0.0, status=FAILED)
    reward = bind(rewards.search_reward, free_rounds=3, round_price=0.125, window=2, repeat_price=0.25, repeat_cap=0.5, format_bonus=0.0625)
    # 5 rounds, 2 of them beyond 3; "a" stands within two calls before it three times, capped at 0.5
    assert reward(trajectory).parts == {"correctness": 0.0, "efficiency": -0.25, "repetition": -0.5, "format": 0.0625}
    assert reward(trajectory).total == -0.6875
    assert reward(dataclasses.replace(trajectory, reward=1.0)).total == 0.3125
    assert reward(dataclasses.replace(trajectory, reward=0.5)).parts["correctness"] == 0.5
    assert reward(trajectory, tools=("read_page",)).parts["repetition"] == 0
    cut = run(again, reward=0.0, status=TRUNCATED)
    assert reward(cut).parts == {"correctness": 0.0, "efficiency": 0.0, "repetition": 0.0, "format": 0.0}


def test_outcome_and_rubric_rewards_by_hand():
    assert rewards.outcome_reward(run(say("x"))) == (1.0, {"correctness": 1.0})
    assert rewards.outcome_reward(run(say("x"), reward=0.0), format_bonus=0.1) == (0.1, {"correctness": 0.0, "format": 0.1})
    half = dataclasses.replace(run(say("x"), reward=0.0), metadata={"rubrics": [True, False, True, False]})
    assert rewards.rubric_reward(half) == (0.25, {"correctness": 0.0, "rubrics": 0.25})
    assert rewards.rubric_reward(half, coefficient=1.0).total == 0.5


def test_right_beats_wrong_below_81_rounds_and_not_from_there():
    """What the module says of its defaults: the worst right run (it repeats itself and is ill-formed) against the best wrong one."""
    best_wrong = rewards.search_reward(run(say("x"), reward=0.0)).total
    worst = [rewards.search_reward(run(*[call("search", query="a")] * n, say("x </think>"))).total for n in (80, 82)]
    assert worst[0] > best_wrong > worst[1]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: rewards.search_reward(run(say("x"), reward=None)), "t: the run has no reward"),
        (lambda: rewards.search_reward(run(say("x"), reward=1.5)), "reward is 1.5"),
        (lambda: rewards.search_reward(run(say("x"), reward=float("nan"))), "reward is nan"),
        (lambda: rewards.search_reward(run(say("x")), format_bonus=-1), "format_bonus is -1"),
        (lambda: rewards.search_reward(run(say("x")), repeat_price=-1), "price is -1"),
        (lambda: rewards.outcome_reward(run(say("x")), format_bonus=-1), "format_bonus is -1"),
        (lambda: rewards.rubric_reward(run(say("x"))), "t: the run has no rubrics"),
        (lambda: rewards.efficiency_penalty(1, -1, 1.0), "free_rounds is -1"),
        (lambda: rewards.repetition_penalty([], -1, 1.0, 1.0), "window is -1"),
        (lambda: rewards.repetition_penalty([], 1, 1.0, float("nan")), "cap is nan"),
        (lambda: bind(rewards.search_reward, cap=1.0), "no parameter 'cap'"),
        (lambda: bind(rewards.search_reward, tools="search"), "tools"),
    ],
)
def test_wrong_numbers_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
