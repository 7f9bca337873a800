"""The expert of the service desk: it knows the policy and what it was told or shown, nothing else.

Its thoughts name each key right before its value, so that a small model looks one thing up at a time, and end in a verdict.
"""

from __future__ import annotations

from collections.abc import Generator

from . import general_policy as policies
from . import general_user as users
from .base import Call, Observation, Turn
from .general_policy import DONE, KEPT, NO_MATCH, REFUSED, Policy


def turns(opening: str, policy: Policy) -> Generator[Turn, Observation, None]:
    """Its turns from what the first caller says on; the run ends when nobody replies any more."""
    caller = ""
    while True:
        kind, thought = opening.split(f"{users.WANTS} ")[1].split(" ")[0], "same"
        if opening.startswith(users.NEW):
            seen = yield Turn("new", answer=users.WHO)
            caller, code = users.identity(seen.text)
            seen = yield Turn(f"new caller{caller}", Call("verify", {"customer": caller, "code": code}))
            thought = seen.text
        if thought == NO_MATCH:
            seen = yield Turn(thought, answer=REFUSED["identity"])
        else:
            seen = yield from _serve(policy, kind, caller, thought)
        opening = seen.text


def _serve(policy: Policy, kind: str, caller: str, thought: str) -> Generator[Turn, Observation, Observation]:
    """From the question for the order to the closing; returns what the user says then."""
    seen = yield Turn(thought, answer=users.WHICH)
    seen = yield Turn(seen.text, Call("show", {"order": seen.text}))
    name, order = policies.read(seen.text)
    thought, arguments = f"{name} of{order.owner} caller{caller}", {"order": name}
    if order.owner != caller:
        return (yield Turn(f"{thought} so foreign", answer=REFUSED["owner"]))
    thought += f" so own{users.WANTS}{policy.listed(kind)} is {order.state}"
    if order.state not in policy.states(kind):
        return (yield Turn(f"{thought} so forbidden", answer=REFUSED["state"]))
    thought += " so allowed"
    if kind == "change":
        seen = yield Turn(thought, answer=users.WHERE)
        arguments["value"] = seen.text
        thought = f"{name} to{seen.text}"
    thought += f"{policy.to_confirm()} is {kind}"
    if kind in policy.confirm:
        seen = yield Turn(thought, answer=users.confirmation(kind, name, arguments.get("value", "")))
        thought = seen.text
        if thought != users.YES:
            return (yield Turn(thought, answer=KEPT))
    seen = yield Turn(thought, Call(kind, arguments))
    return (yield Turn(seen.text, answer=DONE))
