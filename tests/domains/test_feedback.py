"""Effective feedback: counts by hand on short lists of records, and real runs of experts, whole, cut short and in pieces."""

import dataclasses

import pytest

from a1jax.domains import DOMAINS, LongContext, Store, feedback, solve
from a1jax.domains.base import Call, Observation, record
from a1jax.domains.feedback import Feedback, effective
from a1jax.stages import evaluate
from a1jax.types import Record

QUESTION = "Find the grey fort, then follow 1 founder 2 ally end."


def call(name, text, **arguments):
    return record(Call(name, arguments), Observation(text, error=text.startswith("error")))


FOUND = call("search", "@Hulgor", query="the grey fort")
READ = call("read_page", "@Hulgor: king@Galdur founder@Belfil", title="@Hulgor")
WRONG = call("read_page", "error: no page '@Belfi'", title="@Belfi")
NEXT = call("read_page", "@Belfil: ally@Corfil", title="@Belfil")


@pytest.mark.parametrize(
    ("records", "answer", "counts"),
    [
        # search's answer is the argument of READ, a link of READ that of NEXT, a link of NEXT the answer
        ((FOUND, READ, NEXT), "@Corfil", (3, 3, 3, 3, 3)),
        ((FOUND, READ, NEXT), None, (3, 3, 3, 3, 2)),  # no answer: nothing uses the last page
        ((FOUND, READ, NEXT), "@Galdur", (3, 3, 3, 3, 2)),  # @Galdur stands in READ, which was used anyway
        ((FOUND, READ), "@Belfil", (2, 2, 2, 2, 2)),
        ((FOUND, READ, WRONG, NEXT), "@Corfil", (4, 3, 3, 3, 3)),  # a refusal is not valid, whatever it says
        ((FOUND, READ, READ, NEXT), "@Corfil", (4, 4, 4, 3, 3)),  # the same page again: informative, yet redundant
        ((FOUND,), "@Hulgor", (1, 1, 1, 1, 1)),
        ((), "@Hulgor", (0, 0, 0, 0, 0)),
        # "ok" is no word; "fort" was asked; what the call itself says is no news
        ((call("put", "ok", key="$fern"), call("search", "grey fort", query="x")), "$fern", (2, 2, 0, 0, 0)),
        ((call("search", "@Cor", query="@Cor"), call("read_page", "@Cor: nothing", title="@Cor")), "@Cor", (2, 2, 1, 1, 0)),
        # the page says nothing that was not said, yet puts it together anew
        ((READ, call("read_page", "@Galdur: king@Belfil", title="@Galdur")), "@Belfil", (2, 2, 2, 2, 2)),
        ((FOUND, Record(("@Hulgor",), None, None, "answer: wrong")), "@Hulgor", (1, 1, 1, 1, 1)),  # the verdict is no observation
        ((Record((), {"name": "submit", "arguments": {}}, None),), "done", (0, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_counts_by_hand(records, answer, counts):
    assert effective(records, QUESTION, answer) == Feedback(*counts)


def test_an_observation_is_used_where_a_later_record_refers_to_it():
    read = Record((), {"name": "open", "arguments": {"path": "a.py"}}, "def area(): return width")
    edit = Record(("observation:7",), {"name": "edit", "arguments": {"text": "x"}}, "fine")
    assert effective((read, edit), "", None, first=7).effective == 1
    assert effective((read, edit), "", None, first=6).effective == 0


def test_a_piece_counts_its_own_uses_alone():
    run = (FOUND, READ, NEXT)
    whole = effective(run, QUESTION, "@Corfil").effective
    pieces = [effective(run[:1], QUESTION), effective(run[1:], "", "@Corfil", first=1)]
    assert whole == 3 and [p.effective for p in pieces] == [0, 2]  # what search found is used in the next piece
    assert [effective(run[i : i + 1], QUESTION if i == 0 else "").effective for i in range(3)] == [0, 0, 0]


def test_the_share_is_over_the_demand():
    assert dataclasses.replace(Feedback(3, 3, 3, 3, 2), demand=4).share == 0.5
    assert dataclasses.replace(Feedback(9, 9, 9, 9, 9), demand=4).share == 1.0
    assert Feedback(0, 0, 0, 0, 0, demand=0).share == 1.0
    assert Feedback(1, 1, 1, 1, 1).share != Feedback(1, 1, 1, 1, 1).share  # nan


def test_words():
    assert feedback.words("@Hulgor-2: founder@Belfil is at#7, 4*5 m3 ok") == {"@hulgor-2", "founder", "@belfil", "#7", "4", "5", "m3"}
    assert feedback.words("10-4 2.5") == {"10", "4", "2.5"}
    assert feedback.facts("ok of@Bel") == {"ok", "of", "@bel", ("ok", "of"), ("of", "@bel")}


FAMILIES = {**DOMAINS, "store": Store(), "long_context": LongContext()}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_experts_share_is_1(name):
    for seed in range(3):
        task = FAMILIES[name].propose(seed, 3)
        assert feedback.of_run(task, solve(task)).share == 1.0


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_search_demands_its_pages_and_a_run_cut_short_has_the_share_of_them(seed, steps):
    """Every page and the search for the first are used: the next call or the answer names what they showed."""
    task = DOMAINS["search"].propose(seed, steps)
    run = solve(task)
    assert feedback.demand(task) == steps + 1
    for kept in range(steps + 1):  # calls made before it stopped without an answer: the last one's answer is never used
        cut = dataclasses.replace(run, records=run.records[:kept], messages=run.messages[: 1 + 2 * kept])
        assert feedback.of_run(task, cut).share == max(0, kept - 1) / (steps + 1)


@pytest.mark.parametrize("seed", range(6))
def test_tool_calls_demand_the_lookups_that_later_calls_use(seed):
    task = DOMAINS["tool_calling"].propose(seed, 4)
    run = solve(task)
    lookups = sum(bool(step.result) for step in task.plan)
    assert feedback.demand(task) == lookups == (1, 2, 1, 2, 2, 2)[seed]
    cut = dataclasses.replace(run, records=run.records[:1], messages=run.messages[:3])
    assert feedback.of_run(task, cut).share == (0.0 if feedback.demand(task) else 1.0)
    halves = [effective(run.records[:2], feedback.asked(run)), effective(run.records[2:], "", "done", first=2)]
    assert sum(half.effective for half in halves) <= feedback.demand(task)


def test_pieces_of_a_run_by_the_numbers_of_their_observations():
    """In search each observation is used by the turn right after it, so pieces of whole steps lose nothing."""
    task = DOMAINS["search"].propose(1, 3)
    run = solve(task)
    assert feedback.of_piece(run, range(4), True) == feedback.of_run(task, run) and feedback.of_piece(run, range(4), True).effective == 4
    assert [feedback.of_piece(run, [i], True).effective for i in range(4)] == [1, 1, 1, 1]
    assert feedback.of_piece(run, (1, 2), False).share == 0.5
    assert feedback.of_piece(run, (), True).share == 0.0
    store = solve(Store(reuse=0.0).propose(1, 3))  # get, put, get, put, ...: only the put right after a get uses it
    assert [feedback.of_piece(store, [i], True).effective for i in range(6)] == [1, 0, 1, 0, 1, 0]


def test_a_piece_that_ends_before_the_use_has_no_effect():
    task = next(t for t in (DOMAINS["tool_calling"].propose(seed, 6) for seed in range(50)) if _late(solve(t)))
    run = solve(task)
    each = sum(feedback.of_piece(run, [i], True).effective for i in range(len(run.records) - 1))
    assert each < feedback.demand(task)


def _late(run):
    """Whether some lookup is first used later than in the next call."""
    did = [r for r in run.records if r.action]
    texts = [set(r.action["arguments"].values()) for r in did]
    found = [r.observation.removeprefix(r.action["arguments"].get("person", "")) if r.observation != "ok" else None for r in did]
    return any(
        f and f not in after and any(f in t for t in texts[i + 2 :]) for i, (f, after) in enumerate(zip(found, texts[1:], strict=False))
    )


def test_a_refusal_is_told_as_the_evaluation_tells_it():
    assert feedback.REFUSED == evaluate.REFUSED and WRONG.outcome == feedback.REFUSED
