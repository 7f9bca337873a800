"""Instruction following: experts accepted at every number of constraints, broken rules named, splits apart, no free answers."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.config import ConfigError
from a1jax.domains.base import Call, fingerprint, in_split, judge, solve
from a1jax.domains.constraints import verdicts
from a1jax.domains.constraints_rules import RULES
from a1jax.domains.instruction_following import SUBJECTS, InstructionFollowing, about, agree, describe, kind
from a1jax.types import FAILED, FINISHED

DOMAIN = InstructionFollowing()


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_is_accepted_and_a_lazy_answer_is_not(steps, split):
    for seed in range(15):
        task = DOMAIN.propose(seed, steps, split)
        run = solve(task)
        assert (run.status, run.reward, len(task.chain), len(task.rules)) == (FINISHED, 1.0, steps, steps)
        assert task.rubrics(run) == (True,) * steps and "all" in run.records[-1].outcome
        assert all(describe(r) in task.question for r in task.rules) and task.messages()[0]["content"] == task.question
        for text in ("x", f"The {task.subject} is old."):
            assert not all(verdicts(task.rules, text))


def test_broken_rules_are_named_and_counted():
    task = DOMAIN.propose(3, 4)
    assert [kind(r) for r in task.rules] == ["frequency", "number_paragraphs", "no_comma", "postscript"]
    run = solve(task)
    answer = dataclasses.replace(run, records=(), messages=(run.messages[0], {"role": "assistant", "content": task.answer + ","}))
    judged = judge(task, answer)
    assert (judged.status, judged.reward) == (FAILED, 0.0)
    assert judged.records[-1].outcome == "rules: punctuation:no_comma is broken; 3 of 4 kept" and task.rubrics(answer) == (
        True,
        True,
        False,
        True,
    )
    empty = dataclasses.replace(answer, messages=(run.messages[0],))
    assert task.verify(empty).reason == "answer: none given" and task.rubrics(empty) == (False,) * 4
    blank = dataclasses.replace(answer, messages=(run.messages[0], {"role": "assistant", "content": " \n"}))
    assert task.rubrics(blank) == (False,) * 4


def test_splits_share_no_pair_and_all_types_come_up():
    train = {pair for seed in range(150) for pair in DOMAIN.propose(seed, 1 + seed % 6, "train").chain}
    heldout = {pair for seed in range(150) for pair in DOMAIN.propose(seed, 1 + seed % 6, "heldout").chain}
    assert len(train) > 300 and len(heldout) > 300 and not train & heldout
    assert all(in_split(a, b, "heldout") for a, b in heldout) and all(in_split(a, b, "train") for a, b in train)
    for pairs in (train, heldout):
        assert {rule.split(" ")[0] for _, rule in pairs} == {name.split(":")[1] for name in RULES}


def test_types_that_exclude_each_other_never_meet():
    assert not agree("title", "title") and not agree("quotation", "repeat_prompt") and not agree("response_language", "existence")
    assert agree("title", "quotation") and agree("response_language", "title")
    for seed in range(60):
        kinds = [kind(r) for r in DOMAIN.propose(seed, 6).rules]
        assert all(agree(a, b) and agree(b, a) for i, a in enumerate(kinds) for b in kinds[:i])


def test_same_seed_same_tasks_in_another_process():
    script = (
        "from a1jax.domains.base import fingerprint\nfrom a1jax.domains.instruction_following import InstructionFollowing as D\n"
        "print(fingerprint([D().propose(seed, 1 + seed % 8) for seed in range(24)]))"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert there == fingerprint([DOMAIN.propose(seed, 1 + seed % 8) for seed in range(24)])
    assert DOMAIN.propose(5, 4) == DOMAIN.propose(5, 4) != DOMAIN.propose(6, 4)


@pytest.mark.parametrize(("steps", "words"), [(0, "at least 1 step"), (9, "at most 8, got 9")])
def test_numbers_of_constraints_out_of_range_are_refused(steps, words):
    with pytest.raises(ConfigError, match=words):
        DOMAIN.propose(0, steps)


@settings(max_examples=30, deadline=None)
@given(name=st.text(), arguments=st.dictionaries(st.text(), st.none() | st.integers() | st.text()))
def test_a_call_is_answered_that_there_are_no_tools(name, arguments):
    task = DOMAIN.propose(1, 2)
    state, seen = task.step(task.reset(), Call(name, arguments))
    assert state == task.reset() and seen.error and "has none" in seen.text


def test_one_text_for_every_request_is_refused():
    text = '"P.S. P.P.S [a] [b] [c] [d] <<t>> *a* *b* *c* *d* My answer is yes. Section 1 Section 2 SECTION 3 SECTION 4 "'
    domain, passed = InstructionFollowing(), 0
    for seed in range(40):
        task = domain.propose(seed, 1)
        for answer in (text, f'{text[:-1]}{" ".join(SUBJECTS)}"'):
            run = dataclasses.replace(solve(task), messages=({"role": "assistant", "content": answer},))
            if all(task.rubrics(run)):
                named = about(task.answer) == task.subject
                passed += task.verify(run).accepted
                assert (
                    not named
                    or task.verify(run).reason == f"subject: the answer is not about the {task.subject}"
                    or about(answer) == task.subject
                )
    assert passed <= 4


def test_the_expert_names_the_subject_where_the_rules_let_it():
    tasks = [InstructionFollowing().propose(seed, 1 + seed % 4) for seed in range(80)]
    assert sum(about(task.answer) == task.subject for task in tasks) > 60
    assert about("THE OLD Abbey near the river") == "abbey" and about("The rivers are old") is None
