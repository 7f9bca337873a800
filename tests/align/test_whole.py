"""Mode "full" across tokenizers against the dense float64 target and fold: made-up pairs and the two real tokenizers."""

import copy
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import aligned_targets
from a1jax.kernels.vocab_align.members import members
from a1jax.kernels.vocab_align.unit_walk import Read, walk

from a1jax.align import byte_table, extensions, positions, spans, target, vocab_map, whole
from a1jax.config import ConfigError
from a1jax.losses import full_aligned
from a1jax.losses.distill import sva
from a1jax.losses.divergence import LEAST_REST, Divergence
from a1jax.losses.full_kl import full_divergence

D, WIDE, ROWS, LENGTH = 6, 9, 4, 64
NAMES = get_args(Divergence)


class Case:
    """Turns of a pair at random rows of a batch, and both models."""

    def __init__(self, made, pairs, shape=(ROWS, LENGTH), scale=1.0, seed=0):
        """pairs: (student ids, teacher ids, text) of every turn."""
        self.shape, size = shape, shape[0] * shape[1]
        rng = np.random.default_rng(seed)
        count = [sum(len(pair[side]) for pair in pairs) for side in (0, 1)]
        rows = [rng.permutation(size)[:n] for size, n in zip((size, count[1] + 9), count, strict=True)]
        cut = [np.split(r, np.cumsum([len(pair[side]) for pair in pairs])[:-1]) for side, r in enumerate(rows)]
        self.map, self.turns = made, [positions.Turn(*p[:2], *at, p[2]) for p, *at in zip(pairs, *cut, strict=True)]
        sizes = (size, D), (len(made.student_valid), D), (count[1] + 9, WIDE), (len(made.teacher_valid), WIDE)
        arrays = [rng.normal(size=s) * scale for s in sizes]
        self.hidden, self.unembed, self.theirs, self.matrix = (np.asarray(x, np.float32) for x in arrays)
        self.weights = rng.random(shape).astype(np.float32)

    def compared(self, block=16, score=None):
        """What the divergence takes, and the positions."""
        at = positions.positions(self.turns, self.map)
        found = whole.reads(at, self.map, *self.shape)
        if score is None:
            given = jnp.asarray(self.theirs), jnp.asarray(self.matrix), positions.tables(self.map), at
            score = np.asarray(aligned_targets(*given, 1, self.weights.size).score)
        reads = found.with_score(score.reshape(self.shape))
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

    def scores(self):
        made, (rows, *_, score) = np.zeros(self.weights.size, np.float32), self.dense()
        made[rows] = score
        return made


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
        arrays = hidden.reshape(*weights.shape, -1), unembed, theirs, matrix, walks, reads, inside, index
        value, entropy = full_aligned.batch_divergence(*arrays, divergence=name, block=block)
        return jnp.sum(weights * value), (value, entropy)

    return {name: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed, name) for name in names}


def assert_dense(case, names, block=16, searched=False):
    """Value and gradient, of every token; searched: with the scores of ``aligned_targets``, not the dense ones."""
    rows, q, residual, column, _ = case.dense()
    given, at = case.compared(block, None if searched else case.scores())
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


@pytest.mark.parametrize(
    ("seed", "mode", "names", "block"),
    [(108, "two_sided", NAMES, 1000), (196, "two_sided", NAMES[:1], 3), (97, "shared", NAMES[2:], 16)],
)
def test_value_and_gradient_equal_the_dense_form(pair, write, seed, mode, names, block):
    case = made_case(pair(seed, mode), write)
    at, _ = assert_dense(case, names, block)
    straddled = at.starts.low[at.row < ROWS * LENGTH] >= len(case.map.order)
    assert straddled.any() and (at.chained > 0).any()
    apart = (at.alone >= 0) & (at.starts.apart_high > 0)
    assert apart.sum() > 1 if mode == "two_sided" else ((at.chained > 0) & (at.source < 0) & (at.unit >= 0)).any()
    fat = [walk.fat_units.size for walk in whole.walks(case.map, block)]
    assert min(fat) > 0 if block == 3 else not max(fat)


@pytest.fixture(scope="module")
def known(pair, write):
    """A case, what it compares and what comes out; the program is compiled once for it and all that have its shapes."""
    case = made_case(pair(108, "two_sided"), write)
    given, _ = case.compared(1000, case.scores())
    return case, given, jax.tree.map(np.asarray, ours(case.hidden, case.unembed, *given, names=NAMES))


def test_rows_of_infinities_are_no_tokens(known):
    case, _, _ = known
    other = copy.copy(case)
    other.matrix, other.unembed = case.matrix.copy(), case.unembed.copy()
    texts = case.map.order[: case.map.text_count]
    other.matrix[texts[np.argsort(np.diff(case.map.teacher_starts)[texts])][-6:]] = -np.inf  # tokens that were written
    written = np.concatenate([turn.student_ids for turn in case.turns])  # one of a unit of several that is nowhere set apart
    folded = (case.map.unit_of_student != np.arange(len(case.unembed))) & (case.map.unit_of_student >= 0)
    folded = np.setdiff1d(np.flatnonzero(folded), written)
    other.unembed[folded[0]] = -np.inf
    _, got = assert_dense(other, NAMES, 1000)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_what_is_no_number_stays_none(known):
    case, given, got = known
    row, inside = (int(np.flatnonzero((read.high > 0).reshape(-1))[-1]) for read in given[4:6])
    index = np.asarray(given[6]).reshape(-1)[inside] + inside // given[6].shape[1] * LENGTH
    for at in (row, index):
        for side in range(2):
            hidden, theirs = case.hidden.copy(), given[0].copy()
            (hidden, theirs.reshape(-1, WIDE))[side][at] = np.nan
            bad = ours(hidden, case.unembed, theirs, *given[1:], names=NAMES)
            for name in NAMES:
                value, before = bad[name][0][1][0].reshape(-1), got[name][0][1][0].reshape(-1)
                assert np.flatnonzero(np.isnan(value)).tolist() == [at]
                np.testing.assert_array_equal(np.delete(value, at), np.delete(before, at))


def test_permuting_ids_permutes_gradients_only(known, pair, permuted):
    case, given, got = known
    made, rng = pair(108, "two_sided"), np.random.default_rng(5)
    mine, yours = (rng.permutation(len(t)) for t in (made.student, made.teacher))
    other = copy.copy(case)
    other.map = vocab_map.build(permuted(made.student, mine), permuted(made.teacher, yours), "two_sided")
    other.turns = [
        turn._replace(student_ids=mine[np.asarray(turn.student_ids, int)], teacher_ids=yours[np.asarray(turn.teacher_ids, int)])
        for turn in case.turns
    ]
    other.unembed, other.matrix = case.unembed[np.argsort(mine)], case.matrix[np.argsort(yours)]
    again = ours(other.hidden, other.unembed, *other.compared(1000, other.scores())[0], names=NAMES)
    for name in NAMES:
        (loss, values), (d_hidden, d_unembed) = again[name]
        for a, b in zip(jax.tree.leaves((loss, values, d_hidden, d_unembed[mine])), jax.tree.leaves(got[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_it_is_mode_tail_with_all_units(known):
    case, given, got = known
    at, tables = positions.positions(case.turns, case.map), positions.tables(case.map)
    units = len(case.map.unit_of_student)
    found = aligned_targets(jnp.asarray(case.theirs), jnp.asarray(case.matrix), tables, at, units, ROWS * LENGTH)
    made = members([case.map.unit_of_student], prefixes=extensions.prefixes(case.map))

    @jax.jit
    def truncated(hidden, unembed, weights):
        def loss(hidden, unembed):
            more = {"members": made, "alone": found.alone, "mode": "tail", "block": 64, "valid": case.map.student_valid}
            return sva(hidden, unembed, found.values, found.units, weights, coverage=False, **more)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)

    rows, _, residual, *_ = case.dense()
    weights = np.zeros(ROWS * LENGTH, np.float32)
    weights[rows[residual > 1e-3]] = 1  # 1 - the sum of all units is rounding where nothing is left
    (loss, metrics), grads = truncated(case.hidden, case.unembed, weights)
    given = given[:2] + (weights.reshape(ROWS, LENGTH),) + given[3:]
    (total, (_, entropy)), expected = ours(case.hidden, case.unembed, *given, names=NAMES)["reverse"]
    assert (weights > 0).sum() > 20
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    np.testing.assert_allclose(metrics["distill/teacher_entropy"], entropy.reshape(-1)[weights > 0].mean(), rtol=1e-4)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize("names", [("qwen3", "mistral"), pytest.param(("mistral", "qwen3"), marks=pytest.mark.slow)], ids=str)
def test_real_tokenizers_equal_the_dense_form(tokenizers, names):
    """Hard text, and a turn cut within a character; scores from the search."""
    student, teacher = (tokenizers[name] for name in names)
    texts = ["\u8a9e\u8a00 \U0001f468\u200d\U0001f469", "f(a):\r\n\tx"]
    pairs = [([*student.encode(t), student.eos_id], [*teacher.encode(t), teacher.eos_id], t.encode()) for t in texts]
    single = {b: i for i, b in enumerate(byte_table.of(teacher).bytes) if len(b) == 1}
    pairs.append((student.encode(" caf\u00e9"), [*teacher.encode(" caf"), single[b"\xc3"]], None))
    case = Case(vocab_map.build(student, teacher), pairs, (1, 32), scale=0.5)
    at, _ = assert_dense(case, NAMES[:1], 2048, searched=True)
    rows = at.row < 32
    straddled = at.starts.low[rows] >= len(case.map.order)
    assert straddled.any() and at.chained[rows].any() and (at.alone[rows] >= 0).any() and len(at.masked)


def coarse(fold, hidden, unembed, theirs, matrix, name="reverse"):
    """Divergences of two models of one vocabulary, all compared in the units of ``fold``."""
    ids, every, count = np.arange(len(fold)), np.ones(len(fold), bool), len(hidden)
    nothing = np.zeros(count, np.int32)
    read = Read(*(nothing,) * 12)._replace(high=nothing + len(fold), alone=nothing - 1, score=np.zeros(count, np.float32))
    made = walk(fold, every, ids, ids, fold, ids, 7)

    @jax.jit
    def run(hidden, unembed, made):
        def loss(hidden, unembed):
            value, entropy = full_aligned.aligned_divergence(hidden, unembed, theirs, matrix, made, read, divergence=name, block=16)
            return jnp.sum(value), (value, entropy)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)

    return run(hidden, unembed, made)


def test_one_tokenizer_is_full_kl_and_folding_never_increases_it():
    rng, size = np.random.default_rng(3), 40
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((14, D), (size, D), (14, WIDE), (size, WIDE))]
    found = coarse(np.arange(size), *arrays, name="jensen_shannon")

    @jax.jit
    def plain(hidden, unembed):
        def loss(hidden, unembed):
            value, entropy = full_divergence(hidden, unembed, *arrays[2:], 16, "jensen_shannon")
            return jnp.sum(value), (value, entropy)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)

    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain(*arrays[:2])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    fold = rng.integers(0, 6, size) * 3  # units of about 7 ids: fat ones, too
    folded = coarse(fold, *arrays, name="jensen_shannon")[0][1][0]
    units = np.unique(fold)
    q = np.asarray(jax.nn.softmax(arrays[2] @ arrays[3].T)) @ (fold[:, None] == units)
    salient = functools.partial(sva, mode="salient", divergence="jensen_shannon", coverage=False, members=members([fold], 3, 16))
    places = jnp.asarray(np.tile(units, (14, 1)), jnp.int32)
    loss = jax.jit(lambda hidden, unembed: salient(hidden, unembed, jnp.log(q), places, jnp.ones(14))[0])(*arrays[:2])
    np.testing.assert_allclose(loss, folded.sum(), rtol=1e-5)  # all units in mode salient
    assert (folded <= found[0][1][0] + 1e-6).all() and (folded < 0.7 * found[0][1][0]).any()


def test_no_array_of_all_tokens_over_all_ids(largest):
    size, count = 3000, 512
    rng = np.random.default_rng(0)
    fold = np.minimum(rng.zipf(1.5, size), size) - 1  # very fat and very thin ones
    nothing = np.zeros(count, np.int32)
    read = Read(*(nothing,) * 12)._replace(score=np.zeros(count, np.float32))
    made = walk(fold, np.ones(size, bool), np.arange(size), np.arange(size), fold, np.arange(size), 64)
    assert made.fat_units.size

    def loss(hidden, unembed, theirs, matrix):
        return jnp.sum(full_aligned.aligned_divergence(hidden, unembed, theirs, matrix, made, read, block=64)[0])

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((count, D), (size, D), (count, D), (size, D))]
    assert largest(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*shapes).jaxpr) < count * size // 8


def test_a_walk_by_hand():
    # Unit 0: ids 0, 3; unit 1: id 1 and nothing of the teacher's; id 2 in none, 4 no token. The teacher's: rows 0 and 2 in 0, 1 in none.
    made = walk(np.array([0, 1, -1, 0, 4]), np.arange(5) < 4, np.arange(5), np.arange(3), np.array([0, -1, 0]), np.array([5, 6, 7]), 2)
    np.testing.assert_array_equal(made.units, [[-1], [0], [1]])
    np.testing.assert_array_equal(made.ours, [[2, -1], [0, 3], [1, -1]])
    np.testing.assert_array_equal(made.theirs, [[1, -1], [0, 2], [-1, -1]])
    np.testing.assert_array_equal(made.keys, [[6, -1], [5, 7], [-1, -1]])
    assert not made.fat_units.size


def test_wrong_arguments_are_one_line(known):
    case, given, _ = known
    ids = np.arange(5)
    with pytest.raises(ValueError, match="must be .V. alike"):
        walk(ids, ids > 0, ids[1:], ids, ids, ids)
    with pytest.raises(ValueError, match="block is 0"):
        walk(ids, ids > 0, ids, ids, ids, ids, 0)
    arrays = jnp.asarray(case.hidden.reshape(ROWS, LENGTH, D)), jnp.asarray(case.unembed)
    given = jax.tree.map(jnp.asarray, given)
    with pytest.raises(ValueError, match="the walk is of"):
        full_aligned.batch_divergence(arrays[0], arrays[1][1:], given[0], given[1], *given[3:])
    with pytest.raises(ValueError, match="as student_hidden"):
        full_aligned.batch_divergence(*arrays, given[0], given[1], given[3], given[4]._replace(unit=np.zeros((ROWS, 1))), *given[5:])
    with pytest.raises(ConfigError, match="the batch has 1 x 9"):
        whole.reads(positions.positions(case.turns, case.map), case.map, 1, 9)
