"""Foreign run formats, one reader each: a decoded JSON record in, a Trajectory out, ``linking.Unusable`` when that cannot be.

Which reader fits is told by a record's structure (``recognise``); nothing is read from file names but the domain of NeMo-Gym runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from a1jax.data import chat_builtin, domain_names
from a1jax.data.linking import Unusable, content_text, link
from a1jax.types import FAILED, FINISHED, TRUNCATED, Record, Trajectory

_TAGS = re.compile(r"<(?:think|tool_call|tool_response|answer)>")
_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record stands: ``name`` is the file's name without folder and suffixes, ``line`` counts from 1."""

    name: str
    line: int


def recognise(record: Any) -> str | None:
    """Format of a decoded record: one of READERS, or None."""
    if not isinstance(record, dict):
        return None
    if str(record.get("format", "")).startswith("a1jax.trajectory"):
        return "a1jax"
    if "responses_create_params" in record or _is(record.get("response"), "output"):
        return "responses"
    if _listed(record.get("trajectory"), "action") or _listed(record.get("history"), "role"):
        return "swe-agent"
    messages = record.get("messages", record.get("traj"))
    if not _listed(messages, "role"):
        return None
    structured = any(message.get("tool_calls") or message.get("role") == "tool" for message in messages if isinstance(message, dict))
    spoken = (m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "assistant")
    return "tagged" if not structured and any(isinstance(text, str) and _TAGS.search(text) for text in spoken) else "chat"


def _is(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _listed(value: Any, key: str) -> bool:
    return isinstance(value, list) and bool(value) and _is(value[0], key)


def _dicts(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"{what} is no list of objects")
    return value


def schemas(tools: Any) -> tuple[dict[str, Any], ...]:
    """Tool schemas in the nested OpenAI chat form, from that form or the flat one of the Responses API."""
    nested = []
    for tool in _dicts(tools or [], "tools"):
        function = tool.get("function", tool)
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        nested.append({"type": "function", "function": kept})
    return tuple(nested)


def _reward(record: dict[str, Any]) -> float | None:
    reward = record.get("reward")
    return float(reward) if isinstance(reward, (int, float)) else None


def _verified(records: Sequence[Record], reward: float | None) -> tuple[Record, ...]:
    """The verification at the end of the run as a record of its own, over everything that was observed."""
    if reward is None:
        return tuple(records)
    seen = tuple(f"observation:{n}" for n, record in enumerate(records) if record.observation is not None)
    return (*records, Record(state=seen, outcome=f"reward {reward:g}"))


def read_chat(record: dict[str, Any], place: Place) -> Trajectory:
    """OpenAI chat messages: tau-bench's ``traj`` or ``messages``."""
    messages, records = link(_dicts(record.get("messages", record.get("traj")), "messages"))
    reward = _reward(record)
    metadata = {key: record[key] for key in ("trial",) if key in record}
    task = record.get("task_id", record.get("id", f"{place.name}:{place.line}"))
    domain = record.get("domain") if record.get("domain") in domain_names.DOMAINS else domain_names.DEFAULT
    status = None if reward not in (0.0, 1.0) else FINISHED if reward else FAILED
    return Trajectory(domain, str(task), messages, schemas(record.get("tools")), _verified(records, reward), reward, status, metadata)


def read_responses(record: dict[str, Any], place: Place) -> Trajectory:
    """OpenAI Responses items: ``responses_create_params.input``, then ``response.output`` (NeMo-Gym)."""
    asked, answered = record.get("responses_create_params") or {}, record.get("response") or {}
    if not isinstance(answered.get("output"), list):
        raise Unusable("no response output", "the record has a verdict but not what the model did")
    given = asked.get("input")
    given = [{"role": "user", "content": given}] if isinstance(given, str) else _dicts(given or [], "input")
    lead = [{"role": "system", "content": asked["instructions"]}] if asked.get("instructions") else []
    messages, records = link(lead + turns(given) + turns(_dicts(answered["output"], "output")))
    reward = _reward(record)
    cut = isinstance(answered.get("incomplete_details"), dict) or record.get("truncated") is True
    environment = place.name.partition("__")[0]
    metadata = {"environment": environment, "model": answered.get("model")}
    verifier = record.get("verifier_metadata")
    own = (record.get("task_id"), verifier.get("task_id") if isinstance(verifier, dict) else None, record.get("_ng_task_index"), place.line)
    task = f"{environment}/{next(i for i in own if i is not None)}"
    domain = domain_names.of_environment(place.name.replace("example_rollouts", ""))
    status = TRUNCATED if cut else None
    return Trajectory(domain, task, messages, schemas(asked.get("tools")), _verified(records, reward), reward, status, metadata)


def turns(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Responses items to chat messages. One turn of the model is its reasoning, then its message, then its calls; a reasoning or a
    message after a message or a call starts the next turn, unless a result follows it (some environments write the call first)."""
    messages: list[dict[str, Any]] = []
    stage = 0  # of the open turn: 0 none, 1 reasoning, 2 message, 3 calls
    for number, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": item.get("content")})
            stage = 0
            continue
        if kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "content": output, "tool_call_id": item.get("call_id")})
            stage = 0
            continue
        now = {"reasoning": 1, "message": 2, "function_call": 3}.get(kind)
        if now is None:
            raise Unusable("unknown item", str(kind))
        late = stage == 3 and now < 3 and number + 1 < len(items) and items[number + 1].get("type") == "function_call_output"
        if stage == 0 or (now < stage and not late) or now == stage == 2:
            messages.append({"role": "assistant", "content": ""})
        turn, stage = messages[-1], max(now, 3 * late)
        if kind == "reasoning":
            text = content_text(item.get("content") or item.get("summary") or [])
            before = turn.get("reasoning_content")
            turn |= {"reasoning_content": text if before is None else f"{before}\n{text}"} if text else {}
        elif kind == "message":
            turn["content"] += content_text(item.get("content"))
        else:
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
    return messages


def read_swe_agent(record: dict[str, Any], place: Place) -> Trajectory:
    """SWE-agent: ``history`` when it is there (it has the prompt), else the steps of ``trajectory``.

    Actions written as text in the answer stay text, and the observation stays a user message; their records name the action "shell".
    """
    if record.get("history"):
        raw = [m for m in _dicts(record["history"], "history") if not m.get("is_demo")]
    else:
        steps = _dicts(record.get("trajectory"), "trajectory")
        pairs = ((("assistant", step.get("response") or step.get("thought")), ("user", step.get("observation"))) for step in steps)
        raw = [{"role": role, "content": text} for pair in pairs for role, text in pair if text]
    messages, records = link(raw)
    if not records:
        records = _shell_records(record, raw)
    info = record.get("info") if isinstance(record.get("info"), dict) else {}
    ended = info.get("exit_status")
    status = None if not ended else FINISHED if ended == "submitted" else TRUNCATED if "cost" in ended or "context" in ended else FAILED
    task = str(record.get("_path") or record.get("instance_id") or f"{place.name}:{place.line}")
    metadata = {"exit_status": ended} if ended else {}
    return Trajectory("engineering", task, messages, (), records, _reward(record), status, metadata)


def _shell_records(record: dict[str, Any], raw: Sequence[dict[str, Any]]) -> tuple[Record, ...]:
    if record.get("trajectory"):
        steps = [(step.get("action"), step.get("observation")) for step in record["trajectory"]]
    else:
        after = [*raw[1:], {}]
        replies = [(m, n) for m, n in zip(raw, after, strict=True) if m.get("role") == "assistant"]
        steps = [(m.get("action"), n.get("content") if n.get("role") == "user" else None) for m, n in replies]
    return tuple(Record((), {"name": "shell", "arguments": {"command": action}}, seen) for action, seen in steps if action)


def read_tagged(record: dict[str, Any], place: Place) -> Trajectory:
    """Calls, results and thinking as tags in the text (WebDancer). The tools stay where they are, in the prompt's own words."""
    raw: list[dict[str, Any]] = []
    for message in _dicts(record.get("messages", record.get("traj")), "messages"):
        role, text = message.get("role"), content_text(message.get("content"))
        if role == "assistant":
            try:
                turn = chat_builtin.parse_turn(text.strip())
            except chat_builtin.ToolCallError as error:
                raise Unusable("tags do not parse", str(error)) from None
            turn["content"] = turn["content"].lstrip("\n")
            raw.append({**turn, "tool_calls": [{"function": call["function"]} for call in turn.get("tool_calls", ())]})
        elif role == "user" and raw and raw[-1].get("tool_calls") and text.lstrip().startswith("<tool_response>"):
            raw += [{"role": "tool", "content": body} for body in _responses(text, len(raw[-1]["tool_calls"]))]
        else:
            raw.append({"role": role, "content": text})
    messages, records = link(raw)
    metadata = {key: record[key] for key in ("answer", "tag", "task") if key in record}
    task = str(record.get("task_id", record.get("id", f"{place.name}:{place.line}")))
    return Trajectory("search", task, messages, (), _verified(records, _reward(record)), _reward(record), None, metadata)


def _responses(text: str, calls: int) -> list[str]:
    """Bodies of the <tool_response> blocks of a message; with one call the whole message is its result, whatever tags it quotes."""
    if calls == 1:
        match = re.fullmatch(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", text, re.DOTALL)
        bodies = [match.group(1)] if match else []
    else:
        bodies = _RESPONSE.findall(text)
        bodies = bodies if not _RESPONSE.sub("", text) else []
    if not bodies:
        raise Unusable("tags do not parse", "a <tool_response> message with text outside its blocks")
    return bodies


READERS: dict[str, Callable[[dict[str, Any], Place], Trajectory]] = {
    "chat": read_chat,
    "responses": read_responses,
    "swe-agent": read_swe_agent,
    "tagged": read_tagged,
}
