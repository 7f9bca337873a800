"""Instruction following: write about something under 1-8 constraints that rules can check; no tools, one turn.

Tasks compose the 25 constraint types of IFEval (arXiv 2311.07911) with arguments drawn to be small, so that answers stay short; the
length knob is the number of constraints. Every proposed task was solved once by the model-free expert: none is impossible.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Generator

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer, in_split, quotable
from .constraints import Rule, rule, verdicts
from .constraints_languages import NAMES
from .constraints_rules import AT_LEAST, LESS, RULES
from .constraints_write import ADJECTIVES, write

SUBJECTS = (
    "river harbour valley abbey bridge mill garden fort tower lake forest island road market school farm castle station museum library "
    "mountain village beach boat train ship horse bird tree flower stone lamp door window table clock letter map coin bell"
).split()
WORDS = "tea salt moon ring wolf corn silk gold rain fish song bread paper glass honey cloud spoon chair knife candle".split()
PHRASES = ("That is all.", "Is that clear?", "Thank you.", "Good luck!")
COMMON, RARE = "aeilnorst", "jkqvxz"
MOST = 8  # constraints in one task

# Types that exclude each other, by the part of their name after the colon. Of one group at most one is drawn.
_GROUPS = (
    {"two_responses", "number_paragraphs", "nth_paragraph_first_word", "json_format"},
    {"english_capital", "english_lowercase", "capital_word_frequency", "multiple_sections"},
    {"english_capital", "english_lowercase", "constrained_response"},
    {"json_format", "number_bullet_lists"},
    {"json_format", "repeat_prompt"},
    {"repeat_prompt", "quotation"},
    {"repeat_prompt", "nth_paragraph_first_word"},
)
# With a foreign language: only what says nothing about English words or letters.
_ANY_LANGUAGE = {
    *("two_responses", "number_placeholders", "json_format", "multiple_sections", "number_bullet_lists", "number_highlighted_sections"),
    *("title", "number_paragraphs", "number_sentences", "number_words", "no_comma", "quotation", "response_language"),
}


# What a prompt says of a rule, by the part of its name after the colon.
SENTENCES = {
    "capital_word_frequency": "Use {capital_relation} {capital_frequency} words in capitals.",
    "english_capital": "Write in English with capital letters only.",
    "english_lowercase": "Write in English with small letters only.",
    "repeat_prompt": "Begin with this request word for word: {prompt_to_repeat}",
    "two_responses": "Give two different answers with ****** between them.",
    "number_placeholders": "Use at least {num_placeholders} placeholders such as [name].",
    "postscript": "Add a postscript that begins with {postscript_marker}",
    "constrained_response": "Say one of: My answer is yes. My answer is no. My answer is maybe.",
    "json_format": "Put everything into JSON.",
    "multiple_sections": "Write {num_sections} sections and begin each with {section_spliter} and its number.",
    "number_bullet_lists": "Use exactly {num_bullets} bullet points such as * this.",
    "number_highlighted_sections": "Highlight at least {num_highlights} parts such as *this*.",
    "title": "Give a title such as <<this>>.",
    "existence": "Use the words: {keywords}.",
    "forbidden_words": "Never use the words: {forbidden_words}.",
    "frequency": "Use the word {keyword} {relation} {frequency} times.",
    "letter_frequency": "Use the letter {letter} {let_relation} {let_frequency} times.",
    "response_language": "Write in {language} only.",
    "nth_paragraph_first_word": (
        "Write {num_paragraphs} paragraphs with a blank line between them; begin paragraph {nth_paragraph} with the word {first_word}."
    ),
    "number_paragraphs": "Write {num_paragraphs} paragraphs with *** between them.",
    "number_sentences": "Write {relation} {num_sentences} sentences.",
    "number_words": "Write {relation} {num_words} words.",
    "no_comma": "Use no commas.",
    "end_checker": "End with: {end_phrase}",
    "quotation": "Put everything into double quotation marks.",
}


def kind(r: Rule) -> str:
    """The part of a rule's name after the colon."""
    return r.name.split(":")[1]


def agree(one: str, other: str) -> bool:
    """Whether two types (parts after the colon) may stand in one task."""
    if one == other or any({one, other} <= group for group in _GROUPS):
        return False
    return "response_language" not in (one, other) or {one, other} <= _ANY_LANGUAGE


def draw(name: str, rng: np.random.Generator, request: str) -> Rule:
    """A rule of a type with random arguments."""

    def among(options):
        return options[int(rng.integers(len(options)))]

    def number(low, high):
        return int(rng.integers(low, high + 1))

    relation = among((LESS, AT_LEAST))
    less, few = relation == LESS, number(1, 4)
    arguments = {
        "capital_word_frequency": lambda: {"capital_frequency": few + less, "capital_relation": relation},
        "repeat_prompt": lambda: {"prompt_to_repeat": request},
        "number_placeholders": lambda: {"num_placeholders": few},
        "postscript": lambda: {"postscript_marker": among(("P.S.", "P.P.S"))},
        "multiple_sections": lambda: {"section_spliter": among(("Section", "SECTION")), "num_sections": number(2, 4)},
        "number_bullet_lists": lambda: {"num_bullets": number(2, 6)},
        "number_highlighted_sections": lambda: {"num_highlights": few},
        "existence": lambda: {"keywords": sorted(rng.choice(WORDS, number(1, 3), replace=False).tolist())},
        "forbidden_words": lambda: {"forbidden_words": sorted(rng.choice((*ADJECTIVES, *WORDS), number(1, 3), replace=False).tolist())},
        "frequency": lambda: {"keyword": among(ADJECTIVES if less else WORDS), "frequency": few, "relation": relation},
        "letter_frequency": lambda: {"letter": among(RARE), "let_frequency": few, "let_relation": relation},
        "response_language": lambda: {"language": among(sorted(NAMES))},
        "nth_paragraph_first_word": lambda: {"first_word": among(WORDS), "num_paragraphs": few, "nth_paragraph": number(1, few)},
        "number_paragraphs": lambda: {"num_paragraphs": number(2, 5)},
        "number_sentences": lambda: {"num_sentences": number(6, 9) if less else number(2, 8), "relation": relation},
        "number_words": lambda: {"num_words": 10 * number(4, 8) if less else 10 * number(1, 4), "relation": relation},
        "end_checker": lambda: {"end_phrase": among(PHRASES)},
    }
    return rule(name, **arguments.get(name.split(":")[1], dict)())


def describe(r: Rule) -> str:
    """What a rule asks for, as one sentence of a prompt."""
    a = dict(r.arguments)
    lists = {key: " ".join(value) for key, value in a.items() if isinstance(value, tuple)}
    text = SENTENCES[kind(r)]
    if "language" in a:
        a["language"] = NAMES.get(a["language"], a["language"])
    return text.format(**{**a, **lists})


def about(text: str) -> str | None:
    """The first of SUBJECTS that a text names, in any case; None: it names none."""
    found = _SUBJECT.search(text)
    return found[0].lower() if found else None


_SUBJECT = re.compile(rf"\b(?:{'|'.join(SUBJECTS)})\b", flags=re.IGNORECASE)


def signature(r: Rule) -> str:
    """A rule as text, for the split: type and arguments. A repeated request says nothing of its own."""
    return f"{kind(r)} {'' if kind(r) == 'repeat_prompt' else dict(r.arguments)}"


@dataclasses.dataclass(frozen=True)
class InstructionTask(Task):
    """answer: one text that keeps to the rules (the expert's), among many."""

    subject: str = ""
    rules: tuple[Rule, ...] = ()

    @property
    def content(self) -> str:
        """The same constraints in another order are the same task."""
        return repr((self.subject, sorted(signature(r) for r in self.rules)))

    def reset(self):
        return ()

    def step(self, state, call: Call):
        return state, Observation(f"error: no tool '{quotable(call.name)}'; this task has none, answer in text", error=True)

    def expert(self) -> Generator[Turn, Observation, None]:
        yield Turn("keep " + " ".join(kind(r) for r in self.rules), answer=self.answer)

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """One verdict per rule on the final answer, for rewards by fraction; all false where there is none."""
        return verdicts(self.rules, final_answer(trajectory) or "")

    def verify(self, trajectory: Trajectory) -> Outcome:
        if final_answer(trajectory) is None:
            return Outcome(False, 0.0, "answer: none given")
        broken = [r.name for r, held in zip(self.rules, self.rubrics(trajectory), strict=True) if not held]
        if broken:
            return Outcome(False, 0.0, f"rules: {broken[0]} is broken; {len(self.rules) - len(broken)} of {len(self.rules)} kept")
        # One text could keep most rules, whatever is asked. Where the rules leave no way to name the subject the expert does not either.
        if about(self.answer) == self.subject != about(final_answer(trajectory)):
            return Outcome(False, 0.0, f"subject: the answer is not about the {self.subject}")
        return Outcome(True, 1.0, f"rules: all {len(self.rules)} kept")


@dataclasses.dataclass(frozen=True)
class InstructionFollowing(Domain):
    """Chains are (subject, rule) pairs: a held-out task asks for no rule of a subject that a training task asks for."""

    name: str = "instruction_following"
    kinds: tuple[str, ...] = ()  # types to draw from, by the part of their name after the colon; empty: all 25

    def __post_init__(self):
        known = sorted(name.split(":")[1] for name in RULES)
        for name in self.kinds:
            if name not in known:
                raise ConfigError(f"{self.name}.kinds has '{name}'; the types are {', '.join(known)}")

    def propose(self, seed: int, steps: int, split: Split = "train") -> InstructionTask:
        """``steps`` constraints that can hold together, proved by the expert, and that a text written without them breaks.

        Raises ConfigError when steps is not 1 to 8.
        """
        if steps < 1:
            raise ConfigError(f"{self.name}: a task needs at least 1 step, got {steps}")
        if steps > MOST:
            raise ConfigError(f"{self.name}: a step is a constraint and a task has at most {MOST}, got {steps}")
        if self.kinds and self._most() < steps:
            raise ConfigError(f"{self.name}: of these kinds at most {self._most()} agree in one task, got {steps} steps; name more kinds")
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        while True:
            subject = SUBJECTS[int(rng.integers(len(SUBJECTS)))]
            request = f"Write about the {subject}."
            rules = self._rules(rng, subject, request, steps, split)
            lazy = any(all(verdicts(rules, text)) for text in ("x", f"The {subject} is old."))
            answer = write(rules, subject) if len(rules) == steps and not lazy else None
            if answer is not None:
                break
        return InstructionTask(
            domain=self.name,
            task_id=f"{self.name}-{split}-{steps}-{seed}",
            steps=steps,
            question=" ".join([request, *map(describe, rules)]),
            answer=answer,
            evidence=(),
            chain=tuple((subject, signature(r)) for r in rules),
            subject=subject,
            rules=rules,
        )

    def _most(self) -> int:
        """How many of the kinds may stand in one task, at least: taken greedily, those that agree with most first."""
        left = sorted(set(self.kinds), key=lambda one: sum(not agree(one, other) for other in self.kinds))
        taken: list[str] = []
        for one in left:
            taken += [one] if all(agree(one, other) for other in taken) else []
        return len(taken)

    def _rules(self, rng: np.random.Generator, subject: str, request: str, steps: int, split: Split) -> tuple[Rule, ...]:
        """Rules in random order, each from the split and in agreement with those before it; fewer where they run out."""
        rules: list[Rule] = []
        for i in rng.permutation(len(RULES)):
            name = sorted(RULES)[i]
            if self.kinds and name.split(":")[1] not in self.kinds:
                continue
            if len(rules) < steps and all(agree(name.split(":")[1], kind(r)) for r in rules):
                r = draw(name, rng, request)
                rules += [r] if in_split(subject, signature(r), split) else []
        return tuple(rules)

    def scaffold(self) -> tuple[str, ...]:
        plain = (*SUBJECTS, *WORDS, *ADJECTIVES)
        words = [f" {w}" for w in plain] + [*plain] + [f" {w.upper()}" for w in plain] + [w.upper() for w in plain]
        kinds = [f" {name.split(':')[1]}" for name in RULES]
        marks = (
            " [",
            "]",
            " *",
            "*",
            "<<",
            ">>",
            "\n* ",
            '"',
            '{"answer": "',
            '"}',
            "\\n",
            "\n******\n",
            "THE",
            " IS",
            "SAY",
            "P.S.",
            "P.P.S",
            "p.s.",
            "p.p.s",
        )
        return (
            "Write about the",
            "keep",
            "The",
            "the",
            "say",
            " is",
            *PHRASES,
            *map(str.lower, PHRASES),
            *map(str.upper, PHRASES),
            *marks,
            *kinds,
            *words,
        )
