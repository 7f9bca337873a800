"""General agentic: experts accepted, every kind of failure named, the user tells only what is asked, nothing a run says raises."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains import Call, solve
from a1jax.domains import general_policy as policies
from a1jax.domains import general_user as users
from a1jax.domains.acceptance import play
from a1jax.domains.base import SAY, Turn, consulted, fingerprint, in_split, judge, record, was_said
from a1jax.domains.general import General, GeneralTask
from a1jax.domains.general_policy import CLOSINGS, DONE, KEPT, REFUSED, Order, Policy
from a1jax.domains.general_user import Wish
from a1jax.types import FAILED, FINISHED, Record, Trajectory

DOMAIN = General()
POLICY = Policy((("open", "packed"), ("open", "sent"), ("lost", "cancelled")), ("cancel",))
FERN, IRIS, ROSE = Order("@Ann", "open", "#1"), Order("@Bob", "open", "#2"), Order("@Ann", "lost", "#3")
WISHES = (
    Wish("@Ann", "#7", True, True, "change", "$fern", "#9", True, DONE, Order("@Ann", "open", "#9")),
    Wish("@Ann", "#7", True, False, "cancel", "$fern", "", True, DONE, Order("@Ann", "cancelled", "#9")),
    Wish("@Ann", "#7", True, False, "change", "$fern", "#5", True, REFUSED["state"], Order("@Ann", "cancelled", "#9")),
    Wish("@Ann", "#7", True, False, "refund", "$iris", "", True, REFUSED["owner"], IRIS),
    Wish("@Bob", "#9", False, True, "cancel", "$iris", "", True, REFUSED["identity"], IRIS),
    Wish("@Bob", "#8", True, True, "cancel", "$iris", "", False, KEPT, IRIS),
)
ORDERS = (("$fern", FERN), ("$iris", IRIS), ("$rose", ROSE), ("$sage", Order("@Ann", "open", "#4")))
CHAIN = tuple((w.caller, w.order) for w in WISHES)
TASK = GeneralTask(
    "general", "by-hand", 6, "", KEPT, ("$fern", "$iris", "@Bob"), CHAIN, POLICY, (("@Ann", "#7"), ("@Bob", "#8")), ORDERS, WISHES
)
SHOW, VERIFY = Call("show", {"order": "$fern"}), Call("verify", {"customer": "@Ann", "code": "#7"})
CHANGE, CANCEL = Call("change", {"order": "$fern", "value": "#9"}), Call("cancel", {"order": "$fern"})
SURE = "Please confirm: cancel$fern"
FIRST_TWO = (VERIFY, SHOW, CHANGE, DONE, SURE, CANCEL, DONE)
ALL = (
    *FIRST_TWO,
    REFUSED["state"],
    Call("show", {"order": "$iris"}),
    REFUSED["owner"],
    Call("verify", {"customer": "@Bob", "code": "#9"}),
    REFUSED["identity"],
    Call("verify", {"customer": "@Bob", "code": "#8"}),
    "Please confirm: cancel$iris",
    KEPT,
)


def run(*turns, task=TASK):
    """The trajectory of these calls and texts in the real environment; the last text is the final message."""
    state, records, last = task.reset(), [], {"role": "tool", "content": ""}
    for turn in turns:
        if isinstance(turn, str):
            state, _ = task.reply(state, turn)
            records.append(Record((), {"name": SAY, "arguments": {"text": turn}}))
            last = {"role": "assistant", "content": turn}
        else:
            state, seen = task.step(state, turn)
            records.append(record(turn, seen))
            last = {"role": "tool", "content": ""}
    answered = last["role"] == "assistant"
    return Trajectory("general", task.task_id, (*task.messages(), last), task.tools, tuple(records[:-1] if answered else records))


def reason(*turns):
    outcome = TASK.verify(run(*turns))
    assert outcome.reward == float(outcome.accepted)
    return outcome.reason


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 120])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_at_every_length(steps, split):
    for seed in range(12 if steps < 40 else 1):
        task = DOMAIN.propose(seed, steps, split)
        done = solve(task)
        assert (done.status, done.reward, len(task.chain), task.steps) == (FINISHED, 1.0, steps, steps)
        assert task.rubrics(done) == (True,) * steps and set(task.evidence) <= consulted(done)
        assert done.messages[-1]["content"] == task.answer and not any(r.outcome for r in done.records[:-1])
        assert steps <= sum(m["role"] == "assistant" for m in done.messages) <= 8 * steps


def test_the_hand_made_task_has_the_expert_that_its_policy_wants():
    done = solve(TASK)
    assert done.status == FINISHED and reason(*ALL) == "state, policy and evidence: accepted"
    said = [m["content"] for m in done.messages if m["role"] == "assistant" and not m.get("tool_calls")]
    assert [s for s in said if s in CLOSINGS] == [w.closing for w in WISHES]
    acts = [(r.action["name"], r.action["arguments"]) for r in done.records[:-1] if r.action["name"] in policies.KINDS]
    assert acts == [("change", {"order": "$fern", "value": "#9"}), ("cancel", {"order": "$fern"})]


def test_same_seed_same_task_and_splits_share_no_pair():
    assert DOMAIN.propose(5, 4) == DOMAIN.propose(5, 4) and solve(DOMAIN.propose(5, 4)) == solve(DOMAIN.propose(5, 4))
    assert fingerprint([DOMAIN.propose(5, 4)]) != fingerprint([DOMAIN.propose(6, 4)])
    train = {pair for seed in range(150) for pair in DOMAIN.propose(seed, 1 + seed % 9, "train").chain}
    heldout = {pair for seed in range(150) for pair in DOMAIN.propose(seed, 1 + seed % 9, "heldout").chain}
    assert len(train) > 300 and len(heldout) > 150 and not train & heldout
    assert all(in_split(*pair, "heldout") for pair in heldout) and all(in_split(*pair, "train") for pair in train)


def test_policies_vary_every_end_comes_up_and_later_wishes_meet_changed_orders():
    tasks = [DOMAIN.propose(seed, 6) for seed in range(100)]
    assert len({t.policy for t in tasks}) > 80
    wishes = [w for t in tasks for w in t.wishes]
    assert all(sum(w.closing == c for w in wishes) > 20 for c in CLOSINGS)
    assert 0.3 < sum(w.closing in REFUSED.values() for w in wishes) / 600 < 0.5
    changed = [w for t in tasks for i, w in enumerate(t.wishes) if w.order in {v.order for v in t.wishes[:i] if v.closing == DONE}]
    assert len(changed) > 40 and {w.closing for w in changed} >= {DONE, REFUSED["state"]}
    assert not any(w.closing in REFUSED.values() for seed in range(30) for w in General(refused=0.0, reuse=0.0).propose(seed, 5).wishes)


def test_bad_knobs_are_refused():
    with pytest.raises(ConfigError, match="at least 1 step"):
        DOMAIN.propose(0, 0)
    for knobs in ({"reuse": 1.5}, {"refused": -0.1}, {"callers": 2.0}, {"patience": 0}):
        with pytest.raises(ConfigError, match=f"general.{next(iter(knobs))}"):
            General(**knobs)


def test_the_user_tells_what_is_asked_and_nothing_else():
    state, opening = TASK.reset(), TASK.messages()[1]["content"]
    assert opening == "A new caller wants to change an order." and "$fern" not in TASK.messages()[0]["content"]
    for text, told in (
        ("Hello!", "I do not understand."),
        ("Could you tell me your NAME and code, please", "@Ann#7"),
        (users.WHICH, "$fern"),
        (users.WHERE, "#9"),
    ):
        state, seen = TASK.reply(state, text)
        assert seen.text == told and not seen.error
    assert TASK.reply(TASK.reset(), "Who is calling about which order, and what value?")[1].text == "@Ann#7 $fern #9"
    state, seen = TASK.reply(state, "done, anything else?")
    assert seen.text == "The caller also wants to cancel an order."
    assert TASK.reply(state, users.WHERE)[1].text == users.PARDON  # a cancelled order has no new value
    state, _ = TASK.reply(dataclasses.replace(state, wish=4), "Refused: identity.")
    assert (state.wish, state.told, state.checked) == (5, frozenset(), False)  # the next caller starts anew


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Please confirm: cancel$fern", users.YES),
        ("Shall I cancel order $fern? Please confirm.", users.YES),
        ("Please confirm: refund$fern", users.WRONG),
        ("Please confirm: cancel$iris", users.WRONG),
        ("Please confirm: cancel$fern and $iris", users.WRONG),
        ("Please confirm: cancel$fern to#3", users.WRONG),
        ("Please confirm.", users.PARDON),
    ],
)
def test_a_confirmation_must_name_what_is_wanted_and_no_more(text, told):
    state = dataclasses.replace(TASK.reset(), wish=1)
    state, seen = TASK.reply(state, text)
    assert seen.text == told and ("confirmed" in state.told) == (told == users.YES)
    declined, seen = TASK.reply(dataclasses.replace(state, wish=5), "Please confirm: cancel$iris")
    assert seen.text == users.NO and "declined" in declined.told


def test_the_user_hangs_up_after_useless_turns_of_one_wish():
    state, seen = TASK.reply(TASK.reset(), users.WHO)
    for _ in range(2):  # asked again: told again, but useless
        state, seen = TASK.reply(state, users.WHO)
        assert seen.text == "@Ann#7"
    assert TASK.reply(state, users.WHICH)[1].text == "$fern"  # a useful turn costs nothing
    state, seen = TASK.reply(state, "er")
    assert seen is None and state.hung_up and TASK.reply(state, DONE) == (state, None)
    assert TASK.step(state, SHOW)[1].error
    assert reason("er", "er", "er") == "user: hung up on wish 1"
    assert reason("er", "er", *FIRST_TWO, "er", "er", *ALL[len(FIRST_TWO) :]).endswith("accepted")  # counted anew in each wish
    assert TASK.rubrics(run(*FIRST_TWO, "er", "er", "er")) == (True, True, False, False, False, False)


def test_each_kind_of_failure_has_its_reason():
    assert reason(*ALL[:-1], Call("show", {"order": "$iris"})) == "answer: none given"
    assert reason(*FIRST_TWO) == "user: still waits for wish 3"
    assert reason(VERIFY, SHOW, DONE, *ALL[4:]) == "state: $fern of@Ann is open at#1 after wish 1, should be $fern of@Ann is open at#9"
    assert reason(*FIRST_TWO, REFUSED["owner"], *ALL[8:]) == "answer: wish 3 was closed with 'Refused: owner.', should be 'Refused: state.'"
    assert reason(*(t for t in ALL if t != SHOW)) == "evidence: $fern was never looked up, wish 1"
    blind = [t for t in ALL if t != Call("verify", {"customer": "@Bob", "code": "#9"})]
    assert reason(*blind) == "evidence: @Bob was never looked up, wish 5"
    other = Call("refund", {"order": "$rose"})  # the caller's own, in a listed state, but nobody wished it
    assert reason(VERIFY, other, *ALL[1:]) == "state: $rose of@Ann is refunded at#3 in the end, should be $rose of@Ann is lost at#3"


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ((CHANGE,), "change $fern before the caller was verified, wish 1"),
        ((SHOW,), "show $fern before the caller was verified, wish 1"),
        ((Call("verify", {"customer": "@Bob", "code": "#8"}), SHOW), "show $fern before the caller was verified, wish 1"),
        ((Call("verify", {"customer": "@Ann", "code": "#1"}), SHOW), "show $fern before the caller was verified, wish 1"),
        ((VERIFY, SHOW, Call("cancel", {"order": "$iris"})), "cancel $iris, which is not the caller's own, wish 1"),
        ((VERIFY, SHOW, Call("cancel", {"order": "$rose"})), "cancel $rose, which is lost, wish 1"),
        ((VERIFY, SHOW, CHANGE, DONE, CANCEL), "cancel $fern without a confirmation, wish 2"),
        ((VERIFY, SHOW, CHANGE, DONE, SURE, Call("cancel", {"order": "$sage"})), "cancel $sage without a confirmation, wish 2"),
        ((*FIRST_TWO, Call("change", {"order": "$fern", "value": "#5"})), "change $fern, which is cancelled, wish 3"),
        ((*ALL[:10], VERIFY, Call("show", {"order": "$iris"})), "show $iris before the caller was verified, wish 5"),
        ((*ALL[:10], ALL[12], Call("show", {"order": "$iris"})), "show $iris before the caller was verified, wish 5"),
        ((*ALL[:11], Call("show", {"order": "$iris"})), "show $iris before the caller was verified, wish 5"),
        ((*ALL[:14], Call("cancel", {"order": "$iris"})), "cancel $iris without a confirmation, wish 6"),
    ],
)
def test_a_call_against_the_policy_is_never_forgiven(turns, why):
    assert reason(*turns, "x") == f"policy: {why}"
    wish = int(why.split()[-1]) - 1
    assert not TASK.rubrics(run(*turns, *ALL[len(turns) :]))[wish]
    judged = judge(TASK, run(*turns, "x"))
    assert judged.status == FAILED and judged.records[-1].outcome == f"policy: {why}" and judged.metadata["rubrics"][wish] is False


def test_a_violation_is_not_undone_by_the_right_state():
    early = (CHANGE, *ALL)  # the change comes before the check, and then once more in order
    assert reason(*early) == "policy: change $fern before the caller was verified, wish 1"
    assert TASK.rubrics(run(*early)) == (False, True, True, True, True, True)


def test_a_tool_call_named_like_a_saying_says_nothing():
    """A model may write a call of any name: replayed as a saying, it would confirm or close a wish that no caller heard of."""
    for said in ({"text": SURE}, {"text": DONE}, {"text": 5}, {}):
        call = Call(SAY, said)
        judged = play(TASK, [Turn("", call), *(Turn("", t) if isinstance(t, Call) else Turn("", answer=t) for t in ALL)])
        assert judged.status == FINISHED and not was_said(judged.records[0]) and was_said(judged.records[4])
    turns = [Call(SAY, {"text": SURE}) if t == SURE else t for t in ALL]
    judged = play(TASK, [Turn("", t) if isinstance(t, Call) else Turn("", answer=t) for t in turns])
    assert judged.records[-1].outcome == "policy: cancel $fern without a confirmation, wish 2"


def test_policy_text_says_what_the_policy_checks():
    text = POLICY.text()
    assert text.endswith(" change if open or packed. cancel if open or sent. refund if lost or cancelled. Confirm first: cancel.")
    assert all(c in text for c in CLOSINGS)
    assert policies.read(FERN.text("$fern")) == ("$fern", FERN) and FERN.text("$fern") == "$fern of@Ann is open at#1"
    assert [POLICY.refusal("change", o, "@Ann", True) for o in (FERN, IRIS, ROSE)] == [None, "owner", "state"]
    assert POLICY.refusal("change", IRIS, "@Ann", False) == "identity"
    lists = policies.phrases()
    for policy in (policies.draw(np.random.default_rng(i)) for i in range(50)):
        rules = policy.text().removeprefix(policies.HEAD)
        assert all(f"{policy.listed(kind)}." in rules and any(policy.listed(kind).endswith(p) for p in lists) for kind in policies.KINDS)


def test_a_call_leaves_the_state_it_was_given_as_it_was():
    first = TASK.reset()
    second, _ = TASK.step(first, CHANGE)
    third, seen = TASK.step(second, CANCEL)
    assert seen.text == "ok" and third.orders["$fern"] == Order("@Ann", "cancelled", "#9")
    assert first.orders == dict(ORDERS) and second.orders == {**dict(ORDERS), "$fern": Order("@Ann", "open", "#9")}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (Call("fly", {}), "error: no tool 'fly'; tools are cancel, change, refund, show, verify"),
        (Call("show", {"order": "$gone"}), "error: no order '$gone'"),
        (Call("verify", {"customer": "@Zed", "code": "#1"}), "error: no customer '@Zed'"),
        (Call("change", {"order": "$fern", "value": "nine"}), "error: change: value must be '#' and a number, got 'nine'"),
        (Call("cancel", {"order": 3}), "error: cancel: argument 'order' must be a string"),
    ],
)
def test_wrong_calls_get_a_clear_error_and_change_nothing(call, text):
    state, seen = TASK.step(TASK.reset(), call)
    assert (seen.text, seen.error, state) == (text, True, TASK.reset())


words = st.sampled_from(
    ["confirm", "who", "order", "value", "cancel", "change", "$fern", "#9", "@Ann", "#7", *CLOSINGS, "$", "#", "(", "\\"]
)
texts = st.text(max_size=30) | st.lists(words | st.text(max_size=4), max_size=6).map(" ".join)
json_values = words | st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
calls = st.builds(
    Call,
    st.sampled_from(["verify", "show", "change", "cancel", "refund", SAY]) | st.text(),
    st.dictionaries(st.sampled_from(["customer", "code", "order", "value", "text"]) | st.text(), json_values, max_size=3),
)


@settings(max_examples=120, deadline=None)
@given(turns=st.lists(calls | texts, max_size=12))
def test_tools_and_user_answer_whatever_comes_and_the_verifier_judges_it(turns):
    state = TASK.reset()
    for turn in turns:
        before = state
        state, seen = TASK.reply(state, turn) if isinstance(turn, str) else TASK.step(state, turn)
        assert seen is None or isinstance(seen.text, str)
        assert seen is None or not seen.error or state == before
    judged = judge(TASK, run(*turns))
    assert judged.status == FAILED and len(judged.metadata["rubrics"]) == 6 and "\n" not in judged.records[-1].outcome
    assert TASK.reset().orders == dict(ORDERS)


def test_a_wish_is_kept_only_after_the_caller_was_asked_to_confirm():
    found = 0
    for seed in range(200):
        task = General().propose(seed, 1)
        if task.wishes[0].closing != "Kept.":
            continue
        run, found = solve(task), found + 1
        asked = [r for r in run.records if r.action and r.action["name"] == SAY and "confirm" in r.action["arguments"]["text"].lower()]
        unasked = dataclasses.replace(run, records=tuple(r for r in run.records if r not in asked))
        assert len(asked) == 1 and task.verify(unasked).reason == "evidence: the caller was never asked to confirm, wish 1"
        assert task.rubrics(run) == (True,) and task.rubrics(unasked) == (False,)
    assert found > 3
