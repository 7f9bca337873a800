"""Tool calling: the graph by hand, plans refused for their reason, experts, minimal tasks, the sandbox, the verifier, rubrics."""

import dataclasses
import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.data import chat
from a1jax.data.tokenizer import train_sentencepiece
from a1jax.domains import DOMAINS, Call, ToolGraph, solve
from a1jax.domains.base import Observation, consulted, in_split
from a1jax.domains.tool_graph import ToolGraphTask, called, pairs, question
from a1jax.domains.tool_graph_catalogue import TOOLS, Catalogue, Edge, Tool
from a1jax.domains.tool_graph_screen import Step, screen
from a1jax.domains.tool_graph_search import Shapes
from a1jax.domains.tool_graph_world import CATALOGUE, KINDS, State, World
from a1jax.stages import experts
from a1jax.types import FINISHED

FAMILY = ToolGraph()


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 120])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_at_every_length(steps, split):
    task = FAMILY.propose(11, steps, split)
    run = solve(task)
    assert (run.status, run.reward) == (FINISHED, 1.0)
    assert len(task.chain) == steps == task.steps and all(in_split(a, b, split) for a, b in task.chain)
    assert set(task.evidence) <= consulted(run)
    calls = [r for r in run.records if r.action]
    assert len(calls) == steps and not any(r.outcome for r in calls)
    assert task.rubrics(run) == (True,) * len(task.parts)


def test_same_seed_same_task_and_splits_share_no_pair():
    assert FAMILY.propose(5, 6) == FAMILY.propose(5, 6) != FAMILY.propose(6, 6)
    assert solve(FAMILY.propose(5, 6)) == solve(FAMILY.propose(5, 6))
    train, heldout = ({p for seed in range(100) for p in FAMILY.propose(seed, 1 + seed % 9, s).chain} for s in ("train", "heldout"))
    assert len(train) > 200 and len(heldout) > 150 and not train & heldout


def test_knobs_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="at least 1 step"):
        FAMILY.propose(0, 0)
    with pytest.raises(ConfigError, match="tool_calling.reuse"):
        ToolGraph(reuse=-0.1)
    with pytest.raises(ConfigError, match="tool_calling.goal_calls"):
        ToolGraph(goal_calls=0)
    assert isinstance(DOMAINS["tool_calling"], ToolGraph)
    assert all(len(calls) < 3 for calls in ToolGraph(goal_calls=2).propose(1, 20).parts)


def test_the_graph_by_hand():
    edges = set(CATALOGUE.edges)
    assert {e for e in edges if e.target == "open"} == {
        Edge("box", "open", "argument", "box"),
        Edge("code", "open", "argument", "code"),
    }
    assert {e for e in edges if e.target == "mail"} == {
        *(Edge(source, "mail", "argument", "person") for source in ("boss", "friend", "keeper")),
        Edge("send", "mail", "state", "mail"),
    }
    assert {e.source for e in edges if (e.target, e.what) == ("write", "value")} == {"badge", "mail", "read"}
    assert Edge("open", "read", "precondition", "open") in edges and Edge("reserve", "assign", "precondition", "reserved") in edges
    assert Edge("write", "read", "state", "content") in edges and Edge("assign", "keeper", "state", "keeper") in edges
    assert not [e for e in edges if e.source in ("open", "reserve") and e.kind == "argument"]
    assert [t.name for t in CATALOGUE.suppliers(CATALOGUE.by_name["assign"], "person")] == ["boss", "friend", "keeper"]
    assert [t.name for t in CATALOGUE.preparation(CATALOGUE.by_name["read"])] == ["code", "open"]
    more = Catalogue((*TOOLS, Tool("spare", "A code of something else.", (("box", "box"),), "code", reads="spare")))
    assert [t.name for t in more.suppliers(more.by_name["open"], "code")] == ["code"]
    assert 8 <= len(TOOLS) <= 14 and all(t["function"]["parameters"]["required"] for t in ToolGraphTask.tools)


def without(*names):
    return Catalogue(tuple(t for t in TOOLS if t.name not in names))


def test_reachable_tools_by_hand():
    assert CATALOGUE.reachable({"person"}) == CATALOGUE.reachable({"box"}) == set(CATALOGUE.by_name)
    assert CATALOGUE.reachable({"number"}) == CATALOGUE.reachable(()) == frozenset()
    assert CATALOGUE.reachable({"box"}) - without("keeper").reachable({"box"}) == {
        "boss",
        "friend",
        "badge",
        "mail",
        "box",
        "send",
        "assign",
        "keeper",
    }
    assert without("code").reachable({"person"}) == set(CATALOGUE.by_name) - {"code", "open", "read", "write"}
    assert without("reserve").reachable({"person"}) == set(CATALOGUE.by_name) - {"reserve", "assign"}


def test_shapes_take_exactly_their_calls():
    shapes = Shapes(CATALOGUE)
    assert shapes.cost(CATALOGUE.by_name["write"]) == 3 and shapes.cost(CATALOGUE.by_name["assign"]) == 2
    assert [t.name for t in shapes.lookups("number", 1)] == ["badge", "mail"] and not shapes.lookups("code", 1)
    assert [t.name for t in shapes.lookups("number", 3)] == ["badge", "mail", "read"]
    assert shapes.splits(CATALOGUE.by_name["assign"], 3) == [(0, 1), (1, 0)] and shapes.splits(CATALOGUE.by_name["write"], 2) == []


# A small world: @Belado's boss is @Danfil, whose badge is #7; $fern's code is #3 and it holds #8.
FACTS = {("boss", "@Belado"): "@Danfil", ("badge", "@Danfil"): "#7", ("code", "$fern"): "#3", ("content", "$fern"): "#8"}
WORLD = World(1, 6, tuple(FACTS.items()), ("@Belado", "@Corbin", "@Danfil", "$fern"))
BOSS = Step("boss", ("@Belado",), True, ("@Belado",), "@Danfil")
BADGE = Step("badge", (0,), True, ("@Danfil",), "#7")
SEND = Step("send", ("@Corbin", 1), True, ("@Corbin", "#7"))
CODE = Step("code", ("$fern",), False, ("$fern",), "#3")
OPEN = Step("open", ("$fern", 0), False, ("$fern", "#3"))
READ = Step("read", ("$fern",), True, ("$fern",), "#8")
WRITE = Step("write", ("$fern", "#9"), True, ("$fern", "#9"))


def moved(step, **changes):
    return dataclasses.replace(step, **changes)


REFUSED = {
    "unreachable: call 0 open: nothing given leads to this tool": ([OPEN, WRITE], without("code")),
    "unreachable: call 0 fly: nothing given leads to this tool": ([moved(BOSS, tool="fly")], CATALOGUE),
    "unavailable: call 0 badge: argument 'person' is the result of call 1, which shows none before": (
        [moved(BADGE, sources=(1,)), BOSS],
        CATALOGUE,
    ),
    "unavailable: call 1 send: argument 'value' is the result of call 0, which shows none before": (
        [moved(SEND, sources=("@Corbin", "#7")), moved(SEND, sources=("@Corbin", 0))],
        CATALOGUE,
    ),
    "unavailable: call 1 badge: argument 'person' is @Corbin, which its source does not show": (
        [BOSS, moved(BADGE, arguments=("@Corbin",))],
        CATALOGUE,
    ),
    "unavailable: call 3 open: argument 'code' must be the code of $sage, looked up before": (
        [CODE, OPEN, WRITE, moved(OPEN, sources=("$sage", 0), arguments=("$sage", "#3"))],
        CATALOGUE,
    ),
    "schema: call 0 send: argument 'person' takes a person, not a box": (
        [moved(SEND, sources=("$fern", "#7"), arguments=("$fern", "#7"))],
        CATALOGUE,
    ),
    "schema: call 1 open: argument 'code' takes a code, not a number": ([CODE, moved(OPEN, sources=("$fern", "#3"))], CATALOGUE),
    "schema: call 1 send: argument 'value' takes a number, not a person": ([BOSS, moved(SEND, sources=("@Corbin", 0))], CATALOGUE),
    "schema: call 0 send: takes 2 arguments, got 1": ([moved(SEND, sources=("@Corbin",))], CATALOGUE),
    "precondition: call 0 read: $fern is not open": ([READ], CATALOGUE),
    "precondition: call 3 read: $fern is not open": ([CODE, OPEN, WRITE, READ], CATALOGUE),
    "useless: call 0 boss: no goal needs it": ([BOSS, moved(SEND, sources=("@Corbin", "#7"))], CATALOGUE),
    "useless: call 1 open: no goal needs it": ([CODE, OPEN], CATALOGUE),
    "useless: call 2 open: $fern is open already": ([CODE, OPEN, OPEN, WRITE], CATALOGUE),
    "useless: call 1 boss: the boss of @Belado was looked up before": ([BOSS, BOSS, BADGE, SEND], CATALOGUE),
    "short cut: call 2 write: $fern has that content already": (
        [CODE, OPEN, moved(WRITE, sources=("$fern", "#8"), arguments=("$fern", "#8"))],
        CATALOGUE,
    ),
    "short cut: call 1 boss: @Danfil is known before": (
        [moved(SEND, sources=("@Danfil", "#1"), arguments=("@Danfil", "#1")), BOSS],
        CATALOGUE,
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_bad_plan_is_refused_for_its_reason(reason):
    plan, catalogue = REFUSED[reason]
    assert screen(plan, WORLD, catalogue) == reason


def test_good_plans_pass_and_proposals_are_screened():
    assert screen([BOSS, BADGE, SEND], WORLD, CATALOGUE) is None
    assert screen([CODE, OPEN, READ, moved(SEND, sources=("@Corbin", 2), arguments=("@Corbin", "#8"))], WORLD, CATALOGUE) is None
    for seed in range(60):
        task = FAMILY.propose(seed, 1 + seed % 17, "heldout" if seed % 3 else "train")
        assert screen(task.plan, task.world, CATALOGUE) is None


@pytest.mark.parametrize("steps", [1, 3, 6, 12])
def test_a_run_without_any_one_of_its_calls_is_refused(steps):
    for seed in range(25):
        task = FAMILY.propose(seed, steps)
        run = solve(task)
        for i in range(steps):
            left = tuple(r for j, r in enumerate(run.records[:-1]) if j != i)
            outcome = task.verify(dataclasses.replace(run, records=left))
            assert not outcome.accepted and outcome.reason.split(":")[0] in ("goal", "evidence")


def fewest_calls(task, most):
    """Calls of the shortest plan to the task's goals by trying all calls with known arguments, ``most`` at most; None: there is none."""
    goals = {
        (CATALOGUE.by_name[s.tool].writes, s.arguments[0]): s.arguments[-1] for s in task.plan if not s.result and len(s.arguments) > 1
    }
    goals = {k: v for k, v in goals.items() if k[0]}
    first = frozenset((KINDS[n[0]], n) for s in task.plan for n in s.sources if isinstance(n, str))
    seen, front = set(), [(first, State())]
    for count in range(most + 1):
        if any(all(task.world.value(state, *k) == v for k, v in goals.items()) for _, state in front):
            return count
        following = []
        for known, state in front if count < most else ():
            for made in TOOLS:
                choices = [[name for kind, name in sorted(known) if kind == wanted] for _, wanted in made.arguments]
                for values in itertools.product(*choices):
                    after, answer = task.step(state, called(made.name, list(values)))
                    more = known | {(made.result, answer.text.removeprefix(values[0]))} if made.result and not answer.error else known
                    key = (more, frozenset(after.values.items()), after.holds)
                    if key not in seen:
                        seen.add(key)
                        following.append((more, after))
        front = following
    return None


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_no_shorter_plan_reaches_the_goals(steps):
    assert [fewest_calls(FAMILY.propose(seed, steps), steps) for seed in range(24 // steps)] == [steps] * (24 // steps)


def test_the_question_says_goals_and_no_value_on_the_way():
    assert question((BOSS, BADGE, SEND)) == "Do 1 boss@Belado 2 badge&1 3 send@Corbin with&2 end."
    assert question((CODE, OPEN, WRITE)) == "Do 1 write$fern with#9 end."
    assert pairs((CODE, OPEN, WRITE)) == (("$fern", "#3"), ("$fern", "#3"), ("$fern", "#9"))
    for seed in range(40):
        task = FAMILY.propose(seed, 12)
        found = {s.result for s in task.plan if s.result[:1] in ("@", "$")}
        # what an earlier goal assigned may have been given then
        given_then = {s.arguments[-1] for s in task.plan if s.tool == "assign"}
        assert not (found - given_then) & set(re.findall(r"[@$][\w-]+", task.question))


def test_goals_share_state_and_pass_values_on():
    plans = [FAMILY.propose(seed, 16).plan for seed in range(60)]
    assert {step.tool for plan in plans for step in plan} == set(CATALOGUE.by_name)

    def passed(plan):
        written = {}
        for i, step in enumerate(plan):
            made = CATALOGUE.by_name[step.tool]
            if made.writes:
                written.setdefault((made.writes, step.arguments[0]), i)
        return any(written.get((CATALOGUE.by_name[s.tool].reads, s.arguments[0]), len(plan)) < i for i, s in enumerate(plan))

    assert sum(passed(plan) for plan in plans) > 6
    alone = [ToolGraph(reuse=0.0).propose(seed, 16).plan for seed in range(20)]
    uses = [source for plan in alone for step in plan if step.named for source in step.sources if isinstance(source, int)]
    assert len(uses) == len({(id(plan), s) for plan in alone for step in plan if step.named for s in step.sources if isinstance(s, int)})


def act(state, name, *values):
    return TASK.step(state, called(name, list(values)))


TASK = ToolGraphTask(
    "tool_calling", "by hand", 6, "", "done", (), (), (BOSS, BADGE, SEND, CODE, moved(OPEN, sources=("$fern", 3)), WRITE), WORLD
)


def test_the_sandbox_by_hand():
    state, seen = act(TASK.reset(), "boss", "@Belado")
    assert seen == Observation("@Belado@Danfil", refs=("boss@Belado",)) and state == TASK.reset()
    state, seen = act(state, "write", "$fern", "#9")
    assert seen == Observation("error: write: $fern is not open; open it first", error=True)
    assert act(state, "open", "$fern", "#4")[1].text == "error: open: #4 is not the code of $fern"
    opened, seen = act(state, "open", "$fern", "#3")
    assert seen.text == "ok" and opened.holds == {("open", "$fern")} and not state.holds
    written, seen = act(opened, "write", "$fern", "#9")
    assert seen.text == "ok" and written.values == {("content", "$fern"): "#9"} and not written.holds and not opened.values
    assert act(written, "read", "$fern")[1].error  # it closed
    assert act(act(written, "open", "$fern", "#3")[0], "read", "$fern")[1].text == "$fern#9"
    assert act(act(written, "send", "@Corbin", "#5")[0], "mail", "@Corbin")[1].text == "@Corbin#5"
    assert act(state, "assign", "$fern", "@Corbin")[1].text == "error: assign: $fern is not reserved"
    given_away, _ = act(act(state, "reserve", "$fern")[0], "assign", "$fern", "@Corbin")
    assert act(given_away, "keeper", "$fern")[1].text == "$fern@Corbin" and not given_away.holds


def test_from_a_wrong_turn_no_way_leads_back_to_a_name_of_the_plan():
    names, known = set(WORLD.named), set()
    for relation in ("boss", "friend", "box"):
        for person in ("@Belado", "@Corbin", "@Danfil", "@Genado", "@Fenado"):
            if (relation, person) not in FACTS:
                known.add(WORLD.initial(relation, person))
    assert len(known) > 6 and not known & names


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (Call("fly", {}), "error: no tool 'fly'; tools are " + ", ".join(sorted(CATALOGUE.by_name))),
        (Call("boss", {}), "error: boss needs argument 'person'"),
        (Call("boss", {"person": "@Nobody"}), "error: boss: no person '@Nobody'"),
        (Call("code", {"box": "@Belado"}), "error: code: no box '@Belado'"),
        (Call("send", {"person": "@Belado", "value": 7}), "error: send: argument 'value' must be a string"),
        (Call("send", {"person": "@Belado", "value": "7"}), "error: send: number must be '#' and a number, got '7'"),
        (Call("open", {"box": "$fern", "code": "x"}), "error: open: code must be '#' and a number, got 'x'"),
    ],
)
def test_wrong_calls_get_a_clear_error_and_change_nothing(call, text):
    before = TASK.reset()
    assert TASK.step(before, call) == (before, Observation(text, error=True))


VALUES = (
    st.sampled_from(["@Belado", " @Corbin", "$fern", "#3", "#99", ""])
    | st.text(max_size=9)
    | st.none()
    | st.integers()
    | st.lists(st.none())
)
CALLS = st.builds(
    Call,
    st.sampled_from(sorted(CATALOGUE.by_name)) | st.text(max_size=9),
    st.dictionaries(st.sampled_from(["person", "box", "value", "code"]) | st.text(max_size=5), VALUES, max_size=3),
)
WELL_FORMED = st.sampled_from(TOOLS).flatmap(
    lambda t: st.builds(Call, st.just(t.name), st.fixed_dictionaries({name: VALUES for name, _ in t.arguments}))
)


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(CALLS | WELL_FORMED, max_size=6))
def test_tools_answer_whatever_they_are_asked(calls):
    state = TASK.reset()
    for call in calls:
        before = State(dict(state.values), state.holds)
        after, seen = TASK.step(state, call)
        assert isinstance(seen.text, str) and seen.text.encode() and state == before
        assert not seen.error or after == before
        state = after


def run_of(*records, answer="done"):
    full = solve(TASK)
    kept = tuple(full.records[i] if isinstance(i, int) else i for i in records)
    return dataclasses.replace(full, records=kept, messages=(*full.messages[:-1], {"role": "assistant", "content": answer}))


def made_call(name, *values):
    return dataclasses.replace(solve(TASK).records[0], action={"name": name, "arguments": called(name, list(values)).arguments})


def test_the_verifier_gives_one_reason_per_kind_of_failure():
    everything = tuple(range(6))
    assert TASK.verify(run_of(*everything)).accepted
    assert TASK.verify(run_of(*everything, answer="ready")).reason == "answer: wrong"
    cut = dataclasses.replace(run_of(*everything), messages=solve(TASK).messages[:-1])
    assert TASK.verify(cut).reason == "answer: none given"
    initial = WORLD.initial("mail", "@Corbin")
    assert TASK.verify(run_of(0, 1, 3, 4, 5)).reason == f"goal: part 3: mail of @Corbin is {initial}, should be #7"
    assert TASK.verify(run_of(*everything, made_call("send", "@Corbin", "#1"))).reason.startswith("goal: part 3: mail of @Corbin is #1")
    other = made_call("send", "@Belado", "#77")
    assert TASK.verify(run_of(*everything, other)).reason == "state: mail of @Belado became #77, which nobody asked for"
    assert TASK.verify(run_of(0, 2, 3, 4, 5)).reason == "evidence: badge of @Danfil was never looked up"  # sent the right number blindly
    assert TASK.verify(run_of(0, 1, 2, 4, 5)).reason == "evidence: code of $fern was never looked up"  # guessed the code
    assert TASK.verify(run_of(*everything, made_call("boss", "@Corbin"))).accepted  # looking is free


def test_a_result_looked_up_too_early_is_no_evidence():
    mail = Step("mail", ("@Corbin",), True, ("@Corbin",), "#7")
    again = Step("send", ("@Belado", 3), True, ("@Belado", "#7"))
    task = dataclasses.replace(TASK, plan=(BOSS, BADGE, SEND, mail, again))
    assert screen(task.plan, WORLD, CATALOGUE) is None
    run = solve(task)
    assert run.reward == 1.0 and task.rubrics(run) == (True,) * 5
    early = tuple(run.records[i] for i in (0, 1, 3, 2, 4))
    assert task.verify(dataclasses.replace(run, records=early)).reason == "evidence: mail of @Corbin was never looked up"
    assert task.rubrics(dataclasses.replace(run, records=early)) == (True, True, True, False, True)


def test_rubrics_say_which_parts_were_met():
    assert TASK.rubrics(run_of()) == (False,) * 4
    assert TASK.rubrics(run_of(0)) == (True, False, False, False)
    assert TASK.rubrics(run_of(0, 1)) == (True, True, False, False)
    assert TASK.rubrics(run_of(2, 3, 4)) == (False, False, True, False)  # open, but nothing written
    assert TASK.rubrics(run_of(3, 4, 5)) == (False, False, False, True)
    assert TASK.rubrics(run_of(*range(6))) == (True,) * 4


def test_the_environment_is_fast():
    task = FAMILY.propose(3, 200)
    start = time.process_time()
    solve(task)
    assert 200 / (time.process_time() - start) > 2000


def test_a_call_takes_few_tokens_of_the_small_tokenizer(tmp_path):
    texts, symbols = experts.tokenizer_texts((FAMILY,), 0), experts.symbols((FAMILY,), 24)
    tokenizer = train_sentencepiece(texts, tmp_path / "tokenizer.model", vocab_size=900, symbols=symbols)
    for steps in (2, 4, 8):
        counts = [len(chat.tokenize(tokenizer, list(solve(FAMILY.propose(seed, steps)).messages))[0]) for seed in range(8)]
        assert max(counts) <= 35 * steps
