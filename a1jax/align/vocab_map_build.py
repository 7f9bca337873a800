"""How a vocabulary map is made from two byte tables: frames, units, fold, suffixes, slices. Design: vocabulary_alignment.md, section 1."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from a1jax.align import roles as control_roles
from a1jax.align.byte_table import INVALID, TEXT, ByteTable
from a1jax.align.trie import NONE, Trie, flatten, prefix_slices

VERSION = "1"
"""Of the builder: another one wherever the same tokenizers would give another map. Part of the key of a stored map."""

Mode = Literal["identity", "two_sided", "one_sided", "shared"]

FIRST_CONTROL = 256
"""Frames are written in symbols: bytes, and from here on control roles."""


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One tokenizer as the pair sees it."""

    flat: np.ndarray  # uint32: the symbols of all ids, end to end
    starts: np.ndarray  # int64 [V + 1]: id i is flat[starts[i]:starts[i + 1]]; empty where it has no counterpart
    text: np.ndarray  # bool [V]: stands for its bytes
    control: np.ndarray  # int32 [V]: number of its control symbol, NONE for none
    canonical: np.ndarray  # int32 [V]: of the text ids with equal bytes the one that stands for all

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


def sides(student: ByteTable, teacher: ByteTable, mode: Mode) -> tuple[Side, Side, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Both tokenizers, and role -> (ids of the student, ids of the teacher) for the roles that are compared atomically.

    Bytes where both sides spell a role alike or only one has it and the role is spelled as text; a symbol of its own where both have it
    otherwise; nothing where there is no counterpart, and for roles that are never aligned.
    """
    pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    ours, theirs = (_by_symbol(table.roles) for table in (student, teacher))
    if mode == "identity":
        controls = [i for i in range(len(student)) if student.kind[i] not in (TEXT, INVALID)]
        pairs = {f"id {i}": ((i,), (i,)) for i in controls}
        silent: list[set[int]] = [set(), set()]
    else:
        for role in ours:
            if role in theirs and not _spelled_alike(role, ours[role], theirs[role], student, teacher):
                pairs[role] = (ours[role], theirs[role])
        silent = [{i for role in control_roles.NEVER for i in table.roles.get(role, ())} for table in (student, teacher)]
    made = []
    for index, table in enumerate((student, teacher)):
        control = np.full(len(table), NONE, np.int32)
        for number, ids in enumerate(pair[index] for pair in pairs.values()):
            control[list(ids)] = number
        has_text = np.fromiter(map(len, table.bytes), np.int64, len(table)) > 0
        text = has_text & (control == NONE)
        text[list(silent[index])] = False
        made.append(_side(table, text, control))
    return made[0], made[1], pairs


def _by_symbol(roles: control_roles.Roles) -> control_roles.Roles:
    """The roles that can be aligned, all kinds of stop as one."""
    stops = tuple(i for role in control_roles.STOPS for i in roles.get(role, ()))
    rest = {role: ids for role, ids in roles.items() if role not in (*control_roles.STOPS, *control_roles.NEVER)}
    return ({"stop": stops} if stops else {}) | rest


def _spelled_alike(role: str, ours: tuple[int, ...], theirs: tuple[int, ...], student: ByteTable, teacher: ByteTable) -> bool:
    spellings = {student.bytes[i] for i in ours} | {teacher.bytes[i] for i in theirs}
    return role in control_roles.SPELLED and len(spellings) == 1 and spellings != {b""}


def _side(table: ByteTable, text: np.ndarray, control: np.ndarray) -> Side:
    bytes_of = [b if is_text else b"\0" if number != NONE else b"" for b, is_text, number in zip(table.bytes, text, control, strict=True)]
    flat, starts = flatten(bytes_of)
    flat = flat.astype(np.uint32)
    atoms = np.flatnonzero(control != NONE)
    flat[starts[atoms]] = FIRST_CONTROL + control[atoms]
    canonical = table.canonical.copy()
    orphans = np.flatnonzero(text & ~text[canonical])  # text whose canonical id is a control token in this pair
    _, first, group = np.unique(canonical[orphans], return_index=True, return_inverse=True)
    canonical[orphans] = orphans[first[group]]
    return Side(flat, starts, text, control, canonical)


def arrays(student: ByteTable, teacher: ByteTable, mode: Mode) -> dict[str, Any]:
    """Every field of the map but its hashes; names, shapes and meanings in ``vocab_map.VocabMap``."""
    ours, theirs, pairs = sides(student, teacher, mode)
    own = np.flatnonzero(ours.text & (ours.canonical == np.arange(len(student))))
    trie = _trie(ours, own)
    suffix, size = _suffixes(trie, theirs)
    if mode == "shared":  # equal bytes only, at every offset
        suffix[size != _left(theirs)] = NONE
    unit_of_control = np.array([ids[0] for ids, _ in pairs.values()], np.int32)
    atoms = np.flatnonzero(theirs.control != NONE)
    suffix[theirs.starts[atoms]] = unit_of_control[theirs.control[atoms]]
    if mode == "identity":
        texts = np.flatnonzero(theirs.text)
        suffix[theirs.starts[texts]] = texts
    unit_of_teacher = np.full(len(teacher), NONE, np.int32)
    present = theirs.lengths > 0
    unit_of_teacher[present] = suffix[theirs.starts[:-1][present]]
    fold = _fold(mode, student, ours, own, unit_of_teacher, unit_of_control)
    order, rank, low, high = _order(teacher, theirs)
    return {
        "unit_of_teacher": unit_of_teacher, "unit_of_student": fold, "suffix": np.where(suffix == NONE, NONE, fold[suffix]),
        "student_symbols": ours.flat, "student_starts": ours.starts, "teacher_symbols": theirs.flat, "teacher_starts": theirs.starts,
        "low": low, "high": high, "order": order, "rank": rank, "text_count": int(theirs.text.sum()),
        "student_valid": student.kind != INVALID, "teacher_valid": teacher.kind != INVALID, "roles": pairs,
    }  # fmt: skip


def _trie(side: Side, ids: np.ndarray) -> Trie:
    return Trie.build(side.flat, side.starts[ids], side.lengths[ids], ids)


def _left(side: Side) -> np.ndarray:
    """Symbols from every place of ``flat`` to the end of its token."""
    return np.repeat(side.starts[1:], side.lengths) - np.arange(len(side.flat))


def _suffixes(trie: Trie, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """(longest student token, its length) at every place of every text token; NONE and 0 for control symbols."""
    places = np.arange(len(side.flat))
    stops = places + np.where(side.flat < FIRST_CONTROL, _left(side), 0)
    return trie.longest_prefix(side.flat, places, stops)


def _fold(mode: Mode, student: ByteTable, side: Side, own: np.ndarray, units: np.ndarray, unit_of_control: np.ndarray) -> np.ndarray:
    """Student id -> the unit it is compared in, NONE for none."""
    fold = np.full(len(student), NONE, np.int32)
    if mode == "identity":
        valid = np.flatnonzero(student.kind != INVALID)
        fold[valid] = valid
        return fold
    if mode == "one_sided":
        fold[side.text] = side.canonical[side.text]
    else:
        reached = np.zeros(len(student), bool)
        reached[units[units != NONE]] = True
        kept = own[reached[own]]
        if mode == "shared":
            fold[kept] = kept
            fold[side.text] = fold[side.canonical[side.text]]
        else:
            texts = np.flatnonzero(side.text)
            fold[texts], _ = _trie(side, kept).longest_prefix(side.flat, side.starts[texts], side.starts[texts + 1])
    atoms = np.flatnonzero(side.control != NONE)
    fold[atoms] = unit_of_control[side.control[atoms]]
    return fold


def _order(teacher: ByteTable, side: Side) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(order, rank, low, high): text ids sorted by bytes, then controls by role, then those without one, then invalid ids; slices at
    every place of ``flat``, at a control symbol the one of its role."""
    texts = sorted(np.flatnonzero(side.text).tolist(), key=teacher.bytes.__getitem__)
    others = np.flatnonzero(~side.text)
    has_role = side.control[others] != NONE
    others = others[np.lexsort((others, side.control[others], ~has_role, teacher.kind[others] == INVALID))]
    order = np.concatenate([np.array(texts, np.int32), others.astype(np.int32)])
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    low, high = np.zeros(len(side.flat), np.int32), np.zeros(len(side.flat), np.int32)
    lengths = side.lengths[texts]
    places = np.repeat(side.starts[texts] - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
    low[places], high[places] = prefix_slices(side.flat, side.starts[texts], lengths)
    atoms = np.flatnonzero(side.control != NONE)
    roles = side.control[order[len(texts) : len(texts) + len(atoms)]]
    low[side.starts[atoms]] = len(texts) + np.searchsorted(roles, side.control[atoms], side="left")
    high[side.starts[atoms]] = len(texts) + np.searchsorted(roles, side.control[atoms], side="right")
    return order, rank, low, high
