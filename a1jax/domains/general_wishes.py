"""Drawing the wishes of a task, one after the other on the database as it is by then, with the end that the policy demands."""

from __future__ import annotations

import dataclasses

import numpy as np

from .base import Split, in_split
from .general_policy import DONE, KEPT, KINDS, REFUSED, STATES, Order, Policy
from .general_user import Wish
from .search import CORE, title
from .store import KEYS, VALUES, cell

DECLINED = 0.2  # share of the wishes to be confirmed that the caller then drops


@dataclasses.dataclass
class Book:
    """The database while it is drawn. first: orders as they begin, now: as they are after the wishes so far; both by name.

    Pairs of caller and order are all of ``split``. There are 32 orders' names for every 8 wishes, so that callers do not run out.
    """

    rng: np.random.Generator
    policy: Policy
    split: Split
    steps: int
    codes: dict[str, str] = dataclasses.field(default_factory=dict)
    first: dict[str, Order] = dataclasses.field(default_factory=dict)
    now: dict[str, Order] = dataclasses.field(default_factory=dict)
    met: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # customer -> own orders that earlier wishes were about

    def wishes(self, callers: float, refused: float, reuse: float) -> tuple[Wish, ...]:
        """``steps`` wishes; the arguments are General's knobs."""
        out: list[Wish] = []
        while len(out) < self.steps:
            stays = bool(out) and out[-1].genuine and self.rng.random() >= callers
            caller = out[-1].caller if stays else self._customer(out[-1].caller if out else "")
            wish = self._wish(caller, not stays, refused, reuse)
            if wish is None:
                wish = self._another(out[-1].caller if out else "", refused, reuse)
            self.now[wish.order] = wish.after
            out.append(wish)
        return tuple(out)

    def _another(self, last: str, refused: float, reuse: float) -> Wish:
        """A wish of a new caller; callers for whom the split has no order left are passed over."""
        wish = None
        while wish is None:
            wish = self._wish(self._customer(last), True, refused, reuse)
        return wish

    def _customer(self, but: str) -> str:
        name = but
        while name == but:
            name = title(int(self.rng.integers(CORE)))
        self.codes.setdefault(name, f"#{int(self.rng.integers(VALUES))}")
        return name

    def _wish(self, caller: str, new: bool, refused: float, reuse: float) -> Wish | None:
        """One wish, or None where no order is left for this caller."""
        reasons = (*(("identity",) if new else ()), "owner", "owner", "state")  # orders met again give more of "state"
        against = reasons[int(self.rng.integers(len(reasons)))] if self.rng.random() < refused else None
        kind = KINDS[int(self.rng.integers(len(KINDS)))]
        known = self.met.get(caller, [])
        if known and against in (None, "state") and self.rng.random() < reuse:
            name = known[int(self.rng.integers(len(known)))]  # what becomes of it is up to its state by now
        else:
            name = self._fresh(caller, kind, against)
        if name is None:
            return None
        order, code = self.now[name], self.codes[caller]
        if against == "identity":
            code = self._value(but=code)
        value = self._value(but=order.value) if kind == "change" else ""
        reason = self.policy.refusal(kind, order, caller, against != "identity")
        agrees = kind not in self.policy.confirm or self.rng.random() >= DECLINED
        closing = REFUSED[reason] if reason else DONE if agrees else KEPT
        after = order.after(kind, value) if closing == DONE else order
        return Wish(caller, code, against != "identity", new, kind, name, value, bool(agrees), closing, after)

    def _fresh(self, caller: str, kind: str, against: str | None) -> str | None:
        """A new order for the wish, put into the database in a state that the policy lists for its kind or, if so wanted, does not."""
        size = len(KEYS) * max(1, -(-4 * self.steps // len(KEYS)))
        names = [cell(i) for i in range(size)]
        names = [name for name in names if name not in self.first and in_split(caller, name, self.split)]
        if not names:
            return None
        name = names[int(self.rng.integers(len(names)))]
        listed = self.policy.states(kind)
        states = [s for s in STATES if (s in listed) != (against == "state")]
        owner = self._customer(caller) if against == "owner" else caller
        self.first[name] = self.now[name] = Order(owner, states[int(self.rng.integers(len(states)))], self._value())
        if owner == caller:
            self.met.setdefault(caller, []).append(name)
        return name

    def _value(self, but: str = "") -> str:
        value = but
        while value == but or not value:
            value = f"#{int(self.rng.integers(VALUES))}"
        return value
