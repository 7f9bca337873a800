"""Engineering: the tree's tools, experts, hidden tables, and programs that misbehave while the run goes on."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains import engineering_tasks as tasks
from a1jax.domains import sandbox
from a1jax.domains.base import Call, consulted, in_split, solve
from a1jax.domains.engineering import SHOWN, Engineering, EngineeringTask, executed
from a1jax.domains.engineering_tree import MAX_NODES, NOTE_CHARS, Tree, WrongCall, grow
from a1jax.types import FINISHED

try:
    sandbox.check()
except ConfigError as error:
    pytest.skip(f"no program can be locked in here: {error}", allow_module_level=True)

PLAIN = Engineering(optimisation=0.0)
TASK = PLAIN.propose(3, 3)


def play(task, *calls):
    """The state and the texts after some calls: (name, arguments...)"""
    state, texts = task.reset(), []
    for name, arguments in calls:
        state, seen = task.step(state, Call(name, arguments))
        texts.append(seen.text)
    return state, texts


def whole(task, leave_out=None):
    lines = [stage.code() for i, stage in enumerate(task.stages) if i != leave_out]
    return "def solve(t):\n    " + "\n    ".join([*lines, "return t"])


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_and_needs_two_calls_a_step(steps, split):
    task = Engineering().propose(11, steps, split)
    run = solve(task)
    assert (run.status, run.reward) == (FINISHED, 1.0)
    assert len(task.chain) == steps and set(task.evidence) <= consulted(run)
    calls = [r for r in run.records if r.action]
    assert len(calls) == 2 * steps + 1 and not any(r.outcome for r in calls)


def test_expert_prunes_wrong_guesses_and_goes_on_from_the_parent():
    guesses = 0
    for seed in (0, 7):
        task = Engineering(optimisation=0.0, detours=1.0).propose(seed, 4)
        run = solve(task)
        names = [r.action["name"] for r in run.records if r.action]
        wrong = [bool(stage.options) and stage.options[0] != stage.n for stage in task.stages]
        assert run.status == FINISHED and not any(r.outcome for r in run.records if r.action)
        assert names.count("invalidate_node") == sum(wrong) and names.count("select_node") == sum(wrong[1:])  # a root has no parent
        assert names.count("execute_code") == 4 + sum(wrong)
        guesses += sum(wrong)
    assert guesses > 1 and "one of: " in task.question


def test_a_long_program_of_120_checks_stays_within_the_limits():
    task = PLAIN.propose(1, 120, "heldout")
    found, done = task.marks(whole(task), task.hidden)
    assert done.status == "ok" and found == [1.0] * 120 and len(whole(task)) < task.limits.code_chars


def test_same_seed_same_task_and_splits_share_no_pair():
    assert Engineering().propose(5, 4) == Engineering().propose(5, 4) != Engineering().propose(6, 4)
    train = {pair for seed in range(40) for pair in Engineering().propose(seed, 1 + seed % 9, "train").chain}
    heldout = {pair for seed in range(40) for pair in Engineering().propose(seed, 1 + seed % 9, "heldout").chain}
    assert len(train) > 100 and len(heldout) > 50 and not train & heldout
    assert all(in_split(a, b, "heldout") for a, b in heldout)


def test_a_program_is_told_one_check_at_a_time_and_never_a_later_one():
    wordings = [stage.wording() for stage in TASK.stages]
    assert TASK.question.endswith(f"Checks: 3. next 1 {wordings[0]}") and wordings[1] not in TASK.question
    one = "def solve(t):\n    " + TASK.stages[0].code() + "\n    return t"
    _, texts = play(TASK, ("write_full_code", {"code": one}), ("execute_code", {}))
    assert texts == ["node 1", f"node 1 score 1/3\nnext 2 {wordings[1]}"] and wordings[2] not in texts[1]


def test_what_knows_the_shown_tables_by_heart_fails_on_the_hidden_ones():
    shown = json.loads(TASK.shown)
    answers = executed(whole(TASK), TASK.shown, TASK.limits).values
    code = f"def solve(t):\n    return {answers[0]!r} if t == {shown[0]!r} else {answers[1]!r}"
    calls = (("write_full_code", {"code": code}), ("execute_code", {}), ("update_answer", {"node": 1}))
    _, texts = play(TASK, *calls)
    assert texts[1] == "node 1 score 3/3\nall pass"
    assert TASK.verify(finished(TASK, calls)).reason.startswith("hidden tables: 0 of 3 checks pass")
    one_table = f"def solve(t):\n    return {answers[0]!r}"  # right on the first table, wrong on the other
    assert TASK.marks(one_table, TASK.shown)[0] == [0.0] * 3 and TASK.marks(one_table, json.dumps(shown[:1]))[0] == [1.0] * 3


def finished(task, calls, answer="done"):
    """A run of those calls, as the engine would have recorded it; the last message is ``answer``."""
    run = solve(task)
    records = [dataclasses.replace(run.records[0], action={"name": name, "arguments": arguments}) for name, arguments in calls]
    messages = (*run.messages[:-1], {"role": "assistant", "content": answer})
    return dataclasses.replace(run, messages=messages, records=tuple(records), reward=None, status=None)


def test_the_verifier_refuses_each_bad_run_for_its_reason():
    write, patchless = ("write_full_code", {"code": whole(TASK)}), ("write_full_code", {"code": whole(TASK, leave_out=1)})
    execute, answer = ("execute_code", {}), ("update_answer", {"node": 1})
    good = (write, execute, answer)
    assert TASK.verify(finished(TASK, good)).accepted
    assert TASK.verify(finished(TASK, good, "I think so")).reason == "answer: wrong"
    assert (
        TASK.verify(dataclasses.replace(finished(TASK, good), messages=({"role": "user", "content": ""},))).reason == "answer: none given"
    )
    assert TASK.verify(finished(TASK, (write, execute))).reason == "answer: no node was made the answer"
    assert TASK.verify(finished(TASK, (write, answer))).reason == "answer: no node was made the answer"  # refused: never run
    assert TASK.verify(finished(TASK, (patchless, execute, answer))).reason == "hidden tables: 2 of 3 checks pass: check 2 fails"
    # The evidence is what a run showed: a program right on the hidden tables only was never seen to pass.
    seen = json.loads(TASK.shown)
    sly = whole(TASK).replace("    s = ", f"    if t in {seen!r}: return t\n    s = ", 1)
    assert (
        TASK.verify(finished(TASK, (("write_full_code", {"code": sly}), execute, answer))).reason == "evidence: no run ever passed check 1"
    )


def test_rubrics_say_which_checks_the_answer_passes_or_else_the_best_node():
    write, execute, answer = ("write_full_code", {"code": whole(TASK)}), ("execute_code", {}), ("update_answer", {"node": 1})
    partly = ("write_full_code", {"code": whole(TASK, leave_out=1)})
    assert TASK.rubrics(finished(TASK, (write, execute, answer))) == (True, True, True)
    assert TASK.rubrics(finished(TASK, (partly, execute, answer))) == (True, False, True)
    assert TASK.rubrics(finished(TASK, (("write_full_code", {"code": "x = 1"}), execute, partly, execute))) == (True, False, True)
    assert TASK.rubrics(finished(TASK, (partly,))) == (False, False, False)  # never run


def test_a_program_that_answers_for_one_table_only_is_not_believed():
    code = 'import os\ndef solve(t):\n    for fd in range(3, 32):\n        try: os.write(fd, b\'{"values": [{}], "error": ""}\')\n'
    code += "        except OSError: pass\n    os._exit(0)"
    found, done = TASK.marks(code, TASK.shown)
    assert found == [0.0] * 3 and (done.status, done.error) == ("error", "answered for too few tables") and SHOWN > 1


HOSTILE = (
    "import os\nwhile True: os.fork()",
    "x = [0] * 10**10",
    "import time\ntime.sleep(99)",
    "open('/tmp/escaped', 'w').write('x')",
    "import socket\nsocket.socket()",
    "def solve(t):\n    import os\n    os._exit(0)",
    "def solve(t): return 'x' * 10**8",
    "def solve(t):\n    t['x'] = t\n    return t",
)


def test_hostile_programs_are_stopped_and_the_run_goes_on():
    limits = sandbox.Limits(seconds=1.0, cpu_seconds=1)
    task = Engineering(optimisation=0.0, limits=limits).propose(3, 2)
    state = task.reset()
    for code in HOSTILE:
        state, _ = task.step(state, Call("write_full_code", {"code": code}))
        state, seen = task.step(state, Call("execute_code", {}))
        assert seen.text.startswith(f"node {state.current} score 0/2\n") and len(seen.text.splitlines()) == 3, seen.text
        _, refused = task.step(state, Call("update_answer", {"node": state.current}))
        assert refused.error and "ended in an error" in refused.text
    state, seen = task.step(task.step(state, Call("write_full_code", {"code": whole(task)}))[0], Call("execute_code", {}))
    assert seen.text.endswith("score 2/2\nall pass")


def test_the_tree_remembers_what_every_tool_did():
    state, texts = play(
        TASK,
        ("list_nodes", {}),
        ("get_current_answer", {}),
        ("read_notes", {}),
        ("write_full_code", {"code": "def solve(t): return t"}),
        ("patch_code", {"find": "return t", "replace": "return 1/0"}),
        ("execute_code", {}),
        ("write_notes", {"text": "node 2 divides by zero"}),
        ("invalidate_node", {"node": 2}),
        ("select_node", {"node": 1}),
        ("execute_code", {}),
        ("update_answer", {"node": 1}),
        ("get_current_answer", {}),
        ("list_nodes", {}),
        ("read_notes", {}),
    )
    assert texts[:5] == ["no nodes", "no answer yet", "no notes", "node 1", "node 2"]
    assert texts[5].splitlines()[1] == "ZeroDivisionError: division by zero (line 1)"
    assert texts[6:9] == ["noted", "node 2 dead end", "node 1"] and texts[9].startswith("node 1 score 0/3\nnext 1 ")
    assert texts[10:12] == ["answer node 1", "answer node 1 score 0/3"]
    assert texts[12].splitlines() == ["1 root, score 0/3, current, answer", "2 from 1, error, dead end"]
    assert texts[13] == "node 2 divides by zero" and state.nodes[1].parent == 1
    assert play(TASK, ("write_notes", {"text": "half \ud800"}), ("read_notes", {}))[1][1] == "half ?"  # could not be tokenized


@pytest.mark.parametrize(
    ("before", "call", "text"),
    [
        ((), ("execute_code", {}), "there is no current node; use write_full_code or select_node"),
        ((), ("patch_code", {"find": "a", "replace": "b"}), "there is no current node; use write_full_code or select_node"),
        (("aa",), ("patch_code", {"find": "a", "replace": "b"}), "find must occur once in node 1, it occurs 2 times"),
        (("aa",), ("patch_code", {"find": "", "replace": "b"}), "find must occur once in node 1, it occurs 0 times"),
        (("a",), ("select_node", {"node": 2}), "there is no such node; there are 1"),
        (("a",), ("select_node", {"node": -1}), "there is no such node; there are 1"),
        (("a",), ("update_answer", {"node": 1}), "node 1 was not run"),
        (
            ("a",),
            ("write_notes", {"text": "x" * (NOTE_CHARS + 1)}),
            f"a note has at most {NOTE_CHARS} characters, this one {NOTE_CHARS + 1}",
        ),
        (("a",), ("write_full_code", {"code": "x" * 40_001}), "the program would have 40001 characters; at most 40000"),
    ],
)
def test_wrong_calls_get_a_clear_error_and_change_nothing(before, call, text):
    state, _ = play(TASK, *(("write_full_code", {"code": code}) for code in before))
    after, seen = TASK.step(state, Call(*call))
    assert after == state and seen.error and seen.text == f"error: {call[0]}: {text}"


def test_dead_ends_and_the_answer_are_protected_and_the_tree_has_an_end():
    state, _ = play(TASK, ("write_full_code", {"code": whole(TASK)}), ("execute_code", {}), ("update_answer", {"node": 1}))
    assert TASK.step(state, Call("invalidate_node", {"node": 1}))[1].text.endswith("node 1 is the answer; use update_answer first")
    state, _ = TASK.step(TASK.step(state, Call("write_full_code", {"code": "x"}))[0], Call("invalidate_node", {"node": 2}))
    assert state.current == 0
    for name in ("select_node", "update_answer"):
        assert TASK.step(state, Call(name, {"node": 2}))[1].text == f"error: {name}: node 2 is a dead end"
    with pytest.raises(WrongCall, match="full"):
        grow(Tree(1, nodes=state.nodes * MAX_NODES), 0, "x", 9)


@pytest.mark.parametrize("operation", tasks.DATA + tasks.OPTIMISATION, ids=lambda o: o.wording[:24])
def test_the_experts_code_does_what_the_grader_wants_and_idle_columns_do_not(operation):
    stages = [tasks.Stage(operation, "age", "cost", n) for n in operation.numbers]
    tables = [{"age": [31, 4, 77, 4, 90, 15, 62, 8]}, {"age": [5, 99, 23, 23, 0, 48, 71, 36]}]
    for stage in stages:
        code = f"def solve(t):\n    {stage.code()}\n    return t"
        found, done = dataclasses.replace(TASK, steps=1, stages=(stage,), evidence=("check 1",)).marks(code, json.dumps(tables))
        assert done.status == "ok" and found[0] >= 0.99, (stage, done)
        for wrong in (None, [], {}, "x", 3, [1] * 8, [[31]], ["a"], {"cost": None}, [10**400, 1], [float(10**300)] * 2):
            assert tasks.marks([stage], tables[0], {"cost": wrong})[0] < tasks.PASS
        assert tasks.marks([stage], tables[0], "no table") == [0.0]


def test_optimisation_marks_by_hand():
    def mark(function, *arguments):
        return pytest.approx(function(*arguments))

    column = [31, 4, 77, 4, 90, 15, 62, 8]
    assert mark(tasks.mark_subset, column, [90, 8], 100) == 98 / 100  # 77 + 15 + 8 is 100
    assert mark(tasks.mark_subset, column, [77, 15, 8], 100) == 1.0 and tasks.mark_subset(column, [90, 31], 100) == 0.0
    with pytest.raises(ValueError):
        tasks.mark_subset(column, [8, 8], 100)  # there is one 8 only
    # longest first on two: 90 15 31 8 | 77 62 4 4 -> 90, 77; 77+62; 90+31; 121+15; 136+8, 139+4, 143+4 -> 144 and 147
    assert mark(tasks.mark_split, column, [[90, 31, 15, 8], [77, 62, 4, 4]], 2) == 1.0
    assert mark(tasks.mark_split, column, [column, []], 2) == 147 / 291
    assert tasks.mark_split(column, [[90], [77]], 2) == 0.0
    assert tasks.tour_length([0, 9, 99, 90]) == 36 and tasks.tour_length([0, 99, 9, 90]) == 54
    assert mark(tasks.mark_tour, [0, 9, 99, 90], [0, 99, 9, 90], 0) == 36 / 54
    assert mark(tasks.mark_climb, column, [4, 15, 62], 0) == 1.0 and mark(tasks.mark_climb, column, [4, 8], 0) == 2 / 3
    assert tasks.mark_climb(column, [15, 31], 0) == 0.0 and tasks.mark_climb(column, [4, 4], 0) == 0.0
    assert mark(tasks.mark_line, [1, 3, 5, 7], [1, 2], 0) == 1.0 and tasks.mark_line([1, 3, 5, 7], [0, 2], 0) < 1e-5
    assert mark(tasks.mark_line, [0, 1, 0, 1], [0.5, 0.0], 0) == 0.8  # best line 0.2 + 0.2 row leaves 0.8, the flat one 1.0
    for word in ("nan", "inf", float("nan")):  # float takes the words too, and min(1.0, nan) is 1.0
        assert tasks.mark_line([1, 3, 5, 7], [word, 2], 0) == tasks.mark_line([1, 3, 5, 7], [1, word], 0) == 0.0


def test_2_opt_is_as_short_as_all_orders_tried():
    for cells in ([12, 87, 45, 3, 66, 91], [5, 50, 55, 0, 99, 33]):
        best = min(tasks.tour_length([cells[0], *rest]) for rest in itertools.permutations(cells[1:]))
        assert tasks.tour_length(tasks.shorten(sorted(cells))) <= best / 0.95


def test_a_check_is_told_apart_from_every_other_one():
    sorted_already = tasks.told_apart([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert not any(operation.wording.endswith(("sorted", "% 9", "are smaller")) for operation, _ in sorted_already)
    # Of a column of zeros max(0, 20) is abs(0 - 20), and all others but + leave it as it is.
    assert {operation.wording for operation, _ in tasks.told_apart([[0] * 8])} == {"{t} = {s} + {n}"}
    for seed in range(20):
        task = PLAIN.propose(seed, 4)
        for tables in (json.loads(task.shown), json.loads(task.hidden)):
            for i, stage in enumerate(task.stages):
                for other in (o for o in tasks.DATA if o is not stage.operation):
                    swapped = dataclasses.replace(stage, operation=other, n=other.numbers[0])
                    answers = [run_all(task.stages[:i] + (swapped,), dict(table)) for table in tables]
                    assert min(tasks.marks(task.stages, t, a)[i] for t, a in zip(tables, answers, strict=True)) == 0.0


def run_all(stages, table):
    for stage in stages:
        table[stage.target] = stage.operation.apply(table[stage.source], stage.n)
    return table


values = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
names = st.sampled_from([tool["function"]["name"] for tool in EngineeringTask.tools]) | st.text(max_size=5)
keys = st.sampled_from(["code", "find", "replace", "node", "text"]) | st.text(max_size=3)
SENSIBLE = st.one_of(
    st.tuples(st.just("write_full_code"), st.fixed_dictionaries({"code": st.text(max_size=20) | st.just("return t\ufffe\ud800")})),
    st.tuples(st.just("patch_code"), st.fixed_dictionaries({"find": st.text(max_size=2), "replace": st.text(max_size=9)})),
    st.tuples(st.sampled_from(["select_node", "invalidate_node", "update_answer"]), st.fixed_dictionaries({"node": st.integers(-1, 4)})),
    st.tuples(st.just("write_notes"), st.fixed_dictionaries({"text": st.text() | st.just("\ud800")})),
    st.tuples(st.sampled_from(["execute_code", "list_nodes", "read_notes", "get_current_answer"]), st.just({})),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(SENSIBLE | st.tuples(names, st.dictionaries(keys, values)), max_size=8))
def test_tools_answer_whatever_they_are_asked(calls):
    state = TASK.reset()
    for name, arguments in calls:
        before = state
        state, seen = TASK.step(state, Call(name, arguments))
        assert not seen.error or state == before
        if name in {tool["function"]["name"] for tool in EngineeringTask.tools}:
            seen.text.encode("utf-8")


def test_knobs_out_of_range_are_refused():
    for name in ("optimisation", "detours", "reuse"):
        with pytest.raises(ConfigError, match=f"engineering.{name}"):
            Engineering(**{name: 1.5})
    with pytest.raises(ConfigError, match="at least 1 step"):
        PLAIN.propose(0, 0)


def test_a_small_tokenizer_finds_the_words_of_a_run_in_the_scaffold():
    run = solve(PLAIN.propose(4, 3))
    pieces = sorted(PLAIN.scaffold(), key=len, reverse=True)
    text = run.messages[0]["content"] + json.dumps(run.messages[3]["tool_calls"][0]["function"])
    for piece in pieces:
        text = text.replace(piece, "")
    assert len(text) < 60
