"""Judges by rule, case by case, and many cases at once."""

import collections
import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError, bind
from a1jax.rollout.judges import Case, JudgeError, Verdict, by_rules, choice_match, exact_match, judge_all, last_number, number_match


def judged(judge, answer, expected):
    return judge(Case("Which?", answer, expected)).score == 1.0


SAME = [
    ("Paris", " the  PARIS. "),
    ("the Eiffel Tower", "Eiffel tower"),
    ("**Paris**", "Paris"),
    ("1,234.5", "1234.5"),
    ("-3", "\u22123"),
    ("+3", "3"),
    ("“Don’t”", "don't"),
    ("x-ray", "x ray"),
    ("5 %", "5%"),
    ("ﬁve", "five"),
    ("A", "a"),
    ("?", " ? "),
]
DIFFERENT = [
    ("Paris, France", "Paris"),
    ("15", "1.5"),
    ("-3", "3"),
    ("C++", "C"),
    ("5 %", "5"),
    ("$5", "5"),
    ("Vitamin A", "vitamin"),
    ("A, B", "B"),
    ("", "x"),
    ("", ""),
    ("the", "a"),
    ("?", "!"),
    ("1/2", "12"),
    ("1 2", "12"),
]


def test_exact_match():
    assert [pair for pair in SAME if not (judged(exact_match, *pair) and judged(exact_match, *pair[::-1]))] == []
    assert [pair for pair in DIFFERENT if judged(exact_match, *pair) or judged(exact_match, *pair[::-1])] == []


def test_number_match():
    numbers = ["#### 42", "It is 41, no: 42.", "$42", "x=42", "42 %", "4.2e1", "42.00000001", "042", "(42)", "1/2 of 84 is 42"]
    assert [text for text in numbers if not judged(number_match, text, "42")] == []
    others = ["42 or 43", "-42", "forty-two", "", "42.1", "v42", "84/42", "1.42.0", "42kg", "4,2", "42/2", "1e999"]
    assert [text for text in others if judged(number_match, text, "42")] == []
    found = [last_number(text) for text in ("1,234,567.5", "12,34", "-7", "5-3", "3.", "a1", "1.5.2", "\u22122", "1e-3", "nan inf")]
    assert found == [1234567.5, 34, -7, 3, 3, None, None, -2, 0.001, None]
    assert number_match(Case("", "9.7", "10"), absolute=0.5).score == 1.0
    assert number_match(Case("", "9.7", "10"), relative=0.01).score == 0.0
    assert number_match(Case("", "9.7", "10")).reason == "9.7 is not 10"
    with pytest.raises(ConfigError, match="'ten' has no number"):
        number_match(Case("", "10", "ten"))


def test_choice_match():
    good = [
        "C",
        "c",
        "(C)",
        "**C**",
        "C.",
        "C) because A is wrong",
        "The answer is C.",
        "Answer: (C)",
        "I think so. The answer is **C**",
        " C\n",
    ]
    assert [text for text in good if not judged(choice_match, text, "C")] == []
    bad = [
        "B",
        "",
        "C or B?",
        "The answer is C. No, the answer is D.",
        "C) but the answer is D",
        "Cat",
        "because",
        "The answer is Cat",
        "Can't",
    ]
    assert [text for text in bad if judged(choice_match, text, "(C)")] == []
    assert not judged(choice_match, "The answer I'd give", "I")
    with pytest.raises(ConfigError, match="is not one letter"):
        choice_match(Case("", "C", "CD"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=20), st.text(max_size=20))
def test_no_answer_makes_a_rule_raise(answer, other):
    for judge in (
        exact_match,
        lambda case: number_match(dataclasses.replace(case, expected="7")),
        lambda c: choice_match(dataclasses.replace(c, expected="C")),
    ):
        verdict = judge(Case("q", answer, other))
        assert verdict.score in (0.0, 1.0) and verdict.reason and "\n" not in verdict.reason
    assert judged(exact_match, answer, answer) == bool(answer.split())
    assert judged(exact_match, answer, other) == judged(exact_match, other, answer)


def test_rubrics_by_rules():
    rules = {"says where": lambda case: "Paris" in case.answer, "is short": lambda case: len(case.answer) < 10}
    case = Case("Where?", "Paris, of course", rubrics=("says where", "is short"))
    assert by_rules(case, rules) == Verdict((True, False), "not met: is short")
    assert bind(by_rules, rules=rules)(case).score == 0.5
    with pytest.raises(ConfigError, match="no rule for rubric 'is true'"):
        by_rules(dataclasses.replace(case, rubrics=("is true",)), rules)
    with pytest.raises(ConfigError, match="no rubrics"):
        by_rules(Case("q", "a", "a"), rules)


def test_many_cases_keep_their_order_and_equal_ones_are_asked_once():
    asked = collections.Counter()

    def judge(case):
        asked[case] += 1
        time.sleep(0.01 if case.answer == "0" else 0)
        return exact_match(case)

    cases = [Case("q", str(i % 5), "3") for i in range(20)]
    assert [v.score for v in judge_all(judge, cases, workers=4)] == [float(i % 5 == 3) for i in range(20)]
    assert set(asked.values()) == {1} and len(asked) == 5
    assert judge_all(judge, []) == []
    with pytest.raises(ConfigError, match="workers is 0"):
        judge_all(judge, cases, workers=0)


def test_an_endpoint_that_is_down_is_not_asked_for_every_case():
    asked = []

    def down(case):
        asked.append(case)
        raise JudgeError("down")

    with pytest.raises(JudgeError, match="down"):
        judge_all(down, [Case("q", str(i), "3") for i in range(200)], workers=1)
    assert len(asked) < 50
