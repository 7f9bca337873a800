import collections
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.data import packing
from a1jax.data.errors import DataError
from a1jax.data.packing import Example, pack, pack_rows, place, to_batch, to_targets


def example(tokens, mask=None, domain=0):
    return Example(np.asarray(tokens, np.int32), np.asarray([1.0] * len(tokens) if mask is None else mask, np.float32), domain)


def examples_of(lengths):
    """Examples whose tokens are all different, over the whole list."""
    starts = np.cumsum([0, *lengths])
    return [example(range(starts[i], starts[i + 1]), domain=i % 6) for i in range(len(lengths))]


def test_one_row_by_hand():
    rows = [(example([5, 6, 7], [0, 1, 1], 2), example([8, 9], [0, 1], 4)), (example([3], [1], 1),)]
    batch = to_batch(rows, 7, pad_id=99)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 8, 9, 99, 99], [3, 99, 99, 99, 99, 99, 99]])
    np.testing.assert_array_equal(batch.targets, [[6, 7, 99, 9, 99, 99, 99], [99] * 7])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0, 1, 0, 0, 0], [0] * 7])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0, 0], [0] * 7])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.domains, [[2, 2, 2, 4, 4, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    assert {str(getattr(batch, f).dtype) for f in ("tokens", "targets", "positions", "segment_ids", "domains")} == {"int32"}
    assert batch.mask.dtype == np.float32


def test_the_first_token_of_a_later_piece_is_nobodys_target():
    rows, report = pack([example(range(10), [0] * 4 + [1] * 6)], 4)
    assert (report.rows, report.split, report.split_tokens, report.tokens) == (3, 1, 10, 10)
    batch = to_batch(rows, 4)
    predicted = batch.targets[batch.mask > 0]
    assert sorted(predicted.tolist()) == [5, 6, 7, 9]  # 4 and 8 start a piece


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 32), st.sampled_from(packing.POLICIES))
def test_packing_keeps_every_token_once(lengths, max_length, policy):
    given_examples = examples_of(lengths)
    rows, report = pack(given_examples, max_length, policy)
    kept = [n for n in lengths if n <= max_length or policy == "split"]
    assert all(0 < sum(map(len, row)) <= max_length for row in rows)
    batch = to_batch(rows, max_length, pad_id=-1)
    tokens = collections.Counter(batch.tokens[batch.segment_ids > 0].tolist())
    expected = [e for e in given_examples if len(e) <= max_length or policy == "split"]
    assert tokens == collections.Counter(t for e in expected for t in e.tokens.tolist())
    assert (report.rows, report.tokens, report.slots) == (len(rows), sum(kept), len(rows) * max_length)
    assert report.examples == len(lengths) and report.empty == lengths.count(0)
    assert report.dropped == len(lengths) - len(kept) and report.dropped_tokens == sum(lengths) - sum(kept)
    # tokens of an example are consecutive numbers, so the shift can be told from the tokens alone
    here, there = np.nonzero(batch.mask)
    assert (batch.targets[here, there] == batch.tokens[here, there] + 1).all()
    assert (batch.segment_ids[here, there] == batch.segment_ids[here, there + 1]).all()
    assert int(batch.mask.sum()) == sum(len(piece) - 1 for row in rows for piece in row)
    domain_of = {int(t): e.domain for e in given_examples for t in e.tokens}
    filled = batch.segment_ids > 0
    assert all(domain_of[int(t)] == d for t, d in zip(batch.tokens[filled], batch.domains[filled], strict=True))


def naive(lengths, capacity):
    """Best-fit decreasing as one would write it down."""
    room, bins = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(room[b], b) for b in range(len(bins)) if room[b] >= lengths[i]]
        if fits:
            _, best = min(fits)
            room[best] -= lengths[i]
            bins[best].append(i)
        else:
            room.append(capacity - lengths[i])
            bins.append([i])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=50))
def test_bins_are_as_full_as_the_plain_algorithms(lengths):
    fast = packing.best_fit_decreasing(lengths, 30)
    sizes = [sorted(sum(lengths[i] for i in bin) for bin in bins) for bins in (fast, naive(lengths, 30))]
    assert sizes[0] == sizes[1]
    assert sorted(i for bin in fast for i in bin) == list(range(len(lengths)))


def test_packing_is_fast_and_fixed():
    lengths = np.random.default_rng(0).integers(1, 32_768, 100_000).tolist()
    start = time.process_time()
    rows, report = packing.plan(lengths, 32_768)
    assert time.process_time() - start < 3.0  # 0.3 s alone; the quadratic way takes minutes
    assert report.efficiency > 0.99
    assert rows == packing.plan(lengths, 32_768)[0]


def test_real_runs_fill_rows(real_examples):
    sources = {run.metadata["source"] for run, _ in real_examples}
    assert sources == {"nemo-gym", "swe-agent", "tau-bench", "webdancer"}
    for policy in packing.POLICIES:
        report = pack([example for _, example in real_examples], 32_768, policy)[1]
        assert report.efficiency >= 0.95, str(report)
        assert (report.split, report.dropped) == ((2, 0) if policy == "split" else (0, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([], 0), "max_length is 0"),
        (lambda: pack([], 8, "truncate"), "policy 'truncate'"),
        (lambda: pack([Example(np.zeros(3, np.int32), np.zeros(2, np.float32))], 8), "mask of 2"),
        (lambda: to_batch([(example([1, 2, 3]),)], 2), "row 0 has 3 tokens"),
        (lambda: pack_rows(examples_of([5]), 1, 4), "example 0 has 5 tokens"),
        (lambda: pack_rows(examples_of([3, 3, 3]), 2, 4), "need 3 rows of 4, 2 are given"),
    ],
)
def test_errors_in_one_line(call, message):
    with pytest.raises(DataError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_nothing_to_pack():
    rows, report = pack([], 8)
    assert rows == [] and report.efficiency == 1.0
    assert to_batch([(), ()], 3).segment_ids.tolist() == [[0] * 3] * 2


def test_rollouts_in_a_fixed_number_of_rows():
    rows = pack_rows(examples_of([3, 4, 2, 1]), 4, 5)
    assert len(rows) == 4 and sorted(len(e) for row in rows for e in row) == [1, 2, 3, 4]
    assert [sum(map(len, row)) for row in rows] == [5, 5, 0, 0]
    assert to_batch(rows, 5).tokens.shape == (4, 5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_values_of_tokens_land_where_they_are_predicted(lengths):
    runs = examples_of(lengths)
    rows = place(lengths, len(lengths) + 1, 9)
    batch = to_batch([[runs[i] for i in row] for row in rows], 9, pad_id=-1)
    values = to_targets(rows, [e.tokens.astype(np.float32) + 0.5 for e in runs], 9)
    predicts = batch.mask > 0
    np.testing.assert_array_equal(values[predicts], batch.targets[predicts] + 0.5)
    assert not values[~predicts].any()


def test_best_fit_decreasing_by_hand():
    lengths = [1, 7, 5, 3, 6, 4, 2]
    assert packing.best_fit_decreasing(lengths, 10) == [[1, 3], [4, 5], [2, 6, 0]]
