"""Two tokenizers side by side in a notebook: which ids of the one stand for which of the other, as ``a1jax.align.vocab_map`` says."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter

import numpy as np

from ..align import byte_table, vocab_map
from ..align.trie import NONE
from ..align.vocab_map import VocabMap
from ..data import chat
from ..data import tokenizer as tokenizers
from ..data.tokenizer import Tokenizer
from ..domains import QUICKSTART, Task, solve
from ..stages import cross_tokenizer, experts
from . import reading
from .shown import Several, Table

KINDS = ("exact", "prefix", "residual", "control")


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A student's and a teacher's tokenizer and the map between them. texts: what they are shown on."""

    student: Tokenizer
    teacher: Tokenizer
    map: VocabMap
    texts: tuple[str, ...]


def pair(student: str | pathlib.Path | None, teacher: str | pathlib.Path | None, into: str | pathlib.Path, mode: str | None = None) -> Pair:
    """The tokenizers at two paths; None: one trained on the spot, on the quickstart's expert runs, kept in ``into``. The student's own
    writes numbers up to 24 as one id each, the teacher's joins them with the word before and cuts names and calls elsewhere.

    mode: of the map, as in ``vocab_map.build``. Raises DataError for a path without a tokenizer."""
    families = tuple(QUICKSTART.values())
    sides = []
    for name, path, size in (("student", student, 640), ("teacher", teacher, 720)):
        file = pathlib.Path(into) / f"{name}.model"
        if path is None and not file.is_file():
            symbols = experts.symbols(families, 24) if name == "student" else cross_tokenizer.pieces(families)
            tokenizers.train_sentencepiece(experts.tokenizer_texts(families, 0), file, size, symbols)
        sides.append(tokenizers.load(path or file))
    written = [turn for family in families for task in experts.tasks(family, {1: 4, 2: 8, 4: 8}, "sft", 0) for turn in _turns(task)]
    return Pair(*sides, vocab_map.build(*sides, mode), tuple(dict.fromkeys(written)))


def _turns(task: Task) -> list[str]:
    """What the expert writes, turn by turn: its thought and its call or answer."""
    return [chat.turn_text(message) for message in solve(task).messages if message["role"] == "assistant"]


def counts(pair: Pair) -> Table:
    """How many ids map how."""
    meaning = {
        "mode": "identity, two_sided, one_sided or shared", "student_ids": "ids that a softmax of the student sees",
        "teacher_ids": "the same of the teacher", "exact": "teacher ids with the bytes of a student id",
        "prefix": "teacher ids of which the longest student id that begins them has part of the bytes",
        "residual": "teacher ids that nothing of the student begins", "units": "student ids that some teacher id stands for",
        "folded": "student ids that no teacher id reaches, compared in a shorter unit", "unmatched": "student ids compared in none",
        "controls": "teacher's control ids with a counterpart, by role", "controls_residual": "and without",
        "fan_in_max": "most teacher ids that stand for one student id", "fan_in_p50": "median of that over units reached",
        "fan_in_p90": "90 % of units have at most", "fan_in_p99": "99 %",
    }  # fmt: skip
    rows = tuple((name, str(value), meaning.get(name, "")) for name, value in pair.map.stats().items())
    return Table("The vocabulary map, counted", ("what", "number", "meaning"), rows)


def kinds(made: VocabMap) -> np.ndarray:
    """[V_T] of KINDS: how each id of the teacher maps, "" for ids that no softmax sees."""
    texts, units = made.order[: made.text_count], made.unit_of_teacher
    found = np.full(len(units), "", dtype="<U8")
    found[made.teacher_valid] = "control"
    equal = np.diff(made.student_starts)[units[texts]] == np.diff(made.teacher_starts)[texts]
    found[texts] = np.where(units[texts] == NONE, "residual", np.where(equal, "exact", "prefix"))
    return found


def examples(pair: Pair, each: int = 6) -> Several:
    """Some ids of every kind, the longest first, the student's ids that are folded, and the units with the largest fan-in."""
    made, of, ours = pair.map, kinds(pair.map), byte_table.of(pair.student)
    rows = []
    for kind in KINDS:
        for t in _longest(np.flatnonzero(of == kind), pair.teacher)[:each]:
            unit = int(made.unit_of_teacher[t])
            rows.append((kind, int(t), piece(pair.teacher, t), None if unit == NONE else unit, piece(pair.student, unit)))
    columns = ("kind", "teacher id", "its text", "student id", "its text")
    shown = [Table("Teacher ids and the student ids they stand for", columns, tuple(rows))]
    fold = made.unit_of_student
    own = [i for i in range(len(fold)) if i < len(pair.student.table) and ours.kind[i] == byte_table.TEXT and fold[i] != i]
    folded = [
        (i, piece(pair.student, i), None if fold[i] == NONE else int(fold[i]), piece(pair.student, fold[i]))
        for i in _longest(np.array(own, int), pair.student)[:each]
    ]
    shown.append(
        Table("Student ids compared in another unit (folded)", ("student id", "its text", "unit", "unit's text"), tuple(folded),
              f"{len(own)} of them. A teacher never says such a token at once; its probability is added to its unit's.")
    )  # fmt: skip
    fan = Counter(made.unit_of_teacher[made.unit_of_teacher != NONE].tolist())
    most = [
        (u, piece(pair.student, u), n, "  ".join(piece(pair.teacher, t) for t in np.flatnonzero(made.unit_of_teacher == u)[:each]))
        for u, n in fan.most_common(each)
    ]
    shown.append(Table("Largest fan-in", ("student id", "its text", "teacher ids", "some of them"), tuple(most)))
    return Several(tuple(shown))


def piece(tokenizer: Tokenizer, token: int) -> str:
    """The text of an id as it can be read; "" for none."""
    if not 0 <= token < len(tokenizer.table):
        return ""
    own = tokenizer.table[int(token)]
    return tokenizer.spelling[int(token)] if own is None else readable(own)


def readable(raw: bytes) -> str:
    """Bytes with spaces, line ends and tabs shown; what is no UTF-8 as <0xHH>."""
    text = raw.decode("utf-8", "surrogateescape")
    shown = "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
    return reading.visible(shown.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥"))


def _longest(ids: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    return sorted(map(int, ids), key=lambda i: (-len(tokenizer.table[i] or tokenizer.spelling[i].encode()), i)) if len(ids) else []
