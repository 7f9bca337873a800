"""Byte tables: which bytes of text every token id stands for.

A tokenizer's plain table is a list over ids: the token's bytes, or None for control tokens and for ids that no token has. A ``ByteTable``
says which of the two, adds control roles, the rows of an output matrix that belong to no token, and which of two ids with equal bytes
the encoder writes. Facts of spelling, once: a SentencePiece U+2581 is a space and ``<0x0A>`` is that byte; GPT-2 style vocabularies
write every byte as one printable character. ``../shared/design/vocabulary_alignment.md``, section 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from a1jax.align import roles as control_roles
from a1jax.config import ConfigError

SPACE = "\u2581"
"""SentencePiece's spelling of a space."""

CONTROL_TEXT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Spellings that are control tokens wherever they are one id, though SentencePiece stores them as ordinary user symbols."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def gpt2_characters() -> dict[str, int]:
    """Character -> byte of the GPT-2 alphabet: printable Latin-1 characters are themselves, the other 68 bytes follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + n): byte for n, byte in enumerate(rest)}


_GPT2 = gpt2_characters()


def gpt2_bytes(token: str) -> bytes:
    """Bytes of a token spelled in the GPT-2 alphabet; a token with any other character is taken as plain text (an added token)."""
    try:
        return bytes([_GPT2[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: ``<0xHH>`` is one byte, U+2581 is a space, the rest is UTF-8."""
    match = _BYTE_PIECE.match(piece)
    if match:
        return bytes([int(match.group(1), 16)])
    return piece.replace(SPACE, " ").encode("utf-8")


def fingerprint(table: Sequence[bytes | None]) -> str:
    """SHA-256 (hex) of a byte table: equal exactly when size, every id's bytes and every None are equal."""
    digest = hashlib.sha256(len(table).to_bytes(8, "little"))
    for entry in table:
        digest.update(b"\x00" if entry is None else b"\x01" + len(entry).to_bytes(4, "little") + entry)
    return digest.hexdigest()


def join(table: Sequence[bytes | None], ids: Iterable[int]) -> bytes:
    """Concatenated bytes of ``ids``; control and unknown ids add nothing."""
    size = len(table)
    return b"".join(table[i] or b"" for i in ids if 0 <= i < size)


TEXT, CONTROL, INVALID = 0, 1, 2
"""Kinds of ids. Text ids stand for their bytes; control ids for a role, if any; invalid ones are padding rows of the output matrix and
holes: never in a softmax, a top-k or a log-sum-exp."""


class Tokenizer(Protocol):
    """What a byte table needs of a tokenizer; ``a1jax.data.tokenizer.Tokenizer`` is one."""

    path: str
    pad_id: int
    eos_id: int
    bos_id: int | None
    table: Sequence[bytes | None]
    spelling: Sequence[str]
    pieces: Mapping[str, int]
    encoder: Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class ByteTable:
    """What every id of an output matrix of V rows stands for. Build one with ``of`` or ``make``."""

    name: str  # where it came from, for messages
    bytes: tuple[bytes, ...]  # [V]; of a control token the text a tokenizer without it would write, b"" for none and for invalid ids
    kind: np.ndarray  # uint8 [V]: TEXT, CONTROL or INVALID
    canonical: np.ndarray  # int32 [V]: of several ids with equal bytes the one the encoder writes; itself elsewhere
    roles: control_roles.Roles  # role -> ids; a text id (an added token such as <think>) may have one too
    hash: str  # SHA-256 (hex) of all of the above but the name

    def __len__(self) -> int:
        return len(self.bytes)


def make(
    table: Sequence[bytes | None],
    spelling: Mapping[int, str] | None = None,
    roles: control_roles.Roles | None = None,
    vocab_size: int | None = None,
    encode: Callable[[str], list[int]] | None = None,
    name: str = "a table",
) -> ByteTable:
    """A ByteTable from its parts.

    table: bytes of text, or None. spelling: id -> text for the ids that are control tokens; other Nones are holes. roles: role -> ids.
    vocab_size: rows of the model's output matrix, at least len(table). encode: decides which of several ids with equal bytes is the
    canonical one; without it, or where the bytes are no text, the lowest id is.
    Raises ConfigError for a vocab_size that is too small, a role whose id does not exist, and an id with two roles.
    """
    size, spelling, roles = len(table) if vocab_size is None else vocab_size, dict(spelling or {}), dict(roles or {})
    if size < len(table):
        raise ConfigError(f"{name} has {len(table)} ids, more than vocab_size {size}: give the rows of the model's output matrix")
    seen: dict[int, str] = {}
    for role, ids in roles.items():
        for i in ids:
            if not 0 <= i < len(table) or (table[i] is None and i not in spelling):
                raise ConfigError(f"role {role!r} of {name}: {i} is no token among its {len(table)} ids; correct the role table")
            if seen.setdefault(i, role) != role:
                raise ConfigError(f"roles {seen[i]!r} and {role!r} of {name} both have id {i}; keep one")
    kind = np.full(size, INVALID, np.uint8)
    kind[: len(table)] = [TEXT if b else CONTROL if b is not None or i in spelling else INVALID for i, b in enumerate(table)]
    spelled = {i for role in control_roles.SPELLED for i in roles.get(role, ())}
    texts = tuple(b if b is not None else spelling.get(i, "").encode() if i in spelled else b"" for i, b in enumerate(table))
    texts += (b"",) * (size - len(table))
    canonical = _canonical(texts, encode)
    return ByteTable(name, texts, kind, canonical, roles, _hash(texts, kind, canonical, roles))


def of(tokenizer: Tokenizer | ByteTable, vocab_size: int | None = None, roles: control_roles.Own | None = None) -> ByteTable:
    """The ByteTable of a tokenizer (one that is a ByteTable already is returned as it is).

    vocab_size: rows of the model's output matrix where it is padded beyond the tokenizer's ids. roles: the user's additions to the
    role table, see ``roles``. Raises ConfigError as ``make`` and ``roles.find`` do.
    """
    if isinstance(tokenizer, ByteTable):
        return tokenizer
    spelling = {i: text for i, (b, text) in enumerate(zip(tokenizer.table, tokenizer.spelling, strict=True)) if b is None and text}
    ends: dict[str, Any] = {"turn_end": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
    found = control_roles.find(tokenizer.pieces, **ends, own=roles)
    return make(tokenizer.table, spelling, found, vocab_size, tokenizer.encoder, tokenizer.path)


def _canonical(texts: Sequence[bytes], encode: Callable[[str], list[int]] | None) -> np.ndarray:
    canonical = np.arange(len(texts), dtype=np.int32)
    groups: dict[bytes, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text, []).append(i)
    for text, ids in groups.items():
        if text and len(ids) > 1:
            canonical[ids] = _written(text, ids, encode)
    return canonical


def _written(text: bytes, ids: Sequence[int], encode: Callable[[str], list[int]] | None) -> int:
    try:
        written = encode(text.decode("utf-8")) if encode else []
    except UnicodeDecodeError:
        written = []
    return written[0] if len(written) == 1 and written[0] in ids else ids[0]


def _hash(texts: Sequence[bytes], kind: np.ndarray, canonical: np.ndarray, roles: control_roles.Roles) -> str:
    digest = hashlib.sha256(fingerprint(texts).encode())
    digest.update(kind.tobytes() + canonical.astype("<i4").tobytes())
    digest.update(repr(sorted((role, tuple(map(int, ids))) for role, ids in roles.items())).encode())
    return digest.hexdigest()
