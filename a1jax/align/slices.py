"""What an accelerator needs to know of every position, as integers: which slices of the teacher's sorted vocabulary, and which units.

With the rows of the teacher's matrix in the map's order (or their ranks at hand) every sum of section 3 of the design is over a slice:
log Z of row ``teacher`` over [low, high), log Y of row ``last`` over [end_low, end_high), and

    s_i = log Y - log Z + sum of log p(t_k) over teacher <= k < last.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from a1jax.align.spans import Ids, Spans
from a1jax.align.target import stands_alone
from a1jax.align.trie import NONE
from a1jax.align.vocab_map import VocabMap
from a1jax.align.vocab_map_build import FIRST_CONTROL


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """int32 [T], one entry per student token; at masked ones the slices are empty and the units NONE."""

    low: np.ndarray  # ranks low <= r < high: the teacher's tokens that are possible here; all valid ids where nothing is pending
    high: np.ndarray
    end_low: np.ndarray  # and those that end what the student wrote: one where the two end together, several where the teacher's goes on
    end_high: np.ndarray
    source: np.ndarray  # the unit that the mass of the teacher's token at ``teacher`` went to, NONE for the residual
    unit: np.ndarray  # the unit that the student's token is compared in; where chained, exp(s_i) moves from ``source`` to it
    alone: np.ndarray  # ... unless this is the student's token, set apart with what begins with it (``Target.alone``); NONE elsewhere


def slices(vocab_map: VocabMap, spans: Spans, student_ids: Ids, teacher_ids: Ids) -> Slices:
    """The slices and units of one turn; ids as given to ``spans.align``."""
    at = np.flatnonzero(~spans.masked)
    theirs, ours = np.asarray(teacher_ids, np.int64), np.asarray(student_ids, np.int64)
    made = {name: np.zeros(len(ours), np.int32) for name in ("low", "high", "end_low", "end_high")}
    made |= {name: np.full(len(ours), NONE, np.int32) for name in ("source", "unit", "alone")}
    first = vocab_map.teacher_starts[theirs[spans.teacher[at]]] + spans.offset[at]
    pending = spans.offset[at] > 0
    made["low"][at] = np.where(pending, vocab_map.low[first], 0)
    made["high"][at] = np.where(pending, vocab_map.high[first], int(vocab_map.teacher_valid.sum()))
    token = theirs[spans.last[at]]
    start = vocab_map.teacher_starts[token]
    one = spans.complete[at] & (vocab_map.teacher_symbols[start] < FIRST_CONTROL)
    # A control token is complete and one symbol, and its slice is that of its role.
    part = start + np.where(spans.complete[at], 0, spans.reach[at])
    made["end_low"][at] = np.where(one, vocab_map.rank[token], vocab_map.low[part])
    made["end_high"][at] = np.where(one, vocab_map.rank[token] + 1, vocab_map.high[part])
    made["source"][at], made["unit"][at] = vocab_map.suffix[first], vocab_map.unit_of_student[ours[at]]
    apart = (spans.chained[at] | pending) & stands_alone(vocab_map, ours[at])
    made["alone"][at] = np.where(apart, ours[at], NONE)
    return Slices(**made)
