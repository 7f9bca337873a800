"""The integers for the accelerator say the same as the dense target."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a1jax.align import byte_table, extensions, slices, spans, target, vocab_map


def _log_sum(log_p, ids):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_p[ids]).sum())


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from([None, "one_sided", "shared", "same"]))
@example(seed=105, mode=None)  # set apart where nothing is chained, which is rare
def test_slices_give_the_scores_and_the_mass_of_the_dense_target(pair, seed, mode):
    made = pair(seed, None if mode == "same" else mode, same=mode == "same")
    found = spans.align(made.student_ids, made.teacher_ids, made.map)
    got = slices.slices(made.map, found, made.student_ids, made.teacher_ids)
    dense = target.target(made.log_p, made.student_ids, made.teacher_ids, found, made.map)
    order = made.map.order
    for i in range(len(found.teacher)):
        j, m = found.teacher[i], found.last[i]
        log_z = _log_sum(made.log_p[j], order[got.low[i] : got.high[i]])
        assert found.offset[i] or log_z == pytest.approx(0, abs=1e-12)
        middle = sum(made.log_p[k, made.teacher_ids[k]] for k in range(j, m))
        score = _log_sum(made.log_p[m], order[got.end_low[i] : got.end_high[i]]) - log_z + middle
        assert score == pytest.approx(dense.score[i], abs=1e-9)
        assert got.unit[i] == made.map.unit_of_student[made.student_ids[i]]
        p = np.exp(made.log_p[j, made.teacher_ids[j]] - log_z)
        mass = dense.q[i, got.source[i]] if got.source[i] >= 0 else dense.residual[i]
        apart = 0
        if got.alone[i] >= 0 and found.offset[i]:
            ids = extensions.continuing(made.map, made.teacher_ids[j], found.offset[i], got.alone[i])
            apart = np.exp(_log_sum(made.log_p[j], ids) - log_z) if len(ids) else 0
        some = apart > 0 or (found.chained[i] and not np.isneginf(dense.score[i]))
        assert dense.alone[i] == (got.alone[i] if some else -1)
        moves = got.source[i] != got.unit[i] or got.alone[i] >= 0
        moved = np.exp(score) if found.chained[i] and moves else 0
        assert mass >= p - moved - (apart if got.source[i] == got.unit[i] else 0) - 1e-12


def test_by_hand():
    student = byte_table.make([b"a", b"b", b"ab", None], {3: "<s>"}, {"turn_end": (3,)})
    teacher = byte_table.make(
        [b"b", None, b"ab", None, b"a", None], {1: "<e>", 5: "<f>", 3: "<g>"}, {"turn_end": (1,), "eos": (5,)}, vocab_size=7
    )
    made = vocab_map.build(student, teacher)
    assert made.order.tolist() == [4, 2, 0, 1, 5, 3, 6]  # a ab b, both stops, the control without a role, padding
    ours, theirs = [0, 1, 2, 3], [2, 4, 0, 5]  # a|b|ab|stop against ab|a|b|stop
    got = slices.slices(made, spans.align(ours, theirs, made), ours, theirs)
    assert got.low.tolist() == [0, 0, 0, 0] and got.high.tolist() == [6, 2, 6, 6]
    assert got.end_low.tolist() == [0, 1, 2, 3] and got.end_high.tolist() == [2, 2, 3, 5]
    assert got.source.tolist() == [2, 1, 0, 3] and got.unit.tolist() == [0, 1, 2, 3]


def test_masked_positions_have_empty_slices(pair):
    made = pair(3)
    found = spans.align(made.student_ids, made.teacher_ids, made.map)
    hidden = dataclasses.replace(found, masked=np.ones_like(found.masked))
    got = slices.slices(made.map, hidden, made.student_ids, made.teacher_ids)
    assert not (got.low.any() or got.high.any() or got.end_low.any() or got.end_high.any())
    assert (got.source == -1).all() and (got.unit == -1).all() and (got.alone == -1).all()
