"""One turn in two tokenizers' words, in a notebook: where its tokens lie, and what a teacher's words become for a student at one position.

Everything is computed by ``a1jax.align``: the positions (``spans``), the target of a position (``target``).
"""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from .. import checkpoint
from ..align import spans, target
from ..align.trie import NONE
from ..config import ConfigError
from ..data.tokenizer import Tokenizer
from ..models import transformer
from ..stages import folders
from .figures import Bars, Figure
from .shown import Drawn, Markup, Several, Table
from .vocabulary_views import Pair, piece, readable

SHADES = ("#dbe9f6", "#fde5c8")  # of neighbouring tokens, in turn


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """One turn in both tokenisations. ours [T], theirs [T_T]: ids, the end token last. log_p [T_T, V_T]: the teacher's log-probabilities of
    each of its tokens, given those before. teacher: what it is."""

    text: str
    ours: list[int]
    theirs: list[int]
    spans: spans.Spans
    log_p: np.ndarray
    teacher: str


def turn(pair: Pair, text: str | None = None, teacher: str | pathlib.Path | None = None) -> Turn:
    """A turn in both tokenisations, ended, with a teacher's words on it.

    text: what is written; None: the longest of the pair's. teacher: a parameters folder in the teacher's tokens (a stage's folder);
    None: a teacher of counts, which says what followed the token before in the pair's texts (add 0.001)."""
    text = max(pair.texts, key=len) if text is None else text
    ours, theirs = [*pair.student.encode(text), pair.student.eos_id], [*pair.teacher.encode(text), pair.teacher.eos_id]
    found = spans.align(ours, theirs, pair.map, text)
    if teacher is None:
        log_p, name = counted(pair, theirs), "a teacher of counts"
    else:
        log_p, name = _of_model(pathlib.Path(teacher), theirs, len(pair.map.unit_of_teacher)), str(teacher)
    return Turn(text, ours, theirs, found, log_p, name)


def counted(pair: Pair, ids: Sequence[int], smoothing: float = 0.001) -> np.ndarray:
    """[T, V_T] log-probabilities of each id given the one before, from bigram counts in the pair's texts; the first one's from the turns'
    beginnings. smoothing: added to every count of a valid id."""
    before = [NONE, *ids[:-1]]
    counts = np.zeros((len(ids), len(pair.map.unit_of_teacher)))
    rows: dict[int, list[int]] = {}
    for i, token in enumerate(before):
        rows.setdefault(token, []).append(i)
    for text in pair.texts:
        written = [NONE, *pair.teacher.encode(text), pair.teacher.eos_id]
        for a, b in zip(written, written[1:], strict=False):
            counts[rows.get(a, []), b] += 1
    counts += smoothing * pair.map.teacher_valid
    with np.errstate(divide="ignore"):
        return np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))


def _of_model(folder: pathlib.Path, ids: Sequence[int], rows: int) -> np.ndarray:
    """The same of a model, which reads the turn alone after its end token. Raises ConfigError for one of another vocabulary."""
    model, _ = folders.read_model(folder)
    if model.vocab_size != rows:
        raise ConfigError(
            f"{folder}: a model of {model.vocab_size} ids, the teacher's tokenizer has {rows}: give the one it was trained with"
        )
    params = checkpoint.load_params(folder / "params", checkpoint.stored_params(folder / "params"))
    read = jnp.asarray([[ids[-1], *ids[:-1]]], jnp.int32)
    at = jnp.arange(len(ids), dtype=jnp.int32)[None]
    logits = transformer.logits(params, read, at, jnp.ones_like(read), model)[0]
    return target.log_softmax(np.asarray(logits, float), np.ones(rows, bool))


def side_by_side(pair: Pair, turn: Turn) -> Markup:
    """The turn's text cut by both: every box is a token; where a line is drawn through both rows, both cuts fall together."""
    ours, theirs = _cuts(pair.student, turn.ours), _cuts(pair.teacher, turn.theirs)
    common = sorted({b for _, b in ours} & {b for _, b in theirs} | {0})
    made, plain, a, b = [], [], 0, 0
    for end in common[1:] or [max(ours[-1][1], theirs[-1][1])]:
        first, second = a, b
        while a < len(ours) and ours[a][1] <= end:
            a += 1
        while b < len(theirs) and theirs[b][1] <= end:
            b += 1
        rows = [_boxes(pair.student, turn.ours[first:a], first), _boxes(pair.teacher, turn.theirs[second:b], second)]
        made.append(f'<div style="display:inline-block;border-left:2px solid #24292f;margin:3px 0;padding:0 1px">{"<br>".join(rows)}</div>')
        sides = (
            "|".join(piece(t, i) for i in ids) for t, ids in ((pair.student, turn.ours[first:a]), (pair.teacher, turn.theirs[second:b]))
        )
        plain.append(" / ".join(sides))
    head = '<div style="font-size:90%;color:#57606a">upper row: student, lower row: teacher; ⏎ is a line end, · a space</div>'
    return Markup(f'{head}<div style="font-family:monospace;font-size:85%;line-height:1.5">{"".join(made)}</div>', "\n".join(plain))


def _cuts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) in bytes of every token; a control token takes one place, so that both sides' ends fall together."""
    ends = np.cumsum([len(tokenizer.table[i]) if tokenizer.table[i] is not None else 1 for i in ids]).tolist()
    return list(zip([0, *ends], ends, strict=False))


def _boxes(tokenizer: Tokenizer, ids: Sequence[int], first: int) -> str:
    style = "background:{};border:1px solid #b6bec8;border-radius:3px;margin:1px;padding:0 2px;white-space:pre"
    return "".join(
        f'<span style="{style.format(SHADES[(first + n) % 2])}" title="id {i}">{html.escape(piece(tokenizer, i))}</span>'
        for n, i in enumerate(ids)
    )


def positions(pair: Pair, turn: Turn) -> Table:
    """Every student token of the turn and the teacher tokens it lies in."""
    s, rows = turn.spans, []
    for i, token in enumerate(turn.ours):
        j, m = int(s.teacher[i]), int(s.last[i])
        inside = "" if s.masked[i] else "|".join(piece(pair.teacher, t) for t in turn.theirs[j : m + 1])
        where = None if s.masked[i] else j if j == m else f"{j}-{m}"
        rows.append(
            (i, piece(pair.student, token), where and str(where) or ("0" if where == 0 else None), inside, int(s.offset[i]), kind(s, i))
        )
    report = s.report()
    note = ", ".join(f"{name} {100 * report[name]:.0f} %" for name in ("straddled", "chained", "masked"))
    columns = ("position", "student's token", "teacher's place", "teacher's tokens", "bytes pending", "kind")
    return Table("Where the student's tokens lie in the teacher's", columns, tuple(rows), f"{len(turn.ours)} positions: {note}.")


def kind(s: spans.Spans, i: int) -> str:
    """synchronised, straddled (begins inside a teacher's token), chained (runs over several), both, or masked."""
    names = [name for name, at in (("straddled", s.straddled), ("chained", s.chained)) if at[i]]
    return "masked" if s.masked[i] else " and ".join(names) or "synchronised"


def first(turn: Turn, wanted: str) -> int:
    """The first position of the turn of this kind; where it has none, the first that is not masked."""
    of = [kind(turn.spans, i) for i in range(len(turn.ours))]
    return of.index(wanted) if wanted in of else next((i for i, k in enumerate(of) if k != "masked"), 0)


def one_target(pair: Pair, turn: Turn, position: int, k: int = 8) -> Several:
    """What the teacher says at one position, its k best ids and what each stands for there, and the target on the student's ids."""
    s, made = turn.spans, pair.map
    if not 0 <= position < len(turn.ours):
        raise ConfigError(f"position {position}: the turn has {len(turn.ours)}, from 0 on")
    if s.masked[position]:
        return Several((Table(f"Position {position}", ("what", "value"), (("kind", "masked: no target"),)),))
    got = target.target(turn.log_p, turn.ours, turn.theirs, s, made)
    j, offset = int(s.teacher[position]), int(s.offset[position])
    if offset:
        ids, units = made.starting_with(turn.theirs[j], offset)
    else:
        ids = np.flatnonzero(made.teacher_valid)
        units = made.unit_of_teacher[ids]
    mass = np.exp(turn.log_p[j, ids])
    best = np.argsort(-mass, kind="stable")[:k]
    total = mass.sum()
    rows = [
        (
            int(ids[n]),
            piece(pair.teacher, ids[n]),
            float(mass[n] / total),
            None if units[n] == NONE else int(units[n]),
            piece(pair.student, units[n]),
        )
        for n in best
    ]
    written, pending = (
        turn.ours[position],
        (made.teacher_symbols[made.teacher_starts[turn.theirs[j]] :][:offset]).astype(np.uint8).tobytes(),
    )
    said = f"the student wrote {piece(pair.student, written)!r} ({kind(s, position)}"
    said += f", {readable(pending)!r} of the teacher's token already written)" if offset else ")"
    columns = ("teacher id", "its text", "probability", "student id", "its text")
    theirs = Table(f"Position {position}: {said}. The teacher's {len(rows)} best ids there", columns, tuple(rows), turn.teacher)
    q = got.q[position]
    top = [int(u) for u in np.argsort(-q, kind="stable")[:k] if q[u] > 0]
    bars = {piece(pair.student, u) + f" ({u})": float(q[u]) for u in top}
    rest = float(q.sum() - sum(bars.values()))
    parts = {"the token written": [], "another unit": [], "nothing the student can write": []}
    for u in top:
        mine = u == got.alone[position] or (got.alone[position] == NONE and u == made.unit_of_student[written])
        for name in parts:
            parts[name].append(float(q[u]) if name == ("the token written" if mine else "another unit") else 0.0)
    labels = (*bars, "other units", "residual")
    parts["the token written"] += [0.0, 0.0]
    parts["another unit"] += [rest, 0.0]
    parts["nothing the student can write"] += [0.0, float(got.residual[position])]
    caption = (
        f"Target of position {position} on the student's ids (the {len(top)} largest), after ids that stand for the same were added up. "
        f"Log-probability of what was written, by the teacher: {float(got.score[position]):.3f} nats."
    )
    panel = Bars("target", "probability", labels, {name: tuple(values) for name, values in parts.items()})
    return Several((theirs, Drawn(Figure(f"target_{position}", "Its target", caption, (panel,)))))
