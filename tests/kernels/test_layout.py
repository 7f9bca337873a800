"""The fan-in-plane layout: every row where the kernel looks for it, and what it costs."""

import numpy as np
import pytest
from a1jax.kernels.vocab_align import layout
from hypothesis import given, settings
from hypothesis import strategies as st

R = 64


def units_by_position(planned):
    """[B * R]: the unit that the row in each place is added up to, read as the kernel reads it; -1 for none or the residual."""
    found = np.full(planned.source.size, -1)
    for kind, first, count in planned.runs:
        if kind == layout.RESIDUAL:
            continue
        width = R // layout.planes(kind)
        of_lane = planned.units[first : first + count, :width].reshape(-1).copy()
        assert (planned.units[first : first + count, width:] == -1).all()
        if kind == layout.FAT:  # every lane of a segment belongs to the unit in its last lane
            parts = planned.parts[first : first + count].reshape(-1)
            ends = dict(zip(parts[parts & 1 == 1] >> 1, of_lane[parts & 1 == 1], strict=True))
            assert (of_lane[parts & 1 == 0] == -1).all() and (np.diff(parts >> 1) >= 0).all()
            of_lane = np.asarray([ends.get(segment, -1) for segment in parts >> 1])
        for block in range(count):
            lanes = of_lane[block * width : (block + 1) * width]
            found[(first + block) * R : (first + block + 1) * R] = np.tile(lanes, R // width)
    return found


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 900), highest=st.sampled_from([0, 3, 40, 400]), heavy=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_every_row_stands_in_a_lane_of_its_unit(size, highest, heavy, seed):
    rng = np.random.default_rng(seed)
    units = np.where(rng.random(size) < heavy, rng.integers(-1, 3, size), rng.integers(-1, highest + 1, size)).astype(np.int32)
    valid, rank = rng.random(units.size) > 0.1, rng.permutation(units.size).astype(np.int32)
    planned = layout.build(units, R, rank, valid)
    ids = planned.source[planned.source >= 0]
    np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(valid))  # each once, the invalid nowhere
    np.testing.assert_array_equal(units_by_position(planned)[planned.source >= 0], units[ids])
    np.testing.assert_array_equal(planned.rank.reshape(-1), np.where(planned.source >= 0, rank[planned.source], -1))
    of_residual = [block for kind, first, count in planned.runs if kind == layout.RESIDUAL for block in range(first, first + count)]
    places = np.flatnonzero((planned.source >= 0) & (units[planned.source] < 0)) // R
    assert np.isin(places, of_residual).all() and planned.num_units == np.unique(units[valid & (units >= 0)]).size


def test_a_map_by_hand():
    """Fan-ins 3, 1, 17 and two residual ids in blocks of 64: 16 lanes of 4, where the fan-ins 1 and 3 fill up the FAT block."""
    units = np.asarray([5] * 3 + [2] + [8] * 17 + [-1] * 2)
    planned = layout.build(units, R)
    assert planned.runs == ((layout.FAT, 0, 1), (layout.RESIDUAL, 1, 1)) and planned.rows == 23
    assert planned.units[0, :4].tolist() == [-1, 8, 2, 5] and planned.parts[0].tolist() == [0, 1, 3, 5]
    np.testing.assert_array_equal(planned.source[:8].tolist(), [4, 5, 3, 0, 6, 7, -1, 1])
    assert planned.source[64:67].tolist() == [21, 22, -1] and planned.padding == 128 / 23 - 1


def test_padding_on_many_shapes_of_vocabulary():
    assert layout.identity(151_669).padding < 0.014
    assert layout.identity(248_320).padding < 0.007
    rng = np.random.default_rng(0)
    heavy = np.where(rng.random(150_000) < 0.6, rng.permutation(150_000) % 32_000, rng.zipf(1.35, 150_000) * 7919 % 32_000)
    planned = layout.build(heavy.astype(np.int32))
    assert np.bincount(heavy).max() > 5_893 and planned.padding < 0.2


def test_what_makes_no_sense_is_refused():
    good = np.zeros(10, np.int32)
    for bad, match in (
        ({"unit_of_teacher": np.zeros((2, 2), np.int32)}, "must be integers"),
        ({"unit_of_teacher": np.zeros(3)}, "must be integers"),
        ({"unit_of_teacher": np.zeros(0, np.int32)}, "must be integers"),
        ({"unit_of_teacher": good - 2}, "-1 is the residual"),
        ({"block": 100}, "multiple of 16"),
        ({"rank": good - 1}, "ranks from 0"),
        ({"valid": np.ones(9, bool)}, "like unit_of_teacher"),
    ):
        with pytest.raises(ValueError, match=match):
            layout.build(**{"unit_of_teacher": good, "block": R, **bad})
