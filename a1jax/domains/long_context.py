"""Long-context questions: a register of any length with local rules in it, multiple choice (arXiv 2606.30616, section 2.2).

The register says how much each holder holds, one numbered line each. Local rules stand among the lines ("Rule: add 7 to what @Belado
holds."); those about the holder asked for apply in the order of their lines. Rules about other holders, rules declared void and
the wrong options they lead to are distractors. Length knobs: ``steps`` rules that apply, ``tokens`` of the whole question.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import zlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer, in_split, quotable

FIRST = "Al Ber Cal Dor El Fal Gor Hel Ing Jas Kal Lor Mor Nal Or Pel".split()
MIDDLE = "a e i o u an en in on un ar er ir or ur al".split()
LAST = "bar dan fex gol hin jum kad lis mon nup pok rit sum tav vel zor".split()
GOODS = "lamps coins ropes bells jars maps keys boats".split()
LETTERS = "ABCD"
HOLDERS = len(FIRST) * len(MIDDLE) * len(LAST)
OPERATIONS = (*(("add", n) for n in range(2, 10)), *(("take away", n) for n in range(2, 10)), ("double", 2), ("triple", 3))
SPAN = 99  # what anyone holds before the rules: 20 to 99
HEAD = "Read the register. A rule changes what a holder holds, and rules apply in the order of their lines. A void rule does not apply."


def holder(i: int) -> str:
    """The i-th of 4,096 names."""
    return "@" + FIRST[i % 16] + MIDDLE[i // 16 % 16] + LAST[i // 256 % 16]


def four_characters(text: str) -> int:
    """A token counter for those who have no tokenizer at hand: four characters are one token, rounded up."""
    return -(-len(text) // 4)


class Local(NamedTuple):
    """A local rule: whom it concerns, what it does, and whether the line after it declares it void."""

    holder: str
    operation: str
    number: int
    void: bool = False

    @property
    def additive(self) -> bool:
        return self.operation in ("add", "take away")

    def apply(self, value: int) -> int:
        change = {"add": value + self.number, "take away": value - self.number}
        return change.get(self.operation, value * self.number)

    def text(self) -> str:
        """ "add 7 to what @Belado holds", "take away 7 from what ...", "double what ..."."""
        amount = f" {self.number} {'to' if self.operation == 'add' else 'from'}" if self.additive else ""
        return f"{self.operation}{amount} what {self.holder} holds"


def outcome(start: int, rules: tuple[Local, ...]) -> int:
    """What a holder holds in the end, given the rules that apply to it, in order."""
    for r in rules:
        start = r.apply(start)
    return start


def counts(start: int, rules: tuple[Local, ...]) -> bool:
    """Whether the rules change what is held, and every one of them does: not so of 7 added and taken away, or of nothing doubled."""
    value = outcome(start, rules)
    return value != start and all(outcome(start, rules[:i] + rules[i + 1 :]) != value for i in range(len(rules)))


@dataclasses.dataclass(frozen=True)
class Story:
    """A question but for its length. rules apply, in order; noise are rules that do not: void ones, and those about other holders."""

    goods: str
    start: int
    rules: tuple[Local, ...]
    noise: tuple[Local, ...]
    options: tuple[int, ...]
    seed: int


def question(story: Story, fillers: int) -> tuple[str, tuple[int, ...]]:
    """The question with so many filler lines, and the numbers of the lines it rests on: the fact's, then the rules' in order.

    Where things stand is drawn as fractions of the register, so a longer register has the same order of the same things.
    """
    rng = np.random.default_rng(story.seed)
    asked = story.rules[0].holder
    items: list[tuple[float, int, str]] = [(float(rng.random()), -1, f"{asked} holds {story.start} {story.goods}.")]
    items += [
        (at, i, f"Rule: {r.text()}.") for i, (at, r) in enumerate(zip(sorted(rng.random(len(story.rules))), story.rules, strict=True))
    ]
    for i, r in enumerate(story.noise, len(story.rules)):
        first, second = sorted(rng.random(2))
        items.append((first, i, f"Rule: {r.text()}."))
        items += [(second, len(story.rules) + len(story.noise) + i, "")] if r.void else []  # the line that declares rule i void
    items.sort()
    slots = {int(at * fillers) + k + 1: (i, text) for k, (at, i, text) in enumerate(items)}
    line_of = {i: line for line, (i, _) in slots.items()}
    others = [i for i in rng.permutation(HOLDERS).tolist() if holder(i) != asked]
    amounts, shift = rng.integers(20, SPAN + 1, fillers).tolist(), GOODS.index(story.goods)
    lines, filler = [], 0
    for line in range(1, fillers + len(items) + 1):
        if line in slots:
            i, text = slots[line]
            lines.append(f"{line}: " + (text or f"The rule of line {line_of[i - len(story.rules) - len(story.noise)]} is void."))
            continue
        goods = GOODS[(shift + filler // len(others)) % len(GOODS)]  # a holder named again holds other goods
        lines.append(f"{line}: {holder(others[filler % len(others)])} holds {amounts[filler]} {goods}.")
        filler += 1
    options = " ".join(f"{letter}: {value}" for letter, value in zip(LETTERS, story.options, strict=True))
    tail = f"How many {story.goods} does {asked} hold in the end? Answer with a letter. {options}"
    return "\n".join([HEAD, *lines, tail]), tuple(line_of[i] for i in range(-1, len(story.rules)))


def read(question: str) -> str | None:
    """The letter that a question's text leads to, whatever lines it lacks; None where it says not one amount to begin with, but none or
    several, or lists the outcome not once."""
    *lines, tail = question.split("\n")
    goods, asked = re.match(r"How many (\w+) does (\S+) hold", tail).groups()
    void = {words[5] for words in map(str.split, lines) if words[1:5] == ["The", "rule", "of", "line"]}
    facts = [line.split()[3] for line in lines if f" {asked} holds " in line and line.endswith(f" {goods}.")]
    if len(facts) != 1:
        return None
    value = int(facts[0])
    for line in lines:
        number, _, text = line.partition(": Rule: ")
        if text.endswith(f" {asked} holds.") and not {number} & void:
            operation = re.match(r"add|take away|double|triple", text)[0]
            amount = re.search(r" (\d+) ", text)
            value = Local(asked, operation, int(amount[1]) if amount else dict(OPERATIONS)[operation]).apply(value)
    listed = [letter for letter, option in re.findall(r"([A-Z]): (-?\d+)", tail) if int(option) == value]
    return listed[0] if len(listed) == 1 else None


@dataclasses.dataclass(frozen=True)
class LongTask(Task):
    """answer: the letter of the right option. lines: numbers of the lines that it rests on, the fact's, then the rules'."""

    story: Story | None = None
    lines: tuple[int, ...] = ()
    tokens: int = 0  # of the question, by the counter it was built with

    @property
    def premises(self) -> tuple[str, ...]:
        """The fact's line and the rules'."""
        lines = self.question.split("\n")
        return tuple(f"{lines[line]}\n" for line in self.lines)

    def recompute(self, question: str) -> str | None:
        return read(question)

    def reset(self):
        return ()

    def step(self, state, call: Call):
        return state, Observation(f"error: no tool '{quotable(call.name)}'; this task has none, answer with a letter", error=True)

    def expert(self) -> Generator[Turn, Observation, None]:
        value, thought = self.story.start, f"line {self.lines[0]} {self.story.start}"
        for line, r in zip(self.lines[1:], self.story.rules, strict=True):
            value = r.apply(value)
            thought += f" line {line} {r.operation} {r.number} {value}"
        yield Turn(f"{thought} end", answer=LETTERS[self.story.options.index(value)])

    def verify(self, trajectory: Trajectory) -> Outcome:
        """The letter, alone or as "B.", "(B)"; nothing else, so that an answer cannot name several."""
        answer = final_answer(trajectory)
        if answer is None:
            return Outcome(False, 0.0, "answer: none given")
        letter = answer.strip("(). ")
        if letter not in tuple(LETTERS):
            return Outcome(False, 0.0, "answer: not one of A, B, C, D")
        return Outcome(True, 1.0, "answer: accepted") if letter == self.answer else Outcome(False, 0.0, "answer: wrong")


@dataclasses.dataclass(frozen=True)
class LongContext(Domain):
    """Chains are (holder, rule) pairs. Same fields, seed, steps, split and counter: same task."""

    name: str = "instruction_following"  # the paper trains these questions there
    tokens: int = 1024  # length of the whole question
    distractors: int = 6  # rules about others, and half as many void rules about the holder asked for
    counter: Callable[[str], int] = four_characters  # text -> tokens; should nearly grow with the text

    def __post_init__(self):
        if self.distractors < 0:
            raise ConfigError(f"long_context.distractors is {self.distractors}; it must not be negative")

    def propose(self, seed: int, steps: int, split: Split = "train") -> LongTask:
        """A question with ``steps`` rules that apply and as many register lines as fit into ``tokens``.

        The question never has more than ``tokens`` tokens, and less by about one line at most. Raises ConfigError when steps is
        less than 1, or when the rules alone do not fit.
        """
        if steps < 1:
            raise ConfigError(f"long_context: a task needs at least 1 step, got {steps}")
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"long_context/{split}".encode())])
        story = self._story(rng, steps, split)
        while not counts(story.start, story.rules):
            story = self._story(rng, steps, split)
        size, question, lines = self._fit(story)
        return LongTask(
            domain=self.name,
            task_id=f"long_context-{split}-{steps}-{self.tokens}-{seed}",
            steps=steps,
            question=question,
            answer=LETTERS[story.options.index(outcome(story.start, story.rules))],
            evidence=(),
            chain=tuple((r.holder, r.text()) for r in story.rules),
            story=story,
            lines=lines,
            tokens=size,
        )

    def scaffold(self) -> tuple[str, ...]:
        goods = [f" {w}." for w in GOODS]
        names = [f"@{w}" for w in FIRST] + [*MIDDLE, *LAST]
        options = [f" {letter}:" for letter in LETTERS]
        return (
            HEAD,
            " holds",
            ": Rule:",
            " what",
            " line",
            " of line",
            "The rule",
            " is void.",
            "Answer with a letter.",
            *goods,
            *names,
            *options,
        )

    def _story(self, rng: np.random.Generator, steps: int, split: Split) -> Story:
        """What the question is about, whatever its length."""

        def among(options):
            return options[int(rng.integers(len(options)))]

        order = [holder(int(i)) for i in rng.permutation(HOLDERS)]
        possible = (tuple(r for r in (Local(name, *o) for o in OPERATIONS) if in_split(name, r.text(), split)) for name in order)
        mine = next(rules for rules in possible if rules)  # the first holder about whom the split has a rule
        small = tuple(r for r in mine if r.additive) or mine
        rules = tuple(among(mine if i < 3 else small) for i in range(steps))  # at most three factors: numbers stay small
        others = [name for name in order if name != rules[0].holder]
        void = [Local(rules[0].holder, *among(OPERATIONS), void=True) for _ in range(-(-self.distractors // 2))]
        foreign = [Local(others[i % 8], *among(OPERATIONS)) for i in range(self.distractors)]
        start = int(rng.integers(20, SPAN + 1))
        value = outcome(start, rules)
        slips = [outcome(start, rules[:-1]), outcome(start, rules[1:])] + [outcome(start, (*rules, r)) for r in (*void, *foreign)]
        below = int(rng.integers(len(LETTERS)))  # options smaller than the answer: its rank among them tells nothing
        slips = list(dict.fromkeys(slips[int(i)] for i in rng.permutation(len(slips))))
        less = list(dict.fromkeys([w for w in slips if w < value] + [value - 10, value - 1, value - 7]))
        more = list(dict.fromkeys([w for w in slips if w > value] + [value + 10, value + 1, value + 7]))
        chosen = [value, *less[:below], *more[: len(LETTERS) - 1 - below]]
        options = tuple(chosen[i] for i in rng.permutation(len(LETTERS)))
        return Story(among(GOODS), start, rules, (*void, *foreign), options, int(rng.integers(2**31)))

    def _fit(self, story: Story) -> tuple[int, str, tuple[int, ...]]:
        """The longest question within ``tokens``: (its tokens, its text, the lines that matter)."""

        def at(fillers: int) -> tuple[int, str, tuple[int, ...]]:
            text, lines = question(story, fillers)
            return self.counter(text), text, lines

        best = at(0)
        base, low, high, probe = best[0], 0, None, 16
        if base > self.tokens:
            raise ConfigError(f"long_context: the rules alone take {base} tokens; long_context.tokens is {self.tokens}")
        for tries in itertools.count():  # low fits and high does not; probes follow the tokens per line seen last
            if high is not None and high - low == 1:
                return best
            found = at(probe)
            if found[0] <= self.tokens:
                low, best = probe, found
            else:
                high = probe
            guess = int((self.tokens - base) * probe / max(found[0] - base, 1))
            if high is None:
                probe = max(guess, low + 1)
            else:  # a counter that jumps about could make guesses creep: after a few, halve
                probe = min(max(guess, low + 1), high - 1) if tries < 12 else (low + high) // 2
