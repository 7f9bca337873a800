"""Mode "full" across tokenizers against the dense float64 target and fold: made-up pairs and the two real tokenizers."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import aligned_targets

from a1jax.align import extensions, positions, spans, target, vocab_map, whole
from a1jax.losses import full_aligned
from a1jax.losses.divergence import LEAST_REST, Divergence

D, WIDE, ROWS, LENGTH = 6, 9, 4, 64
NAMES = get_args(Divergence)


class Case:
    """Turns of a pair at random rows of a batch, and both models."""

    def __init__(self, made, pairs, scale=1.0, seed=0):
        """pairs: (student ids, teacher ids, text) of every turn."""
        rng = np.random.default_rng(seed)
        count = [sum(len(pair[side]) for pair in pairs) for side in (0, 1)]
        rows = [rng.permutation(size)[:n] for size, n in zip((ROWS * LENGTH, count[1] + 9), count, strict=True)]
        cut = [np.split(r, np.cumsum([len(pair[side]) for pair in pairs])[:-1]) for side, r in enumerate(rows)]
        self.map, self.turns = made, [positions.Turn(*p[:2], *at, p[2]) for p, *at in zip(pairs, *cut, strict=True)]
        sizes = (ROWS * LENGTH, D), (len(made.student_valid), D), (count[1] + 9, WIDE), (len(made.teacher_valid), WIDE)
        arrays = [rng.normal(size=s) * scale for s in sizes]
        self.hidden, self.unembed, self.theirs, self.matrix = (np.asarray(x, np.float32) for x in arrays)
        self.weights = rng.random((ROWS, LENGTH)).astype(np.float32)

    def compared(self, block=16, score=None):
        """What the divergence takes, and the positions."""
        at = positions.positions(self.turns, self.map)
        found = whole.reads(at, self.map, ROWS, LENGTH)
        if score is None:
            given = jnp.asarray(self.theirs), jnp.asarray(self.matrix), positions.tables(self.map), at
            score = np.asarray(aligned_targets(*given, 1, ROWS * LENGTH).score)
        reads = found.with_score(score.reshape(ROWS, LENGTH))
        theirs = self.theirs[found.teacher_row]
        return (theirs, self.matrix, self.weights, whole.walks(self.map, block), *reads, found.index), at

    def dense(self):
        """Per compared token: flat row, q [., V], residual, column that each id of the student is summed in [., V] (V: none), score."""
        found, fold = [[], [], [], [], []], self.map.unit_of_student
        for turn in self.turns:
            token = self.map.teacher_valid & ~np.isneginf(self.matrix).any(axis=1)
            matrix = np.where(token[:, None], self.matrix, 0).astype(np.float64)
            log_p = target.log_softmax(self.theirs[np.asarray(turn.teacher_rows, int)].astype(np.float64) @ matrix.T, token)
            way = spans.align(turn.student_ids, turn.teacher_ids, self.map, turn.text)
            said = target.target(log_p, turn.student_ids, turn.teacher_ids, way, self.map)
            for i in np.flatnonzero(~said.masked):
                column = np.where(fold < 0, len(fold), fold)
                if said.alone[i] >= 0:
                    column[extensions.shares_unit(self.map, said.alone[i])] = said.alone[i]
                for all_of, one in zip(found, (turn.student_rows[i], said.q[i], said.residual[i], column, said.score[i]), strict=True):
                    all_of.append(one)
        return [np.array(x) for x in found]


def reference(case, hidden, unembed, q, residual, column, name):
    """The divergences of the compared tokens, dense, with a rest of at least LEAST_REST; hidden [., D]."""
    fine = case.map.student_valid & ~np.isneginf(case.unembed).any(axis=1)
    logits = jnp.where(fine, hidden @ jnp.where(fine[:, None], unembed, 0).T, -jnp.inf)
    line = jnp.arange(len(q))[:, None]
    p = jnp.zeros((len(q), q.shape[1] + 1), logits.dtype).at[line, column].add(jax.nn.softmax(logits))
    there = np.pad(q > 0, ((0, 0), (0, 1)))
    rest = jnp.maximum(jnp.sum(jnp.where(there, 0, p), axis=1, keepdims=True), LEAST_REST)
    p = jnp.concatenate([jnp.where(there, p, 0.5)[:, :-1], rest], axis=1)
    q = np.concatenate([np.where(there[:, :-1], q, 0.5), np.maximum(residual, LEAST_REST)[:, None]], axis=1)
    mean = (p + q) / 2
    each = {
        "reverse": p * jnp.log(p / q),
        "forward": q * jnp.log(q / p),
        "jensen_shannon": p * jnp.log(p / mean) / 2 + q * jnp.log(q / mean) / 2,
    }[name]
    return jnp.sum(each, axis=1)  # 0 of what is no class


@functools.partial(jax.jit, static_argnames=("names", "block"))
def ours(hidden, unembed, theirs, matrix, weights, walks, reads, inside, index, names=NAMES, block=32):
    def loss(hidden, unembed, name):
        arrays = hidden.reshape(ROWS, LENGTH, -1), unembed, theirs, matrix, walks, reads, inside, index
        value, entropy = full_aligned.batch_divergence(*arrays, divergence=name, block=block)
        return jnp.sum(weights * value), (value, entropy)

    return {name: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed, name) for name in names}


def assert_dense(case, names, block=16, searched=False):
    """Value and gradient, of every token; searched: with the scores of ``aligned_targets``, not the dense ones."""
    rows, q, residual, column, score = case.dense()
    scores = np.zeros(ROWS * LENGTH, np.float32)
    scores[rows] = score
    given, at = case.compared(block, None if searched else scores)
    got = jax.tree.map(np.asarray, ours(case.hidden, case.unembed, *given, names=names))
    for name in names:
        (_, (value, entropy)), grads = got[name]
        with jax.enable_x64(True):
            arrays = (jnp.asarray(x.astype(np.float64)) for x in (case.hidden[rows], case.unembed))
            weights = case.weights.reshape(-1)[rows].astype(np.float64)

            def loss(hidden, unembed, name=name, weights=weights):
                each = reference(case, hidden, unembed, q, residual, column, name)
                return jnp.sum(weights * each), each

            (_, each), expected = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays))
        np.testing.assert_allclose(value.reshape(-1)[rows], each, rtol=1e-4, atol=1e-6, err_msg=name)
        assert not np.delete(value.reshape(-1), rows).any() and not np.delete(grads[0], rows, axis=0).any()
        for found, wanted in zip((grads[0][rows], grads[1]), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
        classes = np.append(q, residual[:, None], axis=1)
        terms = -np.where(classes > 0, classes * np.log(np.maximum(classes, 1e-300)), 0).sum(1)
        np.testing.assert_allclose(entropy.reshape(-1)[rows], terms, rtol=1e-4, atol=1e-5)
    return at, got


def made_case(made, write, texts=10, seed=0):
    rng, letters = np.random.default_rng(seed), [b for b in made.student.bytes if len(b) == 1]
    pairs = [(made.student_ids, made.teacher_ids, made.text), ([], [], b"")]
    for _ in range(texts):
        text = b"".join(letters[n] for n in rng.integers(0, len(letters), 14))
        pairs.append((write(rng, made.student, text), write(rng, made.teacher, text), text))
    ours, theirs, _ = pairs[-1]
    pairs[-1] = (ours[:-2], theirs, None)  # its last position's token is not whole
    return Case(made.map, pairs)


@pytest.mark.parametrize(("seed", "mode", "names"), [(16, "two_sided", NAMES), (28, "two_sided", NAMES[:1]), (35, "one_sided", NAMES[:1])])
def test_value_and_gradient_equal_the_dense_form(pair, write, seed, mode, names):
    case = made_case(pair(seed, mode), write)
    at, _ = assert_dense(case, names)
    straddled = at.starts.low[at.row < ROWS * LENGTH] >= len(case.map.order)
    assert straddled.any() and (at.chained > 0).any() and (mode != "two_sided" or (at.alone >= 0).any())
