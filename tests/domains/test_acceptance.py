"""Each acceptance rule refuses a task that is bad in just that way, and the real families break none."""

import dataclasses
import itertools
import json

import pytest

from a1jax.domains import DOMAINS, LongContext, Outcome, Search, ToolGraph, solve
from a1jax.domains.acceptance import RULES, accept, play, spread, turns_of
from a1jax.domains.base import consulted, final_answer, in_split
from a1jax.domains.engineering import Engineering
from a1jax.domains.science_words import WordProblems, parse
from a1jax.domains.search import SearchTask

MOODS = itertools.count()
GOOD = Search().propose(0, 4)


class Anything(SearchTask):
    def verify(self, trajectory):
        return Outcome(True, 1.0, "accepted")


class AnswerOnly(SearchTask):
    def verify(self, trajectory):
        right = final_answer(trajectory) == self.answer
        return Outcome(right, float(right), "answer")


class AnyPages(SearchTask):
    """Wants three pages, whichever they are."""

    def verify(self, trajectory):
        right = final_answer(trajectory) == self.answer and len(consulted(trajectory)) >= 3
        return Outcome(right, float(right), "pages")


class Moody(SearchTask):
    """Its expert thinks something else every time."""

    def expert(self):
        mood, turns, seen = next(MOODS), super().expert(), None
        while True:
            try:
                turn = turns.send(seen)
            except StopIteration:
                return
            seen = yield dataclasses.replace(turn, thought=f"{turn.thought} {mood}")


class OneCall(SearchTask):
    """Wants the answer and any search."""

    def verify(self, trajectory):
        looked = any(r.action and r.action["name"] == "search" for r in trajectory.records)
        right = final_answer(trajectory) == self.answer and looked
        return Outcome(right, float(right), "call")


class Listed(SearchTask):
    options = (GOOD.answer, "@Other")


def changed(kind, **fields):
    return kind(**{**vars(GOOD), **fields})


BAD = {
    "verifiable": changed(Anything),
    "valid": dataclasses.replace(GOOD, answer="@Nobody"),
    "process-informative": changed(AnswerOnly),
    "evidence-covering": changed(AnyPages, evidence=(*GOOD.evidence, "@Unseen")),
    "unambiguous": changed(AnyPages),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_refuses_the_task_that_breaks_it(rule):
    found = accept(BAD[rule])
    assert not found.accepted and found.rule == rule and found.reason


def test_the_answer_in_the_question_is_a_shortcut():
    found = accept(dataclasses.replace(GOOD, question=f"{GOOD.question} ({GOOD.answer})"))
    assert found.rule == "unambiguous" and "question" in found.reason


@pytest.mark.parametrize("steps", (1, 2, 5))
@pytest.mark.parametrize("domain", [*DOMAINS.values(), LongContext()], ids=lambda d: type(d).__name__)
def test_the_tasks_of_every_family_are_accepted(domain, steps):
    """Save that a plan of the tool graph with two or three calls may look nothing up: then there is no evidence to cover."""
    for seed in range(3 if isinstance(domain, Engineering) else 12):
        found = accept(domain.propose(seed, steps))
        bare = isinstance(domain, ToolGraph) and steps in (2, 3) and found.reason == "no evidence is named"
        assert found.accepted or bare, f"{found.rule}: {found.reason}"


def test_a_question_may_list_every_answer_but_not_some():
    question, right = GOOD.question, solve(GOOD)
    listing = dataclasses.replace(changed(Listed), question=f"{question} One of {GOOD.answer}, @Other.")
    assert accept(listing).accepted and accept(listing).trajectory.reward == right.reward
    assert accept(dataclasses.replace(listing, question=f"{question} {GOOD.answer}")).rule == "unambiguous"


def test_an_expert_that_changes_its_mind_is_not_verifiable():
    assert accept(changed(Moody)).reason == "two runs of the expert differ"


def test_a_one_shot_lookup_is_not_informative():
    found = accept(changed(OneCall))
    assert found.rule == "process-informative" and found.reason == "one call of search is enough"


def test_tools_that_show_no_evidence_cover_none():
    found = accept(changed(AnyPages, evidence=()))
    assert found.rule == "evidence-covering" and found.reason == "no evidence is named"


def test_a_calculator_shows_no_evidence(tmp_path):
    row = {"question": "Two boxes of 3 and one of 4?", "answer": "2*3=<<2*3=6>>6\n6+4=<<6+4=10>>10\n#### 10"}
    (tmp_path / "words.jsonl").write_text(json.dumps(row))
    split = "train" if in_split(parse(row).key, "10", "train") else "heldout"
    task = WordProblems(path=str(tmp_path / "words.jsonl")).propose(0, 2, split)
    assert task.tools and accept(task).accepted


def test_replayed_turns_give_the_same_run():
    run = solve(GOOD)
    assert play(GOOD, turns_of(GOOD, run)) == run
    assert play(GOOD, turns_of(GOOD, run)[1:]) != run


def test_spread_keeps_both_ends():
    assert spread(3, 4) == [0, 1, 2] and spread(10, 4) == [0, 3, 6, 9] and spread(0, 4) == []
