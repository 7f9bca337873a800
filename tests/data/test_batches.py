import collections
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.data import packing
from a1jax.data.batches import loader
from a1jax.data.errors import DataError
from a1jax.data.packing import Example


def source(count=23, seed=0, low=3, high=14):
    """Examples of which every token names its example."""
    lengths = np.random.default_rng(seed).integers(low, high, count)
    return [Example(np.full(n, i, np.int32), np.ones(n, np.float32), i % 6) for i, n in enumerate(lengths)]


def rows_of(batch):
    """What is in each row, as something hashable."""
    return [batch.tokens[b].tobytes() + batch.segment_ids[b].tobytes() for b in range(len(batch.tokens))]


def same(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("tokens", "targets", "mask", "positions", "segment_ids", "domains"))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_every_epoch_has_every_row_once_in_another_order():
    batches = loader(source(), 4, 16, seed=1)
    rows = batches.rows_per_epoch
    assert rows % 4, "the last batch of an epoch is an unequal one"
    stream = [row for batch in take(batches, rows) for row in rows_of(batch)]
    epochs = [stream[n * rows : (n + 1) * rows] for n in range(4)]
    whole = collections.Counter(rows_of(packing.to_batch(packing.pack(source(), 16)[0], 16)))
    assert all(collections.Counter(epoch) == whole for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert batches.epoch == 4.0


def test_order_is_of_the_seed_alone():
    first = take(loader(source(), 4, 16, seed=1), 12)
    again = take(loader(source(), 4, 16, seed=1, threads=4, prefetch=16), 12)
    other = take(loader(source(), 4, 16, seed=2), 12)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 15), st.integers(0, 5), st.sampled_from(["split", "drop"]))
def test_a_resumed_loader_goes_on_like_an_uninterrupted_one(before, wasted, policy):
    uninterrupted = take(loader(source(), 3, 10, seed=5, policy=policy), before + 6)
    stopped = loader(source(), 3, 10, seed=5, policy=policy)
    take(stopped, before)
    state = json.loads(json.dumps(stopped.get_state()))
    take(stopped, wasted)  # handed out, but not trained on: the state was taken before
    resumed = loader(source(), 3, 10, seed=5, policy=policy, threads=2)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(uninterrupted[before:], take(resumed, 6), strict=True))
    assert resumed.get_state()["batches"] == before + 6
    stopped.set_state(state)  # the same loader, wound back
    assert same(next(stopped), uninterrupted[before])


def test_position_is_what_was_handed_out_not_what_was_prefetched():
    batches = loader(source(), 4, 16, seed=1, prefetch=16, threads=2)
    assert batches.get_state()["batches"] == 0
    next(batches)
    assert batches.get_state()["batches"] == 1


@pytest.mark.parametrize("hosts", [2, 3])
def test_the_hosts_batches_together_are_the_whole(hosts):
    whole = take(loader(source(), 6, 16, seed=3), 9)
    shards = [loader(source(), 6, 16, seed=3, shard_index=h, shard_count=hosts) for h in range(hosts)]
    for batch in whole:
        parts = [next(shard) for shard in shards]
        assert all(len(part.tokens) == 6 // hosts for part in parts)
        joined = jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
        assert same(joined, batch)


def test_a_state_moves_to_another_number_of_hosts():
    one = loader(source(), 6, 16, seed=3)
    take(one, 5)
    two = loader(source(), 6, 16, seed=3, shard_index=1, shard_count=2)
    two.set_state(one.get_state())
    assert np.array_equal(next(two).tokens, next(one).tokens[3:])


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 5}, {"max_length": 17}, {"policy": "drop"}])
def test_a_state_of_another_run_is_refused(change):
    settings = {"batch_size": 4, "max_length": 16, "seed": 3} | change
    with pytest.raises(DataError, match="another run"):
        loader(source(), **settings).set_state(loader(source(), 4, 16, seed=3).get_state())
    with pytest.raises(DataError, match="another run"):
        loader(source(seed=9), 4, 16, seed=3).set_state(loader(source(), 4, 16, seed=3).get_state())
    with pytest.raises(DataError, match="another run"):
        loader(source(), 4, 16, seed=3).set_state({})


def test_errors_in_one_line():
    with pytest.raises(DataError, match="2 examples fill 1 rows of 64, fewer than one batch of 4"):
        loader(source(2), 4, 64, seed=0)
    with pytest.raises(DataError, match="0 examples"):
        loader([], 1, 64, seed=0)
    with pytest.raises(DataError, match="cannot be shared"):
        loader(source(), 4, 16, seed=0, shard_count=3)
    with pytest.raises(DataError, match="cannot be shared"):
        loader(source(), 4, 16, seed=0, shard_index=2, shard_count=2)


def test_padding_and_report():
    batches = loader(source(), 4, 16, seed=0, pad_id=77)
    batch = next(batches)
    assert (batch.tokens[batch.segment_ids == 0] == 77).all() and (batch.segment_ids == 0).any()
    assert batches.report.examples == 23 and batches.report.rows == batches.rows_per_epoch
    assert iter(batches) is batches


def test_known_lengths_spare_reading_the_source():
    class Lazy:
        def __init__(self, runs):
            self.runs, self.lengths, self.read = runs, [len(run) for run in runs], []

        def __len__(self):
            return len(self.runs)

        def __getitem__(self, index):
            self.read.append(index)
            return self.runs[index]

    lazy = Lazy(source())
    batches = loader(lazy, 2, 16, seed=0, prefetch=1)
    assert lazy.read == []
    assert same(next(batches), next(loader(source(), 2, 16, seed=0)))
    assert 0 < len(lazy.read) < 23


def test_batches_of_one_row_never_end():
    examples = [Example(np.arange(5, dtype=np.int32), np.ones(5, np.float32)) for _ in range(3)]
    one = loader(examples, batch_size=1, max_length=8, seed=0)
    assert [next(one).tokens.shape for _ in range(7)] == [(1, 8)] * 7
