"""The vocabulary map of a student-teacher pair: which student unit every teacher token stands for, at every offset into it.

One file per pair, valid for exactly those two byte tables and that builder. Numpy only; the kernels get its plain integer arrays.
Design and notation: ``../shared/design/vocabulary_alignment.md``, sections 1 and 3.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from typing import Any, get_args

import numpy as np

from a1jax.align import byte_table, vocab_map_build
from a1jax.align.byte_table import ByteTable, Tokenizer
from a1jax.align.trie import NONE
from a1jax.align.vocab_map_build import Mode
from a1jax.config import ConfigError

__all__ = ["NONE", "Mode", "VocabMap", "build", "load", "save"]


@dataclasses.dataclass(frozen=True, eq=False)
class VocabMap:
    """V_S, V_T: rows of the two output matrices. A unit is a student id; NONE (-1) is none: the residual, or masked.

    A token is written in symbols: its bytes, or one number from 256 on for a control token that both sides have. ``*_symbols`` hold
    them end to end, ``*_starts`` where each id's begin; an id with no counterpart has none. ``suffix``, ``low`` and ``high`` lie
    beside ``teacher_symbols``: what holds d symbols into teacher token t is at [teacher_starts[t] + d].
    """

    mode: Mode
    unit_of_teacher: np.ndarray  # int32 [V_T]: the longest student token that is a prefix, or the student's token of the same role
    unit_of_student: np.ndarray  # int32 [V_S]: the fold f, the unit in which a student token is compared
    suffix: np.ndarray  # int32: SUF[t][d], the unit of the teacher token's bytes after the first d
    low: np.ndarray  # int32, and high: order[low:high] are the teacher's text tokens that start with the first d bytes of t; for a
    # control token (its only symbol) the teacher's tokens of its role
    high: np.ndarray
    order: np.ndarray  # int32 [V_T]: teacher ids: text tokens sorted by bytes, control tokens by role, the other valid ids, invalid ones
    rank: np.ndarray  # int32 [V_T]: its inverse; text tokens have rank < text_count
    text_count: int
    student_symbols: np.ndarray  # uint32
    student_starts: np.ndarray  # int64 [V_S + 1]
    teacher_symbols: np.ndarray  # uint32
    teacher_starts: np.ndarray  # int64 [V_T + 1]
    student_valid: np.ndarray  # bool [V_S]: false for padding rows and holes, which no softmax may see
    teacher_valid: np.ndarray  # bool [V_T]
    roles: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # role -> (student ids, teacher ids) compared as one symbol
    student_hash: str
    teacher_hash: str
    builder: str = vocab_map_build.VERSION

    def stats(self) -> dict[str, Any]:
        """Counts. exact + prefix + residual = the teacher's text ids; units: student units that some teacher id maps to; folded: student
        text ids compared in another unit than their own, unmatched: in none; fan_in: teacher ids per unit reached."""
        texts = self.order[: self.text_count]
        units = self.unit_of_teacher[texts]
        equal = np.diff(self.student_starts)[units] == np.diff(self.teacher_starts)[texts]
        control = np.setdiff1d(np.flatnonzero(self.teacher_valid), texts)
        reached, fan_in = np.unique(self.unit_of_teacher[self.unit_of_teacher != NONE], return_counts=True)
        begins = np.flatnonzero(np.diff(self.student_starts))
        own = begins[self.student_symbols[self.student_starts[begins]] < vocab_map_build.FIRST_CONTROL]
        fold = self.unit_of_student[own]
        spread = np.percentile(fan_in, (50, 90, 99), method="inverted_cdf") if len(fan_in) else np.zeros(3)
        return {
            "mode": self.mode, "student_ids": int(self.student_valid.sum()), "teacher_ids": int(self.teacher_valid.sum()),
            "exact": int(np.sum(equal & (units != NONE))), "prefix": int(np.sum(~equal & (units != NONE))),
            "residual": int(np.sum(units == NONE)), "units": len(reached), "folded": int(np.sum((fold != own) & (fold != NONE))),
            "unmatched": int(np.sum(fold == NONE)), "controls": int(np.sum(self.unit_of_teacher[control] != NONE)),
            "controls_residual": int(np.sum(self.unit_of_teacher[control] == NONE)), "fan_in_max": int(fan_in.max(initial=0)),
            "fan_in_p50": int(spread[0]), "fan_in_p90": int(spread[1]), "fan_in_p99": int(spread[2]),
        }  # fmt: skip

    def table(self) -> str:
        """The counts of ``stats`` as text, a line each, and the roles compared as one symbol."""
        lines = [f"{name:18} {value}" for name, value in self.stats().items()]
        if self.mode != "identity":
            lines += [f"role {role:13} student {list(ours)} teacher {list(theirs)}" for role, (ours, theirs) in self.roles.items()]
        return "\n".join(lines)

    def starting_with(self, teacher_id: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """(teacher ids, units) of all teacher text tokens that share the first ``offset`` > 0 bytes of ``teacher_id``: where a student
        token begins that far into it, these are the possible ones, and what each stands for from there (NONE: the token ends there)."""
        at = self.teacher_starts[teacher_id] + offset
        ids = self.order[self.low[at] : self.high[at]]
        ends = np.diff(self.teacher_starts)[ids] == offset
        return ids, np.where(ends, NONE, self.suffix[np.where(ends, 0, self.teacher_starts[ids] + offset)])


def build(student: Tokenizer | ByteTable, teacher: Tokenizer | ByteTable, mode: Mode | None = None) -> VocabMap:
    """The map of a pair of tokenizers (or byte tables, where roles or padded vocabularies have to be said).

    mode: identity (the same tokenizer: every id is its own unit), two_sided (both vocabularies are folded onto what the teacher can
    reach), one_sided (only the teacher's is), shared (equal bytes only); default identity where the byte tables are equal, else
    two_sided. Raises ConfigError for another mode, and for identity with different tables.
    """
    student, teacher = byte_table.of(student), byte_table.of(teacher)
    same = student.hash == teacher.hash
    mode = mode or ("identity" if same else "two_sided")
    if mode not in get_args(Mode):
        raise ConfigError(f"alignment mode is {mode!r}: choose one of {', '.join(get_args(Mode))}")
    if mode == "identity" and not same:
        raise ConfigError(f"alignment mode identity needs one tokenizer, and {student.name} and {teacher.name} differ: use two_sided")
    made = vocab_map_build.arrays(student, teacher, mode)
    return VocabMap(mode=mode, student_hash=student.hash, teacher_hash=teacher.hash, **made)


def save(vocab_map: VocabMap, path: str | pathlib.Path) -> None:
    """Writes the map as one compressed .npz; the same map gives the same bytes. Raises OSError where it cannot be written."""
    fields = {field.name: getattr(vocab_map, field.name) for field in dataclasses.fields(VocabMap)}
    plain = {name: value for name, value in fields.items() if not isinstance(value, np.ndarray)}
    with open(path, "wb") as file:  # an open file, so that numpy adds no suffix
        np.savez_compressed(file, meta=np.array(json.dumps(plain)), **{n: v for n, v in fields.items() if n not in plain})


def load(path: str | pathlib.Path, student: Tokenizer | ByteTable, teacher: Tokenizer | ByteTable) -> VocabMap:
    """A stored map, for these two tokenizers. Raises ConfigError where the file is missing, is no map, or is one of other tokenizers,
    of other sizes of their output matrices or roles, or of another version of the builder."""
    again = "build it again with a1jax vocab-map"
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
        fields |= json.loads(str(fields.pop("meta")))
        fields["roles"] = {role: (tuple(ours), tuple(theirs)) for role, (ours, theirs) in fields["roles"].items()}
        found = VocabMap(**fields)
    except FileNotFoundError:
        raise ConfigError(f"no vocabulary map at {path}: make one with a1jax vocab-map STUDENT TEACHER -o {path}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no vocabulary map ({type(error).__name__}: {error}): {again}") from None
    if found.builder != vocab_map_build.VERSION:
        raise ConfigError(f"vocabulary map {path} is of builder {found.builder!r}, this is {vocab_map_build.VERSION!r}: {again}")
    for side, tokenizer in (("student", student), ("teacher", teacher)):
        table = byte_table.of(tokenizer)
        rows = len(getattr(found, f"{side}_valid"))
        if getattr(found, f"{side}_hash") != table.hash:
            raise ConfigError(f"vocabulary map {path} is of another {side} ({rows} ids) than {table.name} ({len(table)} ids): {again}")
    return found
