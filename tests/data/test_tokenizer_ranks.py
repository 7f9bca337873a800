"""Rank files: merging by rank, special tokens, patterns, refusals; the same ids as the library's for a real vocabulary."""

import base64
import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.data import tokenizer, tokenizer_ranks
from a1jax.data.errors import DataError

BYTES = [bytes([n]) for n in range(256)]
WORDS = [b"ab", b"bc", b"abc", b"aa", b"aaa", b"abcab", "\u8a9e".encode()[:2], "\u8a9e".encode(), b" a", b"\r\n"]


def _write(folder, tokens, name="some.tiktoken", **config):
    config = {
        "eos_token": "<end>",
        "added_tokens_decoder": {"300": {"content": "<end>"}, "301": {"content": "<t>", "special": False}},
    } | config
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.load(folder)


def _plainly(word, ranks):
    """Merging as it is defined: look at all neighbours every time."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([b]) for b in word]
    while True:
        joins = [(ranks[a + b], k) for k, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joins:
            return [ranks[part] for part in parts]
        _, k = min(joins)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=12).map(str.encode), st.permutations(WORDS))
def test_merging_is_its_definition(word, words):
    ranks = {token: rank for rank, token in enumerate([*BYTES, *words])}
    assert tokenizer_ranks.merge(word, ranks) == _plainly(word, ranks)


def test_by_hand(tmp_path):
    made = _write(tmp_path, [*BYTES, *WORDS])
    assert made.vocab_size == 302 and made.eos_id == 300 and made.table[270] is None and made.spelling[270] == ""
    assert made.encode("abcb") == [258, 98]  # ab before bc, then abc
    assert made.encode("bcab") == [257, 256] and made.encode("aaaa") == [259, 259]
    assert made.encode("x<end>\u8a9e<t>") == [120, 300, 263, 301] and made.table[300] is None and made.table[301] == b"<t>"
    assert made.encode(" a\r\n") == [264, 265] and made.encode("") == []
    assert made.encode_batch(["ab", "c"]) == [[256], [99]]


@settings(max_examples=100, deadline=None)
@given(st.text(), st.lists(st.sampled_from(["<end>", "<t>", "<e", "\r\n\t", "abcab", "\U0001f600", "\ud800"]), max_size=4))
def test_nothing_is_lost(tmp_path_factory, text, parts):
    made = _write(tmp_path_factory.mktemp("ranks"), [*BYTES, *WORDS]) if not _MADE else _MADE[0]
    _MADE[:] = [made]
    text = text.join(["", *parts, ""])
    assert made.decode(made.encode(text)) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_MADE: list = []


def test_the_pattern_is_the_files_own_then_its_names_then_the_usual_one(tmp_path):
    tokens = [*BYTES, b"12", b"123", b"1234", b"lC"]

    def ids(name="some.tiktoken", **config):
        for old in tmp_path.glob("*.tiktoken"):
            old.unlink()
        return _write(tmp_path, tokens, name, **config).encode("1234 elCa")

    assert ids()[:2] == [257, 52] == ids("cl100k_base.tiktoken")[:2]  # three digits at most
    assert ids("gpt2.tiktoken")[0] == 258 == ids("p50k_base.tiktoken")[0]
    assert 259 in ids() and 259 not in ids("o200k_base.tiktoken")  # it cuts before a capital letter
    assert ids("cl100k_base.tiktoken", pat_str=r"\d|\D+")[:4] == [49, 50, 51, 52]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda lines: [*lines, b"!!! 7"], {}, ":257 is no"),
        (lambda lines: [*lines, b"YQ= 400"], {}, ":257 is no"),
        (lambda lines: [*lines, lines[3]], {}, ":257 gives token"),
        (lambda lines: [*lines, b"YWI= 3"], {}, "one rank to several"),
        (lambda lines: lines[:-1], {}, "no token for byte 255"),
        (lambda lines: lines, {"pat_str": "("}, "no regular expression"),
        (lambda lines: lines, {"added_tokens_decoder": {"3": {"content": "<end>"}}}, "id 3 is a token"),
        (lambda lines: lines, {"added_tokens_decoder": [1]}, "another form"),
        (lambda lines: lines, {"added_tokens_decoder": {}}, "no end-of-turn token"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, change, config, message):
    config = {"added_tokens_decoder": {"300": {"content": "<end>"}}, "eos_token": "<end>"} | config
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(BYTES)]
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(change(lines)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message) as error:
        tokenizer.load(tmp_path / "x.tiktoken")
    assert "\n" not in str(error.value)


def test_a_real_vocabulary_as_ranks_gives_the_librarys_ids(tmp_path, qwen3, pages, real):
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    special = {str(i): {"content": text, "special": qwen3.table[i] is None} for text, i in qwen3.pieces.items()}
    plain = [b for i, b in enumerate(qwen3.table) if b is not None and str(i) not in special]
    made = _write(tmp_path, plain, pat_str=pattern, eos_token="<|im_end|>", pad_token="<|endoftext|>", added_tokens_decoder=special)
    assert made.fingerprint == qwen3.fingerprint and made.roles() == qwen3.roles()
    texts = [page[:20_000] for page in pages[:8]] + ["".join(m["content"] for m in run.messages)[:5000] for run in real[0][::60]]
    for text in texts:
        assert made.encode(text) == qwen3.encode(text)
    assert sum(map(len, texts)) > 90_000


def test_a_long_word_takes_no_quadratic_time(tmp_path):
    made = _write(tmp_path, [*BYTES, *WORDS], pat_str=r"[\s\S]+")
    began = time.process_time()
    assert made.encode("abc" * 30_000) == [258] * 30_000
    assert time.process_time() - began < 10  # 0.3 s; looking at all neighbours every time takes minutes
