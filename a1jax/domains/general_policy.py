"""The rules of a service desk: orders, what may be done to them, and the policy that says when.

The tools carry out what they are told; keeping the policy is up to who calls them. Policies differ from task to task.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

KINDS = ("change", "cancel", "refund")
STATES = ("open", "packed", "sent", "lost")  # an order may start in
_ELIGIBLE = {"change": STATES, "cancel": STATES, "refund": ("packed", "sent", "lost", "cancelled")}
AFTER = {"cancel": "cancelled", "refund": "refunded"}
_CONFIRMED = tuple(c for n in (1, 2) for c in itertools.combinations(KINDS, n))

DONE, KEPT = "Done.", "Kept."
REFUSED = {reason: f"Refused: {reason}." for reason in ("identity", "owner", "state")}
CLOSINGS = (DONE, KEPT, *REFUSED.values())
OK, NO_MATCH = "ok", "no match"  # what tools answer where there is nothing to show
HEAD = (
    "You run a service desk for orders; callers follow one another. Ask a new caller who is calling and verify the name with the code "
    "before you show or touch an order. Ask which order it is about, and show it before you decide. Close each wish in a turn without a "
    "call, which begins with one of these: Done. after you did it; Kept. if the caller did not confirm it; Refused: identity. if name "
    "and code do not match; Refused: owner. if the order is not the caller's own; Refused: state. if the order's state is not listed "
    "for the wish. Listed states:"
)
FIRST = " Confirm first:"


@dataclasses.dataclass(frozen=True)
class Order:
    """A row of the database. owner: a customer's name. value: the delivery slot, '#' and a number."""

    owner: str
    state: str
    value: str

    def text(self, name: str) -> str:
        return f"{name} of{self.owner} is {self.state} at{self.value}"

    def after(self, kind: str, value: str) -> Order:
        return dataclasses.replace(self, value=value) if kind == "change" else dataclasses.replace(self, state=AFTER[kind])


def read(text: str) -> tuple[str, Order]:
    """(name, order) of what ``Order.text`` wrote."""
    name, rest = text.split(" of", 1)
    owner, rest = rest.split(" is ", 1)
    return name, Order(owner, *rest.split(" at", 1))


@dataclasses.dataclass(frozen=True)
class Policy:
    """allowed: for each of KINDS the states in which an order may be so treated. confirm: the kinds a caller must confirm first."""

    allowed: tuple[tuple[str, ...], ...]
    confirm: tuple[str, ...]

    def states(self, kind: str) -> tuple[str, ...]:
        return self.allowed[KINDS.index(kind)]

    def listed(self, kind: str) -> str:
        return f" {kind} if {' or '.join(self.states(kind))}"

    def to_confirm(self) -> str:
        return f"{FIRST} {' or '.join(self.confirm)}"

    def text(self) -> str:
        return HEAD + "".join(f"{self.listed(kind)}." for kind in KINDS) + f"{self.to_confirm()}."

    def refusal(self, kind: str, order: Order, caller: str, genuine: bool) -> str | None:
        """Why a caller's wish must be refused, a key of REFUSED, or None; the first reason in the policy's order."""
        if not genuine:
            return "identity"
        if order.owner != caller:
            return "owner"
        return None if order.state in self.states(kind) else "state"


def draw(rng: np.random.Generator) -> Policy:
    """One of 1,296: two of four states for each kind, one or two kinds to confirm."""
    pairs = [list(itertools.combinations(_ELIGIBLE[kind], 2)) for kind in KINDS]
    return Policy(tuple(p[int(rng.integers(len(p)))] for p in pairs), _CONFIRMED[int(rng.integers(len(_CONFIRMED)))])


def phrases() -> tuple[str, ...]:
    """Every list that a policy may hold, as it is written: one symbol each lets a small model look a rule up at once."""
    pairs = dict.fromkeys(pair for kind in KINDS for pair in itertools.combinations(_ELIGIBLE[kind], 2))
    return tuple(" " + " or ".join(pair) for pair in (*pairs, *itertools.combinations(KINDS, 2)))
