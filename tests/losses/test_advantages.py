"""Advantages of groups: values by hand, what must not matter, which runs count."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.losses.advantages import counted, group_advantages, mixed, papo_advantages
from a1jax.types import ABORTED, FAILED, FINISHED, TRUNCATED

advantages = jax.jit(group_advantages, static_argnames=("deviation", "ddof"))
papo = jax.jit(papo_advantages, static_argnames=("coefficient", "deviation", "ddof"))
is_mixed = jax.jit(mixed)

P, G = 3, 4  # one shape for all tests, so that each setting compiles once
ALL = np.ones((P, G), bool)


def rows(*groups):
    """float32 [P, G] with these groups first and groups of zeros after them."""
    return np.asarray([*groups, *[[0] * G] * (P - len(groups))], np.float32)


def test_values_by_hand():
    rewards = rows([1, 0, 0, 0], [1, 1, 0, 0], [0.5, 1.0, 0.0, 2.5])
    # means 1/4, 1/2, 1; variances 3/16, 1/4, 7/8 (squares of the last: .25 + 0 + 1 + 2.25 = 3.5)
    by_hand = [[3 / 4, -1 / 4, -1 / 4, -1 / 4], [0.5, 0.5, -0.5, -0.5], [-0.5, 0, -1, 1.5]]
    np.testing.assert_allclose(advantages(rewards, ALL, deviation=False), by_hand, rtol=1e-6)
    roots = np.sqrt([[3 / 16], [1 / 4], [7 / 8]])
    np.testing.assert_allclose(advantages(rewards, ALL), by_hand / (roots + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, ALL)[0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], rtol=1e-5)
    np.testing.assert_allclose(advantages(rewards, ALL, ddof=1), by_hand / (roots * (4 / 3) ** 0.5 + 1e-6), rtol=1e-6)


def test_runs_that_are_not_valid_are_never_read():
    valid = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    rewards = rows([1, 0, np.nan, 0.5], [np.inf, np.nan, 0, 1], [7, np.nan, 3, 0])
    found = np.asarray(advantages(rewards, valid))
    # three runs of 1, 0, 1/2: mean 1/2, variance (1/4 + 1/4) / 3 = 1/6
    np.testing.assert_allclose(found[0], [0.5 * 6**0.5, -0.5 * 6**0.5, 0, 0], rtol=1e-5)
    assert not found[1:].any()  # nobody, and one alone who is like himself
    assert not np.asarray(advantages(rewards, valid, ddof=1))[1:].any()  # not a division by n - 1 = 0


def test_equal_rewards_teach_exactly_nothing():
    """0.1 + ... + 0.1 is not n * 0.1 in floats; over a deviation of 0 + eps the rest would be an advantage, of a thousandth to 1."""
    rewards = np.repeat(np.asarray([0.1, 1 / 3, 0.7, 0.35, -123.456, 1e-30], np.float32)[:, None], 8, axis=1)
    for count in range(1, 9):
        valid = np.broadcast_to(np.arange(8) < count, rewards.shape)
        assert not np.asarray(advantages(rewards, valid)).any()
        assert not np.asarray(is_mixed(rewards, valid)).any()


def test_a_nan_among_the_valid_is_loud_in_its_group_only():
    rewards = rows([np.nan, 0, 0, 0], [1, 0, 0, 0])
    found = np.asarray(advantages(rewards, ALL))
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    assert np.asarray(is_mixed(rewards, ALL)).tolist() == [True, True, False]


def test_papo_by_hand():
    outcome = rows([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0])
    process = rows([1.0, 0.2, 0.4, 0.6], [0.0, 0.5, 0.5, 1.0], [0.1, 0.9, 0.5, 0.3])
    found = np.asarray(papo(outcome, process, ALL))
    # group 0: A_out (1.7321, -.57735 x3); the failures' process .2 .4 .6 has mean .4, variance .08/3: -1.22474, 0, 1.22474, and half of it
    np.testing.assert_allclose(found[0], [1.7320508, -0.5773503 - 0.6123724, -0.5773503, -0.5773503 + 0.6123724], rtol=1e-4)
    # group 1: all failed, A_out is 0; process 0 .5 .5 1: mean .5, variance 1/8; half of -+ 2^.5
    np.testing.assert_allclose(found[1], [-(2**-0.5), 0, 0, 2**-0.5], atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(papo(outcome, process, ALL, coefficient=1.0)[1], 2 * found[1], rtol=1e-5)
    # group 2: a single failure is compared with nobody; successes are never graded by their process
    np.testing.assert_allclose(found[2], [3**-0.5] * 3 + [-(3**0.5)], rtol=1e-4)


def test_papo_without_the_deviation_and_with_a_run_that_does_not_count():
    valid = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    outcome, process = rows([1, 0, 0, np.nan]), rows([1, 0.25, 0.75, np.nan])
    found = np.asarray(papo(outcome, process, valid, deviation=False))
    np.testing.assert_allclose(found[0], [2 / 3, -1 / 3 - 0.125, -1 / 3 + 0.125, 0], rtol=1e-5)
    assert not found[1:].any()


@pytest.mark.parametrize(("outcome", "process"), [(0.5, 0.5), (2, 0.5), (np.nan, 0.5), (0, 1.5), (0, -0.1), (1, np.nan)])
def test_papo_of_what_it_is_not_defined_for_is_loud(outcome, process):
    outcomes, processes = rows([1, 0, 0, 1]), rows([1, 0.5, 0.25, 1])
    outcomes[0, 2], processes[0, 2] = outcome, process
    assert np.isnan(np.asarray(papo(outcomes, processes, ALL))).all()
    valid = ALL.copy()
    valid[0, 2] = False
    assert np.isfinite(np.asarray(papo(outcomes, processes, valid))).all()


rewards_of = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=P * G, max_size=P * G)
valid_of = st.lists(st.booleans(), min_size=P * G, max_size=P * G)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rewards_of, valid_of, st.permutations(range(G)))
def test_what_holds_for_all_groups(rewards, valid, order):
    rewards, valid = np.asarray(rewards, np.float32).reshape(P, G), np.asarray(valid).reshape(P, G)
    found = np.asarray(advantages(rewards, valid))
    keep = np.asarray(is_mixed(rewards, valid))
    assert keep.tolist() == [len(set(r[v])) > 1 for r, v in zip(rewards, valid, strict=True)]
    assert (found.any(axis=1) == keep).all()  # dynamic sampling drops those without an advantage and no others
    assert not found[~valid].any()
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose((found**2).sum(axis=1), valid.sum(axis=1) * keep, atol=1e-3)
    np.testing.assert_array_equal(np.sign(advantages(rewards, valid, deviation=False)), np.sign(found))
    # The order of the runs, the size of the reward and where its zero lies do not matter.
    np.testing.assert_allclose(advantages(rewards[:, order], valid[:, order]), found[:, order], atol=1e-5)
    np.testing.assert_allclose(advantages(4 * rewards + 2, valid), found, atol=1e-4)
    failed = (rewards < 1).astype(np.float32)
    graded = np.asarray(papo(1 - failed, rewards, valid))
    useful = np.asarray(is_mixed(1 - failed, valid)) | np.asarray(is_mixed(rewards, valid & (failed > 0)))
    assert (graded.any(axis=1) == useful).all()


def test_statuses_carried_to_the_loss():
    statuses = [[FINISHED, TRUNCATED, ABORTED, FAILED], [ABORTED] * 4]
    valid, looked = counted(statuses)
    assert valid.tolist() == looked.tolist() == [[True, True, False, True], [False] * 4]
    valid, looked = counted(statuses, overlong_filter=True)
    assert valid.tolist() == [[True, True, False, True], [False] * 4]
    assert looked.tolist() == [[True, False, False, True], [False] * 4]
    with pytest.raises(ValueError, match="status 'DONE' is none of FINISHED"):
        counted([[FINISHED, "DONE"]])
    with pytest.raises(ValueError, match=r"groups have \[1, 2\] runs"):
        counted([[FINISHED], [FINISHED, FAILED]])


def test_an_aborted_run_does_not_take_its_group_along():
    statuses = [[FINISHED, FAILED, ABORTED, FAILED], [ABORTED, FAILED, FAILED, FINISHED], [ABORTED] * 4]
    rewards = np.asarray([[float(s == FINISHED) if s != ABORTED else np.nan for s in group] for group in statuses])
    found = np.asarray(advantages(rewards.astype(np.float32), counted(statuses)[0]))
    np.testing.assert_allclose(found[:2], [[2**0.5, -(2**-0.5), 0, -(2**-0.5)], [0, -(2**-0.5), -(2**-0.5), 2**0.5]], rtol=1e-5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must be \[P, G\] alike"):
        group_advantages(np.zeros(4), np.ones(4, bool))
    with pytest.raises(ValueError, match=r"must be \[P, G\] alike"):
        mixed(np.zeros((2, 4)), np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"outcome \(2, 4\) and process \(2, 3\)"):
        papo_advantages(np.zeros((2, 4)), np.zeros((2, 3)), np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="ddof is 2"):
        group_advantages(np.zeros((2, 4)), np.ones((2, 4), bool), ddof=2)
