"""Targets of a batch, from hidden states, against the dense float64 target: made-up pairs and the two real tokenizers."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a1jax.kernels.vocab_align import aligned_targets, aligned_topk, arrange, layout, ops

from a1jax.align import byte_table, positions, spans, target, vocab_map

D, ROWS = 12, 512


@dataclasses.dataclass
class Batch:
    map: vocab_map.VocabMap
    turns: list
    hidden: np.ndarray
    unembed: np.ndarray

    def targets(self, k, capacity=positions.CAPACITY, unembed=None, rows=ROWS):
        made = positions.positions(self.turns, self.map, capacity)
        unembed = jnp.asarray(self.unembed if unembed is None else unembed)
        got = aligned_targets(jnp.asarray(self.hidden), unembed, positions.tables(self.map, capacity=capacity), made, k, rows)
        return type(got)(*map(np.asarray, got)), made

    def dense(self, unembed=None):
        """Per turn: (spans, target, target before a chain's mass is moved, the log-probabilities of its rows)."""
        unembed = self.unembed if unembed is None else unembed
        for turn in self.turns:
            rows = np.asarray(turn.teacher_rows, int)
            token = self.map.teacher_valid & ~np.isneginf(unembed).any(axis=1)
            logits = self.hidden[rows].astype(np.float64) @ np.where(token[:, None], unembed, 0).T.astype(np.float64)
            log_p = target.log_softmax(logits, token)
            found = spans.align(turn.student_ids, turn.teacher_ids, self.map, turn.text)
            ends = dataclasses.replace(found, last=found.teacher, complete=np.ones_like(found.complete))
            each = [target.target(log_p, turn.student_ids, turn.teacher_ids, s, self.map, s is found) for s in (found, ends)]
            yield turn, found, *each, log_p


def rows_of(rng, lengths, rows):
    """Different rows for turns of these lengths, in no order."""
    return np.split(rng.permutation(rows)[: sum(lengths)], np.cumsum(lengths)[:-1])


def made_batch(made, write, texts=12, length=14, seed=0):
    """Turns of one pair, one of them its own, one empty, one cut before its end on the student's side."""
    rng, letters = np.random.default_rng(seed), [b for b in made.student.bytes if len(b) == 1]
    pairs = [(made.student_ids, made.teacher_ids, made.text), ([], [], b"")]
    for _ in range(texts):
        text = b"".join(letters[n] for n in rng.integers(0, len(letters), length))
        pairs.append((write(rng, made.student, text), write(rng, made.teacher, text), text))
    ours, theirs, text = pairs[-1]
    pairs[-1] = (ours[:-2], theirs, None)  # its last position's token is not whole
    rows = [rows_of(rng, [len(pair[side]) for pair in pairs], ROWS) for side in (0, 1)]
    turns = [positions.Turn(*pair[:2], *where, pair[2]) for pair, *where in zip(pairs, *rows, strict=True)]
    hidden = rng.normal(size=(ROWS, D)).astype(np.float32)
    return Batch(made.map, turns, hidden, rng.normal(size=(len(made.teacher), D)).astype(np.float32))


def assert_dense(batch, got, made, k, unembed=None, rtol=1e-4, atol=1e-6):
    """Everything that a target says; returns the counts of straddled, chained and alone positions, and places beyond the k."""
    counts, rows = np.zeros(4, int), []
    for turn, found, dense, plain, _ in batch.dense(unembed):
        for i, row in enumerate(np.asarray(turn.student_rows)):
            if found.masked[i]:
                assert row in made.masked
                continue
            rows.append(row)
            values, units, alone = got.values[row], got.units[row], got.alone[row]
            assert got.score[row] == pytest.approx(dense.score[i], rel=rtol, abs=rtol) and alone == dense.alone[i]
            some = units >= 0
            assert np.isneginf(values[:-1][~some[:-1]]).all() and np.isfinite(values[some]).all()
            assert len(set(units[some].tolist())) == some.sum()
            np.testing.assert_allclose(np.exp(values[some]), dense.q[i, units[some]], rtol=rtol, atol=atol)
            best = np.sort(plain.q[i])[::-1][:k]  # the k best before the move, and all there are
            np.testing.assert_allclose(plain.q[i, units[:-1][some[:-1]]], best[best > 0][: some[:-1].sum()], rtol=rtol, atol=atol)
            assert some[:-1].sum() >= min(k, np.sum(best > 1e-30))
            if alone >= 0:
                assert np.exp(values[-1]) == pytest.approx(dense.q[i, alone], rel=rtol) and units[-1] == alone
            if some.sum() >= np.sum(dense.q[i] > 1e-30):
                total = np.exp(values.astype(np.float64)).sum() + dense.residual[i]
                assert total == pytest.approx(1, abs=1e-5)
            counts += found.offset[i] > 0, found.chained[i], alone >= 0, units[-1] >= 0 > alone
    empty = np.setdiff1d(np.arange(len(got.score)), rows)
    assert np.isneginf(got.values[empty]).all() and (got.units[empty] == -1).all() and (got.alone[empty] == -1).all()
    assert not got.score[empty].any()
    return counts


@pytest.mark.parametrize(
    ("seed", "mode", "k", "capacity", "expected"),  # straddled, chained, alone, a unit in the last place
    [
        (16, "two_sided", 4, 1024, (1, 1, 1, 1)),
        (28, "two_sided", 200, 4, (1, 1, 1, 1)),  # more places than units
        (35, "one_sided", 5, 4, (1, 1, 0, 1)),
        (21, "shared", 3, 1024, (1, 1, 0, 1)),
    ],
)
def test_a_batch_equals_the_dense_target(pair, write, seed, mode, k, capacity, expected):
    batch = made_batch(pair(seed, mode), write)
    got, made = batch.targets(k, capacity)
    assert got.values.shape == got.units.shape == (ROWS, k + 1) and got.values.dtype == np.float32
    counts = assert_dense(batch, got, made, k)
    assert tuple(np.minimum(counts, 1)) == expected and bool(made.wide_row.size) == (capacity == 4)
    assert made.narrow_first.size and made.chain.size


@pytest.fixture(scope="module")
def known(pair, write):
    """A batch and its targets; what the tests below compare with is compiled for it once."""
    batch = made_batch(pair(16), write)
    return batch, *batch.targets(4)


def test_scores_telescope_over_every_synchronised_span(known):
    batch, got, _ = known
    spanned = 0
    for turn, found, _, _, log_p in batch.dense():
        if not len(found.offset) or found.masked.any():
            continue
        ids = np.asarray(turn.teacher_ids)
        written = log_p[np.arange(len(ids)), ids]
        if (batch.map.teacher_symbols[batch.map.teacher_starts[ids]] >= 256).any():
            written, found = written[:-1], dataclasses.replace(found, offset=found.offset[:-1], teacher=found.teacher[:-1])
        borders = np.append(np.flatnonzero(found.offset == 0), len(found.offset))
        starts, score = np.append(found.teacher, len(written)), got.score[np.asarray(turn.student_rows)]
        for a, b in zip(borders, borders[1:], strict=False):
            assert score[a:b].sum() == pytest.approx(written[starts[a] : starts[b]].sum(), abs=2e-5)
            spanned += b > a + 1
    assert spanned > 5


def test_turns_do_not_touch_each_other(known):
    batch, got, made = known
    other, _ = dataclasses.replace(batch, turns=batch.turns[::2][::-1]).targets(4)
    for n, turn in enumerate(batch.turns):
        rows = np.asarray(turn.student_rows, int)
        if n % 2:
            assert np.isneginf(other.values[rows]).all() and not other.score[rows].any()
            continue
        assert np.array_equal(other.units[rows], got.units[rows]) and np.array_equal(other.alone[rows], got.alone[rows])
        np.testing.assert_allclose(other.values[rows], got.values[rows], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other.score[rows], got.score[rows], rtol=1e-5, atol=1e-5)


def test_permuting_ids_permutes_labels_only(known, pair, permuted):
    batch, got, _ = known
    made, rng = pair(16), np.random.default_rng(5)
    ours, theirs = (rng.permutation(len(t)) for t in (made.student, made.teacher))
    moved = vocab_map.build(permuted(made.student, ours), permuted(made.teacher, theirs), "two_sided")
    turns = [
        turn._replace(
            student_ids=ours[np.asarray(turn.student_ids, int)].tolist(), teacher_ids=theirs[np.asarray(turn.teacher_ids, int)].tolist()
        )
        for turn in batch.turns
    ]
    unembed = np.empty_like(batch.unembed)
    unembed[theirs] = batch.unembed
    other, _ = Batch(moved, turns, batch.hidden, unembed).targets(4)
    new = np.append(ours, -1)
    assert np.array_equal(new[got.units], other.units) and np.array_equal(new[got.alone], other.alone)
    np.testing.assert_allclose(other.values, got.values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other.score, got.score, rtol=1e-5, atol=1e-5)


def test_rows_of_infinities_are_no_tokens(known):
    batch, _, _ = known
    unembed = batch.unembed.copy()
    texts = batch.map.order[: batch.map.text_count]
    longest = texts[np.argsort(np.diff(batch.map.teacher_starts)[texts])]
    unembed[longest[-6:]] = -np.inf  # tokens that were written
    got, made = batch.targets(4, unembed=unembed)
    assert not np.isnan(got.values).any() and not np.isnan(got.score).any()
    assert_dense(batch, got, made, 4, unembed)
    assert np.isneginf(got.score).any()


def test_masked_tokens_are_empty(known):
    batch, got, _ = known
    turns = [turn._replace(teacher_rows=np.where(np.arange(len(turn.teacher_ids)) < 4, turn.teacher_rows, -1)) for turn in batch.turns]
    other, made = dataclasses.replace(batch, turns=turns).targets(4)
    assert len(made.masked) > 20 and np.isneginf(other.values[made.masked]).all() and not other.score[made.masked].any()
    rows = made.row[made.row < ROWS]
    np.testing.assert_allclose(other.score[rows], got.score[rows], rtol=1e-5, atol=1e-5)
    assert np.array_equal(other.units[rows], got.units[rows]) and not np.intersect1d(rows, made.masked).size


def test_nothing_is_well_defined(known):
    batch, _, _ = known
    for turns in ([], [positions.Turn([], [], [], [])]):
        got, made = dataclasses.replace(batch, turns=turns).targets(4)
        assert np.isneginf(got.values).all() and (got.units == -1).all() and (got.alone == -1).all() and not got.score.any()
        assert made.report()["positions"] == 0


def test_the_same_tokenizer_is_the_plain_search_bit_for_bit(pair, write):
    batch = made_batch(pair(16, same=True), write)
    batch.turns = [turn._replace(teacher_ids=turn.student_ids, teacher_rows=turn.student_rows, text=None) for turn in batch.turns]
    got, made = batch.targets(5)
    assert made.report()["straddled"] == made.report()["chained"] == 0 and batch.map.mode == "identity"
    hidden, unembed, valid = jnp.asarray(batch.hidden[made.sync]), jnp.asarray(batch.unembed), batch.map.teacher_valid
    values, ids, total = (np.asarray(x) for x in ops.topk(hidden, unembed, 5, 64, valid))
    count = int(made.report()["positions"])
    assert np.array_equal(got.units[made.row[:count], :5], ids[:count])
    np.testing.assert_allclose(got.values[made.row[:count], :5], (values - total[:, None])[:count], rtol=1e-5, atol=1e-6)
    arranged = arrange(unembed, layout.identity(len(valid), 64, valid))  # ... whose values are those of the plain search, bit for bit
    plain = jax.jit(aligned_topk, static_argnames="k")(hidden, arranged, k=5)
    assert np.array_equal(got.values[made.row[:count], :5], np.asarray(plain.values - plain.logsumexp[:, None])[:count])
    assert np.isneginf(got.values[:, 5]).all() and (got.alone == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unembed": np.zeros((7, D), np.float32)}, "the map is of a teacher with 35 ids, and its output matrix has 7 rows"),
        ({"unembed": np.zeros((35, D + 1), np.float32)}, "of one width D"),
        ({"rows": 10}, "and there are 10"),
        ({"k": 0}, "k is 0"),
        ({"hidden": np.zeros((9, D), np.float32)}, "of hidden, and there are 9"),
        ({"tables": "of another"}, "another vocabulary map or capacity"),
    ],
)
def test_mistakes_are_one_line(known, pair, change, message):
    batch, _, made = known
    tables = positions.tables(batch.map) if "tables" not in change else positions.tables(pair(16, "shared").map)
    given = {"hidden": batch.hidden, "unembed": batch.unembed, "k": 4, "rows": ROWS} | change | {"tables": tables}
    given |= {name: jnp.asarray(given[name]) for name in ("hidden", "unembed")}
    with pytest.raises(ValueError, match=message) as raised:
        aligned_targets(positions=made, **given)
    assert "\n" not in str(raised.value)


HARD = ["x = 12345678.90;\r\n\tdef f(a):", "\u8a9e\u8a00 \U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea", " a", "\n\n    if x:\n", ""]


@pytest.mark.parametrize("names", [("qwen3", "mistral"), ("mistral", "qwen3")])
def test_real_tokenizers_equal_the_dense_target(tokenizers, shared_data, names):
    """Real text, hard text, a turn cut within a character, and bytes that are no text."""
    student, teacher = (tokenizers[name] for name in names)
    made = vocab_map.build(student, teacher)
    with gzip.open(shared_data / "corpora/python-docs/python3.11_pages.jsonl.gz", "rt") as file:
        texts = [json.loads(next(file))["text"][600:1000], *HARD]
    with gzip.open(shared_data / "math/gsm8k_train.jsonl.gz", "rt") as file:
        texts.append(json.loads(next(file))["answer"])
    pairs = [([*student.encode(t), student.eos_id], [*teacher.encode(t), teacher.eos_id], t.encode()) for t in texts]
    single = [{b: i for i, b in enumerate(byte_table.of(t).bytes) if len(b) == 1} for t in (student, teacher)]
    pairs.append((*([one[bytes([b])] for b in b"\xff\xc3a\xe8\xaa"] for one in single), b"\xff\xc3a\xe8\xaa"))
    ids = [student.encode(" caf\u00e9"), [*teacher.encode(" caf"), single[1][b"\xc3"]]]
    pairs.append((*ids, None))
    rng = np.random.default_rng(0)
    rows = [rows_of(rng, [len(pair[side]) for pair in pairs], ROWS) for side in (0, 1)]
    turns = [positions.Turn(*pair[:2], *where, pair[2]) for pair, *where in zip(pairs, *rows, strict=True)]
    hidden, unembed = rng.normal(size=(ROWS, D)).astype(np.float32), rng.normal(size=(len(made.teacher_valid), D)).astype(np.float32)
    batch = Batch(made, turns, hidden, unembed)
    got, found = batch.targets(16)
    counts = assert_dense(batch, got, found, 16, atol=1e-7)
    assert counts[:2].all() and (names[0] == "mistral" or counts[2] > 3)
    assert (found.wide_high > 0).any() == (names[0] == "mistral") and 0 < len(found.masked) < 6
