"""Each acceptance rule refuses a task that is bad in just that way, and the real families break none."""

import dataclasses
import itertools
import json
import pathlib

import pytest

from a1jax import config
from a1jax.domains import DOMAINS, QUICKSTART, LongContext, Outcome, Search, Store, ToolGraph, solve
from a1jax.domains.acceptance import NO_ANSWERS, RULES, accept, play, spread, turns_of
from a1jax.domains.base import consulted, final_answer, in_split
from a1jax.domains.constraints import rule as constraint
from a1jax.domains.engineering import Engineering
from a1jax.domains.instruction_following import InstructionTask, describe
from a1jax.domains.long_context import Local, LongTask, Story, outcome, question
from a1jax.domains.science import Science
from a1jax.domains.science_words import WordProblems, parse
from a1jax.domains.search import SearchTask
from a1jax.stages import experts
from a1jax.stages.experts import Prompts, Runs

ROOT = pathlib.Path(__file__).parents[2]
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


def changed(kind, task=GOOD, **fields):
    return kind(**{**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)}, **fields})


def careless(task):
    """The task with a verifier that looks at the final answer alone."""

    def verify(self, trajectory):
        right = final_answer(trajectory) == self.answer
        return Outcome(right, float(right), "answer")

    return changed(type("Careless", (type(task),), {"verify": verify}), task)


def written(answer, *rules, subject="river"):
    """A task of instruction following and the text that its expert gives."""
    text = " ".join([f"Write about the {subject}.", *map(describe, rules)])
    return InstructionTask("instruction_following", "made", len(rules), text, answer, (), (("river", "x"),), subject, rules)


def register(start, *rules, options):
    """A long-context question with such rules about one holder, and no others."""
    story = Story("boats", start, tuple(Local("@Alabar", *r) for r in rules), (), options, 3)
    text, lines = question(story, 4)
    letter = "ABCD"[options.index(outcome(start, story.rules))]
    return LongTask("instruction_following", "made", len(rules), text, letter, (), (("@Alabar", "x"),), story, lines)


TITLE, COMMA, SMALL = (constraint(n) for n in ("detectable_format:title", "punctuation:no_comma", "change_case:english_lowercase"))
TITLED = written("<<The river>>", TITLE, COMMA)
HELD = register(30, ("add", 7), ("double", 2), options=(74, 37, 60, 67))
DERIVED, STORED = Science(tools=False).propose(0, 3), Store().propose(0, 3)
EXTRA = "@Nobody: mass 3 kg, time 2 s"  # a row of the table that no step needs


class NoLooks(type(STORED)):
    """Compares the store and nothing else."""

    def verify(self, trajectory):
        found = super().verify(trajectory)
        right = found.accepted or found.reason.startswith("evidence")
        return Outcome(right, float(right), found.reason)


class Forgetful(SearchTask):
    """Wants every page but the second."""

    def verify(self, trajectory):
        return dataclasses.replace(changed(SearchTask, self), evidence=self.evidence[:1] + self.evidence[2:]).verify(trajectory)


OF_OTHER_DOMAINS = {
    "a text without sense keeps the constraints": (written("it is old", SMALL, COMMA), "verifiable", NO_ANSWERS[1]),
    "the expert breaks a constraint": (dataclasses.replace(TITLED, answer="The river"), "valid", "title is broken"),
    "a text that heeds nothing keeps the constraints": (written("The river is old.", COMMA), "process-informative", "heeds nothing"),
    "a constraint is not told": (
        dataclasses.replace(TITLED, question="Write about the river. Use no commas."),
        "evidence-covering",
        "title",
    ),
    "no constraint": (written("it is\n\nold, so old"), "verifiable", "is accepted"),
    "the wrong letter": (dataclasses.replace(HELD, answer="B"), "valid", "wrong"),
    "rules that undo each other": (register(30, ("add", 7), ("take away", 7), options=(30, 37, 23, 44)), "process-informative", "alone is"),
    "no line is named": (changed(type("Bare", (LongTask,), {"premises": ()}), HELD), "evidence-covering", "no premise is named"),
    "a rule without effect": (register(4, ("take away", 4), ("double", 2), options=(0, 4, 8, 2)), "unambiguous", "the same without"),
    "two amounts": (
        dataclasses.replace(HELD, question=HELD.question.replace("\nHow", "\n99: @Alabar holds 40 boats.\nHow")),
        "unambiguous",
        "does not lead",
    ),
    "two options are right": (dataclasses.replace(HELD, question=HELD.question.replace("D: 67", "D: 74")), "unambiguous", "does not lead"),
    "a row is not given": (
        dataclasses.replace(DERIVED, question=DERIVED.question.replace(DERIVED.table[1][1], "")),
        "evidence-covering",
        "does not stand",
    ),
    "a row is not needed": (
        dataclasses.replace(DERIVED, question=f"{DERIVED.question}\n{EXTRA}", table=(*DERIVED.table, ("@Nobody", EXTRA))),
        "unambiguous",
        "the same without",
    ),
    "another quantity is asked for": (
        dataclasses.replace(DERIVED, question=DERIVED.question.replace(DERIVED.path[-1].name + " end", DERIVED.path[0].name + " end")),
        "unambiguous",
        "does not lead",
    ),
    "values may be guessed": (changed(NoLooks, STORED), "unambiguous", "is accepted"),
    "a page may be left out": (changed(Forgetful, Search().propose(0, 6)), "unambiguous", "is accepted"),
    "calls that look nothing up": (dataclasses.replace(ToolGraph().propose(0, 4), evidence=()), "evidence-covering", "no evidence"),
    **{
        f"{name} of {steps} wants words alone": (careless(DOMAINS[name].propose(0, steps)), "process-informative", "the answer alone")
        for name in ("search", "engineering", "science", "tool_calling")
        for steps in (1, 2)
    },
    "a wish is closed unseen": (careless(DOMAINS["general"].propose(0, 1)), "process-informative", "the answer alone"),
    "of two wishes the last is looked at": (careless(DOMAINS["general"].propose(0, 2)), "unambiguous", "is accepted"),
}


@pytest.mark.parametrize("case", OF_OTHER_DOMAINS)
def test_tasks_of_any_domain_are_refused_for_their_reason(case):
    task, rule, words = OF_OTHER_DOMAINS[case]
    found = accept(task)
    assert (found.accepted, found.rule) == (False, rule) and words in found.reason


def test_what_the_bad_tasks_were_made_of_is_good():
    for task in (TITLED, HELD, DERIVED, STORED):
        assert accept(task).accepted, accept(task).reason


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


@pytest.mark.parametrize("steps", (1, 2, 3, 5))
@pytest.mark.parametrize("domain", [*DOMAINS.values(), LongContext(), Science(tools=False), Store()], ids=lambda d: type(d).__name__)
def test_the_tasks_of_every_family_are_accepted(domain, steps):
    for seed in range(3 if isinstance(domain, Engineering) else 12):
        found = accept(domain.propose(seed, steps))
        assert found.accepted, f"{found.rule}: {found.reason}"


def named(part):
    """Every Runs and Prompts in a part of an experiment."""
    if isinstance(part, Runs | Prompts):
        yield part
    elif dataclasses.is_dataclass(part):
        yield from named([getattr(part, f.name) for f in dataclasses.fields(part)])
    elif isinstance(part, list | tuple):
        for one in part:
            yield from named(one)


def drawn_from(cfg, domain):
    """(family, steps) of all that a domain of an experiment is trained or judged on, in any stage."""
    judged = [e.of.get(domain, (Runs(e.counts),)) for e in (cfg.evaluation, cfg.admission)]
    prompts = cfg.distill.of.get(domain) or Prompts(cfg.distill.lengths)
    parts = named([cfg.runs[domain], cfg.teachers[domain].recipe, prompts, *judged])
    return dict.fromkeys((p.family or cfg.families[domain], n) for p in parts for n in (p.counts if isinstance(p, Runs) else p.lengths))


@pytest.mark.parametrize("number", [2, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "domain"), [*(("six_domains", d) for d in DOMAINS), *(("quickstart", d) for d in QUICKSTART)])
def test_what_is_trained_and_judged_on_is_accepted(name, domain, number):
    """Tasks of every family and length that the experiment names, by the seeds of its uses."""
    found = drawn_from(config.load(f"{ROOT}/experiments/{name}.py"), domain)
    assert len(found) >= 4 or domain == "engineering"
    for family, steps in found:
        for use in ("sft", "teacher", "reinforce", "heldout"):
            for task in experts.tasks(family, {steps: number // (1 + (domain == "engineering"))}, use, 0):
                verdict = accept(task)
                assert verdict.accepted, f"{task.task_id}: {verdict.rule}: {verdict.reason}"


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
