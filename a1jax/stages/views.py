"""A student's run as a teacher of another tokenizer reads it: the same conversation in the teacher's own tokens.

Prompts, observations and template text are rendered by the teacher's tokenizer and template, as ``rollout.agent`` renders them for the
student. What the student wrote is encoded from the text of its ids, turn by turn; its ids are never changed. Only these turns are aligned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..data import chat
from ..data.errors import DataError
from ..data.tokenizer import Tokenizer
from ..types import Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """tokens int32 [T']. ours, theirs: per turn [start, stop) in the student's tokens and in these. refused: why the teacher's template
    does not go on to write this conversation; the turns from there on are empty in ``theirs``, so nothing of them is aligned."""

    tokens: np.ndarray
    ours: tuple[tuple[int, int], ...]
    theirs: tuple[tuple[int, int], ...]
    refused: str = ""


def turns(sampled: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of every stretch of tokens that the model wrote."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sampled > 0, [0]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def view_all(runs: Sequence[Rollout], student: Tokenizer, teacher: Tokenizer, show_tools: bool) -> list[View]:
    """One view per run. A turn that the student ended with its end token ends with the teacher's."""
    written = [turns(run.sampled) for run in runs]
    ended = [[run.tokens[stop - 1] == student.eos_id for _, stop in own] for run, own in zip(runs, written, strict=True)]
    texts = [
        student.decode(run.tokens[start : stop - int(end)].tolist())
        for run, own, ends in zip(runs, written, ended, strict=True)
        for (start, stop), end in zip(own, ends, strict=True)
    ]
    encoded = iter(teacher.encode_batch(texts))
    return [
        _view(run, own, [next(encoded) + [teacher.eos_id] * int(end) for end in ends], sum(ends), teacher, show_tools)
        for run, own, ends in zip(runs, written, ended, strict=True)
    ]


def _view(run: Rollout, ours: list[tuple[int, int]], ids: list[list[int]], ended: int, teacher: Tokenizer, show_tools: bool) -> View:
    messages, tools = list(run.trajectory.messages), run.trajectory.tools if show_tools else ()
    models = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    models = models[len(models) - ended :]  # a turn that ended is a message; those before belong to the prompt
    first = models[0] if models else len(messages)
    tokens: list[int] = []
    theirs: list[tuple[int, int]] = []
    refused = ""
    try:
        tokens += chat.tokenize(teacher, messages[:first], tools=tools, add_generation_prompt=True)[0].tolist()
        for turn, written in enumerate(ids):
            theirs.append((len(tokens), len(tokens) + len(written)))
            tokens += written
            if turn + 1 == len(ids):
                break
            start = models[turn] + 1
            stop = models[turn + 1] if turn + 1 < len(models) else len(messages)
            if teacher.chat_template is None:  # the built-in format needs the turn alone, see Engine
                tokens += chat.continuation(teacher, messages[start - 1 : stop], 1)
            else:
                tokens += chat.continuation(teacher, messages[:stop], start, tools=tools)
    except DataError as error:  # a student's conversation may be odder than any that the template was written for
        refused = str(error)
        theirs += [(len(tokens), len(tokens))] * (len(ids) - len(theirs))
    return View(np.asarray(tokens, np.int32), tuple(ours), tuple(theirs), refused)
