"""Long-context questions: any length by a given counter, answers recomputed from the text alone, options that give nothing away."""

import collections
import dataclasses
import re
import time

import pytest

from a1jax.config import ConfigError
from a1jax.domains.base import Call, in_split, judge, solve
from a1jax.domains.long_context import LETTERS, Local, LongContext, counts, four_characters, holder, outcome, question
from a1jax.types import FAILED, FINISHED


def read(text):
    """The right letter, worked out from nothing but the text of a question, by code of its own."""
    *lines, tail = text.split("\n")
    goods, asked = re.match(r"How many (\w+) does (@\w+) hold", tail).groups()
    numbered = {int(n): text for n, _, text in (line.partition(": ") for line in lines[1:])}
    assert list(numbered) == list(range(1, len(lines)))
    void = {int(m[1]) for text in numbered.values() if (m := re.fullmatch(r"The rule of line (\d+) is void\.", text))}
    (value,) = [int(m[1]) for text in numbered.values() if (m := re.fullmatch(rf"{asked} holds (\d+) {goods}\.", text))]
    for line, text in numbered.items():
        if text.startswith("Rule:") and f" {asked} " in text and line not in void:
            change = [int(n) for n in re.findall(r" (\d+) ", text)]
            factors = {"double": 2, "triple": 3}
            value = value * factors[text.split()[1]] if not change else value + change[0] * (1 if " add " in text else -1)
    return next(letter for letter, option in re.findall(r"([A-D]): (-?\d+)", tail) if int(option) == value)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_expert_and_text_agree_on_the_answer(steps, split):
    for seed in range(10):
        task = LongContext(tokens=1200).propose(seed, steps, split)
        run = solve(task)
        assert (run.status, run.reward) == (FINISHED, 1.0)
        assert read(task.question) == task.answer
        assert len(task.chain) == steps == len(task.lines) - 1 and all(in_split(a, b, split) for a, b in task.chain)
        lines = task.question.split("\n")
        assert lines[task.lines[0]].endswith(f"{task.chain[0][0]} holds {task.story.start} {task.story.goods}.")
        assert [lines[line].split("Rule: ")[1].rstrip(".") for line in task.lines[1:]] == [text for _, text in task.chain]
        assert list(task.lines[1:]) == sorted(task.lines[1:])


@pytest.mark.parametrize("tokens", [1_000, 4_096, 32_768, 131_072])
def test_any_length_is_met_to_within_a_line(tokens):
    for counter in (four_characters, lambda text: len(text.split()), lambda text: len(re.findall(r"\w+|[^\w\s]", text))):
        calls = []
        task = LongContext(tokens=tokens, counter=lambda text, c=counter, calls=calls: calls.append(1) or c(text)).propose(7, 4)
        assert task.tokens == counter(task.question) <= tokens
        fillers = sum(" holds " in line and "Rule" not in line for line in task.question.split("\n")[1:-1]) - 1
        assert question(task.story, fillers) == (task.question, task.lines) and counter(question(task.story, fillers + 1)[0]) > tokens
        assert len(calls) < 20 and read(task.question) == task.answer


def test_every_rule_counts_and_the_text_says_so_to_two_readers():
    assert counts(30, (Local("@A", "add", 7), Local("@A", "double", 2)))
    assert not counts(30, (Local("@A", "add", 7), Local("@A", "take away", 7)))  # back where it began
    assert not counts(4, (Local("@A", "take away", 4), Local("@A", "double", 2)))  # nothing doubled is nothing
    for seed in range(150):
        task = LongContext(tokens=400, distractors=2).propose(seed, 2 + seed % 4)
        assert counts(task.story.start, task.story.rules)
        assert task.recompute(task.question) == read(task.question) == task.answer
        assert all(task.recompute(task.question.replace(line, "", 1)) != task.answer for line in task.premises)


def test_length_changes_nothing_but_the_length():
    short, long = (LongContext(tokens=n).propose(3, 4) for n in (1_000, 16_000))
    assert (short.story, short.answer, short.chain) == (long.story, long.answer, long.chain) and short.task_id != long.task_id
    assert max(long.lines) > 10 * max(short.lines)


def test_counters_that_jump_about_end_too():
    calls = []
    LongContext(tokens=3_000, counter=lambda text: calls.append(1) or 10 * (len(text) // 40) + len(text) % 7).propose(1, 2)
    assert len(calls) < 60


def test_a_holder_is_never_said_to_hold_two_amounts_of_one_thing():
    task = LongContext(tokens=60_000).propose(2, 3)
    pairs = re.findall(r"(@\w+) holds \d+ (\w+)\.", task.question)
    assert len(pairs) > 4_096 and len(set(pairs)) == len(pairs)
    assert len({holder(i) for i in range(4_096)}) == 4_096


def test_options_give_nothing_away():
    tasks = [LongContext(tokens=900).propose(seed, 3) for seed in range(400)]
    letters = collections.Counter(task.answer for task in tasks)
    ranks = collections.Counter(sorted(t.story.options).index(outcome(t.story.start, t.story.rules)) for t in tasks)
    assert all(len(set(task.story.options)) == 4 for task in tasks)
    assert set(letters) == set(LETTERS) and min(letters.values()) > 70
    assert set(ranks) == set(range(4)) and min(ranks.values()) > 70
    without = sum(t.story.start in t.story.options for t in tasks) + sum(
        outcome(t.story.start, t.story.rules[:-1]) in t.story.options for t in tasks
    )
    assert without > 100  # leaving out a rule often leads to an option that is there


def test_splits_share_no_pair():
    domain = LongContext(tokens=900)
    train, heldout = ({p for seed in range(150) for p in domain.propose(seed, 3, split).chain} for split in ("train", "heldout"))
    assert len(train) > 300 and len(heldout) > 150 and not train & heldout


def test_rules_by_hand():
    rules = (Local("@A", "add", 7), Local("@A", "double", 2), Local("@A", "take away", 4), Local("@A", "triple", 3))
    assert outcome(10, rules) == ((10 + 7) * 2 - 4) * 3
    assert [r.text() for r in rules] == [
        "add 7 to what @A holds",
        "double what @A holds",
        "take away 4 from what @A holds",
        "triple what @A holds",
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("{}", "accepted"),
        (" ({}). ", "accepted"),
        ("A B C D", "not one of A, B, C, D"),
        ("the answer is {}", "not one of"),
        ("", "not one of"),
        ("AB", "not one of"),
        ("wrong", "not one of"),
    ],
)
def test_one_letter_is_an_answer(answer, reason):
    task = LongContext(tokens=900).propose(1, 2)
    run = dataclasses.replace(solve(task), records=(), messages=({"role": "assistant", "content": answer.format(task.answer)},))
    assert reason in task.verify(run).reason
    other = LETTERS[(LETTERS.index(task.answer) + 1) % 4]
    wrong = judge(task, dataclasses.replace(run, messages=({"role": "assistant", "content": other},)))
    assert (wrong.status, wrong.records[-1].outcome) == (FAILED, "answer: wrong")
    assert task.verify(dataclasses.replace(run, messages=())).reason == "answer: none given"


def test_calls_are_answered_and_knobs_checked():
    task = LongContext(tokens=900).propose(1, 1)
    assert task.step((), Call("search", {}))[1].error
    for knobs, steps, words in (
        ({}, 0, "at least 1 step"),
        ({"tokens": 100}, 2, "the rules alone take"),
        ({}, 120, "the rules alone take"),
    ):
        with pytest.raises(ConfigError, match=words):
            LongContext(**knobs).propose(0, steps)
    with pytest.raises(ConfigError, match="must not be negative"):
        LongContext(distractors=-1)
    assert read(LongContext(distractors=0).propose(0, 3).question)


def test_long_questions_are_built_quickly():
    start = time.process_time()
    LongContext(tokens=131_072).propose(0, 8)
    assert time.process_time() - start < 3.0
