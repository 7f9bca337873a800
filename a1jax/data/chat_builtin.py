"""The built-in Qwen-style conversation format, written and read.

It differs from Qwen's own template in one thing: the thinking of every turn stays, so what a model wrote in a turn is, token for
token, a part of what is rendered later. ``parse_turn(text)`` of a well-formed turn, rendered again, gives ``text`` back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from a1jax.data.errors import DataError

GENERATION_PROMPT = "<|im_start|>assistant\n"
TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:"
    '\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_CONTROL = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>")
_TAG = re.compile(r"</?(?:think|tool_call|tool_response)>")


class ToolCallError(ValueError):
    """A turn that has no reading, or more than one; the message is one line for the model to read."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: its text, whether the model wrote it, and the index of its message (-1: the template's)."""

    text: str
    supervised: bool
    message: int


def render(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], turn_end: str, add_generation_prompt: bool) -> list[Piece]:
    """Pieces of the conversation in the built-in style; ``turn_end`` closes the model's turns, ``<|im_end|>`` all others."""
    pieces: list[Piece] = []
    lead = (messages[0].get("content") or "") if messages and messages[0].get("role") == "system" else None
    if tools:
        schemas = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        lead = (f"{lead}\n\n" if lead is not None else "") + TOOLS_HEAD + schemas + TOOLS_TAIL
    if lead is not None:
        pieces.append(Piece(f"<|im_start|>system\n{lead}<|im_end|>\n", False, 0 if messages[0].get("role") == "system" else -1))
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content") or ""
        if role == "assistant":
            pieces.append(Piece(GENERATION_PROMPT, False, i))
            pieces.append(Piece(turn_text(message) + turn_end, True, i))
            pieces.append(Piece("\n", False, i))
        elif role == "tool":
            opens = i == 0 or messages[i - 1].get("role") != "tool"
            closes = i + 1 == len(messages) or messages[i + 1].get("role") != "tool"
            text = f"\n<tool_response>\n{content}\n</tool_response>"
            pieces.append(Piece(("<|im_start|>user" if opens else "") + text + ("<|im_end|>\n" if closes else ""), False, i))
        elif role == "user" or (role == "system" and i > 0):
            pieces.append(Piece(f"<|im_start|>{role}\n{content}<|im_end|>\n", False, i))
        elif role != "system":
            raise DataError(f"message {i} has role {role!r}: expected system, user, assistant or tool")
    if add_generation_prompt:
        pieces.append(Piece(GENERATION_PROMPT, False, -1))
    return pieces


def turn_text(message: dict[str, Any]) -> str:
    """What the model writes for an assistant message, without the turn-end token."""
    parts = []
    if message.get("reasoning_content") is not None:
        parts.append(f"<think>\n{message['reasoning_content']}\n</think>\n\n")
    content = message.get("content") or ""
    parts.append(content)
    for n, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        body = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(function["name"], ensure_ascii=False)
        parts.append(("\n" if content or n else "") + f'<tool_call>\n{{"name": {name}, "arguments": {body}}}\n</tool_call>')
    return "".join(parts)


def parse_turn(text: str) -> dict[str, Any]:
    """The assistant message a model wrote in the built-in style, read strictly: exactly one reading or an error.

    ``text`` is one turn, with or without its ``<|im_end|>``. Returns {"role", "content"} and, where the turn has them,
    "reasoning_content" and "tool_calls" (ids call_0, call_1, ... in order). Raises ToolCallError, and nothing else, with one line:
    unclosed or stray tags, control tokens inside the turn, bad JSON, a missing name, arguments that are no object, text after a call.
    """
    body = text.rstrip()
    body = body[: -len("<|im_end|>")] if body.endswith("<|im_end|>") else text
    message: dict[str, Any] = {"role": "assistant"}
    stripped = body.lstrip()
    if stripped.startswith("<think>"):
        thinking, close, body = stripped[len("<think>") :].partition("</think>")
        if not close:
            raise ToolCallError("<think> is not closed: end the thinking with </think>")
        _refuse(_CONTROL.search(thinking), "inside the thinking")
        if "<think>" in thinking:
            raise ToolCallError("<think> inside <think>: close the thinking before opening another")
        message["reasoning_content"] = _inner(thinking)
        body = body[2:] if body.startswith("\n\n") else body
    content, *_ = body.split("<tool_call>", 1)
    calls = _calls(body, len(content)) if len(content) < len(body) else []
    _refuse(_CONTROL.search(content) or _TAG.search(content), "in the answer")
    message["content"] = content[:-1] if calls and content.endswith("\n") else content
    if calls:
        message["tool_calls"] = [{"id": f"call_{n}", "type": "function", "function": call} for n, call in enumerate(calls)]
    return message


def _inner(thinking: str) -> str:
    """Thinking without the one newline the format puts at either end."""
    thinking = thinking[1:] if thinking.startswith("\n") else thinking
    return thinking[:-1] if thinking.endswith("\n") else thinking


def _refuse(match: re.Match[str] | None, where: str) -> None:
    if match:
        raise ToolCallError(f"stray {match.group()} {where}: tags may only wrap one thinking and tool calls")


def _calls(body: str, at: int) -> list[dict[str, Any]]:
    """Read tool calls from ``body[at:]`` to its end. JSON decides where a call ends, so tags inside its strings are text."""
    calls = []
    while at < len(body):
        number = len(calls) + 1
        if not body.startswith("<tool_call>", at):
            raise ToolCallError(f"text after tool call {number - 1}: write tool calls last, one after the other")
        at = _skip(body, at + len("<tool_call>"))
        value, at = _json(body, at, number)
        at = _skip(body, at)
        if not body.startswith("</tool_call>", at):
            raise ToolCallError(f"tool call {number} is not closed: </tool_call> must follow its JSON object")
        at = _skip(body, at + len("</tool_call>"))
        calls.append(_checked(value, number))
    return calls


def _skip(body: str, at: int) -> int:
    while at < len(body) and body[at] in " \t\r\n":
        at += 1
    return at


def _json(body: str, at: int, number: int) -> tuple[Any, int]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value, end = json.JSONDecoder(object_pairs_hook=once, parse_constant=constant).raw_decode(body, at)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value, end
    except RecursionError:
        raise ToolCallError(f"tool call {number} is nested too deeply") from None
    except UnicodeEncodeError:
        raise ToolCallError(f"tool call {number} is not valid JSON: half a surrogate pair") from None
    except ValueError as error:
        reason = getattr(error, "msg", str(error)).splitlines()[0]
        raise ToolCallError(f"tool call {number} is not valid JSON: {reason}") from None


def _checked(value: Any, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ToolCallError(f"tool call {number} is not a JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ToolCallError(f'tool call {number} has no "name"')
    if not isinstance(value.get("arguments"), dict):
        raise ToolCallError(f'tool call {number} ({_line(name)}): "arguments" must be a JSON object')
    unknown = sorted(set(value) - {"name", "arguments"})
    if unknown:
        raise ToolCallError(f'tool call {number} ({_line(name)}) has an unknown key {_line(unknown[0])}: only "name" and "arguments"')
    return {"name": name, "arguments": value["arguments"]}


def _line(text: str) -> str:
    return json.dumps(text)[1:-1][:60]
