"""General agentic: a service desk under a policy, with a database and a user who reveals facts over turns.

Callers bring wishes about orders (change, cancel, refund), some of them against the policy. Tools: ``verify`` (name and code),
``show``, ``change``, ``cancel``, ``refund``; they do what they are told. The right end of a wish is one call after every check, or a
refusal for the right reason and no call at all. The verifier replays the run: the database, the policy at every call, how each wish
was closed, what was consulted. Later wishes meet orders that earlier ones changed.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Generator
from typing import Any

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from . import general_expert
from . import general_policy as policies
from . import general_user as users
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer, tool, was_said
from .general_policy import AFTER, KEPT, KINDS, NO_MATCH, OK, STATES, Order, Policy
from .general_user import Wish
from .general_wishes import Book
from .search import CORE, title
from .store import KEYS, VALUES, cell

TOOLS = (
    tool("verify", "Whether a code, such as #7, is the one of a customer.", customer="string", code="string"),
    tool("show", "Show an order: owner, state, value.", order="string"),
    tool("change", "Change the value of an order.", order="string", value="string"),
    tool("cancel", "Cancel an order.", order="string"),
    tool("refund", "Refund an order.", order="string"),
)


@dataclasses.dataclass(frozen=True)
class Desk:
    """The state of a run. wish: number of wishes closed. told, checked, useless: of the wish in progress; checked: the name and
    code that the caller gave went through ``verify``.

    closed: (words, the order as it was then, what should have been looked up or asked and was not, or "") per closed wish.
    broken: (wish, reason) per call against the policy.
    """

    orders: dict[str, Order]
    wish: int = 0
    told: frozenset[str] = frozenset()
    checked: bool = False
    useless: int = 0
    hung_up: bool = False
    shown: frozenset[str] = frozenset()
    closed: tuple[tuple[str, Order, str], ...] = ()
    broken: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class GeneralTask(Task):
    policy: Policy = None
    codes: tuple[tuple[str, str], ...] = ()  # customer and code
    orders: tuple[tuple[str, Order], ...] = ()  # the database in the beginning
    wishes: tuple[Wish, ...] = ()
    patience: int = 3

    tools = TOOLS
    options = policies.CLOSINGS

    @property
    def content(self) -> str:
        """The question is the policy and an opening that hides every fact."""
        return repr((self.question, self.wishes, self.orders))

    def messages(self) -> tuple[dict[str, Any], ...]:
        return {"role": "system", "content": self.policy.text()}, {"role": "user", "content": self.wishes[0].opening}

    def reset(self) -> Desk:
        return Desk(dict(self.orders))

    def _over(self, state: Desk) -> bool:
        return state.hung_up or state.wish == len(self.wishes)

    def step(self, state: Desk, call: Call):
        problem = self.check_call(call)
        if problem is None and self._over(state):
            problem = "error: nobody is calling any more"
        if problem:
            return state, Observation(problem, error=True)
        arguments = {name: value.strip() for name, value in call.arguments.items()}
        wish = self.wishes[state.wish]
        if call.name == "verify":
            return self._verify(state, wish, **arguments)
        name, value = arguments["order"], arguments.get("value", "")
        order = state.orders.get(name)
        if order is None:
            return state, Observation(f"error: no order {name[:60]!r}", error=True)
        if call.name == "change" and not re.fullmatch(r"#\d{1,6}", value, flags=re.ASCII):
            return state, Observation(f"error: change: value must be '#' and a number, got {value[:60]!r}", error=True)
        why = self._against(state, wish, (call.name, name, value), order)
        if why:
            state = dataclasses.replace(state, broken=(*state.broken, (state.wish, why)))
        if call.name == "show":
            return dataclasses.replace(state, shown=state.shown | {name}), Observation(order.text(name), refs=(name,))
        orders = {**state.orders, name: order.after(call.name, value)}
        return dataclasses.replace(state, orders=orders), Observation(OK, refs=(name,))

    def _verify(self, state: Desk, wish: Wish, customer: str, code: str):
        known = dict(self.codes).get(customer)
        if known is None:
            return state, Observation(f"error: no customer {customer[:60]!r}", error=True)
        # Only what this caller said counts: another's code, heard from an earlier caller, makes nobody genuine.
        checked = state.checked or (customer, code) == (wish.caller, wish.code)
        return dataclasses.replace(state, checked=checked), Observation(OK if code == known else NO_MATCH, refs=(customer,))

    def _against(self, state: Desk, wish: Wish, action: tuple[str, str, str], order: Order) -> str | None:
        """Which rule of the policy a call breaks, as one line, or None."""
        kind, name, _ = action
        if not (state.checked and wish.genuine):
            return f"{kind} {name} before the caller was verified"
        if kind == "show":
            return None
        reason = self.policy.refusal(kind, order, wish.caller, True)
        if reason == "owner":
            return f"{kind} {name}, which is not the caller's own"
        if reason == "state":
            return f"{kind} {name}, which is {order.state}"
        if kind in self.policy.confirm and ("confirmed" not in state.told or action != wish.action):
            return f"{kind} {name} without a confirmation"
        return None

    def reply(self, state: Desk, text: str) -> tuple[Desk, Observation | None]:
        if self._over(state):
            return state, None
        wish, words = self.wishes[state.wish], users.closing(text)
        if words is not None:
            return self._close(state, wish, words)
        said, told, useful = users.answer(wish, state.told, text)
        state = dataclasses.replace(state, told=told, useless=state.useless + (not useful))
        if state.useless >= self.patience:
            return dataclasses.replace(state, hung_up=True), None
        return state, Observation(said)

    def _close(self, state: Desk, wish: Wish, words: str) -> tuple[Desk, Observation | None]:
        looked_up = wish.order in state.shown if wish.genuine else state.checked
        missing = "" if looked_up else f"{wish.order if wish.genuine else wish.caller} was never looked up"
        if words == KEPT and "declined" not in state.told:
            missing = missing or "the caller was never asked to confirm"
        number, closed = state.wish + 1, (*state.closed, (words, state.orders[wish.order], missing))
        state = dataclasses.replace(state, wish=number, useless=0, closed=closed)
        if self._over(state):
            return state, None
        following = self.wishes[number]
        told = frozenset() if following.new else state.told & {"identity"}
        checked = state.checked and not following.new
        return dataclasses.replace(state, told=told, checked=checked), Observation(following.opening)

    def expert(self) -> Generator[Turn, Observation, None]:
        return general_expert.turns(self.wishes[0].opening, self.policy)

    def _replay(self, trajectory: Trajectory) -> Desk:
        """The state after the run's calls and sayings, done anew on the initial database."""
        state = self.reset()
        for r in trajectory.records:
            if was_said(r):
                state, _ = self.reply(state, r.action["arguments"]["text"])
            elif r.action is not None:
                state, _ = self.step(state, Call(r.action["name"], r.action["arguments"]))
        answer = final_answer(trajectory)
        return state if answer is None else self.reply(state, answer)[0]

    def verify(self, trajectory: Trajectory) -> Outcome:
        if final_answer(trajectory) is None:
            return Outcome(False, 0.0, "answer: none given")
        state = self._replay(trajectory)
        reason = self._fault(state)
        return Outcome(reason is None, float(reason is None), reason or "state, policy and evidence: accepted")

    def _fault(self, state: Desk) -> str | None:
        if state.broken:
            return f"policy: {state.broken[0][1]}, wish {state.broken[0][0] + 1}"
        if state.wish < len(self.wishes):
            return f"user: {'hung up on' if state.hung_up else 'still waits for'} wish {state.wish + 1}"
        wanted = dict(self.orders)
        for number, (wish, (words, order, missing)) in enumerate(zip(self.wishes, state.closed, strict=True), 1):
            wanted[wish.order] = wish.after
            if order != wish.after:
                return f"state: {order.text(wish.order)} after wish {number}, should be {wish.after.text(wish.order)}"
            if words != wish.closing:
                return f"answer: wish {number} was closed with '{words}', should be '{wish.closing}'"
            if missing:
                return f"evidence: {missing}, wish {number}"
        wrong = [name for name in wanted if state.orders[name] != wanted[name]]
        return f"state: {state.orders[wrong[0]].text(wrong[0])} in the end, should be {wanted[wrong[0]].text(wrong[0])}" if wrong else None

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """One verdict per wish: closed in the right words, its order looked up and as it must be then, no rule broken meanwhile."""
        state = self._replay(trajectory)
        broken = {number for number, _ in state.broken}
        verdicts = [
            number not in broken and closed == (wish.closing, wish.after, "")
            for number, (wish, closed) in enumerate(zip(self.wishes, state.closed, strict=False))
        ]
        return (*verdicts, *(False for _ in self.wishes[len(verdicts) :]))


@dataclasses.dataclass(frozen=True)
class General(Domain):
    name: str = "general"
    callers: float = 0.4  # probability that the next wish is another caller's
    refused: float = 0.4  # share of the wishes that the policy forbids
    reuse: float = 0.5  # probability that a wish is about an order that an earlier one was about
    patience: int = 3  # useless turns in one wish after which a caller hangs up

    def __post_init__(self):
        for knob in ("callers", "refused", "reuse"):
            if not 0.0 <= getattr(self, knob) <= 1.0:
                raise ConfigError(f"general.{knob} is {getattr(self, knob)}; it is a probability")
        if self.patience < 1:
            raise ConfigError(f"general.patience is {self.patience}; a caller bears at least 1 useless turn")

    def propose(self, seed: int, steps: int, split: Split = "train") -> GeneralTask:
        """``steps`` wishes; the chain pairs each wish's caller with its order.

        Raises ConfigError when steps is less than 1.
        """
        if steps < 1:
            raise ConfigError(f"general: a task needs at least 1 step, got {steps}")
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        policy = policies.draw(rng)
        book = Book(rng, policy, split, steps)
        wishes = book.wishes(self.callers, self.refused, self.reuse)
        looked_up = [w.order if w.genuine else w.caller for w in wishes]
        return GeneralTask(
            domain=self.name,
            task_id=f"general-{split}-{steps}-{seed}",
            steps=steps,
            question=f"{policy.text()}\n{wishes[0].opening}",
            answer=wishes[-1].closing,
            evidence=tuple(dict.fromkeys(looked_up)),
            chain=tuple((w.caller, w.order) for w in wishes),
            policy=policy,
            codes=tuple(sorted(book.codes.items())),
            orders=tuple(sorted(book.first.items())),
            wishes=wishes,
            patience=self.patience,
        )

    def scaffold(self) -> tuple[str, ...]:
        words = (*KINDS, *STATES, *AFTER.values(), "to", "of", "is", "at", "caller", "so own", "so foreign", "so allowed", "so forbidden")
        return (
            *("\n<|im_start|>user\n", f"<|im_start|>system\n{policies.HEAD}", policies.FIRST, users.CONFIRM),
            *(users.NEW, users.SAME, users.WANTS, users.ORDER, users.WHO, users.WHICH, users.WHERE),
            *(users.YES, users.NO, users.WRONG, users.PARDON, OK, NO_MATCH, "new", "same"),
            *policies.CLOSINGS,
            '{"name": "verify", "arguments": {"customer": "',
            '", "code": "',
            '", "value": "',
            *(f'{{"name": "{name}", "arguments": {{"order": "' for name in ("show", *KINDS)),
            *(f" {word}" for word in words),
            *(f" {kind} if" for kind in KINDS),
            *policies.phrases(),
            *(title(i) for i in range(CORE)),
            *(cell(i) for i in range(len(KEYS))),
            *(f"#{i}" for i in range(VALUES)),
        )
