"""The simulated user of the service desk: callers who tell what they are asked, by fixed rules and without a model.

A caller opens with a wish that hides every fact, tells a fact when a turn asks for it, and confirms only what is really wanted.
Nothing a turn says raises; turns that ask for nothing new are useless, and after a few of them the caller hangs up.
"""

from __future__ import annotations

import dataclasses
import re

from .general_policy import CLOSINGS, Order

NEW, SAME, WANTS, ORDER = "A new caller", "The caller also", " wants to", " an order."
WHO, WHICH, WHERE = "Who is calling?", "Which order?", "To which value?"
CONFIRM = "Please confirm:"
YES, NO, WRONG, PARDON = "Yes.", "No.", "I do not want that.", "I do not understand."

# What a turn asks for, in any words: the fact and the words that ask for it.
_ASKS = {
    "identity": re.compile(r"\b(who|names?|codes?|identity|identify|verify)\b", re.IGNORECASE),
    "order": re.compile(r"\borders?\b", re.IGNORECASE),
    "value": re.compile(r"\b(values?|slots?|what)\b", re.IGNORECASE),
}
_CONFIRMS = re.compile(r"\bconfirm", re.IGNORECASE)
_NAMES = re.compile(r"[$#][a-z0-9]+(?:-[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Wish:
    """One wish of one caller. new: the caller is another than before. code: what the caller says it is; genuine: it is right.

    value: the slot wanted, "" where nothing is changed. agrees: the answer when asked to confirm. closing: the words, one of
    CLOSINGS, that the policy demands in the end; after: the order as it must be then.
    """

    caller: str
    code: str
    genuine: bool
    new: bool
    kind: str
    order: str
    value: str
    agrees: bool
    closing: str
    after: Order

    @property
    def opening(self) -> str:
        return f"{NEW if self.new else SAME}{WANTS} {self.kind}{ORDER}"

    @property
    def action(self) -> tuple[str, str, str]:
        return self.kind, self.order, self.value


def confirmation(kind: str, order: str, value: str) -> str:
    """The question whether to do that, as the expert puts it."""
    return f"{CONFIRM} {kind}{order}" + (f" to{value}" if value else "")


def identity(text: str) -> tuple[str, str]:
    """(name, code) out of what a caller says on being asked for them."""
    name, code = text.split("#", 1)
    return name, f"#{code}"


def closing(text: str) -> str | None:
    """The one of CLOSINGS that a turn begins with, or None."""
    said = text.strip().lower()
    return next((c for c in CLOSINGS if said.startswith(c[:-1].lower())), None)


def answer(wish: Wish, told: frozenset[str], text: str) -> tuple[str, frozenset[str], bool]:
    """(what the caller says to a turn, facts told by now, whether the turn asked for something new).

    Facts: "identity", "order", "value", and "confirmed" or "declined".
    """
    if _CONFIRMS.search(text) and _NAMES.search(text):
        return _confirm(wish, told, text)
    facts = {"identity": wish.caller + wish.code, "order": wish.order, "value": wish.value}
    asked = [fact for fact, pattern in _ASKS.items() if pattern.search(text) and facts[fact]]
    if not asked:
        return PARDON, told, False
    return " ".join(facts[fact] for fact in asked), told | set(asked), bool(set(asked) - told)


def _confirm(wish: Wish, told: frozenset[str], text: str) -> tuple[str, frozenset[str], bool]:
    """A confirmation counts only where the question names the kind, the order and the value, and no other order or value."""
    wanted = {name for name in (wish.order, wish.value) if name}
    if set(_NAMES.findall(text)) != wanted or not re.search(rf"\b{wish.kind}", text, re.IGNORECASE):
        return WRONG, told, False
    fact = "confirmed" if wish.agrees else "declined"
    return YES if wish.agrees else NO, told | {fact}, fact not in told
