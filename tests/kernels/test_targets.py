"""Aligned targets from integers written by hand: six teacher ids, four units, a chain, a slice and all that can go wrong with numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import layout, targets

KEY = ("two_sided", "s", "t", 2)
UNIT = np.array([0, 0, 1, 2, 3, -1], np.int32)  # of the teacher's ids
VALID = np.array([True] * 6 + [False])
TABLES = targets.Tables(layout.build(np.append(UNIT, -1), 16, valid=VALID), None, VALID, KEY)
EMPTY = {name: np.zeros(0, np.int32) for name in ("wide_row", "wide_low", "wide_high")}
P = np.array([[0.3, 0.2, 0.1, 0.25, 0.05, 0.1], [0.1, 0.1, 0.4, 0.2, 0.1, 0.1], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
NONE = -1


def hidden_and_unembed(p):
    """Hidden states whose logits are log p plus a constant that differs by row; the last row of the matrix is padding."""
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(p), -1e30) + np.arange(len(p))[:, None]
    return jnp.asarray(np.pad(logits, ((0, 0), (0, 1)), constant_values=50.0), jnp.float32), jnp.eye(7, dtype=jnp.float32)


def by_hand(source, unit, alone, mass=7, loser=NONE, chained=1):
    """Row 5 of the student: chained over ids 3 (teacher's row 0) and 2 (row 1). Row 2: begins in row 2 after what ids 0, 1 and 5 share;
    their remainders are units 2, none and 3, and 1 was written. Sums: three of the slice, what was written thrice, a unit's mass."""
    entries = [(2, 1, 0), (2, 0, 1), (2, 5, 2), (0, 3, 3), (1, 2, 4), (2, 1, 5), (0, 2, 6)]
    row, token, which = (
        np.array([*column, *[fill] * 9], np.int32) for column, fill in zip(zip(*entries, strict=True), (0, NONE, 7), strict=True)
    )
    pool = 8  # then sync at 8, chain at 9, narrow at 10
    tiled = [np.array(x, np.int32) for x in ([0], [1], [0, 0], [3, 0])]
    return targets.Positions(
        tiled[0], tiled[1], row, token, which, np.array([NONE, 2, 3, *[NONE] * 5], np.int32), tiled[2], tiled[3], **EMPTY,
        term_over=np.array([3, 4, 5, 0], np.int32), term_under=np.array([pool, pool + 1, pool + 2, 0], np.int32),
        term_position=np.array([0, 0, 1, 4], np.int32), row=np.array([5, 2, 99, 99], np.int32), place=np.array([0, 1, 0, 0], np.int32),
        total=np.array([pool, pool + 2, 0, 0], np.int32), mass=np.array([mass, 7, 7, 7], np.int32),
        source=np.array([source, NONE, NONE, NONE], np.int32), unit=np.array([unit, NONE, NONE, NONE], np.int32),
        alone=np.array([alone, NONE, NONE, NONE], np.int32), loser=np.array([loser, NONE, NONE, NONE], np.int32),
        chained=np.array([chained, 0, 0, 0], np.int32), width=4, counts={"entries": 7, "rows": 3, "student_rows": 6},
        masked=np.array([1], np.int32), shares={"positions": 3.0}, key=KEY,
    )  # fmt: skip


def run(p, k, **where):
    return jax.tree.map(np.asarray, targets.aligned_targets(*hidden_and_unembed(p), TABLES, by_hand(**where), k, 6))


CHAIN = 0.25 * 0.4


@pytest.mark.parametrize(
    ("where", "expected", "units", "alone"),
    [
        ({"source": 2, "unit": NONE, "alone": 9}, [0.5, 0.25 - CHAIN, CHAIN], [0, 2, 9], 9),  # a class of its own
        ({"source": NONE, "unit": NONE, "alone": 9}, [0.5, 0.25, CHAIN], [0, 2, 9], 9),  # out of the residual
        ({"source": NONE, "unit": NONE, "alone": 9, "mass": 6, "loser": 2, "chained": 0}, [0.5, 0.15, 0.1], [0, 2, 9], 9),  # no chain
        ({"source": 0, "unit": NONE, "alone": 9, "mass": 6, "loser": 2}, [0.5 - CHAIN, 0.15, 0.1 + CHAIN], [0, 2, 9], 9),  # both
        ({"source": 2, "unit": NONE, "alone": 9, "mass": 6, "loser": 2}, [0.5, 0.15 - CHAIN, 0.1 + CHAIN], [0, 2, 9], 9),
        ({"source": 2, "unit": 0, "alone": NONE}, [0.5 + CHAIN, 0.25 - CHAIN, 0], [0, 2, NONE], NONE),  # to one of the k
        ({"source": 2, "unit": 1, "alone": NONE, "mass": 6}, [0.5, 0.25 - CHAIN, 0.1 + CHAIN], [0, 2, 1], NONE),  # to another one
        ({"source": 2, "unit": 7, "alone": NONE}, [0.5, 0.25 - CHAIN, CHAIN], [0, 2, 7], NONE),  # which had nothing
        ({"source": 3, "unit": NONE, "alone": NONE}, [0.5, 0.25, 0], [0, 2, NONE], NONE),  # to the residual, out of no unit of the k
        ({"source": 2, "unit": NONE, "alone": NONE}, [0.5, 0.25 - CHAIN, 0], [0, 2, NONE], NONE),
    ],
)
def test_where_the_mass_of_a_chain_goes(where, expected, units, alone):
    got = run(P, 2, **where)
    np.testing.assert_allclose(np.exp(got.values[5]), expected, rtol=1e-5)
    assert got.units[5].tolist() == units and got.alone[5] == alone
    assert np.exp(got.score[5]) == pytest.approx(CHAIN, rel=1e-5)
    np.testing.assert_allclose(np.exp(got.values[2]), [5 / 7, 1 / 7, 0], rtol=1e-5)  # the slice's residual is 1 / 7
    assert got.units[2].tolist() == [2, 3, NONE] and np.exp(got.score[2]) == pytest.approx(1 / 7, rel=1e-5)
    for row in (0, 1, 3, 4):
        assert np.isneginf(got.values[row]).all() and (got.units[row] == NONE).all() and got.alone[row] == NONE and got.score[row] == 0


def test_a_chain_that_takes_everything_leaves_a_floor():
    p = P.copy()
    p[0], p[1] = [0.25, 0.25, 0, 0.5, 0, 0], [0, 0, 1, 0, 0, 0]
    got = run(p, 2, source=2, unit=NONE, alone=9)
    assert got.units[5].tolist() == [0, 2, 9]
    np.testing.assert_allclose(got.values[5], np.log([0.5, 0.5 * targets.LEAST_REST, 0.5]), rtol=1e-5)
    p[1] = [0, 0, 1 - 1e-3, 1e-3, 0, 0]  # ... and one that takes nearly everything leaves the right rest
    got = run(p, 2, source=2, unit=NONE, alone=9)
    np.testing.assert_allclose(np.exp(got.values[5]), [0.5, 0.5e-3, 0.5 * 0.999], rtol=1e-3)


def test_a_chain_that_the_teacher_rules_out_moves_nothing():
    p = P.copy()
    p[1, 2] = 0
    hidden, unembed = hidden_and_unembed(p)
    unembed = unembed.at[6].set(-jnp.inf)  # padding, told in the other way
    got = jax.tree.map(np.asarray, targets.aligned_targets(hidden, unembed, TABLES, by_hand(2, NONE, 9), 2, 6))
    assert not any(np.isnan(x).any() for x in got) and got.score[5] < -1e29
    np.testing.assert_allclose(np.exp(got.values[5]), [0.5, 0.25, 0], rtol=1e-5)
    unembed = unembed.at[2].set(-jnp.inf)  # id 2 is no token: the score is -inf, nothing stands alone
    got = jax.tree.map(np.asarray, targets.aligned_targets(hidden_and_unembed(P)[0], unembed, TABLES, by_hand(2, NONE, 9), 2, 6))
    assert np.isneginf(got.score[5]) and got.alone[5] == NONE and np.isneginf(got.values[5, 2]) and got.units[5].tolist() == [0, 2, NONE]
    np.testing.assert_allclose(np.exp(got.values[5, :2]), [0.5 / 0.9, 0.25 / 0.9], rtol=1e-5)


def test_more_places_than_units_and_every_implementation():
    got = run(P, 9, source=2, unit=0, alone=NONE)
    np.testing.assert_allclose(np.exp(got.values[5, :4]), [0.5 + CHAIN, 0.25 - CHAIN, 0.1, 0.05], rtol=1e-5)
    assert got.units[5].tolist() == [0, 2, 1, 3, *[NONE] * 6] and got.units[2].tolist() == [2, 3, *[NONE] * 8]
    kernel = targets.aligned_targets(*hidden_and_unembed(P), TABLES, by_hand(2, 0, NONE), 9, 6, implementation="interpret")
    assert np.array_equal(kernel.units, got.units)
    np.testing.assert_allclose(kernel.values, got.values, rtol=1e-5)


def test_no_gradient_and_any_dtype():
    hidden, unembed = hidden_and_unembed(P)
    half = targets.aligned_targets(hidden.astype(jnp.bfloat16), unembed.astype(jnp.bfloat16), TABLES, by_hand(2, 0, NONE), 2, 6)
    assert half.values.dtype == half.score.dtype == jnp.float32 and half.units.dtype == half.alone.dtype == jnp.int32
    np.testing.assert_allclose(np.exp(half.values[5]), [0.5 + CHAIN, 0.25 - CHAIN, 0], atol=0.02)

    def total(*arrays):
        got = targets.aligned_targets(*arrays, TABLES, by_hand(2, 0, NONE), 2, 6)
        return got.values[5, 0] + got.score[2]

    assert not any(x.any() for x in jax.grad(total, (0, 1))(hidden, unembed))
