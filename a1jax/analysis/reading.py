"""A kept run as what a reader sees: turns with their parts, who wrote them, what the loss looks at, tokens, and the records they left."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.tokenizer import Tokenizer
from ..domains.base import was_said
from ..stages import kept_runs
from ..stages.evaluate import PARSER, REFUSED
from ..types import Record, Trajectory

THINKING, TEXT, CALL, OBSERVATION, ERROR, CUT = "thinking", "text", "call", "observation", "error", "cut"


@dataclasses.dataclass(frozen=True)
class Turn:
    """role: of the message. name: of the tool that answered. parts: (kind, text). looked: whether the loss looks at it, which is where
    the model wrote it. tokens: ids of it, or of all up to the model's next turn; None where unknown. logp: mean over the tokens written."""

    role: str
    name: str
    parts: tuple[tuple[str, str], ...]
    looked: bool
    tokens: int | None = None
    logp: float | None = None
    records: tuple[Record, ...] = ()


def turns(run: Trajectory, tokenizer: Tokenizer | None = None) -> list[Turn]:
    """Every message of a run in order, and a last turn of kind CUT for ids that were written and never became a message: their text
    where ``tokenizer`` is the run's."""
    kept = run.metadata.get(kept_runs.KEY)
    written = iter(_written(kept) if kept else [])
    gaps = iter(_gaps(kept) if kept else [])
    records = list(run.records)
    out: list[Turn] = []
    gap = next(gaps, None)
    for message in run.messages:
        role = message["role"]
        caused = _caused(message, records)
        if role == "assistant":
            tokens, logp = next(written, (None, None))
            gap = next(gaps, None)
            out.append(Turn(role, "", _spoken(message), True, tokens, logp, caused))
        else:
            kind = ERROR if role == "tool" and _refused(message, out) else OBSERVATION if role == "tool" else TEXT
            out.append(Turn(role, visible(message.get("name")), ((kind, visible(message.get("content"))),), False, gap, None, caused))
            gap = None
    spoken = sum(turn.role == "assistant" for turn in out)
    for i, (tokens, logp) in enumerate(written, start=spoken):
        start, stop = kept["sampled"][i]
        text = visible(tokenizer.decode(kept["tokens"][start:stop])) if tokenizer and fits(run, tokenizer) else ""
        parts = ((TEXT, text),) if text else ()
        out.append(Turn("assistant", "", (*parts, (CUT, "cut here: this turn became no message")), True, tokens, logp))
    return out


def fits(run: Trajectory, tokenizer: Tokenizer) -> bool:
    """Whether a run's ids are this tokenizer's: whether they spell the question it was asked."""
    ids = run.metadata.get(kept_runs.KEY, {}).get("tokens") or []
    if not ids or max(ids) >= len(tokenizer.table):
        return False
    question = next((str(m.get("content") or "") for m in run.messages if m["role"] == "user"), "")
    return "".join(question.split()) in "".join(tokenizer.decode(ids).split())


def verdict(run: Trajectory) -> str:
    """What the verifier said at the end, "" where none did."""
    last = run.records[-1] if run.records else None
    return visible(last.outcome) if last is not None and last.action is None and last.outcome else ""


def visible(text: Any) -> str:
    """Text as it may be shown: control characters and halves of characters, which could move a cursor or break a file, are spelled out."""
    whole = text if isinstance(text, str) else "" if text is None else json.dumps(text)
    whole = whole.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in whole)


def arguments(call: dict[str, Any]) -> str:
    """name(argument=value, ...) of a call in a message, or of a record's action."""
    inner = call.get("function", call)
    given = inner.get("arguments")
    shown = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in given.items()) if isinstance(given, dict) else str(given or "")
    return visible(f"{inner.get('name', '?')}({shown})")


def pieces(run: Trajectory, tokenizer: Tokenizer) -> list[tuple[str, bool, float]] | None:
    """(text, looked, logp) of every id of a run, neighbours that look alike joined; None where the ids are another tokenizer's."""
    if not fits(run, tokenizer):
        return None
    arrays = kept_runs.to_rollout(run)
    table, spelling = tokenizer.table, tokenizer.spelling
    each = [(spelling[i].encode() if table[i] is None else table[i], s > 0, float(p)) for i, s, p in zip(*_columns(arrays), strict=True)]
    alike = itertools.groupby(each, key=lambda piece: (piece[1], shade(piece[2]) if piece[1] else 0))
    joined = [(list(group), looked) for (looked, _), group in alike]
    return [(visible(b"".join(t for t, _, _ in g).decode("utf-8", "replace")), looked, min(p for _, _, p in g)) for g, looked in joined]


def shade(logp: float) -> int:
    """0 for a token that had to come, up to 4 for one that hardly could: by probability above 0.9, 0.5, 0.1, 0.01, and below."""
    return sum(logp < edge for edge in (-0.105, -0.693, -2.303, -4.605))


def _columns(arrays: Any) -> Sequence[Any]:
    return arrays.tokens.tolist(), arrays.sampled, arrays.logp


def _written(kept: dict[str, Any]) -> Iterator[tuple[int, float | None]]:
    """(tokens, mean log-probability) of each stretch the model wrote."""
    logp = iter(kept["logp"])
    for start, stop in kept["sampled"]:
        own = list(itertools.islice(logp, stop - start))
        yield stop - start, sum(own) / len(own) if own else None


def _gaps(kept: dict[str, Any]) -> list[int]:
    """Tokens before the first stretch the model wrote, between each two, and after the last."""
    edges = [0, *(at for span in kept["sampled"] for at in span), len(kept["tokens"])]
    return [stop - start for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _caused(message: dict[str, Any], records: list[Record]) -> tuple[Record, ...]:
    """The records of the calls in a message, taken off ``records``; a turn that a simulated user replied to has one too, one that could
    not be read has none."""
    names = [(c.get("function") or c).get("name") for c in message.get("tool_calls") or ()]
    if message["role"] == "assistant" and not names:
        mine = records and was_said(records[0]) and records[0].action["arguments"].get("text") == message.get("content")
        return (records.pop(0),) if mine else ()
    found = []
    for name in names:
        if records and records[0].action is not None and records[0].action.get("name") == name:
            found.append(records.pop(0))
    return tuple(found)


def _spoken(message: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    parts = [(THINKING, visible(message.get("reasoning_content"))), (TEXT, visible(message.get("content")))]
    calls = [(CALL, arguments(call)) for call in message.get("tool_calls") or ()]
    return tuple((kind, text) for kind, text in (*parts, *calls) if text)


def _refused(message: dict[str, Any], before: list[Turn]) -> bool:
    """Whether an observation is an error: the parser's, or of a call whose record says so."""
    if message.get("name") == PARSER:
        return True
    asked = next((t for t in reversed(before) if t.role == "assistant"), None)
    mine = [r for r in asked.records if r.observation == message.get("content")] if asked else []
    return any((r.outcome or "").startswith(REFUSED) for r in mine)
