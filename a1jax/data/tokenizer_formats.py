"""One face for all tokenizers, and two families behind it: SentencePiece models and Hugging Face ``tokenizer.json``.

Both encode a piece of text as it is: no dummy prefix, no added begin or end token, so pieces can be encoded one by one and joined.
Both decode through their byte table, so decoding is exact for whatever ids a model samples.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from a1jax.align import byte_table as bytes_of
from a1jax.align import roles as control_roles
from a1jax.data.errors import DataError

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "</s>")
_PADS = ("<|endoftext|>", "<pad>", "<unk>", "</s>")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer. Build one with ``tokenizer.load`` or ``tokenizer.train_sentencepiece``."""

    path: str  # the file it came from
    vocab_size: int  # ids are 0 .. vocab_size - 1; some may be holes (None in the byte table)
    pad_id: int  # fills slots nothing looks at
    eos_id: int  # ends a model's turn: sampling stops on it
    bos_id: int | None  # never added by encode
    chat_template: str | None  # Jinja source; None: the built-in Qwen-style template is used
    fingerprint: str  # SHA-256 of the byte table
    spelling: tuple[str, ...]  # text of every id as the chat template would write it ("" for holes)
    table: tuple[bytes | None, ...] = dataclasses.field(repr=False)  # see byte_table
    pieces: dict[str, int] = dataclasses.field(repr=False)  # atomic text -> id, control and added tokens only
    encoder: Callable[[str], list[int]] = dataclasses.field(repr=False)
    batch_encoder: Callable[[Sequence[str]], list[list[int]]] = dataclasses.field(repr=False)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` [T]. Control tags spelled in the text become their ids where the vocabulary parses them (as Hugging Face
        does); lone surrogates, which no UTF-8 has, are read as U+FFFD."""
        return self.encoder(_well_formed(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[encode(t) for t in texts]``, faster."""
        return self.batch_encoder([_well_formed(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; control tokens are spelled out, bytes that are no UTF-8 become U+FFFD, ids out of range add nothing."""
        size = self.vocab_size
        known = ((self.table[i], i) for i in map(int, ids) if 0 <= i < size)
        return b"".join(self.spelling[i].encode("utf-8") if b is None else b for b, i in known).decode("utf-8", "replace")

    def byte_table(self) -> list[bytes | None]:
        """Id -> bytes of text [V]; None for control tokens and for ids that no token has."""
        return list(self.table)

    def roles(self) -> dict[str, int]:
        """Control role -> id, for the roles that are one id here: turn_start, turn_end, eos, bos, pad, think_open, ... (the table and
        several ids of one role: ``a1jax.align.roles``)."""
        found = control_roles.find(self.pieces, self.eos_id, self.bos_id, self.pad_id)
        ends = {"eos": self.eos_id, "pad": self.pad_id} | ({} if self.bos_id is None else {"bos": self.bos_id})
        return {role: ids[0] for role, ids in found.items()} | ends

    @property
    def turn_end(self) -> str:
        """Text of the token that ends a model's turn."""
        return self.spelling[self.eos_id]

    def with_template(self, chat_template: str | None) -> Tokenizer:
        """The same tokenizer with another chat template (None: the built-in one)."""
        return dataclasses.replace(self, chat_template=chat_template)


def _well_formed(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finish(file, config, spelling, table, pieces, defaults, encoder, batch_encoder) -> Tokenizer:
    """Choose the special ids (the config's word first, then ``defaults``, then known spellings) and build the Tokenizer."""

    def pick(key: str, spellings: Sequence[str]) -> int | None:
        named = config.get(key)
        if named in pieces:
            return pieces[named]
        known = [pieces[text] for text in spellings[:1] if text in pieces]  # the Qwen tag, where it exists, is what a turn ends with
        own = [defaults[key]] if defaults.get(key, -1) >= 0 else []
        return next(iter(known + own + [pieces[text] for text in spellings if text in pieces]), None)

    eos = pick("eos_token", _TURN_ENDS)
    if eos is None:
        raise DataError(f"tokenizer {file} has no end-of-turn token: name one as eos_token in a tokenizer_config.json beside it")
    pad = pick("pad_token", _PADS)
    return Tokenizer(
        path=str(file), vocab_size=len(table), pad_id=eos if pad is None else pad, eos_id=eos, bos_id=pick("bos_token", ("<s>",)),
        chat_template=config.get("chat_template"), fingerprint=bytes_of.fingerprint(table), spelling=tuple(spelling),
        table=tuple(table), pieces=pieces, encoder=encoder, batch_encoder=batch_encoder,
    )  # fmt: skip


def sentencepiece_model(file: pathlib.Path, raw: bytes, config: dict[str, Any]) -> Tokenizer:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(raw)
        if not proto.pieces:
            raise ValueError("no pieces")
        # A dummy prefix would put a space before every piece of a chat, and trimming would eat the template's own newlines.
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf and sentencepiece raise several unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} is neither a tokenizer.json nor a SentencePiece model ({reason})") from None
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    silent = (kinds.UNKNOWN, kinds.CONTROL, kinds.UNUSED)
    names = [piece.piece for piece in proto.pieces]
    control = [piece.type in silent or piece.piece in bytes_of.CONTROL_TEXT for piece in proto.pieces]
    table = [None if c else bytes_of.sentencepiece_bytes(name) for name, c in zip(names, control, strict=True)]
    spelling = [name if b is None else b.decode("utf-8", "replace") for name, b in zip(names, table, strict=True)]
    special = (*silent, kinds.USER_DEFINED)
    pieces = {text: i for i, (text, piece) in enumerate(zip(spelling, proto.pieces, strict=True)) if piece.type in special}
    by_name = {name: i for i, name in enumerate(names)}
    mark = [by_name.get(f"<0x{byte:02X}>") for byte in bytes_of.SPACE.encode("utf-8")]
    mark = [] if None in mark else mark  # a model without byte pieces cannot tell a real U+2581 from a space

    def encode(text: str) -> list[int]:
        if not mark or bytes_of.SPACE not in text:
            return processor.encode(text)
        first, *rest = text.split(bytes_of.SPACE)
        return processor.encode(first) + [i for part in rest for i in (*mark, *processor.encode(part))]

    defaults = {"eos_token": processor.eos_id(), "bos_token": processor.bos_id(), "pad_token": processor.pad_id()}
    return finish(file, config, spelling, table, pieces, defaults, encode, lambda texts: [encode(text) for text in texts])


def hugging_face(file: pathlib.Path, raw: bytes, config: dict[str, Any]) -> Tokenizer:
    try:
        spec = json.loads(raw)
        byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
        model = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec)))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{file} is not a readable tokenizer.json ({str(error).splitlines()[0]})") from None
    kind = spec["model"].get("type")
    if kind not in ("BPE", "Unigram", None):
        raise DataError(f"{file} holds a {kind} model, whose tokens have no fixed bytes: use a BPE, Unigram or SentencePiece tokenizer")
    marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if spec["model"].get(key)]
    if marks:
        raise DataError(
            f"{file} marks words with {marks[0]}, so its tokens have no fixed bytes: use a byte-level or SentencePiece tokenizer"
        )
    added = {entry["id"]: entry for entry in spec.get("added_tokens", [])}
    vocabulary = model.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    spelling, table = [""] * size, [None] * size
    of = bytes_of.gpt2_bytes if byte_level else bytes_of.sentencepiece_bytes
    for token, i in vocabulary.items():
        raw_bytes = token.encode("utf-8") if i in added else of(token)
        spelling[i] = token if i in added else raw_bytes.decode("utf-8", "replace")
        table[i] = None if i in added and added[i]["special"] else raw_bytes
    pieces = {entry["content"]: i for i, entry in added.items()}

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in model.encode_batch_fast(list(texts), add_special_tokens=False)]

    return finish(file, config, spelling, table, pieces, {}, encode, encode_batch)


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json without anything that puts a space before the text it is given, truncates or pads it."""

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(n) for n in node if not (isinstance(n, dict) and n.get("type") == "Prepend")]
        if not isinstance(node, dict):
            return node
        node = {key: walk(value) for key, value in node.items()}
        if node.get("type") == "Metaspace":
            node |= {"prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in node else {})
        return node | ({"add_prefix_space": False} if node.get("type") == "ByteLevel" else {})

    normalizer = spec.get("normalizer")
    normalizer = None if normalizer and normalizer.get("type") == "Prepend" else walk(normalizer)
    plain = {"truncation": None, "padding": None, "normalizer": normalizer, "pre_tokenizer": walk(spec.get("pre_tokenizer"))}
    return spec | plain
