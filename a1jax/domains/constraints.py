"""Verifiable constraints on a text: what a rule is, when it holds, and how prompts in IFEval's file are read (arXiv 2311.07911).

A rule is the name of a constraint type and its arguments, e.g. ``rule("keywords:frequency", keyword="tea", frequency=2,
relation="at least")``; the types and their predicates are in ``constraints_rules``.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import re
from typing import Any

from ..config import ConfigError
from .constraints_rules import AT_LEAST, LESS, RULES

_KINDS = {
    "count": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "a whole number, 0 or more"),
    "relation": (lambda v: v in (LESS, AT_LEAST), f"'{LESS}' or '{AT_LEAST}'"),
    "text": (lambda v: isinstance(v, str) and bool(v.strip()), "text that is not blank"),
    "letter": (lambda v: isinstance(v, str) and len(v) == 1, "one character"),
    "language": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"[a-z]{2}(-[a-z]{2})?", v)), "an ISO 639-1 code such as 'de'"),
    "words": (
        lambda v: isinstance(v, list | tuple) and bool(v) and all(isinstance(w, str) and w.strip() for w in v),
        "a list of words that are not blank",
    ),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One constraint; make it with ``rule``, which checks it. arguments: (name, value) pairs, lists as tuples."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def holds(self, text: str, loose: bool = False) -> bool:
        """Whether a text keeps to the rule; a blank one never does.

        loose: as published, also when it does so without its first line, its last line, both, or without its stars.
        """
        predicate = RULES[self.name][0]
        return any(bool(t.strip()) and predicate(t, **dict(self.arguments)) for t in (_loose(text) if loose else (text,)))


def _loose(text: str) -> list[str]:
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [part.replace("*", "") for part in cut]


def rule(name: str, **arguments: Any) -> Rule:
    """A checked rule. Raises ConfigError, in one line, for an unknown type and for wrong, missing or unknown arguments."""
    if name not in RULES:
        raise ConfigError(f"no constraint type {name!r}; there are {', '.join(sorted(RULES))}")
    kinds = RULES[name][1]
    for key in kinds:
        if key not in arguments:
            raise ConfigError(f"{name} needs argument {key!r}")
    for key, value in arguments.items():
        if key not in kinds:
            raise ConfigError(f"{name} has no argument {key!r}; it takes {', '.join(kinds) or 'none'}")
        fits, meaning = _KINDS[kinds[key]]
        if not fits(value):
            raise ConfigError(f"{name}: {key} is {value!r}; it must be {meaning}")
    return Rule(name, tuple((key, tuple(arguments[key]) if isinstance(arguments[key], list) else arguments[key]) for key in kinds))


def verdicts(rules: tuple[Rule, ...], text: str, loose: bool = False) -> tuple[bool, ...]:
    """One verdict per rule, in order."""
    return tuple(r.holds(text, loose) for r in rules)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of IFEval's file: its key, the prompt and the rules an answer must keep."""

    key: int
    prompt: str
    rules: tuple[Rule, ...]


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """Prompts of a JSONL file, plain or .gz, of {key, prompt, instruction_id_list, kwargs}; null arguments count as not given.

    Raises ConfigError naming file and line for what is no such record.
    """
    opened = gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8")
    with opened as lines:
        return [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
        names, given = record["instruction_id_list"], record["kwargs"]
        pairs = [(name, {k: v for k, v in arguments.items() if v is not None}) for name, arguments in zip(names, given, strict=True)]
        key, prompt = int(record["key"]), str(record["prompt"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where}: not a record of key, prompt, instruction_id_list and kwargs ({type(error).__name__}: {error})"
        ) from None
    try:
        return Prompt(key, prompt, tuple(rule(name, **arguments) for name, arguments in pairs))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
