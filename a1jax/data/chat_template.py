"""Rendering through a tokenizer's own Jinja template, knowing which characters the model wrote.

The template's syntax tree gets invisible markers at the start and end of every turn of every loop; a marker speaks only when the
loop's variable *is* one of the messages, so the loop over messages is found at run time, whatever it is called. What a model writes is
then the assistant's stretch without the generation prompt at its front and whatever follows the turn-end token at its back. Templates
with ``{% generation %}`` blocks say it themselves and are believed. No text is ever searched for tags, so look-alikes do no harm.
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from a1jax.data.chat_builtin import Piece
from a1jax.data.errors import DataError

_MARK = "a1jax_mark"


class Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: the template's own word for what the model writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_mark(line, "g", True), *body, _mark(line, "g", False)]


def _mark(line: int, loop: int | str, opens: bool, target: str | None = None) -> nodes.Output:
    arguments = [nodes.Const(loop), nodes.Const(opens), nodes.Name(target, "load") if target else nodes.Const(None)]
    call = nodes.Call(nodes.Name(_MARK, "load"), arguments, [], None, None)
    return nodes.Output([call]).set_lineno(line)


def environment() -> jinja2.Environment:
    """The environment chat templates are written for (the convention of Hugging Face's tokenizers)."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return env


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """The template with markers. Raises DataError when it is no Jinja."""
    env = environment()
    try:
        tree = env.parse(source)
        _instrument(tree, [], [0])
        return jinja2.Template.from_code(env, env.compile(tree), env.make_globals(None))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"chat template, line {error.lineno}: {error.message}") from None


def _instrument(node: nodes.Node, loop: list[int], count: list[int]) -> None:
    """Put markers round the body of every loop below ``node`` and before every ``continue`` and ``break`` of it."""
    for field, value in node.iter_fields():
        if not isinstance(value, list):
            if isinstance(value, nodes.Node):
                _instrument(value, loop, count)
            continue
        changed: list[Any] = []
        for child in value:
            if isinstance(child, (nodes.Continue, nodes.Break)) and loop:
                changed.append(_mark(child.lineno, loop[-1], False))
            if isinstance(child, nodes.For):
                _instrument_loop(child, loop, count)
            elif isinstance(child, nodes.Node):
                _instrument(child, loop, count)
            changed.append(child)
        setattr(node, field, changed)


def _instrument_loop(node: nodes.For, loop: list[int], count: list[int]) -> None:
    count[0] += 1
    number = count[0]
    for part in (node.iter, node.test):
        if part is not None:
            _instrument(part, loop, count)
    wrapper = nodes.Scope(node.body)
    _instrument(wrapper, [*loop, number], count)
    target = node.target.name if isinstance(node.target, nodes.Name) else None
    node.body = [_mark(node.lineno, number, True, target), *wrapper.body, _mark(node.lineno, number, False)]
    wrapper = nodes.Scope(node.else_)
    _instrument(wrapper, loop, count)
    node.else_ = wrapper.body


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    names: dict[str, str],
    turn_end: str,
    add_generation_prompt: bool,
) -> list[Piece]:
    """Pieces of the rendered conversation; their texts joined are what plain Jinja renders.

    names: further variables of the template (bos_token, eos_token, pad_token). turn_end: text of the token that ends a model's turn.
    Raises DataError when the template refuses the messages or does not loop over them.
    """
    compiled = _compiled(template)
    chat = copy.deepcopy(list(messages))
    for message in chat:
        message["content"] = "" if message.get("content") is None else message["content"]
    context = {"messages": chat, "tools": list(tools) or None, "documents": None, **names}
    plain, spans = _run(compiled, context | {"add_generation_prompt": False}, chat)
    prompted, _ = _run(compiled, context | {"add_generation_prompt": True}, chat)
    if not prompted.startswith(plain):
        raise DataError("the chat template changes earlier text when add_generation_prompt is set: its masks would be wrong")
    prompt = prompted[len(plain) :]
    pieces, at = [], 0
    for start, end, message, generated in spans:
        wrote = (0, end - start)
        if not generated:
            wrote = _written(plain[start:end], prompt, turn_end) if chat[message].get("role") == "assistant" else (0, 0)
        begin, stop = start + wrote[0], start + wrote[1]
        pieces += [Piece(plain[at:start], False, -1), Piece(plain[start:begin], False, message), Piece(plain[begin:stop], True, message)]
        pieces.append(Piece(plain[stop:end], False, message))
        at = end
    pieces += [Piece(plain[at:], False, -1)] + ([Piece(prompt, False, -1)] if add_generation_prompt else [])
    seen = {piece.message for piece in pieces if piece.supervised}
    lost = [i for i, message in enumerate(chat) if message.get("role") == "assistant" and i not in seen]
    if lost and not any(generated for *_, generated in spans):
        raise DataError(f"the chat template writes assistant message {lost[0]} outside a loop over messages: no mask can be made")
    return [piece for piece in pieces if piece.text]


def _written(stretch: str, prompt: str, turn_end: str) -> tuple[int, int]:
    """[begin, end) of what the model wrote in an assistant's stretch: after the generation prompt, through the turn-end token.

    A prompt that only partly fits (it opens a thinking that this turn does not have) counts up to its last whole line or tag.
    """
    begin = len(os.path.commonprefix([stretch, prompt]))
    if begin < len(prompt):
        head = stretch[:begin]
        begin = max(head.rfind("\n"), head.rfind(">")) + 1
    bare = stretch.rstrip()
    return begin, max(begin, len(bare)) if turn_end and bare.endswith(turn_end) else len(stretch)


def _run(compiled: jinja2.Template, context: dict[str, Any], chat: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int, int, bool]]]:
    """Rendered text and the stretches (start, end, message index, is a generation block) in it.

    With generation blocks only those are returned, else the stretches of all messages.
    """
    text = json.dumps([chat, context["tools"]], ensure_ascii=False, default=str)
    sign = next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    index = {id(message): i for i, message in enumerate(chat)}
    opened: dict[Any, Any] = {}

    def mark(loop: int | str, opens: bool, target: Any) -> str:
        if opens:
            opened[loop] = index.get(id(target)) if loop != "g" else -1
            return f"{sign}({opened[loop]}{'g' if loop == 'g' else ''}{sign}" if opened[loop] is not None else ""
        return f"{sign}){'g' if loop == 'g' else ''}{sign}" if opened.get(loop) is not None else ""

    try:
        parts = compiled.render(context | {_MARK: mark}).split(sign)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {str(error).splitlines()[0] if str(error) else error!r}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"the chat template fails on these messages ({type(error).__name__}: {error})") from None
    return _spans(parts, chat)


def _spans(parts: list[str], chat: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int, int, bool]]]:
    """Texts and markers alternate in ``parts``. Only the outermost loop over messages and the outermost block count."""
    at, depth, current, start, spans = 0, 0, -1, 0, []
    inside, begin = 0, 0
    for text, marker in zip(parts[::2], [*parts[1::2], ""], strict=True):
        at += len(text)
        if marker.endswith("g"):
            inside += 1 if marker[0] == "(" else -1
            if marker[0] == "(" and inside == 1:
                begin = at
            elif marker[0] == ")" and inside == 0:
                spans.append((begin, at, current if depth else -1, True))
        elif marker.startswith("("):
            depth += 1
            if depth == 1:
                start, current = at, int(marker[1:])
        elif marker:
            depth -= 1
            if depth == 0 and at > start:
                spans.append((start, at, current, False))
    generated = [span for span in spans if span[3]]
    return "".join(parts[::2]), generated or spans
