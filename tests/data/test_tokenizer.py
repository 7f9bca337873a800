import dataclasses
import hashlib
import json
import lzma

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from a1jax.align import byte_table
from a1jax.data import tokenizer
from a1jax.data.errors import DataError

CALL = '<tool_call>\n{"name": "read_page", "arguments": {"title": "'
HARD = ["", " ", "  two  spaces ", "\n\n \t\r\n", "\0", "\u2581", "a\u2581 b", "é😀語", "<0x0A>", "</s><unk>", "x" * 3000, CALL, "\ufffd"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from([*HARD, "<|im_end|>", "<think>", " the", "page"]), max_size=8).map("".join))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_trained_vocabulary_loses_nothing(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(0 <= i < small.vocab_size for i in ids)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_mistral_loses_nothing_and_adds_no_space(mistral, text):
    assert mistral.decode(mistral.encode(text)) == text


@pytest.mark.parametrize("text", HARD)
def test_hard_texts(small, mistral, text):
    assert small.decode(small.encode(text)) == text
    assert mistral.decode(mistral.encode(text)) == text


def test_every_symbol_is_one_id_wherever_it_stands(small):
    for symbol in (CALL, '"}}\n</tool_call>', "<think>", "</think>", "a, \"b\" 'c'", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "\n"):
        own = small.encode(symbol)
        assert len(own) == 1, symbol
        assert small.encode(f"pa{symbol}ge") == small.encode("pa") + own + small.encode("ge")
    assert small.encode(CALL)[0] == 3  # symbols follow the control tokens, in their order


def test_ids_of_a_trained_vocabulary(small):
    assert (small.pad_id, small.eos_id, small.turn_end) == (0, 2, "<|im_end|>")
    assert small.spelling[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert small.byte_table()[:3] == [None, None, None] and small.byte_table()[3] == CALL.encode()
    assert small.roles()["turn_start"] == 1 and small.roles()["think_open"] == small.encode("<think>")[0]
    assert small.chat_template is None
    single = {b for b in small.byte_table() if b is not None and len(b) == 1}
    assert len(single) == 256  # any text can be spelled


def test_training_is_deterministic_and_learns(tmp_path, pages):
    one = tokenizer.train_sentencepiece(pages, tmp_path / "a.model", 1000)
    two = tokenizer.train_sentencepiece(iter(pages), tmp_path / "b.model", 1000)
    assert hashlib.sha256((tmp_path / "a.model").read_bytes()).digest() == hashlib.sha256((tmp_path / "b.model").read_bytes()).digest()
    assert one.fingerprint == two.fingerprint and one.vocab_size == 1000
    assert len(one.encode(pages[0])) < len(pages[0].encode()) / 2
    assert "\n" not in "".join(text for text in one.spelling if len(text) > 1)  # no piece runs over a line end


def test_unigram_keeps_symbols_whole(tmp_path, pages):
    unigram = tokenizer.train_sentencepiece(pages, tmp_path / "u.model", 700, [CALL], model_type="unigram")
    assert len(unigram.encode(CALL)) == 1 and unigram.decode(unigram.encode(pages[0])) == pages[0]


@pytest.mark.parametrize(
    ("texts", "size", "symbols", "message"),
    [
        (["hello"], 100, (), "too small"),
        ([], 1000, (), "no text"),
        (["<|im_end|>"], 1000, (), "no text"),
        (["hello"], 1000, ("",), "symbol"),
        (["hello"], 1000, ("a\u2581",), "symbol"),
    ],
)
def test_training_refuses_in_one_line(tmp_path, texts, size, symbols, message):
    with pytest.raises(DataError, match=message) as error:
        tokenizer.train_sentencepiece(texts, tmp_path / "x.model", size, symbols)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.model").exists()


def test_mistral_equals_sentencepiece_but_for_the_dummy_prefix(mistral, pages):
    plain = sentencepiece.SentencePieceProcessor(model_file=mistral.path)
    text = pages[3][:5000]
    assert not text.startswith(" ")
    assert mistral.encode(" " + text) == plain.encode(text)  # its prefix is that space
    assert mistral.encode("the")[:1] != plain.encode("the")[:1]
    assert (mistral.eos_id, mistral.bos_id, mistral.turn_end) == (2, 1, "</s>")
    table = mistral.byte_table()
    assert table[:3] == [None, None, None] and table[plain.piece_to_id("<0x0A>")] == b"\n"
    assert table[plain.piece_to_id("[INST]")] is None and table[plain.piece_to_id("\u2581the")] == b" the"
    assert mistral.encode("</s>[INST]") != [2, 3]  # control pieces cannot be written as text


def test_qwen3_equals_the_tokenizers_library(qwen3, shared_data, real):
    library = tokenizers.Tokenizer.from_str(lzma.open(shared_data / "tokenizers/qwen3/tokenizer.json.xz", "rt", encoding="utf-8").read())
    for run in real[0][:: len(real[0]) // 25]:
        text = "".join(m["content"] for m in run.messages)[:20_000]
        ids = library.encode(text, add_special_tokens=False).ids
        assert qwen3.encode(text) == ids == qwen3.encode_batch([text])[0]
        assert qwen3.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert byte_table.join(qwen3.table, ids) == library.decode(ids).encode()


def test_qwen3_special_tokens_come_from_its_config(qwen3):
    assert (qwen3.vocab_size, qwen3.eos_id, qwen3.pad_id, qwen3.bos_id) == (151669, 151645, 151643, None)
    assert "tool_call" in qwen3.chat_template
    assert qwen3.encode("<|im_start|>user") == [151644, *qwen3.encode("user")]
    assert qwen3.table[151645] is None and qwen3.table[qwen3.encode("<think>")[0]] == b"<think>"
    assert qwen3.roles()["think_open"] == 151667 and qwen3.roles()["tool_call_close"] == 151658


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 500)))
def test_any_ids_decode(small, ids):
    small.decode(ids)


def test_lone_surrogates_are_replaced(small):
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"


def test_fingerprint_is_of_the_byte_table(small, mistral):
    assert small.fingerprint == byte_table.fingerprint(small.byte_table()) != mistral.fingerprint


def _byte_level(folder, **config):
    """A tiny Hugging Face tokenizer on disk, with a config beside it."""
    alphabet = sorted(byte_table.gpt2_characters())
    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<pad>"])
    made.add_tokens(["<tool>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.load(folder / "tokenizer.json")


def test_hugging_face_config(tmp_path):
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    made = _byte_level(tmp_path, eos_token={"content": "<eos>"}, pad_token="<pad>", chat_template=templates)
    assert (made.eos_id, made.pad_id, made.chat_template, made.vocab_size) == (256, 257, "yes", 259)
    assert made.decode(made.encode("é x<tool><eos>")) == "é x<tool><eos>"  # and no prefix space
    assert made.table[256] is None and made.table[258] == b"<tool>"
    (tmp_path / "chat_template.jinja").write_text("file wins")
    assert tokenizer.load(tmp_path).chat_template == "file wins"


def test_a_tokenizer_without_turn_end_is_refused(tmp_path):
    with pytest.raises(DataError, match="no end-of-turn token"):
        _byte_level(tmp_path)


def test_metaspace_prefix_is_taken_off(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "\u2581": 2, "\u2581a": 3, "a": 4, "b": 5} | {f"<0x{n:02X}>": 6 + n for n in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path)
    assert loaded.encode("ab") == [4, 5] and loaded.encode(" ab\n") == [3, 5, 6 + 10] and loaded.decode(loaded.encode(" ab\n")) == " ab\n"
    assert loaded.table[1:6] == (None, b" ", b" a", b"a", b"b") and loaded.table[6 + 0xFF] == b"\xff"


@pytest.mark.parametrize("mark", ["end_of_word_suffix", "continuing_subword_prefix"])
def test_marked_words_have_no_fixed_bytes(tmp_path, mark):
    model = tokenizers.models.BPE(vocab={"a</w>": 0, "</s>": 1}, merges=[], **{mark: "</w>"})
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=f"marks words with {mark}"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"{", b'{"model": 1}', b"\xfd7zXZ\x00broken", b"\x1f\x8bbroken"])
def test_files_that_are_no_tokenizer(tmp_path, content):
    file = tmp_path / "x.model"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        tokenizer.load(file)
    assert "\n" not in str(error.value) and "x.model" in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no tokenizer file"):
        tokenizer.load(tmp_path / "none.json")
    with pytest.raises(DataError, match="no tokenizer in folder"):
        tokenizer.load(tmp_path)


def test_with_template_changes_nothing_else(small):
    other = small.with_template("x")
    assert other.chat_template == "x" and dataclasses.replace(other, chat_template=None).encode("page") == small.encode("page")
