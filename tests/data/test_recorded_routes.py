"""Recorded routes through the packing: they lie where the token that took them lies, not where it is a target."""

import numpy as np
import pytest

from a1jax.data.errors import DataError
from a1jax.data.packing import Example, pack, to_batch

SHAPE = (2, 3)


def example(first, n, recorded=True):
    tokens = np.arange(first, first + n, dtype=np.int32)
    routes = np.broadcast_to(tokens[:, None, None], (n, *SHAPE)).astype(np.int16) if recorded else None
    return Example(tokens, np.ones(n, np.float32), routes=routes)


def test_routes_lie_with_their_tokens():
    examples = [example(100, 5), example(200, 4, recorded=False), example(300, 12)]
    rows, _ = pack(examples, 8)  # the last one is split, and its later piece keeps its own
    batch = to_batch(rows, 8, routes=SHAPE)
    assert batch.routes.shape == (*batch.tokens.shape, *SHAPE) and batch.routes.dtype == np.int16
    recorded = (batch.segment_ids > 0) & ~((batch.tokens >= 200) & (batch.tokens < 300))
    expected = np.where(recorded, batch.tokens, -1)[..., None, None]
    assert recorded.sum() == 17 and 311 in expected
    np.testing.assert_array_equal(batch.routes, np.broadcast_to(expected, batch.routes.shape))


def test_without_being_asked_there_are_none():
    assert to_batch([[example(0, 4)]], 8).routes is None
    assert (to_batch([[], []], 8, routes=SHAPE).routes == -1).all()


def test_routes_that_do_not_fit_are_refused():
    tokens, mask = np.zeros(4, np.int32), np.zeros(4, np.float32)
    with pytest.raises(DataError, match=r"example 0 has 4 tokens but routes \(3, 2, 3\)"):
        pack([Example(tokens, mask, routes=np.zeros((3, *SHAPE), np.int16))], 8)
    with pytest.raises(DataError, match=r"row 0 has routes \(4, 3, 2\)"):
        to_batch([[Example(tokens, mask, routes=np.zeros((4, 3, 2), np.int16))]], 8, routes=SHAPE)
