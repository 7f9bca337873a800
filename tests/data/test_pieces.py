"""Cutting runs to a horizon: nothing longer, nothing twice, nothing lost, and nothing of it across a row's segments."""

import numpy as np
import pytest

from a1jax.data import packing, pieces
from a1jax.data.errors import DataError
from a1jax.data.packing import Example


def run_of(question, *steps, domain=0):
    """Tokens 0, 1, 2, ...: a question, then (observation, turn) lengths."""
    mask = [0] * question + [bit for seen, written in steps for bit in [0] * seen + [1] * written]
    return Example(np.arange(len(mask), dtype=np.int32), np.asarray(mask, np.float32), domain)


def targets(piece):
    """Places of the run whose tokens are predicted in this piece: the shift leaves out the first token."""
    return piece.places[1:][piece.example.mask[1:] > 0].tolist()


def test_a_run_by_hand():
    run = run_of(4, (0, 3), (2, 3), (2, 3), (2, 3))  # 4 + 3 + 5 + 5 + 5
    assert [p.places.tolist() for p in pieces.cut(run, 22)] == [list(range(22))]
    got = pieces.cut(run, 12)
    assert [p.places.tolist() for p in got] == [list(range(12)), [*range(4), *range(9, 17)], [*range(4), *range(14, 22)]]
    assert [(p.turns, p.question) for p in got] == [(2, True), (1, True), (1, True)]
    assert [targets(p) for p in got] == [[4, 5, 6, 9, 10, 11], [14, 15, 16], [19, 20, 21]]


def test_the_turn_before_is_context_where_there_is_room():
    run = run_of(4, (0, 3), (2, 3), (2, 3), (2, 3))
    got = pieces.cut(run, 13)  # the last two behind question and turn would be 17
    assert [p.places.tolist() for p in got] == [list(range(12)), [*range(4), *range(9, 17)], [*range(4), *range(14, 22)]]
    assert [p.example.mask.tolist() for p in got[1:]] == [[0] * 9 + [1] * 3] * 2
    assert [(p.turns, p.question, p.observations) for p in got] == [(2, True, (0,)), (1, True, (1,)), (1, True, (2,))]
    got = pieces.cut(run, 17)
    assert [p.places.tolist() for p in got] == [list(range(17)), [*range(4), *range(14, 22)]]
    got = pieces.cut(run, 8)  # 4 + 5 do not fit: these steps stand alone, behind the turn before them
    assert [p.places.tolist() for p in got] == [list(range(7)), list(range(4, 12)), list(range(9, 17)), list(range(14, 22))]
    assert [(p.question, p.turn_before) for p in got] == [(True, True), *[(False, True)] * 3]
    assert [targets(p) for p in got] == [[4, 5, 6], [9, 10, 11], [14, 15, 16], [19, 20, 21]]
    got = pieces.cut(run, 7)
    assert [p.places.tolist() for p in got][1:] == [list(range(7, 12)), list(range(12, 17)), list(range(17, 22))]
    assert [p.turn_before for p in got] == [True, False, False, False]


def test_a_step_that_does_not_fit_loses_its_beginning_and_a_turn_is_cut_into_windows():
    got = pieces.cut(run_of(2, (0, 2), (6, 3)), 5)
    assert [p.places.tolist() for p in got] == [[0, 1, 2, 3], [8, 9, 10, 11, 12]]
    got = pieces.cut(run_of(2, (0, 7)), 4)
    assert [p.places.tolist() for p in got] == [[0, 1, 2], [2, 3, 4, 5], [5, 6, 7, 8]]
    assert sum(p.turns for p in got) == 1


@pytest.mark.parametrize("seed", range(40))
def test_every_written_token_is_predicted_once_and_no_piece_is_longer(seed):
    rng = np.random.default_rng(seed)
    steps = [(int(rng.integers(0, 9)) if i else 0, int(rng.integers(1, 9))) for i in range(rng.integers(1, 9))]
    run = run_of(int(rng.integers(1, 9)), *steps)
    for horizon in range(2, len(run) + 2):
        got = pieces.cut(run, horizon)
        assert max(map(len, got)) <= horizon
        wanted = np.flatnonzero(run.mask).tolist()
        assert sorted(place for p in got for place in targets(p)) == wanted, horizon
        for p in got:
            assert (np.diff(p.places) > 0).all() and (p.example.tokens == run.tokens[p.places]).all() and p.example.mask[0] == 0
        assert sum(p.turns for p in got) == len(pieces.turn_ends(run.mask))


@pytest.mark.parametrize("horizon", range(17, 46))
def test_what_a_turn_says_of_the_last_one_can_be_known_where_there_is_room(horizon):
    run = run_of(6, (0, 5), *[(7, 5)] * 9)
    for piece in pieces.cut(run, horizon):
        start = targets(piece)[0]
        turn = range(start - 12, start - 7)
        if start > 6:
            assert piece.question == (horizon >= 6 + 12)
            assert (set(turn) <= set(piece.places.tolist())) == piece.turn_before == (not piece.question or horizon >= 6 + 5 + 12)
            assert not piece.example.mask[np.isin(piece.places, turn)].any()


def test_only_solvable_runs():
    short, long = run_of(4, (0, 3)), run_of(4, (0, 3), (2, 3))
    assert len(pieces.cut(short, 7, "solvable")) == 1 and pieces.cut(long, 7, "solvable") == []
    assert len(pieces.cut(long, 12, "solvable")) == 1


def test_a_horizon_of_one_token_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        pieces.cut(run_of(2, (0, 2)), 1)


def test_no_segment_of_a_packed_row_has_more_than_the_horizon():
    runs = [run_of(5, *[(4, 6)] * n) for n in range(1, 12)]
    parts = [p.example for run in runs for p in pieces.cut(run, 20)]
    rows, report = packing.pack(parts, 64, "drop")
    assert report.dropped == 0
    batch = packing.to_batch(rows, 64)
    for row in np.asarray(batch.segment_ids):
        assert np.bincount(row)[1:].max() <= 20
    assert batch.positions.max() < 20
    assert batch.mask.sum() == sum(run.mask.sum() for run in runs)


def test_the_length_that_costs_what_pieces_cost():
    assert pieces.square_length([10, 10]) == 10 and pieces.square_length([1, 3]) == 2.5


def test_observations_are_counted():
    run = run_of(4, (0, 3), (2, 3), (2, 3), (2, 3))
    assert [(p.observations, p.demanded) for p in pieces.cut(run, 12)] == [((0,), 3), ((1,), 3), ((2,), 3)]
    assert [(p.observations, p.demanded) for p in pieces.cut(run, 22)] == [((0, 1, 2), 3)]
    ended = Example(np.append(run.tokens, 22).astype(np.int32), np.append(run.mask, 0).astype(np.float32))  # a line's end is none
    assert [(p.observations, p.demanded) for p in pieces.cut(ended, 30)] == [((0, 1, 2), 3)]
