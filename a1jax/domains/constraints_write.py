"""An expert without a model: a text, plain and as short as it can be, that keeps to given rules by construction.

The same rules and request give the same text: fillers come in a fixed order, so a model can learn what the expert does. What the
construction cannot promise (rules that exclude each other, a request full of a forbidden letter) ends in None, never in a wrong text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator

from . import constraints_text as count
from .constraints import Rule, verdicts
from .constraints_languages import SENTENCES
from .constraints_rules import LESS, OPTIONS

ADJECTIVES = ("old", "calm", "tall", "grey", "north", "red", "blue", "warm")
# Lines for when a letter is ruled out. No one-letter word in capitals: rules count those.
SPARE = ("it is old", "that is my plan", "we all go home", "my dog ran off", "she sees the sea", "they met her", "his big fur hat")
ROUNDS = 40  # fillers are added at most so many times; each time as many as the counts ask for


@dataclasses.dataclass
class _Plan:
    """What the rules ask of a text, sorted by kind; lists where a type may come more than once."""

    rules: tuple[Rule, ...]
    subject: str

    def __post_init__(self):
        self.asked: dict[str, list[dict]] = {}
        for r in self.rules:
            self.asked.setdefault(r.name.split(":")[1], []).append(dict(r.arguments))
        self.language = next((a["language"] for a in self.of("response_language")), "en")
        less = [a for a in self.of("frequency") if a["relation"] == LESS]
        self.banned = [a["keyword"].strip().lower() for a in less]
        self.banned += [a["letter"].lower() for a in self.of("letter_frequency") if a["let_relation"] == LESS]
        self.words = [w.lower() for a in self.of("forbidden_words") for w in a["forbidden_words"]]
        relations = {a["relation"] for a in self.of("number_sentences")}
        self.stop = "" if relations == {LESS} else "."  # lines without a period are one sentence, however many they are

    def of(self, kind: str) -> list[dict]:
        return self.asked.get(kind, [])

    def has(self, kind: str) -> bool:
        return kind in self.asked

    def allows(self, text: str) -> bool:
        low = text.lower()
        return not any(b in low for b in self.banned) and not any(re.search(rf"\b{re.escape(w)}\b", low) for w in self.words)

    def first(self, texts: Iterable[str], default: str) -> str:
        """The first of some texts that nothing forbids."""
        return next((t for t in texts if self.allows(t)), default)

    def fillers(self) -> Iterator[str]:
        """Sentences without their period, for ever; nothing at all where every one is forbidden."""
        if self.language in SENTENCES:
            lines = SENTENCES[self.language]
        else:
            lines = [f"{the} {self.subject} is {adjective}" for the in ("The", "My", "Our") for adjective in ADJECTIVES]
            lines = [line for line in lines if self.allows(line)] or list(SPARE)
        lines = [line for line in lines if self.allows(line)]
        while lines:
            yield from lines


def write(rules: tuple[Rule, ...], subject: str = "river") -> str | None:
    """A text about a subject (a noun) that keeps to every rule, or None where this construction finds none."""
    plan = _Plan(tuple(rules), subject)
    if next(plan.fillers(), None) is None:
        return None
    added = 0
    for _ in range(ROUNDS):
        text = _document(plan, added)
        if all(verdicts(plan.rules, text)):
            return text
        added += _missing(plan, text)
    return None


def _missing(plan: _Plan, text: str) -> int:
    """How many more fillers the counts ask for; at least one, for languages that are told better from more text."""
    short = [a["num_sentences"] - count.sentences(text) for a in plan.of("number_sentences") if a["relation"] != LESS]
    short += [(a["num_words"] - count.words(text)) // 4 for a in plan.of("number_words") if a["relation"] != LESS]
    return max([1, *short])


def _document(plan: _Plan, added: int) -> str:
    fillers = plan.fillers()
    heads, body, separator = _parts(plan, fillers)
    own = [next(fillers) + plan.stop for _ in range(added)]
    body[-1] = "\n".join([body[-1], *own, *_items(plan, fillers)])
    return _whole(plan, "\n".join([*heads, separator.join(body)]) + _close(plan))


def _parts(plan: _Plan, fillers: Iterator[str]) -> tuple[list[str], list[str], str]:
    """Lines that come first, the paragraphs, and what stands between them."""
    heads = [a["prompt_to_repeat"].strip() for a in plan.of("repeat_prompt")]
    separator, number, leads = "\n", 1, {}
    for a in plan.of("number_paragraphs"):
        separator, number = "\n***\n", a["num_paragraphs"]
    for a in plan.of("nth_paragraph_first_word"):
        separator = "\n***\n\n" if plan.has("number_paragraphs") else "\n\n"
        number = max(number, a["num_paragraphs"])
        leads[a["nth_paragraph"] - 1] = a["first_word"] + " "
    body = [leads.get(i, "") + next(fillers) + plan.stop for i in range(max(1, number))]
    for a in plan.of("multiple_sections"):
        marks = [f"{a['section_spliter'].strip()} {i}" for i in range(1, a["num_sections"] + 1)]
        body[-1] = "\n".join([body[-1], *(f"{mark}\n{next(fillers)}{plan.stop}" for mark in marks)])
    if plan.has("two_responses"):
        heads += [*([] if heads else [next(fillers) + plan.stop]), "******"]
    return heads, body, separator


def _items(plan: _Plan, fillers: Iterator[str]) -> list[str]:
    """Lines for everything that is asked for by number or by name."""
    word = plan.first((plan.subject, "home", "dog", "sky", "x"), "") if plan.language == "en" else next(fillers).split()[0]
    say = plan.first(("say", "put", "add", "sum", "go"), "") if plan.language == "en" else next(fillers).split()[0]
    lines = [f"<<{word}>>"] if plan.has("title") else []
    lines += [option for option in OPTIONS[:1] if plan.has("constrained_response")]
    lines += [" ".join([say, *[f"[{word}]"] * a["num_placeholders"]]) for a in plan.of("number_placeholders")]
    lines += [" ".join([say, *[f"*{word}*"] * a["num_highlights"]]) for a in plan.of("number_highlighted_sections")]
    wanted = [w for a in plan.of("existence") for w in a["keywords"]]
    wanted += [a["keyword"].strip() for a in plan.of("frequency") if a["relation"] != LESS for _ in range(a["frequency"])]
    for a in plan.of("letter_frequency"):
        if a["let_relation"] != LESS:
            wanted.append("".join([a["letter"].lower()] * a["let_frequency"]))
    for a in plan.of("capital_word_frequency"):
        if a["capital_relation"] != LESS:
            wanted += [plan.first(("OK", "UP", "IN"), "ZZ")] * a["capital_frequency"]
    lines += [" ".join([say, *wanted])] if wanted else []
    lines += [f"* {word}" for a in plan.of("number_bullet_lists") for _ in range(a["num_bullets"])]
    return lines


def _close(plan: _Plan) -> str:
    """The postscript, then the phrase at the very end."""
    lines = [f"{a['postscript_marker'].strip()} {plan.first((plan.subject, 'home', 'sky'), 'x')}" for a in plan.of("postscript")]
    lines += [a["end_phrase"].strip() for a in plan.of("end_checker")]
    return "".join("\n" + line for line in lines)


def _whole(plan: _Plan, text: str) -> str:
    """What concerns the text as a whole: case, then its wrapping."""
    text = text.lower() if plan.has("english_lowercase") else text
    text = text.upper() if plan.has("english_capital") else text
    if plan.has("json_format"):
        plain = plan.has("quotation") or plan.has("end_checker") or plan.has("english_capital") or not plan.allows("answer")
        return json.dumps(text if plain else {"answer": text}, ensure_ascii=False)
    return f'"{text}"' if plan.has("quotation") else text
