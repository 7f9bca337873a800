"""From a run's messages, whoever wrote them, to checked chat messages and linked records (s, a, o, v).

Every call is linked to its result: by id where there is one, else by order; an id used again (SWE-agent demonstrations do) means the
latest call of that name. A call without result is an error of the run, with one exception: calls of the very last message, when
nothing follows it, ended the run (a submit, a hand-over, an action whose effect only the environment saw) and are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from a1jax.types import Record

ROLES = ("system", "user", "assistant", "tool")
MIN_EVIDENCE = 4
"""Shortest argument value (characters) that counts as taken from an observation when it occurs in it."""


class Unusable(Exception):
    """A run that cannot be read. reason: a short category, counted in reports; detail: what exactly."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def content_text(content: Any) -> str:
    """Text of a message's content: a string, nothing, or a list of text parts. Raises Unusable for pictures, sound and the like."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Unusable("content is not text", type(content).__name__)
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Unusable("content is not text", str(part.get("type") if isinstance(part, dict) else part)[:40])
        texts.append(text)
    return "".join(texts)


def split_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant message whose content starts with <think>...</think>, with that as its reasoning_content.

    Some servers put the opening tag into the prompt, so a lone </think> ends a thinking too.
    """
    text = message["content"].lstrip()
    opens = text.startswith("<think>") or "<think>" not in text
    if "reasoning_content" in message or "</think>" not in text or not opens:
        return message
    thinking, _, rest = text.removeprefix("<think>").partition("</think>")
    return message | {"reasoning_content": thinking.strip("\n"), "content": rest.lstrip("\n")}


def arguments_of(value: Any, name: str) -> dict[str, Any]:
    """A call's arguments as an object; they may come as JSON text. Raises Unusable for anything else."""
    if value is None or value == "":
        return {}
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise Unusable("arguments are not JSON", f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise Unusable("arguments are not an object", f"{name}: {type(value).__name__}")
    return value


def link(raw: Sequence[dict[str, Any]]) -> tuple[tuple[dict[str, Any], ...], tuple[Record, ...]]:
    """Checked messages in the form of types.Trajectory and one Record per call, in order.

    raw: messages with role, content, and optionally reasoning_content, tool_calls, tool_call_id, name. Raises Unusable for an unknown
    role, bad arguments, a call without result, a result without call, or a run in which the model says nothing.
    """
    messages: list[dict[str, Any]] = []
    records: list[Record] = []
    pending: list[tuple[str, int]] = []  # (call id, index of its record)
    for number, message in enumerate(raw):
        role = {"developer": "system"}.get(message.get("role"), message.get("role"))
        if role not in ROLES:
            raise Unusable("unknown role", f"{role!r} in message {number}")
        clean: dict[str, Any] = {"role": role, "content": content_text(message.get("content"))}
        if role == "tool":
            call_id, at = _answered(pending, message, number)
            action = records[at].action or {}
            clean |= {"tool_call_id": call_id, "name": action["name"]}
            records[at] = Record(records[at].state, action, clean["content"], None)
        else:
            _nothing_pending(pending, records)
        if role == "assistant":
            if message.get("reasoning_content") is not None:
                clean["reasoning_content"] = content_text(message["reasoning_content"])
            clean = split_thinking(clean)
            calls = [_call(call, len(records) + n) for n, call in enumerate(message.get("tool_calls") or ())]
            for call in calls:
                pending.append((call["id"], len(records)))
                action = dict(call["function"])
                records.append(Record(evidence(action["arguments"], records), action))
            clean |= {"tool_calls": calls} if calls else {}
        messages.append(clean)
    if pending and messages[-1]["role"] != "assistant":
        _nothing_pending(pending, records)
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no model turn")
    return tuple(messages), tuple(records)


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else {}
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Unusable("call without name", f"call {number}")
    arguments = arguments_of(function.get("arguments"), name)
    return {"id": str(call.get("id") or f"call_{number}"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _answered(pending: list[tuple[str, int]], message: dict[str, Any], number: int) -> tuple[str, int]:
    """Take the call that ``message`` answers out of ``pending``."""
    several = message.get("tool_call_ids") or [None]
    call_id = message.get("tool_call_id") or several[0]
    found = next((n for n, (own, _) in enumerate(pending) if call_id is None or own == call_id), None)
    if found is None:
        raise Unusable("result without call", f"message {number}, id {call_id!r}")
    return pending.pop(found)


def _nothing_pending(pending: list[tuple[str, int]], records: list[Record]) -> None:
    if pending:
        call_id, at = pending[0]
        raise Unusable("call without result", f"{records[at].action['name']} ({call_id}), {len(pending)} in all")


def evidence(arguments: dict[str, Any], earlier: Sequence[Record]) -> tuple[str, ...]:
    """References ``observation:n`` to the earlier observations in which a value of ``arguments`` stands word for word.

    This is all that can be known of s_t from the outside: what an action copied, not what its author had in mind.
    """
    values = [text for text in _strings(arguments) if len(text) >= MIN_EVIDENCE]
    seen = [record.observation or "" for record in earlier]
    return tuple(f"observation:{n}" for n, text in enumerate(seen) if any(value in text for value in values))


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []
