"""The aligned target, plainly: a teacher's distributions over its vocabulary -> distributions over student units, position by position.

Dense, slow and exact: the reference that losses and kernels are tested against, and the place to read what they compute. It computes
in the dtype of what it is given. ``../shared/design/vocabulary_alignment.md``, section 3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from a1jax.align import extensions
from a1jax.align.spans import Ids, Spans
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap
from a1jax.align.vocab_map_build import FIRST_CONTROL


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """One row per student token [T]; zeros in masked rows, which belong in no denominator.

    A written token that is no unit itself (123 of a student whose teacher writes digit by digit) is a class of its own at a chained or
    straddled position, apart from the unit that it is otherwise summed in, together with the tokens of that unit that begin with its bytes:
    else the target would say nothing about which of the unit's tokens to write.
    """

    q: np.ndarray  # [T, V_S]: the teacher's mass on every student unit, and at [i, alone[i]] on that class; q.sum(1) + residual = 1
    residual: np.ndarray  # [T]: its mass on nothing the student can write here
    score: np.ndarray  # [T]: s_i, log-probability the teacher gives to the bytes of the student's token, after what was pending
    masked: np.ndarray  # bool [T]
    alone: np.ndarray  # int32 [T]: the written token where it is such a class and has mass, else NONE


def log_softmax(logits: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[N, V] log-probabilities over the ids with ``valid`` [V]; -inf at the others."""
    logits = np.where(valid, logits, -np.inf).astype(logits.dtype)
    return logits - _log_sum(logits)[:, None]


def target(log_p: np.ndarray, student_ids: Ids, teacher_ids: Ids, spans: Spans, vocab_map: VocabMap, set_apart: bool = True) -> Target:
    """The targets of one turn.

    log_p [T_T, V_T]: row j holds the teacher's log-probabilities *of* its token j, given all before it. student_ids [T] and
    teacher_ids [T_T] are those that ``spans`` was made from. set_apart: False leaves every written token in its unit.
    """
    count, units = len(student_ids), len(vocab_map.unit_of_student)
    alone = np.full(count, NONE, np.int32)
    q, residual, score = np.zeros((count, units), log_p.dtype), np.zeros(count, log_p.dtype), np.zeros(count, log_p.dtype)
    for i in np.flatnonzero(~spans.masked):
        j, m, offset = int(spans.teacher[i]), int(spans.last[i]), int(spans.offset[i])
        token = int(teacher_ids[j])
        ids, unit = _possible(vocab_map, token, offset)
        log_z = _log_sum(log_p[j, ids]) if offset else log_p.dtype.type(0)
        if np.isneginf(log_z):  # a teacher that rules out what is written says nothing about how it goes on
            residual[i], score[i] = 1, -np.inf
            continue
        mass = np.exp(log_p[j, ids] - log_z)
        np.add.at(q[i], unit[unit != NONE], mass[unit != NONE])
        residual[i] = mass[unit == NONE].sum()
        score[i] = _log_of_end(log_p[m], int(teacher_ids[m]), int(spans.reach[i]), bool(spans.complete[i]), vocab_map) - log_z
        source, written = vocab_map.suffix[vocab_map.teacher_starts[token] + offset], int(student_ids[i])
        if m > j:
            score[i] += sum(log_p[k, int(teacher_ids[k])] for k in range(j, m))
        chain, unit_of_it = (np.exp(score[i]) if m > j else 0), vocab_map.unit_of_student[written]
        apart = 0
        if set_apart and (m > j or offset) and stands_alone(vocab_map, written):
            if offset:
                apart = mass[np.isin(ids, extensions.continuing(vocab_map, token, offset, written))].sum()
            if apart + chain > 0:
                alone[i] = written
        goal = alone[i] if alone[i] != NONE else unit_of_it
        for place, amount in ((source, chain), (unit_of_it, apart)):
            if amount > 0:
                _move(q[i], residual[i : i + 1], place, goal, amount)
    return Target(q, residual, score, spans.masked, alone)


def stands_alone(vocab_map: VocabMap, student_ids: Ids) -> np.ndarray:
    """bool, like student_ids: whether these tokens, where chained or straddled, are classes of their own: where both vocabularies are
    folded, and no unit has their bytes (a token whose bytes another id has too is compared in that one's unit)."""
    ids, starts = np.asarray(student_ids, np.int64), vocab_map.student_starts
    unit = vocab_map.unit_of_student[ids]
    shorter = (unit == NONE) | (starts[unit + 1] - starts[unit] < starts[ids + 1] - starts[ids])
    return (vocab_map.mode == "two_sided") & shorter


def fold(p: np.ndarray, vocab_map: VocabMap, alone: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(p~ [T, V_S], rest [T]) of the student's probabilities p [T, V_S]: summed over the tokens that are compared in one unit, and the
    mass of those that are compared in none. alone [T]: of ``Target``; what is set apart stands in its column, and in no other sum."""
    unit, folded, p = vocab_map.unit_of_student, np.zeros_like(p), p.copy()
    apart = {}
    for i in np.flatnonzero(alone != NONE) if alone is not None else ():
        ids = extensions.shares_unit(vocab_map, alone[i])
        apart[i] = p[i, ids].sum()
        p[i, ids] = 0
    np.add.at(folded, (slice(None), unit[unit != NONE]), p[:, unit != NONE])
    for i, mass in apart.items():
        folded[i, alone[i]] = mass  # no unit's column: a token that is one does not stand alone
    return folded, p[:, unit == NONE].sum(axis=1)


def _possible(vocab_map: VocabMap, token: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    if offset:
        return vocab_map.starting_with(token, offset)
    ids = np.flatnonzero(vocab_map.teacher_valid)
    return ids, vocab_map.unit_of_teacher[ids]


def _log_of_end(log_p: np.ndarray, token: int, reach: int, complete: bool, vocab_map: VocabMap) -> np.ndarray:
    """log Y: of the last teacher token itself, or of all that start with the part of it that is written."""
    at = vocab_map.teacher_starts[token]
    if vocab_map.teacher_symbols[at] >= FIRST_CONTROL:  # several stop ids are one stop
        return _log_sum(log_p[vocab_map.order[vocab_map.low[at] : vocab_map.high[at]]])
    if complete:
        return log_p[token]
    return _log_sum(log_p[vocab_map.order[vocab_map.low[at + reach] : vocab_map.high[at + reach]]])


def _move(q: np.ndarray, residual: np.ndarray, source: int, unit: int, amount: np.ndarray) -> None:
    """The mass of the chain that was really written, from where its first token went to the token that was written."""
    if source == unit:
        return
    for place, change in ((source, -amount), (unit, amount)):
        where, at = (residual, 0) if place == NONE else (q, place)
        where[at] = max(where[at] + change, 0)  # never less than 0 but for rounding


def _log_sum(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top).astype(x.dtype)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]
