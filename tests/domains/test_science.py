"""Science: units and the calculator by hand, formulas whose dimensions agree, experts, step checks, word problems from a file."""

import ast
import dataclasses
import gzip
import json
import pathlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains import science_formulas, science_words
from a1jax.domains.base import Call, consulted, in_split, solve
from a1jax.domains.science import DerivationTask, Science, ScienceTask
from a1jax.domains.science_formulas import FORMULAS, SMALLER, UNIT
from a1jax.domains.science_units import MAX_CHARS, UNITS, Quantity, Unreadable, calculate, near, quantity, show, unit
from a1jax.domains.science_words import WordProblems, WordTask, number, parse
from a1jax.types import FINISHED

GSM8K = pathlib.Path(__file__).parents[3] / "shared/data/math/gsm8k_train.jsonl.gz"
F = Fraction


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 40, 120])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_at_every_length(tools, steps, split):
    task = Science(tools=tools).propose(11, steps, split)
    run = solve(task)
    assert (run.status, run.reward) == (FINISHED, 1.0) and task.rubrics(run) == (True,) * steps
    assert len(task.chain) == steps == task.steps and all(in_split(a, b, split) for a, b in task.chain)
    calls = [r for r in run.records if r.action]
    assert len(calls) == (2 * steps + 1 if tools else 0) and not any(r.outcome for r in calls)
    assert set(task.evidence) <= consulted(run) and task.answer == run.messages[-1]["content"]


def test_same_seed_same_task_and_splits_share_no_pair():
    assert Science().propose(5, 4) == Science().propose(5, 4) != Science().propose(6, 4)
    train, heldout = ({pair for seed in range(80) for pair in Science().propose(seed, 4, s).chain} for s in ("train", "heldout"))
    assert len(train) > 200 and len(heldout) > 200 and not train & heldout


def test_the_numbers_of_long_chains_stay_short_and_are_what_si_says():
    for seed in range(10):
        task = Science(conversions=0.5).propose(seed, 120)
        value = quantity(f"{show(task.first)} {UNIT[task.start]}")
        for step in task.path:
            other = quantity(step.shown)
            sign = 1 if step.operator == "*" else -1
            product = value.value * other.value if sign > 0 else value.value / other.value
            dimension = tuple(a + sign * b for a, b in zip(value.dimension, other.dimension, strict=True))
            value = quantity(f"{show(step.value)} {UNIT[step.result]}")
            assert (product, dimension) == (value.value, value.dimension) and (step.value * 100).denominator == 1
            assert f"{step.property} {step.shown}" in dict(task.table)[step.name]
    assert any(step.factor > 1 for step in task.path) and any(step.factor == 1 for step in task.path)


@pytest.mark.parametrize("formula", FORMULAS, ids=" ".join)
def test_the_units_of_a_formula_agree(formula):
    given, operator, other, result = (unit(UNIT[q]) if q in UNIT else q for q in formula)
    sign = 1 if operator == "*" else -1
    assert result.dimension == tuple(a + sign * b for a, b in zip(given.dimension, other.dimension, strict=True))


def test_smaller_units_are_of_the_same_quantity_and_that_much_smaller():
    for name, (small, factor) in SMALLER.items():
        assert unit(small).dimension == unit(UNIT[name]).dimension and unit(small).value * factor == unit(UNIT[name]).value == 1


def test_units_by_hand():
    kg, m, s, a, k, mol = (
        (1, 0, 0, 0, 0, 0),
        (0, 1, 0, 0, 0, 0),
        (0, 0, 1, 0, 0, 0),
        *((0,) * 3 + x for x in ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    )
    assert [UNITS[x].dimension for x in ("kg", "m", "s", "A", "K", "mol")] == [kg, m, s, a, k, mol]
    assert UNITS["V"].dimension == (1, 2, -3, -1, 0, 0) and UNITS["ohm"].dimension == (1, 2, -3, -2, 0, 0)  # SI brochure, table 4
    assert UNITS["F"].dimension == (-1, -2, 4, 2, 0, 0) and UNITS["Pa"].dimension == (1, -1, -2, 0, 0, 0)
    assert unit("km/h").value == F(1000, 3600) and unit("cm2").value == F(1, 10000) and unit("mL").value == F(1, 10**6)
    assert unit("kg*m^2/s^2") == unit("J") == unit("N m") and unit("J/kg/K").dimension == (0, 2, -2, 0, -1, 0)
    assert unit("g/cm3").value == 1000 and unit("") == Quantity(F(1), (0,) * 6) and unit("mm").value == F(1, 1000)
    assert [unit(x) for x in ("x", "kkg", "m/", "m//s", "m0", "5", "mmin", "N(", "m" * 3)] == [None] * 9


def test_quantities_by_hand():
    assert quantity("48 N") == quantity("48N") == quantity(" 0.048 kN. ") == Quantity(F(48), unit("N").dimension)
    assert quantity("-1.5e3 m/s2").value == -1500 and quantity("1,200 g").value == F(12, 10)
    assert [quantity(x) for x in ("N", "48 N or 49 N", "48 Q", "about 48 N", "", "48 N" * 99, "1e9999 m", "٣ m")] == [None] * 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("2^-1", F(1, 2)),
        ("2*-3+4", -2),
        ("10-4-3", 3),
        ("12/4/3", 1),
        ("0.1*3", F(3, 10)),
        (".5 + 5.", F(11, 2)),
        ("2**10", 1024),
        ("--3", 3),
        ("+3", 3),
        ("( ( 2 ) )", 2),
        ("2-(3-(4-5))", -2),
        ("0^0", 1),
    ],
)
def test_the_calculator_by_hand(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "only numbers"),
        ("two", "only numbers"),
        ("1 2", "only numbers"),
        ("1;2", "only numbers"),
        ("1e5", "only numbers"),
        ("١+١", "only numbers"),
        ("1/0", "division by zero"),
        ("0^-1", "division by zero"),
        ("2^0.5", "powers"),
        ("2^65", "powers"),
        ("9^64^2", "powers"),
        ("99^64*99^64*99^64", "too large"),
        ("(1", "not closed"),
        ("1)", "closed where"),
        ("()", "closed where"),
        ("1+", "missing at the end"),
        ("*2", "missing before"),
        ("2(3)", "missing before"),
        ("1 + * 2", "missing before"),
        ("(1)2", "missing before"),
        ("1" * (MAX_CHARS + 1), "characters"),
        ("1.2.3", "missing before"),
    ],
)
def test_what_the_calculator_cannot_read_is_said(text, why):
    with pytest.raises(Unreadable, match=why):
        calculate(text)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join) | inner.map(lambda x: f"({x})") | inner.map(lambda x: f"-{x}")
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(text=expressions.filter(lambda x: len(x) <= MAX_CHARS))
def test_the_calculator_agrees_with_pythons_own_reading(text):
    def value(node):
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        if isinstance(node, ast.Constant):
            return F(node.value)
        a, b = value(node.left), value(node.right)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[type(node.op)](b)

    plain = "".join(" " + c if c == "-" else c for c in text)
    numbers = "".join(c if c.isdigit() else " " for c in text).split()
    if any(n != "0" and n.startswith("0") for n in numbers):
        return
    try:
        wanted = value(ast.parse(plain.strip(), mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(Unreadable, match="zero"):
            calculate(text)
        return
    assert calculate(text) == wanted


def ended(task, run, answer):
    return dataclasses.replace(run, messages=(*run.messages[:-1], {"role": "assistant", "content": answer}), records=run.records[:-1])


def test_the_verifier_refuses_each_bad_run_for_its_reason():
    task = Science(conversions=0.0).propose(3, 3)
    run = solve(task)
    value, name = task.answer.split(" ")
    assert task.verify(ended(task, run, f"{value}000 m{name}")).accepted == (name != "kg")  # the same in another unit
    assert task.verify(ended(task, run, value)).reason == "answer: the unit is of another quantity"
    assert task.verify(ended(task, run, f"{value} {name}*s")).reason == "answer: the unit is of another quantity"
    assert task.verify(ended(task, run, f"{float(value) * 1.001} {name}")).reason == "answer: wrong"
    assert task.verify(ended(task, run, "I do not know")).reason == "answer: not a number with a unit"
    assert task.verify(dataclasses.replace(run, messages=run.messages[:1])).reason == "answer: none given"
    guess = dataclasses.replace(run, messages=(run.messages[0], run.messages[-1]), records=())
    assert task.verify(guess).reason == f"evidence: {task.evidence[0]} was never looked up"
    without = tuple(r for r in run.records[:-1] if r.action["arguments"].get("object") != task.evidence[2])
    assert task.verify(dataclasses.replace(run, records=without)).reason == f"evidence: {task.evidence[2]} was never looked up"


def test_each_step_is_checked_by_itself():
    task = Science(tools=False, conversions=0.0).propose(2, 4)
    run = solve(task)
    lines = [f"{name}={show(value)} {UNIT[name]}" for name, value in task.results()]

    def met(text):
        return task.rubrics(ended(task, run, text))

    assert met(" ".join(lines)) == (True,) * 4
    assert met(" ".join(lines[:3])) == (True, True, False, False)
    wrong = lines[2].replace("=", "=1")
    assert met(" ".join([*lines[:2], wrong, *lines[3:]])) == (True, False, True, True)
    assert met(" ".join(line.rsplit(" ", 1)[0] for line in lines)) == (False,) * 4  # a number without a unit is no result
    assert met("") == (False,) * 4
    assert sum(met(" ".join(lines[::-1]))) < 4  # out of order


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (Call("lookup", {"object": "@Nobody"}), "error: lookup: no object '@Nobody'"),
        (Call("lookup", {"name": "@Nobody"}), "error: lookup needs argument 'object'"),
        (Call("calculator", {"expression": "1/0"}), "error: calculator: division by zero"),
        (Call("fly", {}), "error: no tool 'fly'; tools are calculator, lookup"),
    ],
)
def test_wrong_calls_get_a_clear_error(call, text):
    task = Science().propose(1, 2)
    state, seen = task.step(task.reset(), call)
    assert (state, seen.error, seen.text) == (task.reset(), True, text)
    assert DerivationTask.tools == () and Science(tools=False).propose(1, 2).step((), call)[1].error


@settings(max_examples=150, deadline=None)
@given(
    tool=st.sampled_from(["lookup", "calculator"]),
    text=st.text() | st.text("0123456789.+-*/()^ e", max_size=30) | st.just("\ud800"),
    answer=st.text() | st.text("0123456789.,eE+- kmsNJ/^*#$", max_size=20),
)
def test_tools_and_verifiers_answer_whatever_they_are_given(tool, text, answer):
    task = Science().propose(1, 2)
    argument = "object" if tool == "lookup" else "expression"
    task.step(task.reset(), Call(tool, {argument: text}))[1].text.encode("utf-8")
    run = solve(task)
    assert isinstance(task.verify(ended(task, run, answer)).reason, str) and len(task.rubrics(ended(task, run, answer))) == 2
    number(answer), unit(answer), quantity(text)


def test_knobs_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="science.conversions"):
        Science(conversions=2.0)
    with pytest.raises(ConfigError, match="at least 1 step"):
        Science().propose(0, 0)


def test_walks_end_early_at_a_dead_end_and_divide_a_prime_by_what_leaves_two_decimals():
    assert science_formulas.walk(np.random.default_rng(0), "density", F(3), ["@A", "@B"], 0.0) == []  # no formula begins there
    for first, wanted in ((7, {1}), (11, {F(11, 2), F(11, 4), F(11, 5)})):  # whole results only, where there are any
        walks = [science_formulas.walk(np.random.default_rng(seed), "energy", F(first), ["@A"], 0.0) for seed in range(60)]
        assert {walk[0].value for walk in walks} == wanted


ROW = {"question": "How many?", "answer": "Two pairs are 2*2=<<2*2=4>>4.\nWith 1.5 more <<4+1.5=5.5>>5.5 and <<5.5*2=11>>11.\n#### 1,100"}


def test_word_problems_are_read_by_hand():
    problem = parse(ROW)
    assert problem.answer == 1100 and [x[1:] for x in problem.calculations] == [("2*2", 4), ("4+1.5", F(11, 2)), ("5.5*2", 11)]
    assert [x[0] for x in problem.calculations] == ["Two pairs are 2*2=4.", "With 1.5 more 5.5 and 11.", "then"]
    for answer in ("#### 3", "<<1+1=3>>3\n#### 3", "<<1+1=2>>2\n#### many", "<<f(1)=2>>2\n#### 2", "<<1+1=2>>2"):
        assert parse({"question": "", "answer": answer}) is None
    texts = ("72", "$1,200", "so\n#### 72", "72 clips", "-3", "72.", "1 2", "x", "12/5", "1.2.3", "")
    assert [number(t) for t in texts] == [72, 1200, 72, 72, -3, 72, None, None, None, None, None]
    assert near(F(33, 100), F(1, 3), science_words.ROUNDING * 2) and not near(F(33, 100), F(1, 3))


@pytest.mark.parametrize("tools", [True, False])
def test_word_tasks_go_through_the_protocol(tmp_path, tools):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({**ROW, "question": f"How many {i}?"}) for i in range(40)))
    domain = WordProblems(path=str(path), tools=tools)
    ids = {split: {domain.propose(seed, 3, split).task_id for seed in range(60)} for split in ("train", "heldout")}
    assert len(ids["train"]) > 20 and len(ids["heldout"]) > 3
    train, heldout = ({pair for seed in range(60) for pair in domain.propose(seed, 3, s).chain} for s in ("train", "heldout"))
    assert not train & heldout
    task = domain.propose(0, 3)
    run = solve(task)
    assert run.status == FINISHED and task.rubrics(run) == (True,) * 3 and task.answer == "1100"
    assert sum(r.action is not None for r in run.records) == (3 if tools else 0)
    assert task.verify(ended(task, run, "1,100 of them")).accepted
    said = dataclasses.replace(run, messages=(run.messages[0], {"role": "assistant", "content": "11 then 5.5 then 4"}))
    assert task.rubrics(said) == (True, False, False)  # in the wrong order
    assert [task.verify(ended(task, run, a)).reason for a in ("1101", "no", "1 or 2")] == ["answer: wrong", *["answer: not one number"] * 2]
    with pytest.raises(ConfigError, match="no train problem with 9 calculations; there are 3"):
        domain.propose(0, 9)


def test_a_bad_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    for bad in ("[]", '{"question": 3, "answer": ""}', "{"):
        path.write_text(json.dumps(ROW) + "\n" + bad)
        science_words.read.cache_clear()
        with pytest.raises(ConfigError, match=r"p\.jsonl:2: not a JSON object"):
            science_words.read(str(path))
    with pytest.raises(ConfigError, match="there is no file"):
        WordProblems(path="nowhere").propose(0, 1)


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared data is not here")
def test_all_of_gsm8k_but_what_has_no_marks_is_solved_by_its_expert():
    with gzip.open(GSM8K, "rt") as lines:
        marked = sum("<<" in line for line in lines)
    problems = science_words.read(str(GSM8K))
    assert (marked, len(problems)) == (7378, 7376)  # two use //, which is no arithmetic of the calculator's
    for problem in problems[::7]:
        task = WordTask("science", "", len(problem.calculations), "", show(problem.answer), (), (), problem)
        run = solve(task)
        assert run.status == FINISHED and all(task.rubrics(run)) and not any(r.outcome for r in run.records[:-1])
    assert isinstance(Science().propose(0, 1), ScienceTask)
