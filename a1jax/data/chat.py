"""Conversations to tokens with a supervision mask that comes from construction, never from searching the text.

A tokenizer with a chat template renders through it, any other through the built-in Qwen-style format (``chat_builtin``). Model-written
text (after the generation prompt, through the turn-end token) has mask 1, everything else 0. Neighbouring pieces with equal mask are
joined and then encoded on their own, so the mask changes on token borders and a sampled turn can be put between its prompt and its
continuation: prompt ids + turn ids + continuation ids are the ids of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from a1jax.data import chat_builtin, chat_template
from a1jax.data.chat_builtin import Piece, ToolCallError, parse_turn, turn_text
from a1jax.data.errors import DataError
from a1jax.data.tokenizer import Tokenizer

__all__ = ["Piece", "ToolCallError", "continuation", "parse_turn", "render", "tokenize", "tokenize_many", "turn_text"]


def render(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> list[Piece]:
    """Pieces of the conversation in order; see Piece. Raises DataError for messages the format or the template cannot write."""
    if tokenizer.chat_template is None:
        return chat_builtin.render(messages, tools, tokenizer.turn_end, add_generation_prompt)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {name: tokenizer.spelling[i] for name, i in ids.items() if i is not None}
    return chat_template.render(tokenizer.chat_template, messages, tools, names, tokenizer.turn_end, add_generation_prompt)


def merged(pieces: Iterable[Piece]) -> list[tuple[str, bool]]:
    """(text, supervised) with neighbours of equal supervision joined."""
    groups = itertools.groupby(pieces, key=lambda piece: piece.supervised)
    return [("".join(piece.text for piece in group), supervised) for supervised, group in groups]


def tokenize(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    add_generation_prompt: bool = False,
    cut: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], mask float32 [T]) of a conversation; mask is 1 on the tokens the model writes.

    cut: the last message is a model's turn that a budget cut off; nothing after its last written character is in the tokens.
    """
    return tokenize_many(tokenizer, [(messages, tools)], add_generation_prompt, [cut])[0]


def tokenize_many(
    tokenizer: Tokenizer,
    conversations: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]],
    add_generation_prompt: bool = False,
    cut: Sequence[bool] = (),
) -> list[tuple[np.ndarray, np.ndarray]]:
    """``tokenize`` of each (messages, tools), encoding all pieces in one batch."""
    cut = list(cut) or [False] * len(conversations)
    parts = []
    for (messages, tools), short in zip(conversations, cut, strict=True):
        pieces = render(messages, tools, tokenizer, add_generation_prompt)
        parts.append(merged(_cut(pieces, messages) if short else pieces))
    ids = iter(_encode(tokenizer, [part for several in parts for part in several]))
    result = []
    for several in parts:
        encoded = [next(ids) for _ in several]
        mask = [np.full(len(e), float(supervised), np.float32) for e, (_, supervised) in zip(encoded, several, strict=True)]
        empty = [np.zeros(0, np.float32)]
        result.append((np.asarray([i for e in encoded for i in e], np.int32), np.concatenate(mask or empty)))
    return result


def _encode(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """Ids of every part. The turn-end token is put by id: some vocabularies do not parse it from text."""
    end = tokenizer.turn_end
    ends = [supervised and text.endswith(end) for text, supervised in parts]
    texts = [text[: -len(end)] if closed else text for (text, _), closed in zip(parts, ends, strict=True)]
    return [ids + [tokenizer.eos_id] if closed else ids for ids, closed in zip(tokenizer.encode_batch(texts), ends, strict=True)]


def _cut(pieces: list[Piece], messages: Sequence[dict[str, Any]]) -> list[Piece]:
    """The pieces up to the last character the model wrote in the last message, when that is a model's turn."""
    last = len(messages) - 1
    at = max((n for n, piece in enumerate(pieces) if piece.supervised and piece.message == last), default=None)
    if at is None:
        return pieces
    message = messages[last]
    text = pieces[at].text
    tail = (message.get("content") or message.get("reasoning_content") or "").rstrip()
    calls = message.get("tool_calls")
    end = text.rfind("</tool_call>") + len("</tool_call>") if calls else text.rfind(tail) + len(tail)
    return [*pieces[:at], Piece(text[:end] if tail or calls else "", True, last)]


def continuation(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], start: int, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """Ids a rollout appends after the turn-end token of the model's turn ``messages[start - 1]``: the template's text after it, the
    messages from ``start`` on and the generation prompt of the next turn. Raises DataError when ``messages[start - 1]`` is no model's
    turn."""
    pieces = render(messages, tools, tokenizer, add_generation_prompt=True)
    own = [n for n, piece in enumerate(pieces) if piece.supervised and piece.message == start - 1]
    if not own:
        raise DataError(f"messages[{start - 1}] is not a turn of the assistant: nothing to continue")
    return [i for ids in _encode(tokenizer, merged(pieces[own[-1] + 1 :])) for i in ids]
