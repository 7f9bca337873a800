"""Control roles: which token ids open, close and end things, by an explicit table and never by how similar two strings are.

A role is compared with the same role of the other tokenizer. ``TABLE`` names the spellings of public tokenizer families; what it does
not know, or knows wrongly, a user says per tokenizer as a plain mapping (``read`` takes it from a JSON file):

    {"turn_end": ["<|done|>"], "tool_call_open": [32001], "none": ["<think>"], "x_plan_open": ["<plan>"]}

A value is an id or a spelling that is one id. "none" takes a token's role away; a name that starts with ``x_`` is a role of the user's own.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

from a1jax.config import ConfigError

STOPS = ("turn_end", "eos")
"""Roles that end a model's turn. All of a teacher's stop ids add up to the student's stop."""

NEVER = ("bos", "pad")
"""Roles that are aligned with nothing: they stand for no text and nobody predicts them."""

SPELLED = ("think_open", "think_close", "tool_call_open", "tool_call_close", "tool_response_open", "tool_response_close")
"""Roles that a tokenizer without such a token writes as text, so that the atomic token stands for its spelling there."""

HEADERS = ("turn_start", "header_close", "user_open", "user_close", "system_open", "system_close", "tools_open", "tools_close",
           "calls_open", "results_open", "results_close", "code_open")  # fmt: skip
"""Roles of a template's own tokens, which no text stands for."""

TABLE: dict[str, tuple[str, ...]] = {
    "turn_end": ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|return|>", "<|call|>", "<|end|>", "<|eom_id|>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "<|endofprompt|>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<|startoftext|>"),
    "pad": ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]"),
    "think_open": ("<think>", "[THINK]"),
    "think_close": ("</think>", "[/THINK]"),
    "tool_call_open": ("<tool_call>",),
    "tool_call_close": ("</tool_call>",),
    "tool_response_open": ("<tool_response>",),
    "tool_response_close": ("</tool_response>",),
    "turn_start": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start|>"),
    "header_close": ("<|end_header_id|>", "<|message|>"),
    "user_open": ("[INST]", "<｜User｜>"),
    "user_close": ("[/INST]", "<｜Assistant｜>"),
    "system_open": ("[SYSTEM_PROMPT]",),
    "system_close": ("[/SYSTEM_PROMPT]",),
    "tools_open": ("[AVAILABLE_TOOLS]",),
    "tools_close": ("[/AVAILABLE_TOOLS]",),
    "calls_open": ("[TOOL_CALLS]",),
    "results_open": ("[TOOL_RESULTS]",),
    "results_close": ("[/TOOL_RESULTS]",),
    "code_open": ("<|python_tag|>",),
}
"""Role -> the spellings that have it wherever they are one control or added token. calls_open and code_open begin calls of another
format than tool_call_open (a list without an end, code), so that one is no counterpart of the other: a student that has such a token
and yet writes ``<tool_call>`` as text is to be compared by bytes."""

NAMES = (*STOPS, *NEVER, *SPELLED, *HEADERS)

Roles = dict[str, tuple[int, ...]]
"""Role -> its ids, the first of which is the one to write. Every id has at most one role."""

Own = Mapping[str, Sequence[int | str]]


def find(
    pieces: Mapping[str, int], turn_end: int | None = None, bos: int | None = None, pad: int | None = None, own: Own | None = None
) -> Roles:
    """The roles of a tokenizer.

    pieces: spelling -> id of its control and added tokens. turn_end, bos, pad: ids that it names itself. own: the user's table, which
    wins over both. An id that is both a stop and the padding is a stop (its mass must not be lost).
    Raises ConfigError for an unknown role, or a spelling or an id that the tokenizer has not.
    """
    role: dict[int, str] = {} if pad is None else {pad: "pad"}
    role |= {} if bos is None else {bos: "bos"}
    role |= {pieces[text]: name for name, texts in TABLE.items() for text in texts if text in pieces}
    role |= {} if turn_end is None else {turn_end: "turn_end"}
    for name, entries in (own or {}).items():
        if name != "none" and name not in NAMES and not name.startswith("x_"):
            raise ConfigError(f"role {name!r} is not known: use one of {', '.join(NAMES)}, none, or x_<a name of your own>")
        for entry in entries:
            role[_id_of(entry, name, pieces)] = name
    first = {turn_end: 0}  # the id a turn really ends with stands first in its role
    found: Roles = {}
    for i, name in sorted(role.items(), key=lambda item: (first.get(item[0], 1), item[0])):
        if name != "none":
            found[name] = (*found.get(name, ()), i)
    return {name: found[name] for name in (*NAMES, *sorted(set(found) - set(NAMES))) if name in found}


def read(path: str | pathlib.Path) -> Own:
    """A user's role table from a JSON file: {role: [id or spelling, ...]}. Raises ConfigError when it is not that."""
    try:
        table = json.loads(pathlib.Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"role table {path} cannot be read ({error}): give a JSON file {{role: [id or spelling, ...]}}") from None
    kinds = {type(entry) for entries in table.values() for entry in entries} if _is_table(table) else {object}
    if not kinds <= {int, str}:
        raise ConfigError(f"role table {path} has another form: write {{role: [id or spelling, ...]}}")
    return table


def _is_table(table: object) -> bool:
    return isinstance(table, dict) and all(isinstance(entries, list) for entries in table.values())


def _id_of(entry: int | str, name: str, pieces: Mapping[str, int]) -> int:
    if isinstance(entry, str):
        if entry not in pieces:
            raise ConfigError(f"role {name!r}: {entry!r} is not one control or added token of the tokenizer; give its id")
        return pieces[entry]
    return entry
