"""The two real tokenizers, in both directions, on real text: maps, positions and targets; speed with wide bounds."""

import gzip
import json
import time
import unicodedata

import numpy as np
import pytest

from a1jax import main
from a1jax.align import byte_table, spans, target, vocab_map
from a1jax.config import ConfigError

PAIRS = [("qwen3", "mistral"), ("mistral", "qwen3")]


@pytest.fixture(scope="module")
def tables(tokenizers):
    return {name: byte_table.of(made) for name, made in tokenizers.items()}


@pytest.fixture(scope="module")
def maps(tables):
    """(student, teacher) -> (map, seconds it took)."""
    found = {}
    for pair in PAIRS:
        began = time.process_time()
        found[pair] = (vocab_map.build(*(tables[name] for name in pair)), time.process_time() - began)
    return found


@pytest.fixture(scope="module")
def texts(shared_data):
    """Real assistant turns of several kinds, and what real text seldom has."""
    found = []
    with gzip.open(shared_data / "corpora/python-docs/python3.11_pages.jsonl.gz", "rt") as file:
        found += [json.loads(next(file))["text"][:4000] for _ in range(15)]
    with gzip.open(shared_data / "math/gsm8k_train.jsonl.gz", "rt") as file:
        found += [json.loads(next(file))["answer"] for _ in range(40)]
    with gzip.open(shared_data / "trajectories/webdancer/webdancer_sample_traj.jsonl.gz", "rt") as file:
        found += [str(json.loads(next(file)))[:4000] for _ in range(8)]
    hard = [
        "",
        " ",
        "a",
        "\r\n\t\r\n",
        "\u8a9e\u8a00\u306e\u6a21\u578b",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
        "x = 12345678.90;\n" * 5,
    ]
    return (
        found + hard + ['<think>\n17 * 23\n</think>\n<tool_call>\n{"a": 1}\n</tool_call>', " <s></s>[INST]<|im_end|x|>", "\u2581 a\u2581b"]
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_a_real_map(maps, tables, pair):
    made, seconds = maps[pair]
    stats = made.stats()
    student, teacher = (tables[name] for name in pair)
    assert seconds < 10  # 0.3 s and 0.7 s
    assert stats["exact"] + stats["prefix"] + stats["residual"] == made.text_count and stats["residual"] == 0  # both can write all bytes
    assert stats["unmatched"] == 0 and stats["exact"] > 29_000
    words = {b: int(student.canonical[i]) for i, b in enumerate(student.bytes) if b}
    rng = np.random.default_rng(0)
    for t in rng.choice(made.order[: made.text_count], 500).tolist():
        b = teacher.bytes[t]
        assert made.unit_of_teacher[t] == next(words[b[:n]] for n in range(len(b), 0, -1) if b[:n] in words)
    for t in rng.choice(made.order[: made.text_count], 20).tolist():
        b = teacher.bytes[t]
        d = int(rng.integers(0, len(b)))
        at = made.teacher_starts[t] + d
        mates = made.order[made.low[at] : made.high[at]]
        assert len(mates) == sum(other.startswith(b[:d]) for other in teacher.bytes if other) and t in mates
    assert made.roles["stop"] == (((151645, 151643), (2,)) if pair[0] == "qwen3" else ((2,), (151645, 151643)))
    assert not np.isin(made.unit_of_teacher, [i for role in ("bos", "pad") for i in student.roles.get(role, ())]).any()


def test_numbers_reach_only_what_the_teacher_writes(maps, tables):
    """Both write digit by digit; every unit with a digit is one digit or mixed with other characters in both."""
    for pair, (made, _) in maps.items():
        units = np.unique(made.unit_of_teacher[made.unit_of_teacher >= 0])
        numbers = [tables[pair[0]].bytes[u] for u in units if tables[pair[0]].bytes[u].isdigit()]
        assert sorted(numbers) == [str(n).encode() for n in range(10)]


@pytest.mark.parametrize("pair", PAIRS)
def test_every_real_turn_is_aligned_whole(maps, tokenizers, tables, texts, pair):
    made, _ = maps[pair]
    student, teacher = (tokenizers[name] for name in pair)
    counts = np.zeros(4)
    for text in texts:
        ours, theirs = [*student.encode(text), student.eos_id], [*teacher.encode(text), teacher.eos_id]
        raw = byte_table.join(student.table, ours)
        found = spans.align(ours, theirs, made, text)
        if raw != byte_table.join(teacher.table, theirs):  # one of them normalises
            assert found.masked.any() and unicodedata.normalize("NFC", text) != text
            continue
        assert not found.masked.any()
        ends = np.cumsum([len(student.table[i] or b"\0") for i in ours])
        begins = np.append(0, ends)[:-1]
        theirs_at = np.append(0, np.cumsum([len(teacher.table[t] or b"\0") for t in theirs]))
        assert np.array_equal(theirs_at[found.teacher] + found.offset, begins) and np.array_equal(theirs_at[found.last] + found.reach, ends)
        assert np.all(theirs_at[found.teacher + 1] > begins) and np.array_equal(found.complete, theirs_at[found.last + 1] == ends)
        report = found.report()
        counts += len(ours) * np.array([1, report["straddled"], report["chained"], report["masked"]])
    assert counts[0] > 15_000 and (counts[1:3] / counts[0] > 0.005).all() and (counts[1:3] / counts[0] < 0.4).all()


def test_a_normaliser_is_masked_where_it_changed_something(maps, tokenizers):
    text = "The caf\u0065\u0301 was open all night long, and the na\u0069\u0308ve guests stayed until the morning came."
    made, _ = maps["mistral", "qwen3"]
    ours = tokenizers["mistral"].encode(text)
    found = spans.align(ours, tokenizers["qwen3"].encode(text), made)  # it composes the accents
    masked = byte_table.join(tokenizers["mistral"].table, [i for i, hidden in zip(ours, found.masked, strict=True) if hidden]).decode()
    assert "\u0301" in masked and "\u0308" in masked and len(masked) < 20 and 0 < found.report()["masked"] < 0.4


@pytest.mark.parametrize("pair", PAIRS)
def test_targets_on_real_vocabularies(maps, tokenizers, pair):
    made, _ = maps[pair]
    student, teacher = (tokenizers[name] for name in pair)
    text = "Paris has 2,161 thousand inhabitants; \u8a00\u8a9e\U0001f600\r\n\tdef embeddings(): return"
    ours, theirs = [*student.encode(text), student.eos_id], [*teacher.encode(text), teacher.eos_id]
    found = spans.align(ours, theirs, made, text)
    assert found.straddled.any() and found.chained.any() and not found.masked.any()
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (len(theirs), len(made.teacher_valid))).astype(np.float32)
    log_p = target.log_softmax(logits, made.teacher_valid)
    got = target.target(log_p, ours, theirs, found, made)
    np.testing.assert_allclose(got.q.sum(axis=1, dtype=np.float64) + got.residual, 1, atol=2e-5)
    exact = target.target(target.log_softmax(logits.astype(np.float64), made.teacher_valid), ours, theirs, found, made)
    np.testing.assert_allclose(exact.q.sum(axis=1) + exact.residual, 1, atol=1e-9)
    assert (got.q >= 0).all() and (exact.q >= 0).all()
    np.testing.assert_allclose(got.q, exact.q, rtol=1e-3, atol=1e-9)
    stops = made.roles["stop"][1]
    written = [log_p[k, t] for k, t in enumerate(theirs[:-1])] + [np.log(np.exp(log_p[-1, list(stops)]).sum())]
    assert exact.score.sum() == pytest.approx(np.sum(written, dtype=np.float64), abs=1e-3)
    units = np.unique(made.unit_of_student[made.unit_of_student >= 0])
    apart = np.flatnonzero(got.alone >= 0)
    assert (found.chained | found.straddled)[apart].all() and (len(apart) or pair[0] == "mistral")  # few of its tokens are none
    got.q[apart, got.alone[apart]] = 0
    assert not np.delete(got.q, units, axis=1).any()


def test_a_byte_teacher_gives_equal_bytes_whatever_their_spelling(tables, maps):
    made, _ = maps["mistral", "qwen3"]
    ids = {b: i for i, b in enumerate(tables["qwen3"].bytes) if b}
    for piece in (b" the", b"\n", b" ", "\u8a9e".encode(), b"\xff"):
        assert tables["mistral"].bytes[made.unit_of_teacher[ids[piece]]] == piece


def test_synthetic_vocabularies_of_full_size_are_mapped_in_time():
    rng = np.random.default_rng(0)

    def words(count):
        lengths = np.clip(rng.geometric(0.16, count), 2, 60)
        raw = (rng.zipf(1.3, int(lengths.sum())) % 90 + 33).astype(np.uint8).tobytes()
        ends = np.cumsum(lengths)
        drawn = {raw[e - n : e] for e, n in zip(ends.tolist(), lengths.tolist(), strict=True)}
        return byte_table.make([*(bytes([n]) for n in range(256)), *sorted(drawn)][:count])

    student, teacher = words(340_000), words(240_000)
    assert min(len(student), len(teacher)) > 140_000
    began = time.process_time()
    made = vocab_map.build(student, teacher)
    assert time.process_time() - began < 10  # 2 s
    assert made.stats()["residual"] == 0


def test_the_command(tmp_path, capsys, shared_data, tokenizers):
    folder = shared_data / "tokenizers"
    argv = ["vocab-map", str(folder / "mistral"), str(folder / "mistral"), "-o", str(tmp_path / "m.npz"), "--teacher-size", "32800"]
    (tmp_path / "roles.json").write_text('{"x_image": ["[IMG]"]}')
    assert main.main([*argv, "--teacher-roles", str(tmp_path / "roles.json")]) == 0
    out = capsys.readouterr().out
    assert (
        "mode               two_sided\n" in out
        and "exact              32017\n" in out
        and "role stop          student [2] teacher [2]" in out
    )
    student = byte_table.of(tokenizers["mistral"])
    teacher = byte_table.of(tokenizers["mistral"], 32800, {"x_image": [10]})
    made = vocab_map.load(tmp_path / "m.npz", student, teacher)
    assert len(made.unit_of_teacher) == 32800 and not made.teacher_valid[32768:].any()
    with pytest.raises(ConfigError, match="another teacher .32800 ids. than .*mistral.* .32768 ids."):
        vocab_map.load(tmp_path / "m.npz", student, tokenizers["mistral"])


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["nowhere", "{m}", "-o", "x.npz"], "no tokenizer file at nowhere"),
        (["{m}", "{here}", "-o", "x.npz"], "no tokenizer in folder"),
        (["{m}", "{m}", "-o", "{here}/no/x.npz"], "cannot be written"),
        (["{m}", "{m}", "-o", "{here}/x.npz", "--mode", "both"], "choose one of identity"),
        (["{m}", "{m}", "-o", "{here}/x.npz", "--student-size", "10"], "more than vocab_size 10"),
        (["{m}", "{m}", "-o", "{here}/x.npz", "--student-roles", "{here}/none.json"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, shared_data, argv, part):
    words = {"m": shared_data / "tokenizers" / "mistral", "here": tmp_path}
    assert main.main(["vocab-map", *(word.format(**words) for word in argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("a1jax: ") and err.count("\n") == 1 and part in err
    assert not list(tmp_path.iterdir())
