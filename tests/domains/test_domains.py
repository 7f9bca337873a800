"""Every embedded domain: experts are accepted, bad runs are refused for their reason, held-out tasks share nothing with training."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains import QUICKSTART, Call, Store, solve
from a1jax.domains.base import Observation, consulted, fingerprint, in_split, judge
from a1jax.domains.search import Graph, Search, title
from a1jax.types import FAILED, FINISHED

NAMES = sorted(QUICKSTART)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7, 40, 120])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_at_every_length(name, steps, split):
    task = QUICKSTART[name].propose(11, steps, split)
    run = solve(task)
    assert (run.status, run.reward) == (FINISHED, 1.0)
    assert len(task.chain) == steps == task.steps
    assert set(task.evidence) <= consulted(run)
    calls = [r for r in run.records if r.action]
    assert steps <= len(calls) <= 2 * steps + 1 and not any(r.outcome for r in calls)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_task_and_run(name):
    one, two = QUICKSTART[name].propose(5, 4), QUICKSTART[name].propose(5, 4)
    assert one == two and solve(one) == solve(two)
    assert fingerprint([one]) != fingerprint([QUICKSTART[name].propose(6, 4)])


@pytest.mark.parametrize("name", NAMES)
def test_heldout_shares_no_link_of_a_chain_with_training(name):
    train = {pair for seed in range(150) for pair in QUICKSTART[name].propose(seed, 1 + seed % 9, "train").chain}
    heldout = {pair for seed in range(150) for pair in QUICKSTART[name].propose(seed, 1 + seed % 9, "heldout").chain}
    assert len(train) > 300 and len(heldout) > 150 and not train & heldout
    assert all(in_split(a, b, "heldout") for a, b in heldout)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_is_no_task(name):
    with pytest.raises(ConfigError, match="at least 1 step"):
        QUICKSTART[name].propose(0, 0)


def edited(run, **changes):
    return dataclasses.replace(run, status=None, reward=None, records=run.records[:-1], **changes)


def test_search_refuses_wrong_missing_and_unread_answers():
    task = QUICKSTART["search"].propose(3, 3)
    run = solve(task)
    wrong = (*run.messages[:-1], {"role": "assistant", "content": "@Nobody"})
    assert task.verify(edited(run, messages=wrong)).reason == "answer: wrong"
    assert task.verify(edited(run, messages=run.messages[:-1])).reason == "answer: none given"
    guess = dataclasses.replace(run, messages=(run.messages[0], run.messages[-1]), records=())
    assert task.verify(guess).reason.startswith("evidence:")  # right, but never looked up
    judged = judge(task, guess)
    assert (judged.status, judged.reward) == (FAILED, 0.0) and judged.records[-1].outcome.startswith("evidence:")


def test_search_graph_links_follow_the_split_and_descriptions_are_unique():
    for split in ("train", "heldout"):
        graph = Graph(seed=9, size=320, degree=3, split=split)
        assert len({graph.description(i) for i in range(320)}) == 320
        assert all(in_split(title(i), title(j), split) for i in range(64) for j in graph.links(i).values())


def test_tool_calling_refuses_a_wrong_state_and_a_lucky_one():
    task = QUICKSTART["tool_calling"].propose(3, 3)
    run = solve(task)
    without = tuple(r for i, r in enumerate(run.records[:-1]) if i != 1)  # the first put never happened
    assert task.verify(dataclasses.replace(run, records=without)).reason.startswith("state:")
    blind = tuple(r for r in run.records[:-1] if r.action["name"] == "put")  # right values, never looked at
    assert task.verify(dataclasses.replace(run, records=blind)).reason.startswith("evidence:")


def test_tool_calling_chains_through_cells_written_before():
    chained = [QUICKSTART["tool_calling"].propose(seed, 6) for seed in range(30)]
    share = [sum(s in {t for _, t in task.operations[:i]} for i, (s, _) in enumerate(task.operations)) / 6 for task in chained]
    assert 0.2 < sum(share) / len(share) < 0.7
    assert not any(
        s in {t for _, t in task.operations[:i]} for task in [Store(reuse=0.0).propose(1, 6)] for i, (s, _) in enumerate(task.operations)
    )


@pytest.mark.parametrize(
    ("name", "call", "text"),
    [
        ("search", Call("fly", {}), "error: no tool 'fly'; tools are read_page, search"),
        ("search", Call("read_page", {}), "error: read_page needs argument 'title'"),
        ("search", Call("read_page", {"title": "@Nobody"}), "error: no page '@Nobody'"),
        ("search", Call("search", {"query": 3}), "error: search: argument 'query' must be a string"),
        ("search", Call("search", {"query": "the pink car"}), "error: nothing found for 'the pink car'"),
        ("tool_calling", Call("get", {"key": "$nothing"}), "error: no cell '$nothing'"),
        ("tool_calling", Call("get", {"key": "$fern", "x": 1}), "error: get has no argument 'x'; it takes key"),
    ],
)
def test_wrong_calls_get_a_clear_error_and_change_nothing(name, call, text):
    task = QUICKSTART[name].propose(1, 2)
    before = task.reset()
    assert task.step(before, call) == (before, Observation(text, error=True))


def test_put_checks_the_type_of_its_value():
    task = QUICKSTART["tool_calling"].propose(1, 2)
    key = task.operations[0][1]
    state, seen = task.step(task.reset(), Call("put", {"key": key, "value": "seven"}))
    assert seen.error and "must be '#' and a number" in seen.text and state == task.reset()
    state, seen = task.step(state, Call("put", {"key": key, "value": "#7"}))
    assert seen.text == "ok" and state[key] == "#7" and task.reset()[key] == dict(task.store)[key]


json_values = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    tool=st.sampled_from(["get", "put", "search", "read_page"]) | st.text(),
    arguments=st.dictionaries(st.sampled_from(["key", "value", "title", "query"]) | st.text(), json_values),
)
def test_tools_answer_whatever_they_are_asked(name, tool, arguments):
    task = QUICKSTART[name].propose(1, 2)
    state, seen = task.step(task.reset(), Call(tool, arguments))
    assert isinstance(seen.text, str)
    assert not seen.error or state == task.reset()


def test_knobs_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="search.degree"):
        Search(degree=0)
    with pytest.raises(ConfigError, match="reuse"):
        Store(reuse=1.5)
